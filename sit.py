"""The SiT / DiT transformer with its public weights, and the two processes that it serves: Flow (Ma et al.
2024) with its ODE and SDE samplers, and Diffusion (Peebles & Xie 2023) with DDPM.

    net, process = SiT(**size("B/2")), Flow()
    loss = process.loss(net(process.noised(x, noise, t), t, y), x, noise, t)              # [B]
    x = process.sample(Guided(SiT.load("SiT-XL/2"), 1.8, (0, 0.75)), noise, y)            # [B,4,32,32]

Latents are [B, C, H, W]. A flow's time runs from 0 (noise) to 1 (data), the diffusion's from 999 (noise) to 0
(data). The files of a SiT and of a DiT have the same keys and shapes, so a model carries its process, "sit"
or "dit", as a field, and each process refuses to sample from the other's model. The null label is `classes`;
the trainer drops labels.
"""
import argparse
import json
import math
import re
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

SIZES = {  # the patch follows a slash, as in "XL/2"
    "T": dict(depth=4, dim=128, heads=4),
    "S": dict(depth=12, dim=384, heads=6),
    "B": dict(depth=12, dim=768, heads=12),
    "L": dict(depth=24, dim=1024, heads=16),
    "XL": dict(depth=28, dim=1152, heads=16),
}

DROPBOX = "https://www.dl.dropboxusercontent.com/scl/fi/"
META = "https://dl.fbaipublicfiles.com/DiT/models/"
SIT_URL = DROPBOX + "as9oeomcbub47de5g4be0/SiT-XL-2-256.pt?rlkey=uxzxmpicu46coq3msb17b9ofa&dl=0"
REPA_URL = DROPBOX + "cxedbs4da5ugjq5wg3zrg/last.pt?rlkey=8otgrdkno0nd89po3dpwngwcc&st=apcc645o&dl=0"
PUBLIC = {  # process, file in torch.hub's cache, URL
    "SiT-XL/2": ("sit", "SiT-XL-2-256.pt", SIT_URL),
    "DiT-XL/2": ("dit", "DiT-XL-2-256x256.pt", META + "DiT-XL-2-256x256.pt"),
    "DiT-XL/2-512": ("dit", "DiT-XL-2-512x512.pt", META + "DiT-XL-2-512x512.pt"),
    "REPA-SiT-XL/2": ("repa", "REPA-SiT-XL-2-256.pt", REPA_URL),
}


class UserError(ValueError):
    """What the user can mend: said in one line, without a traceback."""


def size(name):
    """A row of SIZES by its name, with the patch: "XL/2" -> the first arguments of SiT."""
    row, _, patch = (name if "/" in name else f"{name}/2").partition("/")
    if row not in SIZES or patch not in ("1", "2", "4", "8"):
        raise UserError(f"--model {name}: {', '.join(SIZES)} are known, with /1 /2 /4 or /8 for the patch")
    return dict(SIZES[row], patch=int(patch))


# -------------------------------------------------------------------------------------------- the transformer


def modulate(x, shift, scale):
    """adaLN: x [B, N, D] scaled and shifted by one vector [B, D] per image."""
    return x * (1 + scale[:, None]) + shift[:, None]


def frequencies(device=None):
    """w_k = 10000^(-k/128), k = 0..127, in float32 whatever the model's dtype, as in the public code. Only
    the exponential is taken in float64: the public code's, in float32, differs by machine in its last bit (at
    k = 12 and 106), and with it a DiT's output at t = 999 by some 4e-6."""
    exponent = -math.log(10000) * torch.arange(128, dtype=torch.float32, device=device) / 128
    return exponent.double().exp().float()


def position_table(size, dim):
    """Sines and cosines of column, then row, a quarter of `dim` each: [1, size*size, dim], row-major."""
    w = 10000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, col = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    col, row = col.reshape(-1, 1) * w, row.reshape(-1, 1) * w                            # [size*size, dim/4]
    return torch.cat([col.sin(), col.cos(), row.sin(), row.cos()], 1)[None].float()


