"""The numbers that papers report, without TensorFlow: FID, sFID, IS, precision and recall as ADM's evaluator defines
them (Dhariwal & Nichol 2021); and what a latent space is worth: rFID, PSNR, SSIM, LPIPS (Table 8), semantic
consistency (Algorithm 1, Table 2), statistics (Table 10) and a linear probe.

    python fid.py samples.npz --ref VIRTUAL_imagenet256_labeled.npz
    python fid.py --vae sd-vae-ft-ema out/vae --data imagenet/val
    fid.evaluate(net, samples, reference)["fd"]     # in any network's features: the Fréchet distance (FD)
"""
import argparse
import contextlib
import math
import os
import platform
import shlex
import struct
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from scipy.linalg.blas import dsyrk
from torch import nn

import dino
import vae

GITHUB = "https://github.com/"
PUBLIC = {  # name: (url, file, beginning of its sha256, bytes)
    "inception": (GITHUB + "mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
                  "pt_inception-2015-12-05-6726825d.pth", "6726825d", None),
    "vgg16": ("https://download.pytorch.org/models/vgg16-397923af.pth", "vgg16-397923af.pth", "397923af", None),
    "lpips": (GITHUB + "richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth", "lpips-v0.1-vgg.pth",
              "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868", 7289),
}


def weights(source):
    """(state dict, name for messages) of a public name, a file, or a state dict."""
    if isinstance(source, dict):
        return source, "the given state dict"
    return vae.read(vae.fetch(*PUBLIC[source]) if source in PUBLIC else source), source


# ---------------------------------------------------------------------------------------------- Inception (2015-12-05)


def resize_tf1(x, size):
    """TensorFlow 1's bilinear resize of [B,C,H,W]: output i looks at input i * H / size, without half-pixel centres."""
    def taps(n):
        at = torch.arange(size, device=x.device, dtype=x.dtype) * (n / size)
        low = at.floor().long()
        return low, (low + 1).clamp(max=n - 1), at - low

    (top, bottom, fy), (left, right, fx) = taps(x.shape[2]), taps(x.shape[3])
    x = x[..., left] + (x[..., right] - x[..., left]) * fx                      # [B, C, H, size]
    return x[..., top, :] + (x[..., bottom, :] - x[..., top, :]) * fy[:, None]  # [B, C, size, size]


POOLS = {"avg": partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False),
         "max": partial(F.max_pool2d, kernel_size=3, stride=1, padding=1),
         "halve": partial(F.max_pool2d, kernel_size=3, stride=2)}


class Conv(nn.Module):
    """Convolution, batch norm, ReLU. A stride goes without padding; else the size is kept, unless padding is given."""

    def __init__(self, cin, cout, kernel, stride=1, padding=None):
        super().__init__()
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = [k // 2 if stride == 1 else 0 for k in kernel] if padding is None else padding
        self.conv = nn.Conv2d(cin, cout, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(cout, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches side by side, concatenated. A branch is a chain of steps: (name, channels, kernel, stride), a pool's
    name, or a list of steps that all read the same input and are concatenated."""

    def __init__(self, cin, *branches):
        super().__init__()
        self.branches = branches
        for branch in branches:
            width = cin
            for step in branch:
                steps = [] if isinstance(step, str) else step if isinstance(step, list) else [step]
                for name, cout, *how in steps:
                    self.add_module(name, Conv(width, cout, *how))
                width = sum(s[1] for s in steps) or width

    def walk(self, branch, x):
        for step in branch:
            if isinstance(step, list):
                x = torch.cat([self.walk([s], x) for s in step], 1)
            else:
                x = POOLS[step](x) if isinstance(step, str) else self.get_submodule(step[0])(x)
        return x

    def forward(self, x):
        return torch.cat([self.walk(branch, x) for branch in self.branches], 1)


def mixed_5(cin, pool):
    return Mixed(cin, [("branch1x1", 64, 1)],
                 [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
                 [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
                 ["avg", ("branch_pool", pool, 1)])


def mixed_6(c):
    return Mixed(768, [("branch1x1", 192, 1)],
                 [("branch7x7_1", c, 1), ("branch7x7_2", c, (1, 7)), ("branch7x7_3", 192, (7, 1))],
                 [("branch7x7dbl_1", c, 1), ("branch7x7dbl_2", c, (7, 1)), ("branch7x7dbl_3", c, (1, 7)),
                  ("branch7x7dbl_4", c, (7, 1)), ("branch7x7dbl_5", 192, (1, 7))],
                 ["avg", ("branch_pool", 192, 1)])


def mixed_7(cin, pool):
    return Mixed(cin, [("branch1x1", 320, 1)],
                 [("branch3x3_1", 384, 1), [("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1))]],
                 [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3),
                  [("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))]],
                 [pool, ("branch_pool", 192, 1)])


class Inception(nn.Module):
    """The Inception v3 of FID (TensorFlow's 2015-12-05 graph), with what ADM's evaluator reads from it. It differs from
    torchvision's in average pools that do not count their padding, and in a max pool in Mixed_7c."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, padding=0)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = mixed_5(192, 32), mixed_5(256, 64), mixed_5(288, 64)
        self.Mixed_6a = Mixed(288, [("branch3x3", 384, 3, 2)],
                              [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)],
                              ["halve"])
        self.Mixed_6b, self.Mixed_6c = mixed_6(128), mixed_6(160)
        self.Mixed_6d, self.Mixed_6e = mixed_6(160), mixed_6(192)
        self.Mixed_7a = Mixed(768, [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)],
                              [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)),
                               ("branch7x7x3_3", 192, (7, 1)), ("branch7x7x3_4", 192, 3, 2)],
                              ["halve"])
        self.Mixed_7b, self.Mixed_7c = mixed_7(1280, "avg"), mixed_7(2048, "max")
        self.fc = nn.Linear(2048, 1008)

    @classmethod
    def load(cls, source="inception"):
        """The network with the weights of a file in pytorch-fid's and torch-fidelity's layout, or of the public one."""
        net = cls()
        vae.load_state(net, *weights(source))
        order = torch.preserve_format if torch.cuda.is_available() else torch.channels_last   # CPU: 1.5 times as fast
        return net.eval().requires_grad_(False).to(memory_format=order)

    def forward(self, x):
        """uint8 [B,3,H,W] -> pool [B,2048] (FID), spatial [B,2023] (sFID), probs [B,1008] (IS; logits without bias)."""
        if x.dtype != torch.uint8:
            raise ValueError(f"Inception takes uint8 images [B,3,H,W], not {x.dtype} {tuple(x.shape)}")
        parts = x.split(8) if x.device.type == "cpu" else [x]     # few images at once stay in a CPU's caches: 1.5 times again
        return tuple(map(torch.cat, zip(*map(self.look, parts))))

    def look(self, x):
        wide = torch.promote_types(self.fc.weight.dtype, torch.float32)              # bf16 cannot tell pixels' places apart
        x = ((resize_tf1(x.to(wide), 299) - 128) / 128).to(self.fc.weight.dtype)     # [B, 3, 299, 299]
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))            # [B, 64, 147, 147]
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(POOLS["halve"](x)))                # [B, 192, 71, 71]
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(POOLS["halve"](x))))           # [B, 288, 35, 35]
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))                           # [B, 768, 17, 17]
        spatial = self.Mixed_6d.branch1x1(x)[:, :7].permute(0, 2, 3, 1).flatten(1)   # [B, 17*17*7], channels last
        x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))                           # [B, 1280, 8, 8]
        pool = self.Mixed_7c(self.Mixed_7b(x)).mean((2, 3))                          # [B, 2048]
        return pool, spatial, (pool @ self.fc.weight.T).softmax(1)                   # [B, 1008]


