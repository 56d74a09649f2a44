"""Stage 2: the latent cache, the draws, EMA and FLOPs, and how a run resumes, for SiT, DiT and REPA."""
import json
import shutil
import sys
import types

import numpy as np
import pytest
import shapes
import torch
from conftest import ROOT, call, ends, relative
from test_train_vae import far, gradients, killed_at, logged, run_two, same
from test_vae import of_today
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.data import default_collate

import dino
import sample
import sit
import train_sit as T
import train_vae
import vae as V

# ------------------------------------------------------------------------------------------------------ cache


def test_the_cache_holds_the_moments_of_image_and_mirror_image(chain):
    data, moments = V.Images(chain.data, 32), np.load(chain.root / "latents/moments.npy")
    vae = V.VAE.load(chain.root / "vae")
    assert moments.shape == (60, 2, 8, 8, 8) and moments.dtype == np.float16
    for i in (0, 33, 59):
        for flip in (0, 1):
            x = V.from_uint8(data[i][0])[None]
            with torch.no_grad():
                q = vae.encode(x.flip(-1) if flip else x)
            assert np.abs(moments[i, flip] - torch.cat([q.mean, q.logvar], 1)[0].numpy()).max() < 4e-3


def args_of(chain, *words):
    argv, sys.argv = sys.argv, ["train_sit.py", *" ".join([chain.stage2, *words]).split()]
    try:
        return T.flags()
    finally:
        sys.argv = argv


def test_a_cache_killed_half_way_and_one_of_two_processes_are_byte_for_byte_the_same(
    chain, tmp_path, monkeypatch, one_thread, capsys
):
    vae, data = V.VAE.load(chain.root / "vae"), V.Images(chain.data, 32)
    whole = tmp_path / "whole"
    T.open_cache(args_of(chain, f"--cache {whole}"), vae, data, "cpu", chunk=16)
    first_readable, calls = V.Images.first_readable, []

    def killed(self, i):
        calls.append(i)
        if len(calls) > 40:
            raise RuntimeError("power cut")
        return first_readable(self, i)
    monkeypatch.setattr(V.Images, "first_readable", killed)
    half = args_of(chain, f"--cache {tmp_path}/half")
    with pytest.raises(RuntimeError):
        T.open_cache(half, vae, data, "cpu", chunk=16)
    monkeypatch.undo()
    assert np.load(tmp_path / "half/done.npy").sum() == 32
    T.open_cache(half, vae, data, "cpu", chunk=16)
    assert "encoded before" not in capsys.readouterr().out
    T.open_cache(half, vae, data, "cpu", chunk=16)
    assert f"{tmp_path}/half: encoded before; delete it where" in capsys.readouterr().out
    assert (whole / "moments.npy").read_bytes() == (tmp_path / "half/moments.npy").read_bytes()

    one, two, more = tmp_path / "one", tmp_path / "two", tmp_path / "data"
    shapes.write(more, 150, 32, 3)  # three chunks of 64: two for the first process, one for the second
    T.open_cache(args_of(chain, f"--cache {one}"), vae, V.Images(more, 32), "cpu")
    run_two("train_sit.py", f"{chain.stage2} --data {more} --steps 1 --out {tmp_path}/sit --cache {two}")
    for file in ("moments.npy", "labels.npy"):
        assert (one / file).read_bytes() == (two / file).read_bytes()


def test_a_process_that_comes_late_to_a_small_cache_finds_the_others(chain, tmp_path):
    """One chunk for two processes: the one with nothing to do looks again only after the other is done."""
    script = (
        "import sys, time; sys.path.insert(0, sys.argv.pop(1)); import train_sit, vae; same = "
        "vae.same_manifest\n"
        "train_sit.same_manifest = lambda *a: (same(*a), time.sleep(5 * vae.rank()))[0]\n"
        "vae.run_script(train_sit.main)"
    )
    (tmp_path / "late.py").write_text(script)
    run_two(
        tmp_path / "late.py",
        f"{ROOT} {chain.stage2} --cache {tmp_path}/latents --steps 1 --out {tmp_path}/sit",
    )
    assert (tmp_path / "sit/0000001.pt").is_file()
    assert (tmp_path / "latents/moments.npy").read_bytes() == (
        chain.root / "latents/moments.npy"
    ).read_bytes()


def test_statistics_of_the_latents_lie_with_the_cache_and_do_not_depend_on_the_runs_seed(chain, tmp_path):
    call(T, chain.stage2, f"--cache {tmp_path}/latents --seed 5 --steps 1 --out {tmp_path}/sit")
    stats = json.loads((tmp_path / "latents/statistics.json").read_text())
    assert stats == json.loads((chain.root / "latents/statistics.json").read_text()) and stats["n"] == 60
    mean, logvar = np.split(np.load(tmp_path / "latents/moments.npy")[:, 0].astype(np.float32), 2, 1)
    z = np.stack(
        [
            m + np.exp(0.5 * v) * V.normal(m.shape, 0, "sample", i).numpy()
            for i, (m, v) in enumerate(zip(mean, logvar))
        ]
    )
    assert [stats[k] for k in ("mean", "std", "min", "max")] == pytest.approx(
        [z.mean(), z.std(), z.min(), z.max()], rel=1e-4, abs=1e-6
    )


