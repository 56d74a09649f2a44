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
import torch
import torch.nn.functional as F
from PIL import Image

import shapes
import train_vae as T
import vae as V
from conftest import ROOT, call, relative
from fid import LPIPS


def tensors(*shape, n=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(n)]


# -------------------------------------------------------------------------------------------------------- the losses


def test_alignment_is_nine_tenths_cosine_and_one_tenth_smooth_l1():
    """Eq. 2 by hand: one pair of vectors at right angles, and torch's own losses on random ones."""
    a, b = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 0.5]])
    assert T.align_loss(a, b).item() == pytest.approx(0.9 * 1 + 0.1 * ((3 - 0.5) + 0.5 * 0.5**2) / 2)
    a, b = tensors(4, 6, 10)
    cosine = torch.nn.CosineEmbeddingLoss()(a.flatten(0, 1), b.flatten(0, 1), torch.ones(24))
    assert relative(T.align_loss(a, b), 0.9 * cosine + 0.1 * torch.nn.SmoothL1Loss()(a, b)) < 1e-12


def test_total_is_equation_6():
    terms = dict(mse=2.0, gan=3.0, lpips=5.0, kl=7.0, align=11.0)
    assert T.total_loss(terms, 0.1, 1.0, 2e-5, 1.0) == pytest.approx(2 + 0.3 + 5 + 7 * 2e-5 + 11)
    pixel, latent = T.total_loss({k: terms[k] for k in ("mse", "gan", "lpips")}, 0.1, 1, 1, 1), T.total_loss({"kl": 7.0, "align": 11.0}, 1, 1, 2e-5, 1)
    assert pixel == pytest.approx(7.3) and latent == pytest.approx(11.00014)          # Eq. 3, Eq. 4
    assert pixel + latent == pytest.approx(T.total_loss(terms, 0.1, 1.0, 2e-5, 1.0))  # Eq. 5


def test_hinge_by_hand():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0])
    assert T.hinge(real, fake).item() == pytest.approx(0.5 * (0.5 + 1.0))


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
        h = (h - mean) / (var + 1e-5).sqrt() * s[f"main.{norm}.weight"][:, None, None] + s[f"main.{norm}.bias"][:, None, None]
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


class Args:
    features, dtype = "both", "fp32"


class Teacher(torch.nn.Module):
    """Stands in for DINOv2, with other features for each image and place, and remembers how it was asked."""

    def __init__(self):
        super().__init__()
        self.weight, self.grad_was_on = torch.nn.Parameter(torch.ones(())), None

    def targets(self, x, grid):
        self.grad_was_on = torch.is_grad_enabled()
        g = torch.Generator().manual_seed(grid)
        return torch.randn(len(x), grid * grid, 6, generator=g) * self.weight, torch.randn(len(x), 6, generator=g) * self.weight


def losses(features="both", disc=None, lpips=None, dtype="fp32"):
    args = Args()
    args.features, args.dtype = features, dtype
    run, dino = V.Run(), Teacher()
    torch.manual_seed(0)
    stage1 = T.Stage1(V.VAE(16, (1, 2), 1), V.Align(4, 6), False)
    return stage1, dino, T.Losses(args, run, dino, lpips, disc, 16)


def thin_lpips():
    torch.manual_seed(1)
    return LPIPS([4] * 13).eval().requires_grad_(False)


def grads(module):
    return sum(0.0 if p.grad is None else p.grad.abs().sum().item() for p in module.parameters())


def test_gradients_reach_what_they_must_and_nothing_else():
    disc, lpips = T.PatchGAN(8), thin_lpips()
    stage1, dino, loss = losses(disc=disc, lpips=lpips)
    x, noise = torch.rand(2, 3, 32, 32) * 2 - 1, torch.randn(2, 4, 16, 16)
    terms, recon, _ = loss(stage1, x, noise)
    expect = {  # term: (encoder, decoder, alignment heads)
        "mse": (True, True, False), "kl": (True, False, False), "gan": (True, True, False), "lpips": (True, True, False),
        "align": (True, False, True)}
    for name, reached in expect.items():
        stage1.zero_grad()
        terms[name].backward(retain_graph=True)
        assert tuple(g > 0 for g in map(grads, (stage1.vae.encoder, stage1.vae.decoder, stage1.align))) == reached, name
        assert grads(disc) == grads(dino) == grads(lpips) == 0
    assert dino.grad_was_on is False
    T.hinge(disc(x), disc(recon.detach())).backward()
    before = grads(stage1)
    assert grads(disc) > 0 and grads(stage1) == before


