"""Speed and memory on this machine, each printed as rows of the README's table.

    python tests/bench.py fid       # Inception and the Frechet distance against torch-fidelity, in turn
    python tests/bench.py knn       # memory of FID, and of precision and recall of 50,000 x 10,000 images
    python tests/bench.py stage1    # on a GPU, from here on: train_vae.py at the paper's size
    python tests/bench.py stage2    # train_sit.py from cached latents
    python tests/bench.py sample    # sample.py against the way the public SiT samples

Pictures are drawn by code and weights are random, of the real shapes; --tiny makes both small enough for a
CPU.
"""
import argparse
import copy
import itertools
import json
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import shapes

import fid
import sample
import train_sit
from dino import DINOv2
from sit import Flow, Guided, SiT, size
from vae import VAE, memory, run_script, save, start, to_uint8

# FLOPs of an image's step of stage 1 at 256 px: the VAE forward and backward; DINOv2-L at 448 px; LPIPS, two
# forwards and the way back to the reconstruction; the discriminator, three forwards and what their gradients
# need.
STAGE1 = 2684.3e9 + 726.8e9 + 3 * 40.1e9 + 8 * 6.3e9


def flags():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = p.add_subparsers(dest="job", required=True)
    a = jobs.add_parser("fid")
    a.add_argument("--images", type=int, default=500, help="pictures for Inception, end to end")
    a.add_argument("--side", type=int, default=256, help="their side in pixels")
    a.add_argument("--n", type=int, nargs="+", default=[2000, 10000, 50000], help="numbers of ready features")
    a.add_argument("--repeats", type=int, default=3,
                   help="runs of each, ours and theirs in turn; the median counts")
    b = jobs.add_parser("knn")
    b.add_argument("--fake", type=int, default=50000)
    b.add_argument("--real", type=int, default=10000)
    for job in (a, b):
        job.add_argument("--dim", type=int, default=2048, help="length of the ready features")
    c, d, e = (jobs.add_parser(name) for name in ("stage1", "stage2", "sample"))
    for job, batch, micro in ((c, 64, [64]), (d, 256, [64, 128, 256])):
        job.add_argument("--batch", type=int, default=batch)
        job.add_argument("--micro", type=int, nargs="+", default=micro,
                         help="images held at once: all of these are tried")
        job.add_argument("--compile", nargs="+", choices=["on", "off"], default=["on", "off"],
                         help="both are tried")
        job.add_argument("--steps", type=int, default=60, help="a third of them counts, the last")
        job.add_argument("--workers", type=int, default=12)
    d.add_argument("--model", nargs="+", default=["XL", "B"])
    e.add_argument("--model", default="XL")
    e.add_argument("--batch", type=int, nargs="+", default=[32, 64, 128],
                   help="images at once: all of these are tried")
    e.add_argument("--steps", type=int, default=250)
    e.add_argument("--ckpt", help="a trained checkpoint or public name (SiT-XL/2) in place of random weights")
    e.add_argument("--vae", help="with --ckpt: its VAE")
    for job in (c, d, e):
        job.add_argument("--tiny", action="store_true",
                         help="small pictures and networks, to see that the path is whole")
    for job in (a, b, c, d, e):
        job.add_argument("--out", type=Path, help="default: out/bench, or out/bench-tiny")
    p.set_defaults(tiny=False)
    args = p.parse_args()
    args.out = args.out or Path("out/bench-tiny" if args.tiny else "out/bench")
    return args


def row(*cells):
    def text(c):
        return f"{c:.3g}" if isinstance(c, float) else f"{c:,}" if isinstance(c, int) else c

    print("|", " | ".join(map(text, cells)), "|", flush=True)


def heads(*cells):
    row(*cells)
    row(*["---"] * len(cells))


# ------------------------------------------------------------------------------------- against torch-fidelity


def in_turn(ours, theirs, repeats):
    """The median seconds of two functions run A B A B ..., and by how much their results differ, relative to
    theirs."""
    seconds = ([], [])
    for _ in range(repeats):
        values = []
        for function, took in zip((ours, theirs), seconds):
            begin = time.perf_counter()
            values.append(function())
            took.append(time.perf_counter() - begin)
    return *map(statistics.median, seconds), abs(values[0] / values[1] - 1)


def compare(what, ours, theirs, repeats):
    """A row of the two functions' seconds."""
    ours, theirs, apart = in_turn(ours, theirs, repeats)
    row(what, ours, theirs, ours / theirs, apart)


