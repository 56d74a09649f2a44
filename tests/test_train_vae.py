"""Stage 1: each loss term against an independent computation, where gradients go, and how a run resumes."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import shapes
import torch
import torch.nn.functional as F
from conftest import ROOT, call, ends, relative
from PIL import Image

import dino
import sample
import train_sit
import train_vae as T
import vae as V
from fid import LPIPS


def tensors(*shape, n=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(n)]


# ------------------------------------------------------------------------------------------------- the losses


def test_alignment_is_nine_tenths_cosine_and_one_tenth_smooth_l1():
    """Eq. 2 by hand: one pair of vectors at right angles, and torch's own losses on random ones."""
    a, b = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 0.5]])
    assert T.align_loss(a, b).item() == pytest.approx(0.9 * 1 + 0.1 * ((3 - 0.5) + 0.5 * 0.5**2) / 2)
    a, b = tensors(4, 6, 10)
    cosine = torch.nn.CosineEmbeddingLoss()(a.flatten(0, 1), b.flatten(0, 1), torch.ones(24))
    assert relative(T.align_loss(a, b), 0.9 * cosine + 0.1 * torch.nn.SmoothL1Loss()(a, b)) < 1e-12


def test_patchgan_is_the_public_one():
    """Sizes, names and the forward pass, written out once more from the published layer list."""
    disc = T.PatchGAN()
    assert sum(p.numel() for p in disc.parameters()) == 2_765_633
    assert {k.split(".")[1] for k in disc.state_dict()} == {"0", "2", "3", "5", "6", "8", "9", "11"}
    assert disc(torch.zeros(2, 3, 256, 256)).shape == (2, 1, 30, 30)
    disc = disc.double()
    with torch.no_grad():
        for p in disc.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype))
    s, (x,) = disc.state_dict(), tensors(3, 3, 64, 48, n=1)
    h = F.leaky_relu(F.conv2d(x, s["main.0.weight"], s["main.0.bias"], stride=2, padding=1), 0.2)
    for conv, norm, stride in ((2, 3, 2), (5, 6, 2), (8, 9, 1)):
        h = F.conv2d(h, s[f"main.{conv}.weight"], stride=stride, padding=1)
        mean, var = h.mean((0, 2, 3), keepdim=True), h.var((0, 2, 3), keepdim=True, correction=0)
        h = (h - mean) / (var + 1e-5).sqrt() * s[f"main.{norm}.weight"][:, None, None] + s[
            f"main.{norm}.bias"
        ][:, None, None]
        h = F.leaky_relu(h, 0.2)
    h = F.conv2d(h, s["main.11.weight"], s["main.11.bias"], padding=1)
    assert relative(disc(x), h) < 1e-12


def test_the_discriminator_in_bf16_and_compiled_is_the_eager_one():
    torch.manual_seed(0)
    disc, x = T.PatchGAN(16), torch.rand(2, 3, 64, 64) * 2 - 1
    full = disc(x)
    with torch.autocast("cpu", torch.bfloat16):
        half = disc(x)
    assert half.dtype == torch.bfloat16 and 1e-4 < (half.float() - full).norm() / full.norm() < 0.03
    torch.compiler.reset()
    compiled = torch.compile(disc, fullgraph=True, backend="aot_eager")(x)
    assert relative(compiled.detach(), full.detach()) < 1e-5


# One step from the VAE of the chain, all terms on, each with a weight of its own.
WEIGHTS = {"mse": 1.0, "gan": 0.7, "lpips": 3.0, "kl": 0.5, "patch": 0.25, "cls": 0.25}


def thin_vgg(path):
    torch.manual_seed(1)
    net = LPIPS([4] * 13)
    torch.save({f"features.{k}": v for k, v in net.features.state_dict().items()}, path)
    return LPIPS.load(path)


def one_step(chain, out, more=""):
    """A run of one step -> its checkpoint, and the line of its log."""
    thin_vgg(out / "vgg.pth")
    call(
        T,
        f"{chain.of_data} --val {chain.data} --init {chain.root}/vae --dino {chain.root}/dino.pth "
        f"--workers 0",
        f"--vgg {out}/vgg.pth --gan 0.7 --perceptual 3 --kl 0.5 --align 0.25 --align-hidden 32 --batch 4",
        f"--steps 1 --log-every 1 --gan-start 0 {more} --out {out}/run",
    )
    ckpt = torch.load(out / "run/ckpt.pt", weights_only=True)
    return ckpt, json.loads((out / "run/log.jsonl").read_text().splitlines()[-1])


