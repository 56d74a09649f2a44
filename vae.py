"""The KL autoencoder of latent diffusion (SD-VAE, f8, 4 channels), its alignment heads, its normaliser.

First the network, number for number the public one (Rombach et al. 2022), the two MLPs that ReaLS aligns with
DINOv2 (Eq. 1), the affine map between raw latents and what a generator sees (Eq. 7-8), and the public weight
files. Below the ruler, what every script stands on: files, images, random draws, and how a run behaves.

    vae = VAE.load("sd-vae-ft-ema")     # a public name, a folder, a file, or a state dict
    z = vae.encode(x).sample()          # [B,3,H,W] in [-1,1] -> [B,4,H/8,W/8], not multiplied by 0.18215
    x = vae.decode(z)
"""
import argparse
import contextlib
import datetime
import errno
import functools
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
import traceback
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

try:
    import fcntl
    import resource
except ImportError:  # Windows: output folders are not locked, memory is not shown
    fcntl = resource = None

FACTOR = 0.18215  # DiT's and SiT's latent scale
SD_VAE = {"mean": 0.292873, "std": 4.58407, "min": -65.730583, "max": 68.317589}   # the appendix, Table 10
PAPER = {"mean": -0.016722, "min": -6.862830, "max": 10.762420}  # the authors' VAE, the appendix


class UserError(ValueError):
    """What the user can mend: it ends a script in one line. A bug keeps its traceback."""


def arguments(of):
    """A constructor's arguments, from its locals(), as JSON knows them: what a file of ours stores."""
    return json.loads(json.dumps({k: v for k, v in of.items() if k not in ("self", "__class__")}))


# ------------------------------------------------------------------------------------------------ the network


class Gaussian:
    """The posterior N(mean, std^2), element by element, from moments [B,2C,h,w]: mean, then log variance."""

    def __init__(self, moments):
        moments = moments if moments.dtype == torch.float64 else moments.float()
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30, 20)

    @property
    def std(self):
        return (0.5 * self.logvar).exp()

    def sample(self, noise=None):
        """z = mean + std * noise, [B,C,h,w], as Eq. 1 begins; noise: standard normal, else drawn here."""
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
    """Images [B,3,H,W] in [-1,1] <-> latents [B,z_channels,H/f,W/f], f = 2^(len(mult)-1); H and W multiples
    of f. The defaults are SD-VAE's 83,653,863 parameters; the parameter names are those of diffusers.
    quant, post_quant: with a 1 x 1 convolution before and after the latents, which SD3 and Flux have not;
    factor, shift: its own generators see factor (z - shift)."""

    encoder_parts = "encoder.", "quant_conv."               # what its latents depend on

    def __init__(self, ch=128, mult=(1, 2, 4, 4), blocks=2, z_channels=4, groups=None, quant=True,
                 post_quant=True, factor=FACTOR, shift=0.0):
        super().__init__()
        self.settings = arguments(locals())
        self.z_channels, self.f, self.groups = z_channels, 2 ** (len(mult) - 1), groups or min(32, ch)
        self.factor, self.shift = factor, shift
        widths = [round(ch * m) for m in mult]
        if any(w % self.groups for w in widths):
            raise UserError(f"widths {widths} (--ch times --mult) are no multiples of {self.groups} groups")
        self.encoder = Encoder(widths, blocks, z_channels, self.groups)
        self.decoder = Decoder(widths, blocks, z_channels, self.groups)
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * z_channels, 1) if quant else nn.Identity()
        self.post_quant_conv = nn.Conv2d(z_channels, z_channels, 1) if post_quant else nn.Identity()
        self.init_weights()
        self.folder, self.info, self.config = None, {}, {}   # where it was read from: reals.json, config.json

    @torch.no_grad()
    def init_weights(self):
        """For training from nothing: residual branches begin at zero, the posterior almost deterministic."""
        for name, p in self.named_parameters():
            if ".conv2." in name or ".to_out." in name:      # the last of a ResBlock, of an Attention
                p.zero_()
        last = self.quant_conv if self.settings["quant"] else self.encoder.conv_out
        last.weight[self.z_channels:].zero_()
        last.bias[self.z_channels:].fill_(-4)                # log variance

    def moments(self, x):
        """Images [B,3,H,W] in [-1,1] -> the posterior's mean and log variance, [B,2*z_channels,H/f,W/f]."""
        return self.quant_conv(self.encoder(x))

    def encode(self, x):
        """Images [B,3,H,W] in [-1,1] -> the posterior over raw latents [B,z_channels,H/f,W/f]."""
        return Gaussian(self.moments(x))

    def decode(self, z):
        """Raw latents [B,z_channels,h,w] -> images [B,3,f*h,f*w], about in [-1,1] (not cut)."""
        return self.decoder(self.post_quant_conv(z))

    @classmethod
    def load(cls, source):
        """From a public name (sd-vae-ft-ema, sd-vae-ft-mse), a diffusers or CompVis file, a diffusers folder,
        the folder of a train_vae.py run, or a state dict; in eval mode. A VAE of ours says its sizes in
        reals.json; a public one's are read from its tensors, the number of norm groups from config.json.
        Raises UserError naming the file and the first key that does not fit."""
        folder, file = (None, source) if isinstance(source, dict) else find_vae(source)
        name = "the given state dict" if isinstance(file, dict) else str(file)
        state, info, config = diffusers_names(read(file)), {}, {}
        if folder is not None:
            info, config = (read_json(folder / n, {}) for n in ("reals.json", "config.json"))
            if not info and (folder / "align.safetensors").is_file():
                raise UserError(f"{folder}: reals.json is missing, which train_vae.py wrote beside this VAE")
        model = build(cls, info.get("vae") or vae_sizes(state, name, config), state, name)
        if not torch.cuda.is_available():          # on a CPU 1.15 times as fast, decoding 1.08
            model = model.to(memory_format=torch.channels_last)
        model.folder, model.info, model.config = folder, info, config
        return model

    def save(self, folder, align=None, info=None):
        """Writes a folder that diffusers.AutoencoderKL.from_pretrained reads (config.json and safetensors);
        beside it the two MLPs, where they are given, and reals.json: both networks' settings, and `info`."""
        folder, s, levels = Path(folder), self.settings, len(self.settings["mult"])
        write_safetensors(self.state_dict(), folder / "diffusion_pytorch_model.safetensors")
        config = {"_class_name": "AutoencoderKL", "_diffusers_version": "0.30.0", "sample_size": 256}
        config |= {**self.config, "scaling_factor": self.factor, "shift_factor": self.shift or None}
        config |= {"in_channels": 3, "out_channels": 3, "latent_channels": s["z_channels"], "act_fn": "silu"}
        config |= {"block_out_channels": [round(s["ch"] * m) for m in s["mult"]]}
        config |= {"layers_per_block": s["blocks"], "norm_num_groups": self.groups}
        config |= {"use_quant_conv": s["quant"], "use_post_quant_conv": s["post_quant"]}
        config["down_block_types"] = ["DownEncoderBlock2D"] * levels
        config["up_block_types"] = ["UpDecoderBlock2D"] * levels
        save(config, folder / "config.json")
        if align is not None:
            write_safetensors(align.state_dict(), folder / "align.safetensors")
        save({"vae": s, "align": align and align.settings, **(info or {})}, folder / "reals.json")


