"""Stage 2 of ReaLS: train an unchanged SiT or DiT, with or without REPA, on the latents of any VAE (Tables 1, 3-7, 9, 11).

    torchrun --nproc_per_node=8 train_sit.py --model XL                        # the paper's run on out/vae
    torchrun --nproc_per_node=8 train_sit.py --model B --vae sd-vae-ft-ema     # a baseline row

Each image is encoded once, with its mirror image, into a cache of posterior moments; a posterior sample, time, noise and
label drop are drawn anew at each step. --out holds ckpt.pt to go on from, and NNNNNNN.pt, the EMA at each milestone.
"""
import argparse
import copy
import time
from pathlib import Path

import numpy as np
import torch

import vae as V
from dino import DINOv2
from sit import Diffusion, Flow, Guided, SiT, repa_loss

PEAK = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}   # dense bf16 FLOP/s; the first that fits
REPA_DEPTH = {"T": 2, "S": 4, "B": 4, "L": 8, "XL": 8}    # blocks before the projector (Yu et al. 2024)


def flags():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", default="imagenet/train", help="folder of images, one subfolder per class")
    p.add_argument("--size", type=int, default=256, help="side of the images in pixels")
    p.add_argument("--vae", default="out/vae", help="a run of train_vae.py, a VAE's folder or file, or a public name (sd-vae-ft-ema)")
    p.add_argument("--cache", help="folder of the latent cache; default: out/latents/ and the hashes of VAE and data")
    p.add_argument("--no-flip", action="store_true", help="no mirror images (REPA's public run)")
    p.add_argument("--norm", choices=["max-min", "std", "none"],
                   help="Eq. 7 or its rivals (Table 11); default: max-min for a VAE of ours, none for a public SD-VAE")
    p.add_argument("--std", type=float, help="with --norm std: the standard deviation asked for; default: SD-VAE's 0.835")
    p.add_argument("--stats", help="latent statistics (a json file), or 'paper': Eq. 8's printed ones")
    p.add_argument("--model", default="XL", help="T, S, B, L or XL, with the patch as in XL/2 (default 2)")
    p.add_argument("--process", choices=["sit", "dit"], default="sit")
    p.add_argument("--repa", action="store_true", help="align the transformer's features too (Table 9)")
    p.add_argument("--dino", default="vitb14", help="with --repa: REPA's teacher")
    p.add_argument("--repa-weight", type=float, default=0.5)
    p.add_argument("--drop", type=float, default=0.1, help="share of labels replaced by the null label")
    p.add_argument("--ema", type=float, default=0.9999)
    p.add_argument("--steps", type=int, default=400000)
    p.add_argument("--keep", type=int, default=50000, help="steps between milestones, NNNNNNN.pt")
    p.add_argument("--schedule", choices=["cosine", "constant"], default="constant")
    p.add_argument("--weight-decay", type=float, default=0.0)
    p.add_argument("--checkpointing", action="store_true", help="compute activations twice to save memory")
    V.run_flags(p, out="out/sit", batch=256, lr=1e-4)
    p.set_defaults(clip=None)
    args = p.parse_args()
    if args.std is not None and args.norm is None:
        p.error("--std goes with --norm std")
    if args.clip is None:
        args.clip = 1.0 if args.repa else 0.0             # REPA's own setting, and DiT's and SiT's
    return args


# ------------------------------------------------------------------------------------------------------- latent cache


class Cache(torch.utils.data.Dataset):
    """Posterior moments of all images and their mirror images: one memory map, fp16 [N, 2, 2C, h, w] (mean, log variance;
    [N, 1, ...] without flips). [i, flip] -> the posterior, [1,C,h,w] float32. Opened by each loader process for itself."""

    def __init__(self, folder, shape, meta):
        self.file, self.shape, self.meta, self.map = folder / "moments.npy", shape, meta, None
        self.labels = np.load(folder / "labels.npy")

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, key):
        if self.map is None:
            self.map = np.load(self.file, mmap_mode="r")
        i, flip = key
        return V.Gaussian(torch.from_numpy(self.map[i, flip].astype(np.float32))[None])

    def __getstate__(self):
        return {**self.__dict__, "map": None}             # a loader process must not be sent 40 GiB

    def statistics(self, n=10000):
        """Of raw posterior samples of n images: a function of the cache alone, whatever a run's seed."""
        def latents():
            for i in V.rng(0, "subset").permutation(len(self))[:n].tolist():
                posterior = self[i, 0]
                yield posterior.sample(V.normal(posterior.mean.shape, 0, "sample", i))
        return V.statistics(latents())


