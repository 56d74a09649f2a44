"""What goes wrong outside the mathematics: files, folders, disks, signals, machines that disagree. Each test
is one example of a kind."""

import argparse
import contextlib
import errno
import io
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import shapes
import torch
from conftest import ROOT, call, ends
from PIL import Image

import fid
import sample
import sit
import train_sit
import train_vae
import vae
from vae import UserError


def start(script, words, **more):
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **more,
    )


# ------------------------------------------------------------------------------------- machines that disagree


def two_machines(chain, tmp_path, first, second):
    """train_vae.py as two processes that each got their own words -> (status, stderr) of both."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    runs = []
    for rank, own in enumerate((first, second)):
        where = dict(RANK=rank, LOCAL_RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        env = {**os.environ, **{k: str(v) for k, v in where.items()}}
        words = f"{chain.stage1} --steps 2 --out {tmp_path}/out {own}".split()
        runs.append(start("train_vae.py", words, env=env))
    return [(run.communicate(timeout=100)[1], run.returncode) for run in runs]


@pytest.mark.parametrize(
    "own, says",
    [
        ("--lr 1e-3", "--lr is 5e-05 on the first process, 0.001 on another"),
        ("--seed 1", "--seed is 0 on the first process, 1 on another"),
        ("--steps 3", "--steps is 2 on the first process, 3 on another"),
        ("--data {t}/other", "the hash of data is"),
        ("--dino {t}/dino.pth", "the hash of teacher is"),
    ],
)
def test_processes_that_were_given_different_things_end_in_one_line(chain, tmp_path, own, says):
    shapes.write(tmp_path / "other", 50, 32, 4)
    torch.manual_seed(1)
    state = torch.load(chain.root / "dino.pth")
    torch.save({k: v + 1e-3 for k, v in state.items()}, tmp_path / "dino.pth")
    for err, status in two_machines(chain, tmp_path, "", own.format(t=tmp_path)):
        assert status == 1 and says in err and "Traceback" not in err, err


# --------------------------------------------------------------------------------------------------- pictures


def write_picture(path, value=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value, value, value)).save(path)


def test_each_real_folder_is_walked_once_and_hidden_ones_are_no_classes(tmp_path):
    for c in "abc":
        write_picture(tmp_path / "train" / c / "1.png")
    write_picture(tmp_path / "train/.ipynb_checkpoints/1.png")
    (tmp_path / "train/train").symlink_to(tmp_path / "train")  # ln -s, typed twice
    (tmp_path / "train/a/loop").symlink_to("..")
    write_picture(tmp_path / "elsewhere/1.png")
    (tmp_path / "train/d").symlink_to(tmp_path / "elsewhere")  # a class that lies on another disk
    images = vae.Images(tmp_path / "train", 8)
    assert images.classes == ["a", "b", "c", "d"] and len(images) == 4
    (tmp_path / "link").symlink_to(tmp_path / "train")
    assert vae.Images(tmp_path / "link", 8).paths == images.paths
    for one, other in ("xy", "yx"):  # two that point at each other
        write_picture(tmp_path / f"mutual/{one}/1.png")
        (tmp_path / f"mutual/{one}/to_{other}").symlink_to(tmp_path / "mutual" / other)
    paths = ["x/1.png", "x/to_y/1.png", "y/1.png", "y/to_x/1.png"]
    assert vae.Images(tmp_path / "mutual", 8).paths == paths


def test_pictures_of_a_strange_kind_are_counted_and_a_pipe_is_named(tmp_path, capsys):
    write_picture(tmp_path / "a/1.png")
    (tmp_path / "a/2.HEIC").write_bytes(b"ftyp")
    os.mkfifo(tmp_path / "a/b.png")
    images = vae.Images(tmp_path, 8)
    assert "1 pictures of a kind that pillow does not read, as a/2.HEIC" in capsys.readouterr().out
    assert len(images) == 2 and images.fingerprint
    with pytest.raises(UserError, match="b.png: not a readable image .no regular file"):
        images[1]
    assert torch.equal(images.first_readable(1)[0], images[0][0])


def test_pictures_of_equal_name_and_size_are_not_the_same(tmp_path):
    write_picture(tmp_path / "a/1.bmp", 100)
    before = vae.Images(tmp_path, 8).fingerprint
    size = (tmp_path / "a/1.bmp").stat().st_size
    write_picture(tmp_path / "a/1.bmp", 101)
    assert (tmp_path / "a/1.bmp").stat().st_size == size and vae.Images(tmp_path, 8).fingerprint != before


def test_pixels_without_a_range_are_refused_and_sixteen_bits_are_scaled(tmp_path):
    (tmp_path / "a").mkdir()
    half = np.full((8, 8), 0.5)
    Image.fromarray(half.astype(np.float32)).save(tmp_path / "a/1.tif")
    Image.fromarray((half * 255).astype(np.int32)).save(tmp_path / "a/2.tif")
    Image.fromarray((half * 65535).astype(np.uint16)).save(tmp_path / "a/3.tif")
    Image.fromarray((half * 65535).astype(np.uint16)).save(tmp_path / "a/4.png")
    images = vae.Images(tmp_path, 8)
    for i in (0, 1):
        with pytest.raises(UserError, match="its range unknown"):
            images[i]
    assert all((images[i][0] == 127).all() for i in (2, 3))


def test_a_disks_error_is_tried_again_and_then_ends_the_run(tmp_path, monkeypatch):
    write_picture(tmp_path / "a/1.png")
    write_picture(tmp_path / "a/2.png")
    images, times = vae.Images(tmp_path, 8), []

    class Stale(vae.Images):
        def open(self, path):
            times.append(path)
            if len(times) <= self.failures:
                raise OSError(errno.ESTALE, "Stale file handle")
            return super().open(path)

    monkeypatch.setattr(time, "sleep", lambda s: None)
    Stale.failures, stale = 2, Stale(tmp_path, 8)
    assert torch.equal(stale[0][0], images[0][0]) and len(times) == 3
    Stale.failures, times[:] = 99, []
    with pytest.raises(vae.DiskError, match="a/1.png.*Stale file handle"):
        stale.first_readable(0)  # not the picture after it
    assert times == ["a/1.png"] * 3


def test_a_disk_that_fails_where_a_file_is_looked_at_is_no_dead_link(tmp_path, monkeypatch):
    write_picture(tmp_path / "a/1.png")
    images, looked = vae.Images(tmp_path, 8), os.stat

    def stale(path, *args, **more):
        if str(path).endswith("1.png"):
            raise OSError(errno.ESTALE, "Stale file handle")
        return looked(path, *args, **more)

    monkeypatch.setattr(time, "sleep", lambda s: None)
    monkeypatch.setattr(vae.os, "stat", stale)
    with pytest.raises(vae.DiskError, match="Stale"):
        images.first_readable(0)


def test_a_name_that_is_not_utf8_is_a_name(tmp_path):
    os.mkdir(tmp_path / "a")
    write_picture(tmp_path / "x.png")
    os.rename(os.fsencode(tmp_path / "x.png"), os.path.join(os.fsencode(tmp_path / "a"), b"\xff.png"))
    images = vae.Images(tmp_path, 8)
    assert images[0][0].shape == (3, 8, 8) and len(images.fingerprint) == 64


# --------------------------------------------------------------------------------------------- what files say


def test_a_teacher_or_a_start_swapped_under_its_name_is_refused(chain, tmp_path):
    shutil.copy(chain.root / "dino.pth", tmp_path / "dino.pth")
    shutil.copytree(chain.root / "vae/vae", tmp_path / "init")
    own = f"--dino {tmp_path}/dino.pth --init {tmp_path}/init --schedule constant --out {tmp_path}/run"
    call(train_vae, chain.stage1, own, "--steps 1")
    torch.save({k: v + 1e-3 for k, v in torch.load(tmp_path / "dino.pth").items()}, tmp_path / "dino.pth")
    with pytest.raises(UserError, match="made with another teacher"):
        call(train_vae, chain.stage1, own, "--steps 2")
    shutil.copy(chain.root / "dino.pth", tmp_path / "dino.pth")
    torch.manual_seed(7)
    vae.VAE(16, (1, 2, 4), 1).save(tmp_path / "init")
    with pytest.raises(UserError, match="made with another init"):
        call(train_vae, chain.stage1, own, "--steps 2")


def test_a_foreign_config_must_fit_its_tensors_and_is_part_of_the_hash(tmp_path):
    torch.manual_seed(0)
    model = vae.VAE(16, (1, 2), 1, groups=8)
    model.save(tmp_path)
    (tmp_path / "reals.json").unlink()
    eight = vae.fingerprint(vae.VAE.load(tmp_path))
    assert eight == vae.fingerprint(model)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "norm_num_groups": 4}))
    assert vae.fingerprint(vae.VAE.load(tmp_path)) != eight
    for field, value in {"block_out_channels": [16, 16], "latent_channels": 8}.items():
        (tmp_path / "config.json").write_text(json.dumps({**config, field: value}))
        with pytest.raises(UserError, match=f"{field} is .* by its tensors, but .* in config.json"):
            vae.VAE.load(tmp_path)


def test_a_vae_of_ours_without_reals_json_is_not_taken_for_a_public_one(chain, tmp_path):
    shutil.copytree(chain.root / "vae/vae", tmp_path / "vae")
    (tmp_path / "vae/reals.json").unlink()
    with pytest.raises(UserError, match="reals.json is missing"):
        vae.VAE.load(tmp_path / "vae")


def test_an_official_file_is_loaded_as_what_it_says_it_is(tmp_path):
    small = sit.SiT(**sit.size("T"), input_size=4, classes=3)
    state = small.state_dict()

    def of(**args):
        return {"ema": state, "args": argparse.Namespace(**args)}

    for args in (
        {},
        {"path_type": "Linear", "prediction": "velocity"},
        {"path_type": "linear", "prediction": "v"},
    ):
        assert torch.equal(sit.SiT.load(of(**args), "sit").pos_embed, small.pos_embed)
    for args in ({"path_type": "GVP"}, {"prediction": "noise"}):
        with pytest.raises(
            sit.UserError, match=f"was trained with {next(iter(args))} {next(iter(args.values()))}"
        ):
            sit.SiT.load(of(**args), "sit")
    repa = sit.SiT(**sit.size("T"), input_size=4, classes=3, repa=(2, 8)).state_dict()
    with pytest.raises(sit.UserError, match="say --process repa"):
        sit.SiT.load(repa, "sit")
    sit.SiT.load(repa, "repa")


@pytest.mark.parametrize("load", [vae.load_file, lambda path: sit.read(path)[0]])
def test_a_compressed_file_gives_its_own_numbers(tmp_path, load):
    torch.save({"w": torch.arange(1000.0)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain:
        with zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as small:
            for name in plain.namelist():
                small.writestr(name, plain.read(name))
    assert torch.equal(load(tmp_path / "small.pt")["w"], torch.arange(1000.0))


@pytest.mark.parametrize(
    "kind, wrong",
    [
        ("std", {"std": 0}),
        ("std", {"mean": float("nan")}),
        ("max-min", {"max": float("inf")}),
        ("max-min", {"max": -1.0}),
        ("channel", {"channel_std": [1.0, 0.0]}),
    ],
)
def test_statistics_that_cannot_be_are_refused(kind, wrong):
    stats = {
        "mean": 0.0,
        "std": 1.0,
        "min": -1.0,
        "max": 1.0,
        "channel_mean": [0.0, 0.0],
        "channel_std": [1.0, 1.0],
    }
    vae.Normalizer(kind, stats)
    with pytest.raises(UserError, match="the statistics say"):
        vae.Normalizer(kind, {**stats, **wrong})


@pytest.mark.parametrize(
    "module, words",
    [
        (train_vae, w)
        for w in (
            "--clip -1",
            "--warmup -5",
            "--kl -1",
            "--gan -1",
            "--align-layers 0",
            "--lr nan",
            "--lr inf",
            "--betas 1 1",
            "--workers -1",
            "--steps 0",
            "--mult 1 0",
            "--weight-decay -1",
            "--seed -1",
        )
    ]
    + [
        (train_sit, w)
        for w in ("--ema 2", "--ema nan", "--std 0", "--drop 2", "--repa-weight -1", "--size 0")
    ]
    + [(sample, w) for w in ("--cfg nan", "--interval nan 1", "--interval 5 9", "--cfg -1", "--steps -1")]
    + [(fid, w) for w in ("--crop-scale 0 1", "--crop-scale 0.5 2", "--blur-sigma 2 1", "--seed -1")],
)
def test_a_number_out_of_its_range_is_refused_by_name(module, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script.py", *words.split()])
    with pytest.raises(SystemExit) as e:
        module.flags()
    assert e.value.code == 2 and words.split()[0] in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- disks and memory


def limited(size):
    """A disk that takes no file above so many bytes."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_full_disk_on_the_way_is_a_warning_and_at_the_end_one_line(chain, tmp_path):
    words = f"{chain.stage2} --steps 4 --keep 100 --out {tmp_path}/sit".split()
    run = start("train_sit.py", words, preexec_fn=limited(2**20))
    out, err = run.communicate(timeout=100)
    assert out.count("ckpt.pt could not be written, the run goes on") == 1  # at step 2, not at step 4
    assert run.returncode == 1 and "Traceback" not in err and "the disk refuses" in err, err
    assert not list((tmp_path / "sit").glob("*.part")) and not (tmp_path / "sit/ckpt.pt").exists()


