"""Stage 2 of ReaLS: train an unchanged SiT or DiT, with or without REPA, on a VAE's latents (Tables 3-11).

    torchrun --nproc_per_node=8 train_sit.py --model XL                        # the paper's run on out/vae
    torchrun --nproc_per_node=8 train_sit.py --model B --vae sd-vae-ft-ema     # a baseline row

Each image is encoded once, with its mirror image, into a cache of posterior moments; a posterior sample,
time, noise and label drop are drawn at each step. OUT holds ckpt.pt to go on from, and NNNNNNN.pt, the
EMA at each milestone.
"""
import argparse
import contextlib
import errno
import functools
import math
import os
import shlex
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from dino import load_teacher
from sit import Guided, SiT, process_of, repa_loss, size
from vae import (
    PAPER,
    VAE,
    Gaussian,
    Images,
    Log,
    Normalizer,
    Stop,
    UserError,
    accumulation_steps,
    add_run_flags,
    barrier,
    check_space,
    everyone,
    fingerprint,
    from_uint8,
    loader,
    lock,
    micro_batches,
    missing_ranges,
    normal,
    number,
    positive,
    print0,
    progress,
    rank,
    read_json,
    resume,
    rng,
    run_script,
    same_manifest,
    save,
    save_checkpoint,
    save_picture,
    seed_torch,
    shuffled_index,
    start,
    statistics,
    survive,
    to_uint8,
    total,
    world,
)

PEAK = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}   # FLOP/s
REPA_DEPTH = {"T": 2, "S": 4, "B": 4, "L": 8, "XL": 8}    # blocks before the projector (Yu et al. 2024)


def flags(ungiven=()):
    """The command line's flags; the `ungiven` ones as if they had been left out."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", default="imagenet/train", help="folder of images, one subfolder per class")
    p.add_argument("--size", type=positive, default=256, help="side of the images in pixels")
    p.add_argument("--vae", default="out/vae", help="a run of train_vae.py, a folder, a file, a public name")
    p.add_argument("--cache", help="folder of the latent cache; default: by hashes, in out/latents")
    p.add_argument("--no-flip", action="store_true", help="no mirror images (REPA's public run)")
    p.add_argument("--norm", choices=Normalizer.needs, help="Table 11; default: max-min, public VAEs none")
    p.add_argument("--std", type=number(1e-30), help="target of --norm std (0.835, SD-VAE's) or channel (1)")
    p.add_argument("--stats", help="latent statistics (a json file), or 'paper': Eq. 8's printed ones")
    p.add_argument("--model", default="XL", help="a row of SIZES, with the patch as in XL/2 (default 2)")
    p.add_argument("--process", choices=["sit", "dit"], default="sit")
    p.add_argument("--repa", action="store_true", help="align the transformer's features too (Table 9)")
    p.add_argument("--dino", default="vitb14", help="with --repa: REPA's teacher")
    p.add_argument("--repa-weight", type=number(0), default=0.5)
    p.add_argument("--drop", type=number(0, 1), default=0.1, help="share of labels made the null label")
    p.add_argument("--ema", type=number(0, 1), default=0.9999)
    p.add_argument("--steps", type=positive, default=400000)
    p.add_argument("--keep", type=positive, default=50000, help="steps between milestones, NNNNNNN.pt")
    p.add_argument("--checkpointing", action="store_true", help="compute activations twice to save memory")
    add_run_flags(p, out="out/sit", batch=256, lr=1e-4, schedule="constant", weight_decay=0.0)
    p.set_defaults(clip=None)
    args = p.parse_args()
    vars(args).update({k: p.get_default(k) for k in ungiven})
    if args.std is not None and args.norm is None:
        p.error("--std goes with --norm std or channel")
    if args.clip is None:
        args.clip = 1.0 if args.repa else 0.0             # REPA's own setting, and DiT's and SiT's
    return args


# ----------------------------------------------------------------------------------------------- latent cache


class Cache(torch.utils.data.Dataset):
    """Posterior moments of all images and their mirror images: one memory map, fp16 [N, 2, 2C, h, w] (mean,
    log variance; [N, 1, ...] without flips). [i, flip] -> fp16 [2C,h,w]."""

    def __init__(self, folder, manifest):
        self.folder, self.manifest = folder, manifest
        self.moments = open_array(folder / "moments.npy", "r", manifest["shape"])
        self.labels = open_array(folder / "labels.npy", "r", manifest["shape"][:1])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, key):
        return torch.from_numpy(self.moments[key].copy())

    def __reduce__(self):
        return type(self), (self.folder, self.manifest)   # a loader process must not be sent 40 GiB

    def statistics(self, n=10000):
        """Of raw posterior samples of n images: a function of the cache alone, whatever a run's seed."""
        chosen = rng(0, "subset").permutation(len(self))[:n].tolist()
        posteriors = ((i, Gaussian(self[i, 0][None])) for i in chosen)
        samples = (q.sample(normal(q.mean.shape, 0, "sample", i)) for i, q in posteriors)
        return statistics(samples, shared=False)


