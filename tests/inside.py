"""bench.py's jobs without a peer: what our scripts spend their time and memory on."""
import contextlib
import itertools
import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import peers
import torch
from measure import (
    DECODE,
    ENCODE,
    GPU,
    ROOT,
    STAGE1,
    Enough,
    heads,
    in_turn,
    latent_shape,
    mfu,
    once,
    ready_features,
    row,
    sampling_setup,
    seconds_of_a_step,
    stage1_words,
    stage2_words,
    wake,
    watch,
)
from torch import nn

import dino
import fid
import sample
import train_sit
import train_vae
from sit import Guided, SiT, size
from vae import VAE, Images, UserError, memory, start

PROBE = ("import sys, time; import torch; a = time.time(); import {0}; b = time.time(); "
         "import inside; inside.probe({0}, {1}, a, b)")


def probe(script, began, torch_there, imported):
    """In a process of its own: a script's start until its first step, by part, as a line of JSON."""
    import vae as files
    parts, stack = {}, []

    def timed(part, function):
        def inner(*args, **more):
            begin = time.perf_counter()
            stack.append(0.0)
            try:
                return function(*args, **more)
            finally:
                took = time.perf_counter() - begin
                parts[part] = parts.get(part, 0) + took - stack.pop()
                if stack:
                    stack[-1] += took
        return inner

    def enough(*_):
        raise Enough
        yield

    watched = [(script, "fingerprint", "hashing networks"), (files, "whole_checkpoint", "sums of ckpt.pt"),
               (files, "load_file", "reading"), (files.VAE, "load", "reading"), (SiT, "load", "reading"),
               (nn.Module, "load_state_dict", "reading"),
               (torch.optim.Optimizer, "load_state_dict", "reading"),
               (Images.__dict__["fingerprint"], "func", "listing pictures"),
               (Images, "__init__", "listing pictures"), (dino.DINOv2, "targets", "teacher's 8 targets"),
               (dino.DINOv2, "load", "reading"), (fid.LPIPS, "load", "reading"),
               (script, "build", "building, random start")]
    with contextlib.ExitStack() as patches:
        for owner, name, part in watched:
            if hasattr(owner, name):
                change = mock.patch.object(owner, name, timed(part, getattr(owner, name)))
                patches.enter_context(change)
        last = "draw" if script is sample else "loader"
        own = getattr(script, last)
        first = enough if last == "loader" else lambda *_: next(enough())
        patches.enter_context(mock.patch.object(script, last, lambda d, *more: (
            own(d, *more) if isinstance(d, getattr(script, "Readable", ())) else first())))
        patches.enter_context(contextlib.redirect_stdout(sys.stderr))
        patches.enter_context(contextlib.suppress(Enough))
        begin = time.time()
        script.main()
    parts = {"interpreter, torch": torch_there - began, "other imports": imported - torch_there, **parts}
    main = time.time() - begin
    parts["rest"] = main - sum(list(parts.values())[2:])
    print(json.dumps(parts))


def starts(args):
    """what the start of sample.py and of both trainers is made of"""
    args.batch, args.workers, model = 2, 0, "T" if args.tiny else args.model
    runs = {train_sit: (stage2_words(args, model, 2, args.size, small=False), args.out / "start-sit"),
            train_vae: (stage1_words(args, args.teacher, args.size), args.out / "start-vae")}

    def one_step(batches, *_):
        yield next(batches)                         # --save-every 1: saved when the next is asked for
        raise Enough

    for trainer, (words, out) in runs.items():
        once(out, lambda p, t=trainer, w=words: watch(t, f"{w} --save-every 1", one_step, p))
    more = "--steps 1000000000 --log-every 1000000000 --save-every 1 --picture-every 1000000000"
    commands = {sample: f"--ckpt {args.out}/start-sit --num 1 --out {args.out}/start-pictures"}
    commands |= {trainer: f"{words} {more} --out {out}" for trainer, (words, out) in runs.items()}
    heads(f"seconds until the first step, SiT-{model}/2, SD-VAE, {args.teacher}", "part", "seconds")
    for script, words in commands.items():
        found, name = [], script.__name__
        for _ in range(args.repeats):
            code = PROBE.format(name, time.time())
            path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
            done = subprocess.run([sys.executable, "-c", code, *shlex.split(words)], capture_output=True,
                                  text=True, env={**os.environ, "PYTHONPATH": path})
            if done.returncode:
                raise UserError(f"{name}: {done.stderr.strip().splitlines()[-1]}")
            found.append(json.loads(done.stdout.splitlines()[-1]))
        parts = {part: statistics.median(f.get(part, 0) for f in found) for part in found[0]}
        for part, took in parts.items():
            row(f"{name}.py" + ", a run that goes on" * (script is not sample), part, took)
        row(f"{name}.py", "in all", sum(parts.values()))