def test_space_for_a_cache_is_taken_at_once(chain, tmp_path):
    words = f"{chain.stage2} --cache {tmp_path}/latents --steps 2 --out {tmp_path}/sit".split()
    run = start("train_sit.py", words, preexec_fn=limited(2**16))
    err = run.communicate(timeout=100)[1]
    assert run.returncode == 1 and "Traceback" not in err and "the disk refuses" in err, err
    file = tmp_path / "whole.npy"
    np.save(file, np.zeros(2**18, np.uint8))
    train_sit.make_arrays(tmp_path, (4, 1, 8, 64, 64), {})
    assert (tmp_path / "moments.npy").stat().st_blocks * 512 >= 2 * 4 * 8 * 64 * 64


def test_numbers_are_printed_where_their_file_cannot_be_written(tmp_path, capsys, monkeypatch):
    shapes.write(tmp_path / "a", 8, 32, 1)
    np.savez(tmp_path / "samples.npz", arr_0=shapes.draw(8, 32, 3)[0])

    def net(x):
        return x.float().flatten(1)[:, :4], None

    monkeypatch.setattr(fid, "feature_net", lambda args, device: (net, "dinov2 0"))
    monkeypatch.setattr(
        fid, "save", lambda obj, path: (_ for _ in ()).throw(OSError(errno.EROFS, "read-only"))
    )
    call(fid, f"{tmp_path}/samples.npz --ref {tmp_path}/a --features dinov2 --size 32")
    said = capsys.readouterr().out
    assert "warning:" in said and "read-only" in said and "samples.npz" in said
    monkeypatch.setattr(sys, "argv", ["fid.py", f"{tmp_path}/a", "--ref", f"{tmp_path}/a"])
    assert fid.flags().out == f"{tmp_path}/results.json"  # not among the pictures