@pytest.mark.parametrize("features", ["patch", "cls", "both"])
def test_features_choose_what_is_aligned(features):
    stage1, _, loss = losses(features)
    terms, _, _ = loss(stage1, torch.zeros(1, 3, 32, 32), torch.zeros(1, 4, 16, 16))
    wanted = {"patch": terms["patch"], "cls": terms["cls"], "both": terms["patch"] + terms["cls"]}[features]
    assert terms["align"] == wanted


def test_terms_are_the_textbook_ones():
    stage1, _, loss = losses()
    x, noise = torch.rand(3, 3, 32, 32) * 2 - 1, torch.randn(3, 4, 16, 16)
    terms, recon, q = loss(stage1, x, noise)
    assert relative(recon, stage1.vae.decode(q.mean + q.std * noise)) < 1e-6
    assert terms["mse"].item() == pytest.approx((recon - x).square().mean().item(), rel=1e-6)
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(q.mean, q.std), normal(0.0, 1.0)).sum((1, 2, 3)).mean()
    assert terms["kl"].item() == pytest.approx(kl.item(), rel=1e-5)


def test_alignment_compares_the_sampled_latents_features_with_the_teachers_place_by_place():
    """Eq. 1 and 2 from torch's own pieces: both MLPs read z = mean + std * noise, the cls MLP its mean over the places."""
    stage1, dino, loss = losses()
    x, noise = torch.rand(3, 3, 32, 32) * 2 - 1, torch.randn(3, 4, 16, 16)
    terms, _, q = loss(stage1, x, noise)
    z, (patch, cls) = q.mean + q.std * noise, dino.targets(x, 16)

    def eq2(ours, theirs):
        return 0.9 * (1 - F.cosine_similarity(ours, theirs, -1)).mean() + 0.1 * F.smooth_l1_loss(ours, theirs)
    expected = {"patch": eq2(stage1.align.patch(z.flatten(2).transpose(1, 2)), patch), "cls": eq2(stage1.align.cls(z.mean((2, 3))), cls)}
    for name, value in (*expected.items(), ("align", sum(expected.values()))):
        assert terms[name].item() == pytest.approx(value.item(), rel=1e-5), name
    assert abs(eq2(stage1.align.patch(z.flatten(2).transpose(1, 2)), patch.flip(1)) - expected["patch"]) > 1e-4


def test_the_generators_terms_are_the_networks_own_words():
    disc, net = T.PatchGAN(8), thin_lpips()
    stage1, _, loss = losses(disc=disc, lpips=net)
    x, noise = torch.rand(3, 3, 32, 32) * 2 - 1, torch.randn(3, 4, 16, 16)
    terms, recon, _ = loss(stage1, x, noise)
    apart = sum(net(recon[i:i + 1], x[i:i + 1]).item() for i in range(3)) / 3
    assert terms["lpips"].item() == pytest.approx(apart, rel=1e-5) and apart > 1e-4
    assert terms["gan"].item() == pytest.approx(-disc(recon).mean().item(), rel=1e-5)
    assert all(p.requires_grad for p in disc.parameters())