class TimeEmbedder(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        args = t.float()[:, None] * frequencies(t.device)  # [B, 128], in float32: half precision blurs t
        table = torch.cat([args.cos(), args.sin()], 1)           # [B, 256]
        return self.mlp(table.to(self.mlp[0].weight.dtype))      # [B, D]


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)  # [B, heads, N, D/heads], as q, k, v
        return self.proj(x.transpose(1, 2).reshape(B, N, D))                     # [B, N, D]


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        fc1, fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.mlp = nn.Sequential(OrderedDict(fc1=fc1, gelu=nn.GELU("tanh"), fc2=fc2))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, 1)     # [B, D] each
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))             # [B, N, D]
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))           # [B, N, D]


class FinalLayer(nn.Module):
    def __init__(self, dim, out):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, 1)
        return self.linear(modulate(self.norm_final(x), shift, scale))  # [B, N, p*p*C]


class SiT(nn.Module):
    """The transformer of DiT and SiT on latents [B, channels, input_size, input_size].

    out_channels: `channels` for "sit", twice that for "dit" (noise, variance). classes: 0 is unconditional.
    repa: (block, dim) or (block, dim, hidden): project the tokens after that many blocks to dim (Yu et al.
    2024). A checkpoint stores all arguments, in `settings`, and SiT(**settings) builds the network again.
    """

    def __init__(self, depth=28, dim=1152, heads=16, patch=2, input_size=32, channels=4, out_channels=None,
                 classes=1000, process="sit", repa=None):
        super().__init__()
        own = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.settings = json.loads(json.dumps(own))     # nothing that a checkpoint could not give back
        out_channels = out_channels or (2 * channels if process == "dit" else channels)
        if process not in ("sit", "dit"):
            raise UserError(f"process {process!r}: a model is sit or dit (REPA's files become a sit on load)")
        if process == "dit" and out_channels != 2 * channels:
            raise UserError(f"a dit predicts noise and variance, {2 * channels} channels, not {out_channels}")
        if input_size % patch or dim % heads:
            raise UserError(f"input {input_size}, dim {dim}: no multiples of patch {patch} and heads {heads}")
        self.patch, self.grid, self.classes, self.process = patch, input_size // patch, classes, process
        self.channels, self.out_channels = channels, out_channels
        self.info = {}                                           # what a checkpoint says beside the weights
        self.grad_checkpoint = False  # True: blocks are computed again in the backward pass

        self.pos_embed = nn.Parameter(position_table(self.grid, dim), requires_grad=False)
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(channels, dim, patch, patch)})  # the official keys
        self.t_embedder = TimeEmbedder(dim)
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(classes + 1, dim)})
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.final_layer = FinalLayer(dim, patch * patch * out_channels)
        self.repa_block = 0
        if repa:
            self.repa_block, width, hidden = (*repa, 2048)[:3]
            if not 1 <= self.repa_block <= depth:
                raise UserError(f"repa after block {self.repa_block}: the network has {depth}")
            layers = [nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU()]
            self.projectors = nn.ModuleList([nn.Sequential(*layers, nn.Linear(hidden, width))])
        self.init_weights()

    def init_weights(self):
        """DiT's: Xavier, small embeddings, zeros where a block adds to the stream: the output starts at 0."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        proj = self.x_embedder["proj"]
        nn.init.xavier_uniform_(proj.weight.view(len(proj.weight), -1))
        nn.init.zeros_(proj.bias)
        embeddings = [m for m in self.modules() if isinstance(m, nn.Embedding)]
        for m in (*embeddings, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(m.weight, std=0.02)
        modulations = [block.adaLN_modulation[1] for block in (*self.blocks, self.final_layer)]
        for m in (*modulations, self.final_layer.linear):
            nn.init.zeros_(m.weight)

    def forward(self, x, t, y, return_tokens=False):
        """x [B, C, H, W], t [B], labels y [B] -> [B, out_channels, H, W]; return_tokens adds REPA's tokens
        [B, N, dim], None without projectors."""
        tokens = None
        x = self.x_embedder["proj"](x.to(self.pos_embed.dtype))                  # [B, D, H/p, W/p]
        x = x.flatten(2).transpose(1, 2) + self.pos_embed                        # [B, N, D]
        c = self.t_embedder(t) + self.y_embedder["embedding_table"](y)           # [B, D]
        for i, block in enumerate(self.blocks):
            if self.grad_checkpoint and torch.is_grad_enabled():
                x = checkpoint(block, x, c, use_reentrant=False)
            else:
                x = block(x, c)                                                  # [B, N, D]
            if return_tokens and i + 1 == self.repa_block:
                tokens = self.projectors[0](x)                                   # [B, N, dim]
        x = self.final_layer(x, c)                                               # [B, N, p*p*C]
        x = x.view(len(x), self.grid, self.grid, self.patch, self.patch, self.out_channels)
        x = x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)              # [B, C, H, W]
        return (x, tokens) if return_tokens else x

    @classmethod
    def load(cls, source, process=None, heads=None):
        """The model in `source`, in eval mode: a name of PUBLIC, a .pt file, a folder with ckpt.pt, a dict;
        of checkpoints, the EMA. What a checkpoint of ours says beside its weights is in the model's `info`.

        process ("sit", "dit", "repa") is needed where neither name nor file says it, heads where depth and
        width are no row of SIZES. A "repa" becomes a plain "sit" (fold_repa). UserError; never loads in part.
        """
        held, name, implied = read(source)
        if all(isinstance(held.get(part), dict) for part in ("settings", "ema")):       # a checkpoint of ours
            state, settings = held["ema"], held["settings"]
            for field, asked in (("process", process), ("heads", heads)):
                agreed(name, field, settings.get(field), asked)
        else:
            process = agreed(name, "process", implied, process)
            state = public_names(held, name, process)
            settings = read_sizes(state, name, process, heads)
        try:
            with torch.device("meta"):                   # no memory before all is known to fit
                model = cls(**settings)
            own = state.get("pos_embed", model.pos_embed).dtype
            wide = torch.promote_types(own, torch.float32)                       # not half precision
            model.load_state_dict({k: v.to(wide, copy=True) for k, v in state.items()}, assign=True)
            tensors = [pair for m in model.modules() for pair in (vars(m) | m._buffers).items()]
            if empty := [k for k, v in tensors if torch.is_tensor(v) and v.is_meta]:
                raise ValueError(f"the tensor {empty[0]} is in no checkpoint; make it a persistent buffer")
        except (ArithmeticError, RuntimeError, TypeError, ValueError) as e:
            raise UserError(f"{name}: {str(e).splitlines()[:2][-1].strip()[:200]}") from e
        if process == "repa":
            model.load_state_dict(fold_repa(model.state_dict()))
        model.info = held.get("info", {})
        return model.eval()


# ----------------------------------------------------------------------------------------------- weight files


def fetch(url, file):
    """The path of a public file in torch.hub's cache; downloaded first if it is not there, by one process."""
    path = Path(torch.hub.get_dir(), "checkpoints", file)
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path.with_name(".lock"), "w") as lock:
                if fcntl is not None:
                    fcntl.flock(lock, fcntl.LOCK_EX)
                if not path.is_file():
                    torch.hub.download_url_to_file(url, str(path))  # to a temporary file, then moved
        except Exception as e:
            raise UserError(f"{path} is neither there nor to be had from {url} ({e}): put it there") from None
    return path


