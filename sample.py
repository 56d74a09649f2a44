"""Samples from a trained SiT or DiT: pictures for the eye, 50,000 images for an evaluator, masks and depth
from latents.

    python sample.py --cfg 1.8                                         # 16 pictures from out/sit
    torchrun --nproc_per_node=8 sample.py --cfg 1.8 --num-images 50000 --npz   # Table 4's 1.82; then fid.py
    python sample.py --cfg 4 --interval 0 1 --classes 207 360 --out out/figure3

Image i is a function of (--seed, i) alone: not of the batch size, of the number of processes, or of what else
is drawn. --npz writes one file for evaluators in place of PNGs, by default OUT/samples.npz: arr_0 uint8 NHWC,
arr_1 labels, and latents. Under torchrun write --num-images: it takes --num for its own. In Python:

    model, vae, norm, names = load("out/sit")
    x = Flow().sample(Guided(model, 1.8, (0, 0.75)), torch.randn(4, 4, 32, 32), torch.arange(4))
    grid(to_uint8(vae.decode(norm.decode(x)))).save("four.png")
"""
import argparse
import math
import shlex
import shutil
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from dino import Depth, Segmenter, color_depth, foreground, pca
from sit import PUBLIC, Diffusion, Flow, Guided, SiT, check_sampling, process_of
from vae import (
    VAE,
    Align,
    Normalizer,
    UserError,
    atomic,
    barrier,
    check_space,
    count,
    default_dtype,
    everyone,
    fingerprint,
    grid,
    lock,
    missing_ranges,
    normal,
    number,
    positive,
    print0,
    progress,
    rank,
    rng,
    run_script,
    same_for_all,
    same_manifest,
    save,
    save_picture,
    start,
    to_uint8,
    world,
)


def flags():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", default="out/sit", help="a run of train_sit.py, its file, a public name or file")
    p.add_argument("--process", choices=["sit", "dit", "repa"], help="what a bare file was trained for")
    p.add_argument("--vae", help="in place of the one that the checkpoint names, of the same encoder")
    p.add_argument("--out", help="folder; default: out/pictures, with --npz out/samples or FILE less .npz")
    p.add_argument("--num", "--num-images", type=positive, default=16, help="number of images")
    p.add_argument("--npz", nargs="?", const="", metavar="FILE", help="one FILE.npz in place of PNGs")
    p.add_argument("--classes", nargs="+", help="taken in turn: numbers, or names of class folders")
    p.add_argument("--labels", choices=["random", "balanced"], default="random", help="how without --classes")
    p.add_argument("--sampler", choices=[*Flow.samplers, *Diffusion.samplers], help="default: sde; DiT: ddpm")
    p.add_argument("--steps", type=count, default=250)
    p.add_argument("--cfg", type=number(0), default=1.0, help="guidance scale; 1: none")
    p.add_argument("--interval", type=number(0, 1), nargs=2, default=[0, 0.75],
                   help="guided noise times, 0: data")
    p.add_argument("--cfg-channels", type=count, help="guide the first so many channels (3: DiT's, SiT's)")
    p.add_argument("--tasks", nargs="+", choices=["seg", "depth", "pca"], default=[], help="Figure 4")
    p.add_argument("--seg-head", default="vitl14_voc2012", help="a public name (vitl14_ade20k) or a file")
    p.add_argument("--depth-head", default="moge-vitl", help="the public name or a file")
    p.add_argument("--batch", type=positive, default=32, help="images a process draws at once")
    p.add_argument("--dtype", choices=["bf16", "fp32"], default=default_dtype(), help="by the device")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: many images on a GPU")
    p.add_argument("--seed", type=count, default=0)
    args = p.parse_args()
    if args.npz and not args.npz.endswith(".npz"):
        p.error(f"--npz {args.npz}: the file's name must end in .npz")
    if args.out is None:
        args.out = "out/pictures" if args.npz is None else args.npz.removesuffix(".npz") or "out/samples"
    return args


# --------------------------------------------------------------------------------------------------- sampling