def test_under_bf16_every_loss_is_counted_in_float32():
    """The networks of Stage1 compute in bf16, near the float32 terms; discriminator, LPIPS and KL see float32 alone."""
    disc, net, seen = T.PatchGAN(8), thin_lpips(), []
    for m in (disc.main[0], net.features[0]):
        m.register_forward_hook(lambda m, args, out: seen.append((args[0].dtype, out.dtype)))
    x, noise = torch.rand(2, 3, 32, 32) * 2 - 1, torch.randn(2, 4, 16, 16)
    full, half = ({k: v for k, v in loss(stage1, x, noise)[0].items()} for stage1, _, loss in
                  (losses(disc=disc, lpips=net, dtype=dtype) for dtype in ("fp32", "bf16")))
    assert len(seen) == 6 and all(a == b == torch.float32 for a, b in seen)
    assert all(v.dtype == torch.float32 for v in half.values())
    apart = {k: abs(half[k] - full[k]).item() / abs(full[k]).item() for k in full}
    assert max(apart.values()) < 0.05 and apart["mse"] > 1e-6, apart


def test_the_generator_hears_the_discriminator_from_gan_start_on():
    for step, weight in ((1, 0.0), (2, 0.7)):
        disc = T.PatchGAN(8)
        stage1, _, loss = losses(disc=disc, lpips=thin_lpips())
        args = SimpleNamespace(gan=0.7, gan_start=2, perceptual=3.0, kl=0.5, align=0.25, accumulate=1, clip=0, lr=1e-3, warmup=0, schedule="constant", steps=9)
        batch = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8), torch.randn(2, 4, 16, 16), []
        optimizers = [torch.optim.AdamW(m.parameters(), 1e-3) for m in (stage1, disc)]
        before, x = disc.main[0].weight.clone(), V.from_uint8(batch[0])
        q = stage1.vae.encode(x)
        z = q.sample(batch[1])
        real, fake = disc(x), disc(stage1.vae.decode(z))
        expected = {"real": real.mean(), "fake": fake.mean(), "disc": 0.5 * ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()),
                    "z mean": z.mean(), "z std": z.std(), "posterior std": q.std.mean()}
        seen, _ = T.train_step(args, step, iter([batch]), stage1, disc, loss, optimizers)
        loss = seen["mse"] + weight * seen["gan"] + 3 * seen["lpips"] + 0.5 * seen["kl"] + 0.25 * seen["align"]
        assert seen["loss"].item() == pytest.approx(loss.item(), rel=1e-5) and seen["lpips"] > 1e-4
        assert all(seen[k].item() == pytest.approx(v.item(), rel=1e-4, abs=1e-5) for k, v in expected.items())
        assert abs(seen["gan"]) > 1e-3 and not torch.equal(disc.main[0].weight, before)     # it learns before it is heard


# ----------------------------------------------------------------------------------------------------------- the run


def test_a_run_leaves_a_folder_that_diffusers_reads(chain):
    from diffusers import AutoencoderKL
    info = json.loads((chain.root / "vae/vae/reals.json").read_text())
    assert info["latents"]["n"] == 60 and len(info["classes"]) == 10 and info["features"] == "both"
    theirs, ours, x = AutoencoderKL.from_pretrained(chain.root / "vae/vae"), V.VAE.load(chain.root / "vae"), torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert relative(ours.encode(x).mean, theirs.encode(x).latent_dist.mean) < 1e-5
    assert (chain.root / "vae/pictures/0000004.png").is_file()
    lines = [json.loads(line) for line in open(chain.root / "vae/log.jsonl")]
    assert [line["step"] for line in lines] == [2, 4]
    assert {"mse", "kl", "gan", "align", "disc", "real", "fake", "z std", "posterior std", "grad norm", "PSNR", "img/s"} <= set(lines[0])