def by_hand(chain, vgg, gan, features, dtype=torch.float32):
    """The terms of Eq. 6, and the gradients of VAE with MLPs and of the discriminator, written out once
    more."""
    torch.manual_seed(int(V.rng(0, "init").integers(2**31)))
    vae, teacher, lpips = (
        V.VAE.load(chain.root / "vae"),
        dino.DINOv2.load(chain.root / "dino.pth"),
        LPIPS.load(vgg),
    )
    align, disc = V.Align(4, 64, 2, 32, features), T.PatchGAN()
    for net in (vae, teacher, lpips, align, disc):
        net.to(dtype)
    data, x, noise = V.Images(chain.data, 32), [], []
    for place in range(4):
        image = V.from_uint8(data[V.shuffled_index(0, 60, place)][0])
        x.append(image.flip(-1) if V.rng(0, "flip", 0, place).random() < 0.5 else image)
        noise.append(V.normal((4, 8, 8), 0, "noise", 0, place))
    x, noise = torch.stack(x).to(dtype), torch.stack(noise).to(dtype)

    def eq2(ours, theirs):
        return 0.9 * (1 - F.cosine_similarity(ours, theirs, -1)).mean() + 0.1 * F.smooth_l1_loss(ours, theirs)
    q = vae.encode(x)
    z = q.mean + (q.logvar / 2).exp() * noise                                # Eq. 1
    y, (patch, cls) = vae.decode(z), teacher.targets(x, 8)
    terms = {"mse": ((y - x) ** 2).mean(),
             "kl": torch.distributions.kl_divergence(torch.distributions.Normal(q.mean, q.std),
                                                     torch.distributions.Normal(0.0, 1.0)).sum() / 4,
             "lpips": sum(lpips(y[k:k + 1], x[k:k + 1]).sum() for k in range(4)) / 4, "gan": -disc(y).mean()}
    if features != "cls":
        terms["patch"] = eq2(align.patch(z.flatten(2).transpose(1, 2)), patch)
    if features != "patch":
        terms["cls"] = eq2(align.cls(z.mean((2, 3))), cls)
    total = sum({**WEIGHTS, "gan": gan}[k] * v for k, v in terms.items())
    trained = [*vae.parameters(), *align.parameters()]
    of_vae = torch.autograd.grad(total, trained)
    real, fake = disc(x), disc(y.detach())
    hinge = 0.5 * ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean())
    of_disc = torch.autograd.grad(hinge, list(disc.parameters()))
    terms |= {"loss": total, "disc": hinge, "real": real.mean(), "fake": fake.mean(), "z mean": z.mean(),
              "z std": z.std(), "posterior std": q.std.mean()}
    return {k: v.item() for k, v in terms.items()}, [
        torch.cat([g.flatten() for g in gs]) for gs in (of_vae, of_disc)
    ]


@pytest.mark.parametrize("features, gan", [("both", 0.7), ("both", 0.0), ("patch", 0.7), ("cls", 0.7)])
def test_the_first_steps_gradients_are_those_of_equation_6_written_out(chain, tmp_path, features, gan):
    """In float64: every term, its weight, and what it reaches; the discriminator learns before it is
    heard."""
    start = 0 if gan else 1
    ckpt, line = one_step(chain, tmp_path, f"--dtype fp64 --features {features} --gan-start {start}")
    terms, expected = by_hand(chain, tmp_path / "vgg.pth", gan, features, torch.float64)
    assert all(line[k] == pytest.approx(v, rel=1e-9) for k, v in terms.items())
    assert {"patch", "cls"} & line.keys() == {"patch", "cls"} & terms.keys() and terms["lpips"] > 1e-4
    found = gradients(tmp_path / "run")
    for ours, theirs, beta in zip(found, expected, (0.9, 0.5)):
        assert relative(ours / (1 - beta), theirs) < 1e-9
    assert line["grad norm"] == pytest.approx(expected[0].norm().item(), rel=1e-9)
    assert line["disc grad norm"] == pytest.approx(expected[1].norm().item(), rel=1e-9)
    assert (ckpt["model"].keys() & {"align.patch.0.weight", "align.cls.0.weight"}) == {
        f"align.{k}.0.weight" for k in ("patch", "cls") if features in (k, "both")}


