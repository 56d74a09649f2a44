"""The paper's figures, and what else people draw by hand, as PNGs.

    python tests/figures.py tsne --vae sd-vae-ft-ema out/vae --data imagenet/train      # Figure 1a
    python tests/figures.py attention --vae sd-vae-ft-ema out/vae --data imagenet/val   # Figure 1b
    python tests/figures.py scales --ckpt out/sit --scales 1 1.8 4      # one seed, several guidance scales
    python tests/figures.py trajectory --ckpt out/sit --cfg 1.8         # what each step takes the end to be
    python tests/figures.py kl --vae out/vae-kl* --results out/figure5.json             # Figure 5
    python tests/figures.py curves out/vae out/vae-none                 # all that is in the logs of runs
    python tests/figures.py neighbours out/samples/samples.npz --data imagenet/train    # copies of them?

Figure 3 is sample.py --cfg 4 --interval 0 1, Figure 4 sample.py --tasks.
"""
import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from watch import curves, neighbours, page, palette_of

import fid
import sample
from dino import magma
from sit import Guided, process_of
from vae import (
    VAE,
    Align,
    Images,
    UserError,
    atomic,
    fingerprint,
    from_uint8,
    normal,
    print0,
    progress,
    read_json,
    rng,
    run_script,
    start,
    to_uint8,
)


def flags():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="figure", required=True)

    def figure(function):
        about = function.__doc__
        q = commands.add_parser(function.__name__, help=about.split(":")[0], description=about)
        q.add_argument("--out", default=f"out/figures/{function.__name__}.png", help="file to write")
        q.add_argument("--seed", type=int, default=0)
        q.set_defaults(function=function)
        return q

    drawn = tsne, attention, scales, trajectory, kl, curves, neighbours
    mapped, compared, scaled, followed, swept, watched, doubted = map(figure, drawn)
    for q, split, num in ((mapped, "train", 128), (compared, "val", 4)):
        q.add_argument("--vae", nargs="+", required=True,
                       help="side by side: public names, runs, folders or files")
        q.add_argument("--data", default=f"imagenet/{split}", help="folder of images")
        q.add_argument("--size", type=int, default=256, help="center crop in pixels")
        q.add_argument("--num", type=int, default=num, help="number of images; tsne: of each class")
    mapped.add_argument("--classes", nargs="+", help="class folders; default: ten drawn by the seed")
    mapped.add_argument("--perplexity", type=float, default=30)
    compared.add_argument("--token", type=int, nargs=2, metavar=("ROW", "COLUMN"),
                          help="default: the one in the middle")
    for q in (scaled, followed):
        q.add_argument("--num", type=int, default=4,
                       help="number of images; all other flags are those of sample.py")
    scaled.add_argument("--scales", type=float, nargs="+", default=[1, 1.5, 2, 4, 8])
    followed.add_argument("--points", type=int, default=8, help="columns, spread over the steps")
    swept.add_argument("--vae", nargs="+", required=True, help="runs of train_vae.py that differ in --kl")
    swept.add_argument("--results", required=True, help="what fid.py wrote about samples on each of them")
    watched.add_argument("runs", nargs="+", help="folders with a log.jsonl, of either stage")
    doubted.add_argument("samples", help="npz with arr_0, or a folder of images, as sample.py's OUT/images")
    doubted.add_argument("--data", default="imagenet/train", help="what the generator was trained on")
    doubted.add_argument("--val", help="what it never saw, to compare with")
    doubted.add_argument("--dino", default="vitl14", help="DINOv2's name or weight file")
    doubted.add_argument("--size", type=int, help="center crop in pixels; default: the samples' side")
    doubted.add_argument("--num", type=int, default=16, help="rows of the sheet")
    args, rest = p.parse_known_args()
    if args.figure in ("scales", "trajectory"):
        sys.argv[1:] = rest
        args = argparse.Namespace(**{**vars(sample.flags()), **vars(args)})
    elif rest:
        p.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


# ---------------------------------------------------------------------------------------- Figure 1a: a t-SNE


def conditional(x, perplexity):
    """p(j|i) [N,N] of points x [N,D]: Gaussians about each, as wide as the perplexity asks (van der Maaten &
    Hinton 2008)."""
    d = fid.distances(x, x).fill_diagonal_(math.inf)
    d -= d.amin(1, keepdim=True)                                # changes no p, and keeps exp from underflow
    low, high = torch.zeros_like(d[:, :1]), torch.full_like(d[:, :1], math.inf)
    beta = (1 / d[d.isfinite()].mean()).expand_as(low)
    for _ in range(100):                                        # bisection of 1 / (2 sigma^2)
        p = torch.softmax(-beta * d, 1)
        wide = torch.special.entr(p).sum(1, keepdim=True) > math.log(perplexity)
        low, high = torch.where(wide, beta, low), torch.where(wide, high, beta)
        beta = torch.where(high.isinf(), 2 * beta, (low + high) / 2)
    return p