def test_the_folder_says_of_the_latents_what_they_are(chain):
    """Table 10's numbers of the saved VAE's sampled latents, and the log's last PSNR, once more from the files."""
    info, vae, data = json.loads((chain.root / "vae/vae/reals.json").read_text()), V.VAE.load(chain.root / "vae"), V.Images(chain.data, 32)
    with torch.no_grad():
        q = vae.encode(V.from_uint8(torch.stack([data[i][0] for i in range(60)])))
        z = q.mean + q.std * torch.stack([V.normal((4, 8, 8), 0, "sample", i) for i in range(60)])
        x = V.from_uint8(torch.stack([data[int(i)][0] for i in V.rng(0, "subset", 1).permutation(60)[:8]]))
        error = ((vae.decode(vae.encode(x).mean).clamp(-1, 1) - x) / 2).square().mean((1, 2, 3))
    found = [info["latents"][k] for k in ("mean", "std", "min", "max")]
    assert found == pytest.approx([z.mean().item(), z.std(correction=0).item(), z.min().item(), z.max().item()], rel=1e-4)
    line = json.loads((chain.root / "vae/log.jsonl").read_text().splitlines()[-1])
    assert line["PSNR"] == pytest.approx((-10 * error.log10()).mean().item(), abs=1e-3) and line["lr"] == pytest.approx(V.learning_rate(
        SimpleNamespace(lr=5e-5, warmup=0, schedule="cosine", steps=4), 3))


def test_optimisers_and_defaults_are_those_that_the_readme_states(chain, monkeypatch):
    """Table 1 and the appendix's weights; the discriminator has LDM's betas and no decay."""
    vae, disc = (o["param_groups"][0] for o in torch.load(chain.root / "vae/ckpt.pt", weights_only=True)["optimizers"])
    assert (list(vae["betas"]), vae["weight_decay"], list(disc["betas"]), disc["weight_decay"]) == ([0.9, 0.999], 0.01, [0.5, 0.9], 0)
    assert vae["lr"] == disc["lr"] > 0
    monkeypatch.setattr(sys, "argv", ["train_vae.py"])
    a = T.flags()
    assert (a.gan, a.perceptual, a.kl, a.align, a.lr, a.schedule, a.batch, a.epochs, a.size) == (0.1, 1.0, 2e-5, 1.0, 5e-5, "cosine", 64, 10, 256)
    assert (a.init, a.dino, a.features, a.align_layers, a.align_hidden, a.warmup, a.clip) == ("sd-vae-ft-ema", "vitl14_reg", "both", 2, None, 0, 0)


def test_half_of_the_images_are_mirrored_by_their_key(chain):
    data, args = V.Images(chain.data, 32), SimpleNamespace(batch=60, seed=3)
    x, noise, bad = T.Draws(data, (4, 8, 8), args)[1, range(60)]
    mirrored = 0
    for place in range(60):
        image, flip = data[V.order(3, 60, 60 + place)][0], V.rng(3, "flip", 1, place).random() < 0.5
        assert torch.equal(x[place], image.flip(-1) if flip else image) and torch.equal(noise[place], V.normal((4, 8, 8), 3, "noise", 1, place))
        mirrored += flip
    assert 15 < mirrored < 45 and not bad


def test_a_picture_shows_originals_reconstructions_our_features_and_the_teachers(chain, tmp_path):
    stage1, dino, loss = losses()
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    T.picture(stage1, loss, x, tmp_path / "a.png")
    sheet = torch.from_numpy(np.array(Image.open(tmp_path / "a.png"))).permute(2, 0, 1)
    assert sheet.shape == (3, 4 * 34 + 2, 2 * 34 + 2)
    tile = lambda row, column: sheet[:, 2 + 34 * row:34 + 34 * row, 2 + 34 * column:34 + 34 * column]   # noqa: E731
    with torch.no_grad():
        q, theirs = stage1.vae.encode(x), dino.targets(x, 16)[0]
        colours = [V.pca(f, V.pca(theirs)[1])[0] for f in (stage1.align(q.mean)[0], theirs)]
        for column in range(2):
            assert torch.equal(tile(0, column), V.to_uint8(x[column])) and torch.equal(tile(1, column), V.to_uint8(stage1.vae.decode(q.mean)[column].clamp(-1, 1)))
            for row, c in zip((2, 3), colours):
                assert (tile(row, column)[:, ::2, ::2].flatten(1).T / 255 - c[column]).abs().max() < 0.01