class Readable(torch.utils.data.Dataset):
    """[i] -> image uint8 [3,S,S] and label of the first item from i on that can be read."""

    def __init__(self, images):
        self.images = images

    def __getitem__(self, i):
        return self.images.first_readable(i)


def open_cache(args, vae, images, device, chunk=64):
    """The latent cache of these images under this VAE: as it is, completed, or built. It is filled in chunks
    of fixed indices, by all ranks at once, so its bytes depend neither on their number nor on interruptions.
    The statistics of its latents lie beside it."""
    side, flips = args.size // vae.f, 1 if args.no_flip else 2
    shape = (len(images), flips, 2 * vae.z_channels, side, side)
    manifest = {"vae": fingerprint(vae, vae.encoder_parts), "data": images.fingerprint, "size": args.size}
    manifest |= {"shape": shape, "classes": images.classes}
    name = f"{manifest['vae'][:8]}-{manifest['data'][:8]}-{args.size}-{flips}"
    folder = Path(args.cache or f"out/latents/{name}")
    begun = same_manifest(folder, manifest, "--cache")
    whole = begun and bool(open_array(folder / "done.npy", "r", shape[:1]).all())
    if not all(everyone(whole)):                          # asked once, together: others may be slow to look
        with lock(folder, "--cache"):
            if rank() == 0 and not same_manifest(folder, manifest, "--cache"):
                make_arrays(folder, shape, manifest)
            barrier()
            encode(args, vae, images, folder, device, chunk, flips)
            barrier()
    else:
        print0(f"{folder}: encoded before; delete it where the code that crops or encodes has changed")
    cache, file = Cache(folder, manifest), folder / "statistics.json"
    if not file.is_file() and rank() == 0:
        save(cache.statistics(), file)
    barrier()
    cache.stats = read_json(file)
    return cache


def open_array(file, mode, shape=None):
    """A memory map of a cache's array; UserError where it is damaged."""
    try:
        array = np.load(file, mmap_mode=mode)
    except (OSError, ValueError, EOFError) as e:
        raise UserError(f"{file} is damaged ({e}): delete its folder") from None
    if shape and array.shape != tuple(shape):
        raise UserError(f"{file} is damaged (shape {array.shape}, not {tuple(shape)}): delete its folder")
    return array


def make_arrays(folder, shape, manifest):
    """The cache's empty arrays, and the manifest that says what they will be made of."""
    check_space(folder, 2 * math.prod(shape), "--cache")
    arrays = {"moments": (np.float16, shape), "labels": (np.int64, shape[:1]), "done": (np.uint8, shape[:1])}
    for name, (dtype, its_shape) in arrays.items():
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, its_shape).flush()
        if hasattr(os, "posix_fallocate"):                # a full disk says so now; later it would kill
            with open(folder / f"{name}.npy", "r+b") as f:
                reserve(f)
    save(manifest, folder / "manifest.json")


def reserve(file):
    """Takes a file's space on its disk, where the file system knows how."""
    try:
        os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    except OSError as e:
        if e.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


