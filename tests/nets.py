"""The demo's small networks: a teacher in DINOv2's architecture, and judges of another kind to score samples.

    python tests/nets.py SAMPLES.npz ... --judge out/demo/judge.pth --ref out/demo/data/val --size 32

A judge enters through fid.evaluate: any function from uint8 images [B,3,H,W] to features [B,D] and class
probabilities. --judge takes a file of train_judge, the word random (the same network with random weights,
which names nothing), or a python file that holds another network's class SqueezeNet, and the ten classes'
places among its logits, IMAGENETTE.
"""
import argparse
import importlib.util
import math
import shlex
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import fid
from dino import MEAN, STD, DINOv2
from vae import Images, UserError, from_uint8, load_strict, progress, read, read_json, rng, run_script, save


class Judge(nn.Module):
    """Eight convolutions and a mean over the picture: uint8 [B,3,H,W] -> features [B,128], class
    probabilities [B,K]."""

    def __init__(self, classes=10, widths=(32, 64, 128, 128)):
        super().__init__()
        layers, cin = [], 3
        for w in widths:
            for _ in range(2):
                layers += [nn.Conv2d(cin, w, 3, padding=1, bias=False), nn.BatchNorm2d(w), nn.ReLU()]
                cin = w
            layers.append(nn.MaxPool2d(2))
        self.body, self.head = nn.Sequential(*layers[:-1]), nn.Linear(cin, classes)

    def logits(self, x):
        features = self.body(from_uint8(x)).mean((2, 3))              # [B, 128]
        return features, self.head(features)

    def forward(self, x):
        with torch.no_grad():
            features, logits = self.logits(x)
        return features, logits.softmax(1)


# --------------------------------------------------------------------------------------------------- training


def schedule(step, steps, warmup):
    """Linear warm-up, then a cosine to zero."""
    return min((step + 1) / warmup, 1) * 0.5 * (1 + math.cos(math.pi * step / steps))