def test_a_patch_of_another_place_is_another_loss():
    ours, theirs = tensors(2, 16, 6)
    assert abs(T.align_loss(ours, theirs) - T.align_loss(ours, theirs.flip(1))) > 1e-4


def test_a_teacher_without_a_class_feature_serves_features_patch(chain, tmp_path, monkeypatch):
    teacher = dino.DINOv2.load(chain.root / "dino.pth")
    targets = teacher.targets
    teacher.targets = lambda x, grid: (targets(x, grid)[0], None)
    monkeypatch.setattr(T, "load_teacher", lambda source: teacher)
    _, line = one_step(chain, tmp_path, "--features patch")
    assert "patch" in line and "cls" not in line


def test_under_bf16_every_loss_is_counted_in_float32(chain, tmp_path, monkeypatch):
    """Stage1 computes in bf16, near the float32 terms; discriminator, LPIPS and KL see float32 alone."""
    seen = []
    for owner in (T.PatchGAN, LPIPS):
        forward = owner.forward
        monkeypatch.setattr(
            owner,
            "forward",
            lambda self, *x, forward=forward: seen.extend(v.dtype for v in x) or forward(self, *x),
        )
    lines = {}
    for dtype in ("fp32", "bf16"):
        (tmp_path / dtype).mkdir()
        lines[dtype] = one_step(chain, tmp_path / dtype, f"--dtype {dtype}")[1]
    full, half = lines["fp32"], lines["bf16"]
    assert len(seen) == 10 and set(seen) == {torch.float32}
    apart = {k: abs(half[k] - full[k]) / abs(full[k]) for k in ("mse", "lpips", "kl", "patch", "cls")}
    assert max(apart.values()) < 0.05 and apart["mse"] > 1e-6, apart


# ---------------------------------------------------------------------------------------------------- the run


def test_a_run_leaves_a_folder_that_diffusers_reads(chain):
    from diffusers import AutoencoderKL
    info = json.loads((chain.root / "vae/vae/reals.json").read_text())
    assert info["latents"]["n"] == 60 and len(info["classes"]) == 10 and info["features"] == "both"
    theirs, ours, x = (
        AutoencoderKL.from_pretrained(chain.root / "vae/vae"),
        V.VAE.load(chain.root / "vae"),
        torch.rand(1, 3, 32, 32),
    )
    with torch.no_grad():
        assert relative(ours.encode(x).mean, theirs.encode(x).latent_dist.mean) < 1e-5
    assert (chain.root / "vae/pictures/0000004.png").is_file()
    begun, *lines = [json.loads(line) for line in open(chain.root / "vae/log.jsonl")]
    assert begun["step"] == 0 and [line["step"] for line in lines] == [2, 4]
    assert {
        "mse",
        "kl",
        "gan",
        "patch",
        "cls",
        "disc",
        "real",
        "fake",
        "z std",
        "posterior std",
        "grad norm",
        "PSNR",
        "img/s",
    } <= set(lines[0])


def test_the_folder_says_of_the_latents_what_they_are(chain):
    """Table 10's numbers of the saved VAE's sampled latents, and the log's last PSNR, once more from the
    files."""
    info, vae, data = (
        json.loads((chain.root / "vae/vae/reals.json").read_text()),
        V.VAE.load(chain.root / "vae"),
        V.Images(chain.data, 32),
    )
    with torch.no_grad():
        q = vae.encode(V.from_uint8(torch.stack([data[i][0] for i in range(60)])))
        z = q.mean + q.std * torch.stack([V.normal((4, 8, 8), 0, "sample", i) for i in range(60)])
        x = V.from_uint8(torch.stack([data[int(i)][0] for i in V.rng(0, "subset", 1).permutation(60)[:8]]))
        error = ((vae.decode(vae.encode(x).mean).clamp(-1, 1) - x) / 2).square().mean((1, 2, 3))
    found = [info["latents"][k] for k in ("mean", "std", "min", "max")]
    assert found == pytest.approx(
        [z.mean().item(), z.std(correction=0).item(), z.min().item(), z.max().item()], rel=1e-4
    )
    line = json.loads((chain.root / "vae/log.jsonl").read_text().splitlines()[-1])
    assert line["PSNR"] == pytest.approx((-10 * error.log10()).mean().item(), abs=1e-3) and line[
        "lr"
    ] == pytest.approx(5e-5 * T.schedule(3, SimpleNamespace(warmup=0, schedule="cosine", steps=4)))