# ----------------------------------------------------------------------------- alignment heads and normaliser


class Align(nn.Module):
    """The alignment MLPs (Eq. 1): every latent vector to a patch feature, their mean to a class feature.
    layers counts Linears (Table 7: 1, 2, 4), with GELU between; hidden defaults to dim; features: both, or
    only the patch or the cls MLP (Table 5)."""

    def __init__(self, z_channels, dim, layers=2, hidden=None, features="both"):
        super().__init__()
        self.settings, self.dim = arguments(locals()), dim
        widths = [z_channels] + [hidden or dim] * (layers - 1) + [dim]
        patch, cls = self.mlp(widths), self.mlp(widths)               # one seed, one start, whatever is kept
        self.patch = None if features == "cls" else patch
        self.cls = None if features == "patch" else cls

    @staticmethod
    def mlp(widths):
        parts = []
        for a, b in zip(widths, widths[1:]):
            parts += [nn.Linear(a, b), nn.GELU()]
        return nn.Sequential(*parts[:-1])

    def forward(self, z):
        """Raw latents [B,C,h,w] -> patch features [B,hw,D], class features [B,D]; None without the MLP."""
        tokens = z.flatten(2).transpose(1, 2)                                # [B, hw, C]
        patch = None if self.patch is None else self.patch(tokens)           # Eq. 1: [B, hw, D], then [B, D]
        return patch, None if self.cls is None else self.cls(tokens.mean(1))

    @classmethod
    def load(cls, source):
        """The MLPs in a VAE's folder, in eval mode; UserError where there are none, or none for patches."""
        path = Path(source)
        places = [path.parent] if path.is_file() else [path, path / "vae"]
        file = next((p / "align.safetensors" for p in places if (p / "align.safetensors").is_file()), None)
        if file is None:
            raise UserError(f"{source}: no align.safetensors beside this VAE (train_vae.py --train align)")
        settings = read_json(file.with_name("reals.json")).get("align") or {}
        if settings.get("features") == "cls":
            raise UserError(f"{file}: its run had --features cls, so it holds no patch MLP")
        return build(cls, settings, read(file), str(file))


class Normalizer:
    """Raw latents z <-> what the generator sees, x = scale * z + shift, 0.18215 included (Eq. 7 and 8).

    kind: "max-min" (Eq. 7: to SD-VAE's range and mean), "std" (to SD-VAE's standard deviation and mean; `std`
    asks for another one, counted after the factor), "channel" (each channel to mean 0 and `std`, 1 by
    default, as latents of 16 and more channels need), "none" (the VAE's `own` factor and shift, as its public
    generators have it: 0.18215 z for SD-VAE). stats: what statistics() returns, of raw sampled latents."""

    needs = {"max-min": "mean min max", "std": "mean std", "channel": "channel_mean channel_std", "none": ""}

    def __init__(self, kind="none", stats=None, std=None, own=(FACTOR, 0.0)):
        self.kind, self.stats, self.std, self.own = kind, stats, std, own
        for key in self.needs[kind].split():
            value = (stats or {}).get(key)
            if value is None:
                raise UserError(f"normalisation {kind} needs the latents' {key}, which the statistics lack")
            if not np.isfinite(value).all() or ("std" in key and not np.all(value)):
                raise UserError(f"the statistics say that the latents' {key} is {value}")
        if kind == "channel":
            self.scale = [(1 if std is None else std) / s for s in stats["channel_std"]]
            self.shift = [-a * m for a, m in zip(self.scale, stats["channel_mean"])]
        elif kind == "none":
            self.scale, self.shift = own[0], -own[0] * own[1]
        else:
            if kind == "std":
                ratio = (SD_VAE["std"] if std is None else std / FACTOR) / stats["std"]
            elif stats["max"] > stats["min"]:
                ratio = (SD_VAE["max"] - SD_VAE["min"]) / (stats["max"] - stats["min"])
            else:
                raise UserError(f"the statistics say: latents reach from {stats['min']} to {stats['max']}")
            self.scale = FACTOR * ratio
            self.shift = FACTOR * (SD_VAE["mean"] - ratio * stats["mean"])

    def numbers(self, z):
        """Scale and shift as z [B,C,h,w] needs them: two numbers, or two tensors [C,1,1]."""
        pair = self.scale, self.shift
        return [z.new_tensor(v).view(-1, 1, 1) if isinstance(v, list) else v for v in pair]

    def encode(self, z):
        scale, shift = self.numbers(z)
        return scale * z + shift                # Eq. 7, then the factor

    def decode(self, x):
        scale, shift = self.numbers(x)
        return (x - shift) / scale              # the factor undone, then Eq. 8

    def std_of(self, stats):
        """The standard deviation of what the generator sees, for raw latents of these statistics."""
        if self.kind != "channel":
            return self.scale * stats["std"]
        scaled = [a * s for a, s in zip(self.scale, stats["channel_std"])]
        return math.sqrt(sum(s**2 for s in scaled) / len(scaled))

    def state_dict(self):
        return {"kind": self.kind, "stats": self.stats, "std": self.std, "own": list(self.own)}

    def __str__(self):
        if self.kind == "channel":
            return "channel: each to mean 0"
        return f"{self.kind}: x = {self.scale:.5f} z {self.shift:+.5f}"


def statistics(latents, shared=True):
    """Mean, std, min, max over all elements of sampled latents, mean and std of each channel, and n, the
    number of images (Table 10). latents: an iterable of [B,C,h,w]; shared: each rank brings a part."""
    sums, low, high, channels = torch.zeros(4, dtype=torch.float64), math.inf, -math.inf, 0
    for z in latents:
        z = z.detach().double().cpu()
        sums += torch.tensor([z.shape[0], z.numel(), z.sum(), (z**2).sum()], dtype=torch.float64)
        low, high = min(low, z.min().item()), max(high, z.max().item())
        channels = channels + torch.stack([z.sum((0, 2, 3)), z.square().sum((0, 2, 3))])       # [2, C]
    own = sums, low, high, channels
    parts, lows, highs, channels = zip(*(everyone(own) if shared else [own]))
    n, count, s, ss = torch.stack(parts).sum(0).tolist()
    mean = s / count
    channel_mean, channel_square = sum(channels) / (count / len(sum(channels)[0]))
    channel_std = (channel_square - channel_mean**2).clamp_min(0).sqrt()
    std = math.sqrt(max(ss / count - mean**2, 0))
    stats = {"mean": mean, "std": std, "min": min(lows), "max": max(highs), "n": int(n)}
    return {**stats, "channel_mean": channel_mean.tolist(), "channel_std": channel_std.tolist()}