class Chunks(torch.utils.data.Dataset):
    """A range of indices -> (the first one, its images uint8 [B,3,S,S], labels [B], the paths of unreadable files)."""

    def __init__(self, images, ranges):
        self.images, self.ranges = images, ranges

    def __len__(self):
        return len(self.ranges)

    def __getitem__(self, k):
        items = [self.images.near(i) for i in self.ranges[k]]
        x, labels, bad = zip(*items)
        return self.ranges[k][0], torch.stack(x), np.array(labels), [self.images.paths[i] for part in bad for i in part]


def open_cache(args, run, net, images, chunk=64):
    """The latent cache of these images under this VAE: as it lies there, completed, or built. It is filled in chunks of
    fixed indices, by all ranks at once, so its bytes depend neither on their number nor on interruptions. Its latents'
    statistics lie beside it."""
    side, flips = args.size // net.f, 1 if args.no_flip else 2
    shape = (len(images), flips, 2 * net.z_channels, side, side)
    meta = {"vae": V.fingerprint(net), "data": images.fingerprint, "size": args.size, "shape": shape, "classes": images.classes}
    folder = Path(args.cache or f"out/latents/{meta['vae'][:8]}-{meta['data'][:8]}-{args.size}-{flips}")
    store = V.Store(run, folder, {"moments": (np.float16, shape), "labels": (np.int64, shape[:1])}, meta, "--cache")
    if not store.whole:
        encode(args, run, net, images, store, store.todo(run, chunk), flips)
        run.unlock()
    cache, known = Cache(folder, shape, meta), folder / "statistics.json"
    if run.main and not known.is_file():
        V.save_json(known, cache.statistics())
    run.barrier()
    cache.stats = V.read_json(known)
    return cache


def encode(args, run, net, images, store, todo, flips):
    """Fills this rank's ranges of the cache."""
    loader = torch.utils.data.DataLoader(Chunks(images, todo), batch_size=None, num_workers=args.workers, worker_init_fn=V.deaf)
    blank = torch.zeros(len(todo[0]) if todo else 1, 3, args.size, args.size, device=run.device)
    for x in (blank[:1], blank):                          # the first call also sets a GPU up
        start = time.time()
        with torch.no_grad():
            net.encode(x).mean.cpu()
    run.print(f"encoding: about {(time.time() - start) * flips * len(todo) / 60:.1f} minutes")
    bar, unread = run.bar(len(images), "encoding", initial=int(store.done.sum())), []
    for first, x, labels, bad in loader:
        x = V.from_uint8(x.to(run.device))
        with torch.no_grad():
            views = [net.encode(v) for v in (x, x.flip(-1))[:flips]]
        moments = torch.stack([torch.cat([q.mean, q.logvar], 1) for q in views], 1)      # [B, 2, 2C, h, w]
        store.put(first, moments=moments.half().cpu().numpy(), labels=labels)
        bar.update(min(len(x) * run.world, len(images) - bar.n))
        unread += bad
    bar.close()
    if unread := sorted({path for part in run.all(unread) for path in part}):     # all processes wait here for the slowest
        run.print(f"{len(unread)} unreadable files, in whose places stand the images after them: " + ", ".join(unread))


def printed_stats(args, vae):
    """The latent statistics that --stats or the VAE's folder holds, or None: then the cache's own are taken."""
    if args.stats == "paper":
        return V.PAPER
    return V.read_json(args.stats) if args.stats else vae.info.get("latents")


def normalizer(args, run, stats, cache, ckpt=None):
    """Eq. 7-8 for this VAE: by the given statistics, or those of the run that goes on, or the cache's; says the std that results."""
    kind = args.norm or ("max-min" if stats else "none")
    norm = V.Normalizer(kind, stats or (ckpt["normalizer"]["stats"] if ckpt else cache.stats), args.std)
    std = norm.scale * cache.stats["std"]
    run.print(f"latents: raw std {cache.stats['std']:.4f}; {kind}: x = {norm.scale:.5f} z {norm.shift:+.5f}, std {std:.3f}")
    if not 0.3 <= std <= 3:
        run.print(f"warning: the generator will see latents of std {std:.3f}; outside 0.3..3 training suffers (--norm std sets it)")
    return norm