def test_optimisers_and_defaults_are_those_that_the_readme_states(chain, monkeypatch):
    """Table 1 and the appendix's weights; the discriminator has LDM's betas and no decay."""
    ckpt = torch.load(chain.root / "vae/ckpt.pt", weights_only=True)
    vae, disc = (ckpt[name]["param_groups"][0] for name in ("optimizer", "disc optimizer"))
    assert (list(vae["betas"]), vae["weight_decay"], list(disc["betas"]), disc["weight_decay"]) == (
        [0.9, 0.999],
        0.01,
        [0.5, 0.9],
        0,
    )
    assert vae["lr"] == disc["lr"] > 0
    monkeypatch.setattr(sys, "argv", ["train_vae.py"])
    a = T.flags()
    assert (a.gan, a.perceptual, a.kl, a.align, a.lr, a.schedule, a.batch, a.epochs, a.size) == (
        0.1,
        1.0,
        2e-5,
        1.0,
        5e-5,
        "cosine",
        64,
        10,
        256,
    )
    assert (a.init, a.dino, a.features, a.align_layers, a.align_hidden, a.warmup, a.clip) == (
        "sd-vae-ft-ema",
        "vitl14_reg",
        "both",
        2,
        None,
        0,
        0,
    )


def test_half_of_the_images_are_mirrored_by_their_key(chain):
    data, args = V.Images(chain.data, 32), SimpleNamespace(batch=60, seed=3)
    draws, mirrored = T.Draws(data, (4, 8, 8), args), 0
    for place in range(60):
        x, noise = draws[1, place]
        image, flip = data[V.shuffled_index(3, 60, 60 + place)][0], V.rng(3, "flip", 1, place).random() < 0.5
        assert torch.equal(x, image.flip(-1) if flip else image) and torch.equal(
            noise, V.normal((4, 8, 8), 3, "noise", 1, place)
        )
        mirrored += flip
    assert 15 < mirrored < 45


def test_a_picture_shows_originals_reconstructions_our_features_and_the_teachers(chain, tmp_path):
    vae, align, teacher = (
        V.VAE(16, (1, 2), 1),
        V.Align(4, 64),
        dino.DINOv2(64, 1, patch=4, registers=0, grid=8),
    )
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    theirs = teacher.targets(x, 16)[0]
    T.picture(T.Stage1(vae, align), x, theirs, tmp_path / "a.png")
    sheet = torch.from_numpy(np.array(Image.open(tmp_path / "a.png"))).permute(2, 0, 1)
    assert sheet.shape == (3, 4 * 34 + 2, 2 * 34 + 2)

    def tile(row, column):
        return sheet[:, 2 + 34 * row:34 + 34 * row, 2 + 34 * column:34 + 34 * column]
    with torch.no_grad():
        mean = vae.encode(x).mean
        again = V.to_uint8(vae.decode(mean).clamp(-1, 1))
        colors = [dino.pca(f, dino.pca(theirs)[1])[0] for f in (align(mean)[0], theirs)]
        for column in range(2):
            assert torch.equal(tile(0, column), V.to_uint8(x[column])) and torch.equal(
                tile(1, column), again[column]
            )
            for row, c in zip((2, 3), colors):
                assert (tile(row, column)[:, ::2, ::2].flatten(1).T / 255 - c[column]).abs().max() < 0.01


def test_a_patch_mlp_that_was_never_trained_is_not_read(chain, tmp_path):
    call(T, f"{chain.stage1} --features cls --gan 0 --steps 1 --picture-every 1 --out {tmp_path}")
    assert Image.open(tmp_path / "pictures/0000001.png").height == 2 * 34 + 2
    with pytest.raises(ValueError, match="its run had --features cls, so it holds no patch MLP"):
        V.Align.load(tmp_path)


def test_a_log_of_steps_that_were_lost_does_not_say_them_twice(chain, tmp_path):
    """A kill between checkpoint and log line, the last one half written; and a run that met an endless
    gradient goes on clipped."""
    shutil.copytree(chain.root / "vae", tmp_path / "vae")
    ckpt = torch.load(tmp_path / "vae/ckpt.pt", weights_only=True)
    torch.save({**ckpt, "step": 2}, tmp_path / "vae/ckpt.pt")
    (tmp_path / "vae/log.jsonl").write_text((tmp_path / "vae/log.jsonl").read_text() + '{"step": 6, "ms')
    call(T, f"{chain.stage1} --steps 4 --clip 1 --out {tmp_path}/vae")
    lines = [json.loads(line) for line in open(tmp_path / "vae/log.jsonl")]
    assert [line["step"] for line in lines] == [0, 2, 2, 4]
    assert ["start" in line for line in lines] == [True, False, True, False]