def inception_functions(args, device):
    """Ours and torch-fidelity's: from image files to the trace of the features' covariance."""
    from test_fid import calibrated_inception, pictures
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.metric_fid import fid_features_to_statistics
    from torch_fidelity.utils import extract_featuresdict_from_input_id
    folder, weights = args.out / f"pictures-{args.images}-{args.side}", args.out / "inception.pth"
    folder.mkdir(parents=True, exist_ok=True)
    for i, x in enumerate(pictures(args.images, args.side).permute(0, 2, 3, 1).numpy()):
        Image.fromarray(x).save(folder / f"{i:05d}.png")
    torch.save(calibrated_inception(pictures(12)), weights)
    net = fid.Inception.load(weights).to(device)
    peer = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(weights)).to(device)

    def ours():
        return fid.measure(net, folder, keep=False, device=device).moments[0][1].trace().item()

    def theirs():
        features = extract_featuresdict_from_input_id(
            1, peer, input1=str(folder), cuda=device.type == "cuda", verbose=False)
        return fid_features_to_statistics(features["2048"])["sigma"].trace()

    return ours, theirs


def distance_functions(n, dim, device):
    """Ours and torch-fidelity's: from n + n ready features to their Frechet distance."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    draw = torch.Generator().manual_seed(0)
    real, fake = (torch.rand(n, dim, generator=draw) ** power for power in (1, 2))

    def moments(features):
        sums = fid.Moments()
        for part in features.split(64):                     # as they come from a network
            sums.add(part.to(device))
        return sums.finish(n)

    def ours():
        return fid.frechet(*moments(real), *moments(fake))

    def theirs():
        found = map(fid_features_to_statistics, (real, fake))
        return fid_statistics_to_metric(*found, verbose=False)["frechet_inception_distance"]

    return ours, theirs


def compare_fid(args):
    device = start()
    heads("median seconds, in turn", "ours", "torch-fidelity", "ours / theirs", "results differ by")
    compare(f"Inception, {args.images} pictures of {args.side} px, from files to covariance",
            *inception_functions(args, device), args.repeats)
    for n in args.n:
        compare(f"distance from {n:,} + {n:,} features of {args.dim}",
                *distance_functions(n, args.dim, device), args.repeats)


# ----------------------------------------------------------------------------------------------------- memory


def peak(device):
    """Peak memory in GiB of the GPU, or of this program (getrusage's would begin with that of the program
    that started it)."""
    status = Path("/proc/self/status")
    if device.type == "cuda" or not status.is_file():
        return memory()
    return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**20


def compare_memory(args):
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


# --------------------------------------------------------------------------------------------- jobs for a GPU


def materials(args):
    """Pictures, and random weights of the real shapes (or of tiny ones) in the public layouts, made once
    under --out."""
    if (args.out / "vgg.pth").is_file():
        return
    torch.manual_seed(0)
    shapes.write(args.out / "data", 40 if args.tiny else 1024, 32 if args.tiny else 256)
    (VAE(8, (1, 2, 4), 1) if args.tiny else VAE()).save(args.out / "vae")
    teacher = DINOv2(64, 2, patch=4, grid=8) if args.tiny else DINOv2()
    save(teacher.state_dict(), args.out / "dino.pth")
    vgg = fid.LPIPS([4] * 13 if args.tiny else [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6).state_dict()
    save({k: v for k, v in vgg.items() if k.startswith("features")}, args.out / "vgg.pth")


def mfu(flops):
    """Useful FLOP/s over the GPU's dense bf16 peak, where that is known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    known = [v for k, v in train_sit.PEAK.items() if k in name]
    return f"{flops / known[0]:.1%}" if known else "-"


def train(what, script, words, args, share):
    """A row for each micro-batch, compiled or not: the last line of the script's log, and of it share(line),
    the MFU."""
    for micro, compiled in itertools.product(args.micro, args.compile):
        out = args.out / "run"
        shutil.rmtree(out, ignore_errors=True)
        many = (f"--data {args.out}/data --size {32 if args.tiny else 256} --steps {args.steps} "
                f"--batch {args.batch} --micro {micro} --{'no-' * (compiled == 'off')}compile "
                f"--log-every {max(args.steps // 3, 1)} --workers {args.workers} --out {out}")
        command = [sys.executable, str(ROOT / script), *shlex.split(f"{words} {many}")]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            measured = done.stderr.strip().splitlines()[-1], "-", "-"
        else:
            line = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
            measured = line["img/s"], line["GiB"], share(line)
        row(what, f"batch {args.batch}, micro-batch {micro}, compile {compiled}", *measured)


def stage1(args):
    materials(args)
    heads("job", "setting", "images/s", "GiB", "MFU")
    words = (f"--val {args.out}/data --init {args.out}/vae --dino {args.out}/dino.pth "
             f"--vgg {args.out}/vgg.pth --gan-start 0")
    train("stage 1" + ", SD-VAE and DINOv2-L, 256 px" * (not args.tiny), "train_vae.py", words, args,
          lambda line: "-" if args.tiny else mfu(STAGE1 * line["img/s"]))


