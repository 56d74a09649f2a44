"""The whole paper in the small: pictures, teacher, VAE with alignment, SiT, samples and scores, on a laptop.

    python tests/demo.py                # ten shapes drawn by code, 32 px: about nine minutes on two CPU cores
    python tests/demo.py --compare      # and the plain arm: same start, same steps, no alignment
    python tests/demo.py --data imagenette/train --size 64   # the same on a labeled folder of photographs

It calls the four scripts with plain flags and prints each command, so that any can be repeated with one flag
changed. Everything lies under --out. Stopped and started again, it goes on: finished stages stay, a
half-trained VAE or SiT resumes at its last checkpoint; teacher and judge, which take seconds to minutes,
begin again.
"""
import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import nets
import shapes

import fid
from dino import DINOv2, pca
from vae import (
    VAE,
    Align,
    Images,
    UserError,
    atomic,
    from_uint8,
    grid,
    normal,
    progress,
    read_json,
    rng,
    run_script,
    save,
    to_uint8,
)

# How much of everything; guidance is that of the samples in the picture. vae, tune and sit are flags of
# train_vae.py (from nothing, then fine-tuning) and of train_sit.py.
SHAPES = dict(
    train=12000, test=5000, samples=1000, steps=20, guidance=3, judge=200, teacher=400,
    vae="--steps 1000 --batch 16 --lr 3e-3 --warmup 100",
    tune="--steps 500 --batch 16 --lr 1.5e-3 --warmup 50",
    sit="--steps 3400 --batch 32 --lr 1.5e-3 --warmup 100 --ema 0.997")
PHOTOGRAPHS = dict(
    train=None, test=None, samples=1000, steps=50, guidance=2, judge=300, teacher=1000,
    vae="--steps 3500 --batch 16 --lr 3e-3 --warmup 100",
    tune="--steps 1000 --batch 16 --lr 1.5e-3 --warmup 50",
    sit="--steps 6500 --batch 32 --lr 1.5e-3 --warmup 100 --ema 0.997")
QUICK = dict(
    train=600, test=200, samples=40, steps=8, guidance=2, judge=20, teacher=20,
    vae="--steps 20 --batch 16 --lr 2e-3", tune="--steps 20 --batch 16 --lr 1e-3",
    sit="--steps 60 --batch 32 --lr 1.5e-3 --ema 0.95")

SMALL_VAE = "--ch 16 --mult 1 2 4 --blocks 1"           # f = 4: as many latents as the teacher has patches
LOSSES = "--gan 0 --perceptual 0 --kl 2e-6 --clip 1"    # no VGG here, and no time for a discriminator
EVERY = "--log-every 200 --save-every 500 --picture-every 1000"
ALIGN = "--align 0.1 --align-hidden 256"
STAGE2 = "--model T --norm std --std 1 --schedule cosine"


def flags():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path,
                   help="a folder of photographs, one subfolder per class, instead of the shapes")
    p.add_argument("--val", type=Path,
                   help="photographs to score against; default: the folder val beside --data")
    p.add_argument("--size", type=int, default=32, help="side of the pictures in pixels, a multiple of 8")
    p.add_argument("--compare", action="store_true",
                   help="add the plain arm, and let a random network judge both as well")
    p.add_argument("--quick", action="store_true",
                   help="every stage in seconds, to see that the path is whole; scores mean nothing")
    p.add_argument("--out", type=Path, help="default: out/demo, with --data out/demo-photographs, each with "
                   "-quick added for --quick")
    args = p.parse_args()
    if args.size < 8 or args.size % 8:
        raise UserError(f"--size {args.size} is not a multiple of 8")
    if args.val and not args.data:
        raise UserError(f"--val {args.val} goes with --data")
    args.out = args.out or Path("out/demo" + "-photographs" * bool(args.data) + "-quick" * args.quick)
    args.preset = QUICK if args.quick else PHOTOGRAPHS if args.data else SHAPES
    args.val = args.val or (args.data and args.data.parent / "val")
    return args