@torch.no_grad()
def encode(args, vae, images, folder, device, chunk, flips):
    """Fills this rank's share of what the cache still lacks."""
    moments, labels, done = (open_array(folder / f"{n}.npy", "r+") for n in ("moments", "labels", "done"))
    bar = progress(len(images), "encoding", done=int(done.sum()))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))        # one machine: two would share pages of the map
    parts = missing_ranges(done, chunk, local)
    for (x, y), part in zip(loader(Readable(images), parts, args), parts):
        x = from_uint8(x.to(device))
        views = torch.stack([vae.moments(v) for v in (x, x.flip(-1))[:flips]], 1).half()    # [B,2,2C,h,w]
        if not views.isfinite().all():
            raise UserError(f"{folder}: the VAE gives latents that are not finite, from image {part[0]} on")
        place = slice(part.start, part.stop)
        moments[place] = views.cpu().numpy()
        labels[place] = y
        moments.flush()                                   # the data first, then the word that it is there
        labels.flush()
        done[place] = 1
        done.flush()
        bar.update(min(len(x) * local, len(images) - bar.n))
    bar.close()


def normalizer(args, vae, cache, ckpt):
    """Eq. 7-8 for this VAE, by the statistics of --stats or its folder, else the checkpoint's or cache's.
    UserError where the checkpoint was trained with another one."""
    stats = vae.info.get("latents")
    if args.stats:
        stats = PAPER if args.stats == "paper" else read_json(args.stats)
    kind = args.norm or ("max-min" if stats else "none")
    saved = Normalizer(**ckpt["info"]["normalizer"]) if "info" in ckpt else None
    fallback = saved.stats if saved else cache.stats
    norm = Normalizer(kind, stats or fallback, args.std, (vae.factor, vae.shift))
    if saved and (saved.scale, saved.shift) != (norm.scale, norm.shift):
        raise UserError(f"{args.out} was trained with {saved}; --stats or reals.json says {norm}")
    std, said = norm.std_of(cache.stats), (stats or {}).get("std") or cache.stats["std"]
    if not 2 / 3 <= said / cache.stats["std"] <= 3 / 2:
        print0(f"warning: {args.stats or 'reals.json'} says: latents have std {said:.3f}; of another VAE?")
    print0(f"latents: raw std {cache.stats['std']:.4f}; {norm}, std {std:.3f}")
    if not 0.3 <= std <= 3:
        print0(f"warning: the generator's latents have std {std:.3f}, outside 0.3..3; --norm std mends it")
    return norm


class Draws(torch.utils.data.Dataset):
    """A latent with all its random draws, made in the loader's workers: [step, place in the global batch] ->
    moments [2C,h,w] in fp16, the posterior's noise and the process's [C,h,w], u in [0,1), y, and for REPA the
    image uint8 [3,S,S] (else empty)."""

    def __init__(self, cache, images, args):
        self.cache, self.images, self.args = cache, images if args.repa else None, args
        self.null = len(cache.manifest["classes"])         # the label that stands for none, as in Guided

    def __getitem__(self, key):
        args, (step, place) = self.args, key
        seed_torch(args.seed, "torch", step, place)         # torchvision's augmentations resume, too
        i = shuffled_index(args.seed, len(self.cache), step * args.batch + place)
        g = rng(args.seed, "noise", step, place)
        flip, drop, u = g.random(3)
        flip = int(flip < 0.5 and not args.no_flip)
        moments = self.cache[i, flip]
        posterior_noise, noise = torch.from_numpy(g.standard_normal(moments.shape, dtype=np.float32)).chunk(2)
        y = self.null if drop < args.drop or not self.null else int(self.cache.labels[i])
        image = torch.empty(0) if self.images is None else self.images.first_readable(i)[0]
        image = image.flip(-1) if flip else image
        return moments, posterior_noise, noise, u, y, image


# --------------------------------------------------------------------------------------------------- training