def read(source):
    """What a source holds, its name for messages, the process a public name implies. Nothing is executed."""
    if isinstance(source, dict):
        return source, "state dict", None
    path, implied = Path(source), None
    if str(source) in PUBLIC:
        implied, file, url = PUBLIC[str(source)]
        path = fetch(url, file)
    path = path / "ckpt.pt" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path}: no such file, and no public name ({', '.join(PUBLIC)})")
    try:                                     # compressed files cannot be mapped
        plain = zipfile.is_zipfile(path) and not any(m.compress_type for m in zipfile.ZipFile(path).filelist)
        with torch.serialization.safe_globals([argparse.Namespace]):  # in the official training checkpoints
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=plain)
    except Exception as e:                                                       # damage shows in many ways
        with open(path, "rb") as f:
            why = f"not a whole PyTorch weight file (begins with {f.read(12)}); delete it and get it again"
        if refused := re.search(r"GLOBAL (\S*\w)", str(e)):
            why = f"holds {refused[1]}, never loaded; save the tensors: torch.save(model.state_dict(), FILE)"
        raise UserError(f"{path}: {why}") from None
    return held if isinstance(held, dict) else {}, str(path), implied


def agreed(name, field, own, asked):
    """What a file says of a field, else what the caller asks for; UserError where they differ."""
    if own and asked and own != asked:
        raise UserError(f"{name}: {field} {asked} was asked for, but its own is {own}")
    return own or asked