def load(ckpt, vae=None, process=None):
    """All on the way from noise to a picture -> model, VAE, normalizer, class names, of a checkpoint of ours
    or a public one. vae: in place of the checkpoint's own, of the same encoder; process: of a bare file."""
    if str(ckpt) not in PUBLIC and not Path(ckpt).exists():
        raise UserError(f"--ckpt {ckpt}: no checkpoint here; train_sit.py makes one, SiT-XL/2 is public")
    model = SiT.load(ckpt, process)
    source = vae or model.info.get("vae", {}).get("source", "sd-vae-ft-ema")
    if model.info and not vae and not Path(source).exists():        # used from another folder
        folder = Path(ckpt) if Path(ckpt).is_dir() else Path(ckpt).parent
        beside = folder / model.info["vae"]["beside"]
        source = beside if beside.exists() else source
    try:
        vae = VAE.load(source)
    except UserError as e:
        raise UserError(f"{e}; --vae names another place of it") from None
    if model.info and fingerprint(vae, vae.encoder_parts) != model.info["vae"]["hash"]:
        raise UserError(f"{ckpt} was trained on another VAE's latents than {source}'s; see --vae")
    if vae.z_channels != model.channels:
        raise UserError(f"{ckpt} makes {model.channels} latent channels, this VAE decodes {vae.z_channels}")
    norm = Normalizer(**model.info.get("normalizer", {"own": (vae.factor, vae.shift)}))
    return model, vae, norm, model.info.get("classes", [])


def labels(args, model, names):
    """The label of each of --num images, a function of (seed, index): [N] int64."""
    if not model.classes:
        return np.zeros(args.num, np.int64)
    if args.classes:
        number = {str(i): i for i in range(model.classes)} | {name: i for i, name in enumerate(names)}
        if unknown := [c for c in args.classes if c not in number]:
            some = ", ".join([f"0 to {model.classes - 1}", *names[:5]])
            raise UserError(f"--classes {unknown[0]}: no such class ({some}, ...)")
        return np.array([number[args.classes[i % len(args.classes)]] for i in range(args.num)])
    if args.labels == "balanced":
        return np.arange(args.num) % model.classes
    return np.array([rng(args.seed, "label", i).integers(model.classes) for i in range(args.num)])


@torch.no_grad()
def draw(args, guided, norm, indices, y, device):
    """Raw latents [B,C,h,w] of the images with these indices and labels y [B]."""
    s = guided.model.settings

    def noise(purpose, *k):
        shape = (s["channels"], s["input_size"], s["input_size"])
        return torch.stack([normal(shape, args.seed, purpose, i, *k) for i in indices]).to(device)

    with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16"):
        y, process = torch.as_tensor(y, device=device), process_of(guided.model)
        x = process.sample(guided, noise("sample"), y, args.sampler, args.steps, lambda k: noise("step", k))
    return norm.decode(x)


# --------------------------------------------------------------------------- masks and depth from the latents