def killed_at(step, schedule):
    """In the place of a trainer's schedule: it is asked in each step before any weight changes."""
    def killed(now, args):
        if now == step:
            raise RuntimeError("power cut")
        return schedule(now, args)
    return killed


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def test_a_killed_run_goes_on_bitwise(chain, tmp_path, monkeypatch):
    command = f"{chain.stage1} --steps 4 --out {tmp_path}/vae"
    monkeypatch.setattr(T, "schedule", killed_at(3, T.schedule))
    with pytest.raises(RuntimeError):
        call(T, command)
    monkeypatch.undo()
    assert torch.load(tmp_path / "vae/ckpt.pt", weights_only=True)["step"] == 2
    call(T, command)
    one, other = (torch.load(p / "vae/ckpt.pt", weights_only=True) for p in (chain.root, tmp_path))
    for key in ("step", "model", "disc", "optimizer", "disc optimizer", "data"):
        assert same(one[key], other[key]), key


def test_a_signal_to_the_whole_process_group_saves_and_leaves(chain, tmp_path):
    """As a launcher or a scheduler stops a run: loader processes hear the signal too."""
    command = f"{chain.stage1} --steps 100000 --workers 1 --log-every 1 --out {tmp_path}/vae"
    run = subprocess.Popen(
        [sys.executable, str(ROOT / "train_vae.py"), *command.split()],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.time() + 100
    log = tmp_path / "vae/log.jsonl"
    while not (log.is_file() and "loss" in log.read_text()) and time.time() < deadline:
        time.sleep(0.2)
    os.killpg(run.pid, signal.SIGTERM)
    out, err = run.communicate(timeout=60)
    step = torch.load(tmp_path / "vae/ckpt.pt", weights_only=True)["step"]
    assert (
        run.returncode == 128 + signal.SIGTERM
        and f"stopped after step {step}" in out + err
        and "Traceback" not in err
    )


BUGS = {  # what somebody breaks: (the line that breaks it, what the traceback must say)
    "a loader's worker": ("train_vae.Draws.__getitem__ = lambda self, key: 1 / 0", "ZeroDivisionError"),
    "the shape of a draw": (
        "import torch; train_vae.Draws.__getitem__ = lambda self, key: [torch.zeros(1)] * 3",
        "too many values to unpack",
    ),
    "a loss": ("train_vae.align_loss = lambda ours, theirs: ours + theirs[:, :3]", "must match the size"),
    "a path of one's own": (
        "train_vae.schedule = lambda step, args: open('/nowhere/rate')",
        "FileNotFoundError",
    ),
}


def broken(chain, tmp_path, line):
    """The trainer as a person broke it, with a loader's worker -> how it ended."""
    (tmp_path / "broken.py").write_text(
        f"import sys\nsys.path.insert(0, sys.argv.pop(1))\nimport train_vae\nimport vae\n"
        f"{line}\nvae.run_script(train_vae.main)\n"
    )
    command = f"{ROOT} {chain.stage1.replace('--workers 0', '--workers 1')} --steps 100 --out {tmp_path}/vae"
    return subprocess.run(
        [sys.executable, str(tmp_path / "broken.py"), *command.split()],
        capture_output=True,
        text=True,
        timeout=100,
    )


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_ends_in_a_traceback_that_names_its_line_and_the_loader_ends_too(chain, tmp_path, bug):
    line, says = BUGS[bug]
    done = broken(chain, tmp_path, line)
    assert done.returncode == 1 and "Traceback" in done.stderr and says in done.stderr
    where = f'{ROOT}/train_vae.py", line' if "shape" in bug else 'broken.py", line 5'
    assert where in done.stderr, done.stderr


def test_an_interrupt_that_is_not_caught_ends_in_one_line(chain, tmp_path):
    done = broken(chain, tmp_path, "def rate(*a): raise KeyboardInterrupt\ntrain_vae.schedule = rate")
    assert done.returncode == 130 and "Traceback" not in done.stderr


def test_a_flag_that_is_new_to_a_checkpoint_counts_as_changed(chain, monkeypatch, capsys):
    """As somebody who adds a loss term adds its weight: its default goes on, another value does not."""
    add = T.add_run_flags
    monkeypatch.setattr(
        T, "add_run_flags", lambda p, **k: p.add_argument("--mine", type=float, default=0.0) and add(p, **k)
    )
    call(T, f"{chain.stage1} --steps 4 --out {chain.root}/vae")
    said = capsys.readouterr().out
    assert "going on from step 4, with --mine 0.0, then unknown" in said and "is finished" in said
    with pytest.raises(ValueError, match="was made with --mine 0.0, not 0.5"):
        call(T, f"{chain.stage1} --steps 4 --mine 0.5 --out {chain.root}/vae")


def test_a_frequency_and_a_place_whose_network_is_hashed_may_change(chain, tmp_path, monkeypatch, capsys):
    shutil.copy(chain.root / "dino.pth", tmp_path / "teacher.pth")
    words = f"{chain.stage1} --dino {tmp_path}/teacher.pth --steps 4 --log-every 3 --out {chain.root}/vae"
    call(T, words)
    assert "is finished" in capsys.readouterr().out
    add = T.add_run_flags                # how often a penalty is added, say, is another training
    monkeypatch.setattr(
        T, "add_run_flags", lambda p, **k: p.add_argument("--r1-every", type=int, default=3) and add(p, **k)
    )
    call(T, words)
    assert ", with --r1-every 3, then unknown" in capsys.readouterr().out
    with pytest.raises(ValueError, match="was made with --r1-every 3, not 7"):
        call(T, words, "--r1-every 7")


def test_another_setting_is_refused_by_name(chain):
    with pytest.raises(ValueError, match="--lr 5e-05, not 0.001"):
        call(T, f"{chain.stage1} --steps 4 --lr 1e-3 --out {chain.root}/vae")
    with pytest.raises(ValueError, match="--steps 4, not 8"):     # a cosine cannot be continued
        call(T, f"{chain.stage1} --steps 8 --out {chain.root}/vae")


def test_a_zero_weight_builds_nothing(chain, tmp_path, monkeypatch):
    def never(*a, **k):
        raise AssertionError("was built")
    for owner, name in ((T, "load_teacher"), (T.LPIPS, "load"), (T, "PatchGAN")):
        monkeypatch.setattr(owner, name, never)
    call(
        T,
        f"{chain.of_data} --val {chain.data} {chain.small} --features none --gan 0 --perceptual 0 "
        f"--batch 4 --steps 1 --out {tmp_path}",
    )
    assert not (tmp_path / "vae/align.safetensors").exists()


def test_heads_alone_leave_the_vae_as_it_was(chain, tmp_path):
    call(
        T,
        f"{chain.of_data} --val {chain.data} --init {chain.root}/vae --dino {chain.root}/dino.pth "
        f"--train align --align-hidden 16",
        f"--batch 8 --steps 2 --workers 0 --out {tmp_path}",
    )
    assert V.fingerprint(V.VAE.load(tmp_path)) == V.fingerprint(V.VAE.load(chain.root / "vae"))
    assert V.Align.load(tmp_path).settings["hidden"] == 16


def test_the_decoder_alone_is_repaired_and_stage_2_goes_on_with_it(chain, tmp_path, capsys):
    """The encoder, its latents, their statistics and the MLPs stay to the last bit."""
    old, new = chain.root / "vae/vae", tmp_path / "repaired/vae"
    words = f"{chain.of_data} --val {chain.data} --init {chain.root}/vae --train decoder --gan 0"
    words += " --perceptual 0 --batch 8 --lr 5e-3 --workers 0 --log-every 1"
    call(T, words, f"--steps 80 --dtype fp32 --out {tmp_path}/repaired")
    before, after = (V.VAE.load(folder).state_dict() for folder in (old, new))
    for key in before:
        assert torch.equal(before[key], after[key]) == key.startswith(("encoder.", "quant_conv.")), key
    assert (old / "align.safetensors").read_bytes() == (new / "align.safetensors").read_bytes()
    assert json.loads((old / "reals.json").read_text()) == json.loads((new / "reals.json").read_text())
    losses = logged(tmp_path / "repaired", "mse", "loss")
    assert losses[-10:].mean() < 0.8 * losses[:10].mean() and torch.equal(losses[:, 0], losses[:, 1])
    assert V.Align.load(tmp_path / "repaired").settings == V.Align.load(chain.root / "vae").settings

    cache = chain.root / "latents/moments.npy"
    changed = cache.stat().st_mtime_ns
    shutil.copytree(chain.root / "sit", tmp_path / "sit")
    call(train_sit, chain.stage2, f"--vae {tmp_path}/repaired --steps 8 --out {tmp_path}/sit")
    assert "going on from step 6" in capsys.readouterr().out and cache.stat().st_mtime_ns == changed
    draw = f"--ckpt {tmp_path}/sit --num 2 --steps 2 --npz --out {tmp_path}/samples"
    call(sample, draw)                                       # by the repaired one, which it saw last
    with pytest.raises(V.UserError, match="made with vae .*--out names another folder"):
        call(sample, draw, f"--vae {chain.root}/vae")        # other pixels: the arrays of a job cannot mix
    call(sample, draw, f"--vae {chain.root}/vae --out {tmp_path}/others")
    pixels, latents = [], []
    for name in ("samples", "others"):
        with np.load(tmp_path / name / "samples.npz") as arrays:
            pixels.append(arrays["arr_0"])
            latents.append(arrays["latents"])
    assert np.array_equal(*latents) and not np.array_equal(*pixels)
    other = V.VAE.load(chain.root / "vae")
    with torch.no_grad():
        other.encoder.conv_in.weight[0, 0, 0, 0] += 1e-3
    other.save(tmp_path / "other")
    with pytest.raises(V.UserError, match="trained on another VAE's latents"):
        call(sample, draw, f"--vae {tmp_path}/other")
    with pytest.raises(V.UserError, match="another vae"):
        call(train_sit, chain.stage2, f"--vae {tmp_path}/other --steps 9 --out {tmp_path}/sit")


def test_a_public_vaes_decoder_is_repaired_as_well(chain, tmp_path, capsys):
    """No MLPs, no statistics beside it: none afterwards."""
    torch.save(V.VAE(16, (1, 2), 1).state_dict(), tmp_path / "public.pt")
    words = f"{chain.of_data} --val {chain.data} --train decoder --gan 0 --perceptual 0 --batch 8 --workers 0"
    call(T, words, f"--init {tmp_path}/public.pt --steps 1 --out {tmp_path}/repaired")
    files = {path.name for path in (tmp_path / "repaired/vae").iterdir()}
    assert files == {"config.json", "diffusion_pytorch_model.safetensors", "reals.json"}
    assert V.VAE.load(tmp_path / "repaired").info.keys() == {"vae", "align"}
    with pytest.raises(SystemExit):
        call(T, words, f"--init none --steps 1 --out {tmp_path}/new")
    assert "--train decoder repairs a decoder: --init names its VAE" in capsys.readouterr().err


def run_two(script, command):
    """The script in two real processes, which torchrun starts and gloo joins."""
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(ROOT / script),
    ]
    return subprocess.run(
        launch + command.split(),
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def logged(folder, *names):
    """The named values of log.jsonl, float64 [lines, names]: the file keeps all their digits."""
    lines = [json.loads(line) for line in open(folder / "log.jsonl") if "start" not in json.loads(line)]
    return torch.tensor([[line[k] for k in names] for line in lines], dtype=torch.float64)


def gradients(folder):
    """Of each optimiser, the gradient over all its parameters, up to a factor: AdamW's first moment after one
    step."""
    ckpt = torch.load(folder / "ckpt.pt", weights_only=True)
    optimizers = [ckpt[name] for name in ("optimizer", "disc optimizer") if name in ckpt]
    return [torch.cat([s["exp_avg"].double().flatten() for s in o["state"].values()]) for o in optimizers]


def far(ones, others):
    """The largest relative L2 distance between two lists of vectors."""
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(ones, others, strict=True))