def depth_of(state):
    """The number of blocks, without REPA's decoder_blocks."""
    return sum(bool(re.fullmatch(r"blocks\.\d+\.attn\.qkv\.weight", key)) for key in state)


def public_names(held, name, process):
    """The (EMA's) state dict of a public file under today's names, without REPA's projectors. UserError where
    the file says of itself that it is not what it would be loaded as."""
    said = vars(held["args"]) if isinstance(held.get("args"), argparse.Namespace) else {}
    for field, known in {"path_type": ["linear"], "prediction": ["velocity", "v"]}.items():
        if str(said.get(field, known[0])).lower() not in known:
            raise UserError(f"{name}: was trained with {field} {said[field]}; only {known[0]} is known here")
    state = held["ema"] if isinstance(held.get("ema"), dict) else held           # {model, ema, opt, args}
    if not state or not all(isinstance(k, str) and torch.is_tensor(v) for k, v in state.items()):
        raise UserError(f"{name}: neither a dict of tensors nor a checkpoint with a dict of tensors at 'ema'")
    if process == "sit" and any(key.startswith("projectors.") for key in state):
        raise UserError(f"{name}: has REPA's projectors, and REPA's time: say --process repa")
    first, legacy = depth_of(state), r"^decoder_blocks\.(\d+)\."                 # REPA's first files
    state = {re.sub(legacy, lambda m: f"blocks.{first + int(m[1])}.", key): v for key, v in state.items()}
    return {k: v for k, v in state.items() if not k.startswith("projectors.")}


def read_sizes(state, name, process, heads):
    """SiT's arguments, from a public file's tensors; heads from the row of SIZES that fits unless given."""
    if process not in ("sit", "dit", "repa"):
        raise UserError(f"{name}: its tensors do not tell its process; say --process sit, dit or repa")
    dimensions = {"pos_embed": 3, "x_embedder.proj.weight": 4, "y_embedder.embedding_table.weight": 2}
    dimensions |= {"blocks.0.attn.qkv.weight": 2, "final_layer.linear.weight": 2}
    for key, n in dimensions.items():
        if key not in state:
            raise UserError(f"{name}: no key {key}; these are not the weights of a SiT or DiT")
        if state[key].ndim != n or not state[key].numel():
            raise UserError(f"{name}: {key} has shape {list(state[key].shape)}, {n} dimensions were expected")
    dim, channels, patch, _ = state["x_embedder.proj.weight"].shape
    depth = depth_of(state)
    heads = heads or {(row["depth"], row["dim"]): row["heads"] for row in SIZES.values()}.get((depth, dim))
    if heads is None:
        raise UserError(f"{name}: depth {depth}, width {dim} is no known size; say how many heads (heads=)")
    sizes = dict(depth=depth, dim=dim, heads=heads, patch=patch, channels=channels)
    sizes["input_size"] = math.isqrt(state["pos_embed"].shape[1]) * patch
    sizes["out_channels"] = len(state["final_layer.linear.weight"]) // patch**2
    sizes["classes"] = len(state["y_embedder.embedding_table.weight"]) - 1
    sizes["process"] = "dit" if process == "dit" else "sit"
    return sizes


def fold_repa(state):
    """REPA's weights in SiT's convention, v(x, t) = -v_repa(x, 1 - t): the last layer changes its sign, and
    addition theorems turn cos and sin of w (1 - t) into those of w t: the first time layer's columns mix."""
    first, last = "t_embedder.mlp.0.weight", "final_layer.linear."
    w, (wc, ws) = frequencies().double(), state[first].double().chunk(2, 1)
    folded = torch.cat([wc * w.cos() + ws * w.sin(), wc * w.sin() - ws * w.cos()], 1)
    return {**state, first: folded, **{last + k: -state[last + k] for k in ("weight", "bias")}}


