"""The numbers that papers report, without TensorFlow: FID, sFID, IS, precision and recall as ADM's evaluator
defines them (Dhariwal & Nichol 2021); and what a latent space is worth: rFID, PSNR, SSIM, LPIPS (Table 8),
semantic consistency (Algorithm 1, Table 2), statistics (Table 10) and a linear probe.

    python fid.py samples.npz --ref VIRTUAL_imagenet256_labeled.npz
    python fid.py --vae sd-vae-ft-ema out/vae --data imagenet/val
    fid.evaluate(net, samples, reference)["fd"]     # the Fréchet distance in any network's features
"""
import argparse
import contextlib
import dataclasses
import math
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

from dino import DINOv2
from vae import (
    VAE,
    DiskError,
    Images,
    UserError,
    atomic,
    count,
    everyone,
    fetch,
    fingerprint,
    from_uint8,
    load_strict,
    made_by,
    normal,
    number,
    positive,
    print0,
    progress,
    rank,
    read,
    read_json,
    rng,
    run_script,
    save,
    start,
    survive,
    to_uint8,
    total,
    world,
)

FID_WEIGHTS = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
LPIPS_LAYERS = "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth"
INCEPTION, VGG16 = "pt_inception-2015-12-05-6726825d.pth", "vgg16-397923af.pth"
PUBLIC = {  # name: (url, file in torch.hub's cache, beginning of its sha256, bytes)
    "inception": (FID_WEIGHTS + INCEPTION, INCEPTION, "6726825d", None),
    "vgg16": ("https://download.pytorch.org/models/" + VGG16, VGG16, "397923af", None),
    "lpips": (LPIPS_LAYERS, "lpips-v0.1-vgg.pth", "a78928a0af1e5f0f", 7289),
}


def weights(source):
    """(state dict, name for messages) of a public name, a file, or a state dict."""
    if isinstance(source, dict):
        return source, "the given state dict"
    return read(fetch(*PUBLIC[source]) if source in PUBLIC else source), source


# ------------------------------------------------------------------------------------ Inception (2015-12-05)


def resize_tf1(x, size):
    """TensorFlow 1's bilinear resize of [B,C,H,W]: output i is input i * H / size, no half-pixel centers."""
    def neighbors(n):
        place = torch.arange(size, device=x.device, dtype=x.dtype) * (n / size)
        low = place.floor().long()
        return low, (low + 1).clamp(max=n - 1), place - low

    (top, bottom, fy), (left, right, fx) = neighbors(x.shape[2]), neighbors(x.shape[3])
    x = x[..., left] + (x[..., right] - x[..., left]) * fx                      # [B, C, H, size]
    return x[..., top, :] + (x[..., bottom, :] - x[..., top, :]) * fy[:, None]  # [B, C, size, size]


POOLS = {"avg": partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False),
         "max": partial(F.max_pool2d, kernel_size=3, stride=1, padding=1),
         "halve": partial(F.max_pool2d, kernel_size=3, stride=2)}