# ---------------------------------------------------------------------------------------- public weight files


STABILITY = "https://huggingface.co/stabilityai/{}/resolve/main/diffusion_pytorch_model.safetensors"
MSE_SHA = "a1d993488569e928"
PUBLIC = {  # name: (url, file in torch.hub's cache, beginning of its sha256, bytes)
    "sd-vae-ft-ema": (STABILITY.format("sd-vae-ft-ema"), "sd-vae-ft-ema.safetensors", None, None),
    "sd-vae-ft-mse": (STABILITY.format("sd-vae-ft-mse"), "sd-vae-ft-mse.safetensors", MSE_SHA, 334643276),
}


def find_vae(source):
    """(folder or None, weight file) of a VAE: a public name, a file, a folder of diffusers or of a run."""
    if str(source) in PUBLIC:
        return None, fetch(*PUBLIC[str(source)])
    path = Path(source)
    if path.is_file():
        return path.parent, path
    for folder in (path, path / "vae"):
        for ending in ("safetensors", "bin", "safetensors.index.json", "fp16.safetensors"):
            if (folder / f"diffusion_pytorch_model.{ending}").is_file():
                return folder, folder / f"diffusion_pytorch_model.{ending}"
    raise UserError(f"{source}: no VAE here, nor a public name ({', '.join(PUBLIC)}); train_vae.py makes one")