def title(text):
    print(f"\n== {text}  ({time.strftime('%H:%M:%S')})", flush=True)


def run(script, *parts):
    """Prints a command and runs it as it was printed, in another process -> the command. A part is a path, or
    words."""
    words = [w for part in parts for w in ([str(part)] if isinstance(part, Path) else shlex.split(part))]
    script = os.path.relpath(ROOT / script)
    command = shlex.join(["python", script, *words])
    print("$", command, flush=True)
    child = subprocess.Popen([sys.executable, script, *words])
    try:
        status = child.wait()
    except KeyboardInterrupt:   # the child was told as well: it saves, and leaves
        child.wait()
        raise
    if status:
        sys.exit(f"{script} ended with status {status}; the same command goes on from here")
    return command


# ------------------------------------------------------------------------------- pictures, teacher and judge


def pictures(args):
    """data/train and data/val under --out: PNGs in class folders, drawn by code, or photographs made small
    once. What is wrong with --data, --val or --out is said before anything is made."""
    todo = []
    for split, seed, source, number in (("train", 1, args.data, args.preset["train"]),
                                        ("val", 2, args.val, args.preset["test"])):
        folder = args.out / "data" / split
        origin = {"source": str(source.resolve()) if source else "shapes", "size": args.size,
                  "number": number or "all"}
        if not folder.is_dir():
            todo.append((folder, seed, source, number, origin))
            continue
        there = read_json(folder.with_suffix(".json"), origin)
        for key, value in origin.items():
            if there.get(key) != value:
                raise UserError(f"{folder} was made with {key} {there.get(key)}, not {value}: --out names "
                                "another folder")
    images = photographs(args) if args.data and todo else {}
    for folder, seed, source, number, origin in todo:
        save(origin, folder.with_suffix(".json"))
        if source:
            shrink(images[source], folder, number)
        else:
            shapes.write(folder, number, args.size, seed)


def photographs(args):
    """{--data: its pictures, --val: its pictures}, in the same class folders."""
    images = {source: Images(source, args.size) for source in (args.data, args.val)}
    for source, held in images.items():
        if len(held.classes) < 2:
            stray = f"; {held.stray[0]} lies in none" if held.stray else ""
            raise UserError(f"{source}: expected one folder of images per class, and two classes at least"
                            f"{stray}")
        if held.classes != images[args.data].classes:
            raise UserError(f"{source}: its class folders are not those of {args.data}; --val names another "
                            "folder")
    return images


def shrink(images, folder, number):
    """A center-cropped copy of (a number of) photographs, in a folder that gets its name when it is whole."""
    part, unread = folder.with_name(f"{folder.name}.part"), []
    shutil.rmtree(part, ignore_errors=True)
    chosen = fid.stratified(images.labels, 0)[:number]
    bar = progress(len(chosen), f"{images.root} at {images.size} px")
    for i in chosen:
        bar.update()
        try:
            image = images[int(i)][0]
        except UserError:       # left out: the picture after it may be of another class
            unread.append(images.paths[i])
            continue
        path = part / Path(images.paths[i]).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path, compress_level=1)
    bar.close()
    if unread:
        print(f"{len(unread)} unreadable files were left out: " + ", ".join(sorted(unread)))
    part.rename(folder)


def in_memory(folder, size, number=None):
    """(The first so many of) a picture folder, shuffled: uint8 [N,3,S,S], labels [N], masks [N,S,S] (None for
    photographs)."""
    data = Images(folder, size)
    order = rng(0, "order", 0).permutation(len(data))[:number]
    images, labels = torch.stack([data[int(i)][0] for i in order]), torch.from_numpy(data.labels[order])
    if not (folder / "masks.npz").is_file():
        return images, labels, None
    with np.load(folder / "masks.npz") as held:
        return images, labels, torch.from_numpy(held["masks"][order])