class Conv(nn.Module):
    """Convolution, batch norm, ReLU. Padded to keep the size, unless there is a stride or a given padding."""

    def __init__(self, cin, cout, kernel, stride=1, padding="same"):
        super().__init__()
        padding = padding if stride == 1 else 0
        self.conv = nn.Conv2d(cin, cout, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(cout, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches side by side, concatenated. A branch is a chain of steps: (name, channels, kernel, stride), a
    pool's name, or a list of steps that all read the same input and are concatenated."""

    def __init__(self, cin, *branches):
        super().__init__()
        self.branches = branches
        for branch in branches:
            width = cin
            for step in branch:
                steps = [] if isinstance(step, str) else step if isinstance(step, list) else [step]
                for name, cout, *kernel_and_stride in steps:
                    self.add_module(name, Conv(width, cout, *kernel_and_stride))
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


def chain(name, *steps):
    """Steps (channels, kernel, stride) of one branch, as name_1, name_2, ..."""
    return [(f"{name}_{i}", *step) for i, step in enumerate(steps, 1)]


def mixed_5(cin, pool):
    five, double = chain("branch5x5", (48, 1), (64, 5)), chain("branch3x3dbl", (64, 1), (96, 3), (96, 3))
    return Mixed(cin, [("branch1x1", 64, 1)], five, double, ["avg", ("branch_pool", pool, 1)])


def mixed_6(c):
    seven = chain("branch7x7", (c, 1), (c, (1, 7)), (192, (7, 1)))
    double = chain("branch7x7dbl", (c, 1), (c, (7, 1)), (c, (1, 7)), (c, (7, 1)), (192, (1, 7)))
    return Mixed(768, [("branch1x1", 192, 1)], seven, double, ["avg", ("branch_pool", 192, 1)])


def mixed_7(cin, pool):
    three = [*chain("branch3x3", (384, 1)), [("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1))]]
    fork = [("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))]
    double = [*chain("branch3x3dbl", (448, 1), (384, 3)), fork]
    return Mixed(cin, [("branch1x1", 320, 1)], three, double, [pool, ("branch_pool", 192, 1)])


class Inception(nn.Module):
    """The Inception v3 of FID (TensorFlow's 2015-12-05 graph), with what ADM's evaluator reads from it. It
    differs from torchvision's: average pools do not count their padding, and Mixed_7c has a max pool."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, padding=0)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = mixed_5(192, 32), mixed_5(256, 64), mixed_5(288, 64)
        double = chain("branch3x3dbl", (64, 1), (96, 3), (96, 3, 2))
        self.Mixed_6a = Mixed(288, [("branch3x3", 384, 3, 2)], double, ["halve"])
        self.Mixed_6b, self.Mixed_6c = mixed_6(128), mixed_6(160)
        self.Mixed_6d, self.Mixed_6e = mixed_6(160), mixed_6(192)
        three = chain("branch3x3", (192, 1), (320, 3, 2))
        seven = chain("branch7x7x3", (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2))
        self.Mixed_7a = Mixed(768, three, seven, ["halve"])
        self.Mixed_7b, self.Mixed_7c = mixed_7(1280, "avg"), mixed_7(2048, "max")
        self.fc = nn.Linear(2048, 1008)

    @classmethod
    def load(cls, source="inception"):
        """With the weights of a file in pytorch-fid's and torch-fidelity's layout, or of the public one."""
        net = load_strict(cls(), *weights(source)).requires_grad_(False)
        order = torch.preserve_format if torch.cuda.is_available() else torch.channels_last
        return net.to(memory_format=order)                         # on a CPU 1.5 times as fast

    def forward(self, x):
        """uint8 [B,3,H,W] -> pool [B,2048] (FID), spatial [B,2023] (sFID), probs [B,1008] (IS; no bias)."""
        if x.dtype != torch.uint8:
            raise ValueError(f"Inception takes uint8 images [B,3,H,W], not {x.dtype} {tuple(x.shape)}")
        parts = x.split(8) if x.device.type == "cpu" else [x]   # 8 images fit a CPU's caches: 1.5 times again
        return tuple(map(torch.cat, zip(*map(self.outputs, parts))))

    def outputs(self, x):
        dtype = self.fc.weight.dtype
        x = x.to(torch.promote_types(dtype, torch.float32))      # bf16 cannot tell the places of pixels apart
        x = ((resize_tf1(x, 299) - 128) / 128).to(dtype)                            # [B, 3, 299, 299]
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))           # [B, 64, 147, 147]
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(POOLS["halve"](x)))               # [B, 192, 71, 71]
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(POOLS["halve"](x))))          # [B, 288, 35, 35]
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))                          # [B, 768, 17, 17]
        spatial = self.Mixed_6d.branch1x1(x)[:, :7].permute(0, 2, 3, 1).flatten(1)  # [B, 17*17*7]
        x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))                          # [B, 1280, 8, 8]
        pool = self.Mixed_7c(self.Mixed_7b(x)).mean((2, 3))                         # [B, 2048]
        return pool, spatial, (pool @ self.fc.weight.T).softmax(1)                  # [B, 1008]


# ----------------------------------------------------------------------------------------------------- LPIPS


class LPIPS(nn.Module):
    """Learned perceptual distance on VGG16 (Zhang et al. 2018, version 0.1): a, b [B,3,H,W] in [-1,1] -> [B].
    widths: of the 13 convolutions. In float32 whatever autocast says; the gradient is finite everywhere."""

    convs = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)   # torchvision's layer numbers, ReLU after each
    pools = (4, 9, 16, 23)
    taps = (3, 8, 15, 22, 29)                                  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3

    def __init__(self, widths):
        super().__init__()
        self.features, cin = nn.Sequential(), 3
        for i in range(30):
            layer = nn.MaxPool2d(2) if i in self.pools else nn.ReLU()
            if i in self.convs:
                cout = widths[self.convs.index(i)]
                layer, cin = nn.Conv2d(cin, cout, 3, padding=1), cout
            self.features.append(layer)
        tapped = enumerate(widths[i] for i in (1, 3, 6, 9, 12))
        self.lin = nn.ParameterDict({f"lin{k}": torch.full((1, c, 1, 1), 1 / 5) for k, c in tapped})
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))  # ImageNet's mean
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))  # and std, on [-1,1]

    @classmethod
    def load(cls, vgg=None, lin=None):
        """vgg: torchvision's VGG16, or a thinner one in its layout; None: the public one. lin: the file of
        the linear layers, or "lpips": the public ones; None: those with the public VGG16, and with another
        one the five layers averaged."""
        lin = "lpips" if lin is None and vgg in (None, "vgg16") else lin
        state, name = weights("vgg16" if vgg is None else vgg)
        widths = []
        for key in (f"features.{i}.weight" for i in cls.convs):
            shape = tuple(state[key].shape) if key in state else "missing"
            if len(shape) != 4 or not shape[0]:
                raise UserError(f"{name}: not a VGG16: {key} is {shape}, expected 4 dimensions")
            widths.append(shape[0])
        net = cls(widths)
        features = {k[9:]: v for k, v in state.items() if k.startswith("features.")}
        load_strict(net.features, features, name)
        if lin is not None:
            state, name = weights(lin)
            load_strict(net.lin, {k[:4]: v for k, v in state.items() if k[:4] in net.lin}, name)
        return net.eval().requires_grad_(False)

    def unit_features(self, x):
        """The five layers' features, each vector divided by its length."""
        x = (x.to(self.scale.dtype) - self.shift) / self.scale
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.taps:
                # at a zero vector torch's norm has the gradient 0, the square root of a sum an infinite one
                yield x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10)   # [B, C, h, w]

    def forward(self, a, b):
        with torch.autocast(a.device.type, enabled=False):
            pairs = zip(self.unit_features(a), self.unit_features(b), self.lin.values())
            return sum(((x - y) ** 2 * w).sum(1).mean((1, 2)) for x, y, w in pairs)    # [B]


# --------------------------------------------------------------------------------------------------- metrics


def frechet(mu1, sigma1, mu2, sigma2):
    """Squared Fréchet distance of two Gaussians, |mu1 - mu2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)), in float64.

    With S1 = A A^T, the eigenvalues of S1 S2 are those of the symmetric A^T S2 A: nothing complex and nothing
    inverted, so singular covariances (fewer images than features) do no harm."""
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(x).double() for x in (mu1, sigma1, mu2, sigma2))
    values, vectors = torch.linalg.eigh(sigma1)
    a = vectors * values.clamp(min=0).sqrt()
    root = torch.linalg.eigvalsh(a.T @ sigma2 @ a).clamp(min=0).sqrt().sum()
    return ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * root).item()


SPLIT = 5000   # ADM's Inception Score: the mean over splits of 5000 consecutive images


def inception_score(probs):
    """exp(mean KL(p(y|x) || p(y))) of probs [N,K]: the mean over splits of images in their order (ADM)."""
    scores = []
    for p in torch.as_tensor(probs).split(SPLIT):
        p = p.double()                                              # [5000, K]
        entropy = torch.special.entr(p).sum(1).mean()               # of p(y|x)
        scores.append((torch.special.entr(p.mean(0)).sum() - entropy).exp())
    return torch.stack(scores).mean().item()


def distances(a, b):
    """Squared Euclidean distances [n,m] of float64 rows, never negative."""
    norms = a.square().sum(1, keepdim=True), b.square().sum(1)
    return torch.addmm(norms[1], a, b.T, alpha=-2).add_(norms[0]).clamp_(min=0)


def precision_recall(real, fake, k=3, chunk=1024):
    """Improved precision and recall (Kynkäänniemi et al. 2019) of features [N,D], [M,D]: the share of fake
    inside any real image's ball, which reaches to its k-th neighbor, and the share of real inside any fake
    one's. Distances are float64 (ADM's evaluator: float16), `chunk` rows at a time."""
    real, fake = torch.as_tensor(real).double(), torch.as_tensor(fake).double()
    if min(len(real), len(fake)) <= k:
        raise UserError(f"precision and recall with k={k} need more than {k} images on both sides")
    center = real.mean(0)
    real, fake = real - center, fake - center        # distances stay, cancellation shrinks
    radius = []
    for x in (real, fake):                           # k + 1: every point is its own nearest neighbor
        nearest = [distances(part, x).topk(k + 1, largest=False).values for part in x.split(chunk)]
        radius.append(torch.cat(nearest)[:, -1])
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
    """Structural similarity (Wang et al. 2004) of images [B,3,H,W] in [0,1] -> [B], scikit-image's default:
    uniform window of 7, sample covariances. data_range 2 is what Table 8 used, although images span 1."""
    a, b, mean = a.double(), b.double(), partial(F.avg_pool2d, kernel_size=7, stride=1)
    ma, mb, n = mean(a), mean(b), 49 / 48
    va, vb, vab = n * (mean(a * a) - ma * ma), n * (mean(b * b) - mb * mb), n * (mean(a * b) - ma * mb)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    s = (2 * ma * mb + c1) * (2 * vab + c2) / ((ma * ma + mb * mb + c1) * (va + vb + c2))
    return s.flatten(1).mean(1)


# ------------------------------------------------------------------------------------------------ image sets


@contextlib.contextmanager
def exact():
    """Full float32, no TF32, no autocast, no gradient, whatever the caller has set: for all that measures."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), torch.no_grad():
            with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
                yield
    finally:
        torch.set_float32_matmul_precision(before)


def npz_array(path, name):
    """An array of an npz file: mapped, not read, where it is stored plain (np.savez), else read whole."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(f"{name}.npy")
    if info.compress_type != zipfile.ZIP_STORED:
        return np.load(path)[name]
    with open(path, "rb") as f:   # before the array: 30 bytes of the zip's, a name, an extra field
        f.seek(info.header_offset + 26)
        f.seek(sum(np.frombuffer(f.read(4), "<u2").tolist()), 1)
        np.lib.format.read_magic(f)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(f)
        return np.memmap(path, dtype, "c", f.tell(), shape, "F" if fortran else "C")


def image_tensor(array, name):
    """uint8 numpy [N,H,W,3] or tensor [N,3,H,W] -> a tensor [N,3,H,W] on the same memory."""
    axis, expected = (1, "[N,3,H,W]") if torch.is_tensor(array) else (3, "[N,H,W,3]")
    kind, shape = str(array.dtype).removeprefix("torch."), list(array.shape)
    if kind != "uint8" or len(shape) != 4 or shape[axis] != 3:
        raise UserError(f"{name}: images are {kind} {shape}, expected uint8 {expected}")
    return array if torch.is_tensor(array) else torch.from_numpy(array).permute(0, 3, 1, 2)


def open_set(source, size=None):
    """(images or None, Statistics or None) of a folder of images (size: its center crop), an npz with arr_0
    and/or mu, sigma, mu_s, sigma_s, an array, a sequence of uint8 [3,H,W] or (uint8 [3,H,W], label)."""
    if isinstance(source, Statistics):
        return None, source
    if not isinstance(source, (str, Path)):
        return image_tensor(source, "images") if hasattr(source, "dtype") else source, None
    if Path(source).is_dir():
        return Images(source, size), None
    if not Path(source).is_file() or not zipfile.is_zipfile(source):
        raise UserError(f"{source}: neither a folder of images nor a whole npz file")
    with zipfile.ZipFile(source) as archive:
        names = archive.namelist()
    if "arr_0.npy" not in names and "mu.npy" not in names:
        raise UserError(f"{source}: no images (arr_0) and no statistics (mu), but {', '.join(names)}")
    images = image_tensor(npz_array(source, "arr_0"), source) if "arr_0.npy" in names else None
    return images, Statistics.read(source) if "mu.npy" in names else None


def batches(images, micro, device, desc):
    """(places [B], uint8 [B,3,H,W] on the device) of this process's share: rank, rank + world, ..., so each
    image is seen once. Threads read one batch ahead. What one process cannot read, all of them report."""
    if len(images) < world():
        raise UserError(f"{desc}: {len(images)} images are too few for {world()} processes")

    def image(i):
        item = images[i]
        return item[0] if isinstance(item, tuple) else item

    shares = torch.arange(rank(), len(images), world()).split(micro)
    shape, failed = image(0).shape, None
    with ThreadPoolExecutor(8) as pool, progress(len(images), desc) as bar:
        ahead = [pool.submit(image, i) for i in shares[0].tolist()]
        for now, after in zip(shares, [*shares[1:], torch.arange(0)]):
            try:
                items = [f.result() for f in ahead]
                if other := [item.shape for item in items if item.shape != shape]:
                    sizes = f"{tuple(shape)} and {tuple(other[0])}"
                    raise UserError(f"{desc}: images of {sizes}; --size brings a folder to one size")
                x = image_tensor(torch.stack(items), desc)
            except (UserError, DiskError) as e:
                failed = e
                break
            ahead = [pool.submit(image, i) for i in after.tolist()]
            yield now, x.to(device)
            bar.update(min(len(now) * world(), len(images) - bar.n))
    if errors := [e for e in everyone(failed) if e is not None]:
        raise errors[0]


# ---------------------------------------------------------------------------------- statistics of image sets


@dataclasses.dataclass
class Statistics:
    """What n images (None: not known) are in the features of one network, which `space` names."""

    name: str
    space: str = ""
    n: int = None
    sizes: list = ()                # D of each feature set
    moments: list = ()              # (mean [D], covariance [D,D]) of each
    features: torch.Tensor = None   # [n,D], the first set, where they are kept
    probs: torch.Tensor = None      # [n,K]

    def __str__(self):
        sizes = " + ".join(map(str, self.sizes)) or "any"
        return f"{self.name} ({sizes} features, {self.space or 'unnamed'})"

    def same_space(self, other):
        """UserError if the two are of different features. A space's name may lack words, or all (ADM)."""
        pairs = [*zip(self.sizes, other.sizes), *zip(self.space.split(), other.space.split())]
        if any(a != b for a, b in pairs):
            raise UserError(f"{self} is of another feature space than {other}")

    def save(self, path):
        """An npz with mu and sigma under ADM's names, and n and space."""
        arrays = (x.cpu().numpy() for pair in self.moments for x in pair)
        named = dict(zip(("mu", "sigma", "mu_s", "sigma_s"), arrays))
        with atomic(path) as f:
            np.savez(f, **named, n=self.n or 0, space=self.space)

    @classmethod
    def read(cls, path):
        """From such an npz, ours or ADM's, which names neither n nor space."""
        with np.load(path) as z:
            keys = [("mu", "sigma"), ("mu_s", "sigma_s")]
            moments = [tuple(torch.from_numpy(z[k]) for k in pair) for pair in keys if {*pair} <= {*z}]
            for mu, sigma in moments:
                if sigma.shape != (len(mu), len(mu)) or not (sigma.isfinite().all() and mu.isfinite().all()):
                    raise UserError(f"{path}: mu and sigma are no finite mean [D] and covariance [D,D]")
            n, space = int(z.get("n", 0)) or None, str(z.get("space", ""))
            return cls(str(path), space, n, [len(mu) for mu, _ in moments], moments)


class Moments:
    """Mean [D] and covariance [D,D] of rows [B,D] that come in batches, in float64, over all processes."""

    def __init__(self):
        self.rows, self.sum, self.outer = [], 0, None

    def add(self, rows):
        self.rows.append(rows.double())
        if sum(map(len, self.rows)) >= 1024:          # a few large products are faster than many small ones
            self.multiply()

    def multiply(self):
        """Adds f^T f of the held rows f. Only its upper triangle counts, which is half the work on a CPU."""
        f = torch.cat(self.rows)
        if self.outer is None:
            self.outer = f.new_zeros(f.shape[1], f.shape[1])
        if f.is_cuda:
            self.outer.addmm_(f.T, f)
        else:                                         # in place; BLAS stores by columns, hence the transposes
            dsyrk(1, f.numpy().T, 1, self.outer.numpy().T, lower=1, overwrite_c=1)
        self.rows, self.sum = [], self.sum + f.sum(0)

    def finish(self, n):
        """(mean, covariance) of the n rows of all processes."""
        if self.rows:
            self.multiply()
        mean, outer = total(self.sum) / n, total(self.outer).triu()
        outer = outer + outer.triu(1).T
        return mean, (outer - n * torch.outer(mean, mean)) / (n - 1)


def store(rows, n, places, **parts):
    """Keeps what each image gave, {name: [B,...]}, at its place among n; other processes' places stay 0."""
    for name, part in parts.items():
        if part is None:
            continue
        if name not in rows:
            rows[name] = part.new_zeros(n, *part.shape[1:])
        rows[name][places.to(part.device)] = part


def checked(outputs, name):
    """[features, ...], probs of a network; ValueError if they are not what evaluate() asks for."""
    if not isinstance(outputs, (tuple, list)) or len(outputs) < 2:
        raise ValueError(f"{name}: the network gives no pair of features [B,D] and probs [B,K] or None")
    *sets, probs = outputs
    if not all(f.isfinite().all() for f in sets):
        raise ValueError(f"{name}: the network's features are not finite")
    if probs is not None and not ((probs >= 0).all() and ((probs.double().sum(1) - 1).abs() < 1e-2).all()):
        raise ValueError(f"{name}: the network's probabilities do not sum to 1; are they logits?")
    return sets, probs


def gather(net, pairs, result, keep=True, like=()):
    """Fills in the Statistics `result` of n images, which come as (places [B], uint8 [B,3,H,W]) to all
    processes. The first batch shows whether they are of the same features as the Statistics in `like`."""
    moments, rows, seen = [], {}, 0
    for places, x in pairs:
        sets, probs = checked(net(x), result.name)
        if not moments:
            moments, result.sizes = [Moments() for _ in sets], [f.shape[1] for f in sets]
            for other in like:
                other.same_space(result)
        for m, features in zip(moments, sets):
            m.add(features)
        if keep:
            store(rows, result.n, places, features=sets[0], probs=probs)
        seen += len(x)
    seen = total(torch.tensor(seen)).item()
    if seen != result.n or seen < 2:
        raise UserError(f"{result.name}: {seen} of {result.n} images; statistics need all, and two at least")
    result.moments = [m.finish(result.n) for m in moments]
    result.features, result.probs = (total(rows[k]) if k in rows else None for k in ("features", "probs"))
    return result


@exact()
def measure(net, source, space="", size=None, keep=True, micro=64, device="cpu", like=()):
    """Statistics of an image set (see open_set) in net's features; keep: each image's features and probs.
    A file's own mu and sigma are used where it has them; its images then serve for the rest (ADM). like:
    Statistics that must be of the same features."""
    images, given = open_set(source, size)
    if given is not None:
        for other in like:
            given.same_space(other)
        like = [*like, given]
    if images is None or (given is not None and not keep):
        return given
    name = str(source) if isinstance(source, (str, Path)) else "images"
    pairs = batches(images, micro, device, Path(name).name)
    result = gather(net, pairs, Statistics(name, space, len(images)), keep, like)
    if given is not None:
        result.moments, result.n = given.moments, given.n
    return result


@exact()
def evaluate(net, samples, reference, labels=None, k=3, space="", size=None, micro=64, device="cpu"):
    """Samples against a reference, in any network's features -> a dict of numbers, as far as there is what
    they need: n, fd (squared Fréchet distance), sfd (of the second features), is (Inception Score),
    precision, recall (k-th neighbors; k = 0: neither), accuracy (share that net names as labeled).

    net: uint8 [B,3,H,W] -> (features [B,D], probs [B,K] or None); Inception has a second feature set between.
    samples, reference: see open_set, or Statistics (of measure(), to share among calls). labels: the classes
    [N] that the samples were made for. device: where net wants its images. Under torchrun the processes share
    the work, and all return the same."""
    options = dict(space=space, size=size, micro=micro, device=device)
    real = measure(net, reference, keep=k > 0, **options)
    fake = measure(net, samples, like=[real], **options)
    out = {"n": fake.n}
    for name, one, two in zip(("fd", "sfd"), fake.moments, real.moments):
        out[name] = frechet(*(x.to(device) for x in (*one, *two)))
    if fake.probs is not None:
        out["is"] = inception_score(fake.probs)
    if k and fake.features is not None and real.features is not None:
        out["precision"], out["recall"] = precision_recall(real.features, fake.features, k)
    if labels is not None and fake.probs is not None:
        named, labels = fake.probs.argmax(1).cpu(), torch.as_tensor(labels).cpu()
        if len(named) != len(labels):
            raise ValueError(f"{fake.name}: {len(named)} images but {len(labels)} labels")
        out["accuracy"] = (named == labels).double().mean().item()
    return out


# --------------------------------------------------------------------------------------------- latent spaces


def augmentations(scale=(0.08, 1), ratio=(3 / 4, 4 / 3), kernel=None, sigma=(0.1, 2)):
    """Table 2's five augmentations: name -> function of (image [3,H,W] in [0,1], generator) that makes two
    views of it. The strengths, which the paper does not name, are those usual in self-supervised learning.
    kernel: the blur's in pixels; default: 23 at 224-256 px, in proportion else, 3 at least."""
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

    gray = partial(TF.rgb_to_grayscale, num_output_channels=3)
    return {"crop": lambda x, draw: (crop(x, draw), crop(x, draw)),
            "flip": lambda x, draw: (x, x.flip(-1)),
            "blur": lambda x, draw: (blur(x, draw), blur(x, draw)),
            "grayscale": lambda x, draw: (x, gray(x)),
            "all": lambda x, draw: (blur(crop(x, draw), draw), gray(blur(crop(x, draw).flip(-1), draw)))}


@exact()
def consistency(model, images, augment, seed=0, micro=64, device="cpu"):
    """Algorithm 1: the cosine of the latents of two views of each image -> raw [N], centered [N]; SC is their
    mean. The latent is the posterior mean, flattened. Centered: without each channel's mean over all views,
    because a constant offset alone raises the raw value. Image i's views are drawn from (seed, i)."""
    latents = {}
    for places, x in batches(images, micro, device, "consistency"):
        views = [augment(image / 255, rng(seed, "augment", i)) for i, image in zip(places.tolist(), x)]
        a, b = (torch.stack(v) for v in zip(*views))                        # [B, 3, H, W] each, in [0, 1]
        a, b = (model.encode(2 * v - 1).mean.double() for v in (a, b))      # [B, C, h, w]
        store(latents, len(images), places, a=a, b=b)
    a, b = (total(latents[k]) for k in "ab")                                # [N, C, h, w]
    center = (a + b).mean((0, 2, 3))[:, None, None] / 2                     # [C, 1, 1]
    pairs = (((a - c).flatten(1), (b - c).flatten(1)) for c in (0, center))
    return [F.cosine_similarity(*pair).cpu() for pair in pairs]             # Algorithm 1


def probe(x, y, decay=1e-3):
    """Linear-probe accuracy: logistic regression on the first half of x [N,D], y [N], tested on the second.
    Features are standardized; mean cross entropy + decay * |W|^2, solved by L-BFGS."""
    half, classes = len(x) // 2, int(y.max()) + 1
    x = x.double()
    x = (x - x[:half].mean(0)) / x[:half].std(0).clamp(min=1e-8)
    weight = torch.zeros(x.shape[1], classes, dtype=x.dtype, device=x.device, requires_grad=True)
    bias = torch.zeros(classes, dtype=x.dtype, device=x.device, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        solver.zero_grad()
        loss = F.cross_entropy(x[:half] @ weight + bias, y[:half]) + decay * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(closure)
    return ((x[half:] @ weight + bias).argmax(1) == y[half:]).double().mean().item()


def stratified(labels, seed):
    """An order of all images, drawn from the seed, whose beginnings have the classes in the set's shares."""
    draw, key = rng(seed, "subset"), np.empty(len(labels))
    for c in np.unique(labels):
        members = np.flatnonzero(labels == c)
        place = (np.arange(len(members)) + draw.uniform(size=len(members))) / len(members)
        key[draw.permutation(members)] = place
    return np.argsort(key, kind="stable")


@exact()
def reconstruct(model, images, seed, micro, device, name, lpips=None, inception=None, means=0):
    """Every image through the VAE by a posterior sample, its noise drawn from (seed, place) -> two dicts
    {name: [N]} of its metrics and of its latent (Table 10), Statistics of the reconstructions (empty without
    Inception), and the first posterior means [means, C, h, w] (None for 0)."""
    n, metrics, latents, kept = len(images), {}, {}, {}

    def reconstructions():
        for places, x in batches(images, micro, device, name):
            if x.shape[2] % model.f or x.shape[3] % model.f:
                size = tuple(x.shape[2:])
                raise UserError(f"{name}: needs sides in multiples of {model.f}, not {size}; see --size")
            posterior = model.encode(from_uint8(x))
            shape = posterior.mean.shape[1:]                                   # C, h, w
            noise = torch.stack([normal(shape, seed, "noise", i) for i in places.tolist()])
            z = posterior.sample(noise.to(x.device))
            y = to_uint8(model.decode(z))                                      # [B, 3, H, W]
            a, b, flat = x / 255, y / 255, z.double().flatten(1)               # flat: [B, C*h*w]
            distance = lpips(2 * a - 1, 2 * b - 1).double() if lpips else None
            store(metrics, n, places, psnr=psnr(a, b), ssim=ssim(a, b), ssim2=ssim(a, b, 2), lpips=distance)
            store(latents, n, places, z_mean=flat.mean(1), z_square=flat.square().mean(1))
            store(latents, n, places, z_min=flat.amin(1), z_max=flat.amax(1), kl=posterior.kl().double())
            store(latents, n, places, posterior_std=posterior.std.flatten(1).mean(1).double())
            first = places < means
            store(kept, means, places[first], mean=posterior.mean.float()[first.to(x.device)])
            yield places, y

    made = Statistics(name, n=n)
    if inception:
        gather(inception, reconstructions(), made, keep=False)
    else:
        for _ in reconstructions():
            pass
    metrics, latents = ({k: total(v).cpu() for k, v in d.items()} for d in (metrics, latents))
    return metrics, latents, made, total(kept["mean"]) if means else None


# ------------------------------------------------------------------------------------------ the command line


def flags():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("samples", nargs="*", help="npz (arr_0: uint8 [N,H,W,3]), folder of images, or statistics")
    p.add_argument("--ref", help="what to compare with, likewise; an npz's own mu and sigma are used")
    p.add_argument("--features", choices=["inception", "dinov2"], default="inception", help="dinov2 gives FD")
    p.add_argument("--inception", default="inception", help="weight file (default: public); none: no rFID")
    p.add_argument("--dino", default="vitl14", help="DINOv2's name or file; a VAE's teacher is no fair judge")
    p.add_argument("--save-stats", metavar="FILE", help="keep --ref's statistics; works without SAMPLES, too")
    p.add_argument("--vae", nargs="+", default=[], help="measure these instead, paired with the first")
    p.add_argument("--data", help="folder of images for --vae")
    p.add_argument("--probe", action="store_true", help="linear probe of the latents; needs classes")
    p.add_argument("--vgg", default="vgg16", help="LPIPS's weight file (default: public); none: no LPIPS")
    p.add_argument("--lpips", help="its linear layers; default: the public ones with the public VGG")
    pair = dict(type=number(1e-30), nargs=2, metavar=("LOW", "HIGH"))
    p.add_argument("--crop-scale", **pair, default=[0.08, 1], help="Table 2: the crop's share of the area,")
    p.add_argument("--crop-ratio", **pair, default=[3 / 4, 4 / 3], help="its aspect ratio,")
    p.add_argument("--blur-kernel", type=positive, help="the blur's kernel in pixels (default: 23 at 256),")
    p.add_argument("--blur-sigma", **pair, default=[0.1, 2], help="its width in pixels")
    p.add_argument("--size", type=positive, help="center crop of folders (default: 256 for --data)")
    p.add_argument("--num", "--num-images", type=positive, help="images in each SAMPLES, or used of --data")
    p.add_argument("--micro", type=positive, default=32, help="images held at once; less needs less memory")
    p.add_argument("--seed", type=count, default=0, help="draws images, noise and views for --vae")
    p.add_argument("--out", metavar="FILE", help="default: results.json beside SAMPLES, in the VAE's folder")
    args = p.parse_args()
    side, kernel = args.size or 256, args.blur_kernel or 1
    if not all(low <= high for low, high in (args.crop_scale, args.crop_ratio, args.blur_sigma)):
        p.error("--crop-scale, --crop-ratio, --blur-sigma: the lower number comes first")
    if args.crop_scale[1] > 1:
        p.error("--crop-scale is a share of the area, 1 at most")
    if args.vae and (args.samples or args.ref or args.save_stats or args.features != "inception"):
        p.error("--vae is measured on --data, without SAMPLES, --ref, --save-stats and --features")
    if not args.vae and (args.data or args.probe or args.inception == "none"):
        p.error("--data, --probe and --inception none go with --vae")
    if args.vae and side < 7:
        p.error("--size is 7 at least, the window of SSIM")
    if kernel % 2 == 0 or kernel >= 2 * side:
        p.error(f"--blur-kernel is odd and less than twice the image's {side} px")
    if not (args.data if args.vae else args.ref and (args.samples or args.save_stats)):
        p.error("give SAMPLES and --ref, or --vae and --data")
    source = Path([*args.samples, *args.vae, "."][0])
    folder = source if args.vae and source.is_dir() else source.parent       # never among pictures
    args.out = args.out or str(folder / "results.json")
    return args


def write_result(name, value, args):
    """Adds what was measured, on what and how, to results.json; says so if it replaces other settings."""
    if rank() > 0:
        return
    results, settings, other = read_json(args.out, {}), vars(args), ("samples", "save_stats", "micro", "out")
    old = results.get(name, {}).get("settings", {})
    if changed := [f"{k} {v}" for k, v in old.items() if v != settings.get(k) and k not in other]:
        print0(f"{args.out}: replaces what was there of {name}, measured with {', '.join(changed)}")
    results[name] = {"value": value, "settings": settings, "seed": args.seed, **made_by()}
    with survive(args.out):
        save(results, args.out)


def print_row(cells, first, others=10):
    """One line of a table, whose columns are so wide; "-" where there is no number."""
    cells = ["-" if c is None else f"{c:.4f}" if isinstance(c, float) else str(c) for c in cells]
    print0(cells[0].ljust(first), *(c.rjust(others) for c in cells[1:]))


def feature_net(args, device):
    """(net, name of its feature space) for --features."""
    if args.features == "inception":
        net = Inception.load(args.inception).to(device)
        return net, f"inception {fingerprint(net)[:8]}"
    net = DINOv2.load(args.dino).to(device)

    def cls(x):   # FD-DINOv2 is reported on the cls token at 224 px; antialiased, because 256 px shrink
        return net.targets(from_uint8(x), 16, antialias=True)[1], None

    return cls, f"dinov2 {fingerprint(net)[:8]}"


def look_at_inputs(args):
    """Opens --ref and SAMPLES, so that what is wrong is said before anything long -> (Statistics that they
    hold, after an empty one of --features; whether there are images to measure)."""
    like, any_images = [Statistics(f"--features {args.features}", args.features)], False
    for source in (args.ref, *args.samples):
        images, own = open_set(source, args.size)
        n = own.n if own else len(images)
        if args.num and n != args.num and source in args.samples:
            raise UserError(f"{source}: holds {n or 'an unknown number of'} images, not --num {args.num}")
        like += [own] if own else []
        any_images |= images is not None
    return like, any_images


def compare_samples(args, device):
    """FID, sFID, IS, precision, recall of each of SAMPLES against --ref, whose features are computed once."""
    like, any_images = look_at_inputs(args)
    net, space = feature_net(args, device) if any_images else (None, "")
    options = dict(space=space, size=args.size, micro=args.micro, device=device)
    reference = measure(net, args.ref, keep=bool(args.samples), like=like, **options)
    if args.save_stats and rank() == 0:
        with survive(args.save_stats):
            reference.save(args.save_stats)
    names, columns = {"fd": "fid", "sfd": "sfid"}, ["fid", "sfid", "is", "precision", "recall"]
    if args.features == "dinov2":
        names, columns = {}, ["fd", "precision", "recall"]
    heads = [f"against {args.ref}", *columns]
    width = max(map(len, [heads[0], *args.samples]))
    if args.samples:
        print_row(heads, width)
    for source in args.samples:
        value = {names.get(k, k): v for k, v in evaluate(net, source, reference, **options).items()}
        print_row([source, *map(value.get, columns)], width)
        write_result(source if names else f"{source}, {reference.space}", value, args)


def describe_vae(model, name, images, labels, nets, args, device):
    """Tables 8, 10 and 2 for one VAE -> (values, {metric: [n], one number per image})."""
    lpips, inception, reference = nets
    means, options = min(len(images), 10000) if args.probe else 0, (args.seed, args.micro, device)
    each, latents, made, z = reconstruct(model, images, *options, name, lpips, inception, means)
    views = torch.utils.data.Subset(images, range(min(len(images), 1000)))
    strengths = args.crop_scale, args.crop_ratio, args.blur_kernel, args.blur_sigma
    for augment, function in augmentations(*strengths).items():                          # Table 2
        raw, centered = consistency(model, views, function, *options)
        each |= {f"sc_{augment}": raw, f"sc_{augment}_centred": centered}
    values = {"n": len(images)}
    if inception:
        values["rfid"] = frechet(*made.moments[0], *reference.moments[0])                # Table 8
    latents = {k: v[:10000] for k, v in latents.items()}                                 # Table 10
    values |= {k: v.mean().item() for k, v in (each | latents).items()}
    values["z_std"] = math.sqrt(max(values.pop("z_square") - values["z_mean"] ** 2, 0))
    values |= {"z_min": latents["z_min"].min().item(), "z_max": latents["z_max"].max().item()}
    if args.probe:
        y = torch.as_tensor(labels[:means]).to(device)
        values |= {"probe_flat": probe(z.flatten(1), y), "probe_mean": probe(z.mean((2, 3)), y)}
    return values, each


def spread(each):
    """({metric: mean}, {metric: its standard error}) of numbers per image."""
    error = {k: v.std().item() / math.sqrt(len(v)) for k, v in each.items()}
    return {k: v.mean().item() for k, v in each.items()}, error


def compare_vaes(args, device):
    """Every --vae on the same images, noise and views; from the second on also differences to the first."""
    folder = Images(args.data, args.size or 256)
    if args.num and args.num > len(folder):
        raise UserError(f"{args.data}: holds {len(folder)} images, not --num {args.num}")
    order = stratified(folder.labels, args.seed)[:args.num]
    images, labels = torch.utils.data.Subset(folder, order.tolist()), folder.labels[order]
    if args.probe and len(set(labels[:min(len(labels), 10000) // 2])) < 2:
        raise UserError(f"{args.data}: --probe needs a folder per class, two in the half it fits")
    models = [VAE.load(name).to(device) for name in args.vae]
    try:
        inception = None if args.inception == "none" else Inception.load(args.inception).to(device)
        lpips = None if args.vgg == "none" else LPIPS.load(args.vgg, args.lpips).to(device)
    except UserError as e:
        raise UserError(f"{e}; --inception none leaves rFID out, --vgg none LPIPS") from None
    reference = inception and measure(inception, images, keep=False, micro=args.micro, device=device)
    nets = lpips, inception, reference
    columns, first = [], None
    for name, model in zip(args.vae, models):
        values, each = describe_vae(model, name, images, labels, nets, args, device)
        values["standard_error"] = spread(each)[1]
        columns += [(name, values), ("+-", values["standard_error"])]
        if first:
            difference, error = spread({k: v - first[k] for k, v in each.items()})
            values |= {"difference": difference, "difference_error": error}
            columns += [("difference", difference), ("+-", error)]
        first = first or each
        write_result(name, values, args)
    width = max(10, *map(len, args.vae))
    print_row(["", *(head for head, _ in columns)], 20, width)
    for name in [k for k, v in columns[0][1].items() if not isinstance(v, dict)]:
        print_row([name, *(column.get(name) for _, column in columns)], 20, width)


def main():
    args = flags()
    device = start(args)
    read_json(args.out, {})           # if the numbers cannot be added to it, that is said now
    compare = compare_vaes if args.vae else compare_samples
    compare(args, device)


if __name__ == "__main__":
    run_script(main)