# --------------------------------------------------------------------------------------------------- guidance


def alphas_bar(steps=1000):
    """The diffusion's cumulative signal variances [steps], float64; linear betas 1e-4..0.02 at 1000 steps."""
    return (1 - torch.linspace(0.1 / steps, 20 / steps, steps, dtype=torch.float64)).cumprod(0)


class Guided:
    """A model under classifier-free guidance, u + scale (c - u), to be called like the model itself.

    interval: the noise times sigma/(alpha+sigma), 1 noise .. 0 data, bounds included, at which it guides
    (Kynkaanniemi et al. 2024); elsewhere only the conditional half is computed. channels: guides the first so
    many, by default all of the prediction; the published numbers of DiT and SiT take 3. DiT's variances stay
    conditional.
    """

    def __init__(self, model, scale, interval=(0, 1), channels=None):
        self.model, self.scale, self.interval = model, scale, interval
        self.guided = model.channels if channels is None else channels
        self.process, self.channels, self.classes = model.process, model.channels, model.classes
        abar = alphas_bar()
        self.noise_times = (1 - abar).sqrt() / (abar.sqrt() + (1 - abar).sqrt())  # a dit's, [1000]
        if not 1 <= self.guided <= model.channels:
            raise UserError(f"--cfg-channels {channels}: 1 to {model.channels}, which the model predicts")
        if interval[0] > interval[1]:
            raise UserError(f"--interval {interval[0]:g} {interval[1]:g}: the lower noise time comes first")
        if not model.classes and scale != 1:
            raise UserError(f"--cfg {scale}: the model is unconditional")

    def __call__(self, x, t, y):
        low, high = self.interval
        s = 1 - t if self.process == "sit" else self.noise_times.to(t.device)[t]
        inside = (s > low - 1e-6) & (s < high + 1e-6)  # [B]; 1e-6: times are float32
        if self.scale == 1 or not inside.any():
            return self.model(x, t, y).to(x.dtype)
        null = torch.full_like(y, self.classes)  # as Draws has it in train_sit.py
        both = self.model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null]))
        c, u = both.to(x.dtype).chunk(2)  # [B, out_channels, H, W] each
        guided = torch.cat([(u + self.scale * (c - u))[:, :self.guided], c[:, self.guided:]], 1)
        return torch.where(inside[:, None, None, None], guided, c)


def check_sampling(process, model, sampler, steps):
    """UserError where a process cannot sample so: another's model, no such sampler, too few or many steps."""
    names = ", ".join(process.samplers)
    own = getattr(model, "process", process.name)
    if own != process.name:
        raise UserError(f"the model is a {own}: {type(process).__name__} ({names}) needs a {process.name}")
    if sampler not in process.samplers:
        raise UserError(f"--sampler {sampler} is not for a {process.name}, which has {names}")
    low, high = process.samplers[sampler]
    if not low <= steps <= high:
        most = "or more" if high == math.inf else f"to {high}"
        raise UserError(f"--steps {steps}: {sampler} takes {low} {most}")


# --------------------------------------------------------------------------------------------- the flow (SiT)


