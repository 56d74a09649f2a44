"""Speed and memory on this machine: ours against what a user would otherwise use, in turn, in one run.

    python tests/bench.py step        # a SiT's training step against SiT's, REPA's and diffusers' ways
    python tests/bench.py sample      # sampling against the way the public SiT samples
    python tests/bench.py vae-step    # a VAE's fine-tuning step against diffusers, transformers and lpips
    python tests/bench.py vae         # encode and decode against diffusers
    python tests/bench.py fid         # Inception and the Frechet distance against torch-fidelity
    python tests/bench.py crop        # photographs to squares against torchvision's ImageFolder
    python tests/bench.py cache       # random reads of cached latents against one .npy for each image

    python tests/bench.py start       # what the start of sample.py and of both trainers is made of
    python tests/bench.py profile     # the operations of a step of both trainers and of the sampler
    python tests/bench.py scaling     # time against batch, image size and N
    python tests/bench.py knn         # memory of FID, and of precision and recall of 50,000 x 10,000 images
    python tests/bench.py stage1      # on a GPU: train_vae.py at the paper's size, by micro-batch and compile
    python tests/bench.py stage2      # on a GPU: train_sit.py from cached latents
    python tests/bench.py plan        # hours, disk and memory of a run at ImageNet's size: arithmetic

Pictures are drawn by code and weights are random, of the real shapes; --tiny makes both small. Defaults are
for two CPU cores; on a GPU say step --model XL --batch 256, vae-step --batch 64 --teacher vitl14_reg. The
jobs against peers are in this file, their peers in peers.py, the others in inside.py.
"""
import argparse
import contextlib
import os
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import inside
import peers
from measure import (
    DECODE,
    ENCODE,
    GPU,
    STAGE1,
    TEACHER,
    a_vae,
    compare,
    difference,
    duel,
    heads,
    in_turn,
    latent_shape,
    matmul_peak,
    mfu,
    nominal,
    once,
    pictures,
    ready_features,
    row,
    sampling_setup,
    stage1_words,
    stage2_words,
    versus,
)

import fid
import sample
import train_sit
import train_vae
from sit import Flow, Guided, SiT, size
from vae import VAE, Images, Normalizer, from_uint8, normal, read_json, run_script, start, to_uint8

WAYS = {"sit": "SiT's way, same latents", "repa": "REPA's way, a file of latents each, clipping",
        "diffusers": "diffusers' DiT and EMA, same latents", "sit-vae": "SiT's way, VAE at every step"}


def flags():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = p.add_subparsers(dest="job", required=True)
    all_of_them = {name: jobs.add_parser(name, help=job.__doc__) for name, job in JOBS.items()}
    for job in all_of_them.values():
        job.add_argument("--out", type=Path, help="default: out/bench, or out/bench-tiny")

    def add(names, flag, default, **more):
        kind = {} if default is None else {"type": type(default[0] if isinstance(default, list) else default)}
        many = {"nargs": "+"} if isinstance(default, list) else {}
        for name in names.split():
            all_of_them[name].add_argument(f"--{flag}", default=default, **{**kind, **many, **more})

    for name in "step sample vae-step vae crop cache start profile scaling stage1 stage2".split():
        all_of_them[name].add_argument("--tiny", action="store_true", help="small pictures and networks")
    add("step sample vae-step vae fid crop cache start scaling", "repeats", 3,
        help="runs of each, in turn; the median counts")
    add("step vae-step scaling", "block", 20 if GPU else 1, help="steps in one run")
    add("step profile scaling", "model", "S", help="XL, B, ... as in train_sit.py")
    add("step", "batch", 8)
    add("vae-step profile", "batch", 2)
    add("vae", "batch", 2)
    add("step sample vae vae-step", "dtype", "bf16" if GPU else "fp32")
    add("step", "against", list(WAYS), choices=WAYS)
    add("vae-step profile", "teacher", "vits14_reg", choices=TEACHER)
    add("start", "teacher", "vitl14_reg", choices=TEACHER)
    add("step vae vae-step crop", "size", 256, help="side of the images in pixels")
    add("profile", "size", 128)
    add("start", "size", 64)
    add("step vae-step profile scaling", "workers", 8 if GPU else 0)
    add("cache", "workers", 8 if GPU else 1)
    add("sample", "model", "XL" if GPU else "S")
    add("sample", "batch", [32, 64, 128] if GPU else [2], help="images at once: all of these are tried")
    add("sample", "steps", 250 if GPU else 20)
    add("sample", "ckpt", None, help="a trained checkpoint or public name in place of random weights")
    add("sample", "vae", None, help="with --ckpt: its VAE")
    add("fid", "images", 500, help="pictures for Inception, end to end")
    add("fid", "side", 256, help="their side in pixels")
    add("fid", "n", [2000, 10000, 50000], help="numbers of ready features")
    add("fid knn scaling", "dim", 2048, help="length of the ready features")
    add("knn", "fake", 50000)
    add("knn", "real", 10000)
    add("crop", "data", None, help="class folders of your own pictures, in place of drawn ones of 500 x 375")
    add("crop", "images", 200)
    add("cache", "images", 4096)
    add("cache", "batch", 256)
    add("start", "model", "B")
    add("profile", "top", 12, help="operations to show")
    add("scaling", "batches", [1, 2, 4, 8, 16])
    add("scaling", "sizes", [64, 128, 256, 384])
    add("scaling", "n", [2000, 4000, 8000, 16000, 32000])
    add("stage1", "batch", 64)
    add("stage2", "batch", 256)
    add("stage1", "micro", [64], help="images held at once: all of these are tried")
    add("stage2", "micro", [64, 128, 256], help="images held at once: all of these are tried")
    add("stage2", "model", ["XL", "B"])
    add("stage1 stage2", "compile", ["on", "off"], choices=["on", "off"], help="both are tried")
    add("stage1 stage2", "steps", 60, help="a third of them counts, the last")
    add("stage1 stage2", "workers", 12)
    add("plan", "rate", [""], metavar="JOB=IMAGES/S", help="measured on one GPU: stage1, cache, B, XL, ...")
    add("plan", "mfu", 0.0, help="share of an H100's peak, in the place of the speeds assumed")
    p.set_defaults(tiny=False)
    args = p.parse_args()
    args.out = args.out or Path("out/bench-tiny" if args.tiny else "out/bench")
    if args.tiny and "size" in args:
        args.size = 32
    return args


