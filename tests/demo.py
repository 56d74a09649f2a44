"""The whole paper in the small: pictures, teacher, VAE with alignment, SiT, samples and scores, on a laptop.

    python tests/demo.py                                  # ten shapes drawn by code, 32 px: about ten minutes on two CPU cores
    python tests/demo.py --compare                        # and the plain arm: same start, same steps, no alignment
    python tests/demo.py --data imagenette/train --size 64   # the same path on a labelled folder of photographs

It calls the four scripts with plain flags and prints each command, so that any can be repeated with one flag changed.
Everything lies under --out. Stopped and started again, it goes on: finished stages stay, a half-trained network resumes.
"""
import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import nets
import shapes
import vae as V
from dino import DINOv2

# How much of everything; vae, tune and sit are flags of train_vae.py (from nothing, then fine-tuning) and train_sit.py.
SHAPES = dict(
    train=20000, test=5000, samples=1000, steps=30, judge=300, teacher=400,
    vae="--steps 1200 --batch 16 --lr 3e-3 --warmup 100",
    tune="--steps 600 --batch 16 --lr 1.5e-3 --warmup 50",
    sit="--steps 3600 --batch 32 --lr 1.5e-3 --warmup 100 --ema 0.997")
PHOTOGRAPHS = dict(
    train=None, test=None, samples=1000, steps=50, judge=300, teacher=1000,
    vae="--steps 3500 --batch 16 --lr 3e-3 --warmup 100",
    tune="--steps 1000 --batch 16 --lr 1.5e-3 --warmup 50",
    sit="--steps 6500 --batch 32 --lr 1.5e-3 --warmup 100 --ema 0.997")
QUICK = dict(
    train=600, test=200, samples=40, steps=8, judge=20, teacher=20,
    vae="--steps 20 --batch 16 --lr 2e-3", tune="--steps 20 --batch 16 --lr 1e-3",
    sit="--steps 60 --batch 32 --lr 1.5e-3 --ema 0.95")

SMALL_VAE = "--ch 16 --mult 1 2 4 --blocks 1"                        # f = 4: 32 px become 8 x 8 latents, as the teacher's patches
LOSSES = "--gan 0 --perceptual 0 --kl 2e-6 --clip 1"                 # no VGG here, and no time for a discriminator
EVERY = "--log-every 200 --save-every 500 --picture-every 1000"
ALIGN = "--align 0.1 --align-hidden 256"


def flags():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, help="a folder of photographs, one subfolder per class, instead of the shapes")
    p.add_argument("--val", type=Path, help="photographs to score against; default: the folder val beside --data")
    p.add_argument("--size", type=int, default=32, help="side of the pictures in pixels, a multiple of 8")
    p.add_argument("--compare", action="store_true", help="add the plain arm, and let a random network judge both as well")
    p.add_argument("--quick", action="store_true", help="every stage in seconds, to see that the path is whole; scores mean nothing")
    p.add_argument("--out", type=Path, help="default: out/demo; out/demo-photographs with --data; out/demo-quick with --quick")
    args = p.parse_args()
    args.out = args.out or Path("out/demo" + ("-quick" if args.quick else "-photographs" if args.data else ""))
    args.preset = QUICK if args.quick else PHOTOGRAPHS if args.data else SHAPES
    args.val = args.val or (args.data and args.data.parent / "val")
    return args


def title(text):
    print(f"\n== {text}  ({time.strftime('%H:%M:%S')})", flush=True)


def run(script, *parts):
    """Prints a command and runs it as it was printed, in another process."""
    words = [w for part in parts for w in shlex.split(str(part))]
    print("$ python", script, shlex.join(words), flush=True)
    status = subprocess.run([sys.executable, str(ROOT / script), *words]).returncode
    if status:
        sys.exit(f"{script} ended with status {status}; the same command goes on from here")


# -------------------------------------------------------------------------------------------- pictures, teacher, judge


def pictures(args):
    """data/train and data/val under --out: PNGs in class folders, drawn by code, or photographs made small once."""
    for split, seed, source in (("train", 1, args.data), ("val", 2, args.val)):
        folder, number = args.out / "data" / split, args.preset["train" if split == "train" else "test"]
        if folder.is_dir():
            continue
        if source is None:
            shapes.write(folder, number, args.size, seed)
        else:
            shrink(source, folder, args.size, number)