# --------------------------------------------------------------------------------------------------------------- LPIPS


class LPIPS(nn.Module):
    """Learned perceptual distance on VGG16 (Zhang et al. 2018, version 0.1): a, b [B,3,H,W] in [-1,1] -> [B].
    widths: of the 13 convolutions. In float32 whatever autocast says; the gradient is finite everywhere."""

    convs = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)   # torchvision's numbers of the layers, ReLU after each
    pools = (4, 9, 16, 23)
    taps = (3, 8, 15, 22, 29)                                  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3

    def __init__(self, widths):
        super().__init__()
        self.features, cin = nn.Sequential(), 3
        for i in range(30):
            layer = nn.MaxPool2d(2) if i in self.pools else nn.ReLU()
            if i in self.convs:
                layer, cin = nn.Conv2d(cin, widths[self.convs.index(i)], 3, padding=1), widths[self.convs.index(i)]
            self.features.append(layer)
        tapped = [widths[i] for i in (1, 3, 6, 9, 12)]
        self.lin = nn.ParameterDict({f"lin{k}": torch.full((1, c, 1, 1), 1 / 5) for k, c in enumerate(tapped)})
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))   # ImageNet's mean and
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))      # deviation on [-1,1]

    @classmethod
    def load(cls, vgg=None, lin=None):
        """vgg: torchvision's VGG16 or a thinner one in its layout (widths are read from the file), or None: public.
        lin: the file of the linear layers, or "lpips" for the public ones; None: those with the public VGG16, and with
        another one the five layers averaged."""
        lin = "lpips" if lin is None and vgg in (None, "vgg16") else lin
        state, name = weights("vgg16" if vgg is None else vgg)
        for key in (f"features.{i}.weight" for i in cls.convs):
            if key not in state:
                raise ValueError(f"{name}: not a VGG16: no tensor {key}")
            if state[key].ndim != 4 or not len(state[key]):
                raise ValueError(f"{name}: {key} is {tuple(state[key].shape)}, expected the 4 dimensions of a convolution")
        net = cls([len(state[f"features.{i}.weight"]) for i in cls.convs])
        vae.load_state(net.features, {k[9:]: v for k, v in state.items() if k.startswith("features.")}, name)
        if lin is not None:
            state, name = weights(lin)
            state = {k.removesuffix(".model.1.weight"): v for k, v in state.items() if not k.startswith("lins.")}
            vae.load_state(net.lin, {k: v for k, v in state.items() if k in net.lin}, name)
        return net.eval().requires_grad_(False)

    def unit(self, x):
        """The five layers' features, each vector divided by its length."""
        x = (x.to(self.scale.dtype) - self.shift) / self.scale
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.taps:
                # at a zero vector torch's norm has gradient 0, the square root of a sum would have an infinite one
                yield x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10)   # [B, C, h, w]

    def forward(self, a, b):
        with torch.autocast(a.device.type, enabled=False):
            return sum(((x - y) ** 2 * w).sum(1).mean((1, 2))                          # [B]
                       for x, y, w in zip(self.unit(a), self.unit(b), self.lin.values()))


# ----------------------------------------------------------------------------------------------- distances and scores


def frechet(mu1, sigma1, mu2, sigma2):
    """Squared Fréchet distance of two Gaussians, |mu1 - mu2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)), in float64.

    With S1 = A A^T, the eigenvalues of S1 S2 are those of the symmetric A^T S2 A: nothing complex and nothing inverted,
    so singular covariances (fewer images than features) do no harm."""
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(x).double() for x in (mu1, sigma1, mu2, sigma2))
    values, vectors = torch.linalg.eigh(sigma1)
    a = vectors * values.clamp(min=0).sqrt()
    root = torch.linalg.eigvalsh(a.T @ sigma2 @ a).clamp(min=0).sqrt().sum()
    return ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * root).item()