def closeness(y):
    """Student's kernel 1 / (1 + |yi - yj|^2) [N,N] of a map y [N,2], 0 with itself."""
    return (1 / (1 + fid.distances(y, y))).fill_diagonal_(0)


def divergence(p, y):
    """KL(P || Q) of a map y [N,2] under joint probabilities p [N,N]."""
    q = closeness(y)
    return torch.special.xlogy(p, p / (q / q.sum()).clamp_min(1e-300)).sum().item()


def gradient(p, y):
    """That of the divergence, [N,2]."""
    q = closeness(y)
    w = (p - q / q.sum()) * q
    return 4 * (w.sum(1, keepdim=True) * y - w @ y)


def descend(p, y, exaggeration, momentum, steps):
    """The map y [N,2] after gradient steps with momentum and gains on P exaggerated, at scikit-learn's
    learning rate."""
    speed, gains, rate = torch.zeros_like(y), torch.ones_like(y), max(len(y) / 48, 50)
    bar = progress(steps, f"t-SNE, P x {exaggeration}", "step")
    for _ in range(steps):
        g = gradient(exaggeration * p, y)
        gains = torch.where(g * speed < 0, gains + 0.2, gains * 0.8).clamp_min(0.01)
        speed = momentum * speed - rate * gains * g
        y = y + speed
        bar.update()
    bar.close()
    return y


