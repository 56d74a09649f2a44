"""dino.py against the public code's numbers (golden/), transformers, timm, and files of every wrong kind."""
import argparse
import copy
import functools
import json
import os
import pickle
import re
import shutil
import urllib.error

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import Golden, call, gen, relative
from PIL import Image

import dino
import fid
import train_vae
from dino import Depth, DINOv2, Segmenter, UserError

HW = ["224x224", "448x448", "518x518", "224x322"]
# what the public code's own float32 results differ by between kernels, doubled
F32 = {"feature": 6e-6, "position": 3e-6, "seg": 6e-6, "moge": 6e-5, "plane": 3e-7}


@pytest.fixture(scope="module")
def features():
    return Golden("dinov2")


@pytest.fixture(scope="module")
def heads():
    return Golden("heads")


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request):
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def wanted(g, name, dtype):
    return g[name + ".f64" if dtype == torch.float64 else name]


def gap(a, b):
    """Greatest absolute difference."""
    a, b = np.asarray(a.detach() if torch.is_tensor(a) else a), np.asarray(b)
    assert a.shape == b.shape, (a.shape, b.shape)
    return np.abs(a.astype(np.float64) - b).max()


@torch.no_grad()
def miss(g, net, variant, size, dtype=torch.float64):
    """Greatest difference of patch, cls and register features from the public code's."""
    x, name = g.input(f"image.{size}").to(dtype), f"{variant}.{size}."
    tokens = net.tokens(x)
    patch, cls = net(x)
    parts = {"patch": patch, "cls": cls} | ({"reg": tokens[:, 1:1 + net.registers]} if net.registers else {})
    return max(gap(g.pick(name + part, ours), wanted(g, name + part, dtype)) for part, ours in parts.items())


def tolerance(size, dtype):
    """In float64 only the interpolated position table, which is float32 by definition, keeps a machine from
    1e-10."""
    return F32["feature"] if dtype == torch.float32 else 1e-10 if size == "518x518" else 2e-6


def random(net):
    """The network with every parameter drawn by golden's rule, so that no gain, bias or token is neutral."""
    net.load_state_dict({k: torch.from_numpy(gen(k, tuple(v.shape))) for k, v in net.state_dict().items()})
    return net.eval()


def noise(*size, seed=0):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(size).astype(np.float32))


# ------------------------------------------------------------------------------------------------------------
# the network

@pytest.mark.parametrize("size", HW)
@pytest.mark.parametrize("variant", ["plain", "reg4", "swiglu"])
def test_features_are_the_public_codes(features, variant, size, dtype):
    net = DINOv2.load(features.state(variant), heads=4)
    assert miss(features, net, variant, size, dtype) <= tolerance(size, dtype)


@pytest.mark.parametrize("size", ["224x224", "448x448", "224x322"])
@pytest.mark.parametrize("variant", ["plain", "reg4"])
def test_each_variant_resizes_positions_by_its_own_rule(features, variant, size, dtype):
    net = DINOv2.load(features.state(variant), heads=4)
    name, (H, W) = f"{variant}.{size}.pos", map(int, size.split("x"))
    table = net.positions(H // 14, W // 14)
    assert table.dtype == dtype
    assert gap(features.pick(name, table), wanted(features, name, dtype)) <= F32["position"]


def test_offset_zero_gives_repas_teacher(features, dtype):
    net = DINOv2.load(features.state("plain"), heads=4)
    net.offset = 0
    table, (patch, _) = net.positions(16, 16), net(features.input("image.224x224").to(dtype))
    assert gap(features.pick("timm16.pos", table), wanted(features, "timm16.pos", dtype)) <= F32["position"]
    error = gap(features.pick("timm16.patch", patch), wanted(features, "timm16.patch", dtype))
    assert error <= tolerance("224x224", dtype)


def norm_eps(net, monkeypatch):
    for m in net.modules():
        if isinstance(m, nn.LayerNorm):
            m.eps = 1e-5


def tanh_gelu(net, monkeypatch):
    for block in net.blocks:
        block.mlp.gelu = nn.GELU("tanh")


def attention_scale(net, monkeypatch):
    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: attend(q, k, v, scale=64 ** -0.5))


def one_head(net, monkeypatch):
    for block in net.blocks:
        block.attn.heads = 1


def key_before_query(net, monkeypatch):
    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: attend(k, q, v))


def other_rule(net, monkeypatch):
    net.offset = 0 if net.offset else 0.1


def size_without_antialias(net, monkeypatch):
    net.offset = 1e-9   # the step is h / G then, as in libraries that pass the size


def rows_for_columns(net, monkeypatch):
    table = net.positions
    monkeypatch.setattr(net, "positions", lambda h, w: torch.cat(
        [table(w, h)[:, :1], table(w, h)[:, 1:].unflatten(1, (w, h)).transpose(1, 2).flatten(1, 2)], 1))


def registers_have_positions(net, monkeypatch):
    net.register_tokens.data += net.pos_embed.data[:, :1]


def registers_come_last(net, monkeypatch):
    tokens = net.tokens
    monkeypatch.setattr(net, "tokens", lambda x: tokens(x).roll(-4, 1))


def layerscales_swapped(net, monkeypatch):
    for block in net.blocks:
        block.ls1, block.ls2 = block.ls2, block.ls1


def no_final_norm(net, monkeypatch):
    net.norm = nn.Identity()


