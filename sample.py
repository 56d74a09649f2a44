"""Samples from a trained SiT or DiT: pictures for the eye, 50,000 images for an evaluator, masks and depth from latents.

    python sample.py --cfg 1.8                                          # 16 pictures from out/sit, Table 4's best guidance
    torchrun --nproc_per_node=8 sample.py --cfg 1.8 --num-images 50000 --npz   # Table 4's 1.82: then fid.py
    python sample.py --cfg 4 --interval 0 1 --classes 207 360 --out out/figure3

Image i is a function of (--seed, i) alone: not of the batch size, of the number of processes, or of what else is drawn.
"""
import argparse
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import vae as V
from dino import Depth, Segmenter
from sit import Diffusion, Flow, Guided, SiT


def flags():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", default="out/sit", help="a run of train_sit.py, one of its files, a public name, or a public .pt")
    p.add_argument("--process", choices=["sit", "dit", "repa"], help="what a bare public file was trained for")
    p.add_argument("--vae", help="overrides the VAE named in the checkpoint (the weights must be the same); public: sd-vae-ft-ema")
    p.add_argument("--out", help="folder; default: out/pictures, with --npz FILE without its ending")
    p.add_argument("--num", "--num-images", type=int, default=16,
                   help="number of images; under torchrun write --num-images: it takes --num for an option of its own")
    p.add_argument("--npz", nargs="?", const="", metavar="FILE",
                   help="instead of PNGs write FILE.npz (arr_0 uint8 NHWC, arr_1 labels); default: OUT/samples.npz, OUT out/samples")
    p.add_argument("--classes", nargs="+", help="taken in turn: numbers, or names of class folders")
    p.add_argument("--labels", choices=["random", "balanced"], default="random", help="without --classes: how labels are drawn")
    p.add_argument("--sampler", choices=["sde", "euler", "heun", "ddpm"], help="default: sde for a SiT, ddpm for a DiT")
    p.add_argument("--steps", type=int, default=250)
    p.add_argument("--cfg", type=float, default=1.0, help="guidance scale; 1: none")
    p.add_argument("--interval", type=float, nargs=2, default=[0.0, 0.75], help="noise times (1 noise .. 0 data) that are guided")
    p.add_argument("--cfg-channels", type=int, help="guide the first so many channels (3: DiT's and SiT's published numbers)")
    p.add_argument("--tasks", nargs="+", choices=["seg", "depth", "pca"], default=[], help="from the latents (Figure 4)")
    p.add_argument("--seg-head", default="vitl14_voc2012", help="a public name (vitl14_ade20k) or a file")
    p.add_argument("--depth-head", default="moge-vitl", help="the public name or a file")
    p.add_argument("--batch", type=int, default=32, help="images a process draws at once")
    p.add_argument("--dtype", choices=["bf16", "fp32"], help="default: bf16 on a GPU that has it, else fp32")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    if args.npz and not args.npz.endswith(".npz"):
        p.error(f"--npz {args.npz}: the file's name must end in .npz")
    if args.num < 1 or args.batch < 1:
        p.error("--num and --batch are 1 at least")
    args.out = args.out or (args.npz[:-4] if args.npz else "out/pictures" if args.npz is None else "out/samples")
    return args


# ----------------------------------------------------------------------------------------------------------- sampling


def load(args, run):
    """(model, VAE, normaliser, class names) of a checkpoint of ours or a public one, on the device."""
    path = Path(args.ckpt, "ckpt.pt") if Path(args.ckpt).is_dir() else Path(args.ckpt)
    if args.ckpt == "out/sit" and not path.is_file():
        raise FileNotFoundError(f"--ckpt {args.ckpt}: no checkpoint here; train_sit.py makes one, --ckpt SiT-XL/2 takes the public one")
    with run.first():
        model = SiT.load(args.ckpt, process=args.process)
        ours = read_ours(path)
        vae = V.VAE.load(args.vae or ours.get("vae", {}).get("source", "sd-vae-ft-ema"))
    if ours and V.fingerprint(vae) != ours["vae"]["hash"]:
        raise ValueError(f"{args.ckpt} was trained on another VAE than {args.vae or ours['vae']['source']}; --vae names the right one")
    if vae.z_channels != model.channels:
        raise ValueError(f"{args.ckpt} paints {model.channels} latent channels, this VAE decodes {vae.z_channels}")
    norm = V.Normalizer(**ours.get("normalizer", {"kind": "none"}))
    return model.to(run.device).eval(), vae.to(run.device), norm, ours.get("classes", [])


def read_ours(path):
    """What a checkpoint of train_sit.py says beside its weights; {} for anything else."""
    if not path.is_file():
        return {}
    try:
        held = V.load_file(path)
    except ValueError:  # an official training checkpoint, which SiT.load has read
        return {}
    return held if "normalizer" in held else {}


