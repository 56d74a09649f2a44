"""What bench.py's jobs share: tables and clocks, pictures and weights made once, a way to watch a trainer.

A trainer's step is not copied: its own main() runs, and its micro-batches pass through our hands.
"""
import contextlib
import shlex
import shutil
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
import shapes

import dino
import fid
import sample
import train_sit
from sit import SiT, size
from vae import VAE, save

GPU = torch.cuda.is_available()

# FLOPs of an image's step of stage 1 at 256 px: the VAE forward and backward; DINOv2-L at 448 px; LPIPS, two
# forwards and the way back to the reconstruction; the discriminator, three forwards and what their gradients
# need.
STAGE1 = 2684.3e9 + 726.8e9 + 3 * 40.1e9 + 8 * 6.3e9
ENCODE, DECODE, TEACHER = 272.7e9, 622.2e9, {"vits14_reg": 63.4e9, "vitl14_reg": 726.8e9}   # at 256 px


def row(*cells):
    def text(c):
        return f"{c:.3g}" if isinstance(c, float) else f"{c:,}" if isinstance(c, int) else str(c)

    print("|", " | ".join(map(text, cells)), "|", flush=True)


def heads(*cells):
    row(*cells)
    row(*["---"] * len(cells))


def versus(title, peer):
    """The heads of a table of compare()'s rows."""
    gpu = ("images/s", "peer's", "GiB", "peer's", "MFU", "peer's") if GPU else ()
    heads(title, "ours", peer, f"ours / {peer}", "results differ by", *gpu)


def compare(what, found, images=0, work=0):
    """A row; on a GPU with images/s, GiB beyond what lay there before, and MFU for `work` FLOPs a run."""
    ours, theirs = found["seconds"]
    rates = [images / s for s in (ours, theirs)] + found["gib"] + [mfu(work / s) for s in (ours, theirs)]
    row(what, ours, theirs, ours / theirs, found["apart"], *(rates if GPU else ()))


def clock():
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def rest():
    """Bytes on the GPU now; from here on its peak is counted."""
    if not GPU:
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def over(bytes):
    return torch.cuda.max_memory_allocated() / 2**30 - bytes / 2**30 if GPU else 0.0


def difference(a, b):
    """The largest difference relative to the largest value of b."""
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    assert a.shape == b.shape, (a.shape, b.shape)
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-12)).item()


def in_turn(functions, repeats, before=lambda: None):
    """Functions run A B A B ... after one run of each -> their median seconds, memory, last results, and by
    how much the first two's differ."""
    took, gib, values = ([[] for _ in functions] for _ in range(3))
    for k in range(repeats + (repeats > 1)):
        for i, function in enumerate(functions):
            before()
            held, begin = rest(), clock()
            values[i] = function()
            if k or repeats == 1:
                took[i].append(clock() - begin)
            gib[i] = over(held)
    found = {"seconds": list(map(statistics.median, took)), "gib": gib, "values": values}
    return {**found, "apart": difference(*values[:2]) if len(values) > 1 else 0.0}


def nominal():
    """The GPU's dense bf16 peak in FLOP/s, where it is known; else 0."""
    name = torch.cuda.get_device_name() if GPU else ""
    return next((v for k, v in train_sit.PEAK.items() if k in name), 0)


def mfu(flops):
    """Useful FLOP/s over the GPU's dense bf16 peak."""
    return f"{flops / nominal():.1%}" if nominal() and flops else "-"


def matmul_peak(n=8192):
    """FLOP/s of a bf16 product of two n x n matrices on this GPU: the best of ten."""
    a, times = torch.randn(n, n, device="cuda", dtype=torch.bfloat16), []
    for _ in range(11):
        begin = clock()
        a @ a
        times.append(clock() - begin)
    return 2 * n**3 / min(times[1:])


# --------------------------------------------------------------------------------------- pictures and weights


def wake(net):
    """A new network's zeros become numbers of usual size, so that all of it counts."""
    for p in net.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.2 if p.ndim == 1 else 0.5 / p[0].numel() ** 0.5)
    return net


def once(path, make):
    """A file or folder under --out that is made by make(path) where it is missing."""
    if not path.exists():
        torch.manual_seed(0)
        path.parent.mkdir(parents=True, exist_ok=True)
        make(path)
    return path


def pictures(args, side, n=64):
    return once(args.out / f"data-{side}", lambda p: shapes.write(p, n, side))


def a_vae(args, small=False):
    """A folder of SD-VAE's shape; small: of its latents' shape."""
    kind = "vae-small" if small else "vae"
    net = (lambda: VAE(8, (1, 2, 4), 1)) if args.tiny else (lambda: VAE(8, (1, 1, 1, 1), 1)) if small else VAE
    return once(args.out / kind, lambda p: wake(net()).save(p))


def a_teacher(args, name="vitl14_reg"):
    def net():
        return dino.DINOv2(64, 2, patch=4, grid=8) if args.tiny else dino.DINOv2(**dino.SIZES[name])
    return once(args.out / f"{name}.pth", lambda p: save(wake(net()).state_dict(), p))