def test_micro_batches_and_processes_give_the_same_run(chain, tmp_path):
    """fp64, no GAN: one process, four micro-batches of two, and two processes; losses agree to 1e-9."""
    command = (
        f"{chain.of_data} --val {chain.data} --dino {chain.root}/dino.pth {chain.small} --gan 0 "
        f"--perceptual 0 "
        f"--batch 8 --steps 4 --log-every 1 --dtype fp64 --align-hidden 32"
    )
    call(T, command, f"--out {tmp_path}/one")
    call(T, command, f"--micro 2 --out {tmp_path}/micro")
    run_two(
        "train_vae.py", f"{command} --micro 2 --out {tmp_path}/two"
    )  # two processes of two micro-batches each
    one, *others = (
        logged(tmp_path / name, "mse", "kl", "patch", "cls", "loss", "grad norm")
        for name in ("one", "micro", "two")
    )
    assert all(((other - one) / one).abs().max() < 1e-9 for other in others)
    with pytest.raises(ValueError, match="--micro 3"):
        call(T, command, f"--micro 3 --out {tmp_path}/three")


@pytest.mark.slow
@pytest.mark.parametrize("gan, dtype, of_gradient, of_ten, of_all", [
    ("--gan 0 --lr 1e-3", "fp32", 1e-5, 1e-4, 1e-2), ("--gan 0 --lr 1e-3", "fp64", 1e-12, 1e-9, 1e-9),
    ("--gan 0.1 --gan-start 0 --micro 2 --lr 3e-5 --warmup 300", "fp32", 1e-5, 1e-4, 0.5),
    ("--gan 0.1 --gan-start 0 --micro 2 --lr 3e-5 --warmup 300", "fp64", 1e-12, 1e-9, 1e-9)])
