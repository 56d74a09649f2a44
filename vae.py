"""The KL autoencoder of latent diffusion (SD-VAE, f8, 4 channels), its alignment heads and its latent normaliser.

Above the ruler: the network, number for number the public one (Rombach et al. 2022), the two MLPs that ReaLS aligns with
DINOv2 (Eq. 1), and the affine map between raw latents and what a generator sees (Eq. 7-8). Below it: what every
script stands on, namely weight files, image folders, random draws, and how a run behaves.

    vae = VAE.load("sd-vae-ft-ema")     # a public name, a folder, a file, or a state dict
    z = vae.encode(x).sample()          # x: [B,3,H,W] in [-1,1] -> z: [B,4,H/8,W/8], not multiplied by 0.18215
    x = vae.decode(z)
"""
import contextlib
import datetime
import functools
import hashlib
import inspect
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

try:
    import fcntl
    import resource
except ImportError:  # Windows: output folders are not locked, memory is not shown
    fcntl = resource = None

HUGGING = "https://huggingface.co/stabilityai/{}/resolve/main/diffusion_pytorch_model.safetensors"
PUBLIC = {  # name: (url, sha256, bytes)
    "sd-vae-ft-ema": (HUGGING.format("sd-vae-ft-ema"), None, None),
    "sd-vae-ft-mse": (HUGGING.format("sd-vae-ft-mse"),
                      "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815", 334643276),
}
FACTOR = 0.18215                                                                   # DiT's and SiT's latent scale
SD_VAE = {"mean": 0.292873, "std": 4.58407, "min": -65.730583, "max": 68.317589}   # the appendix, Table 10
PAPER = {"mean": -0.016722, "std": None, "min": -6.862830, "max": 10.762420}       # the appendix: the authors' released VAE


# ------------------------------------------------------------------------------------------------------- the network


class Gaussian:
    """The posterior N(mean, std^2), element by element, from moments [B,2C,h,w]: mean first, then log variance."""

    def __init__(self, moments):
        moments = moments if moments.dtype == torch.float64 else moments.float()
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30, 20)

    @property
    def std(self):
        return (0.5 * self.logvar).exp()

    def sample(self, noise=None):
        """z = mean + std * noise, [B,C,h,w], as Eq. 1 begins; noise is standard normal, drawn here if not given."""
        return self.mean + self.std * (torch.randn_like(self.mean) if noise is None else noise)

    def kl(self):
        """KL(q(z|x) || N(0, I)) in nats, [B]: summed over C, h and w."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1 - self.logvar).sum(dim=(1, 2, 3))


class ResBlock(nn.Module):
    def __init__(self, cin, cout, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, cin, eps=1e-6)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, cout, eps=1e-6)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


class Attention(nn.Module):
    """One head over all positions, with its own norm and a residual."""

    def __init__(self, ch, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, ch, eps=1e-6)
        self.to_q, self.to_k, self.to_v = nn.Linear(ch, ch), nn.Linear(ch, ch), nn.Linear(ch, ch)
        self.to_out = nn.ModuleList([nn.Linear(ch, ch)])

    def forward(self, x):
        t = self.group_norm(x).flatten(2).transpose(1, 2)                          # [B, HW, C]
        q, k, v = (f(t).unsqueeze(1) for f in (self.to_q, self.to_k, self.to_v))   # [B, 1, HW, C]
        t = self.to_out[0](F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return x + t.transpose(1, 2).reshape(x.shape)


class Middle(nn.Module):
    def __init__(self, ch, groups):
        super().__init__()
        self.resnets = nn.ModuleList([ResBlock(ch, ch, groups), ResBlock(ch, ch, groups)])
        self.attentions = nn.ModuleList([Attention(ch, groups)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Downsample(nn.Module):
    def __init__(self, ch):
        super().__init__()
        self.conv = nn.Conv2d(ch, ch, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # one zero on the right and at the bottom only


class Upsample(nn.Module):
    def __init__(self, ch):
        super().__init__()
        self.conv = nn.Conv2d(ch, ch, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one resolution, then a change of resolution: Downsample, Upsample or None."""

    def __init__(self, cin, cout, blocks, groups, resample):
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(cin if i == 0 else cout, cout, groups) for i in range(blocks))
        if resample is not None:
            name = "downsamplers" if resample is Downsample else "upsamplers"
            self.add_module(name, nn.ModuleList([resample(cout)]))

    def forward(self, x):
        for part in self.children():
            for layer in part:
                x = layer(x)
        return x


class Encoder(nn.Module):
    def __init__(self, widths, blocks, z_channels, groups):
        super().__init__()
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(widths[max(i - 1, 0)], w, blocks, groups, Downsample if i < last else None)
            for i, w in enumerate(widths))
        self.mid_block = Middle(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * z_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)                                     # [B, ch, H, W]
        for level in self.down_blocks:
            x = level(x)                                        # the last: [B, 4 ch, H/f, W/f]
        x = self.mid_block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))     # [B, 2 C, H/f, W/f]


class Decoder(nn.Module):
    """The encoder's mirror image, with one residual block more at each level."""

    def __init__(self, widths, blocks, z_channels, groups):
        super().__init__()
        widths, last = widths[::-1], len(widths) - 1
        self.conv_in = nn.Conv2d(z_channels, widths[0], 3, padding=1)
        self.mid_block = Middle(widths[0], groups)
        self.up_blocks = nn.ModuleList(
            Level(widths[max(i - 1, 0)], w, blocks + 1, groups, Upsample if i < last else None)
            for i, w in enumerate(widths))
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z):
        x = self.mid_block(self.conv_in(z))                     # [B, 4 ch, H/f, W/f]
        for level in self.up_blocks:
            x = level(x)                                        # the last: [B, ch, H, W]
        return self.conv_out(F.silu(self.conv_norm_out(x)))     # [B, 3, H, W]