SPLIT = 5000   # ADM's Inception Score: the mean over splits of 5000 consecutive images


def split_sums(probs, places, n):
    """[splits, K+1]: sums over each split of p and, in the last column, of sum p log p."""
    p = probs.double()
    p = torch.cat([p, torch.xlogy(p, p).sum(1, keepdim=True)], 1)
    return p.new_zeros(-(-n // SPLIT), p.shape[1]).index_add_(0, (places // SPLIT).to(p.device), p)


def score(sums, n):
    """exp(mean KL) of n images from split_sums of them [splits, K+1]: the mean over the splits."""
    count = (n - SPLIT * torch.arange(len(sums), device=sums.device)).clamp(max=SPLIT)[:, None]
    means = sums / count
    marginal = means[:, :-1]
    return (means[:, -1] - torch.xlogy(marginal, marginal).sum(1)).exp().mean().item()


def inception_score(probs):
    """exp(mean KL(p(y|x) || p(y))) of probs [N,K]: the mean over splits of 5000 images in their order (ADM)."""
    probs = torch.as_tensor(probs)
    return score(split_sums(probs, torch.arange(len(probs)), len(probs)), len(probs))


def distances(a, b):
    """Squared Euclidean distances [n,m] of float64 rows, never negative."""
    return torch.addmm(b.square().sum(1), a, b.T, alpha=-2).add_(a.square().sum(1, keepdim=True)).clamp_(min=0)


def precision_recall(real, fake, k=3, chunk=1024):
    """Improved precision and recall (Kynkäänniemi et al. 2019) of features [N,D], [M,D]: the share of fake inside any
    real image's ball, which reaches to its k-th neighbour, and the share of real inside any fake one's. Distances are
    float64 (ADM's evaluator: float16), `chunk` rows at a time."""
    real, fake = torch.as_tensor(real).double(), torch.as_tensor(fake).double()
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"precision and recall with k={k} need more than {k} images on both sides")
    centre = real.mean(0)
    real, fake = real - centre, fake - centre        # distances stay, cancellation shrinks
    radius = [torch.cat([distances(part, x).topk(k + 1, largest=False).values[:, -1] for part in x.split(chunk)])
              for x in (real, fake)]                 # k + 1: every point is its own nearest neighbour
    precise, recalled = 0, torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for part, r in zip(fake.split(chunk), radius[1].split(chunk)):
        d = distances(part, real)                    # [chunk, N]
        precise += (d <= radius[0]).any(1).sum().item()
        recalled |= (d <= r[:, None]).any(0)
    return precise / len(fake), recalled.double().mean().item()


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of images [B,3,H,W] in [0,1] -> [B]."""
    return -10 * (a.double() - b.double()).square().flatten(1).mean(1).log10()


def ssim(a, b, data_range=1.0):
    """Structural similarity (Wang et al. 2004) of images [B,3,H,W] in [0,1] -> [B], as scikit-image's default: uniform
    window of 7, sample covariances. data_range 2 is the reading behind Table 8, for all that images span 1."""
    a, b, mean = a.double(), b.double(), partial(F.avg_pool2d, kernel_size=7, stride=1)
    ma, mb, n = mean(a), mean(b), 49 / 48
    va, vb, vab = n * (mean(a * a) - ma * ma), n * (mean(b * b) - mb * mb), n * (mean(a * b) - ma * mb)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    s = (2 * ma * mb + c1) * (2 * vab + c2) / ((ma * ma + mb * mb + c1) * (va + vb + c2))
    return s.flatten(1).mean(1)


# --------------------------------------------------------------------------------- image sets and their statistics


@contextlib.contextmanager
def exact():
    """Full float32, no TF32, no autocast, no gradient, whatever the caller runs in; decorates all that measures."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.no_grad(), torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def npz_array(path, name):
    """An array of an npz file: mapped, not read, where it is uint8 and stored plain (np.savez); a compressed one is read whole."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(f"{name}.npy")
        with archive.open(info) as f:
            version = np.lib.format.read_magic(f)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(f)
            header = f.tell()
    if info.compress_type != zipfile.ZIP_STORED or dtype != np.uint8:
        return np.load(path)[name]
    with open(path, "rb") as f:   # the zip's own header of this member: 30 bytes, a name, an extra field
        f.seek(info.header_offset + 26)
        start = info.header_offset + 30 + sum(struct.unpack("<HH", f.read(4))) + header
    return np.memmap(path, dtype, "c", start, shape, "F" if fortran else "C")


def checked(array, name):
    """uint8 numpy [N,H,W,3] or tensor [N,3,H,W] -> a tensor [N,3,H,W] on the same memory."""
    kind, shape = str(array.dtype), tuple(array.shape)
    if kind not in ("uint8", "torch.uint8"):
        raise ValueError(f"{name}: images are {kind}, expected uint8 in 0..255")
    axis, expected = (1, "[N,3,H,W]") if torch.is_tensor(array) else (3, "[N,H,W,3]")
    if len(shape) != 4 or shape[axis] != 3:
        raise ValueError(f"{name}: images are {list(shape)}, expected {expected}")
    return array if torch.is_tensor(array) else torch.from_numpy(array).permute(0, 3, 1, 2)


def open_set(source, size=None):
    """(images or None, Statistics or None) of a folder of images (any depth; size: its center crop), an npz with arr_0
    and/or mu, sigma, mu_s, sigma_s, an array, a tensor, a sequence of uint8 [3,H,W] or (uint8 [3,H,W], label)."""
    if isinstance(source, Statistics):
        return None, source
    if not isinstance(source, (str, Path)):
        return checked(source, "images") if isinstance(source, np.ndarray) or torch.is_tensor(source) else source, None
    if os.path.isdir(source):
        return vae.Images(source, size), None
    if not os.path.isfile(source):
        raise FileNotFoundError(f"{source}: no such file or folder of images")
    try:
        with zipfile.ZipFile(source) as archive:
            names = archive.namelist()
        images = checked(npz_array(source, "arr_0"), f"{source}: arr_0") if "arr_0.npy" in names else None
        known = Statistics.read(source) if "mu.npy" in names else None
    except zipfile.BadZipFile:
        raise ValueError(f"{source}: neither a folder of images nor a whole npz file") from None
    if images is None and known is None:
        raise ValueError(f"{source}: holds neither images (arr_0) nor statistics (mu, sigma), but {', '.join(names)}")
    return images, known


def batches(images, micro, run, desc):
    """(places [B], uint8 [B,3,H,W] on the device) of this process's share of the images: rank, rank + world, ..., so
    each image is seen exactly once. Threads read one batch ahead; what one process cannot read, all of them report."""
    if len(images) < run.world:
        raise ValueError(f"{desc}: {len(images)} images are too few for {run.world} processes")
    places, shape, error = torch.arange(run.rank, len(images), run.world).split(micro), None, None
    with ThreadPoolExecutor(8) as pool, run.bar(len(images), desc) as bar:
        ahead = [pool.submit(images.__getitem__, i) for i in places[0].tolist()]
        for now, after in zip(places, [*places[1:], torch.arange(0)]):
            try:
                items = [item[0] if isinstance(item, tuple) else item for item in (f.result() for f in ahead)]
                shape = shape or items[0].shape
                for i, item in zip(now.tolist(), items):
                    if item.shape != shape:
                        raise ValueError(f"{desc}: image {i} is {tuple(item.shape)}, an earlier one {tuple(shape)}; "
                                         "--size brings a folder to one size")
                x = checked(torch.stack(items), desc)
            except (OSError, ValueError) as e:
                error = str(e)
                break
            ahead = [pool.submit(images.__getitem__, i) for i in after.tolist()]
            yield now, x.to(run.device)
            bar.update(min(len(now) * run.world, len(images) - bar.n))
    if errors := [e for e in run.all(error) if e]:
        raise ValueError(errors[0])
    if len(shapes := set(run.all(shape and tuple(shape)))) > 1:
        raise ValueError(f"{desc}: images of {' and '.join(map(str, sorted(shapes)))}; --size brings a folder to one size")


class Statistics:
    """What n images are reduced to in the features of one network (`space`): .moments, (mu [D], sigma [D,D]) of each
    feature set (n None: of how many images is not known); .score (Inception Score), .accuracy, .features [n,D], where
    asked for and possible, else None. Batches are added as float64 sums; finish merges the processes' sums."""

    arrays = (("mu", "sigma"), ("mu_s", "sigma_s"))   # their names in ADM's npz files

    def __init__(self, name, space="", n=None, labels=None, keep=False):
        self.name, self.space, self.n, self.keep, self.sizes = name, space, n, keep, []
        self.labels = None if labels is None else torch.as_tensor(labels).cpu()
        self.moments, self.score, self.accuracy, self.features, self.sums, self.held = [], None, None, None, {}, {}

    def tally(self, key, value):
        self.sums[key] = self.sums[key].add_(value) if key in self.sums else value.clone()

    def outer(self, k, least=1):
        """Adds f^T f of the held rows f of feature set k, once there are `least` of them: fewer passes over a large matrix.
        Only its upper triangle counts: a CPU leaves out the other one, which is half the work."""
        if sum(map(len, self.held[k])) >= least:
            f, key = torch.cat(self.held[k]), f"outer{k}"                             # [B, D]
            if key not in self.sums:
                self.sums[key] = f.new_zeros(f.shape[1], f.shape[1])
            total = self.sums[key]
            if f.is_cuda:
                total.addmm_(f.T, f)
            else:
                dsyrk(1, f.numpy().T, 1, total.numpy().T, lower=1, overwrite_c=1)     # in place: BLAS's order is the transpose
            self.held[k] = []

    def add(self, places, outputs):
        """A batch: where its images stand in the set [B], and what the network made of them: (features [B,D], probs
        [B,K] or None), or (features, more features, probs)."""
        if not isinstance(outputs, (tuple, list)) or len(outputs) < 2:
            raise ValueError(f"{self.name}: the network gives no pair of features [B,D] and probabilities [B,K] or None")
        *sets, probs = outputs
        if probs is not None and not ((probs >= 0).all() and ((probs.double().sum(1) - 1).abs() < 1e-2).all()):
            raise ValueError(f"{self.name}: the network's probabilities are negative or do not sum to 1; are they logits?")
        self.sizes = [f.shape[1] for f in sets]
        self.tally("count", torch.tensor(len(places)))
        for k, f in enumerate(sets):
            if not f.isfinite().all():
                raise ValueError(f"{self.name}: the network's features are not finite")
            f = f.double()
            self.tally(f"sum{k}", f.sum(0))
            self.held.setdefault(k, []).append(f)
            self.outer(k, 1024)
        if self.keep:
            if self.features is None:
                self.features = sets[0].new_zeros(self.n, sets[0].shape[1])
            self.features[places.to(self.features.device)] = sets[0]
        if probs is not None:
            self.tally("probs", split_sums(probs, places, self.n))
            if self.labels is not None:
                self.tally("right", (probs.argmax(1).cpu() == self.labels[places]).sum())

    def finish(self, run):
        """Merges the sums of all processes and makes of them what the class promises; ValueError if images are missing."""
        for k in self.held:
            self.outer(k)
        total = {key: run.sum(self.sums[key]) for key in sorted(self.sums)}   # in one order on all ranks
        if total["count"] != self.n or self.n < 2:
            raise ValueError(f"{self.name}: {total['count']} of {self.n} images; statistics need all, and two at least")
        for k in range(sum(key.startswith("outer") for key in total)):
            mean, outer = total[f"sum{k}"] / self.n, total[f"outer{k}"].triu()
            outer = outer + outer.triu(1).T
            self.moments.append((mean, (outer - self.n * torch.outer(mean, mean)) / (self.n - 1)))
        self.features = run.sum(self.features) if self.keep else None
        self.score = score(total["probs"], self.n) if "probs" in total else None
        self.accuracy = total["right"].item() / self.n if "right" in total else None
        self.sums = {}
        return self

    def same_space(self, other):
        """Raises ValueError where two are of different features. A space's name may lack words, or all of them (ADM)."""
        pairs = [*zip(self.sizes, other.sizes), *zip(self.space.split(), other.space.split())]
        if any(x != y for x, y in pairs):
            said = [" + ".join(map(str, s.sizes)) or "any" for s in (self, other)]
            raise ValueError(f"{self.name}: statistics of another feature space ({said[0]} features, "
                             f"{self.space or 'unnamed'}) than {other.name} ({said[1]}, {other.space or 'unnamed'})")

    def save(self, path):
        """An npz with mu and sigma under ADM's names, and n and space."""
        named = {key: x.cpu().numpy() for keys, pair in zip(self.arrays, self.moments) for key, x in zip(keys, pair)}
        with vae.atomic(path) as f:
            np.savez(f, **named, n=self.n or 0, space=self.space)

    @classmethod
    def read(cls, path):
        """From such an npz, ours or ADM's (which names neither n nor space); ValueError if mu and sigma do not fit."""
        with np.load(path) as z:
            self = cls(str(path), str(z.get("space", "")), int(z.get("n", 0)) or None)
            for mu, sigma in cls.arrays:
                if mu in z:
                    mean, cov = z[mu], z[sigma] if sigma in z else np.zeros(0)
                    if cov.shape != (mean.size, mean.size) or not np.isfinite(cov).all() or not np.isfinite(mean).all():
                        raise ValueError(f"{path}: {mu} and {sigma} are no finite mean [D] and covariance [D,D]")
                    self.moments.append((torch.from_numpy(mean), torch.from_numpy(cov)))
                    self.sizes.append(mean.size)
        return self


@exact()
def measure(net, source, labels=None, space="", size=None, keep=True, micro=64, run=None, like=()):
    """Statistics of an image set (open_set says which) in net's features; keep: these, too, for precision and recall.
    A file's own mu and sigma are used where it has them; its images then serve precision and recall alone (ADM). like:
    Statistics that must be of the same features, which the first batch shows."""
    run = run or vae.Run()
    images, known = open_set(source, size)
    if images is None or (known is not None and not keep):
        return known
    name = str(source) if isinstance(source, (str, Path)) else "images"
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"{name}: {len(images)} images but {len(labels)} labels")
    result = Statistics(name, space, len(images), labels, keep)
    for places, x in batches(images, micro, run, Path(name).name):
        result.add(places, net(x))
        for other in [*like, known] if known else like:
            other.same_space(result)
    result.finish(run)
    if known is None:
        return result
    known.score, known.accuracy, known.features = result.score, result.accuracy, result.features   # n stays the moments'
    return known