def test_one_process_and_two_agree_for_three_hundred_steps(
    chain, tmp_path, one_thread, gan, dtype, of_gradient, of_ten, of_all
):
    """Losses are compared relative to those of step 1. Measured over 300 steps: fp32 1e-4, fp64 5e-12; with
    the GAN 0, and with 16 channels and a batch of 8 .2 and 2e-12. The GAN, at equal micro-batches, which are
    what its batch norms see (two on one process, one on each of two), amplifies rounding a thousandfold in
    ten steps of a fresh discriminator at the default learning rate: hence a small one, warmed up."""
    command = (
        f"{chain.of_data} --val {chain.data} --dino {chain.root}/dino.pth {chain.small} --ch 8 {gan} "
        f"--perceptual 0 --align-hidden 32 "
        f"--batch 4 --log-every 1 --picture-every 1000 --dtype {dtype}"
    )
    for steps in (1, 300):
        call(T, command, f"--steps {steps} --out {tmp_path}/one-{steps}")
        run_two("train_vae.py", f"{command} --steps {steps} --out {tmp_path}/two-{steps}")
    g = far(gradients(tmp_path / "two-1"), gradients(tmp_path / "one-1"))
    one, two = (
        logged(tmp_path / f"{name}-300", *["loss", "mse", "kl", "patch", "cls"] + ["disc"] * ("micro" in gan))
        for name in ("one", "two")
    )
    apart = ((two - one) / one[0]).abs().amax(1)
    print(gan, dtype, g, apart[:10].max(), apart.max())
    assert len(apart) == 300 and g < of_gradient and apart[:10].max() < of_ten and apart.max() < of_all