@pytest.mark.parametrize("norm", ["none", "std"])
def test_a_run_goes_on_with_its_normalisation_on_a_cache_built_again(chain, tmp_path, norm):
    """Another machine's kernels round otherwise: the cache differs in its last digits, and with it what it
    measures."""
    shutil.copytree(chain.root / "vae/vae", tmp_path / "vae")
    (tmp_path / "vae/reals.json").unlink()                             # a public VAE comes without statistics
    (tmp_path / "vae/align.safetensors").unlink()
    shutil.copytree(chain.root / "latents", tmp_path / "latents")
    command = (
        f"{chain.of_data} {chain.sit.replace('--norm std --std 1', f'--norm {norm}')} --vae {tmp_path}/vae"
    )
    call(T, command, f"--cache {tmp_path}/latents --steps 2 --out {tmp_path}/sit")
    moments = np.load(tmp_path / "latents/moments.npy", mmap_mode="r+")
    moments[0, 0, 0] = np.nextafter(moments[0, 0, 0], np.float16(9))
    moments.flush()
    (tmp_path / "latents/statistics.json").unlink()
    call(T, command, f"--cache {tmp_path}/latents --steps 3 --out {tmp_path}/sit")
    before, after = (
        torch.load(tmp_path / f"sit/000000{n}.pt", weights_only=True)["info"]["normalizer"] for n in (2, 3)
    )
    assert before["stats"] == after["stats"] != json.loads((tmp_path / "latents/statistics.json").read_text())
    (tmp_path / "stats.json").write_text(json.dumps({**before["stats"], "std": 3.0}))
    if norm == "std":
        with pytest.raises(ValueError, match="was trained with std: x = "):
            call(
                T,
                command,
                f"--cache {tmp_path}/latents --steps 4 --stats {tmp_path}/stats.json --out {tmp_path}/sit",
            )


def test_a_changed_vae_or_folder_is_refused(chain, tmp_path):
    with pytest.raises(ValueError, match="was made with vae .*--cache names another folder"):
        vae = V.VAE.load(chain.root / "vae")
        with torch.no_grad():
            vae.quant_conv.bias[0] += 1
        T.open_cache(args_of(chain), vae, V.Images(chain.data, 32), "cpu")
    shutil.copytree(chain.data, tmp_path / "data")
    next((tmp_path / "data/03_triangle").iterdir()).unlink()
    with pytest.raises(ValueError, match="was made with data"):
        T.open_cache(args_of(chain), V.VAE.load(chain.root / "vae"), V.Images(tmp_path / "data", 32), "cpu")
    with pytest.raises(ValueError, match="was made with size 32, not 16: --cache names another folder"):
        T.open_cache(
            args_of(chain, "--size 16"), V.VAE.load(chain.root / "vae"), V.Images(chain.data, 16), "cpu"
        )


# ------------------------------------------------------------------------------------------------------ draws


def together(draws, step, places):
    """A micro-batch, as the loader stacks it."""
    return default_collate([draws[step, place] for place in places])


def test_draws_depend_on_seed_step_and_place_alone(chain):
    args, data = args_of(chain), V.Images(chain.data, 32)
    args.repa = True
    cache = T.open_cache(args, V.VAE.load(chain.root / "vae"), data, "cpu")
    draws = T.Draws(cache, data, args)
    moments, eps, noise, u, y, images = whole = together(draws, 3, range(8))
    assert all(torch.equal(a[4:6], b) for a, b in zip(whole, together(draws, 3, range(4, 6))))
    i, g = V.shuffled_index(0, 60, 3 * 8), V.rng(0, "noise", 3, 0)
    flip, _, first = g.random(3)
    assert torch.equal(moments[0], cache[i, int(flip < 0.5)]) and u[0] == first and eps.shape == noise.shape
    other = together(draws, 4, range(8))
    assert not torch.equal(noise, other[2]) and not torch.equal(u, other[3])
    many = [draws[s, p] for s in range(40) for p in range(8)]
    drops = sum(int(m[4]) == 10 for m in many) / len(many)
    assert 0.04 < drops < 0.18 and abs(np.mean([m[3] for m in many]) - 0.5) < 0.05


TRAINERS = {"train_vae": train_vae, "train_sit": T}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_each_group_of_an_optimizer_keeps_its_own_rate(chain, tmp_path, monkeypatch, trainer):
    made, adamw = [], torch.optim.AdamW

    def in_groups(params, lr, *rest, **more):
        first, *others = params
        made.append(adamw([{"params": [first], "lr": lr / 10}, {"params": others}], lr, *rest, **more))
        return made[-1]

    monkeypatch.setattr(torch.optim, "AdamW", in_groups)
    words = {"train_vae": chain.stage1, "train_sit": chain.stage2}[trainer] + " --warmup 2"
    for k in (3, 4):                                        # the second goes on from the first
        monkeypatch.setattr(TRAINERS[trainer], "schedule", lambda step, args: 0.5 ** step)
        call(TRAINERS[trainer], f"{words} --schedule constant --lr 1e-3 --steps {k} --out {tmp_path}/run")
        share = 0.5 ** (k - 1)
        for optimizer in made:
            assert [group["lr"] for group in optimizer.param_groups] == [1e-4 * share, 1e-3 * share]
        assert json.loads(open(tmp_path / "run/log.jsonl").readlines()[-1])["lr"] == 1e-4 * share
        made.clear()