class Draws(torch.utils.data.Dataset):
    """A micro-batch with all its random draws, made in the loader's workers: (step, places in the global batch) ->
    x, noise [B,C,h,w], t in [0,1) [B], y [B], and for REPA the images uint8 [B,3,S,S] (else empty)."""

    def __init__(self, cache, images, norm, args):
        self.cache, self.images, self.norm, self.args = cache, images if args.repa else None, norm, args
        self.null = len(cache.meta["classes"])            # never 1000 by hand

    def __getitem__(self, work):
        step, places = work
        return [torch.stack(part) for part in zip(*(self.draw(step, place) for place in places))]

    def draw(self, step, place):
        a = self.args
        i = V.order(a.seed, len(self.cache), step * a.batch + place)
        g = V.rng(a.seed, "noise", step, place)
        flip, drop, t = g.random(3)
        flip = int(flip < 0.5 and not a.no_flip)
        posterior = self.cache[i, flip]
        eps, noise = torch.from_numpy(g.standard_normal((2, *posterior.mean.shape[1:]), dtype=np.float32))
        x = self.norm.encode(posterior.sample(eps)[0])
        y = self.null if drop < a.drop or not self.null else int(self.cache.labels[i])
        image = torch.empty(0) if self.images is None else self.images.near(i)[0]
        return x, noise, torch.tensor(t), torch.tensor(y), image.flip(-1) if flip else image


# ------------------------------------------------------------------------------------------------------------ training


class Objective:
    """The per-sample loss of a process, plus REPA's term."""

    def __init__(self, args, run, teacher, grid):
        self.process = Flow() if args.process == "sit" else Diffusion(device=run.device)
        self.args, self.device, self.teacher, self.grid = args, run.device, teacher, grid
        self.dtype = torch.float64 if args.dtype == "fp64" else torch.float32
        self.autocast = lambda: torch.autocast(run.device.type, torch.bfloat16, enabled=args.dtype == "bf16")

    def __call__(self, model, x, noise, t, y, images):
        """-> loss [B] of the process, REPA's loss [B] or None."""
        tokens = None

        def network(*inputs):
            nonlocal tokens
            if self.teacher is None:
                return model(*inputs)
            out, tokens = model(*inputs, return_tokens=True)
            return out

        t = t.to(self.dtype) if self.args.process == "sit" else (t * self.process.steps).long()
        with self.autocast():
            loss = self.process.loss(network, x, y, noise, t)
        if self.teacher is None:
            return loss, None
        with torch.no_grad(), self.autocast():
            target = self.teacher.targets(V.from_uint8(images), self.grid)[0]
        return loss, repa_loss(tokens.to(self.dtype), target.to(self.dtype))


def train_step(args, step, batches, model, net, objective, optimizer, bins):
    """One update from this process's micro-batches -> {name: scalar tensor}; bins [2,10] gathers loss and count by time."""
    seen = {}
    for micro in range(args.accumulate):
        x, noise, t, y, images = (v.to(objective.device, non_blocking=True) for v in next(batches))
        if model is not net:
            model.require_backward_grad_sync = micro == args.accumulate - 1   # gradients travel with the last micro-batch
        loss, repa = objective(model, x.to(objective.dtype), noise.to(objective.dtype), t, y, images)
        total = loss.mean() if repa is None else loss.mean() + args.repa_weight * repa.mean()
        (total / args.accumulate).backward()
        bins.index_add_(1, (t * 10).long(), torch.stack([loss.detach().to(bins), torch.ones_like(t).to(bins)]))
        for k, v in {"loss": loss, **({} if repa is None else {"repa": repa})}.items():
            seen[k] = seen.get(k, 0) + v.detach().mean() / args.accumulate
    optimizer.param_groups[0]["lr"] = V.learning_rate(args, step)
    [seen["grad norm"]] = V.update([(optimizer, net)], args.clip, step)
    return seen