def build(args, vae, images, device, dtype):
    """The generator, its EMA, and REPA's teacher (or None), on the device."""
    if args.size % vae.f:
        raise UserError(f"--size {args.size} is not a multiple of {vae.f}, this VAE's downsampling factor")
    row, teacher, repa = size(args.model), None, None
    if args.repa:
        teacher = load_teacher(args.dino, repa=True).to(device)
        repa = [REPA_DEPTH.get(args.model.split("/")[0], row["depth"] // 3), teacher.dim]
    row |= dict(input_size=args.size // vae.f, channels=vae.z_channels, classes=len(images.classes))
    seed_torch(args.seed, "init")
    net = SiT(**row, process=args.process, repa=repa).to(device, dtype)
    net.grad_checkpoint = args.checkpointing
    with torch.device("meta"):                # as sample.py will: what does not build so fails with its line
        SiT(**net.settings)
    ema = SiT.load({"settings": net.settings, "ema": net.state_dict()}).requires_grad_(False)
    if args.compile:
        for block in (*net.blocks, net.final_layer, *(teacher.blocks if teacher else ())):
            block.compile()  # one compiled block serves them all: seconds, not minutes
    return net, ema, teacher


@torch.no_grad()
def update_ema(ema, net, decay):
    """EMA <- decay * EMA + (1 - decay) * weights, over all parameters at once; buffers are copied."""
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
    for ours, theirs in zip(ema.buffers(), net.buffers()):
        ours.copy_(theirs)


def schedule(step, args):
    """What to multiply a learning rate by: linear --warmup; with --schedule cosine down to 0 at --steps."""
    scale = min(1, (step + 1) / args.warmup) if args.warmup else 1
    if args.schedule == "cosine":
        scale *= 0.5 * (1 + math.cos(math.pi * step / args.steps))
    return scale


@torch.no_grad()
def sample_grid(args, ema, norm, vae, classes, path, n=16):
    """A PNG of n images from the EMA, at noise and labels that never change: 32 steps, guidance 2."""
    device, process = ema.pos_embed.device, process_of(ema)

    def draw(purpose, *k):
        shape = (ema.channels, ema.settings["input_size"], ema.settings["input_size"])
        return torch.stack([normal(shape, args.seed, purpose, i, *k) for i in range(n)]).to(ema.pos_embed)

    y = torch.arange(n, device=device) % max(ema.classes, 1)
    guided = Guided(ema, 2.0 if ema.classes else 1.0)
    sampler = "euler" if ema.process == "sit" else "ddpm"
    z = process.sample(guided, draw("sample"), y, sampler, steps=32, draw=lambda k: draw("step", k))
    images = to_uint8(vae.decode(norm.decode(z).float()))
    save_picture(images, path, names=[classes[c] for c in y.tolist()] if classes else None)


def flops(net):
    """Multiply-accumulates x 2 of one forward pass of one image (a training step takes three times that)."""
    n, d, patch = net.grid**2, net.settings["dim"], net.patch**2
    block = n * 12 * d * d + 2 * n * n * d + 6 * d * d
    ends = n * patch * net.channels * d + 256 * d + d * d + n * d * patch * net.out_channels + 2 * d * d
    return 2 * (net.settings["depth"] * block + ends)


def mfu(net, rate):
    """{"MFU": useful FLOPs (three forwards) at this rate, over the GPUs' dense bf16 peak}, or {}."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = [v for k, v in PEAK.items() if k in name]
    return {"MFU": 3 * flops(net) * rate / (peak[0] * world())} if peak else {}


def main():
    args = flags()
    device = start(args)
    dtype = torch.float64 if args.dtype == "fp64" else torch.float32        # of weights and losses
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=args.dtype == "bf16")
    accumulation = accumulation_steps(args)

    vae, images = VAE.load(args.vae).requires_grad_(False), Images(args.data, args.size)
    if 0 < len(images.stray) < len(images):
        raise UserError(f"--data {args.data}: {images.stray[0]} lies beside the class folders: move it")
    net, ema, teacher = build(args, vae, images, device, dtype)
    process = process_of(net, device)
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, args.lr, args.betas, weight_decay=args.weight_decay, fused=True)
    rates = [group["lr"] for group in optimizer.param_groups]               # times schedule()
    parts = {"net": net, "ema": ema, "optimizer": optimizer}

    hashes = {"data": images.fingerprint, "vae": fingerprint(vae, vae.encoder_parts)}
    hashes["teacher"] = fingerprint(teacher) if teacher is not None else None
    ckpt = resume(args, flags, hashes, parts)
    start_step = ckpt["step"]
    cache = open_cache(args, vae.to(device), images, device)
    norm = normalizer(args, vae, cache, ckpt)
    info = {"normalizer": norm.state_dict(), "size": args.size, "classes": images.classes, "data": args.data}
    info["vae"] = {"source": args.vae, "hash": hashes["vae"], "beside": args.vae}
    with contextlib.suppress(ValueError):                                   # on Windows, on another drive
        info["vae"]["beside"] = os.path.relpath(args.vae, args.out)
    reader = {"settings": net.settings, "info": info}                       # what sample.py reads

    model = DDP(net) if world() > 1 else net           # all that learns lies in net: DDP and clipping see it
    batches = loader(Draws(cache, images, args), micro_batches(args, start_step), args)
    count = sum(p.numel() for p in net.parameters())
    print0(f"{args.process} {args.model}: {count:,} parameters, {len(cache):,} images, {net.classes} classes")
    print0(f"{args.steps:,} steps of {args.batch}, {world()} process(es), {args.dtype} on {device.type}")

    save_run = functools.partial(save_checkpoint, args, parts, {**hashes, **reader})
    with lock(args.out), Stop(save_run, start_step) as stop:
        size = sum(p.nbytes for p in net.parameters())          # a checkpoint: net, EMA, AdamW's two moments
        log = Log(args, start_step, 4 * size, math.ceil(args.steps / args.keep) * size)
        bar = progress(args.steps * args.batch, "stage 2", done=start_step * args.batch)
        by_time = torch.zeros(2, 10, dtype=torch.float64, device=device)    # sums and counts of the loss
        for step in range(start_step, args.steps):
            for k in range(accumulation):
                batch = (v.to(device, non_blocking=True) for v in next(batches))
                moments, posterior_noise, noise, u, y, pictures = batch
                seed_torch(args.seed, "torch", step, k, rank())             # so dropout resumes
                x = norm.encode(Gaussian(moments).sample(posterior_noise)).to(dtype)        # [B,C,h,w]
                noise, t = noise.to(dtype), process.time(u)                 # sit: t = 0 noise, 1 data
                assert posterior_noise.shape == noise.shape == x.shape      # others would be broadcast
                model.require_backward_grad_sync = k == accumulation - 1    # DDP sums gradients once a step
                with autocast():
                    out, tokens = model(process.noised(x, noise, t), t, y, return_tokens=True)
                each = process.loss(out.to(dtype), x, noise, t)             # [B]
                terms = {"loss": (1.0, each)}             # name: (weight, a number or [B]; raw values [B])
                if teacher is not None:
                    with torch.no_grad(), autocast():
                        target, _ = teacher.targets(from_uint8(pictures), net.grid)         # [B,N,D]
                    repa = repa_loss(tokens.to(dtype), target.to(dtype))    # [B]
                    terms["repa"] = args.repa_weight, repa
                loss = sum((weight * values).mean() for weight, values in terms.values())
                (loss / accumulation).backward()
                log.add({name: values.mean() for name, (_, values) in terms.items()}, accumulation)
                counted = torch.stack([each.detach().double(), torch.ones_like(u)])
                by_time.index_add_(1, (u * 10).long(), counted)

            norm_of_gradient = nn.utils.clip_grad_norm_(net.parameters(), args.clip or math.inf)
            finite, stopping = stop.look((norm_of_gradient + loss.detach()).isfinite())
            share = schedule(step, args)
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * share
            if finite:
                optimizer.step()
                update_ema(ema, net, args.ema)
            optimizer.zero_grad()
            log.add({"grad norm": norm_of_gradient})

            done = step + 1
            bar.update(args.batch)
            if done % args.log_every == 0 or done == args.steps:
                sums, counts = total(by_time).tolist()
                means = [a / b if b else None for a, b in zip(sums, counts)]
                rate = optimizer.param_groups[0]["lr"]
                log.line(done, {"lr": rate, **mfu(net, log.rate(done)), "by time": means})
                by_time.zero_()
            last = done == args.steps or stopping
            if rank() == 0 and (done % args.keep == 0 or done == args.steps):
                with survive(f"{args.out}/{done:07d}.pt", last):
                    save({"step": done, "ema": ema.state_dict(), **reader}, f"{args.out}/{done:07d}.pt")
            if done % args.save_every == 0 or last:
                save_run(done, last)
            if rank() == 0 and (done % args.picture_every == 0 or done == args.steps):
                with survive(f"{args.out}/pictures", last):
                    sample_grid(args, ema, norm, vae, images.classes, f"{args.out}/pictures/{done:07d}.png")
            stop.heed(done)
        bar.close()
    guided = " --cfg 1.8" if net.classes else ""
    print0(f"{args.out} is finished; next:\n  python sample.py --ckpt {shlex.quote(args.out)}{guided}")


if __name__ == "__main__":
    run_script(main)