def a_vgg(args):
    widths = [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6
    state = fid.LPIPS(widths).state_dict
    return once(args.out / "vgg.pth", lambda p: save(
        {k: v for k, v in state().items() if k.startswith("features")}, p))


def a_sit(args, model):
    sizes = dict(input_size=8 if args.tiny else 32, classes=10 if args.tiny else 1000)
    file = args.out / f"sit-{model.replace('/', '-')}.pt"
    return once(file, lambda p: save(wake(SiT(**size(model), **sizes)).state_dict(), p))


def stage1_words(args, teacher, side):
    data = pictures(args, side)
    return (f"--data {data} --val {data} --size {side} --init {a_vae(args)} --vgg {a_vgg(args)} "
            f"--dino {a_teacher(args, teacher)} --gan-start 0 --batch {args.batch} --workers {args.workers}")


def stage2_words(args, model, batch, side, small=True):
    vae = a_vae(args, small)
    return (f"--data {pictures(args, side)} --size {side} --vae {vae} --norm none --model {model} "
            f"--cache {args.out}/latents-{side}-{vae.name} --batch {batch} --workers {args.workers}")


# ----------------------------------------------------------------------------------- trainers, while they run


class Enough(Exception):
    """A trainer has been watched for long enough."""


def watch(trainer, words, feed, out=None):
    """A trainer's own main(), with its micro-batches in our hands: feed(batches, networks, args, first)
    yields them, and what happens between one and the next is the trainer's own step. first: {name: value} of
    what the trainer logged first. The weights are woken."""
    networks, first, build, add = [], {}, trainer.build, trainer.Log.add
    loader = trainer.loader

    def built(*rest):
        networks.extend(build(*rest))
        if trainer is train_sit:
            torch.manual_seed(0)
            wake(networks[0])
            networks[1].load_state_dict(networks[0].state_dict())
        return tuple(networks)

    def loaded(dataset, keys, args):
        batches = loader(dataset, keys, args)
        return feed(batches, networks, args, first) if isinstance(dataset, trainer.Draws) else batches

    def added(log, values, parts=1):
        first.update({k: v.item() for k, v in values.items() if k not in first})
        add(log, values, parts)

    often = " ".join(f"--{k}-every 1000000000" for k in ("log", "save", "picture") if f"--{k}-" not in words)
    words = shlex.split(f"{words} {often} --steps 1000000000 --out {out}")
    shutil.rmtree(out, ignore_errors=True)
    with (mock.patch.object(trainer, "build", built), mock.patch.object(trainer, "loader", loaded),
          mock.patch.object(trainer.Log, "add", added), contextlib.redirect_stdout(sys.stderr),
          mock.patch.object(sys, "argv", [trainer.__file__, *words]), contextlib.suppress(Enough)):
        trainer.main()


def duel(trainer, words, peer, args, tolerance):
    """A trainer's own steps and a peer's in turn, after the check that both have the same losses on the
    same draws -> what compare() shows. peer: (networks, args) -> an object with terms() and step()."""
    took, gib, apart = ([], []), [0.0, 0.0], []

    def feed(batches, networks, how, first):
        theirs, batch = peer(networks, how), next(batches)
        expected = theirs.terms(batch)
        yield batch
        apart.append(max(abs(first[k] - v) / max(abs(v), 0.1) for k, v in expected.items()))
        assert apart[0] <= tolerance, (expected, first)
        for k in range(-GPU, args.repeats):                 # on a GPU, once more to compile
            for i in range(2):
                held, begin = rest(), clock()
                for _ in range(args.block):
                    if i == 0:
                        yield next(batches)
                    else:
                        theirs.step()
                gib[i] = over(held)
                if k >= 0:
                    took[i].append((clock() - begin) / args.block)
        raise Enough

    watch(trainer, f"{words} --dtype {args.dtype}", feed, args.out / "run")
    return {"seconds": list(map(statistics.median, took)), "gib": gib, "apart": apart[0]}


def seconds_of_a_step(trainer, words, args):
    """The median of a trainer's own steps."""
    took = []

    def feed(batches, *_):
        yield next(batches)
        for _ in range(args.repeats):
            begin = clock()
            for _ in range(args.block):
                yield next(batches)
            took.append((clock() - begin) / args.block)
        raise Enough

    watch(trainer, words, feed, args.out / "run")
    return statistics.median(took)


# -------------------------------------------------------------------------------------------- set-ups


def sampling_setup(args, device):
    """sample.py's flags, model, VAE and normaliser."""
    words = f"--cfg 1.8 --sampler sde --steps {args.steps}"
    words += f" --ckpt {args.ckpt}" if args.ckpt else f" --ckpt {a_sit(args, args.model)} --process sit"
    words += f" --vae {args.vae or a_vae(args)}" if args.vae or not args.ckpt else ""
    with mock.patch.object(sys, "argv", ["sample.py", *shlex.split(words)]):
        how = sample.flags()
    model, vae, norm, _ = sample.load(how.ckpt, how.vae, how.process)
    how.dtype = args.dtype
    return how, model.to(device), vae.to(device), norm


def latent_shape(model):
    return model.channels, model.settings["input_size"], model.settings["input_size"]


def ready_features(n, dim):
    """Two sets [n,dim] that differ."""
    draw = torch.Generator().manual_seed(0)
    return [torch.rand(n, dim, generator=draw) ** power for power in (1, 2)]
