"""DINOv2 (Oquab et al. 2023; registers: Darcet et al. 2024), the vision transformer that the VAE is aligned
to, and two heads that read its features: Meta's linear segmentation head and the depth head of MoGe (Wang et
al. 2024).

    dino = DINOv2.load("vitl14_reg")                # or Meta's .pth, transformers' folder, a state dict
    patch, cls = dino.targets(images, grid=32)      # [B,3,H,W] in [-1,1] -> [B,1024,D], [B,D]
    mask = Segmenter.load("vitl14_voc2012")(patch, grid=32, size=256).argmax(1)
    depth = Depth.load("moge-vitl")(patch, grid=32, size=448)

Parameters carry the public files' names, so a state_dict() of these networks is such a file."""
import json
import math
import re
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

SIZES = {   # heads: dim / 64
    "vits14": dict(dim=384, depth=12, registers=0),
    "vitb14": dict(dim=768, depth=12, registers=0),
    "vitl14": dict(dim=1024, depth=24, registers=0),
    "vitg14": dict(dim=1536, depth=40, registers=0, ffn="swiglu"),
}
SIZES |= {f"{name}_reg": dict(sizes, registers=4) for name, sizes in SIZES.items()}

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)    # ImageNet's, on [0,1]


class UserError(ValueError):
    """What the user can mend: said in one line, without a traceback."""


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):                                                           # [B, N, D]
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)  # [B, heads, N, D/heads], as q, k, v
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


def mlp(dim, hidden=None):
    hidden = hidden or 4 * dim
    return nn.Sequential(OrderedDict(fc1=nn.Linear(dim, hidden), gelu=nn.GELU(), fc2=nn.Linear(hidden, dim)))


class SwiGLU(nn.Module):
    def __init__(self, dim, hidden=None):
        super().__init__()
        hidden = hidden or (4 * dim * 2 // 3 + 7) // 8 * 8      # as many weights as the MLP, rounded up to 8
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x):
        gate, x = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * x)


class Block(nn.Module):
    def __init__(self, dim, heads, ffn, hidden):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.ls1 = nn.ParameterDict({"gamma": torch.ones(dim)})      # layer scale, under the public name
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = {"mlp": mlp, "swiglu": SwiGLU}[ffn](dim, hidden)
        self.ls2 = nn.ParameterDict({"gamma": torch.ones(dim)})

    def forward(self, x):                                       # [B, N, D]
        x = x + self.ls1.gamma * self.attn(self.norm1(x))
        return x + self.ls2.gamma * self.mlp(self.norm2(x))