def embed(x, perplexity, steps=1000):
    """Exact t-SNE of principal components x [N,D], from the first two on: the map [N,2], its divergence."""
    if len(x) <= 3 * perplexity:
        raise UserError(f"--perplexity {perplexity:g} needs more than {3 * perplexity:g} points, here are "
                        f"{len(x)}")
    p = conditional(x, perplexity)
    p = (p + p.T) / (2 * len(x))
    y = descend(p, 1e-4 * x[:, :2] / x[:, 0].std(), 12, 0.5, steps // 4)
    y = descend(p, y, 1, 0.8, steps - steps // 4)
    return y, divergence(p, y)


def principal(x, n=50):
    """The first n principal components of points x [N,D]."""
    x = x - x.mean(0)
    values, vectors = torch.linalg.eigh(x @ x.T)    # N x N: latents have more numbers than there are points
    return (vectors * values.clamp_min(0).sqrt()).flip(1)[:, :n]


def neighbors(x, labels):
    """Share of points x [N,D] whose nearest other point has their label [N]."""
    nearest = fid.distances(x, x).fill_diagonal_(math.inf).argmin(1)
    return (labels[nearest] == labels).double().mean().item()


@torch.no_grad()
def means(name, images, device):
    """Posterior means [N,C,h,w] of a sequence of uint8 images [3,S,S] under the VAE of this name."""
    model, side = VAE.load(name).to(device), images[0][0].shape[-1]
    if side % model.f:
        raise UserError(f"--size {side} is not a multiple of {model.f}, the downsampling factor of {name}")
    parts = fid.batches(images, 32, device, f"encoding, {name}")
    return torch.cat([model.encode(from_uint8(x)).mean for _, x in parts])


def of_classes(args, data):
    """(class names, indices of --num images of each), drawn by the seed."""
    if len(data.classes) < 2:
        raise UserError(f"--data {args.data}: a t-SNE needs class folders, two at least")
    drawn = rng(args.seed, "subset").permutation(len(data.classes))[:10]
    names, chosen = args.classes or [data.classes[c] for c in sorted(drawn)], []
    for name in names:
        if name not in data.classes:
            raise UserError(f"--classes {name}: no such folder in {args.data}")
        members = np.flatnonzero(data.labels == data.classes.index(name))
        if len(members) < args.num:
            raise UserError(f"{args.data}/{name}: holds {len(members)} images, --num asks for {args.num}")
        chosen += rng(args.seed, "subset", len(chosen)).permutation(members)[:args.num].tolist()
    return names, chosen


def tsne(args, device):
    """Figure 1a: latents of ten classes on a map, by the flattened posterior means, PCA to 50 dimensions and
    exact t-SNE; above each panel the share of latents, before any reduction, whose nearest neighbor is of
    their class."""
    data, side = Images(args.data, args.size), 420
    names, chosen = of_classes(args, data)
    labels, palette = torch.arange(len(names)).repeat_interleave(args.num), palette_of(len(names))
    inks, panels = [palette[c] for c in labels.tolist()], []
    for name in args.vae:
        x = means(name, torch.utils.data.Subset(data, chosen), device).flatten(1).double()
        right, (y, divided) = neighbors(x, labels.to(device)), embed(principal(x), args.perplexity)
        print0(f"{name}: {right:.3f} of {len(x)} latents have a nearest neighbor of their class (chance "
               f"{1 / len(names):.3f}); divergence of the map {divided:.3f}")
        low, high = y.aminmax(dim=0)
        spots = ((y - (low + high) / 2) / (high - low).max() * (side - 24) + side / 2).tolist()
        panels.append((f"{Path(name).name}: {right:.3f}", dots((side, side), spots, inks, [3] * len(x))))
    out = Image.new("RGB", (len(panels) * side, side + 24 + 16 * -(-len(names) // 5)), "white")
    pen = ImageDraw.Draw(out)
    for k, (text, panel) in enumerate(panels):
        out.paste(panel, (k * side, 20))
        pen.text((k * side + 12, 5), text, fill="black")
    for k, name in enumerate(names):
        x, y = 12 + k % 5 * ((out.width - 12) // 5), side + 22 + 16 * (k // 5)
        pen.ellipse((x, y + 2, x + 8, y + 10), fill=palette[k])
        pen.text((x + 12, y), name, fill="black")
    return out


def dots(size, spots, colors, radii, line=None):
    """Dots on white, joined by a line of a color where one is given; drawn three times as large, for smooth
    edges."""
    big = Image.new("RGB", (3 * size[0], 3 * size[1]), "white")
    pen = ImageDraw.Draw(big)
    if line:
        pen.line([3 * c for spot in spots for c in spot], fill=line, width=5)
    for (x, y), color, r in zip(spots, colors, radii):
        pen.ellipse((3 * (x - r), 3 * (y - r), 3 * (x + r), 3 * (y + r)), fill=color)
    return big.resize(size, Image.LANCZOS)


# -------------------------------------------------------------------------- Figure 1b: cosines with one token


def similarity(vectors, token):
    """Cosine of one token's vector with all: vectors [B,N,D], each image's mean subtracted, token's place ->
    [B,N]."""
    vectors = vectors - vectors.mean(1, keepdim=True)
    return F.cosine_similarity(vectors, vectors[:, token:token + 1], dim=-1)


def heat(values, images):
    """Values [B,h,w] over gray images uint8 [B,3,H,W]: dark at 0 and below, bright at 1."""
    enlarged = F.interpolate(values[:, None].float().cpu(), images.shape[-2:])[:, 0]
    gray = images.float().mean(1, keepdim=True)
    return (0.3 * gray + 0.7 * magma(enlarged.clamp(0, 1)).float()).to(torch.uint8)


@torch.no_grad()
def attention(args, device):
    """Figure 1b: the cosine of one token's centered latent vector with all, over the image; for a VAE that
    has its alignment MLPs beside it, also that of the features which they make."""
    data = Images(args.data, args.size)
    if args.num > len(data):
        raise UserError(f"--data {args.data}: holds {len(data)} images, --num asks for {args.num}")
    chosen = rng(args.seed, "subset").permutation(len(data))[:args.num]
    images = torch.stack([data[int(i)][0] for i in chosen])
    columns, titles = [images.clone()], ["image, token"]
    for name in args.vae:
        z, model = means(name, [(x, None) for x in images], device), VAE.load(name)
        h, w = z.shape[-2:]
        row, column = args.token or (h // 2, w // 2)
        if not (0 <= row < h and 0 <= column < w):
            raise UserError(f"--token {row} {column}: {name} has {h} x {w} of them, counted from 0")
        views, f = {"latents": z.flatten(2).transpose(1, 2)}, args.size // h
        aligned = Path(model.folder or "", "align.safetensors").is_file()
        if aligned and model.info.get("features") != "cls":
            views["features"] = Align.load(name).to(device)(z)[0]
        for kind, vectors in views.items():
            columns.append(heat(similarity(vectors, row * w + column).unflatten(1, (h, w)), images))
            titles.append(f"{Path(name).name}, {kind}")
    red = torch.tensor([255, 0, 0]).view(3, 1, 1)
    columns[0][:, :, row * f:(row + 1) * f, column * f:(column + 1) * f] = red
    return page(torch.stack(columns, 1).flatten(0, 1), [""] * args.num, titles)


# ----------------------------------------------------------------------------------- pictures from a sampler


def prepare(args, device):
    """For the images that sample.py would draw: latents(scale, callback) -> latents as the model sees them,
    decode(latents) -> uint8 [B,3,H,W], and the names of their classes."""
    model, vae, norm, names = sample.load(args.ckpt, args.vae, args.process)
    model, vae, process, s = model.to(device), vae.to(device), process_of(model), model.settings
    sampler, y = args.sampler or next(iter(process.samplers)), sample.labels(args, model, names)

    def noise(purpose, *k):
        shape = (s["channels"], s["input_size"], s["input_size"])
        return torch.stack([normal(shape, args.seed, purpose, i, *k) for i in range(args.num)]).to(device)

    @torch.no_grad()
    def latents(scale, callback=lambda *what: None):
        guided = Guided(model, scale, tuple(args.interval), args.cfg_channels)
        bar = progress(args.steps, f"cfg {scale:g}", "step")

        def seen(*what):
            bar.update()
            callback(*what)

        with bar, torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16"):
            return process.sample(guided, noise("sample"), torch.as_tensor(y, device=device), sampler,
                                  args.steps, lambda k: noise("step", k), seen)

    @torch.no_grad()
    def decode(x):
        return to_uint8(vae.decode(norm.decode(x.float()))).cpu()

    return latents, decode, [names[c] if names else f"class {c}" for c in y]


def scales(args, device):
    """One seed under several guidance scales: a row a scale, a column an image."""
    latents, decode, names = prepare(args, device)
    tiles = torch.cat([decode(latents(scale)) for scale in args.scales])
    return page(tiles, [f"cfg {c:g}" for c in args.scales], names)


def trajectory(args, device):
    """What each step takes the end to be: a row an image, a column a step's prediction of the data, and last
    the sample."""
    if not 1 <= args.points <= args.steps:
        raise UserError(f"--points {args.points}: 1 to --steps {args.steps}")
    latents, decode, names = prepare(args, device)
    points, columns = {round(k): None for k in np.linspace(0, args.steps - 1, args.points)}, []

    def keep(k, t, x, x0):
        if k in points:
            columns.append(decode(x0))

    last = latents(args.cfg, keep)
    columns.append(decode(last))
    return page(torch.stack(columns, 1).flatten(0, 1), names, [*(f"step {k + 1}" for k in points), "sample"])


# --------------------------------------------------------------------------------------------------- Figure 5


def kl_points(args):
    """(KL weight, FID, std of the latents) of all samples in --results that were decoded by one of --vae, by
    its hash."""
    vaes, points = {}, []
    for name in args.vae:
        model = VAE.load(name)
        if "latents" not in model.info:
            raise UserError(f"{name}: no reals.json with the latents' statistics beside this VAE")
        vaes[fingerprint(model)] = model.info
    for name, entry in read_json(args.results).items():
        info = vaes.get(read_json(Path(name).parent / "manifest.json", {}).get("vae"))
        if info and "fid" in entry["value"]:
            points.append((info["kl"], entry["value"]["fid"], info["latents"]["std"]))
    if len(points) < 2:
        raise UserError(f"{args.results}: holds an FID for {len(points)} of the {len(vaes)} VAEs in --vae, a "
                        "plot needs two")
    return sorted(points)


def kl(args, device):
    """Figure 5: FID against the KL weight, logarithmic but for 0, at the left; a point is as large as the
    number below it, the standard deviation of the latents."""
    points, (width, height), (left, right, top, bottom) = kl_points(args), (900, 480), (60, 840, 60, 370)
    for weight, value, std in points:
        print0(f"kl {weight:g}: FID {value:.2f}, std of the latents {std:.4f}")
    weights, values, stds = zip(*points)
    least = math.log10(min((w for w in weights if w), default=1)) - 0.5
    at = [math.log10(w) if w else least for w in weights]
    wide, low, high = max(at[-1] - at[0], 1e-6), min(values), max(max(values), min(values) + 1e-6)
    spots = [(left + (x - at[0]) / wide * (right - left), bottom - (v - low) / (high - low) * (bottom - top))
             for x, v in zip(at, values)]
    radii = [3 + 4 * std for std in stds]
    out = dots((width, height), spots, [(70, 110, 190)] * len(spots), radii, line=(150, 150, 150))
    pen = ImageDraw.Draw(out)
    pen.line((left - 40, height - 60, right + 40, height - 60), fill="black")
    for (x, y), r, (weight, value, std) in zip(spots, radii, points):
        pen.text((x, height - 54), f"{weight:g}".replace("e-0", "e-"), fill="black", anchor="ma")
        pen.text((x, y - r - 2), f"{value:.2f}", fill="black", anchor="mb")
        pen.text((x, y + r + 2), f"{std:.2f}", fill="black", anchor="ma")
    caption = "KL weight; above a point its FID, below it the standard deviation of the latents"
    pen.text((width / 2, height - 12), caption, fill="black", anchor="mb")
    return out


def main():
    args, device = flags(), start()
    picture = args.function(args, device)
    with atomic(args.out) as f:
        picture.save(f, "PNG")
    print0(f"wrote {args.out}, {picture.width} x {picture.height}")


if __name__ == "__main__":
    run_script(main)
