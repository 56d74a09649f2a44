"""A small picture set that needs no download: ten shapes on patterned grounds, drawn by code, with masks.

Every shape is a signed distance function in its own frame (tilted, scaled, moved), smooth over one pixel at
its edge, filled with a pattern, lit from the upper left, outlined, and laid with its shadow on a two-tone
ground. Colors are chosen in OKLab (Ottosson 2020), where equal numbers look equally light.

    python tests/shapes.py [--columns 20] [--size 32] [--seed 0] [--out out/shapes.png]   # a contact sheet
"""
import argparse
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

NUMBERS = 40    # uniform numbers per picture, all that render() asks for
CHUNK = 100     # pictures drawn at once: what stays in a cache

# ------------------------------------------------------------------------------------------------------------
# shapes: signed distances, negative inside; x goes right, y goes down, every shape lies in the unit circle


def circle(x, y, radius, cx=0, cy=0):
    return np.hypot(x - cx, y - cy) - radius


def polygon(x, y, corners):
    """Distance to the nearest edge, negative where a ray crosses an odd number of edges."""
    square, inside = np.float32(np.inf), False
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1]):
        ex, ey, px, py = bx - ax, by - ay, x - ax, y - ay
        along = np.clip((px * ex + py * ey) * (1 / (ex * ex + ey * ey)), 0, 1)
        square = np.minimum(square, (px - along * ex) ** 2 + (py - along * ey) ** 2)
        inside = inside ^ (((y < ay) != (y < by)) & ((px * ey < py * ex) == (ey > 0)))
    return np.sqrt(square) * np.where(inside, np.float32(-1), np.float32(1))


def heart(x, y):
    """A square on its corner, with half a disk on each of its two upper sides."""
    x, y = np.abs(x), y - .1
    return np.minimum((x + np.abs(y) - .75) * .5 ** .5, circle(x, y, .75 * .5 ** .5, .375, -.375))


def fish(x, y):
    """A lens between two circles, and a tail; the eye is a point without depth, which the outline fills."""
    lens = np.maximum(circle(x, y, .82, -.25, .3), circle(x, y, .82, -.25, -.3))
    body = np.minimum(lens, polygon(x, y, [(.25, 0), (.84, -.49), (.7, 0), (.84, .49)]) - .04)
    return np.maximum(body, -circle(x, y, 0, -.6, -.1))


ANGLES = 2 * np.pi * np.arange(30) / 30
TURN = [(float(np.sin(a)), float(-np.cos(a))) for a in ANGLES]      # clockwise from the top
TRIANGLE = [(.91 * x, .91 * y) for x, y in TURN[::10]]
STAR = [(r * x, r * y) for r, (x, y) in zip([.93, .39] * 5, TURN[::3])]
BOLT = [(.02, -.89), (-.6, .15), (-.12, .15), (-.3, .92), (.6, -.26), (.12, -.26), (.43, -.89)]
ARM = [(.26, .26), (.9, .26), (.9, -.26)]   # a quarter of the cross, which is turned four times
CROSS = [(x * c + y * s, y * c - x * s) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1)) for x, y in ARM]
SHAPES = {
    "disk": lambda x, y: circle(x, y, .82),
    "ring": lambda x, y: np.abs(circle(x, y, .66)) - .24,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) - .72,
    "triangle": lambda x, y: polygon(x, y - .07, TRIANGLE) - .06,
    "star": lambda x, y: polygon(x, y - .03, STAR) - .05,
    "cross": lambda x, y: polygon(x, y, CROSS) - .05,
    "heart": heart,
    "moon": lambda x, y: np.maximum(circle(x, y, .94, .1), -circle(x, y, .72, .58, -.14)),
    "bolt": lambda x, y: polygon(x, y, BOLT) - .04,
    "fish": fish,
}
CLASSES = tuple(SHAPES)

# ------------------------------------------------------------------------------------------------------------
# patterns, colors, pictures


