"""Two looks at one's own work, for figures.py: the curves of runs, and whether samples are copies of training
pictures; and what all of its figures draw with."""
import argparse
import itertools
import json
import math
from pathlib import Path

import numpy as np
import shapes
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import fid
from vae import Images, UserError, grid, print0


def palette_of(n, lights=(0.75, 0.55)):
    """n colors, [(red, green, blue), ...]: hues around the circle, every other one darker."""
    hue = np.linspace(0, 2 * np.pi, n, endpoint=False)[:, None, None]
    light = np.resize(lights, n)[:, None, None]
    colors = (255 * shapes.color(light, 0.15, hue)[..., 0, 0]).astype(int)
    return [tuple(c) for c in colors.tolist()]


def page(tiles, rows, columns):
    """uint8 tiles [R*C,3,H,W] as a picture, a title left of each of the R rows and above each of the C
    columns."""
    tiles = F.interpolate(tiles.float(), scale_factor=max(1, 128 // tiles.shape[-1])).to(torch.uint8)
    sheet, side = grid(tiles, columns=len(columns)), tiles.shape[-1] + 2
    left, top = 12 + 7 * max(map(len, rows)), 18
    out = Image.new("RGB", (left + sheet.width, top + sheet.height), "white")
    out.paste(sheet, (left, top))
    pen = ImageDraw.Draw(out)
    for k, text in enumerate(rows):
        pen.text((4, top + k * side + side // 2 - 6), text, fill="black")
    for k, text in enumerate(columns):
        pen.text((left + k * side + 4, 3), text, fill="black")
    return out


# ----------------------------------------------------------------------------------------- the curves of runs


def read_log(run):
    """The lines of a run's log.jsonl with numbers, and the first of those that say what made it ({}: none).
    Lines that a kill or a disk has spoilt are left out."""
    path, rows = Path(run), []
    path = path if path.is_file() else path / "log.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: no such file; every run of train_vae.py and train_sit.py leaves one")
    for text in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(text)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    starts, lines = ([row for row in rows if ("start" in row) == is_start] for is_start in (True, False))
    if not lines:
        raise UserError(f"{path}: no line with numbers yet; the first comes after --log-every steps")
    return lines, (starts or [{}])[0]


def finite(value):
    return isinstance(value, (int, float)) and math.isfinite(value)


def series(lines, name):
    """The points [(x, y)] of a panel: over the steps; of a list, as the loss by time, over its bins from 0 to
    1, each the mean over the last tenth of the lines."""
    held = [(line["step"], line[name]) for line in lines if name in line]
    if not any(isinstance(value, list) for _, value in held):
        return [(step, value) for step, value in held if finite(value)]
    last = [value for _, value in held[-max(1, len(held) // 10):] if isinstance(value, list)]
    bins = [[v for v in values if finite(v)] for values in itertools.zip_longest(*last)]
    return [((k + 0.5) / len(bins), sum(values) / len(values)) for k, values in enumerate(bins) if values]


def ticks(low, high, most=5):
    """Round numbers from low to high, `most` at most: 1, 2 or 5 times a power of ten apart."""
    exact = max((high - low) / most, 1e-12 * max(abs(low), abs(high), 1e-300))
    power = 10.0 ** math.floor(math.log10(exact))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= exact)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


class Axis:
    """From values to pixels a..b; logarithmic where it may be and the values are positive and far apart."""

    def __init__(self, values, a, b, may_be_log):
        low, high, self.a, self.b = min(values), max(values), a, b
        self.log = may_be_log and low > 0 and high > 20 * low
        low, high = (math.log10(v) if self.log else v for v in (low, high))
        margin = 0.04 * (high - low) or 0.04 * abs(high) or 1           # of one value: around it
        self.low, self.high = low - margin * may_be_log, high + margin * (may_be_log or high == low)

    def __call__(self, value):
        value = math.log10(value) if self.log else value
        return self.a + (value - self.low) / (self.high - self.low) * (self.b - self.a)

    def ticks(self):
        if not self.log:
            return ticks(self.low, self.high)
        powers = range(math.floor(self.low), math.ceil(self.high) + 1)
        few = (1, 2, 5) if len(powers) < 4 else (1,)
        found = [m * 10.0**k for k in powers for m in few if self.low <= math.log10(m * 10.0**k) <= self.high]
        return found[::-(-len(found) // 6)]


SIDE = (360, 230)       # a panel's pixels; its axes lie this far inside:
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 26, 24


def short(v):
    return f"{v:.3g}" if abs(v) < 1000 else f"{v:.0f}" if abs(v) < 10_000 else f"{v / 1000:.4g}K"


def panel(title, curves, inks):
    """One panel: curves [[(x, y), ...], ...], numbers at the axes, each curve's last value in its color."""
    (width, height), points = SIDE, [point for curve in curves for point in curve]
    across = Axis([0, *(x for x, _ in points)], LEFT, width - RIGHT, False)
    up = Axis([y for _, y in points], height - BOTTOM, TOP, True)
    big = Image.new("RGB", (3 * width, 3 * height), "white")            # three times as large: smooth edges
    pen = ImageDraw.Draw(big)
    for y in up.ticks():
        pen.line((3 * LEFT, 3 * up(y), 3 * (width - RIGHT), 3 * up(y)), fill=(225, 225, 225), width=2)
    for curve, ink in zip(curves, inks):
        spots = [(3 * across(x), 3 * up(y)) for x, y in curve]
        if len(spots) > 1:
            pen.line(spots, fill=ink, width=5, joint="curve")
        if len(spots) < 15:
            for x, y in spots:
                pen.ellipse((x - 8, y - 8, x + 8, y + 8), fill=ink)
    pen.line([3 * c for c in (LEFT, TOP, LEFT, height - BOTTOM, width - RIGHT, height - BOTTOM)],
             fill=(120, 120, 120), width=3)
    out = big.resize(SIDE, Image.LANCZOS)
    pen = ImageDraw.Draw(out)
    pen.font = ImageFont.load_default(11)
    for y in up.ticks():
        pen.text((LEFT - 5, up(y)), short(y), fill="black", anchor="rm")
    for x in across.ticks():
        pen.text((min(across(x), width - 14), height - BOTTOM + 4), short(x), fill="black", anchor="ma")
    pen.font = ImageFont.load_default(13)
    title = f"{'loss ' * (title == 'by time')}{title}{', log' * up.log}"
    pen.text((LEFT, 6), title, fill="black")
    right, left = width - RIGHT, LEFT + pen.textlength(title)
    for curve, ink in [*zip(curves, inks)][::-1]:
        text = f"  {short(curve[-1][1])}" if curve else ""
        right -= pen.textlength(text)
        if right > left:
            pen.text((right, 6), text, fill=ink)
    return out


def curves(args, device):
    """The curves of runs: every number in their log.jsonl over the steps, a panel for each name that some run
    has, above it the last values. Loss by time: of the last tenth of the lines. The axis of values that are
    more than 20 times apart is logarithmic."""
    logs, inks = [read_log(run) for run in args.runs], palette_of(len(args.runs), (0.6, 0.45))
    names = dict.fromkeys(name for lines, _ in logs for line in lines for name in line if name != "step")
    found = {name: [series(lines, name) for lines, _ in logs] for name in names}
    panels = [panel(name, all_series, inks) for name, all_series in found.items() if any(all_series)]
    columns = min(4, len(panels))
    top, (width, height) = 14 + 18 * len(logs), SIDE
    out = Image.new("RGB", (columns * width, top + -(-len(panels) // columns) * height), "white")
    pen = ImageDraw.Draw(out)
    pen.font = ImageFont.load_default(13)
    for k, (run, (lines, begun), ink) in enumerate(zip(args.runs, logs, inks)):
        since = f", since {begun['start']}" if begun else ""
        pen.rectangle((14, 14 + 18 * k, 38, 20 + 18 * k), fill=ink)
        pen.text((46, 9 + 18 * k), f"{run}, to step {lines[-1]['step']:,}{since}", fill="black")
    for k, one in enumerate(panels):
        out.paste(one, (k % columns * width, top + k // columns * height))
    return out


# ---------------------------------------------------------------------------------------------- is it a copy?


class Readable(torch.utils.data.Dataset):
    """A folder in which, as in training, the next picture takes the place of one that cannot be read."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images.first_readable(i)


@fid.exact()
def views(net, images, device, desc):
    """Unit features [N,2,D] of a sequence of uint8 images, as they are and mirrored."""
    parts = fid.batches(images, 64, device, desc)
    return torch.cat([torch.stack([unit(net, v) for v in (x, x.flip(-1))], 1) for _, x in parts])


def unit(net, x):
    return F.normalize(net(x)[0].float(), dim=-1)


@fid.exact()
def nearest(net, queries, images, device, k=4):
    """(distances, places) [Q,k] of the k images nearest to each query, whose unit features are [Q,2,D]: 1 -
    cosine, of the query or its mirror image, whichever is less. One pass that keeps none of the images'
    features."""
    k = min(k, len(images))
    best = queries.new_full((len(queries), k), math.inf)
    which = torch.zeros(best.shape, dtype=torch.long, device=device)
    for places, x in fid.batches(images, 64, device, "training pictures"):
        d = 1 - (queries @ unit(net, x).T).amax(1)                                  # [Q,2,B] -> [Q,B]
        which = torch.cat([which, places.to(device).expand(len(queries), -1)], 1)
        best, order = torch.cat([best, d], 1).topk(k, largest=False)
        which = which.gather(1, order)
    return best.clamp_min(0).cpu(), which.cpu()


def suspicion(ours, theirs):
    """Distances of samples and of test pictures to their nearest training picture -> the share of samples
    that are nearer than 95% of the test pictures, and the ratio of the medians."""
    return (ours < theirs.quantile(0.05)).double().mean().item(), (ours.median() / theirs.median()).item()


def neighbours(args, device):
    """Is it a copy: samples beside their nearest training pictures, the most suspicious first. Distances are
    1 - cosine of DINOv2's class features at 16 x 16 patches, of the sample or its mirror image. With --val
    also the share of samples that are nearer to a training picture than 95% of test pictures are: 5% if
    samples are like new pictures. More is no proof, because guided and plain pictures are nearer to all; the
    sheet shows it."""
    samples = fid.open_set(args.samples, args.size)[0]
    if samples is None:
        raise UserError(f"{args.samples}: holds statistics and no images (arr_0)")
    first = samples[0][0] if isinstance(samples, Images) else samples[0]
    folders = [Images(folder, args.size or first.shape[-1]) for folder in (args.data, args.val) if folder]
    data, *val = map(Readable, folders)
    net = fid.feature_net(argparse.Namespace(features="dinov2", dino=args.dino), device)[0]
    sets = [views(net, samples, device, "samples"), *(views(net, v, device, "test pictures") for v in val)]
    distances, places = nearest(net, torch.cat(sets), data, device)
    ours, theirs = distances[:len(samples), 0], distances[len(samples):, 0]
    print0(f"{len(ours):,} samples; a median one is {ours.median():.3g} from the nearest training picture")
    if val:
        share, ratio = suspicion(ours, theirs)
        print0(f"of {len(theirs):,} test pictures: {theirs.median():.3g}, ratio {ratio:.3g}")
        print0(f"{share:.1%} of the samples are nearer than 95% of test pictures are, "
               f"{theirs.quantile(0.05):.3g}; of new ones 5% would be")
    tiles, rows = [], ours.argsort(stable=True)[:args.num].tolist()
    for i in rows:
        print0(f"sample {i}: {ours[i]:.4f} from {folders[0].paths[places[i, 0]]}")
        sample = samples[i][0] if isinstance(samples, Images) else samples[i]
        tiles += [sample, *(data[j][0] for j in places[i].tolist())]
    columns = [f"nearest of {len(data):,}", "second", "third", "fourth"][:places.shape[1]]
    return page(torch.stack(tiles), [f"{i}: {ours[i]:.4f}" for i in rows], ["sample", *columns])