RENAMES = [   # CompVis, and diffusers' old names, to diffusers' new ones
    (r"\.(down|up)\.(\d+)\.block\.", r".\1_blocks.\2.resnets."),
    (r"\.(down|up)\.(\d+)\.(down|up)sample\.", r".\1_blocks.\2.\3samplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.attentions\.0\.norm\.", ".attentions.0.group_norm."),
    (r"\.attentions\.0\.(q|k|v|query|key|value)\.", lambda m: f".attentions.0.to_{m[1][0]}."),
    (r"\.attentions\.0\.(proj_out|proj_attn)\.", ".attentions.0.to_out.0."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
]


def diffusers_names(state):
    """Any public layout (CompVis, alone or in an LDM; diffusers, old or new) -> diffusers' new names."""
    ldm = "first_stage_model."
    state = {k.removeprefix(ldm): v for k, v in state.items() if k.startswith(ldm)} or state
    last = max((int(k.split(".")[2]) for k in state if re.match(r"decoder\.up\.\d+\.", k)), default=0)
    out = {}
    for key, value in state.items():
        if key.startswith(("loss.", "model_ema.")):
            continue
        # CompVis counts the decoder's levels from the other end
        key = re.sub(r"^decoder\.up\.(\d+)", lambda m: f"decoder.up.{last - int(m[1])}", key)
        for pattern, to in RENAMES:
            key = re.sub(pattern, to, key)
        if ".attentions.0.to_" in key and key.endswith("weight") and value.ndim == 4:
            value = value.flatten(1)  # a 1 x 1 convolution is a linear layer
        out[key] = value
    return out


def vae_sizes(state, name, config):
    """The VAE's arguments, from a public file's tensors, and from its config.json what these do not say."""
    kind = config.get("_class_name", "AutoencoderKL")
    if kind != "AutoencoderKL" or any(v.ndim == 5 for v in state.values()):
        raise UserError(f"{name}: no AutoencoderKL of images, but another kind of VAE, or of videos ({kind})")

    def width(key):
        shape, first = tuple(state[key].shape) if key in state else "missing", next(iter(state), "none")
        if len(shape) != 4 or not shape[0]:
            raise UserError(f"{name}: not a KL autoencoder: {key} is {shape} (the first tensor: {first})")
        return shape[0]

    widths, blocks = [width("encoder.down_blocks.0.resnets.0.conv1.weight")], 0
    while (key := f"encoder.down_blocks.{len(widths)}.resnets.0.conv1.weight") in state:
        widths.append(width(key))
    while f"encoder.down_blocks.0.resnets.{blocks}.conv1.weight" in state:
        blocks += 1
    mult = [w // widths[0] if w % widths[0] == 0 else w / widths[0] for w in widths]
    groups = config.get("norm_num_groups") or min(32, widths[0])
    if not isinstance(groups, int) or groups < 1 or any(w % groups for w in widths):
        raise UserError(f"{name}: widths {widths} are no multiples of config.json's {groups!r} groups")
    quant, post_quant = ("quant_conv.weight" in state, "post_quant_conv.weight" in state)
    z_channels = width("encoder.conv_out.weight") // 2
    own = {"block_out_channels": widths, "latent_channels": z_channels}
    own |= {"use_quant_conv": quant, "use_post_quant_conv": post_quant}
    for field, value in own.items():
        if config.get(field, value) != value:
            raise UserError(f"{name}: {field} is {value} by its tensors, but {config[field]} in config.json")
    factor, shift = config.get("scaling_factor") or FACTOR, config.get("shift_factor") or 0.0
    if not all(isinstance(v, (int, float)) and math.isfinite(v) for v in (factor, shift)):
        raise UserError(f"{name}: config.json's factor {factor!r} or shift {shift!r} is no number")
    sizes = dict(ch=widths[0], mult=mult, blocks=blocks, z_channels=z_channels, groups=groups)
    return sizes | dict(quant=quant, post_quant=post_quant, factor=factor, shift=shift)


# ============================================================================================================
# What every script stands on: files, images, random draws, and how a run behaves.


# ------------------------------------------------------------------------------------------------------ files


def read_json(path, default=None):
    """The object in a JSON file, or `default` in place of a missing one."""
    if default is not None and not Path(path).is_file():
        return default
    try:
        return dict(json.loads(Path(path).read_bytes()))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, TypeError):
        raise UserError(f"{path}: not a readable JSON object") from None


@contextlib.contextmanager
def atomic(path):
    """A binary file to write that appears under its name once it is whole; the old one stays until then."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)       # after an error: a full disk must not stay full


def save(obj, path):
    """torch.save, or JSON where the name ends in .json; atomic. OSError where the disk is full or refuses."""
    with atomic(path) as f:
        if str(path).endswith(".json"):
            f.write((json.dumps(obj, indent=1) + "\n").encode())
            return
        try:
            torch.save(obj, f)
        except RuntimeError as e:              # torch's writer hides what the disk said
            why = e.__context__ or e
            if not isinstance(why, OSError) and "PytorchStreamWriter" not in str(e):
                raise
            raise OSError(getattr(why, "errno", None) or errno.EIO, str(why), str(path)) from e


def fetch(url, name, sha256=None, size=None):
    """The path of a public file in torch.hub's cache; downloaded first if it is not there, by one process."""
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    if not path.is_file():
        try:
            with lock(path.parent, wait=True):
                if not path.is_file():
                    torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
        except Exception as e:
            raise UserError(f"{path}: not there, and no download ({e}): put {url} there yourself") from None
    if size is not None and path.stat().st_size != size:
        raise UserError(f"{path}: {path.stat().st_size:,} bytes, not {size:,}: delete it, it is not {url}")
    return path


def load_file(path):
    """What torch.save or safetensors wrote, tensors and plain values only: nothing is executed."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        if Path(path).suffix == ".safetensors":
            return read_safetensors(path)
        # compressed files cannot be mapped; on Windows a mapped one could not be replaced
        mapped = os.name != "nt" and zipfile.is_zipfile(path)
        mapped = mapped and not any(m.compress_type for m in zipfile.ZipFile(path).filelist)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as e:
        with open(path, "rb") as f:
            why = f"not a whole weight file (begins with {f.read(12)!r}); delete it and get it again"
        if refused := re.search(r"(?:GLOBAL|global) ([\w.]+\.[\w.]+)", str(e)):
            why = f"the Python object {refused[1]} in it is never loaded; save its state_dict alone"
        raise UserError(f"{path}: {why}") from None


def read(source):
    """The state dict in a .pth, .pt, .bin, .ckpt (or its "state_dict") or .safetensors file, in the parts
    that an .index.json names, or as given."""
    if isinstance(source, dict):
        return source
    if str(source).endswith(".index.json"):
        names = read_json(source).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise UserError(f"{source}: no weight_map, which says where each tensor lies")
        parts = sorted(set(names.values()))
        return {k: v for part in parts for k, v in read(Path(source).parent / part).items()}
    state = load_file(source)
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    tensors = {k: v for k, v in state.items() if torch.is_tensor(v)} if isinstance(state, dict) else {}
    if not tensors or not all(isinstance(k, str) for k in tensors):
        raise UserError(f"{source}: holds no state dict of tensors by name")
    return tensors


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
DTYPES |= {"BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


def read_safetensors(path):
    """safetensors: a little-endian uint64 header length, a JSON header, raw tensors. Any error means damage,
    which load_file() says: what is cut off has not the size of its shape."""
    raw = torch.from_numpy(np.memmap(path, np.uint8, "c"))                  # mapped, not read
    start, state = 8 + raw[:8].view(torch.int64).item(), {}
    if not 8 < start <= len(raw):
        raise ValueError("no header")
    for key, entry in json.loads(bytes(raw[8:start].numpy())).items():
        if key != "__metadata__":
            data = raw[start:][slice(*entry["data_offsets"])].clone()
            state[key] = data.view(DTYPES[entry["dtype"]]).view(entry["shape"])
    return state


def write_safetensors(state, path):
    """A state dict as a safetensors file, atomic."""
    header, end, names = {}, 0, {v: k for k, v in DTYPES.items()}
    state = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    for key, v in state.items():
        header[key] = {"dtype": names[v.dtype], "shape": list(v.shape), "data_offsets": [end, end + v.nbytes]}
        end += v.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic(path) as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for v in state.values():
            f.write(v.view(-1).view(torch.uint8).numpy())


def load_strict(model, state, name):
    """Gives a model copies of these weights, all or none; the error names the first key that does not fit."""
    try:
        model.load_state_dict({k: v.clone() for k, v in state.items()}, assign=True)
    except RuntimeError as e:
        raise UserError(f"{name}: {str(e).splitlines()[1].strip()[:200]}") from None
    return model.float().eval()


def build(cls, settings, state, name):
    """cls(**settings) with these weights, in eval mode. Nothing takes memory before all is known to fit."""
    try:
        with torch.device("meta"):
            model = cls(**settings)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as e:
        raise UserError(f"{name}: its settings make no {cls.__name__}: {e}") from e
    return load_strict(model, state, name)


def fingerprint(model, parts=""):
    """sha256 of names, shapes and float32 bytes of all weights, or of those whose names begin with one of
    these parts, and of a VAE's norm groups: one network, one value, whatever its file."""
    h = hashlib.sha256(f"{model.groups} groups".encode() if isinstance(model, VAE) else b"")
    for k, v in sorted((k, v) for k, v in model.state_dict().items() if k.startswith(parts)):
        h.update(f"{k}{tuple(v.shape)}".encode())
        h.update(v.detach().float().cpu().contiguous().numpy())
    return h.hexdigest()


# ------------------------------------------------------------------------------------------- images and draws


def center_crop(image, size):
    """A PIL image -> its central size x size square, as ADM does it: halved with a box filter while it is at
    least twice as large, then bicubic to the short side, then cut (Dhariwal & Nichol 2021)."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


class DiskError(Exception):
    """A file that is there and cannot be read, as on a stale network disk: no reason to skip a picture."""


DISK = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN}
Image.init()
PICTURES = Image.OPEN.keys() - {"BUFR", "GRIB", "HDF5", "MPEG", "WMF", "EPS"}     # formats that pillow reads
STRANGE = (".heic", ".heif", ".avif", ".jxl", ".svg", ".dng", ".cr2", ".nef", ".arw")     # maybe not these


class Images(Dataset):
    """A folder of images: [i] -> (uint8 [3,size,size], label). One subfolder per class, in sorted order; or a
    flat folder with labels.csv in it, lines PICTURE,CLASS (as Kaggle's LOC_val_solution.csv: without the
    file's ending, CLASS one word); without, every label is -1 and .classes is empty. size None keeps each
    image as it is. Pixels are read as stored (no EXIF rotation). Another source of files (an archive): find,
    open and bytes."""

    kinds = tuple(ending for ending, kind in Image.registered_extensions().items() if kind in PICTURES)

    def __init__(self, root, size):
        self.root, self.size, self.named = Path(root), size, set()
        files = sorted(p for p in self.find() if p.rsplit("/", 1)[-1][0] != ".")
        self.paths = [p for p in files if p.lower().endswith(self.kinds)]
        strange = [p for p in files if p.lower().endswith(STRANGE) and not p.lower().endswith(self.kinds)]
        if strange:
            print0(f"{root}: {len(strange):,} pictures of a kind that pillow does not read, as {strange[0]}")
        if not self.paths:
            raise UserError(f"{root}: no images here, for --data or --val; tests/demo.py needs none")
        names, table = [p.split("/")[0] if "/" in p else None for p in self.paths], self.root / "labels.csv"
        if not any(names) and table.is_file():
            text = table.read_text("utf-8-sig", "replace")
            classes = dict(re.findall(r"^([^,\s]+)[, \t]+([^,\s]+)", text, re.MULTILINE))
            names = [classes.get(p) or classes.get(p.rsplit(".", 1)[0]) for p in self.paths]
            if None in names:
                raise UserError(f"{table}: no line PICTURE,CLASS of {self.paths[names.index(None)]}")
        self.stray = [p for p, name in zip(self.paths, names) if name is None]
        self.classes = [] if self.stray else sorted(set(names))
        number = {c: i for i, c in enumerate(self.classes)}
        self.labels = np.array([number.get(name, -1) for name in names])

    def find(self, there="", above=()):
        """The paths of all files, relative to the root; each real folder once on a path, no hidden one.
        there: the folder to begin in; above: the real folders that lead to it."""
        real = os.path.realpath(self.root / there)
        if not any(Path(one).is_relative_to(real) for one in above):
            _, folders, files = next(os.walk(self.root / there), ("", [], []))      # nothing: no such folder
            yield from (there + name for name in files)
            for name in (d for d in folders if d[0] != "."):
                yield from self.find(f"{there}{name}/", (*above, real))

    def open(self, path):
        """The file under one of these paths, for reading."""
        if not stat.S_ISREG(os.stat(self.root / path).st_mode):         # a pipe would wait
            raise FileNotFoundError(f"no regular file: {path}")
        return open(self.root / path, "rb")

    def read(self, path, size=-1, tries=3):
        """What is in it, or its first bytes. A disk's own error is given time to pass."""
        for k in range(tries):
            try:
                with self.open(path) as f:
                    return f.read(size)
            except OSError as e:
                if e.errno not in DISK:
                    raise UserError(f"{self.root / path}: not a readable image ({e})") from None
                if k == tries - 1:
                    raise DiskError(f"{self.root / path}: {e}") from None
                time.sleep(2**k)

    def bytes(self, path):
        """Its size."""
        return (self.root / path).stat().st_size if (self.root / path).exists() else -1      # -1: a dead link

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        path, data = self.root / self.paths[i], self.read(self.paths[i])
        try:                                 # whatever pillow stumbles over: nothing of ours in here
            image = Image.open(io.BytesIO(data))
            image.load()
            kind, mode, (w, h) = image.format, image.mode, image.size
            image = image if mode[0] in "IF" else image.convert("RGB")
        except Exception as e:
            raise UserError(f"{path}: not a readable image ({e})") from None
        if mode == "F" or (mode == "I" and kind != "PNG"):
            raise UserError(f"{path}: not a readable image (of mode {mode}, its range unknown)")
        if max(w, h) > 100 * min(w, h):
            raise UserError(f"{path}: not a readable image ({w} x {h} pixels)")
        if mode[0] == "I":                   # 16-bit gray: pillow's own conversion would clip it to white
            gray = (np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)
            image = Image.fromarray(gray).convert("RGB")
        image = image if self.size is None else center_crop(image, self.size)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), int(self.labels[i])

    def first_readable(self, i):
        """Item i, or the first one after it that can be read; the others are named, once a process."""
        for k in (k % len(self) for k in range(i, i + 100)):
            try:
                return self[k]
            except UserError as e:
                if k not in self.named:
                    tqdm.write(f"{e}; the image after it takes its place")
                self.named.add(k)
        raise UserError(f"{self.root}: 100 files in a row are not readable images, from {self.paths[i]} on")

    @functools.cached_property
    def fingerprint(self):
        """sha256 of the sorted relative paths and byte sizes, of labels.csv's classes, and of the first
        16 KiB of 256 of the files, as they are at the first call."""
        h = hashlib.sha256()
        for p, label in zip(self.paths, self.labels):
            h.update(os.fsencode(f"{p}\0{self.bytes(p)}\n"))
            h.update(self.classes[label].encode() if label >= 0 and "/" not in p else b"")
        for k in range(min(256, len(self))):
            try:
                h.update(self.read(self.paths[k * len(self) // min(256, len(self))], 2**14))
            except UserError:
                h.update(b"not read")
        return h.hexdigest()


PURPOSES = ["order", "flip", "noise", "sample", "step", "augment", "init", "subset", "label"]


def rng(seed, purpose, *key):
    """NumPy's Generator for a purpose and key: every draw of the project is a function of these alone. Any
    word may be a purpose; those in the list have their number there."""
    number = PURPOSES.index(purpose) if purpose in PURPOSES else zlib.crc32(purpose.encode())
    words = [w for k in (seed, number, *key) for w in (int(k) & 0xFFFFFFFF, int(k) >> 32)]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


def seed_torch(seed, purpose, *key):
    """torch's own generator for what comes next (initialisation, dropout, augmentations), keyed as in rng."""
    torch.manual_seed(int(rng(seed, purpose, *key).integers(2**31)))


def normal(shape, seed, purpose, *key):
    """Standard normal float32 tensor of a shape, keyed as in rng."""
    return torch.from_numpy(rng(seed, purpose, *key).standard_normal(shape, dtype=np.float32))


@functools.lru_cache(maxsize=2)
def permutation(seed, epoch, n):
    return rng(seed, "order", epoch).permutation(n)


def shuffled_index(seed, n, k):
    """The k-th index of endless epochs over n images, each epoch in an order drawn from (seed, epoch)."""
    return int(permutation(seed, k // n, n)[k % n])


def to_uint8(x):
    """[-1,1] -> uint8, rounding half up: 127.5 x + 128, cut to 0..255 (DiT's quantisation)."""
    return (127.5 * x.float() + 128).clamp(0, 255).to(torch.uint8)


def from_uint8(x):
    """uint8 0..255 -> float32 in [-1,1]."""
    return x.float() / 127.5 - 1


def grid(images, columns=8, pad=2, names=None):
    """uint8 [N,3,H,W] -> one PIL picture, row by row, on white; names: a line of text under each image."""
    n, _, h, w = images.shape
    step = pad + h + (12 if names else 0)
    sheet = Image.new("RGB", (min(n, columns) * (w + pad) + pad, -(-n // columns) * step + pad), "white")
    pen = ImageDraw.Draw(sheet)
    for i, image in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        x, y = pad + i % columns * (w + pad), pad + i // columns * step
        sheet.paste(Image.fromarray(image), (x, y))
        text = names[i] if names else ""
        while pen.textlength(text) > w:
            text = text[:-1]
        pen.text((x, y + h), text, fill="black")
    return sheet


def save_picture(images, path, columns=8, names=None):
    """grid() as a PNG, atomic."""
    with atomic(path) as f:
        grid(images, columns, names=names).save(f, "PNG")


# ------------------------------------------------------------------------------------------------------ a run


MAY_DIFFER = "workers data val vae init cache stats dino vgg lpips".split()   # what lies there is hashed


def dashed(name):
    """The flag whose value is under this name."""
    return "--" + name.replace("_", "-")


def start(args=None):
    """Joins the process group that torchrun describes, if there is one -> this process's device. UserError
    where its processes were given different flags."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device(f"cuda:{local}" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(f"--nproc_per_node {local + 1} or more, but {torch.cuda.device_count()} GPU(s)")
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        gpu, wait = device.type == "cuda", datetime.timedelta(hours=12)   # while one downloads or writes
        dist.init_process_group("nccl" if gpu else "gloo", timeout=wait, device_id=device if gpu else None)
    flags = vars(args) if args is not None else {}
    same_for_all({dashed(k): v for k, v in flags.items() if k not in MAY_DIFFER})
    return device


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    if world() > 1:
        dist.barrier()


def total(x):
    """The sum of every rank's tensor, all of one shape, on all ranks."""
    if world() == 1:
        return x
    y = x.to("cuda" if dist.get_backend() == "nccl" else "cpu", copy=True)
    dist.all_reduce(y)
    return y.to(x.device)


def everyone(obj):
    """A list of every rank's object, on all ranks."""
    parts = [obj] * world()
    if world() > 1:
        dist.all_gather_object(parts, obj)
    return parts


def same_for_all(values):
    """UserError, on all ranks, where one of them has another value, {name: value}, than the first."""
    first, *others = everyone(values)
    for name, value in first.items():
        if different := [other[name] for other in others if other[name] != value]:
            raise UserError(f"{name} is {value} on the first process, {different[0]} on another")


def print0(*text):
    """Prints from the first process alone, above a progress bar."""
    if rank() == 0:
        tqdm.write(" ".join(map(str, text)))


def progress(total, desc, unit="img", done=0):
    """A progress bar with throughput and time left, of the first process."""
    often = dict(mininterval=0.2 if sys.stderr.isatty() else 20, smoothing=0.05, dynamic_ncols=True)
    return tqdm(total=total, desc=desc, unit=unit, initial=done, disable=rank() > 0, **often)


def memory():
    """Peak memory in GiB: of the GPU, or of this process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 2**30 if sys.platform == "darwin" else 2**20          # of bytes there, of KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit if resource else 0.0


@contextlib.contextmanager
def lock(folder, flag="--out", wait=False):
    """Makes a folder and holds it for the run whose first process this is, until the block ends. A folder
    that another run holds is refused, or waited for."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        f = open(Path(folder, ".lock"), "w")
    except OSError as e:
        raise UserError(f"{folder}: no folder to write to ({e}); {flag} names another one") from None
    with f:
        try:
            if fcntl is not None and (rank() == 0 or wait):
                fcntl.flock(f, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                os.register_at_fork(after_in_child=f.close)     # a loader would hold it for a killed run
        except BlockingIOError:
            raise UserError(f"{folder}: another run is writing here; {flag} names another folder") from None
        except OSError as e:
            print0(f"warning: {folder} cannot be locked ({e}); no second run may write here")
        yield


class Stop:
    """`with Stop(save, done) as stop`: in the block, SIGINT, SIGTERM and SIGHUP only ask, so that the loop
    can save and leave. A second SIGINT ends the program at once, a disk's error of the first process after
    save(done, alone=True); done: the number of steps so far."""

    signals = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    signal = skipped = 0

    def __init__(self, save=None, done=0):
        self.save, self.done = save, done

    def __enter__(self):
        heard = [n for n in self.signals if signal.getsignal(n) is not signal.SIG_IGN]      # as nohup does
        self.before = {number: signal.signal(number, self.ask) for number in heard}
        return self

    def ask(self, number, frame):
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def restore(self):
        """From now on the signals end the program again."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __exit__(self, kind, error, trace):
        if self.save and isinstance(error, DiskError):
            self.save(self.done, alone=True)
        self.restore()

    def look(self, finite):
        """Of all ranks: whether `finite`, a 0-d bool tensor, holds on each; and whether this step is the
        last: after a signal to one of them, or ten steps in a row that were not finite. Both in one look,
        because the host waits for the device meanwhile."""
        asked = torch.full((), bool(self.signal), device=finite.device)
        bad, asked = total(torch.stack([~finite, asked]).float()).tolist()
        self.asked, self.skipped = bool(asked), self.skipped + 1 if bad else 0
        return not bad, self.asked or self.skipped == 10

    def heed(self, done):
        """After a step and its save: warns where it was skipped; at the tenth in a row UserError; after a
        signal exits, as a process ended by it does."""
        self.done = done
        if self.skipped:
            text = f"step {done - 1}: the gradient is not finite; the step was skipped; --clip 1 may help, or"
            text += " --dtype fp32 in the place of bf16 (so it is where the loss alone is not finite)"
            if self.skipped == 10:
                raise UserError(f"{text} (ten steps in a row)")
            print0(f"warning: {text}")
        if self.asked:
            print0(f"stopped after step {done}; the same command goes on from there")
            sys.exit(128 + (self.signal or signal.SIGTERM))


@contextlib.contextmanager
def survive(path, last=False):
    """What a disk refuses is a warning, and the run goes on; but at its last save."""
    try:
        yield
    except OSError as e:
        if last:
            raise
        print0(f"warning: {path} could not be written, the run goes on: {e}")


def made_by():
    """What makes a result, {what: value}: the command, the code's commit or None, versions, device."""
    commit, ask = None, "git describe --always --dirty --exclude=* --abbrev=40".split()
    with contextlib.suppress(OSError, subprocess.SubprocessError):          # there may be no git
        how = dict(cwd=Path(__file__).resolve().parent, stderr=subprocess.DEVNULL, text=True, timeout=10)
        commit = subprocess.check_output(ask, **how).strip()
    about = {"command": shlex.join(["python", *sys.argv]), "commit": commit, "processes": world()}
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {**about, "versions": versions, "device": device}


def try_disk(folder, size):
    """Under torchrun, says how long a checkpoint of so many bytes takes, if it may be killed meanwhile."""
    if rank() > 0 or world() == 1:
        return
    probe, begun = Path(folder, "probe"), time.time()
    with survive(probe), atomic(probe) as f:
        f.write(bytes(2**26))
    probe.unlink(missing_ok=True)
    seconds = (time.time() - begun) * size / 2**26
    if seconds > 15:
        print0(f"note: a checkpoint takes some {seconds:.0f} s to write here, and torchrun kills 30 s after "
               "SIGTERM; if it knows --shutdown-timeout, give more")


class Log:
    """Means over the steps and ranks between two lines; each line is printed, and appended to log.jsonl. Each
    start of a run has a line there, too: step, start (its time) and made_by(). checkpoint, rest: bytes."""

    def __init__(self, args, step, checkpoint, rest):
        check_space(args.out, 2 * checkpoint + rest)
        try_disk(args.out, checkpoint)
        self.path, self.batch, self.steps = Path(args.out, "log.jsonl"), args.batch, args.steps
        self.restart(step)
        self.due = self.since + 60              # when to say how long it will take
        if rank() == 0:                         # lines after the checkpoint go: their steps are made again
            text = self.path.read_text(errors="replace") if self.path.is_file() else ""
            lines = []
            for line in text.splitlines():
                with contextlib.suppress(ValueError, TypeError, KeyError):    # a kill or a disk has spoilt it
                    lines += [line] if json.loads(line)["step"] <= step else []
            lines += [json.dumps({"step": step, "start": time.strftime("%Y-%m-%d %H:%M:%S %z"), **made_by()})]
            with survive(self.path), atomic(self.path) as f:
                f.write("".join(f"{line}\n" for line in lines).encode())

    def restart(self, step):
        self.sums, self.last, self.since = {}, step, time.time()

    def add(self, values, parts=1):
        """{name: number or 0-d tensor} of a step or one of its parts; a step may lack some."""
        for k, v in values.items():
            v = torch.as_tensor(v).detach().double()
            if v.ndim:
                raise ValueError(f"{k} has the shape {list(v.shape)}; the log and the loss take one number")
            self.sums[k] = self.sums.get(k, 0) + torch.stack([v, torch.ones_like(v)]) / parts

    def rate(self, step):
        """Images a second since the last line."""
        return (step - self.last) * self.batch / (time.time() - self.since)

    def line(self, step, more):
        """Prints and keeps step, means, images/s, memory and more, {name: value}; then begins anew."""
        sums, counts = total(torch.stack([pair.cpu() for pair in self.sums.values()])).unbind(1)
        values = {"step": step, **dict(zip(self.sums, (sums / counts).tolist()))}
        values |= {"img/s": self.rate(step), "GiB": memory(), **more}
        print0("  ".join(f"{k} {self.short(v)}" for k, v in values.items()))
        if rank() == 0:
            with survive(self.path), open(self.path, "a") as f:
                f.write(json.dumps(values) + "\n")
        if self.since < self.due < time.time() and step < self.steps:
            left = (self.steps - step) * self.batch / values["img/s"]
            print0(f"about {datetime.timedelta(seconds=round(left))} to go")
        self.restart(step)

    def short(self, v):
        if isinstance(v, list):
            return " ".join(map(self.short, v))
        return "-" if v is None else f"{v:,}" if isinstance(v, int) else f"{v:.4g}"


def run_script(main):
    """Runs a script's main(). What its user can mend ends in one line, from the first process of a machine,
    and status 1; a bug, of any process, in its traceback."""
    script, status = Path(sys.argv[0]).name, 0
    for stream in (sys.stdout, sys.stderr):         # a console that cannot show a name shows its bytes
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except KeyboardInterrupt:
        print(f"{script}: stopped; what is finished is kept", file=sys.stderr)
        status = 128 + signal.SIGINT
    except Exception as e:
        line, status = for_the_user(e), 1
        if line is None:
            traceback.print_exc()
        else:  # torchrun ends all processes when the first one leaves: let that one speak
            time.sleep(2 if int(os.environ.get("LOCAL_RANK", 0)) else 0)
            print(f"{script}: {line}", file=sys.stderr, flush=True)
    finally:                   # a loader's workers ignore gentler signals, and would be waited for
        workers = multiprocessing.active_children()
        if workers and hasattr(signal, "SIGCHLD"):          # which Windows has not
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)   # torch would take their end for an error
        for worker in workers:
            worker.kill()
    sys.stdout.flush()
    if dist.is_initialized():
        if status:
            os._exit(status)        # not through the process group's end, which would wait for the others
        dist.destroy_process_group()
    sys.exit(status)


def for_the_user(error):
    """The line to say of a UserError (three files have their own), of full memory, of a disk; else None."""
    kinds, text = {kind.__name__ for kind in type(error).__mro__}, str(error)
    if kinds & {"OutOfMemoryError", "MemoryError"} or "can't allocate memory" in text:
        why = text.split("\n")[0]
        return f"out of memory; hold fewer images at once (--micro, in sample.py --batch): {why}"
    if "killed by signal: Killed" in text:
        return f"a loader was killed, as when memory runs out; --workers asks for fewer: {text}"
    if re.search(r"(?i)no working c.. compiler|failed to find c compiler|InvalidCxxCompiler", text):
        return "torch.compile found no C compiler: install one, or give --no-compile"
    disk = {errno.ENOSPC: "is full", errno.EDQUOT: "is full", errno.EIO: "refuses", errno.EFBIG: "refuses"}
    if getattr(error, "errno", None) in disk:
        return f"the disk {disk[error.errno]}: {error}"
    if kinds & {"UserError", "DiskError"}:      # of a loader's worker the traceback, whose last line says it
        return re.sub(r"^(\w+\.)?(User|Disk)Error: ", "", text.strip().splitlines()[-1])
    return None


# ------------------------------------------------------------------------------- what both trainers must have


def number(low, high=math.inf, kind=float):
    """argparse's type of a number from low to high, never nan or infinite."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or math.isinf(value):
            bounds = f"{low:g} at least" if high == math.inf else f"from {low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"{text}: {bounds}")
        return value

    parse.__name__ = kind.__name__              # argparse's word for what is no number at all
    return parse


positive, count = number(1, kind=int), number(0, kind=int)


def add_run_flags(p, out, batch, lr, schedule, weight_decay):
    """The flags that both trainers share."""
    gpu = torch.cuda.is_available()
    p.add_argument("--out", default=out, help="folder of the run; the same command goes on where it stopped")
    p.add_argument("--batch", type=positive, default=batch, help="global batch, of all processes together")
    p.add_argument("--micro", type=positive, help="images a process holds at once; for lack of memory")
    p.add_argument("--lr", type=number(0), default=lr)
    p.add_argument("--warmup", type=count, default=0, help="steps of linear warm-up")
    p.add_argument("--clip", type=number(0), default=0, help="largest gradient norm; 0: any (--repa: 1)")
    p.add_argument("--betas", type=number(0, 1 - 1e-9), nargs=2, default=[0.9, 0.999])
    p.add_argument("--schedule", choices=["cosine", "constant"], default=schedule)
    p.add_argument("--weight-decay", type=number(0), default=weight_decay)
    p.add_argument("--dtype", choices=["bf16", "fp32", "fp64"], default=default_dtype(), help="by the device")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=gpu, help="default: on a GPU")
    p.add_argument("--workers", type=count, default=8 if gpu else 1, help="loader processes, each process")
    p.add_argument("--seed", type=count, default=0)
    p.add_argument("--log-every", type=positive, default=100, help="steps between log lines")
    p.add_argument("--save-every", type=positive, default=2000, help="steps between checkpoints")
    p.add_argument("--picture-every", type=positive, default=2000, help="steps between pictures")


def default_dtype():
    """bf16 on a GPU that has it (and does not emulate it), else fp32."""
    return "bf16" if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8 else "fp32"


def accumulation_steps(args):
    """Completes --micro -> how many micro-batches of it this process needs for a step."""
    args.micro = args.micro or max(args.batch // world(), 1)
    if args.batch % (world() * args.micro):
        each = f"{world()} process(es) x --micro {args.micro}"
        raise UserError(f"--batch {args.batch} is not a multiple of {each}")
    return args.batch // (world() * args.micro)


MAY_CHANGE_ON_RESUME = "micro workers keep compile checkpointing log_every save_every picture_every".split()
MAY_CHANGE_ON_RESUME += "out data val vae cache stats dino vgg lpips".split()     # what lies there is hashed
MAY_CHANGE_ON_RESUME += "clip dtype".split()                      # they help where a gradient was not finite


def plain(args):
    """The flags as JSON knows them: what a checkpoint keeps, and compares."""
    return json.loads(json.dumps(vars(args), default=str))


def resume(args, flags, hashes, parts):
    """Gives each of the parts what OUT/ckpt.pt holds of it, and returns the rest, {"step": 0} where there is
    none; all ranks must see the same one. UserError where flags, hashes, parts or shapes are others. A flag
    that it does not know must have its default, which is said: flags(these) leaves these flags out."""
    path, load = whole_checkpoint(args), {name: part.load_state_dict for name, part in parts.items()}
    ckpt = load_file(path) if path.is_file() else None
    missing = {"args", "step", *parts} - set(ckpt if isinstance(ckpt, dict) else ())
    if ckpt is not None and missing:
        lacks = f"holds no {', '.join(sorted(missing))}: it is a milestone, or of a run that had none"
        raise UserError(f"{path} {lacks}; another --out starts anew")
    same_for_all({f"the step of {path}, which all machines must share,": ckpt and ckpt["step"]})
    same_for_all({f"the hash of {what}": value for what, value in hashes.items()})
    if ckpt is None:
        return {"step": 0}
    now, old = plain(args), ckpt["args"]
    old = plain(flags(now.keys() - old.keys())) | old                       # flags() are all flags
    longer = ["steps", "epochs"] if args.schedule == "constant" else []     # a constant rate may go on
    for key, value in now.items():
        if old[key] != value and key not in MAY_CHANGE_ON_RESUME + longer:
            was = f"{dashed(key)} {old[key]}"
            raise UserError(f"{path} was made with {was}, not {value}; another --out starts anew")
    for what, value in hashes.items():
        if ckpt.get(what, value) != value:
            raise UserError(f"{path} was made with another {what}; another --out starts anew")
    told = [f", {dashed(k)} {now[k]} in place of {old[k]}" for k in ("clip", "dtype") if now[k] != old[k]]
    told += [f", without {dashed(k)} {v}, now unknown" for k, v in old.items() if k not in now]
    told += [f", with {dashed(k)} {v}, then unknown" for k, v in now.items() if k not in ckpt["args"]]
    print0(f"{path}: going on from step {ckpt['step']}" + "".join(told))
    for name in parts:
        try:
            load[name](ckpt.pop(name))
        except (RuntimeError, ValueError) as e:                             # torch's, of another shape
            why = " ".join(str(e).split())[:300]
            raise UserError(f"{path}: its {name} does not fit ({why}); another --out starts anew") from e
    return ckpt


def whole_checkpoint(args):
    """OUT/ckpt.pt; where the first process finds it damaged, the one before it takes its place."""
    path, before = (Path(args.out, name) for name in ("ckpt.pt", "ckpt-before.pt"))
    damaged = rank() == 0 and path.is_file()
    if damaged:
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip() is not None      # reads it all: torch checks no sums
        except OSError:
            raise
        except Exception:                                    # damage shows in many ways
            damaged = True
    if damaged and before.is_file():
        os.replace(before, path)
        print0(f"warning: {path} is damaged; the one before it takes its place")
        damaged = False
    if everyone(damaged)[0]:
        raise UserError(f"{path} is damaged, and there is none before it; another --out starts anew")
    return path


def save_checkpoint(args, parts, more, step, last=True, alone=False):
    """OUT/ckpt.pt, from which the same command goes on: each part's state_dict() by its name, and more.
    The one before stays as ckpt-before.pt. If it is not the last, a full disk is only a warning. alone: the
    other processes do not take part."""
    path = Path(args.out, "ckpt.pt")
    if rank() == 0:
        states = {name: part.state_dict() for name, part in parts.items()}
        with survive(path, last):
            if path.is_file():
                path.with_name("ckpt-before.pt").unlink(missing_ok=True)
                with contextlib.suppress(OSError):           # a file system without links keeps one
                    os.link(path, path.with_name("ckpt-before.pt"))
            save({"step": step, "args": plain(args), **states, **more}, path)
            load_file(path)              # what could not be read again is said now; mapped, it costs nothing
    if not alone:
        barrier()


def begin_worker(worker):
    """For a loader's worker: signals are the main process's, which saves, and then ends it."""
    for known in Stop.signals:
        signal.signal(known, signal.SIG_IGN)


def micro_batches(args, start):
    """This process's micro-batches, from step `start` on: lists of (step, place in the global batch)."""
    local, steps = args.batch // world(), range(start, args.steps)
    firsts = range(rank() * local, (rank() + 1) * local, args.micro)
    return ([(step, k) for k in range(first, first + args.micro)] for step in steps for first in firsts)


def shared_memory():
    """Bytes that loaders may use to hand their batches over; a container's default is 64 MiB."""
    return shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else math.inf


def loader(dataset, batches, args):
    """Iterates over batches of dataset[key], stacked, for these lists of keys, made in --workers processes.
    UserError where these would wait for ever, for lack of shared memory."""
    batches, free = iter(batches), shared_memory()
    if args.workers and free < 2**30 and (first := next(batches, None)) is not None:
        ahead = 2 * args.workers * int(os.environ.get("LOCAL_WORLD_SIZE", 1)) * len(first)
        need = ahead * sum(part.nbytes for part in dataset[first[0]] if torch.is_tensor(part))
        if need > free:
            have = f"{need / 2**20:.0f} MiB in /dev/shm, which has {free / 2**20:.0f}"
            raise UserError(f"--workers {args.workers} need {have}: fewer, or docker run --shm-size=1g")
        batches = itertools.chain([first], batches)
    how = dict(num_workers=args.workers, worker_init_fn=begin_worker, pin_memory=torch.cuda.is_available())
    return iter(DataLoader(dataset, batch_sampler=batches, generator=torch.Generator(), **how))


def same_manifest(folder, manifest, flag):
    """Whether this folder was begun with the same manifest, {what: value}; UserError if with another."""
    there, manifest = read_json(Path(folder, "manifest.json"), {}), json.loads(json.dumps(manifest))
    for key in manifest if there else ():
        if there.get(key) != manifest[key]:
            old, new = (str(v)[:40] for v in (there.get(key), manifest[key]))
            raise UserError(f"{folder} was made with {key} {old}, not {new}: {flag} names another folder")
    return bool(there)


def missing_ranges(done, size, ranks=None):
    """The gaps in what is done (bools), as ranges of at most `size`, which the first rank sees: this rank's
    share, shared by all or by the first so many. All ask together, before any of them fills a gap."""
    done = everyone(np.asarray(done, np.int8))[0]
    edges = np.flatnonzero(np.diff(np.concatenate([[1], done, [1]])))  # where gaps begin and end, in turn
    gaps = zip(edges[::2].tolist(), edges[1::2].tolist())
    ranges = [range(a, min(a + size, end)) for begin, end in gaps for a in range(begin, end, size)]
    return ranges[rank()::ranks or world()] if rank() < (ranks or world()) else []


def check_space(folder, size, flag=None):
    """Says how many bytes a folder is going to hold; with a flag, UserError where its disk lacks them."""
    size, free = size / 2**30, shutil.disk_usage(folder).free / 2**30
    print0(f"{folder}: will hold {size:.2f} GiB ({free:.0f} GiB free)")
    if flag and size > free:
        raise UserError(f"{folder}: {size:.1f} GiB are needed, {free:.1f} free: {flag} names another place")