class DINOv2(nn.Module):
    """A ViT with a class token, registers and learned positions, a grid x grid table resized to the image's.

    `offset` says how (both rules are Meta's): 0.1 as for the networks without registers, 0 (exact size,
    antialiased) as for those with them. Set it to 0 on a network without registers to get REPA's targets."""

    def __init__(self, dim=1024, depth=24, heads=None, patch=14, registers=4, grid=37, ffn="mlp",
                 hidden=None):
        super().__init__()
        if heads is None and dim % 64:
            raise UserError(f"dim {dim} is no multiple of 64: give its heads (heads=)")
        if heads and dim % heads:
            raise UserError(f"dim {dim} cannot be shared by {heads} heads")
        self.dim, self.patch, self.registers, self.grid = dim, patch, registers, grid
        self.offset = 0 if registers else 0.1
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid ** 2, dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, dim)) if registers else None
        self.mask_token = nn.Parameter(torch.zeros(1, dim))     # unused; the public files hold it
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, dim, patch, stride=patch)))
        self.blocks = nn.ModuleList(Block(dim, heads or dim // 64, ffn, hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.init_weights()

    def init_weights(self):
        for p in (self.cls_token, self.pos_embed, self.register_tokens):
            if p is not None:
                nn.init.trunc_normal_(p, std=0.02)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)

    def positions(self, h, w):
        """The position embeddings [1,1+h*w,D] of h x w patches, class token first; resized in float32."""
        G = self.grid
        if (h, w) == (G, G):
            return self.pos_embed
        cls, table = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        table = table.float().unflatten(1, (G, G)).permute(0, 3, 1, 2)              # [1, D, G, G]
        how = dict(size=(h, w), antialias=True)
        if self.offset:     # the factor also sets the step between samples: (h + 0.1) / G is not h / G
            how = dict(scale_factor=((h + self.offset) / G, (w + self.offset) / G))
        table = F.interpolate(table, mode="bicubic", **how)
        return torch.cat([cls, table.flatten(2).transpose(1, 2).to(cls.dtype)], 1)

    def tokens(self, x):
        """All tokens [B,1+R+N,D], normed: class, registers, patches row by row. x: as for forward."""
        B, _, H, W = x.shape
        if H % self.patch or W % self.patch:
            raise ValueError(f"an image of {H}x{W} is no whole number of {self.patch}x{self.patch} patches")
        x = self.patch_embed(x).flatten(2).transpose(1, 2)                          # [B, N, D]
        x = torch.cat([self.cls_token.expand(B, -1, -1), x], 1)                     # [B, 1+N, D]
        x = x + self.positions(H // self.patch, W // self.patch)
        if self.registers:  # they come after the positions and have none
            x = torch.cat([x[:, :1], self.register_tokens.expand(B, -1, -1), x[:, 1:]], 1)
        for block in self.blocks:
            x = block(x)                                                            # [B, 1+R+N, D]
        return self.norm(x)

    def forward(self, x):
        """x: [B,3,H,W], ImageNet-normalised, of whole patches -> patch [B,N,D], cls [B,D], both normed."""
        x = self.tokens(x)
        return x[:, 1 + self.registers:], x[:, 0]

    @torch.no_grad()
    def targets(self, images, grid, antialias=False):
        """Features of images [B,3,H,W] in [-1,1] on a grid (a number or a pair): patch [B,h*w,D], cls [B,D].

        The whole image is resized to grid * patch, so patch (i, j) lies over latent (i, j). Bicubic, by
        default without antialias, as REPA does."""
        h, w = pair(grid)
        x = F.interpolate(images, (h * self.patch, w * self.patch), mode="bicubic", antialias=antialias)
        mean, std = x.new_tensor(MEAN).view(3, 1, 1), x.new_tensor(STD).view(3, 1, 1)
        return self(((x / 2 + 0.5 - mean) / std).to(self.pos_embed.dtype))

    @classmethod
    def load(cls, source, heads=None):
        """A network in eval mode from a public name (SIZES), Meta's .pth, transformers' file or folder, or a
        state dict; sizes come from the shapes. UserError names the file and the first wrong key."""
        state, where = read(source, BACKBONES)
        if "embeddings.cls_token" in state:                                         # transformers' layout
            state, config = meta_names(state, where), Path(where).with_name("config.json")
            if not isinstance(source, dict) and config.is_file():
                heads = heads or read_file(config, {}).get("num_attention_heads")
        sizes = SIZES[source] if isinstance(source, str) and source in SIZES else cls.sizes(state, where)
        return build(lambda: cls(heads=heads, **sizes), state, where)

    @staticmethod
    def sizes(state, where):
        dim, _, _, patch = shape(state, "patch_embed.proj.weight", 4, where)
        grid = math.isqrt(shape(state, "pos_embed", 3, where)[1] - 1)
        registers = shape(state, "register_tokens", 3, where)[1] if "register_tokens" in state else 0
        ffn, last = ("swiglu", "w3") if "blocks.0.mlp.w3.weight" in state else ("mlp", "fc2")
        hidden = shape(state, f"blocks.0.mlp.{last}.weight", 2, where)[1]
        depth = count(state, "blocks.")
        return dict(dim=dim, depth=depth, patch=patch, registers=registers, grid=grid, ffn=ffn, hidden=hidden)


def pair(n):
    return (n, n) if isinstance(n, int) else n


def load_teacher(source, repa=False):
    """The network that a name or a file stands for, to align with: any module with .dim and .targets(images,
    grid) -> patch [B,N,dim], cls [B,dim] (or None). repa: resizes its positions as REPA does, not as Meta."""
    teacher = DINOv2.load(source).requires_grad_(False)
    if repa:
        teacher.offset = 0
    return teacher


# --------------------------------------------------------------------------------------------------- pictures


def pca(features, basis=None):
    """Patch features [B,N,D] as PCA colors [B,N,3] in [0,1], and the basis, to reuse on other features: the
    first three components over all B*N vectors, each stretched from its 2nd to its 98th percentile."""
    flat = features.detach().float().flatten(0, 1)
    if basis is None:
        mean = flat.mean(0)
        _, vectors = torch.linalg.eigh((flat - mean).T @ (flat - mean))
        axes = vectors[:, -3:].flip(1)                                     # [D, 3], largest first
        axes = axes * torch.where(axes.sum(0) < 0, -1.0, 1.0)  # eigenvectors have no sign: fix one
        p = ((flat - mean) @ axes)[:: max(1, len(flat) // 100000)]
        basis = mean, axes, torch.quantile(p, torch.tensor([0.02, 0.98], device=p.device), dim=0)
    mean, axes, (low, high) = basis
    colors = ((flat - mean) @ axes - low) / (high - low).clamp_min(1e-12)
    return colors.clamp(0, 1).view(*features.shape[:2], 3), basis


def foreground(features):
    """A mask without any head: the sign of the first principal component of patch features [B,N,D], the side
    that touches the border less being the foreground: bool [B,h,w]."""
    side = math.isqrt(features.shape[1])
    flat = features.flatten(0, 1)
    _, vectors = torch.linalg.eigh((flat - flat.mean(0)).T @ (flat - flat.mean(0)))
    mask = ((flat - flat.mean(0)) @ vectors[:, -1] > 0).view(-1, side, side)
    border = torch.ones(side, side, dtype=torch.bool, device=mask.device)
    border[1:-1, 1:-1] = False
    return ~mask if mask[:, border].float().mean() > mask[:, ~border].float().mean() else mask


MAGMA = [[0, 0, 4], [80, 18, 123], [182, 54, 121], [251, 136, 97], [252, 253, 191]]


def magma(x):
    """[B,H,W] in [0,1] -> uint8 [B,3,H,W], from dark to bright in equal steps of lightness."""
    anchors = torch.tensor(MAGMA).to(x)
    place = x * (len(anchors) - 1)
    low = place.long().clamp_max(len(anchors) - 2)
    mix = (place - low)[..., None]
    return ((1 - mix) * anchors[low] + mix * anchors[low + 1]).round().to(torch.uint8).permute(0, 3, 1, 2)


def color_depth(depth):
    """Depth [B,H,W] -> uint8 [B,3,H,W], near bright: 1 / depth from each image's 2nd to 98th percentile."""
    near = (1 / depth).flatten(1)
    low, high = torch.quantile(near, torch.tensor([0.02, 0.98]).to(near), dim=1, keepdim=True)
    return magma(((near - low) / (high - low).clamp_min(1e-12)).clamp(0, 1).view(depth.shape))


# ------------------------------------------------------------------------------------------------------ heads


VOC = """background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable,
dog, horse, motorbike, person, pottedplant, sheep, sofa, train, tvmonitor"""

ADE20K = """wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk,
person, earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea,
mirror, rug, field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box,
column, signboard, chest of drawers, counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand,
path, stairs, runway, case, pool table, pillow, screen door, stairway, river, bridge, bookcase, blind,
coffee table, toilet, flower, book, hill, bench, countertop, stove, palm, kitchen island, computer,
swivel chair, boat, bar, arcade machine, hovel, bus, towel, light, truck, tower, chandelier, awning,
streetlight, booth, television, airplane, dirt track, apparel, pole, land, bannister, escalator, ottoman,
bottle, buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer, plaything, swimming pool,
stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step, tank, trade name,
microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase,
traffic light, tray, ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator, glass,
clock, flag"""

VOC, ADE20K = (names.replace("\n", " ").split(", ") for names in (VOC, ADE20K))


def color(i):
    """Class i's RGB by PASCAL VOC's rule: every third bit of i to red, green, blue in turn, highest first."""
    return tuple(sum((i >> (3 * k + c) & 1) << (7 - k) for k in range(8)) for c in range(3))


class Segmenter(nn.Module):
    """A linear map of normed patch features to class logits, with the `names` and `colors` of its classes.

    Meta's heads are for networks without registers: features aligned to a _reg network do not fit them."""

    def __init__(self, dim=1024, classes=21):
        super().__init__()
        self.dim, self.linear = dim, nn.Linear(dim, classes)
        self.names = {21: VOC, 150: ADE20K}.get(classes) or [f"class {i}" for i in range(classes)]
        first = 1 if classes == 150 else 0                      # ADE20K has no background to be black
        self.colors = [color(i + first) for i in range(classes)]

    def forward(self, patch, grid, size):
        """patch: [B,h*w,D] on a grid -> logits [B,C,H,W] at a size; grid, size: a number or a pair."""
        logits = self.linear(patch).transpose(1, 2).unflatten(2, pair(grid))        # [B, C, h, w]
        return F.interpolate(logits, pair(size), mode="bilinear")

    @classmethod
    def load(cls, source):
        """A head from a public name (SEGMENTERS), an mmcv file of a linear head, or its state dict; its batch
        norm is folded into the linear layer. Errors as in DINOv2.load."""
        state, where = read(source, SEGMENTERS, "state_dict")
        state = {k.removeprefix("decode_head."): v for k, v in state.items()}
        state.setdefault("bn.num_batches_tracked", torch.tensor(0))
        classes, dim, _, _ = shape(state, "conv_seg.weight", 4, where)
        bn, conv = build(
            lambda: nn.Sequential(OrderedDict(bn=nn.BatchNorm2d(dim), conv_seg=nn.Conv2d(dim, classes, 1))),
            state,
            where,
        )
        gain = bn.weight / (bn.running_var + bn.eps).sqrt()                         # [D]
        weight = conv.weight.flatten(1)                                             # [C, D]
        bias = conv.bias + weight @ (bn.bias - bn.running_mean * gain)              # [C]
        return build(lambda: cls(dim, classes), {"linear.weight": weight * gain, "linear.bias": bias}, where)


def conv3x3(cin, cout):
    return nn.Conv2d(cin, cout, 3, padding=1, padding_mode="replicate")


def plane(h, w, aspect, x):
    """Pixel centres (u, v) [B,2,h,w] on a view plane of half diagonal 1; aspect: image width / height."""
    u, v = aspect / math.hypot(1, aspect), 1 / math.hypot(1, aspect)
    u = torch.linspace(-u * (w - 1) / w, u * (w - 1) / w, w, dtype=x.dtype, device=x.device)
    v = torch.linspace(-v * (h - 1) / h, v * (h - 1) / h, h, dtype=x.dtype, device=x.device)
    return torch.stack(torch.meshgrid(u, v, indexing="xy")).expand(len(x), -1, -1, -1)


class Residual(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        layers = [nn.GroupNorm(1, dim), nn.ReLU(), conv3x3(dim, hidden)]
        layers += [nn.GroupNorm(hidden // 32, hidden), nn.ReLU(), conv3x3(hidden, dim)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.layers(x)


class Depth(nn.Module):
    """The head of MoGe v1: patch features to a map of 3-D points, up to one scale and one shift of depth.

    MoGe gives it the last four layers of its own DINOv2 (plain vitl14, fine-tuned), one projection each. Here
    the one map that alignment gives goes to all four, which equals one projection with their weights and
    biases summed."""

    def __init__(self, dim=1024, proj=512, widths=(256, 128, 64), expand=2, blocks=2, last=32):
        super().__init__()
        self.dim = dim
        self.projects = nn.ModuleList(nn.Conv2d(dim, proj, 1) for _ in range(4))
        self.upsample_blocks = nn.ModuleList()
        for cin, cout in zip((proj, *widths), widths):
            up = nn.Sequential(nn.ConvTranspose2d(cin + 2, cout, 2, stride=2), conv3x3(cout, cout))
            residuals = [Residual(cout, expand * cout) for _ in range(blocks)]
            self.upsample_blocks.append(nn.Sequential(up, *residuals))
        self.output_block = nn.ModuleList(
            nn.Sequential(conv3x3(widths[-1] + 2, last), nn.ReLU(), nn.Conv2d(last, n, 1)) for n in (3, 1))

    def points(self, patch, grid, size):
        """patch: [B,h*w,D] -> points (x, y, z) [B,3,H,W] and mask [B,H,W], above 0.5 where trusted."""
        H, W = pair(size)

        def with_plane(x):
            return torch.cat([x, plane(*x.shape[2:], W / H, x)], 1)

        x = patch.transpose(1, 2).unflatten(2, pair(grid))                          # [B, D, h, w]
        x = sum(project(x) for project in self.projects)                            # [B, proj, h, w]
        for block in self.upsample_blocks:
            x = block(with_plane(x))  # [B, width, 2h, 2w], 4h, 8h
        x = with_plane(F.interpolate(x, (H, W), mode="bilinear"))                   # [B, width + 2, H, W]
        points, mask = (block(x) for block in self.output_block)
        z = points[:, 2:].exp()
        return torch.cat([points[:, :2] * z, z], 1), mask[:, 0]

    def forward(self, patch, grid, size):
        """patch: [B,h*w,D] on a grid -> depth [B,H,W] > 0 at a size (448 for grid 32); numbers or pairs."""
        return self.points(patch, grid, size)[0][:, 2]

    @classmethod
    def load(cls, source):
        """MoGe's head ("moge-vitl", a model.pt, a state dict), its widths read from it; errors as above."""
        state, where = read(source, DEPTHS, "model")
        state = {k: v for k, v in state.items() if not k.startswith(("backbone.", "image_"))}
        state = {k.removeprefix("head."): v for k, v in state.items()}
        proj, dim, _, _ = shape(state, "projects.0.weight", 4, where)
        stages, blocks = count(state, "upsample_blocks."), count(state, "upsample_blocks.0.") - 1
        widths = [shape(state, f"upsample_blocks.{i}.0.0.weight", 4, where)[1] for i in range(stages)]
        hidden, width, _, _ = shape(state, "upsample_blocks.0.1.layers.2.weight", 4, where)
        last = shape(state, "output_block.0.0.weight", 4, where)[0]
        return build(lambda: cls(dim, proj, widths, hidden // width, blocks, last), state, where)


# ------------------------------------------------------------------------------------------------------ files

HEADS = "voc2012", "ade20k"
META = "https://dl.fbaipublicfiles.com/dinov2/dinov2_{0}/dinov2_{0}_{1}.pth"
BACKBONES = {name: META.format(name[:6], "reg4_pretrain" if "_reg" in name else "pretrain") for name in SIZES}
SEGMENTERS = {f"{n[:6]}_{d}": META.format(n[:6], d + "_linear_head") for n in SIZES for d in HEADS}
DEPTHS = {"moge-vitl": "https://huggingface.co/Ruicheng/moge-vitl/resolve/main/model.pt"}
SHA256 = {"vitl14": "d5383ea8f4877b24", "vitl14_reg": "8b6364", "moge-vitl": "da96b09a0485a3c4"}  # begin so
HUB = """embeddings.patch_embeddings.projection patch_embed.proj embeddings.position_embeddings pos_embed
embeddings.cls cls embeddings.mask mask embeddings.register register encoder.layer blocks lambda1 gamma
attention.output.dense attn.proj layer_scale ls weights_in w12 weights_out w3 layernorm norm""".split()
FILES = "", "model.safetensors", "pytorch_model.bin"                                # "": not in a folder
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def fetch(name, url):
    """The path of a public file in torch.hub's cache; downloaded first if it is not there, by one process."""
    file = Path(url).name.replace("model.pt", f"{name}.pt")  # which model's would not be seen in that folder
    path = Path(torch.hub.get_dir(), "checkpoints", file)
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path.with_name(".lock"), "w") as lock:
                if fcntl is not None:
                    fcntl.flock(lock, fcntl.LOCK_EX)
                if not path.is_file():
                    torch.hub.download_url_to_file(url, str(path), hash_prefix=SHA256.get(name))
        except Exception as e:
            raise UserError(f"{name}: no {path}, and no download ({e}): put {url} there yourself") from None
    return path


def read(source, public, under=None):
    """The state dict in a source (`public`: {name: url}), out of `under` if the file has that key, and what
    to call it in errors. Nothing in the file is executed. Raises UserError naming the file."""
    state, where = source, "the state dict"
    if not isinstance(source, dict):
        path = fetch(str(source), public[str(source)]) if str(source) in public else Path(source)
        path = next((p for name in FILES if (p := path / name).is_file()), path)
        state, where = read_file(path, public), str(path)
    if under and isinstance(state, dict):
        state = state.get(under, state)
    if not (isinstance(state, dict) and all(type(k) is str and torch.is_tensor(v) for k, v in state.items())):
        raise UserError(f"{where}: holds no flat dict of tensors by name")
    return state, where


def read_file(path, public):
    if not path.is_file():
        raise UserError(f"{path}: no such file, no model.safetensors in it, and none of {', '.join(public)}")
    kind = {".json": "JSON", ".safetensors": "safetensors"}.get(path.suffix, "PyTorch weight")
    try:                                         # compressed files cannot be mapped
        if kind != "PyTorch weight":
            return read_safetensors(path) if kind == "safetensors" else dict(json.loads(path.read_bytes()))
        plain = zipfile.is_zipfile(path) and not any(m.compress_type for m in zipfile.ZipFile(path).filelist)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=plain)
    except Exception as e:
        with open(path, "rb") as f:
            why = f"not a whole {kind} file (begins with {f.read(12)}); delete it and get it again"
        if refused := re.search(r"GLOBAL ([\w.]+)", str(e)):
            why = f"holds {refused[1]}, which is never loaded; torch.save its state_dict alone"
        raise UserError(f"{path}: {why}") from None


def read_safetensors(path):
    """safetensors: eight bytes with the header's length, in JSON where each tensor lies, the tensors."""
    raw = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)   # mapped, not read
    start, out = 8 + raw[:8].view(torch.int64).item(), {}
    for k, e in json.loads(bytes(raw[8:start].numpy())).items():
        if k != "__metadata__":
            out[k] = raw[start:][slice(*e["data_offsets"])].clone().view(DTYPES[e["dtype"]]).view(e["shape"])
    return out


def meta_names(state, where):
    """transformers' state dict of a DINOv2 under Meta's names; query, key and value become one qkv."""
    state, names = dict(state), dict(zip(HUB[::2], HUB[1::2]))
    for key in [k for k in state if ".attention.attention.query." in k]:
        three = [state.pop(key.replace("query", part), torch.empty(0)) for part in ("query", "key", "value")]
        if len({t.shape for t in three}) > 1:
            raise UserError(f"{where}: {key} has no key and value of its shape {list(three[0].shape)}")
        state[key.replace("attention.attention.query", "attn.qkv")] = torch.cat(three)
    return {re.sub("|".join(names), lambda m: names[m[0]], key): v for key, v in state.items()}


def shape(state, key, ndim, where):
    """The shape of a tensor from which a network's sizes are read."""
    if key not in state or state[key].ndim != ndim or not state[key].numel():
        raise UserError(f"{where}: no {key} with {ndim} dimensions; another network?")
    return state[key].shape


def count(state, prefix):
    """How many different parts follow the prefix in the names of a state dict: its number of blocks."""
    return len({k[len(prefix):].split(".")[0] for k in state if k.startswith(prefix)})


def build(make, state, where):
    """The network of make(), in eval mode, with a copy of all `state`; UserError naming what does not fit."""
    try:
        with torch.device("meta"):  # no memory and no random numbers before all is known to fit
            net = make()
        net.load_state_dict({k: v.clone() for k, v in state.items()}, assign=True)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as e:
        why = str(e).splitlines()[:2][-1].strip()[:200]         # torch's second line names the first key
        raise UserError(f"{where}: its tensors make no such network: {why}") from e
    return net.to(torch.get_default_dtype()).eval()