def test_one_bad_file_is_left_out_and_named(chain, tmp_path, capsys):
    shapes.write(tmp_path / "data", 20, 32, 5)
    next((tmp_path / "data/00_disk").iterdir()).write_bytes(b"not a picture")
    (tmp_path / "data/01_ring/gone.png").symlink_to(tmp_path / "nowhere.png")
    call(
        T,
        f"--data {tmp_path}/data --val {chain.data} --size 32 {chain.small} --features none --gan 0 "
        f"--perceptual 0 --batch 10 --steps 2 --out {tmp_path}/vae",
    )
    said = capsys.readouterr().out
    assert said.count("not a readable image") == 2 and "00_disk/" in said and "01_ring/gone.png" in said


def test_heads_without_features_are_refused(chain, tmp_path, capsys):
    with pytest.raises(SystemExit):
        call(T, f"{chain.of_data} --init {chain.root}/vae --train align --features none --out {tmp_path}/vae")
    assert "it needs --features" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, says",
    [
        ("--data {}/nowhere", "nowhere: no images here"),
        ("--dino {}/none.pth", "none.pth"),
        ("--size 30", "--size 30"),
        ("--perceptual 1 --vgg {}/none.pth", "none.pth"),
        ("--init {}/nothing", "nothing: no VAE here"),
        ("--batch 8 --micro 3", "--micro 3"),
    ],
)
def test_what_is_missing_is_said_in_one_line_before_anything_long(chain, tmp_path, capsys, words, says):
    status = ends(T, f"{chain.stage1} --steps 2 --out {tmp_path}/vae", words.format(tmp_path))
    said = capsys.readouterr().err
    assert status == 1 and said.count("\n") == 1 and said.startswith("train_vae.py: ") and says in said
    assert not (tmp_path / "vae").exists()