def operations(what, profile, top):
    """The operations that take most time themselves."""
    kind = "self_device_time_total" if GPU else "self_cpu_time_total"
    took = {e.key: (getattr(e, kind) / 1e3, e.count) for e in profile.key_averages()}
    everything = sum(ms for ms, _ in took.values())
    for name, (ms, count) in sorted(took.items(), key=lambda e: -e[1][0])[:top]:
        row(what, name, ms, f"{ms / everything:.1%}", count)
    row(what, "in all", everything, "", "")


def profiles(args):
    """the operations of a step of both trainers and of the sampler"""
    from torch.profiler import ProfilerActivity as A
    device, kinds = start(), [A.CPU, *([A.CUDA] if GPU else [])]
    model = "T" if args.tiny else args.model
    heads("one step", "operation", "ms of its own", "share", "calls")
    commands = {train_sit: stage2_words(args, model, 4 * args.batch, args.size),
                train_vae: stage1_words(args, args.teacher, args.size)}
    for trainer, words in commands.items():
        profile = torch.profiler.profile(activities=kinds)

        def feed(batches, *_, profile=profile):
            yield next(batches)
            with profile:
                yield next(batches)
            raise Enough

        watch(trainer, words, feed, args.out / "run")
        operations(trainer.__name__, profile, args.top)
    args.ckpt, args.vae, args.dtype, args.steps = None, None, "bf16" if GPU else "fp32", 2
    how, model, vae, norm = sampling_setup(args, device)
    guided, y = Guided(model, 1.8, (0, 1)), np.zeros(args.batch, int)
    sample.draw(how, guided, norm, range(args.batch), y, device)
    with torch.profiler.profile(activities=kinds) as profile:
        sample.draw(how, guided, norm, range(args.batch), y, device)
    operations("sample, two steps", profile, args.top)


def growth(what, unit, works, took):
    """Rows of seconds against work, and where they stop being proportional."""
    powers = [math.log(b / a) / math.log(d / c) for a, b, c, d in zip(took, took[1:], works, works[1:])]
    for work, s, power in zip(works, took, ["-", *powers]):
        row(what, f"{work:,} {unit}", s, 1e3 * s / work, power)
    less = [d for d, power in zip(works[1:], powers) if power < 0.85]
    more = [c for c, power in zip(works, powers) if power > 1.15]
    said = [f"less than linear up to {max(less):,} (a fixed cost)"] if less else []
    said += [f"more than linear from {min(more):,}"] if more else []
    return f"{what}: " + ("; ".join(said) or "linear throughout")