def cover(distance):
    """How much of a pixel lies inside, from the signed distance in pixels at its center."""
    return np.clip(.5 - distance, 0, 1)


def stripes(u, v, period):
    return cover((np.abs((u / period) % 1 - .5) - .25) * period)


def dots(u, v, period):
    return cover((np.hypot((u / period) % 1 - .5, (v / period) % 1 - .5) - .3) * period)


PATTERNS = (    # shares of a second color, of u and v in pixels
    lambda u, v, period: 0 * u,
    stripes,
    lambda u, v, period: np.abs(stripes(u, v, period) - stripes(v, u, period)),     # checks
    dots,
    lambda u, v, period: np.clip(.5 + u / (5 * period), 0, 1),                      # a slope
)


def each(kinds, functions, *arguments):
    """Picture by picture, the function of its kind: kinds [m], arguments [m,...]."""
    out = np.empty_like(arguments[0])
    for kind, function in enumerate(functions):
        of = kinds == kind
        out[of] = function(*(a[of] for a in arguments))
    return out


def turned(x, y, angle):
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def mix(a, b, share):
    """From a to b, [m,3,h,w] or [m,3,1,1], by a share [m,h,w]."""
    return a + (b - a) * share[:, None]


def color(light, chroma, hue):
    """OKLCh, [m,1,1] each -> sRGB [m,3,1,1] in [0,1], clipped to what a screen can show."""
    a, b = chroma * np.cos(hue), chroma * np.sin(hue)
    l, m, s = ((light + i * a + j * b) ** 3 for i, j in ((.3963, .2158), (-.1056, -.0639), (-.0895, -1.2915)))
    rgb = np.stack([4.0767 * l - 3.3077 * m + .2310 * s, -1.2684 * l + 2.6098 * m - .3413 * s,
                    -.0042 * l - .7034 * m + 1.7076 * s], 1).clip(0, 1)
    return np.where(rgb < .0031308, 12.92 * rgb, 1.055 * rgb ** (1 / 2.4) - .055)


def pattern(x, y, period, between):
    u, v = turned(x, y, between(0, np.pi))
    kinds = between(0, len(PATTERNS))[:, 0, 0].astype(int)
    return each(kinds, PATTERNS, u + between(0, 2 * np.pi) * period, v, np.broadcast_to(period, u.shape))


def ground(x, y, pixel, hue, between):
    """Two tones and a slow wave of light -> [m,3,h,w]. The hue is that of the shape to stand out."""
    light, chroma = np.where(between(0, 1) < .4, between(.34, .46), between(.84, .93)), between(.03, .065)
    hue = hue + np.pi + between(-1.3, 1.3)
    image = mix(color(light, chroma, hue), color(light - .08, chroma + .01, hue + between(-.3, .3)),
                pattern(x, y, between(9, 16) * pixel, between))
    u, _ = turned(x, y, between(0, 2 * np.pi))
    return image * (1 + .12 * np.sin(u / (16 * pixel) + between(0, 2 * np.pi)))[:, None]