def test_too_little_shared_memory_is_said_before_loaders_wait(chain, tmp_path, monkeypatch):
    monkeypatch.setattr(vae, "shared_memory", lambda: 10000)
    with pytest.raises(UserError, match="--workers 2 need .* MiB in /dev/shm.*--shm-size"):
        call(train_vae, chain.stage1.replace("--workers 0", "--workers 2"), f"--steps 2 --out {tmp_path}/vae")
    call(train_vae, chain.stage1, f"--steps 1 --out {tmp_path}/vae")  # no loaders, no need


@pytest.mark.parametrize(
    "error, says",
    [
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "--micro"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "--workers"),
        (RuntimeError("Failed to find C compiler. Please specify via CC"), "--no-compile"),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (ValueError("a bug"), None),
    ],
)
def test_what_the_system_does_is_one_line_and_a_bug_is_none(error, says):
    line = vae.for_the_user(error)
    assert line is None if says is None else says in line and "\n" not in line


def test_more_processes_than_gpus_and_a_full_gpu_are_one_line(monkeypatch):
    """As a machine with one GPU would have it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="--nproc_per_node 2 or more, but 1 GPU"):
        vae.start()
    line = vae.for_the_user(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee"))
    assert line.startswith("out of memory; hold fewer images at once (--micro") and "\n" not in line


@pytest.mark.parametrize("script", [train_vae, train_sit, sample, fid])
def test_help_is_shown_on_any_console(script, monkeypatch):
    """As with PYTHONIOENCODING=ascii."""
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", console)
    assert ends(script, "--help") == 0
    console.flush()
    assert b"--out" in console.buffer.getvalue()


# ------------------------------------------------------------------------------------- kills, signals, damage


def wait_for(path, run, seconds=60):
    for _ in range(10 * seconds):
        if path.exists():
            return
        assert run.poll() is None, run.communicate()
        time.sleep(0.1)
    raise AssertionError(f"no {path}")


@pytest.mark.parametrize("script, stage", [("train_vae.py", "stage1"), ("train_sit.py", "stage2")])
def test_a_killed_run_goes_on_at_once_and_ends_where_an_uninterrupted_one_does(
    chain, tmp_path, script, stage
):
    """Its loaders, which live a little longer, do not hold the folder."""
    words = getattr(chain, stage).replace("--workers 0", "--workers 2") + " --schedule constant"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    module = {"train_vae.py": train_vae, "train_sit.py": train_sit}[script]
    call(module, words, f"--steps 12 --out {whole}")
    run = start(script, f"{words} --steps 400 --out {killed}".split())
    wait_for(killed / "ckpt.pt", run)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    reached = torch.load(killed / "ckpt.pt", weights_only=True)["step"]
    with vae.lock(killed):
        pass
    with contextlib.suppress(ProcessLookupError):
        os.killpg(run.pid, signal.SIGKILL)
    if reached >= 12:
        pytest.skip(f"the machine was too fast: step {reached}")
    call(module, words, f"--steps 12 --out {killed}")
    one, other = (torch.load(p / "ckpt.pt", weights_only=True) for p in (whole, killed))
    name = "model" if script == "train_vae.py" else "net"
    assert all(torch.equal(one[name][k], other[name][k]) for k in one[name])


def test_the_cache_asks_for_this_machines_ranks_and_for_its_manifest_under_the_lock(
    chain, tmp_path, monkeypatch
):
    """Between the first look and the lock another run may have begun, and here finished, the same cache."""
    asked, lock = [], vae.lock
    ranges = lambda done, size, ranks: asked.append(ranks) or vae.missing_ranges(done, size)  # noqa: E731

    def late(folder, flag="--out", **how):
        if flag == "--cache":
            shutil.copytree(chain.root / "latents", folder)
        return lock(folder, flag, **how)

    monkeypatch.setattr(train_sit, "missing_ranges", ranges)
    monkeypatch.setattr(train_sit, "lock", late)
    monkeypatch.setattr(train_sit, "make_arrays", None)                 # it would empty what is there
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    call(train_sit, chain.stage2, f"--cache {tmp_path}/latents --steps 1 --out {tmp_path}/run")
    assert asked == [3]


def test_a_place_that_cannot_be_written_to_is_named_with_its_flag(chain, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match="file: no folder to write to .*--out names another one"):
        call(train_sit, chain.stage2, f"--steps 1 --out {tmp_path}/file")


def test_a_flag_that_is_a_path_is_kept_and_compared(chain, tmp_path, monkeypatch):
    """What somebody may add, argparse knowing how to make a Path."""
    flags, own = train_sit.flags, {"extra": Path("one")}

    def more(ungiven=()):
        args = flags(ungiven)
        args.extra = Path("a default") if "extra" in ungiven else own["extra"]
        return args

    monkeypatch.setattr(train_sit, "flags", more)
    words = f"{chain.stage2} --schedule constant --out {tmp_path}/run"
    call(train_sit, words, "--steps 1")
    call(train_sit, words, "--steps 2")
    own["extra"] = Path("two")
    with pytest.raises(UserError, match="was made with --extra one, not two"):
        call(train_sit, words, "--steps 3")


def test_a_cache_is_filled_by_the_processes_of_one_machine(monkeypatch):
    """Two machines would write pages of one file, each with its own view of the others' bytes."""
    done = np.zeros(100, bool)
    done[30:40] = True
    monkeypatch.setattr(vae, "world", lambda: 4)
    monkeypatch.setattr(vae, "everyone", lambda obj: [obj] * 4)

    def shares(*ranks):
        found = []
        for k in range(4):
            monkeypatch.setattr(vae, "rank", lambda k=k: k)
            found.append([i for part in vae.missing_ranges(done, 8, *ranks) for i in part])
        return found

    assert all(shares()) and sorted(sum(shares(), [])) == np.flatnonzero(~done).tolist()
    first, second, *others = shares(2)
    assert first and second and others == [[], []]
    assert sorted(first + second) == np.flatnonzero(~done).tolist()