class Flow:
    """The linear path t x + (1 - t) noise, whose velocity x - noise the model predicts (Ma et al. 2024)."""

    # Another path a x + b noise: so is noised, and loss compares with a' x + b' noise; score is
    # (r v - x) / (b^2 - r b b'), r = a / a'; sample has b in the place of 1 - t, but x0 is
    # (b' x - b v) / (a b' - a' b); Guided's s is b / (a + b). Noise prediction: loss compares with noise, and
    # v = (x - eps) / t, from t = 0.001 on. Another diffusion form: 1 - t in sample.

    name = "sit"
    samplers = {"sde": (2, math.inf), "euler": (1, math.inf), "heun": (1, math.inf)}      # fewest, most steps

    def time(self, u):
        """Training times [B] in [0, 1] from uniform u [B] in [0, 1)."""
        return u

    def noised(self, x, noise, t):
        """What the model is shown at times t [B]: x_t [B, C, H, W]."""
        t = t.to(x.dtype)[:, None, None, None]
        return t * x + (1 - t) * noise

    def loss(self, out, x, noise, t):
        """Squared error of the model's output as a velocity, mean over each sample: [B]."""
        return (out[:, :x.shape[1]] - (x - noise)).square().mean((1, 2, 3))

    def score(self, v, x, t):
        """The gradient of log p_t at x, from the velocity there; t < 1, and -x at t = 0."""
        return (t * v - x) / (1 - t)

    @torch.no_grad()
    def sample(self, model, noise, y, sampler="sde", steps=250, draw=None, callback=None):
        """From noise [B, C, H, W] to latents, with y [B], in the noise's dtype.

        "sde": Euler-Maruyama on dx = (v + sigma score) dt + sqrt(2 sigma) dw, sigma = 1 - t: steps - 1
        updates on [0, 0.96] and one of 0.04 without noise; draw(k) is step k's. "euler" and "heun": the ODE
        in equal steps. callback(k, t, x, x0) sees the state before step k and the data that it predicts.
        """
        check_sampling(self, model, sampler, steps)
        end, points = (0.96, steps) if sampler == "sde" else (1, steps + 1)
        times = (torch.linspace(0, end, points, dtype=torch.float64).tolist() + [1.0])[:steps + 1]
        x, draw = noise, draw or (lambda k: torch.randn_like(noise))

        def velocity(x, t):                    # an adaptive solver: scipy's solve_ivp on this, flat, 0 to 1
            return model(x, x.new_full((len(x),), t), y)[:, :x.shape[1]].to(x.dtype)

        for k, (t, after) in enumerate(zip(times, times[1:])):
            dt, v = after - t, velocity(x, t)
            if callback:
                callback(k, t, x, x + (1 - t) * v)
            if sampler == "euler":
                x = x + v * dt
            elif sampler == "heun":
                x = x + (v + velocity(x + v * dt, after)) / 2 * dt
            else:
                x = x + (v + (1 - t) * self.score(v, x, t)) * dt
                if k < steps - 1:
                    x = x + math.sqrt(2 * (1 - t) * dt) * draw(k).to(x)
        return x


def repa_loss(tokens, target):
    """REPA's alignment [B] (Yu et al. 2024): minus the cosine of tokens and target [B, N, D], mean over N."""
    return -F.cosine_similarity(tokens, target, dim=-1).mean(1)


# ---------------------------------------------------------------------------------------- the diffusion (DiT)


def pick(table, i, x):
    """Entries i [B] of a table, rounded to float32 as in the public code, to multiply x [B, C, H, W]."""
    return table.float().to(x)[i][:, None, None, None]


def normal_cdf(x):
    """The tanh approximation that DiT's likelihood uses."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))


def discrete_nll(x, mean, logvar):
    """-log of the Gaussian's mass in the bin of width 2/255 around x (nats); the outer bins have no end."""
    inv = torch.exp(-0.5 * logvar)
    below = normal_cdf(inv * (x - mean + 1 / 255))
    above = normal_cdf(inv * (x - mean - 1 / 255))
    mass = torch.where(x < -0.999, below, torch.where(x > 0.999, 1 - above, below - above))
    return -mass.clamp(min=1e-12).log()


def gaussian_kl(mean1, logvar1, mean2, logvar2):
    """KL(N1 || N2), elementwise (nats)."""
    spread = logvar2 - logvar1 - 1 + torch.exp(logvar1 - logvar2)
    return 0.5 * (spread + (mean1 - mean2) ** 2 * torch.exp(-logvar2))