@torch.no_grad()
def follow(ema, net, decay):
    """EMA <- decay * EMA + (1 - decay) * weights, over all parameters at once."""
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)


@torch.no_grad()
def sample_grid(args, ema, norm, decoder, device, path, n=16):
    """A PNG of n images from the EMA, at noise and labels that never change: 32 steps, guidance 2."""
    s = ema.settings

    def draw(purpose, *k):
        shape = (s["channels"], s["input_size"], s["input_size"])
        return torch.stack([V.normal(shape, args.seed, purpose, i, *k) for i in range(n)]).to(device, ema.pos_embed.dtype)

    y = torch.arange(n, device=device) % max(s["classes"], 1)
    guided = Guided(ema, 2.0 if s["classes"] else 1.0)
    how = {"sampler": "euler"} if s["process"] == "sit" else {"draw": lambda k: draw("step", k)}
    process = Flow() if s["process"] == "sit" else Diffusion()
    z = norm.decode(process.sample(guided, draw("sample"), y, steps=32, **how))
    with V.atomic(path) as f:
        V.grid(V.to_uint8(decoder.decode(z.to(device, torch.float32))), columns=8).save(f, "PNG")


def flops(s):
    """Multiply-accumulates x 2 of one forward pass of one image (a training step takes three times that)."""
    n, d, out = (s["input_size"] // s["patch"])**2, s["dim"], s["patch"]**2 * s["out_channels"]
    block = n * 12 * d * d + 2 * n * n * d + 6 * d * d
    ends = n * s["patch"]**2 * s["channels"] * d + 256 * d + d * d + n * d * out + 2 * d * d
    return 2 * (s["depth"] * block + ends)


def reader_part(args, net, ema, norm, cache, step):
    """What whoever samples from a checkpoint needs, and nothing else."""
    return {"step": step, "model": net.settings, "process": args.process, "normalizer": norm.state(), "size": args.size,
            "classes": cache.meta["classes"], "vae": {"source": str(args.vae), "hash": cache.meta["vae"]},
            "ema": {k: v for k, v in ema.state_dict().items() if not k.startswith("projectors.")}}


def save(args, run, step, net, ema, optimizer, norm, cache, milestone):
    """ckpt.pt, from which the run goes on, and at a milestone STEP.pt with what a reader needs (reader_part)."""
    if run.main:
        part = reader_part(args, net, ema, norm, cache, step)
        if milestone:
            V.save(part, Path(args.out) / f"{step:07d}.pt")
        projectors = {k: v for k, v in ema.state_dict().items() if k.startswith("projectors.")}
        V.save({**part, "settings": vars(args), "data": cache.meta["data"], "vae_hash": cache.meta["vae"], "weights": net.state_dict(),
                "ema projectors": projectors, "optimizer": optimizer.state_dict()}, Path(args.out) / "ckpt.pt")
    run.barrier()


def resume(ckpt, net, ema, optimizer, norm):
    """The step to go on from; weights, EMA and optimiser are filled from a checkpoint, if there is one."""
    if ckpt is None:
        return 0
    before = V.Normalizer(**ckpt["normalizer"])
    if (before.scale, before.shift) != (norm.scale, norm.shift):
        raise ValueError(f"the checkpoint was trained with x = {before.scale:.5f} z {before.shift:+.5f}, now it would be "
                         f"{norm.scale:.5f} z {norm.shift:+.5f}: --stats or the VAE's reals.json has changed")
    net.load_state_dict(ckpt["weights"])
    ema.load_state_dict({**ckpt["ema"], **ckpt["ema projectors"]})
    optimizer.load_state_dict(ckpt["optimizer"])
    return ckpt["step"]


def build(args, run, vae, images):
    """The generator and its EMA, and REPA's teacher, on the device."""
    teacher, repa, size = None, None, args.model.split("/")[0]
    if args.size % vae.f or size not in REPA_DEPTH:
        raise ValueError(f"--size {args.size} is not a multiple of {vae.f}, this VAE's downsampling factor" if args.size % vae.f else
                         f"--model {args.model}: {', '.join(REPA_DEPTH)} are known, with /1 /2 /4 or /8 for the patch")
    if args.repa:
        with run.first():
            teacher = DINOv2.load(args.dino).to(run.device).eval().requires_grad_(False)
        teacher.offset = 0                                # REPA's position rule, not Meta's
        repa = (REPA_DEPTH[size], teacher.dim)
    torch.manual_seed(int(V.rng(args.seed, "init").integers(2**31)))
    net = SiT(args.model, input_size=args.size // vae.f, channels=vae.z_channels, classes=len(images.classes),
              process=args.process, repa=repa)
    net = net.to(run.device, torch.float64 if args.dtype == "fp64" else torch.float32)
    net.grad_checkpoint = args.checkpointing
    return net, copy.deepcopy(net).eval().requires_grad_(False), teacher


def main():
    args, run = flags(), V.Run()
    V.settle(args, run)
    with run.first():
        vae = V.VAE.load(args.vae).requires_grad_(False)
    images = V.Images(args.data, args.size)
    if 0 < len(images.stray) < len(images):
        raise ValueError(f"--data {args.data}: {images.stray[0]} lies beside the class folders; move it into one, or away")
    net, ema, teacher = build(args, run, vae, images)
    stats = printed_stats(args, vae)
    same = {k: v for k, v in vars(args).items() if k != "steps" or args.schedule == "cosine"}   # a constant rate may go on longer
    ckpt = V.checkpoint_of(run, args.out, same, {"data": images.fingerprint, "vae_hash": V.fingerprint(vae)})
    run.lock(args.out)
    cache = open_cache(args, run, vae.to(run.device), images)
    norm = normalizer(args, run, stats, cache, ckpt)

    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, args.lr, args.betas, weight_decay=args.weight_decay, fused=True)
    start = resume(ckpt, net, ema, optimizer, norm)
    del ckpt
    if args.compile:
        for block in (*net.blocks, net.final_layer, *(teacher.blocks if teacher else ())):
            block.compile()                               # one compiled block serves them all: seconds instead of minutes
    model, objective = run.parallel(net), Objective(args, run, teacher, net.grid)
    batches = V.loader(Draws(cache, images, norm, args), run, args, start)

    run.print(f"{args.process} {args.model}: {sum(p.numel() for p in net.parameters()):,} parameters, {len(cache):,} images, "
              f"{net.classes} classes, {args.steps:,} steps of {args.batch}, {run.world} process(es), {args.dtype} on {run.device.type}")
    run.catch_stop()
    bar, log = run.bar(args.steps * args.batch, "stage 2", initial=start * args.batch), V.Log(run, args, start)
    bins = torch.zeros(2, 10, dtype=torch.float64, device=run.device)
    for step in range(start, args.steps):
        log.add(train_step(args, step, batches, model, net, objective, optimizer, bins))
        follow(ema, net, args.ema)
        bar.update(args.batch)
        done, stop = step + 1, run.stopping()
        if done % args.log_every == 0 or done == args.steps:
            loss, count = run.sum(bins)
            line = log.line(done, lr=V.learning_rate(args, step), **mfu(net, run), bins=[(a / b).item() if b else None for a, b in zip(loss, count)])
            bar.set_postfix({"MFU": f"{line['MFU']:.0%}"} if "MFU" in line else {})
            bins.zero_()
        if run.main and (done % args.picture_every == 0 or done == args.steps):
            sample_grid(args, ema, norm, vae, run.device, Path(args.out) / "pictures" / f"{done:07d}.png")
        if done % args.save_every == 0 or done % args.keep == 0 or done == args.steps or stop:
            save(args, run, done, net, ema, optimizer, norm, cache, milestone=done % args.keep == 0 or done == args.steps)
        if stop:
            run.leave(done)
    bar.close()
    run.print(f"{args.out} is finished; next:\n  python sample.py --ckpt {args.out} --cfg 1.8")


def mfu(net, run):
    """{"MFU": a function of images/s} on a GPU whose dense bf16 peak is known: useful FLOPs (three forwards) over it."""
    name = torch.cuda.get_device_name() if run.device.type == "cuda" else ""
    peak = [v for k, v in PEAK.items() if k in name]
    return {"MFU": lambda rate: 3 * flops(net.settings) * rate / (peak[0] * run.world)} if peak else {}


if __name__ == "__main__":
    V.main(main)