def labels(args, model, names):
    """The label of each of --num images, a function of (seed, index): [N] int64."""
    if not model.classes:
        return np.zeros(args.num, np.int64)
    if args.classes:
        known = {str(i): i for i in range(model.classes)} | {name: i for i, name in enumerate(names)}
        unknown = [c for c in args.classes if c not in known]
        if unknown:
            raise ValueError(f"--classes {unknown[0]}: no such class (0 to {model.classes - 1}{', or ' + ', '.join(names[:5]) + ', ...' if names else ''})")
        return np.array([known[args.classes[i % len(args.classes)]] for i in range(args.num)])
    if args.labels == "balanced":
        return np.arange(args.num) % model.classes
    return np.array([V.rng(args.seed, "label", i).integers(model.classes) for i in range(args.num)])


@torch.no_grad()
def draw(args, guided, norm, indices, y, device):
    """Raw latents [B,C,h,w] of the images with these indices."""
    s = guided.model.settings
    shape = (s["channels"], s["input_size"], s["input_size"])

    def noise(purpose, *k):
        return torch.stack([V.normal(shape, args.seed, purpose, i, *k) for i in indices]).to(device)

    how = {} if args.sampler == "ddpm" else {"sampler": args.sampler}
    process = Diffusion() if guided.process == "dit" else Flow()
    with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16"):
        x = process.sample(guided, noise("sample"), torch.as_tensor(y, device=device), steps=args.steps,
                           draw=lambda k: noise("step", k), **how)
    return norm.decode(x)


# ------------------------------------------------------------------------------------- masks and depth from the latents


def foreground(features):
    """A mask without any head: the sign of the first principal component of patch features [B,N,D], the side that touches
    the border less being the foreground: bool [B,h,w]."""
    side = math.isqrt(features.shape[1])
    flat = features.flatten(0, 1)
    _, vectors = torch.linalg.eigh((flat - flat.mean(0)).T @ (flat - flat.mean(0)))
    mask = ((flat - flat.mean(0)) @ vectors[:, -1] > 0).view(-1, side, side)
    border = torch.ones(side, side, dtype=torch.bool, device=mask.device)
    border[1:-1, 1:-1] = False
    return ~mask if mask[:, border].float().mean() > mask[:, ~border].float().mean() else mask


def colour_depth(depth):
    """Depth [B,H,W] -> uint8 [B,3,H,W], near bright, far dark, equal steps in lightness: of 1 / depth, each image's own from
    its 2nd to its 98th percentile."""
    anchors = torch.tensor([[0, 0, 4], [80, 18, 123], [182, 54, 121], [251, 136, 97], [252, 253, 191]])   # magma
    near = (1 / depth).flatten(1)
    low, high = torch.quantile(near, torch.tensor([0.02, 0.98]).to(near), dim=1, keepdim=True)
    at = ((near - low) / (high - low).clamp_min(1e-12)).clamp(0, 1).view(depth.shape) * (len(anchors) - 1)
    low = at.long().clamp_max(len(anchors) - 2)
    mix = (at - low)[..., None]
    anchors = anchors.to(depth)
    return ((1 - mix) * anchors[low] + mix * anchors[low + 1]).round().to(torch.uint8).permute(0, 3, 1, 2)