def test_a_patch_mlp_that_was_never_trained_is_not_read(chain, tmp_path):
    call(T, f"{chain.stage1} --features cls --gan 0 --steps 1 --picture-every 1 --out {tmp_path}")
    assert Image.open(tmp_path / "pictures/0000001.png").height == 2 * 34 + 2
    with pytest.raises(ValueError, match="features cls, so its patch MLP was never trained"):
        V.Align.load(tmp_path)


def test_a_log_of_steps_that_were_lost_does_not_say_them_twice(chain, tmp_path):
    """A kill between checkpoint and log line, the last one half written; and a run that met an endless gradient goes on clipped."""
    shutil.copytree(chain.root / "vae", tmp_path / "vae")
    ckpt = torch.load(tmp_path / "vae/ckpt.pt", weights_only=True)
    torch.save({**ckpt, "step": 2}, tmp_path / "vae/ckpt.pt")
    (tmp_path / "vae/log.jsonl").write_text((tmp_path / "vae/log.jsonl").read_text() + '{"step": 6, "ms')
    call(T, f"{chain.stage1} --steps 4 --clip 1 --out {tmp_path}/vae")
    assert [json.loads(line)["step"] for line in open(tmp_path / "vae/log.jsonl")] == [2, 4]


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def test_a_killed_run_goes_on_bitwise(chain, tmp_path, monkeypatch):
    command = f"{chain.stage1} --steps 4 --out {tmp_path}/vae"
    update = V.update

    def killed(pairs, clip, step):
        if step == 3:
            raise RuntimeError("power cut")
        return update(pairs, clip, step)
    monkeypatch.setattr(V, "update", killed)
    with pytest.raises(RuntimeError):
        call(T, command)
    monkeypatch.undo()
    assert torch.load(tmp_path / "vae/ckpt.pt", weights_only=True)["step"] == 2
    call(T, command)
    one, other = (torch.load(p / "vae/ckpt.pt", weights_only=True) for p in (chain.root, tmp_path))
    for key in ("step", "model", "disc", "optimizers", "data"):
        assert same(one[key], other[key]), key


def test_a_signal_to_the_whole_process_group_saves_and_leaves(chain, tmp_path):
    """As a launcher or a scheduler stops a run: loader processes hear the signal too."""
    command = f"{chain.stage1} --steps 100000 --workers 1 --log-every 1 --out {tmp_path}/vae"
    run = subprocess.Popen([sys.executable, str(ROOT / "train_vae.py"), *command.split()], start_new_session=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 100
    while not (tmp_path / "vae/log.jsonl").is_file() and time.time() < deadline:
        time.sleep(0.2)
    os.killpg(run.pid, signal.SIGTERM)
    out, err = run.communicate(timeout=60)
    step = torch.load(tmp_path / "vae/ckpt.pt", weights_only=True)["step"]
    assert run.returncode == 128 + signal.SIGTERM and f"stopped after step {step}" in out + err and "Traceback" not in err


@pytest.mark.parametrize("error, status", [("RuntimeError('power cut')", 1), ("KeyboardInterrupt", 130)])
def test_an_error_that_nobody_foresaw_ends_the_run_and_its_loader(chain, tmp_path, error, status):
    (tmp_path / "broken.py").write_text(f"import sys; sys.path.insert(0, sys.argv.pop(1)); import train_vae, vae\n"
                                        f"def update(*a): raise {error}\nvae.update = update\nvae.main(train_vae.main)")
    command = f"{ROOT} {chain.stage1.replace('--workers 0', '--workers 1')} --steps 100 --out {tmp_path}/vae"
    done = subprocess.run([sys.executable, str(tmp_path / "broken.py"), *command.split()], capture_output=True, text=True, timeout=100)
    assert done.returncode == status and ("power cut" in done.stderr) == (status == 1) and ("Traceback" in done.stderr) == (status == 1)


def test_another_setting_is_refused_by_name(chain):
    with pytest.raises(ValueError, match="--lr 5e-05, not 0.001"):
        call(T, f"{chain.stage1} --steps 4 --lr 1e-3 --out {chain.root}/vae")
    with pytest.raises(ValueError, match="--steps 4, not 8"):     # a cosine cannot be continued
        call(T, f"{chain.stage1} --steps 8 --out {chain.root}/vae")


def test_a_zero_weight_builds_nothing(chain, tmp_path, monkeypatch):
    def never(*a, **k):
        raise AssertionError("was built")
    for owner, name in ((T.DINOv2, "load"), (T.LPIPS, "load"), (T, "PatchGAN")):
        monkeypatch.setattr(owner, name, never)
    call(T, f"{chain.of_data} --val {chain.data} {chain.small} --features none --gan 0 --perceptual 0 --batch 4 --steps 1 --out {tmp_path}")
    assert not (tmp_path / "vae/align.safetensors").exists()


def test_heads_alone_leave_the_vae_as_it_was(chain, tmp_path):
    call(T, f"{chain.of_data} --val {chain.data} --init {chain.root}/vae --dino {chain.root}/dino.pth --train align --align-hidden 16",
         f"--batch 8 --steps 2 --workers 0 --out {tmp_path}")
    assert V.fingerprint(V.VAE.load(tmp_path)) == V.fingerprint(V.VAE.load(chain.root / "vae"))
    assert V.Align.load(tmp_path).config["hidden"] == 16


def run_two(script, command):
    """The script in two real processes, which torchrun starts and gloo joins."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / script)]
    return subprocess.run(launch + command.split(), check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def logged(folder, *names):
    """The named values of log.jsonl, float64 [lines, names]: the file keeps all their digits."""
    lines = [json.loads(line) for line in open(folder / "log.jsonl")]
    return torch.tensor([[line[k] for k in names] for line in lines], dtype=torch.float64)


def gradients(folder):
    """Of each optimiser, the gradient over all its parameters, up to a factor: AdamW's first moment after one step."""
    ckpt = torch.load(folder / "ckpt.pt", weights_only=True)
    optimizers = ckpt["optimizers"] if "optimizers" in ckpt else [ckpt["optimizer"]]
    return [torch.cat([s["exp_avg"].double().flatten() for s in o["state"].values()]) for o in optimizers]


def far(ones, others):
    """The largest relative L2 distance between two lists of vectors."""
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(ones, others, strict=True))