def gate_swapped(net, monkeypatch):
    for block in net.blocks:
        for p in (block.mlp.w12.weight, block.mlp.w12.bias):
            p.data = p.data.roll(len(p) // 2, 0)


@pytest.mark.parametrize("variant,size,mutant", [
    ("plain", "518x518", norm_eps), ("plain", "518x518", tanh_gelu), ("plain", "518x518", attention_scale),
    ("plain", "518x518", one_head), ("plain", "518x518", key_before_query),
    ("plain", "518x518", layerscales_swapped), ("plain", "518x518", no_final_norm),
    ("plain", "224x224", other_rule), ("plain", "448x448", other_rule),
    ("plain", "224x224", size_without_antialias), ("reg4", "224x224", other_rule),
    ("reg4", "448x448", other_rule), ("reg4", "224x224", size_without_antialias),
    ("plain", "224x322", rows_for_columns),
    ("reg4", "518x518", registers_have_positions), ("reg4", "518x518", registers_come_last),
    ("swiglu", "518x518", gate_swapped)], ids=lambda v: getattr(v, "__name__", v))
def test_a_mutant_misses_by_ten_times_the_tolerance(features, variant, size, mutant, monkeypatch, double):
    net = DINOv2.load(features.state(variant), heads=4)
    mutant(net, monkeypatch)
    assert miss(features, net, variant, size) >= 10 * tolerance(size, torch.float64)


@pytest.fixture(scope="module")
def registered():
    return random(DINOv2(128, depth=3))


@pytest.mark.parametrize("H,W", [(112, 112), (224, 322), (518, 518)])
def test_registers_agree_with_transformers(registered, H, W):
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel
    config = Dinov2WithRegistersConfig(hidden_size=128, num_hidden_layers=3, num_attention_heads=2,
                                       image_size=518, patch_size=14)
    state = hub_names(registered)
    peer = Dinov2WithRegistersModel.from_pretrained(None, config=config, state_dict=state).eval()
    x = noise(2, 3, H, W)
    with torch.no_grad():
        ours, theirs = registered.tokens(x), peer(x).last_hidden_state
    assert relative(ours, theirs) <= 1e-5


def hub_names(net):
    """The state dict under the names of the files facebook/dinov2-with-registers-*."""
    out = {}
    for k, v in net.state_dict().items():
        if "attn.qkv" in k:
            for part, rows in zip(("query", "key", "value"), v.chunk(3)):
                theirs = k.replace("blocks", "encoder.layer")
                out[theirs.replace("attn.qkv", f"attention.attention.{part}")] = rows
            continue
        for a, b in (("blocks", "encoder.layer"), ("attn.proj", "attention.output.dense"),
                     ("ls1.gamma", "layer_scale1.lambda1"), ("ls2.gamma", "layer_scale2.lambda1"),
                     ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
                     ("pos_embed", "position_embeddings")):
            k = k.replace(a, b)
        k = f"embeddings.{k}" if k.endswith(("_token", "_tokens", "position_embeddings")) else k
        out["layernorm" + k.removeprefix("norm") if k.startswith("norm.") else k] = v
    return out


@pytest.mark.parametrize("H,W", [(112, 112), (224, 322), (518, 518)])
def test_registers_agree_with_timm(registered, H, W):
    from timm.models.vision_transformer import VisionTransformer
    peer = VisionTransformer(img_size=518, patch_size=14, embed_dim=128, depth=3, num_heads=2,
                             init_values=1.0, reg_tokens=4, no_embed_class=True, num_classes=0,
                             dynamic_img_size=True).eval()
    state = registered.state_dict()
    del state["mask_token"]
    state["reg_token"] = state.pop("register_tokens")
    state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
    state["pos_embed"] = state["pos_embed"][:, 1:]
    peer.load_state_dict(state)
    x = noise(2, 3, H, W)
    with torch.no_grad():
        assert relative(registered.tokens(x), peer.forward_features(x)) <= 1e-5


@pytest.mark.parametrize("ffn,registers", [("mlp", 4), ("swiglu", 0)])
def test_every_kind_of_parameter_moves_the_output_by_more_than_one_percent(ffn, registers):
    """So that agreement on these weights means agreement of every branch."""
    net = random(DINOv2(128, depth=3, registers=registers, ffn=ffn))
    x = noise(1, 3, 112, 112)

    def kind_of(name):
        return ".".join(part for part in name.split(".") if not part.isdigit())

    kinds = {kind_of(k) for k, _ in net.named_parameters()} - {"mask_token"}
    assert len(kinds) == (21 if registers else 20)
    with torch.no_grad():
        full = net.tokens(x)
        for kind in kinds:
            other = copy.deepcopy(net)
            for k, p in other.named_parameters():
                if kind_of(k) == kind:
                    p.fill_(1.0 if "norm" in k and k.endswith("weight") else 0.0)
            assert relative(other.tokens(x), full) > 0.01, kind


@pytest.mark.parametrize("name,parameters,keys", [
    ("vits14", 22_056_576, 175), ("vits14_reg", 22_058_112, 176),
    ("vitb14", 86_580_480, 175), ("vitb14_reg", 86_583_552, 176),
    ("vitl14", 304_368_640, 343), ("vitl14_reg", 304_372_736, 344),
    ("vitg14", 1_136_480_768, 567), ("vitg14_reg", 1_136_486_912, 568)])
def test_named_sizes_have_the_public_parameter_counts(name, parameters, keys):
    with torch.device("meta"):
        net = DINOv2(**dino.SIZES[name])
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert len(net.state_dict()) == keys
    assert all(block.attn.heads == net.dim // 64 for block in net.blocks)


def test_a_new_network_starts_small_with_open_branches():
    net = DINOv2(64, depth=2, patch=4, grid=8)
    for name, p in net.named_parameters():
        if name.endswith(("qkv.weight", "fc1.weight", "fc2.weight", "cls_token", "pos_embed",
                          "register_tokens")):
            assert 0.015 < p.std() < 0.025, name
        if name.endswith("gamma"):
            assert (p == 1).all()
    patch, cls = net(noise(2, 3, 32, 32))
    assert patch.shape == (2, 64, 64) and cls.shape == (2, 64)
    (patch.square().sum() + cls[:, 0].sum()).backward()
    assert {k for k, p in net.named_parameters() if p.grad is None} == {"mask_token"}


def test_an_image_that_is_no_whole_number_of_patches_is_refused():
    with pytest.raises(ValueError, match="30x32 is no whole number of 4x4"):
        DINOv2(64, depth=1, patch=4, grid=8)(noise(1, 3, 30, 32))


# ------------------------------------------------------------------------------------------------------------
# targets

def cubic(x, n):
    """Resize the last axis to n by Keys' cubic with a = -0.75 at half-pixel centres, the border repeated."""
    at = (np.arange(n) + 0.5) * x.shape[-1] / n - 0.5
    out, a = 0, -0.75
    for tap in range(-1, 3):
        i = np.floor(at).astype(int) + tap
        d = np.abs(at - i)
        w = np.where(d <= 1, (a + 2) * d ** 3 - (a + 3) * d ** 2 + 1,
                     a * d ** 3 - 5 * a * d ** 2 + 8 * a * d - 4 * a)
        out = out + w * x[..., i.clip(0, x.shape[-1] - 1)]
    return out


def test_targets_see_the_imagenet_normalised_image_resized_by_the_cubic():
    net = DINOv2(64, depth=1)
    net.forward = lambda x: x
    images = noise(2, 3, 32, 48).clamp(-1, 1)
    x = (images.double().numpy() + 1) / 2
    x = (x - np.reshape([0.485, 0.456, 0.406], (3, 1, 1))) / np.reshape([0.229, 0.224, 0.225], (3, 1, 1))
    x = cubic(cubic(x, 6 * 14).swapaxes(2, 3), 4 * 14).swapaxes(2, 3)
    assert gap(net.targets(images, (4, 6)), x) < 1e-4       # float32 places the samples to 1e-6 pixels
    assert gap(net.targets(images, (4, 6), antialias=True), x) > 0.1


def test_targets_with_antialias_see_what_pillow_makes():
    net = DINOv2(64, depth=1)
    net.forward = lambda x: x
    images = noise(1, 3, 32, 32).clamp(-1, 1)
    seen = net.targets(images, 4, antialias=True)[0]
    for ours, image, mean, std in zip(seen, (images[0].numpy() + 1) / 2, dino.MEAN, dino.STD):
        assert gap(ours * std + mean, np.array(Image.fromarray(image).resize((56, 56), Image.BICUBIC))) < 1e-5


@pytest.mark.parametrize("i,j", [(0, 0), (0, 7), (2, 5), (5, 2), (7, 7)])
def test_target_i_j_lies_over_latent_i_j(i, j):
    """Without blocks a token sees its own patch alone: what changes is where the mark lies, here in the
    middle of the 8 x 8 pixels under latent (i, j) of a VAE that downsamples by 8."""
    net = random(DINOv2(64, depth=0))
    images = noise(1, 3, 64, 64).clamp(-1, 1)
    marked = images.clone()
    marked[:, :, 8 * i + 2:8 * i + 6, 8 * j + 2:8 * j + 6] = 1.0
    (a, _), (b, _) = net.targets(images, 8), net.targets(marked, 8)
    changed = (a - b).abs().amax((0, 2)).view(8, 8) > 1e-6
    assert changed.nonzero().tolist() == [[i, j]]


def test_targets_are_the_normed_features_of_forward_without_gradients():
    net = random(DINOv2(64, depth=2))
    images = noise(2, 3, 56, 56).clamp(-1, 1).requires_grad_()
    patch, cls = net.targets(images, 4)
    assert not patch.requires_grad and not cls.requires_grad
    x = ((images + 1) / 2 - torch.tensor(dino.MEAN).view(3, 1, 1)) / torch.tensor(dino.STD).view(3, 1, 1)
    p, c = net(x)                       # 56 px are 4 patches already: the resize is the identity
    assert relative(patch, p) < 1e-5 and relative(cls, c) < 1e-5
    back = (patch - net.norm.bias) / net.norm.weight
    assert back.mean(-1).abs().max() < 1e-5 and (back.var(-1, correction=0) - 1).abs().max() < 1e-3


# ------------------------------------------------------------------------------------------------------------
# bf16 and torch.compile

def rounded(net):
    """The network in float32 with its parameters, and what each of its layers takes and gives, in bf16."""
    def to_bf16(x):
        return x.bfloat16().float() if torch.is_tensor(x) else x

    net = copy.deepcopy(net)
    for p in net.parameters():
        p.data = to_bf16(p.data)
    for layer in (m for m in net.modules() if not [*m.children()]):
        layer.register_forward_pre_hook(lambda m, given: tuple(map(to_bf16, given)))
        layer.register_forward_hook(lambda m, given, out: to_bf16(out))
    return net


def assert_bf16_is_rounding(run, low, full):
    """bf16 keeps 8 bits. How far that takes the outputs is measured by rounding between float32 layers:
    what sums in bf16 inside its kernels, too, which depends on the machine, may go up to twice as far."""
    for a, b, c in zip(run(low), run(rounded(full)), run(full)):
        a, b, c = (x.detach().float() for x in (a, b, c))
        assert torch.isfinite(a).all() and relative(a, c) < 0.04
        assert 0.2 < (a - c).norm() / (b - c).norm() < 2


@pytest.mark.parametrize("ffn,registers", [("mlp", 4), ("swiglu", 0)])
def test_bf16_equals_float32_within_rounding(ffn, registers):
    net = random(DINOv2(128, depth=2, ffn=ffn, registers=registers))
    images = noise(2, 3, 64, 64).clamp(-1, 1)
    assert_bf16_is_rounding(lambda n: n.targets(images, 8), copy.deepcopy(net).bfloat16(), net)

    def auto(n):
        with torch.autocast("cpu", torch.bfloat16, enabled=n is low):
            return n.targets(images, 8)
    low = copy.deepcopy(net)
    assert_bf16_is_rounding(auto, low, net)


def test_bf16_heads_equal_float32_within_rounding(heads):
    """To 1% in the mean; a rounding is up to 2^-9."""
    patch = noise(1, 64, 64)
    for head in (Segmenter.load(heads.state("seg")), Depth.load(heads.state("moge"))):
        def auto(n, head=head):
            with torch.autocast("cpu", torch.bfloat16, enabled=n is not head):
                out = n(patch, 8, 112)
                return [out.log_softmax(1) if isinstance(n, Segmenter) else out.log()]
        for a, b in zip(auto(copy.deepcopy(head)), auto(head)):
            a, b = a.detach().float(), b.detach()
            assert a.isfinite().all() and relative(a, b) < 0.04
            assert 1e-5 < (a - b).norm() / b.norm() < 0.01


@torch.no_grad()
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("which", ["mlp", "swiglu", "seg", "moge"])
def test_torch_compile_equals_eager_without_graph_breaks(heads, which, backend):
    if which in ("mlp", "swiglu"):
        net = random(DINOv2(64, depth=1, ffn=which, registers=4 * (which == "mlp")))
        inputs = (noise(1, 3, 42, 56),)
    else:
        net = {"seg": Segmenter, "moge": Depth}[which].load(heads.state(which))
        inputs = noise(1, 16, 64), 4, 28
    torch.compiler.reset()
    ours, eager = torch.compile(net, fullgraph=True, backend=backend)(*inputs), net(*inputs)
    for a, b in zip(ours, eager) if isinstance(eager, tuple) else [(ours, eager)]:
        assert relative(a, b) <= 3e-5


# ------------------------------------------------------------------------------------------------------------
# heads

def seg_miss(g, head, dtype):
    x = g.input("seg.x").to(dtype).flatten(2).transpose(1, 2)
    logits, up = head(x, 8, 8), g.pick("seg.up", head(x, 8, 112))
    return max(gap(logits, wanted(g, "seg.logits", dtype)), gap(up, wanted(g, "seg.up", dtype)))


def test_the_segmentation_head_is_batch_norm_then_convolution(heads, dtype):
    head = Segmenter.load(heads.state("seg"))
    assert isinstance(head.linear, nn.Linear) and head.linear.weight.shape == (21, 64)
    assert seg_miss(heads, head, dtype) <= (F32["seg"] if dtype == torch.float32 else 1e-10)


def test_class_names_and_colors_are_the_data_sets():
    from torchvision.models.segmentation import DeepLabV3_ResNet50_Weights
    assert dino.VOC[1:] == DeepLabV3_ResNet50_Weights.DEFAULT.meta["categories"][1:]
    voc = Segmenter(64, 21)
    colors = dict(zip(voc.names, voc.colors))
    for name, color in {"background": (0, 0, 0), "aeroplane": (128, 0, 0), "bicycle": (0, 128, 0),
                        "person": (192, 128, 128), "tvmonitor": (0, 64, 128)}.items():
        assert colors[name] == color
    ade = Segmenter(64, 150)
    assert len(set(ade.names)) == 150 and len(set(ade.colors)) == 150 and (0, 0, 0) not in ade.colors
    some = {0: "wall", 12: "person", 44: "chest of drawers", 80: "bus", 126: "animal"}
    assert {i: ade.names[i] for i in some} == some


@torch.no_grad()
def moge_miss(g, head, size, dtype):
    grid, pixels = {"112x112": (8, (112, 112)), "120x170": ((8, 12), (120, 170))}[size]
    x = g.input(f"moge.{size}.f0").to(dtype).flatten(2).transpose(1, 2)
    points, mask = head.points(x, grid, pixels)
    raw = torch.cat([points[:, :2] / points[:, 2:], points[:, 2:].log()], 1)
    name, gaps = f"moge.{size}.same.", []
    for part, ours in (("points", raw), ("mask", mask[:, None])):
        gaps.append(gap(g.pick(name + part, ours), wanted(g, name + part, dtype)))
    want = wanted(g, name + "remapped", dtype)
    gaps.append(gap(g.pick(name + "remapped", points.permute(0, 2, 3, 1)), want) / np.abs(want).max())
    assert torch.equal(head(x, grid, pixels), points[:, 2])
    return max(gaps)


@pytest.mark.parametrize("size", ["112x112", "120x170"])
def test_depth_is_moges_head_with_one_map_for_all_four_inputs(heads, size, dtype):
    head = Depth.load(heads.state("moge"))
    assert moge_miss(heads, head, size, dtype) <= (F32["moge"] if dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize("h,w,aspect", [(8, 8, 1), (8, 12, 170 / 120), (120, 170, 170 / 120)])
def test_the_view_plane_is_moges(heads, h, w, aspect, dtype):
    name = f"moge.grid{h}x{w}.uv"
    uv = dino.plane(h, w, aspect, torch.zeros(1))[0].permute(1, 2, 0)
    tol = F32["plane"] if dtype == torch.float32 else 1e-12
    assert gap(heads.pick(name, uv), wanted(heads, name, dtype)) <= tol


def test_four_projections_of_one_map_are_one_with_summed_weights(heads, double):
    head = Depth.load(heads.state("moge"))
    one = copy.deepcopy(head)
    one.projects = one.projects[:1]
    one.projects[0].weight.data = sum(p.weight for p in head.projects)
    one.projects[0].bias.data = sum(p.bias for p in head.projects)
    patch = noise(2, 64, 64).double()
    assert relative(one(patch, 8, 112), head(patch, 8, 112)) < 1e-12


def zero_padding(head, monkeypatch):
    for m in head.modules():
        if isinstance(m, nn.Conv2d):
            m.padding_mode = "zeros"


def v_before_u(head, monkeypatch):
    plane = dino.plane
    monkeypatch.setattr(dino, "plane", lambda *args: plane(*args).flip(1))


def one_group(head, monkeypatch):
    for m in head.modules():
        if isinstance(m, nn.GroupNorm):
            m.num_groups = 1


def first_projection_alone(head, monkeypatch):
    head.projects = head.projects[:1]


def group_eps(head, monkeypatch):
    for m in head.modules():
        if isinstance(m, nn.GroupNorm):
            m.eps = 1e-6


@pytest.mark.parametrize("mutant", [zero_padding, v_before_u, one_group, first_projection_alone, group_eps],
                         ids=lambda m: m.__name__)
def test_a_mutant_of_the_depth_head_misses(heads, mutant, monkeypatch, double):
    head = Depth.load(heads.state("moge"))
    mutant(head, monkeypatch)
    assert moge_miss(heads, head, "120x170", torch.float64) >= 10 * 1e-10


def test_a_mutant_of_the_segmentation_head_misses(heads, monkeypatch, double):
    norm = nn.BatchNorm2d
    monkeypatch.setattr(nn, "BatchNorm2d", lambda dim: norm(dim, eps=1e-6))
    assert seg_miss(heads, Segmenter.load(heads.state("seg")), torch.float64) >= 10 * 1e-10


def neutralised(state, key):
    """The state with one tensor made neutral: gains and variances 1, all else 0."""
    one = key.endswith("running_var") or key.endswith("weight") and state[key].ndim == 1
    return dict(state, **{key: torch.full_like(state[key], float(one))})


@torch.no_grad()
def test_every_tensor_of_the_segmentation_head_moves_its_logits_by_more_than_one_percent(heads):
    """So that agreement on the golden weights means agreement of the whole head."""
    state, x = heads.state("seg"), heads.input("seg.x").flatten(2).transpose(1, 2)
    full = Segmenter.load(state)(x, 8, 8)
    assert len(state) == 6
    for key in state:
        assert relative(Segmenter.load(neutralised(state, key))(x, 8, 8), full) > 0.01, key


@torch.no_grad()
def test_every_tensor_and_branch_of_the_depth_head_moves_its_outputs_by_more_than_one_percent(heads):
    """As above, for points or mask: each tensor in turn, and with weight and bias each projection and
    residual branch."""
    state, x = heads.state("moge"), heads.input("moge.112x112.f0").flatten(2).transpose(1, 2)

    def run(state):
        return Depth.load(state).points(x, 8, 112)

    full = run(state)

    def moved(state):
        return max(relative(a, b) for a, b in zip(run(state), full))

    for key in state:
        assert moved(neutralised(state, key)) > 0.01, key
    branches = [k.removesuffix(".weight") for k in state
                if re.search(r"projects\.\d\.weight|layers\.5\.weight", k)]
    assert len(branches) == 4 + sum(isinstance(m, dino.Residual) for m in Depth.load(state).modules()) > 4
    for name in branches:
        assert moved(neutralised(neutralised(state, f"{name}.weight"), f"{name}.bias")) > 0.01, name


def test_moges_head_has_the_public_parameter_count():
    with torch.device("meta"):
        assert sum(p.numel() for p in Depth().parameters()) == 9_805_380


# ------------------------------------------------------------------------------------------------------------
# files

@pytest.mark.parametrize("sizes", [dict(registers=4), dict(registers=0), dict(registers=2, patch=4, grid=8),
                                   dict(ffn="swiglu"), dict(dim=128, hidden=96),
                                   dict(registers=0, ffn="swiglu", hidden=40)], ids=str)
def test_sizes_come_back_from_a_file_in_metas_layout(tmp_path, sizes):
    net = random(DINOv2(**dict(dict(dim=64, depth=2), **sizes)))
    torch.save(net.state_dict(), tmp_path / "net.pth")
    torch.save(net.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    x = noise(1, 3, 3 * net.patch, 2 * net.patch)
    for source in (tmp_path / "net.pth", str(tmp_path / "old.pth"), net.state_dict()):
        again = DINOv2.load(source)
        assert not again.training
        assert list(again.state_dict()) == list(net.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(again(x), net(x)))


@pytest.fixture(scope="module", params=["plain", "registers", "swiglu"])
def hub(request, tmp_path_factory):
    """A network of transformers with random weights (three heads of 32), the folder that it saved, and that
    folder's state dict."""
    import transformers
    from safetensors.torch import load_file
    name = "Dinov2WithRegisters" if request.param == "registers" else "Dinov2"
    more = dict(num_register_tokens=3) if request.param == "registers" else {}
    config = getattr(transformers, name + "Config")(
        hidden_size=96, num_hidden_layers=2, num_attention_heads=3, image_size=20, patch_size=4,
        use_swiglu_ffn=request.param == "swiglu", **more)
    peer = random(getattr(transformers, name + "Model")(config))
    folder = tmp_path_factory.mktemp("hub") / "dinov2"
    peer.save_pretrained(folder)
    return peer, folder, load_file(folder / "model.safetensors")


@torch.no_grad()
def hub_miss(hub, net, H=20, W=20):
    x = noise(2, 3, H, W)
    return relative(net.tokens(x), hub[0](x).last_hidden_state)


@pytest.mark.parametrize("kind", ["folder", "file", "folder of a .bin", "a .bin", "half"])
def test_transformers_folders_load_as_transformers_reads_them(hub, tmp_path, kind):
    """Its own grid of 5 x 5 patches; with registers, others too (without them Meta adds 0.1 to the size)."""
    peer, folder, state = hub
    source = folder / "model.safetensors" if kind == "file" else str(folder)
    if kind == "half":
        copy.deepcopy(peer).bfloat16().save_pretrained(tmp_path)
        source = tmp_path
    elif kind.endswith(".bin"):
        torch.save(state, tmp_path / "pytorch_model.bin")
        shutil.copy(folder / "config.json", tmp_path)
        source = tmp_path / "pytorch_model.bin" if kind == "a .bin" else tmp_path
    net = dino.load_teacher(source)
    assert (net.blocks[0].attn.heads, net.patch, net.grid) == (3, 4, 5) and not net.training
    assert (hub_miss(hub, net) <= 1e-6) == (kind != "half") and hub_miss(hub, net) < 0.03
    if net.registers and kind != "half":
        assert hub_miss(hub, net, 28, 12) <= 1e-6
    again = DINOv2.load(net.state_dict(), heads=3)                                # and back in Meta's layout
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), net.parameters()))


def other_order(net, monkeypatch):
    """Query and key in alphabetical order, as they lie in the file."""
    for block in net.blocks:
        for p in (block.attn.qkv.weight, block.attn.qkv.bias):
            p.data = torch.cat([p.data[96:192], p.data[:96], p.data[192:]])


def one_and_a_half_heads(net, monkeypatch):
    """64 to a head would be 1.5 heads here: two of 48."""
    for block in net.blocks:
        block.attn.heads = 2


def gates_swapped(net, monkeypatch):
    if not hasattr(net.blocks[0].mlp, "w12"):
        pytest.skip("no gates")
    gate_swapped(net, monkeypatch)


@pytest.mark.parametrize("mutant", [other_order, one_and_a_half_heads, layerscales_swapped, gates_swapped],
                         ids=lambda m: m.__name__)
def test_a_mutant_of_transformers_folder_misses(hub, mutant, monkeypatch):
    net = DINOv2.load(hub[1])
    mutant(net, monkeypatch)
    assert hub_miss(hub, net) >= 1e-3


def test_heads_of_transformers_files_are_configs_the_callers_or_64_wide(hub, tmp_path):
    _, folder, state = hub
    assert DINOv2.load(folder, heads=6).blocks[0].attn.heads == 6
    shutil.copy(folder / "model.safetensors", tmp_path)
    for source in (tmp_path, state):                                  # no config.json is beside
        refused(DINOv2.load, source, "dim 96 is no multiple of 64")
        assert DINOv2.load(source, heads=3).blocks[0].attn.heads == 3
    for text, words in (("[3]", "not a whole JSON file"), ("{", "not a whole JSON file"), ("", "JSON"),
                        ('{"num_attention_heads": 5}', "96 cannot be shared by 5 heads"),
                        ('{"num_attention_heads": "3"}', "no such network"), ("{}", "multiple of 64")):
        (tmp_path / "config.json").write_text(text)
        refused(DINOv2.load, str(tmp_path), words)


def test_damaged_safetensors_are_refused_in_one_line(hub, tmp_path):
    path, whole = tmp_path / "model.safetensors", (hub[1] / "model.safetensors").read_bytes()
    refused(DINOv2.load, tmp_path, str(tmp_path), "no such file, no model.safetensors in it")
    wrong_shape, wrong_type = whole.replace(b'"shape":[9', b'"shape":[8'), whole.replace(b"F32", b"F99", 1)
    for content in (b"", b"1234567", whole[:100], whole[:len(whole) // 2], whole[:-1], b"<!DOCTYPE html>",
                    b"\xff" * 99, wrong_shape, wrong_type):
        path.write_bytes(content)
        refused(DINOv2.load, path, "not a whole safetensors file (begins with")
        refused(Segmenter.load, path, "not a whole safetensors file (begins with")
    load, state = functools.partial(DINOv2.load, heads=3), hub[2]
    key = "encoder.layer.1.attention.attention.key.weight"
    for wrong in ({**state, key: torch.zeros(7)}, {k: v for k, v in state.items() if k != key}):
        refused(load, wrong, key.replace("key", "query"), "no key and value of its shape [96, 96]")
    refused(load, {k: v for k, v in state.items() if "query" not in k}, "Missing key(s)", "attn.qkv")
    refused(load, {**state, "classifier.weight": torch.zeros(7)}, "Unexpected key(s)", "classifier.weight")


def test_safetensors_are_read_as_their_own_library_reads_them(tmp_path):
    """Also Meta's layout, and tensors of every width side by side, which lie at odd places."""
    from safetensors.torch import save_file
    widths = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
    state = {f"t{i}": noise(n, 3, seed=i).to(d) for i, (n, d) in enumerate(zip((1, 5, 0, 7), widths))}
    save_file({**state, "scalar": torch.tensor(2.5)}, tmp_path / "a.safetensors", {"format": "pt"})
    ours = dino.read_safetensors(tmp_path / "a.safetensors")
    for key, v in {**state, "scalar": torch.tensor(2.5)}.items():
        assert ours[key].dtype == v.dtype and torch.equal(ours[key], v)
    net = random(DINOv2(64, 1, patch=4, grid=3))
    save_file(net.state_dict(), tmp_path / "meta.safetensors")
    again = DINOv2.load(tmp_path / "meta.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), net.parameters()))


def test_the_scripts_take_transformers_folder(hub, chain, tmp_path):
    call(train_vae, chain.stage1, f"--dino {hub[1]} --steps 1 --out {tmp_path}/vae")
    assert json.loads((tmp_path / "vae/vae/reals.json").read_text())["dino"] == str(hub[1])
    args = argparse.Namespace(features="dinov2", dino=str(hub[1]))
    cls, name = fid.feature_net(args, "cpu")
    images = torch.arange(2 * 3 * 8 * 8).view(2, 3, 8, 8).to(torch.uint8)
    assert name.startswith("dinov2 ") and cls(images)[0].shape == (2, 96)


def test_names_and_their_order_are_metas(features):
    for variant in ("plain", "reg4", "swiglu"):
        net = DINOv2.load(features.state(variant))
        assert list(net.state_dict()) == [k.split(":")[0] for k in features[f"{variant}.keys"]]


def test_a_loaded_network_shares_no_memory_with_its_source(features):
    state = features.state("plain")
    DINOv2.load(state).norm.weight.data.zero_()
    assert state["norm.weight"].abs().min() > 0


def test_loading_draws_no_random_numbers(features, heads):
    before = torch.get_rng_state()
    DINOv2.load(features.state("plain"))
    Segmenter.load(heads.state("seg"))
    Depth.load(heads.state("moge"))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_width_that_is_no_multiple_of_64_wants_heads(tmp_path):
    torch.save(DINOv2(96, depth=1, heads=3).state_dict(), tmp_path / "net.pth")
    with pytest.raises(UserError, match=r"net\.pth: .*dim 96 is no multiple of 64.*heads="):
        DINOv2.load(tmp_path / "net.pth")
    assert DINOv2.load(tmp_path / "net.pth", heads=3).blocks[0].attn.heads == 3
    with pytest.raises(UserError, match="heads="):
        DINOv2(96)


def test_heads_are_found_in_every_public_layout(tmp_path, heads):
    bare, patch = heads.state("seg"), noise(1, 64, 64)
    want = Segmenter.load(bare)(patch, 8, 56)
    full = dict(bare, **{"decode_head.bn.num_batches_tracked": torch.tensor(7)})
    for layout in (full, {"meta": {"epoch": 1, "CLASSES": ("a",)}, "state_dict": full,
                          "optimizer": {"state": {}}},
                   {k.removeprefix("decode_head."): v for k, v in bare.items()}):
        torch.save(layout, tmp_path / "head.pth")
        assert torch.equal(Segmenter.load(tmp_path / "head.pth")(patch, 8, 56), want)
    bare = heads.state("moge")
    want = Depth.load(bare)(patch, 8, 56)
    model = dict(bare, **{"backbone.cls_token": torch.zeros(1, 1, 64), "image_mean": torch.zeros(1, 3, 1, 1),
                          "image_std": torch.ones(1, 3, 1, 1)})
    for layout in (model, {"model_config": {"remap_output": "exp"}, "model": model},
                   Depth.load(bare).state_dict()):
        torch.save(layout, tmp_path / "model.pt")
        assert torch.equal(Depth.load(tmp_path / "model.pt")(patch, 8, 56), want)


def test_a_public_head_of_ade20ks_150_classes_round_trips(tmp_path, double):
    """A file as mmcv writes it: its batch norm and convolution, in the layout's own modules, give the logits
    of ours."""
    bn, conv, k = nn.BatchNorm2d(64).eval(), nn.Conv2d(64, 150, 1), "decode_head."
    for part, net in (("bn", bn), ("conv_seg", conv)):
        net.load_state_dict({
            n: torch.from_numpy(gen(f"{k}{part}.{n}", tuple(v.shape))) if v.ndim else torch.tensor(9)
            for n, v in net.state_dict().items()})
    state = {f"{k}{part}.{n}": v.float() if v.ndim else v
             for part, net in (("bn", bn), ("conv_seg", conv)) for n, v in net.state_dict().items()}
    meta = {"epoch": 1, "iter": 40000, "CLASSES": tuple(dino.ADE20K), "PALETTE": [[120, 120, 120]] * 150}
    torch.save({"meta": meta, "state_dict": state, "optimizer": {"state": {}, "param_groups": []}},
               tmp_path / "head.pth")
    head, x = Segmenter.load(tmp_path / "head.pth"), noise(2, 64, 5, 7).double()
    assert head.linear.weight.shape == (150, 64) and head.names == dino.ADE20K
    assert len(set(head.colors)) == 150
    logits = head(x.flatten(2).transpose(1, 2), (5, 7), (20, 28))
    assert relative(logits, F.interpolate(conv(bn(x)), (20, 28), mode="bilinear")) < 1e-12
    saved = {f"linear.{n}": v for n, v in head.linear.state_dict().items()}
    refused(Segmenter.load, saved, "conv_seg.weight", "another network?")         # folded is not that layout


def refused(load, source, *words):
    with pytest.raises(UserError) as e:
        load(source)
    text = str(e.value)
    assert "\n" not in text and all(w in text for w in (getattr(source, "name", ""), *words)), text


class Trap:
    """Unpickling this object would create a file."""
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


LOADS = [DINOv2.load, Segmenter.load, Depth.load]


@pytest.mark.parametrize("load", LOADS, ids=["DINOv2", "Segmenter", "Depth"])
def test_damaged_and_malicious_files_are_refused_in_one_line(tmp_path, load):
    path, state = tmp_path / "weights.pth", DINOv2(64, depth=1, patch=2, grid=2).state_dict()
    for new in (True, False):
        torch.save(state, path, _use_new_zipfile_serialization=new)
        whole = path.read_bytes()
        for n in (0, 1, 100, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:n])
            refused(load, path, "not a whole PyTorch weight file")
    path.write_text("<!DOCTYPE html><html><body>403 Forbidden</body></html>")
    refused(load, path, "not a whole PyTorch weight file", "<!DOCTYPE")
    for obj in (Trap(tmp_path / "marker"), {"state_dict": state, "meta": Trap(tmp_path / "marker")}):
        torch.save(obj, path)
        refused(load, path, "mkdir")
        for protocol in (0, 2, 5):
            path.write_bytes(pickle.dumps(obj, protocol))
            refused(load, path)
    assert not (tmp_path / "marker").exists()
    torch.save({"state_dict": state, "meta": {"config": argparse.Namespace(a=1)}}, path)
    refused(load, path, "argparse.Namespace", "state_dict alone")
    for obj in ([1, 2], torch.zeros(3), {"net": {"a": torch.zeros(3)}}, {1: torch.zeros(2)}):
        torch.save(obj, path)
        refused(load, path, "no flat dict of tensors")


def test_another_networks_file_is_refused(tmp_path, features, heads):
    path = tmp_path / "other.pth"
    files = {DINOv2.load: features.state("reg4"), Segmenter.load: heads.state("seg"),
             Depth.load: heads.state("moge")}
    for load in LOADS:
        for other in LOADS:
            if other != load:
                torch.save(files[other], path)
                refused(load, path, "another network?")
        torch.save(nn.Linear(3, 3).state_dict(), path)
        refused(load, path, "another network?")


def test_sizes_that_no_network_has_are_refused_by_name(tmp_path, features, heads):
    reg, moge = features.state("reg4"), heads.state("moge")
    first = "head.upsample_blocks.0.1.layers.2.weight"
    for load, state in ((DINOv2.load, {**reg, "pos_embed": torch.zeros(1, 0, 64)}),
                        (Depth.load, {**moge, first: torch.zeros(8, 16, 3, 3)}),
                        (Depth.load, {**moge, first: torch.zeros(8, 0, 3, 3)})):
        torch.save(state, tmp_path / "odd.pth")
        refused(load, tmp_path / "odd.pth", "odd.pth: ")
    with pytest.raises(UserError, match="dim 64 cannot be shared by 5 heads"):
        DINOv2(64, 1, heads=5)


def test_the_first_wrong_key_is_named(features, heads):
    cases = [(DINOv2.load, features.state("reg4"), "blocks.1.attn.qkv.bias"),
             (Segmenter.load, heads.state("seg"), "bn.running_var"),
             (Depth.load, heads.state("moge"), "upsample_blocks.1.2.layers.3.weight")]
    for load, state, key in cases:
        full = next(k for k in state if k.endswith(key))
        refused(load, {k: v for k, v in state.items() if k != full}, key, "Missing key(s)")
        refused(load, dict(state, **{full: torch.zeros(7)}), key, "size mismatch", "[7]",
                str(list(state[full].shape)))
        refused(load, dict(state, extra=torch.zeros(7)), 'Unexpected key(s) in state_dict: "extra"')


def test_a_file_that_is_not_there_is_named_with_the_public_names(tmp_path):
    for load, name in zip(LOADS, ("vitl14_reg", "vitl14_voc2012", "moge-vitl")):
        with pytest.raises(UserError, match=f"gone.pth: no such file.*{name}"):
            load(tmp_path / "gone.pth")


META = "https://dl.fbaipublicfiles.com/dinov2"
MOGE = "https://huggingface.co/Ruicheng/moge-vitl/resolve/main/model.pt"


@pytest.mark.parametrize("load,name,url,sha", [
    (DINOv2.load, "vitl14", f"{META}/dinov2_vitl14/dinov2_vitl14_pretrain.pth", "d5383ea8"),
    (DINOv2.load, "vitl14_reg", f"{META}/dinov2_vitl14/dinov2_vitl14_reg4_pretrain.pth", "8b6364"),
    (DINOv2.load, "vits14_reg", f"{META}/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth", ""),
    (Segmenter.load, "vitl14_voc2012", f"{META}/dinov2_vitl14/dinov2_vitl14_voc2012_linear_head.pth", ""),
    (Segmenter.load, "vitg14_ade20k", f"{META}/dinov2_vitg14/dinov2_vitg14_ade20k_linear_head.pth", ""),
    (Depth.load, "moge-vitl", MOGE, "da96b09a")])
def test_public_names_go_through_torch_hubs_cache(tmp_path, monkeypatch, load, name, url, sha):
    asked, file = [], "moge-vitl.pt" if url == MOGE else url.split("/")[-1]

    def download(address, path, hash_prefix=None, progress=True):
        asked.append((address, path, hash_prefix or "", progress))
        raise urllib.error.URLError("offline")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(UserError) as e:
        load(name)
    parts = name, url, file, str(tmp_path / "checkpoints")
    assert "\n" not in str(e.value) and all(w in str(e.value) for w in parts)
    assert asked[0][:2] == (url, str(tmp_path / "checkpoints" / file))
    assert asked[0][2].startswith(sha) and asked[0][3]
    torch.save({"a": torch.zeros(3)}, tmp_path / "checkpoints" / file)  # what lies there is read, and refused
    with pytest.raises(UserError, match=file):
        load(name)
    assert len(asked) == 1


def test_a_download_with_another_hash_is_refused_and_not_kept(tmp_path, monkeypatch):
    (tmp_path / "served").write_bytes(b"not those weights")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setitem(dino.BACKBONES, "vitl14", (tmp_path / "served").as_uri())
    with pytest.raises(UserError, match="vitl14: .*invalid hash"):
        DINOv2.load("vitl14")
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [".lock"]


def test_a_public_name_wants_that_networks_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    for depth, message in ((1, r'Missing key\(s\) in state_dict: "blocks.1.norm1.weight"'),
                           (12, r"size mismatch for cls_token: .*\[1, 1, 64\].*\[1, 1, 384\]")):
        state = DINOv2(64, depth=depth).state_dict()
        torch.save(state, tmp_path / "checkpoints" / "dinov2_vits14_reg4_pretrain.pth")
        with pytest.raises(UserError, match=f"vits14_reg4_pretrain.pth: .*{message}") as e:
            DINOv2.load("vits14_reg")
        assert "\n" not in str(e.value)


def test_half_precision_files_are_widened(features, heads):
    """Also those of a head, whose batch norm counts in integers."""
    for load, state in ((DINOv2.load, features.state("reg4")), (Segmenter.load, heads.state("seg")),
                        (Depth.load, heads.state("moge"))):
        net = load({k: v.half() if v.is_floating_point() else v for k, v in state.items()})
        assert {v.dtype for v in net.state_dict().values()} == {torch.float32} and not net.training


@pytest.mark.parametrize("repa, registers, offset", [(False, 0, 0.1), (True, 0, 0), (False, 4, 0),
                                                     (True, 4, 0)])
def test_a_teacher_is_frozen_and_resizes_positions_as_meta_or_repa_does(tmp_path, repa, registers, offset):
    net = random(DINOv2(64, depth=1, patch=4, grid=8, registers=registers))
    torch.save(net.state_dict(), tmp_path / "net.pth")
    teacher = dino.load_teacher(tmp_path / "net.pth", repa=repa)
    assert teacher.offset == offset and teacher.dim == 64 and not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    net.offset = offset
    images = noise(1, 3, 20, 20)
    assert all(torch.equal(a, b) for a, b in zip(teacher.targets(images, 5), net.targets(images, 5)))
    refused(dino.load_teacher, tmp_path / "gone.pth", "no such file")


# ------------------------------------------------------------------------------------------------------------
# pictures

def test_pca_recovers_three_planted_directions():
    g = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(16, 16, generator=g))[0][:, :3]
    amounts = torch.randn(4, 50, 3, generator=g) * torch.tensor([9.0, 3.0, 1.0])
    colors, _ = dino.pca(amounts @ axes.T)
    for c in range(3):
        inside = (colors[..., c] > 0) & (colors[..., c] < 1)
        pairs = torch.stack([colors[..., c][inside], amounts[..., c][inside]])
        assert abs(torch.corrcoef(pairs)[0, 1]) > 0.98


def test_a_basis_gives_other_features_the_same_colors():
    features, other = noise(2, 25, 16), noise(1, 25, 16, seed=1)
    colors, basis = dino.pca(features)
    assert torch.equal(dino.pca(features, basis)[0], colors) and colors.shape == (2, 25, 3)
    assert colors.min() == 0 and colors.max() == 1
    both = torch.cat([features, other])
    assert torch.allclose(dino.pca(both, basis)[0][2:], dino.pca(other, basis)[0], atol=1e-6)
    assert not torch.allclose(dino.pca(both, basis)[0], dino.pca(both)[0], atol=1e-2)


def test_foreground_is_what_touches_the_border_less_whatever_the_sign():
    truth = torch.zeros(2, 8, 8, dtype=torch.bool)
    truth[0, 2:6, 3:7], truth[1, 1:4, 1:5] = True, True
    axis, rest = noise(16), 0.05 * noise(2, 64, 16, seed=1)
    for sign in (1, -1):
        assert torch.equal(dino.foreground(sign * (truth.flatten(1)[..., None] * axis + rest)), truth)


def test_magma_goes_through_its_anchors_in_equal_steps_and_depth_is_bright_where_near():
    x = torch.tensor([[[0, .25, .5, .75, 1, .125]]])
    halfway = [(a + b) / 2 for a, b in zip(dino.MAGMA[0], dino.MAGMA[1])]
    colors = dino.magma(x)[0, :, 0].T
    assert colors.dtype == torch.uint8 and colors[:5].tolist() == dino.MAGMA
    assert (colors[5] - torch.tensor(halfway)).abs().max() <= 0.5
    depth = torch.linspace(1, 10, 64).view(1, 8, 8)
    gray = dino.color_depth(torch.cat([depth, 3 * depth])).float().mean(1).flatten(1)
    assert (gray[:, :-1] >= gray[:, 1:]).all()
    assert torch.equal(gray[0], gray[1])                    # each image by its own range
    assert (gray[0, 0], gray[0, -1]) == (sum(dino.MAGMA[4]) / 3, sum(dino.MAGMA[0]) / 3)