class Tasks:
    """Figure 4: generated latents through the align MLPs of the VAE's folder into heads that were trained on DINOv2's."""

    def __init__(self, args, vae, run):
        self.names, self.f = args.tasks, vae.f
        self.align = V.Align.load(vae.folder).to(run.device)
        if "_reg" in str(vae.info.get("dino")) and "seg" in self.names:
            run.print("note: public segmentation heads exist only for networks without registers; this VAE was aligned to "
                      f"{vae.info['dino']}, so masks are off their distribution; Figure 4 wants train_vae.py --dino vitl14")
        with run.first():
            self.seg = Segmenter.load(args.seg_head).to(run.device) if "seg" in self.names else None
            self.depth = Depth.load(args.depth_head).to(run.device) if "depth" in self.names else None
        for flag, head, width in (("--seg-head", self.seg, self.seg and self.seg.linear.in_features),
                                  ("--depth-head", self.depth, self.depth and self.depth.projects[0].in_channels)):
            if head is not None and width != self.align.config["dim"]:
                raise ValueError(f"{flag} reads features of {width} numbers, this VAE was aligned to {self.align.config['dim']}")

    @torch.no_grad()
    def __call__(self, z, images):
        """Raw latents [B,C,h,w] and their images uint8 -> [one uint8 picture [B,3,H,W] for each task], classes seen."""
        patch, (h, w), size, seen, out = self.align(z)[0], z.shape[-2:], images.shape[-2:], [], []

        def read(head):
            return torch.cat([head(part, (h, w), size).cpu() for part in patch.split(8)])
        for name in self.names:
            if name == "seg":
                mask = read(self.seg).argmax(1)
                seen = mask.unique().tolist()
                palette = torch.tensor(self.seg.colors, dtype=torch.uint8)
                out.append(images.cpu() // 2 + palette[mask].permute(0, 3, 1, 2) // 2)
            elif name == "depth":
                out.append(colour_depth(read(self.depth)))
            else:
                colours = V.pca(patch)[0].transpose(1, 2).unflatten(2, (h, w)) * foreground(patch)[:, None]
                out.append((F.interpolate(colours, size) * 255).to(torch.uint8).cpu())
        return out, seen


def legend(sheet, seg, seen):
    """The sheet with the classes that were seen written below it, each beside its colour."""
    out = Image.new("RGB", (sheet.width, sheet.height + 14 * len(seen) + 4), "white")
    out.paste(sheet)
    pen = ImageDraw.Draw(out)
    for row, c in enumerate(seen):
        y = sheet.height + 14 * row + 2
        pen.rectangle((4, y, 16, y + 10), fill=tuple(seg.colors[c]))
        pen.text((22, y), seg.names[c], fill="black")
    return out


# --------------------------------------------------------------------------------------------------------------- main


SHOWN = 64   # as many images, at most, go onto one sheet


def write_pictures(out, store):
    """The single PNGs, and grid.png."""
    for i, image in enumerate(store.arrays["images"]):
        Image.fromarray(image).save(out / f"{i:06d}.png")
    images = torch.from_numpy(np.array(store.arrays["images"][:SHOWN])).permute(0, 3, 1, 2)
    V.grid(images, columns=min(8, math.ceil(math.sqrt(len(images))))).save(out / "grid.png")


def write_tasks(out, store, tasks, run):
    """tasks.png: the images of grid.png, eight a row, each above its masks and maps."""
    images = torch.from_numpy(np.array(store.arrays["images"][:SHOWN])).permute(0, 3, 1, 2)
    pictures, seen = tasks(torch.from_numpy(np.array(store.arrays["latents"][:SHOWN])).to(run.device), images)
    rows = [row for part in zip(*(p.split(8) for p in (images, *pictures))) for row in part]
    rows = [torch.cat([row, row.new_full((min(8, len(images)) - len(row), *row.shape[1:]), 255)]) for row in rows]   # the last may be short
    sheet = V.grid(torch.cat(rows), columns=len(rows[0]))
    (legend(sheet, tasks.seg, seen) if seen else sheet).save(out / "tasks.png")


def main():
    args, run = flags(), V.Run()
    args.dtype = args.dtype or V.default_dtype(run)
    model, vae, norm, names = load(args, run)
    args.sampler = args.sampler or ("ddpm" if model.process == "dit" else "sde")
    if (args.sampler == "ddpm") != (model.process == "dit"):
        raise ValueError(f"{args.ckpt}: --sampler {args.sampler} is not for a {model.process}: a dit takes ddpm, a sit sde, euler or heun")
    Diffusion(keep=args.steps) if args.sampler == "ddpm" else Flow().times(args.sampler, args.steps)   # --steps that cannot be
    y, s, side = labels(args, model, names), model.settings, model.settings["input_size"] * vae.f
    guided = Guided(model, args.cfg, tuple(args.interval), args.cfg_channels)
    tasks = Tasks(args, vae, run) if args.tasks else None

    made_of = {k: v for k, v in vars(args).items() if k not in ("out", "npz", "tasks", "seg_head", "depth_head", "batch", "vae")}
    made_of |= {"weights": V.fingerprint(model), "vae": V.fingerprint(vae), "normalizer": norm.state()}
    arrays = {"images": (np.uint8, (args.num, side, side, 3)),
              "latents": (np.float32, (args.num, s["channels"], s["input_size"], s["input_size"]))}
    store = V.Store(run, args.out, arrays, made_of, "--out")
    if run.device.type == "cuda" and args.num >= 1000:
        model.compile(dynamic=False)                      # two or three sizes of batch
    choice = "given in turn" if args.classes else args.labels
    guide = f"cfg {args.cfg} in {args.interval}, {args.cfg_channels or 'all'} channels" if args.cfg != 1 else "no guidance"
    run.print(f"{args.num:,} images, labels {choice}, {args.sampler} {args.steps} steps, {guide}, {args.dtype} on {run.device.type}")

    bar = run.bar(args.num, "sampling", initial=int(store.done.sum()))
    for part in store.todo(run, args.batch):
        z = draw(args, guided, norm, part, y[part.start:part.stop], run.device)
        with torch.no_grad():
            images = V.to_uint8(vae.decode(z)).permute(0, 2, 3, 1)
        store.put(part.start, latents=z.cpu().numpy(), images=images.cpu().numpy())
        bar.update(min(len(part) * run.world, args.num - bar.n))
    bar.close()
    run.barrier()
    if not store.done.all():
        raise ValueError(f"{args.out}: {int(store.done.sum())} of {args.num} images are here; do all machines share this folder?")
    if run.main and args.npz is not None:
        file = args.npz or f"{args.out}/samples.npz"
        with V.atomic(Path(file)) as f:
            np.savez(f, arr_0=store.arrays["images"], arr_1=y)
        run.print(f"wrote {file}; next:\n  python fid.py {file} --ref VIRTUAL_imagenet256_labeled.npz")
    elif run.main:
        write_pictures(Path(args.out), store)
        run.print(f"wrote {args.out}/grid.png, and each image as a file")
    if run.main and tasks is not None:
        write_tasks(Path(args.out), store, tasks, run)
        run.print(f"wrote {args.out}/tasks.png")
    run.barrier()


if __name__ == "__main__":
    V.main(main)