def test_micro_batches_and_processes_give_the_same_run(chain, tmp_path):
    """fp64, no GAN: one process, four micro-batches of two, and two processes; losses agree to 1e-9."""
    command = f"{chain.of_data} --val {chain.data} --dino {chain.root}/dino.pth {chain.small} --gan 0 --perceptual 0 " \
              f"--batch 8 --steps 4 --log-every 1 --dtype fp64 --align-hidden 32"
    call(T, command, f"--out {tmp_path}/one")
    call(T, command, f"--micro 2 --out {tmp_path}/micro")
    run_two("train_vae.py", f"{command} --micro 2 --out {tmp_path}/two")          # two processes of two micro-batches each
    one, *others = (logged(tmp_path / name, "mse", "kl", "patch", "cls", "loss", "grad norm") for name in ("one", "micro", "two"))
    assert all(((other - one) / one).abs().max() < 1e-9 for other in others)
    with pytest.raises(ValueError, match="--micro 3"):
        call(T, command, f"--micro 3 --out {tmp_path}/three")


@pytest.mark.slow
@pytest.mark.parametrize("gan, dtype, of_gradient, of_ten, of_all", [
    ("--gan 0 --lr 1e-3", "fp32", 1e-5, 1e-4, 1e-2), ("--gan 0 --lr 1e-3", "fp64", 1e-12, 1e-9, 1e-9),
    ("--gan 0.1 --gan-start 0 --micro 4 --lr 3e-5 --warmup 300", "fp32", 1e-5, 1e-4, 0.5),
    ("--gan 0.1 --gan-start 0 --micro 4 --lr 3e-5 --warmup 300", "fp64", 1e-12, 1e-9, 1e-9)])