class Tasks:
    """Figure 4: generated latents through the VAE's align MLPs into heads trained on DINOv2's features."""

    def __init__(self, args, vae, device):
        self.names = args.tasks
        self.align = Align.load(vae.folder or "a public VAE").to(device)
        if "_reg" in str(vae.info.get("dino")) and "seg" in self.names:
            print0("note: heads know no registers: rough masks. Figure 4 wants train_vae.py --dino vitl14")
        self.seg = Segmenter.load(args.seg_head).to(device) if "seg" in self.names else None
        self.depth = Depth.load(args.depth_head).to(device) if "depth" in self.names else None
        for flag, head in (("--seg-head", self.seg), ("--depth-head", self.depth)):
            if head and head.dim != self.align.dim:
                raise UserError(f"{flag} reads features of {head.dim} numbers, this VAE has {self.align.dim}")

    @torch.no_grad()
    def write(self, z, images, path):
        """A PNG: images uint8 [B,3,H,W], eight a row, each above the masks and maps of its raw latent."""
        patch, (h, w), size, seen, sets = self.align(z)[0], z.shape[-2:], images.shape[-2:], [], [images]

        def read(head):
            return torch.cat([head(part, (h, w), size).cpu() for part in patch.split(8)])

        for name in self.names:
            if name == "seg":
                mask = read(self.seg).argmax(1)
                seen = mask.unique().tolist()
                palette = torch.tensor(self.seg.colors, dtype=torch.uint8)
                sets.append(images // 2 + palette[mask].permute(0, 3, 1, 2) // 2)
            elif name == "depth":
                sets.append(color_depth(read(self.depth)))
            else:
                colors = pca(patch)[0].transpose(1, 2).unflatten(2, (h, w)) * foreground(patch)[:, None]
                sets.append((F.interpolate(colors, size) * 255).to(torch.uint8).cpu())
        width = min(8, len(images))
        spare = (0, 0) * 3 + (0, -len(images) % width)         # white tiles: the last row may be short
        parts = zip(*(F.pad(pictures, spare, value=255).split(width) for pictures in sets))
        sheet = grid(torch.cat([row for part in parts for row in part]), columns=width)
        with atomic(path) as f:
            (legend(sheet, self.seg, seen) if seen else sheet).save(f, "PNG")
        print0(f"wrote {path}")


def legend(sheet, seg, seen):
    """The sheet with the classes that were seen written below it, each beside its color."""
    out = Image.new("RGB", (sheet.width, sheet.height + 14 * len(seen) + 4), "white")
    out.paste(sheet)
    pen = ImageDraw.Draw(out)
    for row, c in enumerate(seen):
        y = sheet.height + 14 * row + 2
        pen.rectangle((4, y, 16, y + 10), fill=tuple(seg.colors[c]))
        pen.text((22, y), seg.names[c], fill="black")
    return out


# --------------------------------------------------------------------------------------------------- pictures


SHOWN = 64   # as many images, at most, go onto one sheet


def write_pictures(args, paint, names):
    """OUT/images/NNNNNN.png in place of those there, and OUT/grid.png -> the first latents and images."""
    folder, shown = Path(args.out, "images"), {}
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("[0-9]" * 6 + ".png"):
            old.unlink()
    for part, z, images in paint(np.zeros(args.num)):      # it waits for all ranks, so the folder is there
        for i, latent, image in zip(part, z, images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:06d}.png")
            if i < SHOWN:
                shown[i] = latent, image
    shown = dict(sorted(pair for shares in everyone(shown) for pair in shares.items()))
    z, images = map(torch.stack, zip(*shown.values()))
    if rank() == 0:
        columns = min(8, math.ceil(math.sqrt(len(images))))
        save_picture(images, f"{args.out}/grid.png", columns, names)
    print0(f"wrote {args.out}/grid.png, and each image into {folder}")
    return z, images


def write_npz(args, file, paint, y, manifest, image_bytes):
    """FILE.npz, by way of OUT/parts/FIRST-LAST.npz for each batch, from which a stopped run goes on -> the
    first latents and images, for the first rank's --tasks."""
    parts, begun = Path(args.out, "parts"), same_manifest(args.out, manifest, "--out")
    whole = all(everyone(begun and Path(file).is_file()))
    if not whole:
        if rank() == 0 and not begun:
            check_space(args.out, 2 * args.num * image_bytes, "--out")     # twice, before the parts go
            parts.mkdir(exist_ok=True)
            save(manifest, Path(args.out, "manifest.json"))
        done = np.zeros(args.num)
        for old in parts.glob("*-*.npz"):
            first, last = map(int, old.stem.split("-"))
            done[first:last + 1] = 1
        for part, z, images in paint(done):
            with atomic(parts / f"{part[0]:06d}-{part[-1]:06d}.npz") as f:
                np.savez(f, images=images.permute(0, 2, 3, 1).numpy(), latents=z.numpy())
        barrier()
        if rank() == 0:
            join_parts(args, file, parts, y)
    if rank() == 0:
        shutil.rmtree(parts, ignore_errors=True)          # none, or what a kill left here
    print0(f"{file} was there, and is not drawn again: delete it for that" if whole else f"wrote {file}")
    if rank() > 0 or not args.tasks:
        return None, None
    with np.load(file) as arrays:
        z, images = (torch.from_numpy(arrays[name][:SHOWN]) for name in ("latents", "arr_0"))
    return z, images.permute(0, 3, 1, 2)


def read_part(file, key):
    """An array of a part; UserError where the file is damaged."""
    try:
        with np.load(file) as arrays:
            return arrays[key]
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as e:
        raise UserError(f"{file} is damaged ({e}): delete it, and the same command draws it again") from None


def join_parts(args, file, parts, y):
    """All parts as one npz, array after array."""
    files = sorted(parts.glob("*-*.npz"), key=lambda f: int(f.stem.split("-")[0]))
    if sum(int(b) - int(a) + 1 for a, b in (f.stem.split("-") for f in files)) != args.num:
        raise UserError(f"{parts}: not all of {args.num} images are here; do all machines share this folder?")
    with atomic(file) as f, zipfile.ZipFile(f, "w") as archive:
        for name, key in (("arr_0", "images"), ("latents", "latents")):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                for k, part in enumerate(files):
                    array = read_part(part, key)
                    if k == 0:
                        header = np.lib.format.header_data_from_array_1_0(array)
                        header["shape"] = (args.num, *array.shape[1:])
                        np.lib.format.write_array_header_1_0(member, header)
                    member.write(array.tobytes())
        with archive.open("arr_1.npy", "w") as member:
            np.lib.format.write_array(member, y)


def main():
    args = flags()
    device = start(args)
    model, vae, norm, classes = load(args.ckpt, args.vae, args.process)
    weights = {}
    if world() > 1 or args.npz is not None:           # for one process's pictures nobody asks
        weights = {"weights": fingerprint(model), "vae": fingerprint(vae)}
        same_for_all({f"the hash of {what}": value for what, value in weights.items()})
    model, vae, process = model.to(device), vae.to(device), process_of(model)
    args.sampler = args.sampler or next(iter(process.samplers))
    check_sampling(process, model, args.sampler, args.steps)
    guided = Guided(model, args.cfg, tuple(args.interval), args.cfg_channels)
    y = labels(args, model, classes)
    tasks = Tasks(args, vae, device) if args.tasks else None
    if device.type == "cuda" and args.num >= 1000 if args.compile is None else args.compile:
        model.compile(dynamic=False)                      # two or three sizes of batch

    @torch.no_grad()
    def paint(done):
        """This rank's share of what is not done: ranges, raw latents [B,C,h,w], images uint8 [B,3,H,W]."""
        with progress(args.num, "sampling", done=int(done.sum())) as bar:
            for part in missing_ranges(done, args.batch):
                z = draw(args, guided, norm, part, y[part.start:part.stop], device)
                yield part, z.cpu(), to_uint8(vae.decode(z)).cpu()
                bar.update(min(len(part) * world(), args.num - bar.n))

    guidance = f"cfg {args.cfg} in {args.interval}" if args.cfg != 1 else "no guidance"
    print0(f"{args.num:,} images, {args.sampler} {args.steps} steps, {guidance}, {args.dtype}, {device.type}")
    with lock(args.out):
        if args.npz is None:
            z, images = write_pictures(args, paint, [classes[c] for c in y[:SHOWN] if classes])
        else:
            places = ("ckpt", "vae", "out", "npz", "tasks", "seg_head", "depth_head", "batch", "compile")
            manifest = {k: v for k, v in vars(args).items() if k not in places}
            manifest |= {**weights, "normalizer": norm.state_dict()}
            file = args.npz or f"{args.out}/samples.npz"
            image_bytes = model.settings["input_size"] ** 2 * (3 * vae.f**2 + 4 * model.channels)
            z, images = write_npz(args, file, paint, y, manifest, image_bytes)
            size, data = model.settings["input_size"] * vae.f, model.info.get("data")
            imagenet = not data or (len(classes), size) == (1000, 256)
            ref = "VIRTUAL_imagenet256_labeled.npz" if imagenet else f"{shlex.quote(data)} --size {size}"
            print0(f"next:\n  python fid.py {shlex.quote(file)} --ref {ref}")
        if tasks is not None and rank() == 0:
            tasks.write(z.to(device), images, f"{args.out}/tasks.png")
        barrier()


if __name__ == "__main__":
    run_script(main)