class VAE(nn.Module):
    """Images [B,3,H,W] in [-1,1] <-> latents [B,z_channels,H/f,W/f], f = 2^(len(mult)-1); H and W multiples of f.
    The defaults are SD-VAE's 83,653,863 parameters; the parameter names are those of diffusers."""

    def __init__(self, ch=128, mult=(1, 2, 4, 4), blocks=2, z_channels=4, groups=None):
        super().__init__()
        self.config = {"ch": ch, "mult": list(mult), "blocks": blocks, "z_channels": z_channels,
                       "groups": groups or min(32, ch)}
        self.z_channels, self.f = z_channels, 2 ** (len(mult) - 1)
        widths, groups = [round(ch * m) for m in mult], self.config["groups"]
        if any(w % groups for w in widths):
            raise ValueError(f"widths {widths} (--ch times --mult) are no multiples of {groups} norm groups")
        self.encoder = Encoder(widths, blocks, z_channels, groups)
        self.decoder = Decoder(widths, blocks, z_channels, groups)
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * z_channels, 1)
        self.post_quant_conv = nn.Conv2d(z_channels, z_channels, 1)
        self.begin()
        self.folder, self.info = None, {}  # where it was read from, and what reals.json there says of it

    @torch.no_grad()
    def begin(self):
        """For training from nothing: every residual branch begins at zero, the posterior almost deterministic."""
        for m in self.modules():
            if isinstance(m, (ResBlock, Attention)):
                last = m.conv2 if isinstance(m, ResBlock) else m.to_out[0]
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)
        self.quant_conv.weight[self.z_channels:].zero_()
        self.quant_conv.bias[self.z_channels:].fill_(-4)     # log variance

    def encode(self, x):
        """Images [B,3,H,W] in [-1,1] -> the posterior over raw latents [B,z_channels,H/f,W/f]."""
        return Gaussian(self.quant_conv(self.encoder(x)))

    def decode(self, z):
        """Raw latents [B,z_channels,h,w] -> images [B,3,f*h,f*w], about in [-1,1] (not cut)."""
        return self.decoder(self.post_quant_conv(z))

    @classmethod
    def load(cls, source):
        """From a public name (sd-vae-ft-ema, sd-vae-ft-mse), a diffusers or CompVis file, a diffusers folder, the folder of
        a train_vae.py run, or a state dict. Sizes are read from the tensors, the number of norm groups from config.json.
        Raises FileNotFoundError, or ValueError naming the file and the first key that does not fit."""
        if isinstance(source, str) and source in PUBLIC:
            url, sha256, size = PUBLIC[source]
            source = fetch(url, f"{source}.safetensors", sha256, size)
        folder, file, config = None, source, {}
        if not isinstance(source, dict):
            folder, file, config = find_vae(source)
        state = diffusers_names(read(file))
        name = "the given state dict" if isinstance(file, dict) else str(file)
        with torch.device("meta"):                            # no memory before all is known to fit
            model = cls(**sizes(state, name, config))
        load_state(model, state, name)
        model.folder = folder
        if folder is not None:
            model.info = read_json(folder / "reals.json", {})
        return model.eval()

    def save(self, folder, align=None, info=None):
        """Writes a folder that diffusers.AutoencoderKL.from_pretrained reads (config.json and safetensors); beside
        it align.safetensors with the two MLPs, and reals.json with `info`, where they are given."""
        folder, c = Path(folder), self.config
        folder.mkdir(parents=True, exist_ok=True)
        write_safetensors(self.state_dict(), folder / "diffusion_pytorch_model.safetensors")
        levels = len(c["mult"])
        save_json(folder / "config.json", {
            "_class_name": "AutoencoderKL", "_diffusers_version": "0.30.0", "act_fn": "silu", "in_channels": 3,
            "out_channels": 3, "block_out_channels": [round(c["ch"] * m) for m in c["mult"]],
            "down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels,
            "layers_per_block": c["blocks"], "latent_channels": c["z_channels"], "norm_num_groups": c["groups"],
            "sample_size": 256, "scaling_factor": FACTOR})
        if align is not None:
            write_safetensors(align.state_dict(), folder / "align.safetensors")
        if info is not None:
            save_json(folder / "reals.json", info)


# ------------------------------------------------------------------------------------- alignment heads and normaliser