def test_locks_that_a_disk_does_not_know_are_a_warning(tmp_path, monkeypatch, capsys):
    def refuses(f, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(vae.fcntl, "flock", refuses)
    with vae.lock(tmp_path / "run"):
        assert "cannot be locked" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_seen_and_the_one_before_it_serves(chain, tmp_path, capsys):
    words = chain.stage2 + " --schedule constant"
    call(train_sit, words, f"--steps 6 --out {tmp_path}/whole")
    call(train_sit, words, f"--steps 4 --out {tmp_path}/run")
    raw = bytearray((tmp_path / "run/ckpt.pt").read_bytes())
    raw[len(raw) // 2] ^= 1  # torch alone does not notice
    (tmp_path / "run/ckpt.pt").write_bytes(raw)
    with open(tmp_path / "run/log.jsonl", "a") as f:
        f.write('{"step": 4, "lo')  # and a line that a kill cut
    capsys.readouterr()
    call(train_sit, words, f"--steps 6 --out {tmp_path}/run")
    said = capsys.readouterr().out
    assert "run/ckpt.pt is damaged" in said and "going on from step 2" in said and "download" not in said
    one, other = (torch.load(tmp_path / f"{p}/ckpt.pt", weights_only=True) for p in ("whole", "run"))
    assert all(torch.equal(one["ema"][k], other["ema"][k]) for k in one["ema"])
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert steps == [0, 2, 2, 4, 6]  # of both starts, too
    (tmp_path / "run/ckpt.pt").write_bytes(raw)
    (tmp_path / "run/ckpt-before.pt").unlink()
    with pytest.raises(UserError, match="is damaged, and there is none before it"):
        call(train_sit, words, f"--steps 8 --out {tmp_path}/run")


def test_a_milestone_in_a_checkpoints_place_is_named(chain, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copy(chain.root / "sit/0000003.pt", tmp_path / "run/ckpt.pt")
    with pytest.raises(UserError, match="ckpt.pt holds no args, net, optimizer: it is a milestone"):
        call(train_sit, chain.stage2, f"--steps 8 --out {tmp_path}/run")


def test_a_part_that_a_checkpoint_lacks_is_named(chain, tmp_path):
    """As where somebody adds a second EMA and goes on with an old run, or takes another stage's folder."""
    held = torch.load(chain.root / "sit/ckpt.pt", weights_only=True)
    del held["ema"]
    vae.save(held, tmp_path / "run/ckpt.pt")
    with pytest.raises(UserError, match="ckpt.pt holds no ema: it is a milestone, or of a run that had none"):
        call(train_sit, chain.stage2, f"--steps 8 --out {tmp_path}/run")
    with pytest.raises(UserError, match="ckpt.pt holds no disc, disc optimizer, model:"):
        call(train_vae, chain.stage1, f"--steps 8 --out {tmp_path}/run")
    for odd in ({}, [1], torch.zeros(3)):
        vae.save(odd, tmp_path / "run/ckpt.pt")
        with pytest.raises(UserError, match="ckpt.pt holds no args, ema, net, optimizer, step:"):
            call(train_sit, chain.stage2, f"--steps 8 --out {tmp_path}/run")


def test_a_part_of_another_shape_is_named(chain, tmp_path):
    """As where somebody widens a layer, or gives the optimizer another group, and goes on with an old run."""
    def no_network(held):
        key = next(iter(held["net"]))
        held["net"][key] = held["net"][key][..., :1]
        return rf"its net does not fit \(.*size mismatch for {key}: .*\); another --out starts anew"

    def no_optimizer(held):
        held["optimizer"]["param_groups"] *= 2
        return r"its optimizer does not fit \(loaded state dict has a different number of parameter groups\)"

    for other in (no_network, no_optimizer):
        held = torch.load(chain.root / "sit/ckpt.pt", weights_only=True)
        says = other(held)
        vae.save(held, tmp_path / "run/ckpt.pt")
        with pytest.raises(UserError, match=says):
            call(train_sit, chain.stage2, f"--steps 8 --out {tmp_path}/run")


class Odd:
    """A part whose state torch can save, and never loads."""

    def state_dict(self):
        return {"decay": np.float64(0.5)}

    def load_state_dict(self, state):
        pass


def test_a_part_that_could_not_go_on_ends_the_run_when_it_is_saved_or_before(tmp_path):
    args = argparse.Namespace(out=str(tmp_path), schedule="constant")
    with pytest.raises(UserError, match="ckpt.pt: the Python object numpy.*scalar in it is never loaded"):
        vae.save_checkpoint(args, {"odd": Odd()}, {}, 2)
    with pytest.raises(AttributeError, match="load_state_dict"):
        vae.resume(args, None, {}, {"mine": object()})


@pytest.mark.parametrize("name", ["moments", "labels", "done"])
def test_a_damaged_cache_is_named(chain, tmp_path, name):
    shutil.copytree(chain.root / "latents", tmp_path / "latents")
    file = tmp_path / f"latents/{name}.npy"
    own = f"--cache {tmp_path}/latents --steps 8 --out {tmp_path}/run"
    for content in (file.read_bytes()[:-20], b""):
        file.write_bytes(content)
        with pytest.raises(UserError, match=f"{name}.npy is damaged"):
            call(train_sit, chain.stage2, own)
    np.save(file, np.zeros(3))
    with pytest.raises(UserError, match=f"{name}.npy is damaged .shape"):
        call(train_sit, chain.stage2, own)


@pytest.mark.parametrize(
    "script, stage, word", [("vae", "stage1", "--kl 1e39"), ("sit", "stage2", "--std 1e30")]
)
def test_ten_steps_that_are_not_finite_end_a_run_and_what_is_good_is_saved(
    chain, tmp_path, script, stage, word
):
    module = {"vae": train_vae, "sit": train_sit}[script]
    with pytest.raises(UserError, match="step 9: the gradient is not finite.*ten steps in a row"):
        call(module, getattr(chain, stage), f"{word} --steps 100 --save-every 50 --out {tmp_path}/run")
    ckpt = torch.load(tmp_path / "run/ckpt.pt", weights_only=True)
    assert ckpt["step"] == 10
    assert all(v.isfinite().all() for v in ckpt[{"vae": "model", "sit": "ema"}[script]].values())


def test_one_step_that_is_not_finite_is_skipped_by_weights_moments_and_ema(
    chain, tmp_path, monkeypatch, capsys
):
    draw = train_sit.Draws.__getitem__

    def spoilt(self, key):
        moments, *rest = draw(self, key)
        return (moments * (torch.inf if key[0] == 1 else 1), *rest)

    monkeypatch.setattr(train_sit.Draws, "__getitem__", spoilt)
    words = chain.stage2 + " --schedule constant --save-every 1"
    call(train_sit, words, f"--steps 1 --out {tmp_path}/run")
    before = torch.load(tmp_path / "run/ckpt.pt", weights_only=True)
    call(train_sit, words, f"--steps 2 --out {tmp_path}/run")
    assert "warning: step 1: the gradient is not finite; the step was skipped" in capsys.readouterr().out
    after = torch.load(tmp_path / "run/ckpt.pt", weights_only=True)
    for part in ("net", "ema"):
        assert all(torch.equal(before[part][k], after[part][k]) for k in before[part])
    moments = [[s["exp_avg"] for s in c["optimizer"]["state"].values()] for c in (before, after)]
    assert all(torch.equal(a, b) for a, b in zip(*moments))
    call(train_sit, words, f"--steps 3 --out {tmp_path}/run")
    assert (
        after["step"] == 2
        and json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[-1])["loss"] > 0
    )


def test_a_loss_that_is_not_a_number_skips_its_step_though_the_gradient_is_one(
    chain, tmp_path, monkeypatch
):
    loss = sit.Flow.loss
    monkeypatch.setattr(sit.Flow, "loss", lambda *args: loss(*args) + torch.nan)    # of no gradient
    with pytest.raises(UserError, match="ten steps in a row"):
        call(train_sit, chain.stage2, f"--steps 12 --out {tmp_path}/run")
    mse = train_vae.F.mse_loss
    monkeypatch.setattr(train_vae.F, "mse_loss", lambda *args: mse(*args) + torch.nan)
    with pytest.raises(UserError, match="ten steps in a row"):
        call(train_vae, chain.stage1, f"--steps 12 --out {tmp_path}/vae")


@pytest.mark.parametrize("size, says", [(2**31, "a checkpoint takes some 32 s"), (2**26, None)])
def test_a_checkpoint_that_takes_longer_than_torchrun_waits_is_said_at_the_start(
    tmp_path, monkeypatch, capsys, size, says
):
    """The disk takes a second for each time that it is asked: 64 MiB, as the clock sees it."""
    clock = iter(range(1000))
    monkeypatch.setattr(vae, "world", lambda: 2)
    monkeypatch.setattr(vae.time, "time", lambda: next(clock))
    vae.try_disk(tmp_path, size)
    said = capsys.readouterr().out
    assert says in said and "--shutdown-timeout" in said if says else said == ""
    assert not list(tmp_path.iterdir())


def test_a_hung_up_terminal_is_like_a_termination():
    with vae.Stop() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.look(torch.tensor(True)) == (True, True) and stop.signal == signal.SIGHUP
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)                # as nohup does
    with vae.Stop() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.look(torch.tensor(True)) == (True, False)
        assert stop.look(torch.tensor(False)) == (False, False)
    signal.signal(signal.SIGHUP, ignored)


# -------------------------------------------------------------------------------------------- small and moved


@pytest.mark.parametrize("words", ["--size 16 --gan 0.1 --gan-start 0", "--size 8 --gan 0 --perceptual 1"])
def test_pictures_too_small_for_a_loss_are_refused(chain, tmp_path, words):
    fid.LPIPS([4] * 13)
    torch.save(
        {f"features.{k}": v for k, v in fid.LPIPS([4] * 13).features.state_dict().items()}, tmp_path / "vgg"
    )
    with pytest.raises(UserError, match="is too small for --gan .24 at least. or --perceptual .16."):
        call(train_vae, chain.stage1, f"{words} --vgg {tmp_path}/vgg --steps 1 --out {tmp_path}/vae")


def test_a_moved_checkpoint_finds_its_vae_beside_it_or_asks_for_it(chain, tmp_path, monkeypatch):
    monkeypatch.chdir(chain.root)
    words = chain.stage2.replace(f"--vae {chain.root}/vae", "--vae vae")
    call(train_sit, words, "--steps 1 --keep 1 --out elsewhere")
    shutil.copytree(chain.root / "vae", tmp_path / "vae")
    shutil.copytree(chain.root / "elsewhere", tmp_path / "elsewhere")
    shutil.rmtree(chain.root / "elsewhere")
    monkeypatch.chdir(tmp_path.parent)
    for ckpt in ("elsewhere", "elsewhere/0000001.pt"):
        assert sample.load(tmp_path / ckpt)[1].folder == Path(tmp_path, "elsewhere", "..", "vae", "vae")
    shutil.rmtree(tmp_path / "vae")
    with pytest.raises(UserError, match="no VAE here.*--vae names another place"):
        sample.load(tmp_path / "elsewhere")


def test_the_next_line_is_a_command_that_works(chain, tmp_path, capsys):
    folder = tmp_path / "a folder"
    call_words = chain.stage2.split()
    argv, sys.argv = (
        sys.argv,
        ["train_sit.py", *call_words, "--steps", "1", "--keep", "1", "--out", str(folder)],
    )
    try:
        train_sit.main()
    finally:
        sys.argv = argv
    command = capsys.readouterr().out.split("next:\n")[1].strip()
    done = subprocess.run(
        f"{command} --num 2 --steps 2".replace("python sample.py", f"{sys.executable} {ROOT}/sample.py"),
        shell=True,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and (tmp_path / "out/pictures/grid.png").is_file(), done.stderr


def test_what_is_good_is_saved_before_a_disks_error_ends_a_run(chain, tmp_path, monkeypatch):
    draw = train_vae.Draws.__getitem__

    def stale(self, key):
        if key[0] == 3:
            raise vae.DiskError("x.png: Stale file handle")
        return draw(self, key)

    monkeypatch.setattr(train_vae.Draws, "__getitem__", stale)
    with pytest.raises(vae.DiskError):
        call(train_vae, chain.stage1, f"--save-every 100 --steps 8 --out {tmp_path}/run")
    assert torch.load(tmp_path / "run/ckpt.pt", weights_only=True)["step"] == 3


def test_a_damaged_part_of_an_npz_is_named(chain, tmp_path, monkeypatch):
    words = f"--ckpt {chain.root}/sit --npz --num 4 --steps 2 --batch 2 --out {tmp_path}/s"
    join = sample.join_parts

    def cut(args, file, parts, y):
        part = sorted(parts.glob("*.npz"))[0]
        part.write_bytes(part.read_bytes()[:-50])
        join(args, file, parts, y)

    monkeypatch.setattr(sample, "join_parts", cut)
    with pytest.raises(UserError, match="000000-000001.npz is damaged"):
        call(sample, words)
    (tmp_path / "s/parts/000000-000001.npz").unlink()
    monkeypatch.setattr(sample, "join_parts", join)
    call(sample, words)
    assert np.load(tmp_path / "s/samples.npz")["arr_0"].shape == (4, 32, 32, 3)


def test_statistics_of_another_vae_are_warned_of(chain, tmp_path, capsys):
    stats = json.loads((chain.root / "latents/statistics.json").read_text())
    for factor in (1, 2):
        (tmp_path / "stats.json").write_text(json.dumps({**stats, "std": factor * stats["std"]}))
        call(train_sit, chain.stage2, f"--stats {tmp_path}/stats.json --steps 1 --out {tmp_path}/{factor}")
        assert ("of another VAE?" in capsys.readouterr().out) == (factor == 2)


# ---------------------------------------------------------------------------------- slow: kills and processes


def files_of(folder):
    """What a job leaves: tensors of checkpoints, arrays, by name."""
    found = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.suffix == ".npz":
            with np.load(file) as arrays:
                found |= {f"{name}/{k}": torch.from_numpy(arrays[k]) for k in arrays.files}
        elif file.suffix == ".npy":
            found[name] = torch.from_numpy(np.load(file).astype(np.float64))
        elif file.name in ("ckpt.pt", "diffusion_pytorch_model.safetensors"):
            held = vae.read(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
            nets = {k: v for k, v in held.items() if k in ("model", "net", "ema")} or {"": held}
            found |= {f"{name}/{k}/{key}": v for k, net in nets.items() for key, v in net.items()}
    return found


JOBS = {
    "stage 1": "train_vae.py {c.stage1} --save-every 1 --steps 30 --out {t}",
    "cache and stage 2": "train_sit.py {c.stage2} --cache {t}/cache --save-every 1 --steps 30 --out {t}/sit",
    "samples": "sample.py --ckpt {c.root}/sit --npz --num 30 --batch 2 --steps 40 --cfg 2 --out {t}",
}


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_ten_kills_at_random_moments_change_nothing(chain, tmp_path, job):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}

    def begin(folder):
        script, *words = (
            JOBS[job].format(c=chain, t=tmp_path / folder).replace("--workers 0", "--workers 1").split()
        )
        return start(script, words, env=env)

    begun, whole = time.time(), begin("whole")
    assert whole.wait() == 0, whole.communicate()
    seconds, seed = time.time() - begun, int.from_bytes(os.urandom(4), "little")
    print(f"{job}: {seconds:.1f} s, seed {seed}")
    draws = np.random.default_rng(seed)
    for _ in range(10):
        run = begin("killed")
        time.sleep(draws.uniform(1, seconds))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.communicate()
    run = begin("killed")
    assert run.wait() == 0, run.communicate()
    one, other = files_of(tmp_path / "whole"), files_of(tmp_path / "killed")
    assert one.keys() == other.keys() and len(one) > 2
    assert all(torch.equal(one[k], other[k]) for k in one)


def torchrun(processes, script, words):
    where = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
        str(ROOT / script),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *where, *words.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=env,
    )


@pytest.mark.slow
def test_two_processes_then_one_then_three_train_what_one_does(chain, tmp_path):
    words = chain.stage2.replace("--batch 8", "--batch 12") + " --schedule constant --dtype fp64"
    call(train_sit, words, f"--steps 9 --out {tmp_path}/one")
    for steps, processes in ((3, 2), (6, 1), (9, 3)):
        run = torchrun(processes, "train_sit.py", f"{words} --steps {steps} --out {tmp_path}/many")
        out, err = run.communicate(timeout=200)
        assert run.returncode == 0, err
    one, other = (torch.load(tmp_path / f"{p}/ckpt.pt", weights_only=True)["net"] for p in ("one", "many"))
    assert max((one[k] - other[k]).abs().max().item() for k in one) < 1e-9


@pytest.mark.slow
def test_a_termination_under_torchrun_saves_and_goes_on(chain, tmp_path):
    words = chain.stage2.replace("--workers 0", "--workers 1") + " --schedule constant"
    run = torchrun(2, "train_sit.py", f"{words} --steps 4000 --out {tmp_path}/run")
    wait_for(tmp_path / "run/ckpt.pt", run)
    run.terminate()
    out, err = run.communicate(timeout=100)
    step = torch.load(tmp_path / "run/ckpt.pt", weights_only=True)["step"]
    assert f"stopped after step {step}" in out + err, err
    run = torchrun(2, "train_sit.py", f"{words} --steps {step + 2} --out {tmp_path}/run")
    out, err = run.communicate(timeout=200)
    assert run.returncode == 0 and f"going on from step {step}" in out + err, err