def shrink(source, folder, size, number):
    """A center-cropped copy of (a number of) photographs, in a folder that gets its name when it is whole."""
    images, part = V.Images(source, size), folder.with_name(f"{folder.name}.part")
    for i in tqdm(np.random.RandomState(0).permutation(len(images))[:number], f"{source} at {size} px", unit="img"):
        path = part / Path(images.paths[i]).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images.near(int(i))[0].permute(1, 2, 0).numpy()).save(path, compress_level=1)
    part.rename(folder)


def in_memory(folder, size, number=None):
    """(The first so many of) a picture folder, shuffled: uint8 [N,3,S,S], labels [N], masks [N,S,S] (None for photographs)."""
    data = V.Images(folder, size)
    order = V.rng(0, "order", 0).permutation(len(data))[:number]
    masks = np.load(folder / "masks.npz")["masks"][order] if (folder / "masks.npz").is_file() else None
    images = torch.stack([data[int(i)][0] for i in order])
    return images, torch.from_numpy(data.labels[order]), None if masks is None else torch.from_numpy(masks)


def teacher_and_judge(args):
    """teacher.pth in Meta's layout, which is all that train_vae.py hears of it, and judge.pth, which it never hears of."""
    missing = [name for name in ("teacher", "judge") if not (args.out / f"{name}.pth").is_file()]
    if not missing:
        return
    images, labels, masks = in_memory(args.out / "data/train", args.size)
    test = in_memory(args.out / "data/val", args.size)
    if "teacher" in missing:
        nets.train_teacher(images, labels, masks, args.preset["teacher"], args.out / "teacher.pth", test)
    if "judge" in missing:
        nets.train_judge(images, labels, args.preset["judge"], args.out / "judge.pth", test)


# ---------------------------------------------------------------------------------------------------- one arm of the demo


def arm(args, name, align):
    """Fine-tune the common start with or without alignment, train a SiT on its latents, paint, and score."""
    data, out, preset = args.out / "data", args.out, args.preset
    vae, sit = out / f"vae-{name}", out / f"sit-{name}"
    common = f"--data {data}/train --val {data}/val --size {args.size}"
    title(f"{name}: the VAE is fine-tuned {'with' if align else 'without'} alignment")
    run("train_vae.py", common, f"--init {out}/vae-start", f"--dino {out}/teacher.pth {ALIGN}" if align else "--features none",
        LOSSES, preset["tune"], EVERY, f"--out {vae}")
    title(f"{name}: a SiT on its latents")
    run("train_sit.py", f"--data {data}/train --size {args.size} --vae {vae} --cache {out}/latents-{name} --model T",
        "--norm std --std 1 --schedule cosine", preset["sit"], EVERY, f"--out {sit}")
    title(f"{name}: samples and scores")
    samples = []
    for cfg in (1, 2):
        run("sample.py", f"--ckpt {sit} --num {preset['samples']} --npz --labels balanced --sampler euler",
            f"--steps {preset['steps']} --cfg {cfg} --interval 0 1 --batch 125 --out {out}/samples-{name}-cfg{cfg}")
        samples.append(out / f"samples-{name}-cfg{cfg}/samples.npz")
    anchors(args, vae, out / f"anchors-{name}")
    samples += [out / f"anchors-{name}/{kind}.npz" for kind in ("reconstructions", "noise")]
    run("fid.py", f"--vae {vae} --data {data}/val --size {args.size} --inception none --vgg none --probe",
        f"--num {min(preset['samples'], preset['test'] or 1000)} --out {out}/results-{name}.json")
    for judge in ("judge", "random") if args.compare else ("judge",):
        run("tests/nets.py", *samples, f"--judge {out}/{judge}.pth" if judge == "judge" else "--judge random",
            f"--ref {data}/val --size {args.size} --out {out}/results-{name}.json")