@exact()
def evaluate(net, samples, reference, labels=None, k=3, space="", size=None, micro=64, run=None):
    """Samples against a reference in any network's eyes -> a dict of numbers.

    net: uint8 [B,3,H,W] -> (features [B,D], probs [B,K] or None); Inception has a second feature set between the two.
    samples, reference: a folder (size: its center crop), an npz file, uint8 numpy [N,H,W,3], uint8 tensor [N,3,H,W],
    any sequence of uint8 [3,H,W] or of (uint8 [3,H,W], label), or Statistics (from measure(), to share among calls).
    labels: the classes [N] that the samples were made for, in net's numbering.
    Gives, as far as there is what they need: n, fd (squared Fréchet distance), sfd (of the second features), is
    (Inception Score), precision and recall (k-th neighbours; k=0 leaves them out), accuracy (share of samples that net
    names as labelled). Under torchrun the processes share the work, and all return the same."""
    run = run or vae.Run()
    how = dict(space=space, size=size, keep=k > 0, micro=micro, run=run)
    real = measure(net, reference, **how)
    fake = measure(net, samples, labels, **how, like=[real])
    real.same_space(fake)
    out = {"n": fake.n}
    for name, one, two in zip(("fd", "sfd"), fake.moments, real.moments):
        out[name] = frechet(*(x.to(run.device) for x in (*one, *two)))
    if fake.score is not None:
        out["is"] = fake.score
    if k and fake.features is not None and real.features is not None:
        features = [s.features.to(run.device) for s in (real, fake)]
        out["precision"], out["recall"] = precision_recall(*features, k)
    if fake.accuracy is not None:
        out["accuracy"] = fake.accuracy
    return out