def stage2(args):
    materials(args)
    heads("job", "setting", "images/s", "GiB", "MFU")
    for model in args.model:
        words = f"--vae {args.out}/vae --cache {args.out}/latents --norm none --model {model}"
        train(f"stage 2, SiT-{model}/2, cached latents", "train_sit.py", words, args,
              lambda line: f"{line['MFU']:.1%}" if "MFU" in line else "-")


# --------------------------------------------------------------------------------------------------- sampling


class Official(Guided):
    """The public SiT's way: three channels guided at all times, and each step asks twice, for the drift and
    for the score."""

    def __init__(self, model, scale):
        super().__init__(model, scale, channels=3)

    def __call__(self, x, t, y):
        super().__call__(x, t, y)
        return super().__call__(x, t, y)


def calls(guided, steps):
    """How many images the network sees for each one that is sampled."""
    counted, seen = copy.copy(guided), []
    counted.model = lambda x, t, y: seen.append(len(x)) or x
    x, y = torch.zeros(1, guided.channels, 1, 1), torch.zeros(1, dtype=torch.long)
    Flow().sample(counted, x, y, steps=steps)
    return sum(seen)


def random_sit(args):
    """The file of a SiT with random weights that, unlike the initial ones, give something else than zero."""
    file = args.out / f"sit-{args.model.replace('/', '-')}.pt"
    if not file.is_file():
        torch.manual_seed(0)
        net = SiT(**size(args.model), input_size=8 if args.tiny else 32, classes=10 if args.tiny else 1000)
        for p in net.parameters():
            if not p.any():
                nn.init.normal_(p, std=0.02)
        save(net.state_dict(), file)
    return file


def sampling(args):
    device, words = start(), f"--cfg 1.8 --sampler sde --steps {args.steps}"
    if args.ckpt:
        words += f" --ckpt {args.ckpt}" + f" --vae {args.vae}" * bool(args.vae)
    else:
        materials(args)
        words += f" --ckpt {random_sit(args)} --process sit --vae {args.out}/vae"
    sys.argv = ["sample.py", *shlex.split(words)]
    how = sample.flags()
    model, vae, norm, _ = sample.load(how.ckpt, how.vae, how.process)
    model, vae = model.to(device), vae.to(device)
    ours, official = Guided(model, how.cfg, tuple(how.interval)), Official(model, how.cfg)
    seen, work = {g: calls(g, args.steps) for g in (ours, official)}, train_sit.flops(model)

    def draw(guided, n, dtype, steps=args.steps):
        how.dtype, how.steps = dtype, steps
        z = sample.draw(how, guided, norm, range(n), np.arange(n) % model.classes, device)
        with torch.no_grad():
            return to_uint8(vae.decode(z)).cpu()

    def measured(what, guided, n, dtype):
        draw(guided, n, dtype, steps=4)       # guided and unguided: what is compiled is compiled here
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        draw(guided, n, dtype)
        rate = n / (time.perf_counter() - begin)
        row(what, f"batch {n}, {seen[guided] / args.steps:.2f} network calls a step", rate, peak(device),
            mfu(seen[guided] * work * rate))
        return rate

    heads("job", "setting", "images/s", "GiB", "MFU")
    what = f"sampling, SiT-{args.model}/2, {args.steps} steps, cfg {how.cfg}"
    theirs = measured(f"{what}, the official way: everywhere, TF32, eager", official, args.batch[0], "fp32")
    with fid.exact():
        exact = draw(ours, min(8, args.batch[0]), "fp32")
    half = draw(ours, len(exact), "bf16")
    if device.type == "cuda":
        model.compile(dynamic=False)
    what = f"{what} in {how.interval}, bf16" + ", compile" * torch.cuda.is_available()
    best = max(measured(what, ours, n, "bf16") for n in args.batch)
    fewer = seen[official] / seen[ours]
    print(f"{best / theirs:.2f} times the official way's images/s: {fewer:.2f} by fewer calls, "
          f"{best / theirs / fewer:.2f} by faster ones")
    level = (half.float() - exact.float()).abs()
    close = fid.psnr(half / 255, exact / 255).mean()
    print(f"bf16 against float32, same noise, {len(exact)} images: mean difference {level.mean():.3f} levels "
          f"of 255, PSNR {close:.1f} dB" + ", random weights" * (not args.ckpt))


JOBS = {"fid": compare_fid, "knn": compare_memory, "stage1": stage1, "stage2": stage2, "sample": sampling}


def main():
    args = flags()
    args.out.mkdir(parents=True, exist_ok=True)
    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"{device}, torch {torch.__version__}\n")
    JOBS[args.job](args)


if __name__ == "__main__":
    run_script(main)