def scaling(args):
    """time against batch, image size and N"""
    device, said = start(), []
    if args.tiny:
        args.batches, args.sizes, args.n, args.dim, args.model = [1, 2], [32, 64], [20, 40], 8, "T"
    f = 4 if args.tiny else 8
    heads("median seconds", "work", "seconds", "ms for one", "power")

    def step_of(batch, side):
        return seconds_of_a_step(train_sit, stage2_words(args, args.model, batch, side), args)

    @torch.no_grad()
    def sampling_of(batch, side):
        net = wake(SiT(**size(args.model), input_size=side // f, classes=10)).to(device).eval()
        guided, x = Guided(net, 1.8), torch.randn(batch, *latent_shape(net), device=device)
        y = torch.zeros(batch, dtype=torch.long, device=device)
        return in_turn([lambda: guided(x, x.new_full((batch,), .5), y)], args.repeats)["seconds"][0]

    for name, work in (("training step", step_of), ("sampling step", sampling_of)):
        what, side = f"SiT-{args.model}/2, {name}", args.sizes[len(args.sizes) // 2]
        took = [work(batch, side) for batch in args.batches]
        said.append(growth(f"{what}, {side} px", "images", args.batches, took))
        took = [work(args.batches[1], side) for side in args.sizes]
        tokens = [(side // f // 2) ** 2 for side in args.sizes]
        said.append(growth(f"{what}, batch {args.batches[1]}", "tokens", tokens, took))
    took = [in_turn([lambda n=n: peers.our_distance(*ready_features(n, args.dim), device)],
                    args.repeats)["seconds"][0] for n in args.n]
    said.append(growth(f"FID from features of {args.dim}", "images", args.n, took))
    print(*said, sep="\n")


# ----------------------------------------------------------------------------------------------------- memory


def peak(device):
    """Peak memory in GiB of the GPU, or of this program (getrusage's would begin with that of the program
    that started it)."""
    status = Path("/proc/self/status")
    if device.type == "cuda" or not status.is_file():
        return memory()
    return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**20


def memory_of_fid(args):
    """memory of FID, and of precision and recall"""
    device = start()
    draw = torch.Generator(device).manual_seed(0)

    def features(n):
        return torch.rand(n, args.dim, generator=draw, device=device)

    heads("peak memory of the process, GiB", "in all", "of it kept features", "minutes")
    blank = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    for n in (args.real, args.fake):
        begin = time.time()
        fid.measure(lambda x: (features(len(x)), None), blank.expand(n, -1, -1, -1), keep=False,
                    device=device)
        row(f"FID's statistics of {n:,} images, {args.dim} features", peak(device), 0.0,
            (time.time() - begin) / 60)
    real, fake, begin = features(args.real), features(args.fake), time.time()
    fid.precision_recall(real, fake)
    row(f"precision and recall, {args.fake:,} x {args.real:,} images, {args.dim} features", peak(device),
        (real.nbytes + fake.nbytes) / 2**30, (time.time() - begin) / 60)


# ------------------------------------------------------------------------------------- on a GPU, and a plan


def train(what, script, words, args, share):
    """A row for each micro-batch, compiled or not: the last line of the script's log, and of it share(line),
    the MFU."""
    for micro, compiled in itertools.product(args.micro, args.compile):
        out = args.out / "run"
        shutil.rmtree(out, ignore_errors=True)
        many = (f"--steps {args.steps} --micro {micro} --{'no-' * (compiled == 'off')}compile "
                f"--log-every {max(args.steps // 3, 1)} --out {out}")
        command = [sys.executable, str(ROOT / script), *shlex.split(f"{words} {many}")]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            measured = done.stderr.strip().splitlines()[-1], "-", "-"
        else:
            line = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
            measured = line["img/s"], line["GiB"], share(line)
        row(what, f"batch {args.batch}, micro-batch {micro}, compile {compiled}", *measured)


def stage1(args):
    """on a GPU: train_vae.py at the paper's size"""
    words = stage1_words(args, "vitl14_reg", 32 if args.tiny else 256)
    heads("job", "setting", "images/s", "GiB", "MFU")
    train("stage 1" + ", SD-VAE and DINOv2-L, 256 px" * (not args.tiny), "train_vae.py", words, args,
          lambda line: "-" if args.tiny else mfu(STAGE1 * line["img/s"]))


def stage2(args):
    """on a GPU: train_sit.py from cached latents"""
    heads("job", "setting", "images/s", "GiB", "MFU")
    for model in args.model:
        words = stage2_words(args, model, args.batch, 32 if args.tiny else 256)
        train(f"stage 2, SiT-{model}/2, cached latents", "train_sit.py", words, args,
              lambda line: f"{line['MFU']:.1%}" if "MFU" in line else "-")


IMAGENET, SAMPLES, DRAW = 1281167, 50000, 80e-6     # DRAW: seconds a step for an image's noise, on the CPU
PARAMETERS = {"vae": 83653863, "align": 2107392, "disc": 2765633, "vgg": 14714688, "dino": 304372736}


def saved(net, *inputs):
    """Bytes that one image's forward pass keeps for the backward pass, in bf16, by its shapes alone."""
    weights, held = {p.untyped_storage()._cdata for p in net.parameters()}, {}

    def keep(x):
        held[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        net(*inputs)
    return sum(size for storage, size in held.items() if storage not in weights)


def jobs_of_a_run():
    """{name: (what, images, [(FLOPs an image, FLOP/s assumed)], other seconds, bytes on disk, bytes of
    weights, gradients, moments and averages on each GPU, bytes of activations for each image held)}."""
    n, nets = PARAMETERS, {}
    for name in ("B", "XL"):
        with torch.device("meta"):
            net = SiT(**size(name))
            of_one = torch.randn(1, 4, 32, 32), torch.rand(1), torch.zeros(1, dtype=torch.long)
            nets[name] = (train_sit.flops(net), sum(p.numel() for p in net.parameters()),
                          saved(net.bfloat16(), *of_one))
    with torch.device("meta"):
        net = VAE().bfloat16()
        net.forward = lambda x: net.decode(net.encode(x).sample().bfloat16())
        of_vae = saved(net, torch.randn(1, 3, 256, 256).bfloat16())
    trained = n["vae"] + n["align"]
    jobs = {"stage1": ("stage 1, 10 epochs", 10 * IMAGENET // 64 * 64, [(STAGE1, 150e12)], 0,
                       4 * (n["vae"] + trained) + 2 * 12 * (trained + n["disc"]),
                       16 * (trained + n["disc"]) + 4 * (n["vgg"] + n["dino"]), of_vae),
            "cache": ("a latent cache", 2 * IMAGENET, [(ENCODE, 150e12)], 0, 2 * IMAGENET * 2 * 8 * 32**2,
                      4 * n["vae"], 0)}
    for name, rate in (("B", 400e12), ("XL", 445e12)):
        flops, count, of_one = nets[name]
        jobs[name] = (f"SiT-{name}/2, 400K steps", 400000 * 256, [(3 * flops, rate)], 0,
                      2 * 16 * count + 8 * 4 * count, 20 * count, of_one)
    for name, seen in (("B", 250), ("XL", 435)):
        flops, count, _ = nets[name]
        jobs[f"sample-{name}"] = (
            f"50,000 samples, SiT-{name}/2" + ", guided in [0, 0.75]" * (name == "XL"), SAMPLES,
            [(seen * flops, 350e12), (DECODE, 150e12)], SAMPLES * 250 * DRAW,
            SAMPLES * (3 * 256**2 + 4 * 4 * 32**2), 4 * (count + n["vae"]), 0)
    return jobs


def plan(args):
    """hours, disk and memory of a run at ImageNet's size"""
    measured = dict(pair.split("=") for pair in args.rate if pair)
    jobs = jobs_of_a_run()
    if unknown := measured.keys() - jobs.keys():
        raise UserError(f"--rate {min(unknown)}: {', '.join(jobs)} are known")
    heads("job", "computed from", "hours on 1 GPU", "on 8", "on 64", "GiB of disk",
          "GiB on each GPU: weights, optimiser", "and activations, an image")
    for name, (what, images, work, other, disk, state, held) in jobs.items():
        if name in measured:
            seconds, source = images / float(measured[name]), f"measured: {measured[name]} images/s"
        else:
            work = [(flops, args.mfu * train_sit.PEAK["H100"] if args.mfu else rate) for flops, rate in work]
            seconds = other + images * sum(flops / rate for flops, rate in work)
            parts = [f"{flops / 1e12:.3g} TFLOP / {rate / 1e12:.0f} TFLOP/s" for flops, rate in work]
            source = f"{images / 1e6:.3g}M images x ({' + '.join(parts)})"
            source += f" + {other / 3600:.2g} h of draws" * bool(other)
        row(what, source, *(seconds / 3600 / gpus for gpus in (1, 8, 64)), disk / 2**30, state / 2**30,
            held / 2**30 or "-")
    how = f"{args.mfu:.0%} of an H100's nominal peak" if args.mfu else "guessed"
    print(f"Hours without a measured rate: FLOPs over a speed that is {how}. 8 and 64 GPUs: an eighth and a "
          "64th; communication and reading are not counted. Activations: what the backward pass needs, in "
          "bf16, of the VAE or the SiT; what is held for a moment comes on top.")