# --------------------------------------------------------------------------------------------------- latent spaces


def augmentations(scale=(0.08, 1), ratio=(3 / 4, 4 / 3), kernel=None, sigma=(0.1, 2)):
    """Table 2's five augmentations: name -> function of (image [3,H,W] in [0,1], generator) that makes two views of it.
    The paper names no strengths; these are the self-supervised field's. Flip and grayscale compare the image with its
    mirror image and its gray version. kernel: the blur's in pixels; default 23 at 224-256 px, in proportion else, 3 at least."""
    def crop(x, draw):
        _, h, w = x.shape
        for _ in range(10):
            area, aspect = h * w * draw.uniform(*scale), math.exp(draw.uniform(*map(math.log, ratio)))
            ch, cw = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
            if 0 < ch <= h and 0 < cw <= w:
                break
        else:
            ch = cw = min(h, w)
        top, left = draw.integers(h - ch + 1), draw.integers(w - cw + 1)
        return TF.resize(x[:, top:top + ch, left:left + cw], [h, w], antialias=True)

    def blur(x, draw):
        size = min(x.shape[1:])
        odd = kernel or max(3, 2 * round((23 * size / min(max(size, 224), 256) - 1) / 2) + 1)
        return TF.gaussian_blur(x, odd, draw.uniform(*sigma))

    def gray(x):
        return TF.rgb_to_grayscale(x, 3)

    return {"crop": lambda x, draw: (crop(x, draw), crop(x, draw)),
            "flip": lambda x, draw: (x, x.flip(-1)),
            "blur": lambda x, draw: (blur(x, draw), blur(x, draw)),
            "grayscale": lambda x, draw: (x, gray(x)),
            "all": lambda x, draw: (blur(crop(x, draw), draw), gray(blur(crop(x, draw).flip(-1), draw)))}