def fit(nets, loss, data, steps, batch, lr, decay, name):
    """AdamW on loss(indices, step) over random batches; matrices decay, vectors do not."""
    params = [p for net in nets for p in net.parameters()]
    groups = [{"params": [p for p in params if p.ndim > 1], "weight_decay": decay},
              {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr, betas=(0.9, 0.95))
    bar = progress(steps, name, "step")
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule(step, steps, min(100, steps // 4 + 1))
        value = loss(torch.from_numpy(rng(0, "order", step).integers(len(data), size=batch)), step)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        bar.update()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{value.item():.3f}")
    bar.close()


def jitter(x, step, pad):
    """Each picture of a batch shifted by up to `pad` pixels, and half of them mirrored: keyed by the step."""
    g, (_, _, h, w) = rng(0, "augment", step), x.shape
    padded = F.pad(x.float(), (pad,) * 4, mode="reflect").to(x.dtype)
    shifts = g.integers(0, 2 * pad + 1, (len(x), 2))
    moved = [p[:, dy:dy + h, dx:dx + w] for p, (dy, dx) in zip(padded, shifts)]
    return torch.stack([m.flip(-1) if mirror else m for m, mirror in zip(moved, g.random(len(x)) < 0.5)])


def train_judge(images, labels, steps, path, test):
    """Cross entropy on whole pictures; saves the state dict. images uint8 [N,3,S,S], test = (images, labels,
    ...)."""
    torch.manual_seed(1)
    net = Judge(int(labels.max()) + 1)

    def loss(i, step):
        logits = net.logits(jitter(images[i], step, images.shape[-1] // 16))[1]
        return F.cross_entropy(logits, labels[i], label_smoothing=0.1)

    fit([net], loss, images, steps, 64, 4e-3, 0.05, "judge")
    net.eval()
    right = torch.cat([net(x)[1].argmax(1) for x in test[0][:2000].split(100)]) == test[1][:2000]
    print(f"judge: names {right.float().mean():.1%} of the test pictures right")
    save(net.state_dict(), path)


def patch_labels(masks, labels, patch, none):
    """Masks bool [B,S,S] -> the label of each patch [B,N]: the picture's where the shape covers half of it,
    else `none`."""
    share = F.avg_pool2d(masks.float()[:, None], patch).flatten(1)
    return torch.where(share >= 0.5, labels[:, None], none)


def start_teacher(net):
    """Positions that begin as sines: what lets so small a ViT learn in minutes."""
    dim, grid = net.dim, net.grid
    at, w = torch.arange(grid).float(), 1 / 100 ** (torch.arange(dim // 4) / (dim / 4))
    line = torch.cat([(at[:, None] * w).sin(), (at[:, None] * w).cos()], 1)                  # [grid, dim/2]
    plane = torch.cat([line[:, None].expand(grid, grid, -1), line[None].expand(grid, grid, -1)], -1)
    with torch.no_grad():
        net.pos_embed[0, 1:] = plane.flatten(0, 1)


def normalized(x):
    return (x.float() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def train_teacher(images, labels, masks, steps, path, test):
    """dino.py's own network, 128 wide, 3 deep, patch 4, saved in Meta's layout. Two cross entropies: the
    class token's, and the patches': with masks [N,S,S], which shape covers them; without, of their mean."""
    torch.manual_seed(0)
    classes, size = int(labels.max()) + 1, images.shape[-1]
    net = DINOv2(128, 3, patch=4, registers=4, grid=size // 4)
    start_teacher(net)
    on_cls, on_patch = nn.Linear(128, classes), nn.Linear(128, classes + 1)

    def loss(i, step):
        x = images[i] if masks is not None else jitter(images[i], step, size // 16)
        patch, cls = net(normalized(x))                               # [B, N, 128], [B, 128]
        if masks is None:
            patches = F.cross_entropy(on_patch(patch.mean(1)), labels[i])
        else:
            covering = patch_labels(masks[i], labels[i], 4, classes)                         # [B, N]
            patches = F.cross_entropy(on_patch(patch).transpose(1, 2), covering)
        return F.cross_entropy(on_cls(cls), labels[i]) + patches

    batch = 64 if masks is not None else 32
    fit([net, on_cls, on_patch], loss, images, steps, batch, 2e-3, 0.05, "teacher")
    with torch.no_grad():
        patch, cls = map(torch.cat, zip(*(net(normalized(x)) for x in test[0][:2000].split(100))))
        right = (on_cls(cls).argmax(1) == test[1][:2000]).float().mean()
        text = f"teacher: names {right:.1%} of the test pictures right"
        if masks is not None:
            truth, seen = patch_labels(test[2][:2000], test[1][:2000], 4, classes), on_patch(patch).argmax(-1)
            right = (seen == truth)[truth < classes].float().mean()
            text += f", and {right:.1%} of their foreground patches"
    print(text)
    save(net.state_dict(), path)


# ------------------------------------------------------------------------------------------------------ masks


def train_mask_head(features, masks):
    """A linear head by logistic regression from patch features [N,n,D] to the foreground's share of each
    patch of masks [N,S,S]; returns the function features -> bool masks [N,S,S], its logits enlarged
    bilinearly."""
    size, side = masks.shape[-1], math.isqrt(features.shape[1])
    share = F.avg_pool2d(masks.float()[:, None], size // side).flatten(1)
    mean, std = features.mean((0, 1)), features.std((0, 1))
    w = torch.zeros(features.shape[-1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=50, line_search_fn="strong_wolfe")

    def logits(features):
        return (features - mean) / std @ w[:-1] + w[-1]               # [N, n]

    def loss():
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(logits(features), share) + 1e-4 * w.square().sum()
        value.backward()
        return value

    def head(features):
        tiles = logits(features).unflatten(1, (1, side, side))
        return F.interpolate(tiles, (size, size), mode="bilinear")[:, 0] > 0

    with torch.enable_grad():
        optimizer.step(loss)
    w.requires_grad_(False)
    return head


def iou(seen, truth):
    """Intersection over union of two masks, pixels of all pictures together."""
    return ((seen & truth).sum() / (seen | truth).sum().clamp_min(1)).item()


def mean_iou(seen, truth):
    """The mean of the foreground's and the background's intersection over union; bool [N,S,S]."""
    return (iou(seen, truth) + iou(~seen, ~truth)) / 2


def constant_guesses(truth):
    """The mean IoU of the best single label for every pixel, and of the best single mask for every picture (a
    threshold on the mean mask), chosen with the truth [N,S,S] at hand."""
    often = truth.float().mean(0)
    one_label = [mean_iou(torch.full_like(truth, label), truth) for label in (False, True)]
    one_mask = [mean_iou((often > t).expand_as(truth), truth) for t in torch.linspace(0, 1, 65)]
    return max(one_label), max(one_mask)


def threshold_mask(images):
    """Foreground by color alone: farther from the border's mean color than Otsu's threshold of that picture;
    uint8 [N,3,S,S] -> bool [N,S,S]."""
    x = images.float()
    edge = torch.cat([x[..., 0, :], x[..., -1, :], x[..., 0], x[..., -1]], -1).mean(-1)
    far = (x - edge[..., None, None]).square().sum(1).sqrt().flatten(1)                      # [N, S*S]
    ranked, n = far.sort(1).values, far.shape[1]
    k = torch.arange(1, n)
    below = ranked.cumsum(1)[:, :-1] / k
    above = (ranked.sum(1, keepdim=True) - ranked.cumsum(1)[:, :-1]) / (n - k)
    between = k * (n - k) * (above - below).square()                  # the variance between the two
    return (far > ranked.gather(1, between.argmax(1, keepdim=True))).view(len(x), *x.shape[-2:])


# ---------------------------------------------------------------------------------------------------- judging


def trained(path):
    state = read(path)
    if "head.bias" not in state:
        raise UserError(f"{path}: no judge of this file's train_judge: no tensor head.bias")
    return load_strict(Judge(len(state["head.bias"])), state, str(path))


def untrained(images):
    """The judge's network with random weights; its batch norms take their statistics from one pass over real
    pictures."""
    torch.manual_seed(2)
    net = Judge()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = None
    with torch.no_grad():
        for x in images.split(100):
            net.logits(x)
    net.eval()
    return lambda x: (net(x)[0], None)


def foreign(path, means, images, labels):
    """SqueezeNet of a python file -> pooled features at its own 224 px, and the ten imagenette classes at
    160 px, which names small, soft pictures better. Each class's mean logit over `means`, real training
    pictures, is subtracted, because it leans to some classes. How many of other real pictures it names right
    is printed."""
    spec = importlib.util.spec_from_file_location("judge", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    net, namer, ten = module.SqueezeNet(), module.SqueezeNet(size=160), list(module.IMAGENETTE.values())

    def logits(x):
        return torch.cat([namer(from_uint8(part))[1] for part in x.split(5)])[:, ten]

    parts, bar = [], progress(len(means), "class means")
    for x in means.split(50):
        parts.append(logits(x))
        bar.update(len(x))
    bar.close()
    mean = torch.cat(parts).mean(0)

    def judge(x):
        features = torch.cat([net(from_uint8(part))[0] for part in x.split(5)])
        return features, (logits(x) - mean).softmax(1)

    right = torch.cat([judge(x)[1].argmax(1) for x in images[:500].split(50)]) == labels[:500]
    print(f"{path}: names {right.float().mean():.1%} of real pictures of this size right")
    return judge


def drawn(folder, size, n=None):
    """(So many of) a folder's pictures in an order drawn with seed 0: uint8 [N,3,S,S], labels [N]."""
    data = Images(folder, size)
    order = rng(0, "subset").permutation(len(data))[:n]
    return torch.stack([data[int(i)][0] for i in order]), torch.as_tensor(data.labels[order])


def flags():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("samples", nargs="+", help="npz files: arr_0 uint8 NHWC, arr_1 labels")
    p.add_argument("--judge", required=True)
    p.add_argument("--ref", required=True, help="folder of real pictures, one subfolder per class")
    p.add_argument("--means", help="folder of real training pictures, whose mean logits a python file's "
                   "network gets subtracted; default: the folder train beside --ref, without one --ref")
    p.add_argument("--size", type=int, required=True)
    p.add_argument("--out", help="json file to add the numbers to")
    return p.parse_args()


@torch.no_grad()
def main():
    args = flags()
    real, real_labels = drawn(args.ref, args.size)
    if args.judge == "random":
        kind, net = "random", untrained(real[:1000])
    elif args.judge.endswith(".py"):
        train = Path(args.ref).parent / "train"
        means = drawn(args.means or (train if train.is_dir() else args.ref), args.size, 1000)[0]
        kind, net = "foreign", foreign(args.judge, means, real, real_labels)
    else:
        kind, net = "judge", trained(args.judge)
    reference, values = fid.measure(net, real, keep=False), {}
    print(f"{'':60}{'n':>8}{'FD':>12}{'named right':>14}")
    for name in args.samples:
        with np.load(name) as z:
            labels = torch.from_numpy(z["arr_1"]) if kind != "random" else None
        values[name] = r = fid.evaluate(net, name, reference, labels, k=0)
        named = f"{r['accuracy']:14.3f}" if "accuracy" in r else ""
        print(f"{name[-58:]:60}{r['n']:8,}{r['fd']:12.4f}{named}", flush=True)
    if args.out:
        book = read_json(args.out, {})
        book[kind] = {"value": values, "command": shlex.join(["python", *sys.argv])}
        save(book, args.out)


if __name__ == "__main__":
    run_script(main)