@torch.no_grad()
def anchors(args, vae, folder):
    """Between what two values a Frechet distance of samples lies, at the same number of pictures: reconstructions of training
    pictures, and decoded noise that has the latents' mean and standard deviation."""
    if (folder / "noise.npz").is_file():
        return
    model, data, n = V.VAE.load(vae), V.Images(args.out / "data/train", args.size), args.preset["samples"]
    chosen = V.rng(0, "subset").permutation(len(data))[:n].tolist()
    stats, made = model.info["latents"], {"reconstructions": [], "noise": []}
    for at in range(0, n, 50):
        part = chosen[at:at + 50]
        z = model.encode(V.from_uint8(torch.stack([data[i][0] for i in part]))).mean
        noise = stats["mean"] + stats["std"] * torch.stack([V.normal(z.shape[1:], 0, "sample", i) for i in part])
        for kind, latent in (("reconstructions", z), ("noise", noise)):
            made[kind].append(V.to_uint8(model.decode(latent)).permute(0, 2, 3, 1).numpy())
    for kind, parts in made.items():
        with V.atomic(folder / f"{kind}.npz") as f:
            np.savez(f, arr_0=np.concatenate(parts), arr_1=data.labels[chosen])


@torch.no_grad()
def masks(args, name="aligned"):
    """Figure 4 in the small: a linear head that learned masks from the teacher's features of real pictures reads, untouched,
    latents pushed through the align MLPs. -> {what: mean IoU of foreground and background}, bool masks of the samples [N,S,S]."""
    out, size = args.out, args.size
    teacher, model, align = DINOv2.load(out / "teacher.pth"), V.VAE.load(out / f"vae-{name}"), V.Align.load(out / f"vae-{name}")
    images, _, truth = in_memory(out / "data/train", size, 2000)
    test, _, test_truth = in_memory(out / "data/val", size, 1000)

    def teachers(images):
        return torch.cat([teacher.targets(V.from_uint8(x), size // model.f)[0] for x in images.split(100)])
    head = nets.train_mask_head(teachers(images), truth)

    def from_latents(z):
        return torch.cat([head(align(part)[0]) for part in z.split(100)])
    z = torch.cat([model.encode(V.from_uint8(x)).mean for x in test.split(100)])
    folder = out / f"samples-{name}-cfg2"
    with np.load(folder / "samples.npz") as held:
        painted = torch.from_numpy(held["arr_0"]).permute(0, 3, 1, 2)
    generated = from_latents(torch.from_numpy(np.load(folder / "latents.npy")))
    label, mask = nets.constant_guesses(test_truth)
    return {"teacher's features": nets.mean_iou(head(teachers(test)), test_truth),
            "encoded latents": nets.mean_iou(from_latents(z), test_truth),
            "one label everywhere": label, "one mask for all": mask,
            "colour threshold": nets.mean_iou(nets.threshold_mask(test), test_truth),
            "generated latents": nets.mean_iou(generated, nets.threshold_mask(painted))}, generated


# -------------------------------------------------------------------------------------------------- the table, the picture


def table(args, names, found_masks):
    """The end of the story: one row an arm, one column a number, and the command that measured each."""
    n, out = args.preset["samples"], args.out
    columns = {
        "FD cfg 1": ("judge", "samples-{}-cfg1/samples.npz", "fd"), "FD cfg 2": ("judge", "samples-{}-cfg2/samples.npz", "fd"),
        "named cfg 1": ("judge", "samples-{}-cfg1/samples.npz", "accuracy"), "named cfg 2": ("judge", "samples-{}-cfg2/samples.npz", "accuracy"),
        "FD reconstr.": ("judge", "anchors-{}/reconstructions.npz", "fd"), "FD noise": ("judge", "anchors-{}/noise.npz", "fd"),
        "PSNR": ("vae", "", "psnr"), "SC raw": ("vae", "", "sc_all"), "SC centred": ("vae", "", "sc_all_centred"),
        "probe": ("vae", "", "probe_flat")}
    if args.compare:
        columns |= {f"random {k}": ("random", file, value) for k, (_, file, value) in columns.items() if k.startswith("FD")}
    rows = {}
    for name in names:
        book = json.loads((out / f"results-{name}.json").read_text())
        found = {"judge": book.get("judge"), "random": book.get("random"), "vae": book.get(f"{out}/vae-{name}")}
        rows[name] = {k: found[who]["value"].get(f"{out}/{file.format(name)}", {}).get(value) if file else found[who]["value"][value]
                      for k, (who, file, value) in columns.items()}
    commands = {who: found[who]["command"] for who in ("judge", "random", "vae") if found[who]}
    print(f"\n{n} samples an arm against data/val. FD: Frechet distance in the judge's features (reconstructions and decoded noise give")
    print("its scale); named: share of samples that the judge names as asked for; SC: Algorithm 1, all augmentations.\n")
    for k in columns:
        print(f"{k:20}" + "".join(f"{rows[name][k]:12.3f}" for name in names))
    print(f"{'':20}" + "".join(f"{name:>12}" for name in names) + "\n")
    if found_masks:
        print("mean IoU of masks by a linear head trained on the teacher's features, against the true masks (generated latents: against")
        print("a colour threshold of the decoded picture): " + ", ".join(f"{k} {v:.3f}" for k, v in found_masks.items()) + "\n")
    for who, command in commands.items():
        print(f"{who:8} {command}")
    V.save_json(out / "table.json", {"rows": rows, "commands": commands, "masks": found_masks})


@torch.no_grad()
def story(args, generated, name="aligned"):
    """story.png: real pictures, their reconstructions, the latents' three-colour PCA, samples, and the masks that the head of
    masks() reads from their latents; a column for each class."""
    out, size = args.out, args.size
    data, model, align = V.Images(out / "data/val", size), V.VAE.load(out / f"vae-{name}"), V.Align.load(out / f"vae-{name}")
    k = min(len(data.classes), 10)
    real = torch.stack([data[int(np.flatnonzero(data.labels == c)[j])][0] for j in range(2) for c in range(k)])
    q = model.encode(V.from_uint8(real))
    colours = V.pca(align(q.mean)[0])[0].transpose(1, 2).unflatten(2, q.mean.shape[-2:])
    with np.load(out / f"samples-{name}-cfg2/samples.npz") as z:
        samples, labels = torch.from_numpy(z["arr_0"]).permute(0, 3, 1, 2), z["arr_1"]
    chosen = [int(np.flatnonzero(labels == c)[j]) for j in range(3) for c in range(k)]
    drawn = samples[chosen]
    rows = [("real", real), ("reconstructed", V.to_uint8(model.decode(q.mean))),
            ("latents, PCA", V.to_uint8(2 * F.interpolate(colours, scale_factor=model.f) - 1)), ("samples, cfg 2", drawn)]
    if generated is not None:
        rows.append(("their masks", drawn * generated[chosen][:, None]))
    scale, left = max(1, 64 // size), 100
    sheets = [(text, V.grid(F.interpolate(images, scale_factor=scale), columns=k, pad=3)) for text, images in rows]
    page = Image.new("RGB", (left + sheets[0][1].width, sum(s.height + 6 for _, s in sheets)), "white")
    pen, y = ImageDraw.Draw(page), 0
    for text, sheet in sheets:
        page.paste(sheet, (left, y))
        pen.text((6, y + sheet.height // 2 - 6), text, fill="black")
        y += sheet.height + 6
    page.save(out / "story.png")
    print(f"\nthe story in one picture: {out}/story.png")


def main():
    args, start = flags(), time.time()
    title("pictures")
    pictures(args)
    title("a teacher in DINOv2's architecture, and a judge of another kind")
    teacher_and_judge(args)
    title("a plain VAE, from nothing")
    run("train_vae.py", f"--data {args.out}/data/train --val {args.out}/data/val --size {args.size} --init none", SMALL_VAE,
        "--features none", LOSSES, args.preset["vae"], EVERY, f"--out {args.out}/vae-start")
    names = ["aligned", "plain"] if args.compare else ["aligned"]
    for name in names:
        arm(args, name, align=name == "aligned")
    found, generated = masks(args) if (args.out / "data/val/masks.npz").is_file() else ({}, None)
    table(args, names, found)
    story(args, generated)
    print(f"{(time.time() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    V.main(main)