@exact()
def consistency(model, images, augment, seed=0, micro=64, run=None):
    """Algorithm 1: the cosine of the latents of two views of each image -> raw [N], centred [N]; SC is their mean.

    The latent is the posterior mean, flattened. Centred: each channel's mean over all views is subtracted first, for
    a constant offset alone raises the raw value. Image i's views are drawn from (seed, i): every VAE sees the same."""
    run = run or vae.Run()
    where, first, second = [], [], []
    for places, x in batches(images, micro, run, "consistency"):
        views = [augment(image / 255, vae.rng(seed, "augment", i)) for i, image in zip(places.tolist(), x)]
        a, b = (torch.stack(v) for v in zip(*views))                       # [B, 3, H, W] each, in [0, 1]
        where.append(places)
        first.append(model.encode(2 * a - 1).mean.double())                # [B, C, h, w]
        second.append(model.encode(2 * b - 1).mean.double())
    z1, z2 = torch.cat(first), torch.cat(second)                           # [N, C, h, w]
    centre = run.sum((z1 + z2).sum(0)) / (2 * len(images))                 # [C, h, w]
    centre = centre.mean((1, 2), keepdim=True)                             # [C, 1, 1]
    rows = torch.zeros(len(images), 2, dtype=torch.float64)
    for k, c in enumerate((0, centre)):
        cosine = F.cosine_similarity((z1 - c).flatten(1), (z2 - c).flatten(1))   # Algorithm 1
        rows[torch.cat(where), k] = cosine.cpu()
    return run.sum(rows).unbind(1)


def probe(x, y, decay=1e-3):
    """Linear-probe accuracy: logistic regression on the first half of x [N,D], y [N], scored on the second half.
    Features are standardised; mean cross entropy + decay * |W|^2, solved by L-BFGS."""
    half, classes = len(x) // 2, int(y.max()) + 1
    x = x.double()
    x = (x - x[:half].mean(0)) / x[:half].std(0).clamp(min=1e-8)
    weight = torch.zeros(x.shape[1] + 1, classes, dtype=x.dtype, device=x.device, requires_grad=True)
    solver = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        solver.zero_grad()
        loss = F.cross_entropy(x[:half] @ weight[:-1] + weight[-1], y[:half]) + decay * weight[:-1].square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(closure)
    right = (x[half:] @ weight[:-1] + weight[-1]).argmax(1) == y[half:]
    return right.double().mean().item()


def stratified(labels, seed):
    """An order of all images, drawn from the seed, whose beginnings have the classes in the whole set's proportions."""
    draw, key = vae.rng(seed, "subset"), np.empty(len(labels))
    for c in np.unique(labels):
        members = np.flatnonzero(labels == c)
        key[draw.permutation(members)] = (np.arange(len(members)) + draw.uniform(size=len(members))) / len(members)
    return np.argsort(key, kind="stable")


ROWS = ("psnr", "ssim", "ssim2", "lpips", "z_mean", "z_square", "z_min", "z_max", "posterior_std", "kl")


@exact()
def reconstruct(model, images, seed, micro, run, name, lpips=None, inception=None, keep=0):
    """Every image through the VAE by a posterior sample, its noise drawn from (seed, place) -> {ROWS: [N], a number per
    image}, Statistics of the reconstructions (None without Inception), the first posterior means [keep, C, h, w]."""
    rows, latents = torch.zeros(len(images), len(ROWS), dtype=torch.float64), None
    made = Statistics(name, n=len(images)) if inception else None
    for places, x in batches(images, micro, run, name):
        if x.shape[2] % model.f or x.shape[3] % model.f:
            raise ValueError(f"{name}: needs sides in multiples of {model.f}, not {tuple(x.shape[2:])}; see --size")
        posterior = model.encode(vae.from_uint8(x))
        shape = posterior.mean.shape[1:]                                   # C, h, w
        noise = torch.stack([vae.normal(shape, seed, "noise", i) for i in places.tolist()])
        z = posterior.sample(noise.to(x.device))
        y = vae.to_uint8(model.decode(z))                                  # [B, 3, H, W]
        a, b, flat = x / 255, y / 255, z.double().flatten(1)               # flat: [B, C*h*w]
        distance = lpips(2 * a - 1, 2 * b - 1) if lpips else torch.full((len(x),), math.nan)
        rows[places] = torch.stack([v.double().cpu() for v in (
            psnr(a, b), ssim(a, b), ssim(a, b, data_range=2), distance, flat.mean(1), flat.square().mean(1),
            flat.amin(1), flat.amax(1), posterior.std.flatten(1).mean(1), posterior.kl())], 1)
        if keep:
            latents = torch.zeros(keep, *shape) if latents is None else latents
            latents[places[places < keep]] = posterior.mean.float().cpu()[places < keep]
        if inception:
            made.add(places, inception(y))
    rows = dict(zip(ROWS, run.sum(rows).unbind(1)))
    return rows, made and made.finish(run), latents if latents is None else run.sum(latents)