@pytest.mark.parametrize("trainer", TRAINERS)
def test_an_error_in_a_picture_comes_after_the_checkpoint(chain, tmp_path, monkeypatch, trainer):
    words = {"train_vae": chain.stage1, "train_sit": f"{chain.stage2} --keep 2"}[trainer]
    painter = {"train_vae": "picture", "train_sit": "sample_grid"}[trainer]
    monkeypatch.setattr(TRAINERS[trainer], painter, lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(TRAINERS[trainer], f"{words} --steps 4 --picture-every 2 --save-every 2 --out {tmp_path}/run")
    assert torch.load(tmp_path / "run/ckpt.pt", weights_only=True)["step"] == 2
    assert (tmp_path / "run/0000002.pt").exists() == (trainer == "train_sit")


@pytest.mark.parametrize("trainer, place", [("train_vae", 1), ("train_sit", 1), ("train_sit", 2)])
def test_noise_of_another_shape_is_refused(chain, tmp_path, monkeypatch, trainer, place):
    """One channel would be broadcast to all."""
    draws = TRAINERS[trainer].Draws
    item, words = draws.__getitem__, {"train_vae": chain.stage1, "train_sit": chain.stage2}[trainer]

    def thin(self, key):
        return tuple(v[:1] if k == place else v for k, v in enumerate(item(self, key)))

    monkeypatch.setattr(draws, "__getitem__", thin)
    with pytest.raises(AssertionError) as e:
        call(TRAINERS[trainer], f"{words} --steps 2 --out {tmp_path}/run")
    assert "noise.shape" in str(e.traceback[-1].statement)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_chance_goes_on_to_the_same_bits(chain, tmp_path, monkeypatch, trainer):
    """torch's own generator is seeded at each image, in a loader's process or none, and at each step: what
    somebody adds with chance in it, to the draws (as torchvision's augmentations) or the network, resumes."""
    build, draws, masks = TRAINERS[trainer].build, TRAINERS[trainer].Draws, []
    item = draws.__getitem__

    def shaken(self, key):
        first, *rest = item(self, key)
        return ((first + 8 * torch.rand(first.shape)).to(first.dtype), *rest)

    def with_dropout(*args):
        nets = build(*args)
        first = nets[0].vae.encoder.conv_in if trainer == "train_vae" else nets[0].t_embedder

        def drop(module, given, out):
            if torch.is_grad_enabled():
                out = torch.nn.functional.dropout(out, 0.5)
                masks.append(out.detach() == 0)
            return out

        first.register_forward_hook(drop)
        return nets

    monkeypatch.setattr(draws, "__getitem__", shaken)
    monkeypatch.setattr(TRAINERS[trainer], "build", with_dropout)
    words = {"train_vae": chain.stage1, "train_sit": chain.stage2}[trainer] + " --schedule constant"
    call(TRAINERS[trainer], f"{words} --steps 4 --workers 1 --out {tmp_path}/whole")
    torch.rand(5)
    call(TRAINERS[trainer], f"{words} --steps 2 --workers 1 --out {tmp_path}/run")
    torch.rand(7)
    call(TRAINERS[trainer], f"{words} --steps 4 --workers 0 --out {tmp_path}/run")
    whole, run = (torch.load(tmp_path / f"{n}/ckpt.pt", weights_only=True) for n in ("whole", "run"))
    for part in ("model", "optimizer") if trainer == "train_vae" else ("net", "ema", "optimizer"):
        assert same(whole[part], run[part])
    assert all(0.4 < m.float().mean() < 0.6 for m in masks) and not torch.equal(masks[0], masks[1])


@pytest.mark.parametrize(
    "words, raw, std, warns",
    [
        ("--norm none", 1.0, 0.182, True),
        ("--norm none", 5.0, 0.911, False),
        ("--norm std --std 4", 1.0, 4.0, True),
        ("--norm std --std 2", 7.0, 2.0, False),
    ],
)
def test_a_std_that_trains_badly_is_warned_of(chain, capsys, words, raw, std, warns):
    z = raw * torch.randn(4, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    vae = types.SimpleNamespace(info={}, factor=0.18215, shift=0.0)
    cache = types.SimpleNamespace(stats=V.statistics([z]))
    T.normalizer(args_of(chain, words), vae, cache, {})
    said = capsys.readouterr().out
    seen = float(said.split(", std ")[1].split()[0])
    assert seen == pytest.approx(std, rel=0.01) and ("warning" in said) == warns


def test_latent_and_image_are_flipped_together(chain):
    args, data, vae = args_of(chain), V.Images(chain.data, 32), V.VAE.load(chain.root / "vae")
    args.repa = True
    cache = T.open_cache(args, vae, data, "cpu")
    draws = T.Draws(cache, data, args)
    for place in range(12):
        moments, *_, image = draws[0, place]
        with torch.no_grad():
            mean = vae.encode(V.from_uint8(image)[None]).mean[0]
        assert (moments[:4].float() - mean).abs().max() < 2e-2


def test_flops_are_the_published_counts():
    """Published counts: multiply-accumulates of one forward pass at 32 x 32 x 4, patch 2."""
    for name, gmac in (("S", 6.054), ("B", 23.002), ("L", 80.693), ("XL", 118.617)):
        with torch.device("meta"):
            assert T.flops(sit.SiT(**sit.size(name))) / 2e9 == pytest.approx(gmac, abs=6e-4)


def test_mfu_is_useful_work_over_the_cards_peak(monkeypatch):
    """Three forward passes of XL/2, 711.7 GFLOP an image, on two cards of 989 TFLOP/s."""
    with torch.device("meta"):
        net = sit.SiT(**sit.size("XL/2"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(T, "world", lambda: 2)
    for name, peak in (("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        assert T.mfu(net, 1000.0)["MFU"] == pytest.approx(711.7e9 * 1000 / (2 * peak), rel=1e-4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "another card")
    assert T.mfu(net, 1000.0) == {}


def test_defaults_are_the_published_settings(monkeypatch):
    """Ma et al. 2024, Peebles & Xie 2023; for REPA Yu et al. 2024, whose depths count the blocks before the
    projector."""
    monkeypatch.setattr(sys, "argv", ["train_sit.py"])
    a = T.flags()
    assert (a.lr, a.batch, a.ema, a.drop, a.betas, a.weight_decay, a.schedule, a.warmup, a.clip) == (
        1e-4,
        256,
        0.9999,
        0.1,
        [0.9, 0.999],
        0,
        "constant",
        0,
        0,
    )
    assert (a.steps, a.keep, a.model, a.process, a.repa, a.repa_weight, a.dino) == (
        400000,
        50000,
        "XL",
        "sit",
        False,
        0.5,
        "vitb14",
    )
    assert T.REPA_DEPTH == {"T": 2, "S": 4, "B": 4, "L": 8, "XL": 8}
    monkeypatch.setattr(sys, "argv", ["train_sit.py", "--repa"])
    assert T.flags().clip == 1.0


def test_ema_is_the_closed_form():
    net, ema = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        ema.weight.fill_(1.0)
        net.weight.fill_(3.0)
    for _ in range(5):
        T.update_ema(ema, net, 0.9)
    assert ema.weight.item() == pytest.approx(3 - 2 * 0.9**5, rel=1e-6)
    net, ema = (torch.nn.BatchNorm1d(2) for _ in range(2))
    net(torch.tensor([[0.0, 1.0], [4.0, 1.0]]))             # its buffers hold means, which nobody learns
    T.update_ema(ema, net, 0.9)
    assert torch.allclose(ema.running_mean, torch.tensor([0.2, 0.1])) and ema.num_batches_tracked == 1


def test_a_network_that_cannot_be_read_again_fails_before_the_first_step(chain, tmp_path, monkeypatch):
    """With the line that does it: files are read into a network that is built without memory."""
    init_weights = sit.SiT.init_weights

    def of_numbers(self):
        self.rates = [v.item() for v in torch.linspace(0, 0.1, 4)]
        init_weights(self)

    monkeypatch.setattr(sit.SiT, "init_weights", of_numbers)
    with pytest.raises(RuntimeError, match="meta tensors") as e:
        call(T, chain.stage2, f"--steps 2 --out {tmp_path}/sit")
    assert "of_numbers" in [entry.name for entry in e.traceback]
    assert not (tmp_path / "sit/ckpt.pt").exists()


@pytest.mark.parametrize("process", ["sit", "dit"])
def test_the_second_steps_gradient_is_the_mean_loss_plus_weighted_repa_written_out(chain, tmp_path, process):
    """Two micro-batches of two steps in float64: the first step's gradients of a new network reach the last
    layer alone. Times are counted by tenths, and the log says the raw terms."""
    command = (
        f"{chain.stage2} --process {process} --repa --dino {chain.root}/dino.pth --repa-weight 0.25 "
        f"--clip 0 --dtype fp64 "
        f"--betas 0 0.9 --log-every 1 --out {tmp_path}/sit"
    )
    call(T, command, "--steps 1")
    held = torch.load(tmp_path / "sit/ckpt.pt", weights_only=True)
    call(T, command, "--steps 2 --micro 4")
    net, teacher = sit.SiT(**held["settings"]).double(), dino.DINOv2.load(chain.root / "dino.pth")
    net.load_state_dict(held["net"])
    args = args_of(chain, "--repa")
    draws = T.Draws(T.open_cache(args, V.VAE.load(chain.root / "vae"), V.Images(chain.data, 32), "cpu"),
                    V.Images(chain.data, 32), args)
    moments, eps, noise, u, y, images = together(draws, 1, range(8))
    norm = V.Normalizer(**held["info"]["normalizer"])
    mean, logvar = moments.float().chunk(2, 1)
    x, noise = norm.encode(mean + (logvar / 2).exp() * eps).double(), noise.double()
    if process == "sit":
        s = u[:, None, None, None]
        out, tokens = net(s * x + (1 - s) * noise, u, y, return_tokens=True)
        loss = (out - (x - noise)).square().mean((1, 2, 3))
    else:
        law, t = sit.Diffusion(), (u * 1000).long()
        out, tokens = net(law.noised(x, noise, t), t, y, return_tokens=True)
        loss = sum(law.terms(out, x, noise, t))
    target = teacher.targets(V.from_uint8(images), 4)[0].double()
    repa = -torch.cosine_similarity(tokens, target, -1).mean(1)
    total = loss.mean() + 0.25 * repa.mean()
    trained = [p for p in net.parameters() if p.requires_grad]
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(total, trained)])
    [found] = gradients(tmp_path / "sit")
    assert ((found - expected).norm() / expected.norm()).item() < 1e-6
    line = json.loads((tmp_path / "sit/log.jsonl").read_text().splitlines()[-1])
    assert [line["loss"], line["repa"]] == pytest.approx([loss.mean().item(), repa.mean().item()], rel=1e-6)
    for tenth, value in enumerate(line["by time"]):
        inside = loss[(u * 10).long() == tenth]
        assert value is None if len(inside) == 0 else value == pytest.approx(inside.mean().item(), rel=1e-6)


def test_a_runs_updates_are_adamws_by_hand(chain, tmp_path):
    """Decoupled decay, bias-corrected moments (Loshchilov & Hutter 2019), element by element: a fused kernel
    reads memory in its order."""
    lr, decay, a, b = 1e-3, 0.1, 0.8, 0.9
    moments, expected, errors, steps = {}, {}, [], []

    def before(optimizer, args, kwargs):
        steps.append(len(steps) + 1)
        for k, p in enumerate(optimizer.param_groups[0]["params"]):
            m, v = moments.get(k, (0, 0))
            m, v = moments[k] = a * m + (1 - a) * p.grad, b * v + (1 - b) * p.grad.square()
            direction = m / (1 - a ** steps[-1]) / ((v / (1 - b ** steps[-1])).sqrt() + 1e-8)
            expected[k] = (1 - lr * decay) * p.detach() - lr * direction

    def after(optimizer, args, kwargs):
        for k, p in enumerate(optimizer.param_groups[0]["params"]):
            errors.append((p.detach() - expected[k]).abs().max().item())
    hooks = [register_optimizer_step_pre_hook(before),
             register_optimizer_step_post_hook(after)]
    call(
        T,
        f"{chain.stage2} --steps 3 --dtype fp64 --weight-decay {decay} --betas {a} {b} --out {tmp_path}/sit",
    )
    for hook in hooks:
        hook.remove()
    assert len(errors) == 3 * len(moments) > 100 and max(errors) < 1e-14


def test_a_run_follows_its_weights_with_the_decay_asked_for_and_says_what_it_takes(chain, tmp_path, capsys):
    call(T, chain.stage2, f"--cache {tmp_path}/latents --ema 0.25 --steps 1 --keep 1 --out {tmp_path}/sit")
    said, held = capsys.readouterr().out, torch.load(tmp_path / "sit/ckpt.pt", weights_only=True)
    torch.manual_seed(int(V.rng(0, "init").integers(2**31)))
    start = sit.SiT(**sit.size("T"), input_size=8, classes=10).state_dict()
    for k, v in held["ema"].items():
        assert torch.allclose(v, 0.25 * start[k] + 0.75 * held["net"][k], atol=1e-7), k
    assert any((held["net"][k] - start[k]).abs().max() > 1e-4 for k in start)
    assert "latents: will hold 0.00 GiB (" in said


def test_repa_resizes_its_teachers_positions_and_clips_at_one(chain, tmp_path, monkeypatch):
    """A network without registers, which Meta's own rule would resize with an offset of 0.1."""
    build, built = T.build, []
    torch.save(dino.DINOv2(64, 2, patch=4, registers=0, grid=8).state_dict(), tmp_path / "dino.pth")
    monkeypatch.setattr(T, "build", lambda args, *more: built.append((args, build(args, *more)[2])) or 1 / 0)
    for more, clip in (("--repa", 1.0), ("--repa --clip 0", 0.0), ("", 0.0)):
        with pytest.raises(ZeroDivisionError):
            call(T, chain.stage2, more, f"--dino {tmp_path}/dino.pth --steps 2 --out {tmp_path}/sit")
        args, teacher = built.pop()
        assert args.clip == clip and (teacher is None) == (not more)
        if more:
            assert teacher.offset == 0 and dino.DINOv2.load(tmp_path / "dino.pth").offset == 0.1
            assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())


# ------------------------------------------------------------------------------------------------------- runs


def test_a_checkpoint_tells_a_reader_all_it_needs(chain):
    ckpt = torch.load(chain.root / "sit/0000003.pt", weights_only=True)
    assert set(ckpt) == {"step", "settings", "info", "ema"}
    assert set(ckpt["info"]) == {"normalizer", "size", "classes", "vae", "data"}
    assert ckpt["info"]["classes"][0] == "00_disk" and ckpt["settings"]["classes"] == 10
    assert ckpt["info"]["normalizer"]["kind"] == "std"
    model = sit.SiT.load(chain.root / "sit/0000003.pt")
    assert model.process == "sit" and same(dict(model.state_dict()), ckpt["ema"])
    assert (chain.root / "sit/0000006.pt").is_file() and (chain.root / "sit/pictures/0000006.png").is_file()


@pytest.mark.parametrize("more", ["", "--repa --dino {}/dino.pth"])
def test_a_killed_run_goes_on_bitwise(chain, tmp_path, monkeypatch, more):
    monkeypatch.setattr(T, "schedule", killed_at(5, T.schedule))
    command, whole = f"{chain.stage2} --steps 6 --keep 3 {more.format(chain.root)}", chain.root
    with pytest.raises(RuntimeError):
        call(T, command, f"--out {tmp_path}/sit")
    monkeypatch.undo()
    assert torch.load(tmp_path / "sit/ckpt.pt", weights_only=True)["step"] == 4
    call(T, command, f"--out {tmp_path}/sit")
    if more:
        whole = tmp_path / "whole"
        call(T, command, f"--out {whole}/sit")
    one, other = (torch.load(p / "sit/ckpt.pt", weights_only=True) for p in (whole, tmp_path))
    assert any(k.startswith("projectors.") for k in one["ema"]) == bool(more)
    for key in ("step", "net", "ema", "optimizer"):
        assert same(one[key], other[key]), key


def test_a_finished_run_goes_on_to_more_steps(chain, tmp_path):
    call(T, f"{chain.stage2} --steps 4 --out {tmp_path}/sit")
    call(T, f"{chain.stage2} --steps 6 --out {tmp_path}/sit")
    one, other = (torch.load(p / "sit/ckpt.pt", weights_only=True) for p in (chain.root, tmp_path))
    assert same(one["net"], other["net"])


def test_a_cosine_schedule_ends_where_it_was_said_to(chain, tmp_path):
    call(T, f"{chain.stage2} --schedule cosine --steps 2 --out {tmp_path}/sit")
    with pytest.raises(ValueError, match="was made with --steps 2, not 4"):
        call(T, f"{chain.stage2} --schedule cosine --steps 4 --out {tmp_path}/sit")


@pytest.mark.parametrize(
    "more",
    [
        "--process dit",
        "--process dit --repa --dino {root}/dino.pth",
        "--repa --dino {root}/dino.pth",
        "--checkpointing --clip 1",
        "--no-flip --cache {root}/latents-plain",
    ],
)
def test_every_kind_trains(chain, tmp_path, more):
    call(T, chain.stage2, more.format(root=chain.root), f"--steps 2 --out {tmp_path}/sit")
    _, *lines = (json.loads(line) for line in open(tmp_path / "sit/log.jsonl"))
    assert lines and np.isfinite([line["loss"] for line in lines]).all()
    model = sit.SiT.load(tmp_path / "sit")
    assert model.process == ("dit" if "dit" in more else "sit") and model.out_channels == (
        8 if "dit" in more else 4
    )


def test_a_bf16_run_stays_near_the_float32_one(chain, tmp_path):
    for dtype in ("fp32", "bf16"):
        call(
            T,
            chain.stage2,
            f"--repa --dino {chain.root}/dino.pth --dtype {dtype} --log-every 1 --steps 3 "
            f"--out {tmp_path}/{dtype}",
        )
    full, half = (logged(tmp_path / dtype, "loss", "repa") for dtype in ("fp32", "bf16"))
    apart = ((half - full) / full).abs().amax(0)
    assert 0 < apart[0] < 0.02 and 0 < apart[1] < 0.2, apart


def test_pictures_of_a_run_are_a_film(chain, tmp_path):
    """Fixed noise, for DDPM's steps too: one network's picture is the same twice."""
    args = args_of(chain, "--process dit")
    torch.manual_seed(0)
    net = sit.SiT(2, 64, 2, input_size=8, classes=10, process="dit").eval()
    with torch.no_grad():
        for p in net.final_layer.parameters():
            p.normal_(0, 0.02)
    vae, norm = V.VAE.load(chain.root / "vae"), V.Normalizer("none")
    for name in ("a", "b"):
        T.sample_grid(args, net, norm, vae, [], tmp_path / f"{name}.png", n=4)
    args.seed = 1
    T.sample_grid(args, net, norm, vae, [], tmp_path / "c.png", n=4)
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c


def test_a_replaced_file_keeps_the_label_of_its_picture(chain, tmp_path):
    """The last picture of a class is unreadable: the next class's first one takes its place, label and
    all."""
    shapes.write(tmp_path / "data", 20, 32, 5)
    data = V.Images(tmp_path / "data", 32)
    (tmp_path / "data" / data.paths[1]).write_bytes(b"not a picture")
    data = V.Images(tmp_path / "data", 32)
    cache = T.open_cache(
        args_of(chain, f"--cache {tmp_path}/latents"), V.VAE.load(chain.root / "vae"), data, "cpu"
    )
    assert data.labels[1] == 0 and list(cache.labels[:4]) == [0, 1, 1, 1]
    assert np.array_equal(cache.labels[2:], data.labels[2:])


def test_a_flat_folder_trains_unconditionally(chain, tmp_path):
    (tmp_path / "flat").mkdir()
    for p in list(chain.data.rglob("*.png"))[:16]:
        shutil.copy(p, tmp_path / "flat")
    words = f"--data {tmp_path}/flat --val {tmp_path}/flat --steps 2 --out {tmp_path}/vae"
    call(train_vae, chain.stage1, words)
    words = f"--data {tmp_path}/flat --cache {tmp_path}/latents --vae {tmp_path}/vae --steps 2"
    call(T, chain.stage2, words, f"--out {tmp_path}/sit")
    assert sit.SiT.load(tmp_path / "sit").classes == 0
    call(sample, f"--ckpt {tmp_path}/sit --num 3 --steps 2 --out {tmp_path}/pictures")
    assert len(list((tmp_path / "pictures/images").glob("*.png"))) == 3


@pytest.mark.parametrize("n", [1, 2, pytest.param(10000, marks=pytest.mark.slow)])
def test_any_number_of_classes_trains_and_is_sampled_by_name(chain, tmp_path, n, monkeypatch):
    """The names go from the folders through the checkpoint to --classes and onto the sheet."""
    source = next(chain.data.rglob("*.png")).read_bytes()
    for c in range(n):
        (tmp_path / f"data/class-{c:05d}").mkdir(parents=True)
        (tmp_path / f"data/class-{c:05d}/a.png").write_bytes(source)
    if n < 8:
        for k in range(8):                                   # a batch, in the last class
            (tmp_path / f"data/class-{n - 1:05d}/{k}.png").write_bytes(source)
    words = f"--no-flip --data {tmp_path}/data --cache {tmp_path}/latents --steps 2 --out {tmp_path}/sit"
    call(T, chain.stage2, words)
    last, shown = f"class-{n - 1:05d}", []
    monkeypatch.setattr(sample, "save_picture", lambda images, path, columns, names: shown.extend(names))
    call(sample, f"--ckpt {tmp_path}/sit --num 2 --steps 2 --classes {last} 0 --out {tmp_path}/pictures")
    assert shown == [last, "class-00000"] and sit.SiT.load(tmp_path / "sit").classes == n


def test_a_picture_beside_the_class_folders_is_refused(chain, tmp_path):
    shutil.copytree(chain.data, tmp_path / "data")
    shutil.copy(next(chain.data.rglob("*.png")), tmp_path / "data/cover.png")
    with pytest.raises(ValueError, match="cover.png lies beside"):
        call(T, chain.stage2, f"--data {tmp_path}/data --out {tmp_path}/sit")


def test_micro_batches_and_processes_give_the_same_run(chain, tmp_path):
    """fp64: one process, four micro-batches of two, and two processes; losses agree to 1e-9."""
    command = f"{chain.stage2} --steps 6 --dtype fp64 --log-every 1"
    call(T, command, f"--out {tmp_path}/one")
    call(T, command, f"--micro 2 --out {tmp_path}/micro")
    run_two("train_sit.py", f"{command} --out {tmp_path}/two")
    one, *others = (logged(tmp_path / name, "loss", "grad norm") for name in ("one", "micro", "two"))
    assert all(((other - one) / one).abs().max() < 1e-9 for other in others)


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype, of_gradient, of_ten, of_all", [("fp32", 1e-6, 1e-5, 1e-2), ("fp64", 1e-12, 1e-9, 1e-9)]
)
@pytest.mark.parametrize("process", ["sit", "dit"])
def test_one_process_and_two_agree_for_three_hundred_steps(
    chain, tmp_path, process, dtype, of_gradient, of_ten, of_all
):
    """A new network answers zero, so its first gradient reaches the last layer alone: the sixth, from equal
    weights, is compared too (first moments without memory are the last step's gradient)."""
    command = (f"{chain.stage2} --process {process} --dtype {dtype} --log-every 1 --save-every 1000 "
               f"--picture-every 1000")
    memoryless = "--betas 0 0.999"
    call(T, command, memoryless, f"--steps 5 --out {tmp_path}/one-6")
    shutil.copytree(tmp_path / "one-6", tmp_path / "two-6")
    for name, more in (("1", "--steps 1"), ("6", f"{memoryless} --steps 6"), ("300", "--steps 300")):
        call(T, command, more, f"--out {tmp_path}/one-{name}")
        run_two("train_sit.py", f"{command} {more} --out {tmp_path}/two-{name}")
    first, sixth = (far(gradients(tmp_path / f"two-{n}"), gradients(tmp_path / f"one-{n}")) for n in (1, 6))
    one, two = (logged(tmp_path / f"{name}-300", "loss") for name in ("one", "two"))
    apart = ((two - one) / one).abs().amax(1)
    print(process, dtype, first, sixth, apart[:10].max(), apart.max())
    assert (
        max(first, sixth) < of_gradient
        and len(apart) == 300
        and apart[:10].max() < of_ten
        and apart.max() < of_all
    )


@pytest.mark.parametrize(
    "words, says",
    [
        ("--vae {}/none", "none: no VAE here"),
        ("--data {}/none", "none: no images here"),
        ("--model Q", "Q"),
        ("--norm std --stats {}/x.json", "x.json"),
    ],
)
def test_what_is_missing_is_said_in_one_line(chain, tmp_path, capsys, words, says):
    status = ends(T, f"{chain.stage2} --steps 2 --out {tmp_path}/sit", words.format(tmp_path))
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("train_sit.py: ")]
    assert status == 1 and len(lines) == 1 and says in lines[0] and "Traceback" not in said


def test_a_vae_of_sixteen_channels_from_nothing_goes_through_with_norm_channel(chain, tmp_path):
    """f16, as newer latent spaces are: each channel has a mean and a deviation of its own."""
    call(
        train_vae,
        f"{chain.of_data} --val {chain.data} --dino {chain.root}/dino.pth --init none --ch 16 "
        f"--mult 1 1 2 2 4",
        f"--blocks 1 --z-channels 16 {chain.tune} --workers 0 --steps 2 --out {tmp_path}/vae",
    )
    for steps in (1, 2):
        call(
            T,
            f"{chain.of_data} --vae {tmp_path}/vae --cache {tmp_path}/latents --model T/1 "
            f"--norm channel --batch 8",
            f"--workers 0 --steps {steps} --out {tmp_path}/sit",
        )
    call(sample, f"--ckpt {tmp_path}/sit --num 2 --steps 3 --out {tmp_path}/pictures")
    assert (tmp_path / "pictures/images/000001.png").is_file()
    stats = json.loads((tmp_path / "vae/vae/reals.json").read_text())["latents"]
    held = torch.load(tmp_path / "sit/ckpt.pt", weights_only=True)["info"]["normalizer"]
    own = [0.18215, 0.0]
    assert held == {"kind": "channel", "stats": stats, "std": None, "own": own}
    assert len(stats["channel_mean"]) == 16
    mean, std = (torch.tensor(stats[f"channel_{k}"]).view(1, 16, 1, 1) for k in ("mean", "std"))
    z = torch.randn(2, 16, 2, 2)
    assert torch.allclose(V.Normalizer(**held).encode(z), (z - mean) / std, rtol=1e-4, atol=1e-5)


def test_a_vae_of_sd3s_kind_is_aligned_and_its_latents_are_learned(chain, tmp_path):
    """A folder of diffusers, 16 channels without quant_conv, with a factor and a shift of its own: through
    both stages and the sampler, with the latents as its own generators see them, and with each channel's."""
    of_today("SD3").save_pretrained(tmp_path / "theirs")
    words = f"{chain.of_data} --val {chain.data} --dino {chain.root}/dino.pth {chain.tune} --workers 0"
    call(train_vae, words, f"--init {tmp_path}/theirs --steps 2 --dtype fp32 --out {tmp_path}/vae")
    config = V.read_json(tmp_path / "vae/vae/config.json")
    fields = "scaling_factor", "shift_factor", "use_quant_conv"
    assert [config[field] for field in fields] == [1.5305, 0.0609, False]
    vae, rest = V.VAE.load(tmp_path / "vae"), f"--cache {tmp_path}/latents --model T --batch 8 --workers 0"
    for norm in ("none", "channel"):
        out = f"{tmp_path}/{norm}"
        call(T, f"{chain.of_data} --vae {tmp_path}/vae {rest} --norm {norm} --steps 2 --out {out}")
        held = torch.load(f"{out}/0000002.pt", weights_only=True)["info"]["normalizer"]
        z = V.Gaussian(torch.from_numpy(np.load(tmp_path / "latents/moments.npy")[:, 0])).mean
        seen = V.Normalizer(**held).encode(z)
        if norm == "none":
            assert relative(seen, 1.5305 * (z - 0.0609)) < 1e-6
        else:
            assert seen.mean((0, 2, 3)).abs().max() < 0.2
        call(sample, f"--ckpt {out} --num 2 --steps 2 --npz --out {out}/samples")
        with np.load(f"{out}/samples/samples.npz") as drawn:
            latents, images = torch.from_numpy(drawn["latents"]), drawn["arr_0"]
        with torch.no_grad():
            again = V.to_uint8(vae.decode(latents)).permute(0, 2, 3, 1).numpy()
        assert latents.shape == (2, 16, 8, 8) and np.abs(again.astype(int) - images).max() <= 1