class Align(nn.Module):
    """The two alignment MLPs (Eq. 1): every latent vector to a patch feature, their mean to a class feature.
    layers counts Linears (Table 7: 1, 2, 4), with GELU between; hidden defaults to dim."""

    def __init__(self, z_channels, dim, layers=2, hidden=None):
        super().__init__()
        self.config = {"z_channels": z_channels, "dim": dim, "layers": layers, "hidden": hidden or dim}
        self.patch = self._mlp(**self.config)
        self.cls = self._mlp(**self.config)

    @staticmethod
    def _mlp(z_channels, dim, layers, hidden):
        widths = [z_channels] + [hidden] * (layers - 1) + [dim]
        parts = []
        for a, b in zip(widths, widths[1:]):
            parts += [nn.Linear(a, b), nn.GELU()]
        return nn.Sequential(*parts[:-1])

    def forward(self, z):                                 # z: [B, C, h, w], raw
        tokens = z.flatten(2).transpose(1, 2)             # [B, hw, C]
        return self.patch(tokens), self.cls(tokens.mean(1))   # Eq. 1: [B, hw, D], [B, D]

    @classmethod
    def load(cls, source):
        """The MLPs that lie in a VAE's folder; FileNotFoundError where there are none, ValueError where they are untrained."""
        path = Path(source)
        places = [path.parent] if path.is_file() else [path, path / "vae"]
        file = next((p / "align.safetensors" for p in places if (p / "align.safetensors").is_file()), None)
        if file is None:
            raise FileNotFoundError(f"{source}: no align.safetensors beside this VAE, so its latents cannot become DINOv2 "
                                    "features; fit the two MLPs with train_vae.py --train align --init THIS_VAE")
        if read_json(file.with_name("reals.json"), {}).get("features") == "cls":
            raise ValueError(f"{file}: of a run with --features cls, so its patch MLP was never trained")
        state = read(file)
        linears = [v for k, v in state.items() if k.startswith("patch.") and k.endswith("weight")]   # in the order of the layers
        if not linears or any(v.ndim != 2 for v in linears):
            raise ValueError(f"{file}: holds no patch.0.weight of two dimensions, so it is no pair of alignment MLPs")
        model = cls(linears[0].shape[1], linears[-1].shape[0], len(linears), linears[0].shape[0])
        load_state(model, state, str(file))
        return model.eval()


class Normalizer:
    """Raw latents z <-> what the generator sees, x = scale * z + shift, the factor 0.18215 included (Eq. 7 and 8).

    kind: "max-min" (Eq. 7: to SD-VAE's range and mean), "std" (to SD-VAE's standard deviation and mean; `std` asks for
    another one, counted after the factor), "none" (0.18215 z). stats: {mean, std, min, max} of raw sampled latents."""

    def __init__(self, kind="none", stats=None, std=None):
        self.kind, self.stats, self.std = kind, stats, std
        if kind == "none":
            self.scale, self.shift = FACTOR, 0.0
            return
        needed = {"max-min": ("mean", "min", "max"), "std": ("mean", "std")}[kind]
        lacking = [k for k in needed if (stats or {}).get(k) is None]
        if lacking:
            raise ValueError(f"normalisation {kind} needs the latents' {lacking[0]}, which the statistics lack")
        if kind == "max-min":
            ratio = (SD_VAE["max"] - SD_VAE["min"]) / (stats["max"] - stats["min"])
        else:
            ratio = (SD_VAE["std"] if std is None else std / FACTOR) / stats["std"]
        self.scale = FACTOR * ratio
        self.shift = FACTOR * (SD_VAE["mean"] - ratio * stats["mean"])

    def encode(self, z):
        return self.scale * z + self.shift      # Eq. 7, then the factor

    def decode(self, x):
        return (x - self.shift) / self.scale    # the factor undone, then Eq. 8

    def state(self):
        return {"kind": self.kind, "stats": self.stats, "std": self.std}


def statistics(latents, run=None):
    """Mean, std, min, max over all elements of sampled latents, and n, the number of images (Table 10).
    latents: an iterable of [B,C,h,w]; under torchrun each rank brings its share."""
    total = torch.tensor([0, 0, 0, 0, math.inf, -math.inf], dtype=torch.float64)
    for z in latents:
        z = z.detach().double().cpu()
        total[:4] += torch.tensor([z.shape[0], z.numel(), z.sum(), (z**2).sum()], dtype=torch.float64)
        total[4], total[5] = min(total[4], z.min()), max(total[5], z.max())
    parts = total[None] if run is None else run.gather(total)              # [ranks, 6]
    n, count, s, ss = parts[:, :4].sum(0).tolist()
    mean = s / count
    return {"mean": mean, "std": math.sqrt(max(ss / count - mean**2, 0)), "min": parts[:, 4].min().item(),
            "max": parts[:, 5].max().item(), "n": int(n)}