# ----------------------------------------------------------------------------------------- ours against peers


def step(args):
    """a training step of stage 2 against three ways"""
    device, side = start(), args.size
    tolerance = 1e-4 if args.dtype == "fp32" else 0.02
    versus("seconds a step, median, in turn", "peer")
    for way in args.against:
        def peer(nets, how, way=way):
            norm, kind = Normalizer(), peers.DiffusersWay if way == "diffusers" else peers.DiffusionWay
            extra = {}
            if way == "repa":
                cache = train_sit.Cache(Path(how.cache), read_json(Path(how.cache, "manifest.json")))
                extra = {"files": peers.LatentFiles(cache, args.out / f"files-{side}")}
            if way == "sit-vae":
                extra = {"vae": peers.diffusers_vae(a_vae(args)).to(device).eval().requires_grad_(False),
                         "images": Images(pictures(args, side), side)}
            return kind(nets, how, norm, device, **extra)
        words = stage2_words(args, args.model, args.batch, side)
        found = duel(train_sit, words, peer, args, tolerance)
        with torch.device("meta"):
            net = SiT(**size(args.model), input_size=side // 8, classes=10)
        compare(f"SiT-{args.model}/2, batch {args.batch}, {args.dtype}: {WAYS[way]}", found, args.batch,
                3 * args.batch * train_sit.flops(net))


def vae_step(args):
    """a training step of stage 1 against the same losses around other packages' networks"""
    device = start()
    words = stage1_words(args, args.teacher, args.size)
    found = duel(train_vae, words, lambda nets, how: peers.TunedVAE(nets, how, a_vae(args), device), args,
                 1e-3 if args.dtype == "fp32" else 0.05)
    versus("seconds a step, median, in turn", "packages")
    work = STAGE1 - TEACHER["vitl14_reg"] + TEACHER[args.teacher] if args.size == 256 else 0
    compare(f"Eq. 6, {args.size} px, batch {args.batch}, {args.teacher}, {args.dtype}: diffusers, "
            "transformers, lpips", found, args.batch, work * args.batch)


@torch.no_grad()
def vae(args):
    """encode and decode against diffusers' AutoencoderKL"""
    device, folder = start(), a_vae(args)
    theirs = peers.diffusers_vae(folder).to(device).eval()
    x = from_uint8(torch.stack([Images(pictures(args, args.size), args.size)[i][0]
                                for i in range(args.batch)])).to(device)
    z = theirs.encode(x).latent_dist.mean
    half = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16")
    versus(f"seconds, median, in turn; {args.batch} images of {args.size} px, {args.dtype}", "diffusers")
    for order in ("as loaded", "channels_last"):
        ours = VAE.load(folder).to(device)
        if order == "channels_last":
            ours = ours.to(memory_format=torch.channels_last)
        calls = {"encode": (lambda ours=ours: ours.moments(x), lambda: theirs._encode(x), ENCODE),
                 "decode": (lambda ours=ours: ours.decode(z), lambda: theirs.decode(z).sample, DECODE)}
        for name, (one, two, work) in calls.items():
            one = torch.compile(one, dynamic=False) if GPU else one
            with half:
                found = in_turn((one, two), args.repeats)
            assert found["apart"] < (1e-4 if args.dtype == "fp32" else 0.1), found["apart"]
            compare(f"{name}, ours {order}" + ", compile" * GPU, found, args.batch,
                    work * args.batch if args.size == 256 else 0)


def compare_fid(args):
    """FID: Inception and the distance, against torch-fidelity"""
    from test_fid import pictures as smooth_pictures
    device = start()
    versus("median seconds, in turn", "torch-fidelity")
    functions = peers.inception_functions(args.out / f"pictures-{args.images}-{args.side}",
                                          args.out / "inception.pth",
                                          smooth_pictures(args.images, args.side), device)
    compare(f"Inception, {args.images} pictures of {args.side} px, from files to covariance",
            in_turn(functions, args.repeats), args.images)
    for n in args.n:
        functions = peers.distance_functions(*ready_features(n, args.dim), device)
        compare(f"distance from {n:,} + {n:,} features of {args.dim}", in_turn(functions, args.repeats))


def crop(args):
    """loading and cropping photographs, against torchvision and ADM's crop"""
    from test_fid import pictures as smooth_pictures
    n, (h, w) = (4, (75, 100)) if args.tiny else (args.images, (375, 500))

    def draw(folder):
        (folder / "class").mkdir(parents=True)
        for i, x in enumerate(smooth_pictures(n, h, w).permute(0, 2, 3, 1).numpy()):
            Image.fromarray(x).save(folder / "class" / f"{i:05d}.jpg", quality=90)

    folder = Path(args.data) if args.data else once(args.out / f"photographs-{n}-{w}x{h}", draw)
    found = in_turn(peers.crop_functions(folder, args.size), args.repeats)
    assert found["apart"] == 0
    versus("median seconds, in turn, one process", "torchvision")
    compare(f"{len(found['values'][0])} pictures of {folder.name}, to {args.size} px", found)


def drop(files):
    """Asks the system to forget these files' pages -> whether it did (None: it does not say)."""
    for file in files:
        with open(file, "rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        with open(files[-1], "rb") as f:
            os.preadv(f.fileno(), [bytearray(4096)], 0, os.RWF_NOWAIT)
    except BlockingIOError:
        return True
    except (OSError, AttributeError):
        return None
    return False


def cache(args):
    """random reads of cached latents against one .npy for each image and flip"""
    n, batch = (64, 16) if args.tiny else (args.images, args.batch)
    folder, shape = args.out / f"moments-{n}", (n, 2, 8, 32, 32)
    manifest = {"shape": shape, "classes": []}

    def fill(folder):
        folder.mkdir()
        with contextlib.redirect_stdout(sys.stderr):
            train_sit.make_arrays(folder, shape, manifest)
        moments = train_sit.open_array(folder / "moments.npy", "r+")
        for i in range(n):
            moments[i] = normal(shape[1:], 0, "sample", i)

    once(folder, fill)
    files = peers.LatentFiles(train_sit.Cache(folder, manifest), args.out / f"moments-{n}-files")
    order = np.random.default_rng(0)
    keys = list(zip(order.permutation(n).tolist(), order.integers(2, size=n).tolist()))
    held = [folder / "moments.npy", *sorted(files.folder.glob("*.npy"))]
    versus("median seconds, in turn, loaders' start included", "a file each")
    for state, reads in (("warm", 4 * keys), ("cold", keys)):
        functions = peers.cache_functions(folder, manifest, files, reads, batch, args)
        what = f"{len(reads):,} random reads, batches of {batch}, {args.workers} worker(s), {state}"
        if state == "cold" and not drop(held):
            row(what, "not measured: the page cache cannot be dropped here", "-", "-", "-")
            continue
        found = in_turn(functions, args.repeats, (lambda: drop(held)) if state == "cold" else lambda: None)
        assert found["apart"] == 0
        compare(what, found)


# --------------------------------------------------------------------------------------------------- sampling


def calls(guided, steps):
    """How many images the network sees for each one that is sampled."""
    seen, model = [], guided.model
    guided.model = lambda x, t, y: seen.append(len(x)) or x
    x, y = torch.zeros(1, guided.channels, 1, 1), torch.zeros(1, dtype=torch.long)
    Flow().sample(guided, x, y, steps=steps)
    guided.model = model
    return sum(seen)


def sampling(args):
    """sampling against the way the public SiT samples"""
    device = start()
    how, model, vae, norm = sampling_setup(args, device)
    public = peers.PublicSiT(model).eval()
    ours = {"one call a step": Guided(model, how.cfg, channels=3),
            f"and guidance in {how.interval} only": Guided(model, how.cfg, tuple(how.interval))}
    seen = [4 * args.steps, *(calls(g, args.steps) for g in ours.values())]
    apart = same_sampler(how, model, public, device)
    if GPU:
        model.compile(dynamic=False)
    print(f"with equal noise both ways' latents after 4 steps differ by {apart:.1e}\n")
    heads("latents, median, in turn", "network calls", "seconds", "images/s", "times the official way's",
          "GiB", "MFU")
    best = 0
    for n in args.batch:
        y = torch.arange(n, device=device) % model.classes
        z = torch.stack([normal(latent_shape(model), how.seed, "sample", i) for i in range(n)]).to(device)
        functions = [lambda z=z, y=y: peers.official_sample(public, z, y, how.cfg, args.steps)]
        functions += [lambda g=g, n=n, y=y: sample.draw(how, g, norm, range(n), y, device)
                      for g in ours.values()]
        found = in_turn(functions, args.repeats)
        names = ("the official way: two calls a step, guidance everywhere, fp32", *ours)
        for name, took, gib, images in zip(names, found["seconds"], found["gib"], seen):
            row(f"SiT-{args.model}/2, {args.steps} SDE steps, cfg {how.cfg}, batch {n}: {name}", images, took,
                n / took, found["seconds"][0] / took, gib, mfu(images * train_sit.flops(model) * n / took))
        two, one, few = found["seconds"]
        best = max(best, two / few)
    print(f"batch {n}: {two / few:.2f} times as fast: {two / one:.2f} by one call a step (half the calls), "
          f"{one / few:.2f} by guidance in the interval ({seen[1] / seen[2]:.2f} times fewer calls)"
          + f"; the best batch: {best:.2f}" * (len(args.batch) > 1))
    if args.dtype != "fp32":
        how_close_is_bf16(how, Guided(model, how.cfg, tuple(how.interval)), norm, vae, device, args)


def same_sampler(how, model, public, device):
    """How far the official way's latents lie from ours, guided as there, on the same noise."""
    def draw(*key):
        return normal(latent_shape(model), how.seed, *key)[None].to(device)

    z, y = draw("sample", 0), torch.zeros(1, dtype=torch.long, device=device)
    with fid.exact():
        ours = Flow().sample(Guided(model, how.cfg, channels=3), z, y, "sde", 4, lambda k: draw("step", 0, k))
        theirs = peers.official_sample(public, z, y, how.cfg, 4, lambda k: 2 * [draw("step", 0, k)])
    apart = difference(ours, theirs)
    assert apart < 1e-4, apart
    return apart


@torch.no_grad()
def how_close_is_bf16(how, guided, norm, vae, device, args):
    images = {}
    for how.dtype in ("fp32", args.dtype):
        with fid.exact() if how.dtype == "fp32" else contextlib.nullcontext():
            z = sample.draw(how, guided, norm, range(8), np.arange(8) % guided.classes, device)
            images[how.dtype] = to_uint8(vae.decode(z)).cpu().float()
    exact, half = images.values()
    print(f"{args.dtype} against float32, same noise, 8 images: mean difference "
          f"{(exact - half).abs().mean():.3f} levels of 255, PSNR "
          f"{fid.psnr(half / 255, exact / 255).mean():.1f} dB" + ", random weights" * (not args.ckpt))


JOBS = {"step": step, "sample": sampling, "vae-step": vae_step, "vae": vae, "fid": compare_fid, "crop": crop,
        "cache": cache, "start": inside.starts, "profile": inside.profiles, "scaling": inside.scaling,
        "knn": inside.memory_of_fid, "stage1": inside.stage1, "stage2": inside.stage2, "plan": inside.plan}


def main():
    args = flags()
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if GPU else f"CPU, {torch.get_num_threads()} threads"
    if GPU:
        device += f", bf16 peak {nominal() / 1e12:.0f} TFLOP/s nominal, {matmul_peak() / 1e12:.0f} measured"
    print(f"{device}, torch {torch.__version__}\n")
    JOBS[args.job](args)


if __name__ == "__main__":
    run_script(main)