def teacher_and_judge(args):
    """teacher.pth in Meta's layout, which is all that train_vae.py hears of it, and judge.pth, which it never
    hears of."""
    missing = [name for name in ("teacher", "judge") if not (args.out / f"{name}.pth").is_file()]
    if not missing:
        return
    images, labels, masks = in_memory(args.out / "data/train", args.size)
    test = in_memory(args.out / "data/val", args.size)
    if "teacher" in missing:
        nets.train_teacher(images, labels, masks, args.preset["teacher"], args.out / "teacher.pth", test)
    if "judge" in missing:
        nets.train_judge(images, labels, args.preset["judge"], args.out / "judge.pth", test)


# ---------------------------------------------------------------------------------------- one arm of the demo


def arm(args, name, align):
    """Fine-tunes the common start with or without alignment, trains a SiT on its latents, samples, and scores
    -> {what: the command that made it}."""
    data, out, preset, commands = args.out / "data", args.out, args.preset, {}
    vae, sit, results = out / f"vae-{name}", out / f"sit-{name}", out / f"results-{name}.json"
    size, train, val = f"--size {args.size}", data / "train", data / "val"

    title(f"{name}: the VAE is fine-tuned {'with' if align else 'without'} alignment")
    aligned = ("--dino", out / "teacher.pth", ALIGN) if align else ("--features none",)
    run("train_vae.py", "--data", train, "--val", val, size, "--init", out / "vae-start", *aligned, LOSSES,
        preset["tune"], EVERY, "--out", vae)

    title(f"{name}: a SiT on its latents")
    run("train_sit.py", "--data", train, size, "--vae", vae, "--cache", out / f"latents-{name}", STAGE2,
        preset["sit"], EVERY, "--out", sit)

    title(f"{name}: samples and scores")
    samples = []
    for cfg in (1, preset["guidance"]):
        folder = out / f"samples-{name}-cfg{cfg}"
        commands[f"samples cfg {cfg}"] = run(
            "sample.py", "--ckpt", sit, f"--num {preset['samples']} --npz --labels balanced --sampler euler",
            f"--steps {preset['steps']} --cfg {cfg} --interval 0 1 --batch 125", "--out", folder)
        samples.append(folder / "samples.npz")
    anchors(args, vae, out / f"anchors-{name}")
    samples += [out / f"anchors-{name}/{kind}.npz" for kind in ("reconstructions", "noise")]
    n = min(preset["samples"], len(Images(val, args.size)))
    commands["vae"] = run("fid.py", "--vae", vae, "--data", val, size, "--inception none --vgg none --probe",
                          f"--num {n}", "--out", results)
    for judge in ("judge", "random") if args.compare else ("judge",):
        which = out / "judge.pth" if judge == "judge" else "random"
        commands[judge] = run("tests/nets.py", *samples, "--judge", which, "--ref", val, size,
                              "--out", results)
    return commands


@torch.no_grad()
def anchors(args, vae, folder):
    """What a Frechet distance of samples lies between, at the same number of pictures: reconstructions of
    training pictures, and decoded noise that has the latents' mean and standard deviation."""
    if (folder / "noise.npz").is_file():
        return
    model, data = VAE.load(vae), Images(args.out / "data/train", args.size)
    chosen = rng(0, "subset").permutation(len(data))[:args.preset["samples"]].tolist()
    stats, made = model.info["latents"], {"reconstructions": [], "noise": []}
    for at in range(0, len(chosen), 50):
        part = chosen[at:at + 50]
        z = model.encode(from_uint8(torch.stack([data[i][0] for i in part]))).mean
        noise = torch.stack([normal(z.shape[1:], 0, "sample", i) for i in part])
        for kind, latent in (("reconstructions", z), ("noise", stats["mean"] + stats["std"] * noise)):
            made[kind].append(to_uint8(model.decode(latent)).permute(0, 2, 3, 1).numpy())
    for kind, parts in made.items():
        with atomic(folder / f"{kind}.npz") as f:
            np.savez(f, arr_0=np.concatenate(parts), arr_1=data.labels[chosen])


def load_arm(args, name):
    """An arm's VAE, and its alignment MLPs."""
    folder = args.out / f"vae-{name}"
    return VAE.load(folder), Align.load(folder)