def pca(features, basis=None):
    """The three-colour PCA of patch features [B,N,D]: (colours in [0,1], [B,N,3]; the basis, to reuse on other features).
    The first three components over all B*N vectors, each stretched from its 2nd to its 98th percentile."""
    flat = features.detach().float().flatten(0, 1)
    if basis is None:
        mean = flat.mean(0)
        _, vectors = torch.linalg.eigh((flat - mean).T @ (flat - mean))
        axes = vectors[:, -3:].flip(1)                                     # [D, 3], largest first
        axes = axes * torch.where(axes.sum(0) < 0, -1.0, 1.0)              # eigenvectors have no sign: fix one
        p = (flat - mean) @ axes
        basis = mean, axes, torch.quantile(p[:: max(1, len(p) // 100000)], torch.tensor([0.02, 0.98], device=p.device), dim=0)
    mean, axes, (low, high) = basis
    colours = ((flat - mean) @ axes - low) / (high - low).clamp_min(1e-12)
    return colours.clamp(0, 1).view(*features.shape[:2], 3), basis


# ===================================================================================================================
# What every script stands on: weight files.


def find_vae(source):
    """(folder or None, weight file, config) of a VAE on disk: a file, a diffusers folder, or a run's folder with vae/ in it."""
    path = Path(source)
    if path.is_file():
        return path.parent, path, read_json(path.parent / "config.json", {})
    for folder in (path, path / "vae"):
        for name in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"):
            if (folder / name).is_file():
                return folder, folder / name, read_json(folder / "config.json", {})
    raise FileNotFoundError(f"{source}: no VAE here: neither a weight file, nor a folder with diffusion_pytorch_model.safetensors, "
                            f"nor one of the public names {', '.join(PUBLIC)}; train_vae.py makes out/vae")


def read_json(path, default=None):
    """The object in a JSON file, or `default` in place of a missing one; ValueError naming the file where it holds anything else."""
    path = Path(path)
    if default is not None and not path.is_file():
        return default
    raw = path.read_bytes()
    try:
        found = json.loads(raw)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: not a readable JSON object (begins with {raw[:12]!r})")
    return found


def diffusers_names(state):
    """Any public layout of this network (CompVis, also inside a whole LDM; diffusers, old and new) -> diffusers' new names."""
    if any(k.startswith("first_stage_model.") for k in state):
        state = {k.removeprefix("first_stage_model."): v for k, v in state.items() if k.startswith("first_stage_model.")}
    state = {k: v for k, v in state.items() if not k.startswith(("loss.", "model_ema."))}
    ups = [int(m[1]) for k in state if (m := re.match(r"decoder\.up\.(\d+)\.", k))]
    rules = [
        (r"^encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets."),
        (r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
        (r"^decoder\.up\.(\d+)\.block\.", lambda m: f"decoder.up_blocks.{max(ups) - int(m[1])}.resnets."),
        (r"^decoder\.up\.(\d+)\.upsample\.", lambda m: f"decoder.up_blocks.{max(ups) - int(m[1])}.upsamplers.0."),
        (r"\.mid\.block_1\.", ".mid_block.resnets.0."), (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
        (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
        (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
        (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
        (r"\.attentions\.0\.query\.", ".attentions.0.to_q."), (r"\.attentions\.0\.key\.", ".attentions.0.to_k."),
        (r"\.attentions\.0\.value\.", ".attentions.0.to_v."), (r"\.attentions\.0\.proj_attn\.", ".attentions.0.to_out.0."),
        (r"\.norm_out\.", ".conv_norm_out."), (r"\.nin_shortcut\.", ".conv_shortcut."),
    ]
    out = {}
    for key, value in state.items():
        for pattern, to in rules:
            key = re.sub(pattern, to, key)
        flat = ".attentions.0.to_" in key and key.endswith("weight") and value.ndim == 4   # 1x1 convolutions to linears
        out[key] = value.flatten(1) if flat else value
    return out


def sizes(state, name, config):
    """The VAE's constructor arguments, read from tensors under diffusers' names; the norm groups from the config."""
    def rows(key):
        if state[key].ndim != 4 or not len(state[key]):
            raise ValueError(f"{name}: {key} is {tuple(state[key].shape)}, expected the 4 dimensions of a convolution")
        return len(state[key])

    widths, blocks = [], 0
    while (key := f"encoder.down_blocks.{len(widths)}.resnets.0.conv1.weight") in state:
        widths.append(rows(key))
    while f"encoder.down_blocks.0.resnets.{blocks}.conv1.weight" in state:
        blocks += 1
    if not widths or "post_quant_conv.weight" not in state:
        missing = "post_quant_conv.weight" if widths else "encoder.down_blocks.0.resnets.0.conv1.weight"
        raise ValueError(f"{name}: not a KL autoencoder: no tensor {missing} (its first is {next(iter(state), 'none')})")
    mult = [w // widths[0] if w % widths[0] == 0 else w / widths[0] for w in widths]
    groups = config.get("norm_num_groups") or min(32, widths[0])
    if not isinstance(groups, int) or groups < 1 or any(w % groups for w in widths):
        raise ValueError(f"{name}: its widths {widths} are no multiples of {groups!r} norm groups (norm_num_groups in the "
                         "config.json beside it)")
    return {"ch": widths[0], "mult": mult, "blocks": blocks, "z_channels": rows("post_quant_conv.weight"), "groups": groups}


def fingerprint(model):
    """sha256 of names, shapes and float32 bytes of all weights: one network, one value, whatever file it came from."""
    h = hashlib.sha256()
    for k, v in sorted(model.state_dict().items()):
        h.update(f"{k}{tuple(v.shape)}".encode())
        h.update(v.detach().float().cpu().contiguous().numpy())
    return h.hexdigest()


def load_state(model, state, name):
    """Copies a state dict into a model, whole or not at all; the error names the first key that does not fit."""
    own = model.state_dict()
    for key, value in own.items():
        if key not in state:
            raise ValueError(f"{name}: no tensor {key}, expected {tuple(value.shape)}")
        if state[key].shape != value.shape:
            raise ValueError(f"{name}: {key} is {tuple(state[key].shape)}, expected {tuple(value.shape)}")
    for key in state:
        if key not in own:
            raise ValueError(f"{name}: holds {key}, which this network has no place for")
    if next(model.parameters()).is_meta:
        model.to_empty(device="cpu")
    model.load_state_dict(state)


def fetch(url, name, sha256=None, size=None):
    """The path of a public file in torch.hub's cache, downloaded first if it is not there; checked where hash or size are known."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / name
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256, progress=True)
        except Exception as e:
            raise FileNotFoundError(f"{name} is not in {folder} and could not be downloaded ({e}): "
                                    f"get {url} and put it there under that name") from None
    if size is not None and path.stat().st_size != size:
        raise ValueError(f"{path}: {path.stat().st_size:,} bytes, expected {size:,}: delete it, it is not {url}")
    return path


def read(source):
    """The state dict in a .pth, .pt, .bin, .ckpt or .safetensors file (one under "state_dict" is unwrapped); a dict is
    returned as it is. Nothing in the file is executed. Raises FileNotFoundError, or ValueError naming the file."""
    if isinstance(source, dict):
        return source
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    state = load_file(path)
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    tensors = {k: v for k, v in state.items() if torch.is_tensor(v)} if isinstance(state, dict) else {}
    if not tensors or not all(isinstance(k, str) for k in tensors):
        raise ValueError(f"{path}: holds no state dict of tensors by name")
    return tensors


def load_file(path):
    """What torch.save wrote, tensors and plain values only; ValueError naming the file where it is anything else."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))   # only what is used is read
    except Exception as e:
        refused = re.search(r"(?:GLOBAL|global) ([\w.]+\.[\w.]+)", str(e))
        if refused:
            raise ValueError(f"{path}: holds the Python object {refused[1]}, which is never loaded; with the program that wrote "
                             "the file, save its tensors alone (torch.save of the state dict)") from None
        raise ValueError(f"{path}: not a whole PyTorch weight file (begins with {path.open('rb').read(12)!r}); "
                         "if it was downloaded, delete it and get it again") from None


def checkpoint_of(run, folder, settings, hashes):
    """The ckpt.pt that this command goes on from, or None; ValueError if it is of other settings or of another VAE or data.
    All ranks must see the same one."""
    path = Path(folder) / "ckpt.pt"
    ckpt = load_file(path) if path.is_file() else None
    if len(set(run.all(ckpt and ckpt["step"]))) > 1:
        raise ValueError(f"{path}: not every process sees the same checkpoint; --out must be a folder that all machines share")
    if ckpt is not None:
        same_settings(path, ckpt["settings"], settings)
        for what, value in hashes.items():
            if ckpt[what] != value:
                raise ValueError(f"{path} was made with another {what}; another --out starts anew")
        changed = [f", --{k} {settings[k]} in place of {ckpt['settings'][k]}" for k in ("clip", "dtype") if settings[k] != ckpt["settings"][k]]
        run.print(f"{path}: going on from step {ckpt['step']}" + "".join(changed))
    return ckpt


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path):
    """safetensors: a little-endian uint64 header length, a JSON header, raw tensors. Every offset is checked."""
    raw = np.memmap(path, np.uint8, "c") if path.stat().st_size else np.zeros(0, np.uint8)
    try:
        start, state = 8 + int.from_bytes(raw[:8].tobytes(), "little"), {}
        if not 8 < start <= len(raw):
            raise ValueError(f"no header; it begins with {raw[:12].tobytes()!r}")
        header = json.loads(raw[8:start].tobytes())
        for key, entry in header.items():
            if key != "__metadata__":
                (a, b), dtype = entry["data_offsets"], DTYPES[entry["dtype"]]
                if not 0 <= a <= b <= len(raw) - start or b - a != math.prod(entry["shape"]) * dtype.itemsize:
                    raise ValueError(f"{key} lies outside the file")
                data = torch.from_numpy(raw[start + a:start + b]).clone()
                state[key] = data.view(dtype).view(entry["shape"])
        return state
    except Exception as e:
        raise ValueError(f"{path}: not a whole safetensors file ({type(e).__name__}: {e}); if it was downloaded, delete it and "
                         "get it again") from None


def write_safetensors(state, path):
    """A state dict as a safetensors file, atomic."""
    header, at, names = {}, 0, {v: k for k, v in DTYPES.items()}
    state = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    for key, v in state.items():
        header[key] = {"dtype": names[v.dtype], "shape": list(v.shape), "data_offsets": [at, at + v.nbytes]}
        at += v.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic(path) as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for v in state.values():
            f.write(v.view(-1).view(torch.uint8).numpy())


@contextlib.contextmanager
def atomic(path):
    """A binary file to write that appears under its name whole or not at all: the old one stays until then."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with open(part, "wb") as f:
        yield f
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)


def save(obj, path):
    """torch.save, atomic."""
    with atomic(path) as f:
        torch.save(obj, f)


def save_json(path, obj):
    """Indented JSON, atomic."""
    with atomic(path) as f:
        f.write((json.dumps(obj, indent=1) + "\n").encode())


# -------------------------------------------------------------------------------------------------- images and draws


def center_crop(image, size):
    """A PIL image -> its central size x size square, as ADM does it: halved with a box filter while it is at least twice
    as large, then bicubic to the short side, then cut (Dhariwal & Nichol 2021)."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


class Images(torch.utils.data.Dataset):
    """A folder of images: [i] -> (uint8 [3,size,size], label). One subfolder per class, in sorted order; in a flat folder
    every label is -1 and .classes is empty. size None keeps each image as it is. Pixels are read as stored (no EXIF rotation)."""

    kinds = tuple(ending for ending, kind in Image.registered_extensions().items()       # all that pillow reads; no other data
                  if kind in Image.OPEN and kind not in ("BUFR", "GRIB", "HDF5", "MPEG", "WMF", "EPS"))

    def __init__(self, root, size):
        self.root, self.size = Path(root), size
        found = [Path(d, f) for d, _, files in os.walk(root, followlinks=True) for f in files
                 if f.lower().endswith(self.kinds) and not f.startswith(".")]
        if not found:
            raise FileNotFoundError(f"{root}: no images here (expected one folder of images per class, as ImageNet unpacks); "
                                    "--data and --val name other folders, and tests/demo.py needs none")
        self.paths = sorted(p.relative_to(root).as_posix() for p in found)
        self.stray = [p for p in self.paths if "/" not in p]     # images that lie in no class folder
        flat = bool(self.stray)
        self.classes = [] if flat else sorted({p.split("/")[0] for p in self.paths})
        number = {c: i for i, c in enumerate(self.classes)}
        self.labels = np.array([-1 if flat else number[p.split("/")[0]] for p in self.paths])

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        path = self.root / self.paths[i]
        try:
            with Image.open(path) as image:
                if image.mode.startswith("I"):  # 16-bit gray: pillow's own conversion would clip it to white
                    image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
                if max(image.size) > 100 * min(image.size):
                    raise ValueError(f"{image.width} x {image.height} pixels: no picture has such a shape")
                image = image.convert("RGB")
            image = image if self.size is None else center_crop(image, self.size)
        except Exception as e:
            raise ValueError(f"{path}: not a readable image ({e})") from None
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), int(self.labels[i])

    def near(self, i):
        """(image, label, indices of unreadable files): item i, or the first readable one after it."""
        bad = []
        while len(bad) < 100:
            try:
                return *self[i], bad
            except ValueError:
                bad.append(i)
                i = (i + 1) % len(self)
        raise ValueError(f"{self.root}: 100 files in a row are not readable images, from {self.paths[bad[0]]} on")

    @functools.cached_property
    def fingerprint(self):
        """sha256 of the sorted relative paths and byte sizes as they are at the first call."""
        h = hashlib.sha256()
        for p in self.paths:
            size = (self.root / p).stat().st_size if (self.root / p).exists() else -1      # a dead link is a bad file like others
            h.update(f"{p}\0{size}\n".encode())
        return h.hexdigest()


PURPOSES = ["order", "flip", "noise", "sample", "step", "augment", "init", "subset", "label"]


def rng(seed, purpose, *key):
    """NumPy's Generator for one purpose and key: every draw of the project is a function of (seed, purpose, key) alone."""
    words = [w for k in (seed, PURPOSES.index(purpose), *key) for w in (int(k) & 0xFFFFFFFF, int(k) >> 32)]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


def normal(shape, seed, purpose, *key):
    """Standard normal float32 tensor of a shape, keyed as in rng."""
    return torch.from_numpy(rng(seed, purpose, *key).standard_normal(shape, dtype=np.float32))


@functools.lru_cache(maxsize=2)
def permutation(seed, epoch, n):
    return rng(seed, "order", epoch).permutation(n)


def order(seed, n, k):
    """The index of the k-th image of endless epochs over n images, each epoch in an order drawn from (seed, epoch)."""
    return int(permutation(seed, k // n, n)[k % n])


def to_uint8(x):
    """[-1,1] -> uint8, rounding half up: 127.5 x + 128, cut to 0..255 (DiT's quantisation)."""
    return (127.5 * x.float() + 128).clamp(0, 255).to(torch.uint8)


def from_uint8(x):
    """uint8 0..255 -> float32 in [-1,1]."""
    return x.float() / 127.5 - 1


def grid(images, columns=8, pad=2):
    """uint8 [N,3,H,W] -> one PIL picture, row by row, on white."""
    n, _, h, w = images.shape
    rows = -(-n // columns)
    sheet = np.full((rows * (h + pad) + pad, min(n, columns) * (w + pad) + pad, 3), 255, np.uint8)
    for i, image in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        y, x = pad + i // columns * (h + pad), pad + i % columns * (w + pad)
        sheet[y:y + h, x:x + w] = image
    return Image.fromarray(sheet)


# ------------------------------------------------------------------------------------------------------------- a run


class Run:
    """One process of a run, under torchrun or plain python: rank, world, device; what ranks say to each other; the lock on
    the output folder; and the wish to stop (SIGINT, SIGTERM), on which all ranks agree."""

    def __init__(self):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank, self.main = int(os.environ.get("LOCAL_RANK", 0)), self.rank == 0
        self.device = torch.device(f"cuda:{self.local_rank}" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        if self.world > 1 and not dist.is_initialized():
            gpu = self.device.type == "cuda"     # twelve hours: others wait while one encodes, downloads or writes
            dist.init_process_group("nccl" if gpu else "gloo", timeout=datetime.timedelta(hours=12), device_id=self.device if gpu else None)
        self.stop, self.locks = 0, []

    def print(self, *text):
        if self.main:
            tqdm.write(" ".join(map(str, text)))

    def bar(self, total, desc, unit="img", initial=0):
        return tqdm(total=total, desc=desc, unit=unit, initial=initial, disable=not self.main, dynamic_ncols=True,
                    smoothing=0.05, mininterval=0.2 if sys.stderr.isatty() else 20)

    def gather(self, x):
        """[...] of every rank -> [world, ...]."""
        if self.world == 1:
            return x[None]
        parts = [torch.empty_like(x, device=self.device) for _ in range(self.world)]
        dist.all_gather(parts, x.to(self.device))
        return torch.stack(parts).to(x.device)

    def sum(self, x):
        """The sum of every rank's tensor, all of one shape, on all ranks."""
        if self.world == 1:
            return x
        y = x.to(self.device, copy=True)
        dist.all_reduce(y)
        return y.to(x.device)

    def all(self, obj):
        """A list with every rank's object."""
        parts = [obj] * self.world
        if self.world > 1:
            dist.all_gather_object(parts, obj)
        return parts

    def parallel(self, net):
        """A network whose gradients are means over all ranks; buffers stay each rank's own."""
        if net is None or self.world == 1:
            return net
        names = inspect.signature(DDP).parameters  # torch 2.15 renamed the option
        return DDP(net, **{"forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False})

    def memory(self):
        """Peak memory in GiB: of the GPU, or of this process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20 if resource else 0.0

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    @contextlib.contextmanager
    def first(self):
        """The first process of each machine goes through the block alone (it may download), the others after it; an error
        of a first one that the user can mend ends all of them."""
        if self.local_rank != 0:
            wrong = [message for message in self.all(None) if message]
            if wrong:
                raise ValueError(wrong[0])
        try:
            yield
        except (OSError, ValueError) as e:
            if self.local_rank == 0:
                self.all(str(e))
            raise
        if self.local_rank == 0:
            self.all(None)

    def lock(self, folder, flag="--out"):
        """Makes the output folder and holds it for this run alone, until it ends or unlocks it."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        if self.main and fcntl is not None:
            self.locks.append(open(Path(folder) / ".lock", "w"))
            try:
                fcntl.flock(self.locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(f"{folder}: another run is writing here; {flag} names another folder") from None

    def unlock(self):
        """Gives back the folder that was locked last."""
        if self.locks:
            self.locks.pop().close()

    def catch_stop(self):
        """From now on SIGINT and SIGTERM only ask: the loop saves and leaves. A second SIGINT ends the program at once."""
        def ask(number, frame):
            self.stop = number
            signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGINT, ask)
        signal.signal(signal.SIGTERM, ask)

    def heed_stop(self):
        """From now on the signals end the program again."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def leave(self, step):
        """After the last save: says so, and exits as a process ended by that signal does."""
        self.print(f"stopped after step {step}; the same command goes on from there")
        sys.exit(128 + self.stopping())

    def stopping(self):
        """The signal that some rank was sent, or 0: equal on all ranks."""
        return int(self.gather(torch.tensor(self.stop)).max())


class Log:
    """Means over the steps and ranks between two log lines; each line is printed, and appended to log.jsonl."""

    def __init__(self, run, args, start):
        self.run, self.batch, self.file = run, args.batch, Path(args.out) / "log.jsonl"
        self.sums, self.count, self.since = {}, 0, time.time()
        if run.main and self.file.is_file():     # lines after the checkpoint, of steps that are made again, would stand twice
            lines = self.file.read_text().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= start]
            self.file.write_text("".join(kept))

    def add(self, seen):
        self.count += 1
        for k, v in seen.items():
            self.sums[k] = self.sums.get(k, 0) + v.detach()

    def line(self, step, **more):
        """Ends the interval: step, means, images/s, memory, and `more` (a function there is given the images/s)."""
        names = list(self.sums)
        means = self.run.sum(torch.stack([self.sums[k].double() for k in names])) / (self.count * self.run.world)
        rate = self.count * self.batch / (time.time() - self.since)
        values = {"step": step, **dict(zip(names, means.tolist())), "img/s": rate, "GiB": self.run.memory(),
                  **{k: v(rate) if callable(v) else v for k, v in more.items()}}
        self.sums, self.count, self.since = {}, 0, time.time()
        self.run.print("  ".join(f"{k} {self.short(v)}" for k, v in values.items()))
        if self.run.main:
            with open(self.file, "a") as f:
                f.write(json.dumps(values) + "\n")
        return values

    def short(self, v):
        if isinstance(v, list):
            return " ".join(map(self.short, v))
        return "-" if v is None else f"{v:,}" if isinstance(v, int) else f"{v:.4g}"


class Store:
    """Arrays on disk, {name: (dtype, shape)}, all of one length, that ranks fill together and a killed run goes on filling.
    `meta` says what they are made of: a folder made of anything else is refused (ValueError)."""

    def __init__(self, run, folder, arrays, meta, flag):
        self.folder, manifest = Path(folder), Path(folder) / "manifest.json"
        meta = json.loads(json.dumps(meta))
        if manifest.is_file():
            there = json.loads(manifest.read_text())
            for key in meta:
                if there.get(key) != meta[key]:
                    old, new = (str(v)[:40] for v in (there.get(key), meta[key]))
                    raise ValueError(f"{folder} was made with {key} {old}, not {new}: {flag} names another folder")
        whole = manifest.is_file() and bool(np.load(self.folder / "done.npy", mmap_mode="r").all())
        self.whole = all(run.all(whole))      # asked once, together: later each process would see another moment
        if self.whole:
            self.arrays, self.done = self.open(arrays, "r")   # others may read it at the same time
            return
        run.lock(folder, flag)
        if run.main and not manifest.is_file():
            size = sum(np.dtype(d).itemsize * math.prod(shape) for d, shape in arrays.values()) / 2**30
            free = shutil.disk_usage(folder).free / 2**30
            run.print(f"{folder}: {size:.2f} GiB ({free:.0f} GiB free)")
            if size > free:
                raise ValueError(f"{folder}: {size:.1f} GiB are needed, {free:.1f} are free: {flag} names another place")
            n = next(iter(arrays.values()))[1][0]
            for name, (dtype, shape) in {**arrays, "done": (np.uint8, (n,))}.items():
                np.lib.format.open_memmap(self.folder / f"{name}.npy", "w+", dtype, shape).flush()
            save_json(manifest, meta)
        run.barrier()
        self.arrays, self.done = self.open(arrays, "r+")

    def open(self, names, mode):
        arrays = {name: np.load(self.folder / f"{name}.npy", mmap_mode=mode) for name in (*names, "done")}
        return arrays, arrays.pop("done")

    def put(self, first, **parts):
        """Writes parts[name] [B,...] at first..first+B: the data first, then the word that it is there."""
        for name, part in parts.items():
            self.arrays[name][first:first + len(part)] = part
            self.arrays[name].flush()
        self.done[first:first + len(part)] = 1
        self.done.flush()

    def todo(self, run, chunk):
        """The ranges of `chunk` items that this rank still has to fill; they do not depend on the number of ranks."""
        starts = range(0, len(self.done), chunk)
        return [range(a, min(a + chunk, len(self.done))) for a in starts[run.rank::run.world] if not self.done[a:a + chunk].all()]


def main(fn):
    """Runs a script's main(). What a user can mend ends in one line, from the first process of a machine, and status 1."""
    script = Path(sys.argv[0]).name
    try:
        fn()
    except KeyboardInterrupt:
        print(f"{script}: stopped; what is finished is kept", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except torch.OutOfMemoryError as e:
        wrong = f"out of memory; hold fewer images at once (--micro, in sample.py --batch): {str(e).splitlines()[0]}"
    except (OSError, ValueError, ArithmeticError) as e:
        wrong = str(e).strip().splitlines()[-1]  # of a loader process, torch gives the whole traceback: the last line says it
    else:
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    finally:
        if workers := multiprocessing.active_children():    # a loader's: deaf to gentler signals, waited for without end
            if hasattr(signal, "SIGCHLD"):                  # which Windows has not
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)   # torch would take their end for an error
            for worker in workers:
                worker.kill()
    if int(os.environ.get("LOCAL_RANK", 0)) != 0:
        time.sleep(2)  # a launcher ends all processes when the first one leaves: let that be the one that speaks
    print(f"{script}: {wrong.removeprefix('ValueError: ')}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    if dist.is_initialized():
        os._exit(1)  # not through the process group's end, which would wait for the others
    sys.exit(1)


def run_flags(p, out, batch, lr):
    """The flags that both trainers share."""
    p.add_argument("--out", default=out, help="folder of the run; the same command goes on where it stopped")
    p.add_argument("--batch", type=int, default=batch, help="global batch, whatever the number of processes")
    p.add_argument("--micro", type=int, help="images a process holds at once; lower it when memory runs out")
    p.add_argument("--lr", type=float, default=lr)
    p.add_argument("--warmup", type=int, default=0, help="steps of linear warm-up")
    p.add_argument("--clip", type=float, default=0, help="largest gradient norm; 0: no clipping")
    p.add_argument("--betas", type=float, nargs=2, default=[0.9, 0.999])
    p.add_argument("--dtype", choices=["bf16", "fp32", "fp64"], help="default: bf16 on a GPU that has it, else fp32")
    p.add_argument("--compile", action="store_true", default=torch.cuda.is_available(), help="torch.compile (default on a GPU)")
    p.add_argument("--no-compile", dest="compile", action="store_false")
    p.add_argument("--workers", type=int, default=8 if torch.cuda.is_available() else 1, help="loader processes, each process")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--log-every", type=int, default=100, help="steps between log lines")
    p.add_argument("--save-every", type=int, default=2000, help="steps between checkpoints")
    p.add_argument("--picture-every", type=int, default=2000, help="steps between pictures")


def default_dtype(run):
    """bf16 on a GPU that has it (and does not emulate it), else fp32."""
    return "bf16" if run.device.type == "cuda" and torch.cuda.get_device_capability()[0] >= 8 else "fp32"


def settle(args, run):
    """Completes and checks the shared flags: dtype by the device; --micro, whole micro-batches in equal shares."""
    for name in ("steps", "epochs", "batch", "micro", "log_every", "save_every", "picture_every", "keep"):
        if (value := getattr(args, name, None)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: 1 at least")
    args.dtype = args.dtype or default_dtype(run)
    args.micro = args.micro or max(args.batch // run.world, 1)
    if args.batch % (run.world * args.micro):
        raise ValueError(f"--batch {args.batch} is not a multiple of {run.world} process(es) x --micro {args.micro}")
    args.accumulate = args.batch // (run.world * args.micro)


FREE = {"micro", "accumulate", "workers", "log_every", "save_every", "picture_every", "compile", "keep", "checkpointing",
        "out", "data", "val", "vae", "cache", "stats",   # may change when a run goes on: speed, places (what lies there is hashed),
        "clip", "dtype"}                                 # and what helps one that met a gradient without end


def same_settings(path, old, new):
    """Raises ValueError naming the first flag in which a run's checkpoint and this command differ (but for those in FREE)."""
    for key, value in new.items():
        if key not in FREE and key in old and old[key] != value:
            raise ValueError(f"{path} was made with --{key.replace('_', '-')} {old[key]}, not {value}: "
                             "give the same flags to go on, or another --out to start anew")


def learning_rate(args, step):
    """--lr after linear --warmup; with --schedule cosine down to 0 at --steps."""
    scale = min(1, (step + 1) / args.warmup) if args.warmup else 1
    if args.schedule == "cosine":
        scale *= 0.5 * (1 + math.cos(math.pi * step / args.steps))
    return args.lr * scale


def update(pairs, clip, step):
    """One step of each (optimiser, model) and the norms of their gradients, clipped to `clip` if that is not 0. A gradient that
    is not finite never reaches any weights: ArithmeticError (gradients are equal on all ranks, so all of them stop)."""
    norms = [nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf) for _, model in pairs]
    if not torch.isfinite(torch.stack(norms)).all():
        raise ArithmeticError(f"step {step}: the gradient is not finite; the weights were left as they were. "
                              "The last checkpoint is whole; the same command with --clip 1 or --dtype fp32 may get past it")
    for optimizer, _ in pairs:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norms


def deaf(worker):
    """Loader workers leave signals to the main process: it saves, and then ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def loader(dataset, run, args, start):
    """Iterates over this process's micro-batches from step `start` to the end; item (step, places in the global batch)."""
    local = args.batch // run.world
    work = ((step, range(first, first + args.micro)) for step in range(start, args.steps)
            for first in range(run.rank * local, (run.rank + 1) * local, args.micro))
    return iter(torch.utils.data.DataLoader(dataset, batch_size=None, sampler=work, num_workers=args.workers,
                                            pin_memory=run.device.type == "cuda", generator=torch.Generator(), worker_init_fn=deaf))