# --------------------------------------------------------------------------------------------------- the command line


def flags():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("samples", nargs="*", help="npz (arr_0: uint8 [N,H,W,3]), folder of images, or statistics file")
    p.add_argument("--ref", help="what to compare with, likewise; an npz's own mu and sigma are used where present")
    p.add_argument("--features", choices=["inception", "dinov2"], default="inception", help="dinov2: FD there")
    p.add_argument("--inception", default="inception", help="weight file (default: the public one); none: no rFID")
    p.add_argument("--dino", default="vitl14", help="DINOv2's name or weight file, for --features dinov2")
    p.add_argument("--save-stats", metavar="FILE", help="keep the reference's statistics; works without SAMPLES, too")
    p.add_argument("--vae", nargs="+", default=[], help="measure these VAEs instead, paired with the first, on --data")
    p.add_argument("--data", help="folder of images for --vae")
    p.add_argument("--probe", action="store_true", help="linear-probe accuracy of the latents; needs classes")
    p.add_argument("--vgg", default="vgg16", help="LPIPS's weight file in torchvision's layout (default: the public one); none: no LPIPS")
    p.add_argument("--lpips", help="its linear layers; default: the public ones with the public VGG, else none")
    p.add_argument("--crop-scale", type=float, nargs=2, default=[0.08, 1], help="Table 2: the crop's share of area,")
    p.add_argument("--crop-ratio", type=float, nargs=2, default=[3 / 4, 4 / 3], help="its aspect ratio,")
    p.add_argument("--blur-kernel", type=int, help="the blur's kernel in pixels (default: 23 at 256 px),")
    p.add_argument("--blur-sigma", type=float, nargs=2, default=[0.1, 2], help="its width in pixels")
    p.add_argument("--size", type=int, help="center crop of folders (default: 256 for --data, else none)")
    p.add_argument("--num", "--num-images", type=int, help="how many images each of SAMPLES must hold, or how many of --data to take")
    p.add_argument("--micro", type=int, default=32, help="images a process holds at once; lower it if memory runs out")
    p.add_argument("--seed", type=int, default=0, help="draws images, noise and views for --vae")
    p.add_argument("--out", metavar="FILE", help="default: results.json beside SAMPLES, or in the VAE's folder")
    args = p.parse_args()
    side, least, kernel = 256 if args.size is None else args.size, 7 if args.vae else 1, args.blur_kernel
    for wrong, line in (
            (args.vae and (args.samples or args.ref or args.save_stats or args.features != "inception"),
             "--vae is measured on --data, without SAMPLES, --ref, --save-stats and --features"),
            (not args.vae and (args.data or args.probe or args.inception == "none"),
             "--data, --probe and --inception none go with --vae"),
            (args.micro < 1 or (args.num is not None and args.num < 1), "--num and --micro are 1 at least"),
            (side < least, f"--size is {least} at least" + ", the window of SSIM" * (least > 1)),
            (kernel is not None and not (kernel % 2 and 0 < kernel < 2 * side),
             f"--blur-kernel is odd and less than twice the image's {side} px")):
        if wrong:
            p.error(line)
    return args


def results(name, value, args, run):
    """Adds what was measured, on what and how, to results.json; an entry of the same name is replaced, and a line says so
    if it was measured otherwise."""
    source = Path((args.samples or args.vae)[0])
    path = Path(args.out) if args.out else (source if source.is_dir() else source.parent) / "results.json"
    if run.main:
        book = vae.read_json(path, {})
        device = torch.cuda.get_device_name() if run.device.type == "cuda" else "cpu"
        versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
        old = book.get(name, {}).get("settings", {})
        was = [f"{k} {v}" for k, v in old.items()
               if v != vars(args).get(k) and k not in ("samples", "save_stats", "micro", "out")]
        if was:
            run.print(f"{path}: replaces what it held of {name}, measured with {', '.join(was)}")
        book[name] = {"value": value, "command": shlex.join(["python", *sys.argv]), "settings": vars(args),
                      "seed": args.seed, "versions": versions, "device": device, "processes": run.world}
        vae.save_json(path, book)


def table(run, heads, rows):
    """Prints rows of numbers under heads; "-" where there is none."""
    first = max(len(str(row[0])) for row in [heads, *rows])
    widths = [max(10, len(h)) for h in heads[1:]]
    for name, *numbers in [heads, *rows]:
        cells = ["-" if x is None else f"{x:.4f}" if isinstance(x, float) else str(x) for x in numbers]
        run.print(name.ljust(first), *(c.rjust(w) for c, w in zip(cells, widths)))


def feature_net(args, run):
    """(net, name of its feature space) for --features."""
    with run.first():
        if args.features == "inception":
            net = Inception.load(args.inception).to(run.device)
            return net, f"inception {vae.fingerprint(net)[:8]}"
        net = dino.DINOv2.load(args.dino).to(run.device)

    def cls(x):   # FD-DINOv2 is reported on the cls token at 224 px; antialiased, because 256 px are made smaller
        return net.targets(vae.from_uint8(x), 16, antialias=True)[1], None

    return cls, f"dinov2 {vae.fingerprint(net)[:8]}"


