"""sample.py: images that depend on (seed, index) alone, labels, refusals, and pictures from latents."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, call, ends
from PIL import Image
from test_train_sit import run_two

import dino
import fid
import sample as S
import sit
import vae as V


def images(folder):
    with np.load(folder / "samples.npz") as held:
        return held["arr_0"], held["latents"]


@pytest.fixture(scope="module")
def base(chain):
    command = f"--ckpt {chain.root}/sit --num 64 --steps 6 --cfg 2 --interval 0 0.75"
    call(S, command, f"--npz --batch 64 --out {chain.root}/samples")
    return command, images(chain.root / "samples")


@pytest.mark.parametrize("batch", [1, 7])
def test_an_image_does_not_depend_on_the_batch(base, tmp_path, batch):
    """Up to the rounding of kernels, which take other paths at other batch sizes: 1e-4 of the latents, one
    level of uint8."""
    call(S, base[0], f"--npz --batch {batch} --out {tmp_path}")
    pixels, latents = images(tmp_path)
    assert np.abs(latents - base[1][1]).max() < 1e-4 * np.abs(latents).max()
    assert np.abs(pixels.astype(int) - base[1][0]).max() <= 1


def test_two_processes_and_a_killed_run_give_the_same_images(base, one_thread, tmp_path, monkeypatch, capsys):
    """Bitwise: batches and numbers of threads are the same. With other threads the kernels round as with
    other batches."""
    command = f"{base[0].replace('--num ', '--num-images ')} --npz --batch 16"
    call(S, command, f"--out {tmp_path}/whole")
    whole = images(tmp_path / "whole")
    draw, drawn = S.draw, []

    def killed(args, guided, norm, indices, y, device):
        drawn.append(indices[0])
        if len(drawn) == 3:
            raise RuntimeError("power cut")
        return draw(args, guided, norm, indices, y, device)
    monkeypatch.setattr(S, "draw", killed)
    with pytest.raises(RuntimeError):
        call(S, command, f"--out {tmp_path}/killed")
    assert sorted(p.name for p in (tmp_path / "killed/parts").iterdir()) == [
        "000000-000015.npz",
        "000016-000031.npz",
    ]
    call(S, command, f"--out {tmp_path}/killed")
    assert drawn == [0, 16, 32, 32, 48]                                # what was there is not drawn again
    (tmp_path / "killed/parts").mkdir()  # as a kill while the parts went leaves it
    (tmp_path / "killed/parts/.000000-000015.npz.part").write_bytes(b"half")
    assert f"wrote {tmp_path}/killed/samples.npz\n" in capsys.readouterr().out
    call(S, command, f"--out {tmp_path}/killed")
    assert len(drawn) == 5 and not (tmp_path / "killed/parts").exists()          # nor when all is there
    assert "killed/samples.npz was there, and is not drawn again" in capsys.readouterr().out
    (tmp_path / "killed/samples.npz").unlink()
    call(S, command, f"--out {tmp_path}/killed")
    assert len(drawn) == 9
    monkeypatch.undo()
    run_two("sample.py", f"{command} --out {tmp_path}/two")
    for name in ("killed", "two"):
        assert all(np.array_equal(a, b) for a, b in zip(images(tmp_path / name), whole))
    assert np.abs(whole[1] - base[1][1]).max() < 1e-4 * np.abs(whole[1]).max()
    with np.load(tmp_path / "two/samples.npz") as z:
        assert (
            z["arr_0"].shape == (64, 32, 32, 3)
            and z["arr_0"].dtype == np.uint8
            and np.array_equal(z["arr_0"], whole[0])
        )
        assert np.array_equal(z["arr_1"], [V.rng(0, "label", i).integers(10) for i in range(64)])


def test_an_npz_is_named_or_lies_with_its_pictures(chain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words, file, folder in (
        ("--npz out/cfg1.5.npz", "out/cfg1.5.npz", "out/cfg1.5"),
        ("--npz --out a", "a/samples.npz", "a"),
        ("--npz", "out/samples/samples.npz", "out/samples"),
        ("", "out/pictures/grid.png", "out/pictures"),
    ):
        call(S, f"--ckpt {chain.root}/sit --num 2 --steps 2 {words}")
        assert Path(folder).is_dir() and Path(file).is_file()
        assert file.endswith("png") or np.load(file)["arr_0"].shape == (2, 32, 32, 3)


def test_seeds_that_differ_in_the_high_bits_differ(base, tmp_path):
    for seed in (5, 5 + 2**32):
        call(S, base[0].replace("--num 64", "--num 4"), f"--npz --seed {seed} --out {tmp_path}/{seed}")
    assert not np.array_equal(images(tmp_path / "5")[1], images(tmp_path / str(5 + 2**32))[1])


def test_the_decoded_latents_are_the_images(chain, base):
    vae, (pixels, latents) = V.VAE.load(chain.root / "vae"), base[1]
    with torch.no_grad():
        again = V.to_uint8(vae.decode(torch.from_numpy(latents))).permute(0, 2, 3, 1).numpy()
    assert np.abs(again.astype(int) - pixels).max() <= 1


def test_pictures_and_tasks_are_written(chain, tmp_path):
    call(S, f"--ckpt {chain.root}/sit --num 4 --steps 3 --tasks pca --classes 00_disk 3 --out {tmp_path}")
    assert Image.open(tmp_path / "grid.png").size == (
        2 * 34 + 2,
        2 * (34 + 12) + 2,
    )  # a class name under each
    assert Image.open(tmp_path / "tasks.png").size == (4 * 34 + 2, 2 * 34 + 2)
    assert (tmp_path / "images/000003.png").is_file()


def test_each_call_replaces_the_pictures_and_nothing_else(chain, tmp_path):
    """Another --cfg, fewer images, the checkpoint under another name: no refusal, no picture of the call
    before."""
    command = f"--vae {chain.root}/vae --steps 3 --out {tmp_path}/out"
    call(S, command, f"--ckpt {chain.root}/sit --num 5")
    first = (tmp_path / "out/images/000001.png").read_bytes()
    for name in ("images/notes.txt", "images/1.png", "mine.png"):
        (tmp_path / "out" / name).write_text("mine")
    shutil.copy(chain.root / "sit/0000006.pt", tmp_path / "renamed.pt")
    call(S, command, f"--ckpt {tmp_path}/renamed.pt --num 3 --cfg 3")
    left = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert left == {
        ".lock",
        "grid.png",
        "images/000000.png",
        "images/000001.png",
        "images/000002.png",
        "images/1.png",
        "images/notes.txt",
        "mine.png",
    }
    assert (tmp_path / "out/images/000001.png").read_bytes() != first


def test_an_npz_goes_on_under_a_renamed_checkpoint_and_each_pixel_is_there_once(chain, tmp_path):
    command = f"--vae {chain.root}/vae --steps 3 --num 5 --npz --out {tmp_path}/out"
    call(S, command, f"--ckpt {chain.root}/sit")
    shutil.copy(chain.root / "sit/0000006.pt", tmp_path / "renamed.pt")
    call(S, command, f"--ckpt {tmp_path}/renamed.pt")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [".lock", "manifest.json", "samples.npz"]
    assert np.array_equal(
        np.asarray(fid.npz_array(tmp_path / "out/samples.npz", "arr_0")), images(tmp_path / "out")[0]
    )


def test_from_noise_to_a_picture_in_python(chain, tmp_path):
    model, vae, norm, names = S.load(chain.root / "sit")
    assert names[0] == "00_disk" and not model.training and not vae.training
    noise = torch.stack([V.normal((4, 8, 8), 0, "sample", i) for i in range(2)])
    y = torch.tensor([V.rng(0, "label", i).integers(10) for i in range(2)])
    x = sit.Flow().sample(sit.Guided(model, 1.8, (0, 0.75)), noise, y, "euler", 4)
    with torch.no_grad():
        ours = V.to_uint8(vae.decode(norm.decode(x)))
    call(S, f"--ckpt {chain.root}/sit --num 2 --sampler euler --steps 4 --cfg 1.8 --out {tmp_path}")
    for i in range(2):
        theirs = torch.from_numpy(np.array(Image.open(tmp_path / f"images/{i:06d}.png"))).permute(2, 0, 1)
        assert (theirs.int() - ours[i].int()).abs().max() <= 1


def segmentation_head(path, dim=64, classes=21):
    torch.manual_seed(0)
    bn = {f"decode_head.bn.{k}": (torch.ones if k in ("weight", "running_var") else torch.zeros)(dim)
          for k in ("weight", "bias", "running_mean", "running_var")}
    torch.save(
        {
            "meta": {},
            "state_dict": {
                **bn,
                "decode_head.conv_seg.weight": torch.randn(classes, dim, 1, 1),
                "decode_head.conv_seg.bias": torch.zeros(classes),
            },
        },
        path,
    )
    return path


def test_heads_read_generated_latents(chain, tmp_path):
    """A segmentation head and a depth head of the teacher's width, saved in the public layouts, over ten
    images in two rows of
    eight: under each stands what its own latent gives."""
    torch.manual_seed(0)
    depth = dino.Depth(dim=64, proj=32, widths=(32, 32, 32), expand=1, blocks=1, last=8)
    torch.save({"model": {f"head.{k}": v for k, v in depth.state_dict().items()}}, tmp_path / "depth.pt")
    seg = segmentation_head(tmp_path / "seg.pth")
    call(
        S,
        f"--ckpt {chain.root}/sit --num 10 --steps 3 --tasks seg depth pca --seg-head {seg} "
        f"--depth-head {tmp_path}/depth.pt",
        f"--npz --out {tmp_path}/out",
    )
    sheet = np.array(Image.open(tmp_path / "out/tasks.png"))
    assert (
        sheet.shape[1] == 8 * 34 + 2
        and sheet.shape[0] > 8 * 34 + 2
        and (tmp_path / "out/samples.npz").is_file()
    )  # 2 x 4 rows, a legend

    pixels, latents = images(tmp_path / "out")

    def tile(row, column):
        return sheet[2 + 34 * row:34 + 34 * row, 2 + 34 * column:34 + 34 * column]
    features = V.Align.load(chain.root / "vae")(torch.from_numpy(latents))[0].detach()
    head = dino.Segmenter.load(seg)
    mask = head(features, 8, 32).argmax(1).numpy()
    maps = (
        dino.color_depth(dino.Depth.load(tmp_path / "depth.pt")(features, 8, 32).detach())
        .permute(0, 2, 3, 1)
        .numpy()
    )
    palette = np.array(head.colors, np.uint8)
    for i, (row, column) in {0: (0, 0), 3: (0, 3), 9: (4, 1)}.items():
        assert np.array_equal(tile(row, column), pixels[i])
        assert (tile(row + 1, column) == pixels[i] // 2 + palette[mask[i]] // 2).mean() > 0.99
        assert np.abs(tile(row + 2, column).astype(int) - maps[i]).max() <= 2
    assert (tile(4, 5) == 255).all()
    legend = sheet[2 + 8 * 34:, 4:17].reshape(-1, 3)
    assert {tuple(c) for c in palette[np.unique(mask)]} <= {tuple(c) for c in legend}


def test_masks_want_a_teacher_without_registers_and_of_the_heads_width(chain, tmp_path, capsys):
    shutil.copytree(chain.root / "vae/vae", tmp_path / "vae")
    info = json.loads((tmp_path / "vae/reals.json").read_text())
    (tmp_path / "vae/reals.json").write_text(json.dumps({**info, "dino": "dinov2_vitl14_reg4_pretrain.pth"}))
    command = f"--ckpt {chain.root}/sit --num 1 --steps 2 --tasks seg --out {tmp_path}/out"
    with pytest.raises(
        ValueError, match="--seg-head reads features of 96 numbers, this VAE has 64"
    ):
        call(S, command, f"--vae {tmp_path}/vae --seg-head", segmentation_head(tmp_path / "wide.pth", 96))
    assert "Figure 4 wants train_vae.py --dino vitl14" in capsys.readouterr().out
    with pytest.raises(dino.UserError, match="none.pth: no such file"):
        call(S, command, "--seg-head none.pth")
    assert "Figure 4" not in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_depth_colours_put_the_near_bright():
    depth = torch.linspace(1, 5, 64).view(1, 8, 8)
    grey = dino.color_depth(torch.cat([depth, 0 * depth + 3])).float().mean(1).flatten(1)
    assert (grey[0].diff() <= 0).all() and grey[0, 0] > 200 and grey[0, -1] < 10
    assert (
        abs(grey[0, 16] - grey[0, 0]) > 3 * abs(grey[0, 63] - grey[0, 47]) and (grey[1] == grey[1, 0]).all()
    )  # by 1 / depth; a wall is flat


def test_foreground_is_the_blob_in_the_middle():
    g = torch.Generator().manual_seed(0)
    truth = torch.zeros(8, 8, dtype=torch.bool)
    truth[2:6, 3:6] = True
    a, b = torch.randn(2, 16, generator=g)
    features = torch.where(truth.flatten()[:, None], a, b)[None] + 0.1 * torch.randn(1, 64, 16, generator=g)
    assert torch.equal(dino.foreground(features)[0], truth)


def test_balanced_labels_are_balanced():
    args = type("Args", (), dict(num=25, classes=None, labels="balanced", seed=0))
    assert np.bincount(S.labels(args, type("M", (), dict(classes=10)), [])).tolist() == [3] * 5 + [2] * 5


@pytest.mark.parametrize(
    "words, says",
    [
        ("--classes unicorn", "unicorn: no such class"),
        ("--classes 10", "10: no such class"),
        ("--sampler ddpm", "--sampler ddpm"),
        ("--ckpt {root}/none", "none"),
        ("--vae {other}", "another VAE"),
        ("--npz --cfg 3", "was made with cfg 2.0, not 3.0: --out"),
        ("--tasks pca --vae {bare}", "no align.safetensors"),
        ("--cfg-channels 5", "--cfg-channels 5"),
        ("--cfg-channels 0", "--cfg-channels 0"),
        ("--interval 0.75 0", "--interval 0.75 0"),
        ("--steps 1", "--steps 1"),
        ("--ckpt {root}/dit.pt --process dit --steps 1001", "--steps 1001"),
    ],
)
def test_what_does_not_fit_ends_in_one_line(chain, base, tmp_path, capsys, words, says):
    V.VAE.load(chain.root / "vae").save(tmp_path / "bare")
    V.VAE(16, (1, 2, 4), 1).save(tmp_path / "other")
    torch.save(
        sit.SiT(**sit.size("T"), input_size=8, classes=10, process="dit").state_dict(), tmp_path / "dit.pt"
    )
    base = (
        (base[0].replace(f"--ckpt {chain.root}/sit", f"--vae {chain.root}/vae"),) if "dit" in words else base
    )
    where = chain.root / "samples" if "cfg 3" in words else tmp_path / "out"
    command = f"{base[0]} --batch 5 --out {where} " + words.format(
        root=tmp_path, other=tmp_path / "other", bare=tmp_path / "bare"
    )
    status, said = ends(S, command), capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("sample.py: ")]
    assert status == 1 and len(lines) == 1 and says in lines[0] and "Traceback" not in said, said
    assert "cfg 3" in words or not (tmp_path / "out").exists()


def test_tasks_of_a_public_vae_name_what_it_lacks():
    args, public = type("Args", (), dict(tasks=["pca"])), V.VAE(16, (1, 2), 1)
    with pytest.raises(V.UserError, match="a public VAE: no align.safetensors beside this VAE"):
        S.Tasks(args, public, "cpu")


@pytest.mark.parametrize("words", ["--npz out/mine", "--num 0", "--batch 0"])
def test_flags_that_cannot_be_are_refused_at_once(words, capsys):
    with pytest.raises(SystemExit):
        call(S, words)
    assert words.split()[0] in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_bare_file_needs_its_process(chain, tmp_path, zipped):
    torch.save(
        sit.SiT(**sit.size("T"), input_size=8, classes=10).state_dict(),
        tmp_path / "bare.pt",
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(ValueError, match="--process"):
        call(S, f"--ckpt {tmp_path}/bare.pt --vae {chain.root}/vae --num 1 --steps 2 --out {tmp_path}/out")
    call(
        S,
        f"--ckpt {tmp_path}/bare.pt --process sit --vae {chain.root}/vae --num 1 --steps 2 "
        f"--out {tmp_path}/out",
    )
    assert (tmp_path / "out/grid.png").is_file()


def test_a_vae_of_other_channels_than_the_network_paints_is_refused(chain, tmp_path):
    torch.save(
        sit.SiT(**sit.size("T"), input_size=8, channels=8, classes=10).state_dict(), tmp_path / "eight.pt"
    )
    with pytest.raises(ValueError, match="eight.pt makes 8 latent channels, this VAE decodes 4"):
        call(S, f"--ckpt {tmp_path}/eight.pt --process sit --vae {chain.root}/vae --out {tmp_path}/out")
    assert not (tmp_path / "out").exists()


def test_a_diffusions_network_is_not_sampled_as_a_flow(chain, tmp_path):
    torch.save(
        sit.SiT(**sit.size("T"), input_size=8, classes=10, process="dit").state_dict(), tmp_path / "dit.pt"
    )
    with pytest.raises(ValueError, match="--sampler sde is not for a dit"):
        call(
            S,
            f"--ckpt {tmp_path}/dit.pt --process dit --sampler sde --vae {chain.root}/vae "
            f"--out {tmp_path}/out",
        )


@pytest.mark.parametrize("script, words, says", [
    ("train_vae.py", "", ("imagenet/train: no images here", "--data", "tests/demo.py")),
    ("train_sit.py", "--model XL", ("out/vae: no VAE here", "train_vae.py")),
    ("sample.py", "--cfg 1.8", ("--ckpt out/sit: no checkpoint here", "train_sit.py"))])
def test_nothing_there_ends_in_one_line_with_what_to_do(tmp_path, script, words, says):
    """Of plain python, and of the first of two processes under torchrun, which adds a report of its own."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for launch in ([], torchrun):
        done = subprocess.run(
            [sys.executable, *launch, str(ROOT / script), *words.split()],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=os.environ,
        )
        lines = [line for line in done.stderr.splitlines() if line.startswith(f"{script}: ")]
        assert done.returncode == 1 and len(lines) == 1 and all(part in lines[0] for part in says), (
            done.stderr
        )
        assert launch or done.stderr.count("\n") == 1
        assert f'File "{ROOT}' not in done.stderr
    assert list(tmp_path.iterdir()) == []