def load_samples(args, name):
    """An arm's guided samples: uint8 [N,3,S,S], labels [N], latents [N,C,h,w]."""
    with np.load(args.out / f"samples-{name}-cfg{args.preset['guidance']}/samples.npz") as held:
        images, labels, latents = (torch.from_numpy(held[key]) for key in ("arr_0", "arr_1", "latents"))
    return images.permute(0, 3, 1, 2), labels, latents


@torch.no_grad()
def masks(args, name="aligned"):
    """Figure 4 in the small: a linear head that learned masks from the teacher's features of real pictures is
    applied, unchanged, to latents pushed through the align MLPs. -> {what: mean IoU of foreground and
    background}, bool masks of the samples [N,S,S]."""
    out, size, teacher = args.out, args.size, DINOv2.load(args.out / "teacher.pth")
    model, align = load_arm(args, name)
    images, _, truth = in_memory(out / "data/train", size, 2000)
    test, _, test_truth = in_memory(out / "data/val", size, 1000)

    def teachers(images):
        parts = (teacher.targets(from_uint8(x), size // model.f)[0] for x in images.split(100))
        return torch.cat(list(parts))

    head = nets.train_mask_head(teachers(images), truth)

    def from_latents(z):
        return torch.cat([head(align(part)[0]) for part in z.split(100)])

    encoded = torch.cat([model.encode(from_uint8(x)).mean for x in test.split(100)])
    samples, _, latents = load_samples(args, name)
    generated = from_latents(latents)
    label, mask = nets.constant_guesses(test_truth)
    return {"teacher's features": nets.mean_iou(head(teachers(test)), test_truth),
            "encoded latents": nets.mean_iou(from_latents(encoded), test_truth),
            "one label everywhere": label, "one mask for all": mask,
            "color threshold": nets.mean_iou(nets.threshold_mask(test), test_truth),
            "generated latents": nets.mean_iou(generated, nets.threshold_mask(samples))}, generated


# ------------------------------------------------------------------------------------ the table, the picture


def table(args, commands, found_masks):
    """The end of the story: a column for each arm, a line for each number, and the commands that made them,
    {arm: {what: command}}."""
    n, cfg, out = args.preset["samples"], args.preset["guidance"], args.out
    samples, anchor = "samples-{}-cfg%d/samples.npz", "anchors-{}/%s.npz"
    columns = {                                                     # who measured, which file, its number
        "FD cfg 1": ("judge", samples % 1, "fd"),
        f"FD cfg {cfg}": ("judge", samples % cfg, "fd"),
        "named cfg 1": ("judge", samples % 1, "accuracy"),
        f"named cfg {cfg}": ("judge", samples % cfg, "accuracy"),
        "FD reconstr.": ("judge", anchor % "reconstructions", "fd"),
        "FD noise": ("judge", anchor % "noise", "fd"),
        "PSNR": ("vae", "", "psnr"),
        "SC raw": ("vae", "", "sc_all"),
        "SC centred": ("vae", "", "sc_all_centred"),
        "probe": ("vae", "", "probe_flat")}
    if args.compare:
        columns |= {f"random {k}": ("random", file, value) for k, (_, file, value) in columns.items()
                    if k.startswith("FD")}
    rows = {name: {} for name in commands}
    for name, row in rows.items():
        book = read_json(out / f"results-{name}.json")
        for k, (who, file, value) in columns.items():
            numbers = book[f"{out}/vae-{name}" if who == "vae" else who]["value"]
            row[k] = (numbers[f"{out}/{file.format(name)}"] if file else numbers)[value]
    print(f"\n{n} samples an arm against data/val. FD: Frechet distance in the judge's features\n"
          "(reconstructions and decoded noise give its scale); named: share of samples that the judge names\n"
          "as asked for; SC: Algorithm 1, all augmentations.\n")
    for k in columns:
        print(f"{k:20}" + "".join(f"{rows[name][k]:12.3f}" for name in rows))
    print(f"{'':20}" + "".join(f"{name:>12}" for name in rows) + "\n")
    if found_masks:
        print("mean IoU of masks by a linear head trained on the teacher's features, against the true masks\n"
              "(generated latents: against a color threshold of the decoded picture): "
              + ", ".join(f"{k} {v:.3f}" for k, v in found_masks.items()) + "\n")
    for name in commands:
        print(f"{name}:\n" + "\n".join(f"  {what:15} {command}" for what, command in commands[name].items()))
    save({"rows": rows, "commands": commands, "masks": found_masks}, out / "table.json")


@torch.no_grad()
def story(args, generated, name="aligned"):
    """story.png: real pictures, their reconstructions, the latents' three-color PCA, samples, and the masks
    that the head of masks() reads from their latents; a column for each class, its name above it."""
    data, (model, align) = Images(args.out / "data/val", args.size), load_arm(args, name)
    names = [re.sub(r"^\d+_", "", c) for c in data.classes[:10]]        # of the shapes without their number

    def of_each(labels, n):
        """Where n of each class stand: one row of all classes after the other; a class that has fewer begins
        again."""
        places = [np.resize(np.flatnonzero(labels == c), n) for c in range(len(names))]
        return np.stack(places, 1).ravel().tolist()

    real = torch.stack([data[i][0] for i in of_each(data.labels, 2)])
    mean = model.encode(from_uint8(real)).mean                                              # [B, C, h, w]
    colors = pca(align(mean)[0])[0].transpose(1, 2).unflatten(2, mean.shape[-2:])           # [B, 3, h, w]
    samples, labels, _ = load_samples(args, name)
    chosen = of_each(labels.numpy(), 3)
    rows = {"real": real,
            "reconstructed": to_uint8(model.decode(mean)),
            "latents, PCA": to_uint8(2 * F.interpolate(colors, scale_factor=model.f) - 1),
            f"samples, cfg {args.preset['guidance']}": samples[chosen]}
    if generated is not None:
        rows["their masks"] = samples[chosen] * generated[chosen][:, None]
    with atomic(args.out / "story.png") as f:
        page(rows, names).save(f, "PNG")
    print(f"\nthe story in one picture: {args.out}/story.png")


def page(rows, names):
    """{text: uint8 pictures [N,3,S,S]} as one picture: 64 pixels and more each, the texts left of the rows,
    the names above the columns."""
    side, pad, gap, left, top = next(iter(rows.values())).shape[-1], 3, 6, 106, 20
    scale = -(-64 // side)
    step = scale * side + pad
    sheets = {text: grid(F.interpolate(images, scale_factor=scale), len(names), pad)
              for text, images in rows.items()}
    size = left + len(names) * step + pad, top + sum(s.height + gap for s in sheets.values())
    out = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(out)
    pen.font = ImageFont.load_default(13)
    for k, text in enumerate(names):
        while pen.textlength(text) > step:
            text = text[:-1]
        pen.text((left + pad + k * step + step // 2, top), text, fill="black", anchor="md")
    y = top
    for text, sheet in sheets.items():
        out.paste(sheet, (left, y))
        pen.text((6, y + sheet.height // 2), text, fill="black", anchor="lm")
        y += sheet.height + gap
    return out


def main():
    args, start = flags(), time.time()
    title("pictures")
    pictures(args)
    title("a teacher in DINOv2's architecture, and a judge of another kind")
    teacher_and_judge(args)
    title("a plain VAE, from nothing")
    run("train_vae.py", "--data", args.out / "data/train", "--val", args.out / "data/val",
        f"--size {args.size} --init none", SMALL_VAE, "--features none", LOSSES, args.preset["vae"], EVERY,
        "--out", args.out / "vae-start")
    names = ["aligned", "plain"] if args.compare else ["aligned"]
    commands = {name: arm(args, name, align=name == "aligned") for name in names}
    found, generated = masks(args) if (args.out / "data/val/masks.npz").is_file() else ({}, None)
    table(args, commands, found)
    story(args, generated)
    print(f"{(time.time() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    run_script(main)