def render(labels, numbers, size):
    """labels [m], numbers [m,NUMBERS] uniform in [0,1) -> images uint8 [m,size,size,3], masks bool
    [m,size,size]."""
    columns = iter(numbers.T.astype(np.float32)[..., None, None])       # each [m,1,1]
    pixel = size / 32                                                   # widths are in pixels of a 32-px one
    drop = max(1, round(1.5 * pixel))                                   # the shadow's way right and down

    def between(low, high):
        return low + (high - low) * next(columns)

    grid = np.arange(-drop, size, dtype=np.float32) + .5 - size / 2
    x, y = grid[None, None, :], grid[None, :, None]
    radius = between(.72, .92) * size / 2
    x, y = (plane - between(-.9, .9) * (size / 2 - radius) for plane in (x, y))
    u, v = turned(x / radius, y / radius, between(-.25, .25))
    distance = each(labels, SHAPES.values(), u, v) * radius             # [m,drop+size,drop+size]
    shadow, distance = distance[:, :-drop, :-drop], distance[:, drop:, drop:]
    x, y, _ = np.broadcast_arrays(x[..., drop:], y[:, drop:], distance)     # [m,size,size], from its middle

    hue, light, chroma = between(0, 2 * np.pi), between(.66, .8), between(.13, .17)
    fill = mix(color(light, chroma, hue), color(light - .13, chroma, hue + between(-.5, .5)),
               pattern(x, y, between(7, 11) * pixel, between))              # [m,3,size,size]
    fill = fill * (1 - .22 * (x + y) / radius)[:, None]                     # light from the upper left
    body = mix(color(light - .4, chroma / 2, hue), fill, cover(distance + 1.25 * pixel))
    image = ground(x, y, pixel, hue, between) * (1 - .4 * cover(shadow / (3 * pixel)))[:, None]
    image = mix(image, body, cover(distance)).clip(0, 1)
    return (image * 255 + .5).astype(np.uint8).transpose(0, 2, 3, 1), distance < 0


# ------------------------------------------------------------------------------------------------------------
# sets


def draw(n, size=32, seed=0):
    """images uint8 [n,size,size,3], masks bool [n,size,size], labels int64 [n]: picture i is a function of
    seed and i.

    Every ten pictures in a row hold each class once, in an order of their own."""
    seeds = (np.random.SeedSequence((seed, k)) for k in range(2))
    orders, numbers = (np.random.Generator(np.random.Philox(s)) for s in seeds)
    labels = orders.random((-(-n // 10), 10)).argsort(1).reshape(-1)[:n]
    numbers = numbers.random((n, NUMBERS))
    images, masks = np.empty((n, size, size, 3), np.uint8), np.empty((n, size, size), bool)
    for at in range(0, n, CHUNK):
        part = slice(at, at + CHUNK)
        images[part], masks[part] = render(labels[part], numbers[part], size)
    return images, masks, labels


def write(folder, n, size=32, seed=0):
    """draw() as PNG files, folder/00_disk/000123.png for picture 123, and folder/masks.npz: `masks`
    [n,size,size] in the order of the sorted `paths` [n]. The folder gets its name when it is whole; one that
    is there is left alone."""
    folder, part = Path(folder), Path(f"{folder}.part")
    if folder.exists():
        return
    shutil.rmtree(part, ignore_errors=True)
    images, masks, labels = draw(n, size, seed)
    for label, name in enumerate(CLASSES):
        (part / f"{label:02}_{name}").mkdir(parents=True)
    paths = np.array([f"{label:02}_{CLASSES[label]}/{i:06}.png" for i, label in enumerate(labels)])
    for path, image in zip(paths, images):
        Image.fromarray(image).save(part / path, compress_level=1)
    order = paths.argsort()
    np.savez_compressed(part / "masks.npz", paths=paths[order], masks=masks[order])
    part.rename(folder)


def main():
    parser = argparse.ArgumentParser(description="A contact sheet: a row of pictures of each class.")
    parser.add_argument("--columns", type=int, default=20, help="pictures of each class")
    parser.add_argument("--size", type=int, default=32, help="side in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="out/shapes.png", help="file to write")
    args = parser.parse_args()
    images, _, labels = draw(len(CLASSES) * args.columns, args.size, args.seed)
    images = images[labels.argsort(kind="stable")]
    tiles = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)       # [n,side,side,3]
    side = tiles.shape[1]
    rows = tiles.reshape(len(CLASSES), args.columns, side, side, 3).transpose(0, 2, 1, 3, 4)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rows.reshape(len(CLASSES) * side, args.columns * side, 3)).save(args.out)
    print(f"{len(images)} pictures of {args.size} px: {args.out}")


if __name__ == "__main__":
    main()