def inputs(args):
    """Opens --ref and SAMPLES, so that what is wrong is said before anything long -> (Statistics that they hold, after
    one of the space that --features names; whether there are images to measure)."""
    known, measured = [Statistics(f"--features {args.features}", args.features)], False
    for source in (args.ref, *args.samples):
        images, own = open_set(source, args.size)
        measured |= images is not None
        n = own.n if own else len(images)
        if args.num and n != args.num and source in args.samples:
            raise ValueError(f"{source}: holds {n or 'an unknown number of'} images, --num asks for {args.num}")
        for other in known if own else []:
            own.same_space(other)
        known += [own] if own else []
    return known, measured


def score_samples(args, run):
    """FID, sFID, IS, precision, recall of each of SAMPLES against --ref, whose features are computed once."""
    if not args.ref or not (args.samples or args.save_stats):
        raise ValueError("give SAMPLES and --ref, or --vae and --data; see --help")
    known, measured = inputs(args)
    net, space = feature_net(args, run) if measured else (None, max(s.space for s in known))
    how = dict(space=space, size=args.size, micro=args.micro, run=run)
    reference = measure(net, args.ref, **how, like=known)
    if args.save_stats and run.main:
        reference.save(args.save_stats)
    kind = {"fd": "fid", "sfd": "sfid"} if args.features == "inception" else {}
    columns = ["fid", "sfid", "is", "precision", "recall"] if kind else ["fd", "precision", "recall"]
    rows = []
    for source in args.samples:
        value = {kind.get(k, k): v for k, v in evaluate(net, source, reference, **how).items()}
        results(source if kind else f"{source}, {space}", value, args, run)
        rows.append([source, *map(value.get, columns)])
    if rows:
        table(run, [f"against {args.ref}", *columns], rows)


def score_vae(model, name, images, labels, nets, args, run):
    """Tables 8, 10 and 2 for one VAE -> (values, {metric: [n], one number per image})."""
    lpips, inception, reference = nets
    keep = min(len(images), 10000) if args.probe else 0
    each, made, latents = reconstruct(model, images, args.seed, args.micro, run, name, lpips, inception, keep)
    z = {k: each.pop(k)[:10000] for k in ROWS[4:]}                                # Table 10: of 10,000 images
    if lpips is None:
        del each["lpips"]
    views = torch.utils.data.Subset(images, range(min(len(images), 1000)))
    for augment, function in augmentations(args.crop_scale, args.crop_ratio, args.blur_kernel, args.blur_sigma).items():
        raw, centred = consistency(model, views, function, args.seed, args.micro, run)   # Table 2
        each |= {f"sc_{augment}": raw, f"sc_{augment}_centred": centred}
    values = {"n": len(images)}
    if made:
        values["rfid"] = frechet(*made.moments[0], *reference.moments[0])         # Table 8
    values |= {k: v.mean().item() for k, v in each.items()}
    mean = z["z_mean"].mean()
    values |= {"z_mean": mean.item(), "z_std": (z["z_square"].mean() - mean ** 2).sqrt().item(),
               "z_min": z["z_min"].min().item(), "z_max": z["z_max"].max().item(),
               "posterior_std": z["posterior_std"].mean().item(), "kl": z["kl"].mean().item()}
    if args.probe:
        x, y = latents.to(run.device), torch.as_tensor(labels[:keep]).to(run.device)
        values |= {"probe_flat": probe(x.flatten(1), y), "probe_mean": probe(x.mean((2, 3)), y)}
    return values, each


def spread(each):
    """({metric: mean}, {metric: its standard error}) of numbers per image."""
    error = {k: v.std().item() / math.sqrt(len(v)) for k, v in each.items()}
    return {k: v.mean().item() for k, v in each.items()}, error


def score_vaes(args, run):
    """Every --vae on the same images, noise and views; from the second on also the paired differences to the first."""
    if not args.data:
        raise ValueError("--data names the folder of images to measure --vae on")
    folder = vae.Images(args.data, args.size or 256)
    if args.num and args.num > len(folder):
        raise ValueError(f"{args.data}: holds {len(folder)} images, --num asks for {args.num}")
    order = stratified(folder.labels, args.seed)[:args.num]
    images, labels = torch.utils.data.Subset(folder, order.tolist()), folder.labels[order]
    if args.probe and len(set(labels[:min(len(labels), 10000) // 2])) < 2:
        raise ValueError(f"{args.data}: --probe needs one folder of images per class, two classes in the half it learns from")
    with run.first():
        models = [vae.VAE.load(name).to(run.device) for name in args.vae]
        try:
            inception = None if args.inception == "none" else Inception.load(args.inception).to(run.device)
            lpips = None if args.vgg == "none" else LPIPS.load(args.vgg, args.lpips).to(run.device)
        except FileNotFoundError as e:
            raise FileNotFoundError(f"{e}; --inception none leaves rFID out, --vgg none LPIPS") from None
    reference = measure(inception, images, keep=False, micro=args.micro, run=run) if inception else None
    heads, columns, first = [""], [], None
    for name, model in zip(args.vae, models):
        values, each = score_vae(model, name, images, labels, (lpips, inception, reference), args, run)
        values["standard_error"] = spread(each)[1]
        heads, columns = [*heads, name, "+-"], [*columns, values, values["standard_error"]]
        if first:
            values["difference"], values["difference_error"] = spread({k: v - first[k] for k, v in each.items()})
            heads, columns = [*heads, "difference", "+-"], [*columns, values["difference"], values["difference_error"]]
        first = first or each
        results(name, values, args, run)
    table(run, heads, [[k, *(c.get(k) for c in columns)] for k, v in columns[0].items() if not isinstance(v, dict)])


def main():
    args = flags()
    (score_vaes if args.vae else score_samples)(args, vae.Run())


if __name__ == "__main__":
    vae.main(main)