class Diffusion:
    """DiT's chain of `steps`, or `keep` of them, spread evenly; the model sees the original indices, `times`.
    It predicts the noise and, as a fraction between the two bounds' logarithms, each step's variance."""

    name = "dit"
    samplers = {"ddpm": (2, 1000)}

    def __init__(self, steps=1000, keep=None, device=None):
        keep = steps if keep is None else keep
        if not 2 <= keep <= steps:
            raise UserError(f"--steps {keep}: the diffusion can take 2 to {steps} steps")
        self.steps = steps
        self.times = torch.tensor([round(i * (steps - 1) / (keep - 1)) for i in range(keep)], device=device)
        self.abar = alphas_bar(steps).to(device)[self.times]  # x_t = sqrt(abar) x_0 + sqrt(1 - abar) noise
        before = F.pad(self.abar[:-1], (1, 0), value=1.0)
        self.betas = 1 - self.abar / before
        self.c0 = self.betas * before.sqrt() / (1 - self.abar)  # q(x_{t-1} | x_t, x_0) has the mean
        self.ct = (1 - before) * (1 - self.betas).sqrt() / (1 - self.abar)  # c0 x_0 + ct x_t and the variance
        variance = self.betas * (1 - before) / (1 - self.abar)
        variance[0] = variance[1]                                                # its own is 0
        self.log_min, self.log_max = variance.log(), self.betas.log()

    def reverse(self, out, x, i):
        """p(x_{t-1} | x_t): mean, log variance, predicted data, from out [B, 2C, H, W] at x, index i [B]."""
        eps, v = out.chunk(2, 1)
        fraction = (v + 1) / 2
        logvar = fraction * pick(self.log_max, i, x) + (1 - fraction) * pick(self.log_min, i, x)
        x0 = pick((1 / self.abar).sqrt(), i, x) * x - pick((1 / self.abar - 1).sqrt(), i, x) * eps
        return pick(self.c0, i, x) * x0 + pick(self.ct, i, x) * x, logvar, x0

    def time(self, u):
        """Training times [B] in 0..steps-1 from uniform u [B] in [0, 1)."""
        return (u * self.steps).long()

    def noised(self, x, noise, t):
        """What the model is shown at times t [B]: x_t [B, C, H, W]."""
        return pick(self.abar.sqrt(), t, x) * x + pick((1 - self.abar).sqrt(), t, x) * noise

    def terms(self, out, x, noise, t):
        """The loss's two terms, [B] each, of the output [B, 2C, H, W]: the noise's squared error, and the
        variational bound in bits per dimension, which moves the variance only (Nichol & Dhariwal 2021)."""
        eps, v = out.chunk(2, 1)
        xt = self.noised(x, noise, t)
        mean, logvar, _ = self.reverse(torch.cat([eps.detach(), v], 1), xt, t)
        true = pick(self.c0, t, x) * x + pick(self.ct, t, x) * xt
        kl = gaussian_kl(true, pick(self.log_min, t, x), mean, logvar).mean((1, 2, 3))
        nll = discrete_nll(x, mean, logvar).mean((1, 2, 3))
        return (eps - noise).square().mean((1, 2, 3)), torch.where(t == 0, nll, kl) / math.log(2)

    def loss(self, out, x, noise, t):
        """DiT's hybrid loss [B], the sum of the two terms."""
        return sum(self.terms(out, x, noise, t))

    @torch.no_grad()
    def sample(self, model, noise, y, sampler="ddpm", steps=250, draw=None, callback=None):
        """Ancestral sampling (DDPM) from noise [B, C, H, W] in `steps` of the chain's steps, with y [B].

        draw(k) is step k's noise, the last has none; callback(k, t, x, x0) as in Flow.sample, t in 0..999.
        """
        check_sampling(self, model, sampler, steps)
        chain = Diffusion(self.steps, steps, noise.device)
        x, draw = noise, draw or (lambda k: torch.randn_like(noise))
        for k, t in enumerate(reversed(chain.times.tolist())):
            i = torch.full((len(x),), steps - 1 - k, device=x.device)
            mean, logvar, x0 = chain.reverse(model(x, torch.full_like(i, t), y).to(x.dtype), x, i)
            if callback:
                callback(k, t, x, x0)
            x = mean if k == steps - 1 else mean + torch.exp(0.5 * logvar) * draw(k).to(x)
            # DDIM: x = sqrt(abar before) x0 + sqrt(1 - abar before) (x - sqrt(abar) x0) / sqrt(1 - abar)
        return x


def process_of(model, device=None):
    """The process that a model ("sit", "dit", or a network with that field) was trained for."""
    return Diffusion(device=device) if getattr(model, "process", model) == "dit" else Flow()