def test_one_process_and_two_agree_for_three_hundred_steps(chain, tmp_path, one_thread, gan, dtype, of_gradient, of_ten, of_all):
    """Losses are compared relative to those of step 1. Measured over 300 steps: fp32 4e-4, fp64 5e-14, with the GAN .2 and 2e-12.
    The GAN, at equal micro-batches, which are what its batch norms see (two on one process, one on each of two), amplifies
    rounding a thousandfold in ten steps of a fresh discriminator at the default learning rate: hence a small one, warmed up."""
    command = f"{chain.of_data} --val {chain.data} --dino {chain.root}/dino.pth {chain.small} {gan} --perceptual 0 --align-hidden 32 " \
              f"--batch 8 --log-every 1 --picture-every 1000 --dtype {dtype}"
    for steps in (1, 300):
        call(T, command, f"--steps {steps} --out {tmp_path}/one-{steps}")
        run_two("train_vae.py", f"{command} --steps {steps} --out {tmp_path}/two-{steps}")
    g = far(gradients(tmp_path / "two-1"), gradients(tmp_path / "one-1"))
    one, two = (logged(tmp_path / f"{name}-300", *["loss", "mse", "kl", "align"] + ["disc"] * ("micro" in gan)) for name in ("one", "two"))
    apart = ((two - one) / one[0]).abs().amax(1)
    print(gan, dtype, g, apart[:10].max(), apart.max())
    assert len(apart) == 300 and g < of_gradient and apart[:10].max() < of_ten and apart.max() < of_all


def test_one_bad_file_is_left_out_and_named(chain, tmp_path, capsys):
    shapes.write(tmp_path / "data", 20, 32, 5)
    next((tmp_path / "data/00_disk").iterdir()).write_bytes(b"not a picture")
    (tmp_path / "data/01_ring/gone.png").symlink_to(tmp_path / "nowhere.png")
    call(T, f"--data {tmp_path}/data --val {chain.data} --size 32 {chain.small} --features none --gan 0 --perceptual 0 --batch 10 --steps 2 --out {tmp_path}/vae")
    said = capsys.readouterr().out
    assert "2 unreadable files were left out: 00_disk/" in said and "01_ring/gone.png" in said


def test_bad_files_are_remembered_by_a_run_that_goes_on(chain, tmp_path, capsys, monkeypatch):
    """Met in the first step, before a kill; named at the end of the second part."""
    shapes.write(tmp_path / "data", 20, 32, 5)
    order = [V.order(0, 20, i) for i in range(10)]
    name = V.Images(tmp_path / "data", 32).paths[order[0]]
    (tmp_path / "data" / name).write_bytes(b"not a picture")
    command = f"--data {tmp_path}/data --val {chain.data} --size 32 {chain.small} --features none --gan 0 --perceptual 0 --batch 2 --steps 4 --save-every 1 --out {tmp_path}/vae"
    update = V.update
    monkeypatch.setattr(V, "update", lambda pairs, clip, step: update(pairs, clip, step) if step < 2 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(T, command)
    monkeypatch.undo()
    call(T, command)
    assert f"1 unreadable files were left out: {name}" in capsys.readouterr().out


def test_heads_without_features_are_refused(chain, tmp_path, capsys):
    with pytest.raises(SystemExit):
        call(T, f"{chain.of_data} --init {chain.root}/vae --train align --features none --out {tmp_path}/vae")
    assert "it needs --features" in capsys.readouterr().err


@pytest.mark.parametrize("words, says", [
    ("--data {}/nowhere", "nowhere: no images here"), ("--dino {}/none.pth", "none.pth"), ("--size 30", "--size 30"),
    ("--perceptual 1 --vgg {}/none.pth", "none.pth"),
    ("--init {}/nothing", "nothing: no VAE here"), ("--batch 8 --micro 3", "--micro 3")])
def test_what_is_missing_is_said_in_one_line_before_anything_long(chain, tmp_path, words, says):
    command = f"{chain.stage1} --steps 2 --out {tmp_path}/vae " + words.format(tmp_path)
    done = subprocess.run([sys.executable, str(ROOT / "train_vae.py"), *command.split()], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and done.stderr.startswith("train_vae.py: ") and says in done.stderr
    assert not (tmp_path / "vae").exists()
