"""vae.py against diffusers, closed forms, golden crops, and files of every layout and kind of damage."""
import copy
import datetime
import errno
import hashlib
import importlib
import io
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, call, relative
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_pre_hook

import dino
import fid
import sit
import vae as V
from vae import UserError

SMALL = dict(ch=32, mult=(1, 2, 4), blocks=2, z_channels=4)


def drawn(model, seed=0):
    """Every parameter non-zero, with gains and biases that matter."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=g, dtype=torch.float64)
            gain = 1 if "norm" in name and "weight" in name else 0
            p.copy_(noise / math.sqrt(p[0].numel()) if p.ndim > 1 else 0.3 * noise + gain)
    return model


def sizes(model):
    """A VAE's settings with the number of groups in use, as they are read from public files."""
    return {**model.settings, "groups": model.groups}


def images(*shape, seed=1):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def small():
    return drawn(V.VAE(**SMALL)).eval()


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory):
    path = tmp_path_factory.mktemp("vae")
    small.save(path)
    return path


# ------------------------------------------------------------------------------------------------ the network


def test_full_size_has_the_public_parameter_count():
    model = V.VAE()

    def count(m):
        return sum(p.numel() for p in m.parameters())

    assert count(model) == 83_653_863 and len(model.state_dict()) == 248
    assert count(model.encoder) == 34_163_592 and count(model.decoder) == 49_490_179


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (32, 48)])
def test_equals_diffusers(small, folder, size):
    from diffusers import AutoencoderKL
    theirs = AutoencoderKL.from_pretrained(folder).eval()
    g = torch.Generator().manual_seed(2)
    x, z = images(2, 3, *size), torch.randn(2, 4, size[0] // 4, size[1] // 4, generator=g)
    with torch.no_grad():
        a, b = small.encode(x), theirs.encode(x).latent_dist
        assert relative(a.mean, b.mean) < 1e-5 and relative(a.std, b.std) < 1e-5
        assert relative(a.kl(), b.kl()) < 1e-5
        assert relative(small.decode(z), theirs.decode(z).sample) < 1e-5


@pytest.mark.parametrize("settings", [
    dict(ch=16, mult=(1, 2, 4, 4)), dict(ch=16, mult=(1, 1, 2, 2, 4), z_channels=32),
    dict(ch=16, mult=(1, 2), z_channels=8),
    dict(ch=16, mult=(1, 3, 2), z_channels=16, blocks=1, groups=4)], ids=str)
def test_other_widths_equal_diffusers(tmp_path, settings):
    """Both ways at relative 1e-5, every gain and bias drawn; and the folder gives back the sizes."""
    from diffusers import AutoencoderKL
    ours = drawn(V.VAE(**settings), seed=3).eval()
    ours.save(tmp_path)
    theirs = AutoencoderKL.from_pretrained(tmp_path).eval()
    g = torch.Generator().manual_seed(2)
    x, z = images(2, 3, 64, 96), torch.randn(2, ours.z_channels, 64 // ours.f, 96 // ours.f, generator=g)
    with torch.no_grad():
        a, b = ours.encode(x), theirs.encode(x).latent_dist
        assert relative(a.mean, b.mean) <= 1e-5 and relative(a.std, b.std) <= 1e-5
        assert relative(ours.decode(z), theirs.decode(z).sample) <= 1e-5
    again = V.VAE.load(tmp_path)
    assert again.settings == ours.settings and V.fingerprint(again) == V.fingerprint(ours)
    (tmp_path / "reals.json").unlink()                       # and so do the tensors, as of a public folder
    again = V.VAE.load(tmp_path)
    assert again.settings == sizes(ours) and V.fingerprint(again) == V.fingerprint(ours)


TODAY = {   # config.json's fields that set the VAEs of these families apart
    "SD3": dict(latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False,
                use_post_quant_conv=False, sample_size=1024),
    "Flux": dict(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False,
                 use_post_quant_conv=False, sample_size=1024, mid_block_add_attention=True),
    "one convolution": dict(latent_channels=4, use_post_quant_conv=False, scaling_factor=0.5),
    "SDXL": dict(latent_channels=4, scaling_factor=0.13025, sample_size=1024, force_upcast=True)}


def of_today(family):
    """A small VAE of diffusers' making, of one of these families, every weight drawn."""
    from diffusers import AutoencoderKL
    levels = dict(down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3)
    sizes = dict(block_out_channels=[16, 32, 32], layers_per_block=1, norm_num_groups=8, **levels)
    return drawn(AutoencoderKL(**sizes, **TODAY[family]), seed=5).eval()


@pytest.mark.parametrize("family", TODAY)
def test_the_vaes_of_today_are_read_as_diffusers_reads_them_and_written_back(tmp_path, family):
    """Both ways at relative 1e-5; and what their own generators see is factor times (z - shift)."""
    from diffusers import AutoencoderKL
    theirs, x = of_today(family), images(2, 3, 32, 48)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = V.VAE.load(tmp_path / "theirs")
    ours.save(tmp_path / "ours")
    back = AutoencoderKL.from_pretrained(tmp_path / "ours").eval()
    for key, value in theirs.config.items():
        assert key.startswith("_") or back.config[key] == value, key
    with torch.no_grad():
        expected = theirs.encode(x).latent_dist.mean
        drawing = theirs.decode(expected).sample
        for again in (ours, V.VAE.load(tmp_path / "ours")):
            assert relative(again.encode(x).mean, expected) <= 1e-5
            assert relative(again.decode(expected), drawing) <= 1e-5
        assert torch.equal(back.encode(x).latent_dist.mean, expected)
    norm = V.Normalizer(own=(ours.factor, ours.shift))
    seen = (expected - (theirs.config.shift_factor or 0.0)) * theirs.config.scaling_factor
    assert relative(norm.encode(expected), seen) < 1e-6 and relative(norm.decode(seen), expected) < 1e-6
    again = V.Normalizer(**json.loads(json.dumps(norm.state_dict())))
    assert torch.equal(again.encode(expected), norm.encode(expected))


@pytest.mark.parametrize("family", ["SD3", "SDXL"])
def test_a_file_without_config_says_by_its_tensors_what_it_is(tmp_path, family):
    theirs = of_today(family)
    torch.save(theirs.state_dict(), tmp_path / "bare.pt")
    with pytest.raises(UserError, match="widths .* are no multiples"):
        V.VAE.load(folder_with(tmp_path / "wrong", theirs, norm_num_groups=7))
    with pytest.raises(UserError, match="use_quant_conv is .* by its tensors, but .* in config.json"):
        V.VAE.load(folder_with(tmp_path / "other", theirs, use_quant_conv=family == "SD3"))
    ours = V.VAE.load(tmp_path / "bare.pt")
    assert ours.settings["quant"] == (family == "SDXL") and ours.z_channels == theirs.config.latent_channels
    assert (ours.factor, ours.shift) == (0.18215, 0.0)
    ours = V.VAE(**{**ours.settings, "groups": 8})             # which no tensor says
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        x = images(1, 3, 32, 32)
        assert relative(ours.encode(x).mean, theirs.encode(x).latent_dist.mean) <= 1e-5


def folder_with(path, theirs, **fields):
    theirs.save_pretrained(path)
    config = V.read_json(path / "config.json")
    V.save({**config, **fields}, path / "config.json")
    return path


def test_half_precision_and_files_in_parts_are_read(tmp_path):
    theirs = of_today("Flux")
    whole = {k: v.clone() for k, v in theirs.state_dict().items()}
    theirs.save_pretrained(tmp_path / "parts", max_shard_size="100KB")
    assert len(list((tmp_path / "parts").glob("*-of-*.safetensors"))) > 2
    state = V.VAE.load(tmp_path / "parts").state_dict()
    assert state.keys() == whole.keys() and all(torch.equal(state[k], whole[k]) for k in whole)
    next((tmp_path / "parts").glob("*-00002-of-*")).unlink()
    with pytest.raises(UserError, match="00002-of-.*: no such file"):
        V.VAE.load(tmp_path / "parts")
    theirs.half().save_pretrained(tmp_path / "half", variant="fp16")
    state = V.VAE.load(tmp_path / "half").state_dict()
    assert all(torch.equal(state[k], whole[k].half().float()) for k in whole)


@pytest.mark.parametrize("fields", [dict(scaling_factor="0.18"), dict(shift_factor=float("nan"))])
def test_a_factor_that_is_no_number_is_refused(tmp_path, fields):
    with pytest.raises(UserError, match="config.json's factor .* is no number"):
        V.VAE.load(folder_with(tmp_path, of_today("SDXL"), **fields))


@pytest.mark.parametrize("index", [{}, {"weight_map": ["a"]}, {"weight_map": {"a": 1}}])
def test_an_index_without_its_map_is_refused(tmp_path, index):
    V.save(index, tmp_path / "diffusion_pytorch_model.safetensors.index.json")
    with pytest.raises(UserError, match="index.json: no weight_map"):
        V.VAE.load(tmp_path)


@pytest.mark.parametrize("kind", ["AutoencoderKLWan", "AutoencoderKLQwenImage"])
def test_a_vae_of_videos_is_refused_in_one_line(tmp_path, kind):
    import diffusers
    theirs = getattr(diffusers, kind)(base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1,
                                      temperal_downsample=[False])
    theirs.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"no AutoencoderKL of images, but .*{kind}"):
        V.VAE.load(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="of videos"):
        V.VAE.load(tmp_path)


def test_every_branch_matters(small):
    """Each residual block's branch and both attentions move the output by over 1%."""
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        full = small.decode(small.encode(x).mean)
        for name, module in small.named_modules():
            if isinstance(module, (V.ResBlock, V.Attention)):
                last = module.conv2 if isinstance(module, V.ResBlock) else module.to_out[0]
                kept = last.weight.clone(), last.bias.clone()
                last.weight.zero_(), last.bias.zero_()
                assert relative(small.decode(small.encode(x).mean), full) > 0.01, name
                last.weight.copy_(kept[0]), last.bias.copy_(kept[1])


MUTANTS = {
    "pad on the left and top": (V.Downsample, "forward", lambda s, x: s.conv(F.pad(x, (1, 0, 1, 0)))),
    "bilinear upsampling": (V.Upsample, "forward",
                            lambda s, x: s.conv(F.interpolate(x, scale_factor=2.0, mode="bilinear"))),
    "gelu for silu": (V.F, "silu", F.gelu),
    "attention without scale": (V.F, "scaled_dot_product_attention",
                                lambda q, k, v: (q @ k.transpose(-1, -2)).softmax(-1) @ v),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_miss_by_ten_tolerances(small, monkeypatch, name):
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        right = small.decode(small.encode(x).mean)
        monkeypatch.setattr(*MUTANTS[name])
        assert relative(small.decode(small.encode(x).mean), right) > 1e-4


def test_norm_eps_is_1e6_in_float64(folder):
    """Float32 cannot show the eps of the norms; float64 against diffusers can, and another eps misses by
    far."""
    from diffusers import AutoencoderKL
    ours, theirs = V.VAE.load(folder).double(), AutoencoderKL.from_pretrained(folder).double()
    x = images(1, 3, 32, 32).double()
    with torch.no_grad():
        right = theirs.decode(theirs.encode(x).latent_dist.mean).sample
        assert relative(ours.decode(ours.encode(x).mean), right) < 1e-10
        for m in ours.modules():
            if isinstance(m, torch.nn.GroupNorm):
                m.eps = 1e-5
        assert relative(ours.decode(ours.encode(x).mean), right) > 1e-9


def test_bf16_equals_float32_within_its_rounding(small):
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        full = small.decode(small.encode(x).mean)
        with torch.autocast("cpu", torch.bfloat16):
            half = small.decode(small.encode(x).mean)
    assert half.dtype == torch.bfloat16 and relative(half.float(), full) < 0.1


@pytest.mark.slow
def test_compiled_equals_eager(small, folder):
    x, other = images(1, 3, 32, 32), V.VAE.load(folder)
    other.encoder.compile()
    other.decoder.compile()
    with torch.no_grad():
        assert relative(other.decode(other.encode(x).mean), small.decode(small.encode(x).mean)) < 1e-4


def test_gaussian_is_the_closed_form():
    moments = torch.randn(3, 8, 4, 4, generator=torch.Generator().manual_seed(0)) * 3
    moments[0, 4:] = 100
    q = V.Gaussian(moments)
    assert q.logvar.max() == 20
    p = torch.distributions.Normal(q.mean[1:].double(), q.std[1:].double())
    kl = torch.distributions.kl_divergence(p, torch.distributions.Normal(0.0, 1.0)).sum((1, 2, 3))
    assert relative(q.kl()[1:], kl) < 1e-6
    noise = torch.randn_like(q.mean)
    assert torch.equal(q.sample(noise), q.mean + q.std * noise)      # Eq. 1
    assert V.Gaussian(moments.bfloat16()).kl().dtype == torch.float32


def test_a_new_vae_starts_with_log_variance_minus_four():
    q = V.VAE(16, (1, 2), 1).encode(images(1, 3, 16, 16))
    assert torch.equal(q.logvar, torch.full_like(q.logvar, -4))


def test_moments_are_the_posteriors_mean_and_log_variance(small):
    x = images(2, 3, 16, 24)
    with torch.no_grad():
        moments, q = small.moments(x), small.encode(x)
    assert moments.shape == (2, 8, 4, 6) and torch.equal(moments[:, :4], q.mean)
    assert torch.equal(moments[:, 4:].clamp(-30, 20), q.logvar)


def test_settings_are_the_constructors_arguments():
    own = dict(ch=16, mult=[1, 2], blocks=1, z_channels=4, groups=None)
    assert V.VAE(16, (1, 2), 1).settings == own | dict(quant=True, post_quant=True, factor=0.18215, shift=0.0)
    assert V.VAE(16, (1, 2), 1).groups == 16 and V.VAE(64, (1, 2), 1, groups=8).groups == 8
    assert V.Align(4, 24, 1, 7).settings == dict(z_channels=4, dim=24, layers=1, hidden=7, features="both")
    with pytest.raises(UserError, match=r"widths \[48, 96\] .* no multiples of 32 groups"):
        V.VAE(48, (1, 2))


class Louder(V.VAE):
    """A network with one argument more, as a reader of the code may write it."""

    def __init__(self, *sizes, gain=1.0, **named):
        super().__init__(*sizes, **named)
        self.settings["gain"] = self.gain = gain

    def decode(self, z):
        return self.gain * super().decode(z)


def test_an_argument_more_lives_through_settings_a_folder_and_its_loading(small, folder, tmp_path):
    order = dict(memory_format=torch.channels_last)          # as it is loaded, hence to the bit
    model, small = drawn(Louder(**SMALL, gain=3.0)).eval().to(**order), copy.deepcopy(small).to(**order)
    model.save(tmp_path)
    again, z = Louder.load(tmp_path), torch.randn(1, 4, 3, 3)
    assert again.settings == model.settings == {**small.settings, "gain": 3.0}
    with torch.no_grad():
        assert torch.equal(again.decode(z), model.decode(z))
        assert torch.equal(again.decode(z), 3 * small.decode(z))
    with pytest.raises(UserError, match="safetensors: its settings make no VAE: .*'gain'") as e:
        V.VAE.load(tmp_path)
    assert "\n" not in str(e.value)
    assert Louder.load(folder).gain == 1.0                   # a folder that does not know it has the default


# ----------------------------------------------------------------------------------------------- weight files


def compvis(state, levels):
    """Our names -> CompVis', written from facts about that code, not from vae.py's rules."""
    out = {}
    for k, v in state.items():
        parts = k.split(".")
        if "down_blocks" in k:
            i, kind = parts[2], parts[3]
            block, change = ".".join(parts[4:]), ".".join(parts[5:])
            k = f"encoder.down.{i}." + (f"block.{block}" if kind == "resnets" else f"downsample.{change}")
        elif "up_blocks" in k:
            i, kind = levels - 1 - int(parts[2]), parts[3]
            block, change = ".".join(parts[4:]), ".".join(parts[5:])
            k = f"decoder.up.{i}." + (f"block.{block}" if kind == "resnets" else f"upsample.{change}")
        elif "mid_block.resnets" in k:
            k = f"{parts[0]}.mid.block_{int(parts[3]) + 1}." + ".".join(parts[4:])
        elif "mid_block.attentions" in k:
            rest = ".".join(parts[4:]).replace("group_norm", "norm").replace("to_out.0", "proj_out")
            rest = rest.replace("to_q", "q").replace("to_k", "k").replace("to_v", "v")
            k = f"{parts[0]}.mid.attn_1.{rest}"
            v = v[:, :, None, None] if v.ndim == 2 else v
        k = k.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        out[k] = v
    return out


def old_diffusers(state):
    swap = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    out = {}
    for k, v in state.items():
        for new, old in swap.items():
            k = k.replace(new, old)
        out[k] = v
    return out


def four_d(state):
    """With matrices as the 1 x 1 convolutions that they once were."""
    return {k: v[:, :, None, None] if v.ndim == 2 else v for k, v in state.items()}


OTHERS = {"loss.logvar": torch.zeros(()), "model_ema.decay": torch.zeros(())}
LAYOUTS = {
    "safetensors": lambda s, p: V.write_safetensors(s, p / "a.safetensors"),
    "bin": lambda s, p: torch.save(s, p / "a.bin"),
    "old diffusers names": lambda s, p: torch.save(old_diffusers(s), p / "a.bin"),
    "old names, 4-D attention": lambda s, p: torch.save(four_d(old_diffusers(s)), p / "a.bin"),
    "new names, 4-D attention": lambda s, p: torch.save(four_d(s), p / "a.bin"),
    "compvis, bare": lambda s, p: torch.save(compvis(s, 3), p / "a.ckpt"),
    "compvis, state_dict and loss": lambda s, p: torch.save(
        {"epoch": 3, "state_dict": {**compvis(s, 3), **OTHERS}}, p / "a.ckpt"),
    "inside an LDM": lambda s, p: torch.save({"state_dict": {
        **{f"first_stage_model.{k}": v for k, v in compvis(s, 3).items()},
        "model.diffusion_model.x": torch.zeros(2)}}, p / "a.ckpt"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads(small, tmp_path, layout):
    LAYOUTS[layout](small.state_dict(), tmp_path)
    (file,) = tmp_path.iterdir()
    drawn = torch.get_rng_state()
    loaded = V.VAE.load(file)
    assert torch.equal(torch.get_rng_state(), drawn)             # loading draws no random numbers
    assert loaded.settings == sizes(small) and V.fingerprint(loaded) == V.fingerprint(small)


def test_diffusers_own_folders_load(tmp_path):
    """A folder that diffusers wrote, with its own norm groups, as safetensors and as .bin: 16 latent
    channels, f16."""
    from diffusers import AutoencoderKL
    down, up = ["DownEncoderBlock2D"] * 5, ["UpDecoderBlock2D"] * 5
    theirs = AutoencoderKL(block_out_channels=(16, 16, 32, 32, 32), latent_channels=16, norm_num_groups=8,
                           layers_per_block=1, down_block_types=down, up_block_types=up).eval()
    for safe in (True, False):
        theirs.save_pretrained(tmp_path / str(safe), safe_serialization=safe)
        ours, x = V.VAE.load(tmp_path / str(safe)), images(1, 3, 64, 64)
        assert (ours.f, ours.z_channels, ours.settings["groups"]) == (16, 16, 8)
        with torch.no_grad():
            assert relative(ours.encode(x).mean, theirs.encode(x).latent_dist.mean) < 1e-5


def test_each_type_of_tensor_reads_as_the_library_wrote_it(tmp_path):
    library = pytest.importorskip("safetensors.torch")
    numbers = torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 8.0]])
    state = {name: numbers.to(dtype) for name, dtype in V.DTYPES.items()}
    odd = {"scalar": torch.tensor(5.0), "none": torch.zeros(0, 3)}
    library.save_file(state | odd, tmp_path / "a.safetensors")
    found = V.read(tmp_path / "a.safetensors")
    assert found.keys() == state.keys() | odd.keys() and found["none"].shape == (0, 3)
    assert found["scalar"].item() == 5 and found["F8_E4M3"].dtype == torch.float8_e4m3fn
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name].float(), tensor.float())
    V.write_safetensors(state, tmp_path / "b.safetensors")
    assert all(torch.equal(v.float(), state[k].float())
               for k, v in library.load_file(tmp_path / "b.safetensors").items())


def test_a_large_file_of_another_kind_is_refused_unread(tmp_path, monkeypatch):
    """Its first eight bytes, taken for a header's length, would ask for all of it."""
    parsed = []
    monkeypatch.setattr(V.json, "loads", parsed.append)
    (tmp_path / "a.safetensors").write_bytes(b"\x7fELF" + bytes(2) + b"\1\0" + bytes(2**20))
    with pytest.raises(UserError, match="not a whole weight file"):
        V.read(tmp_path / "a.safetensors")
    assert not parsed


def test_a_runs_folder_holds_heads_and_statistics(small, tmp_path):
    align, info = V.Align(4, 24, layers=4, hidden=16), {"latents": {"mean": 0.5}}
    small.save(tmp_path / "vae", align, info)
    loaded, heads = V.VAE.load(tmp_path), V.Align.load(tmp_path)
    assert loaded.info == {"vae": small.settings, "align": align.settings, **info}
    assert loaded.folder == tmp_path / "vae" and not loaded.training and not heads.training
    assert V.fingerprint(loaded) == V.fingerprint(small) and heads.settings == align.settings
    z = torch.randn(2, 4, 3, 5)
    assert all(torch.equal(a, b) for a, b in zip(heads(z), align(z)))
    other = tmp_path / "vae/other.safetensors"
    shutil.copy(tmp_path / "vae/diffusion_pytorch_model.safetensors", other)
    assert V.Align.load(other).settings == align.settings
    (tmp_path / "bare").mkdir()
    shutil.copy(other, tmp_path / "bare")
    for source in (tmp_path / "bare", V.VAE.load(tmp_path / "bare/other.safetensors").folder,
                   "sd-vae-ft-ema"):
        with pytest.raises(UserError, match="no align.safetensors beside this VAE"):
            V.Align.load(source)


def test_a_folder_without_heads_says_so(small, tmp_path):
    small.save(tmp_path)
    assert V.read_json(tmp_path / "reals.json") == {"vae": small.settings, "align": None}
    assert V.VAE.load(tmp_path).settings == small.settings and not (tmp_path / "align.safetensors").exists()


def test_heads_that_do_not_fit_their_settings_are_refused_in_one_line(small, tmp_path):
    align = V.Align(4, 24)
    small.save(tmp_path, align)

    def refused(message):
        with pytest.raises(UserError, match=message) as e:
            V.Align.load(tmp_path)
        assert "\n" not in str(e.value)

    V.write_safetensors(small.state_dict(), tmp_path / "align.safetensors")
    refused(r'align.safetensors: Missing key\(s\) in state_dict: "patch.0.weight"')
    V.write_safetensors(V.Align(8, 24).state_dict(), tmp_path / "align.safetensors")
    refused("align.safetensors: size mismatch for patch.0.weight: ")
    V.write_safetensors({**align.state_dict(), "x": torch.zeros(1)}, tmp_path / "align.safetensors")
    refused(r'align.safetensors: Unexpected key\(s\) in state_dict: "x"')
    V.write_safetensors(align.state_dict(), tmp_path / "align.safetensors")
    V.save({"vae": small.settings, "align": {**align.settings, "layers": "two"}}, tmp_path / "reals.json")
    refused("align.safetensors: its settings make no Align: ")
    V.save({"vae": small.settings, "align": None}, tmp_path / "reals.json")
    refused("align.safetensors: its settings make no Align: ")
    (tmp_path / "reals.json").unlink()
    refused("reals.json: no such file")


class Bomb:
    def __reduce__(self):
        return os.system, ("touch /tmp/never-made-by-reals",)


def spoilt(kind, good, path):
    whole = good.read_bytes()
    if kind == "truncated safetensors":
        path = path / "a.safetensors"
        path.write_bytes(whole[:len(whole) // 2])
    elif kind == "offsets outside":
        path = path / "a.safetensors"
        n = int.from_bytes(whole[:8], "little")
        header = json.loads(whole[8:8 + n])
        header["quant_conv.bias"]["data_offsets"] = [10**9, 10**9 + 32]
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + n:])
    elif kind == "header longer than the file":
        path = path / "a.safetensors"
        path.write_bytes((10**15).to_bytes(8, "little") + b"{}")
    elif kind == "empty":
        path = path / "a.safetensors"
        path.write_bytes(b"")
    elif kind.startswith("html,"):
        path = path / f"a.{kind.split()[1]}"
        path.write_bytes(b"<!DOCTYPE html><title>404</title>")
    elif kind == "pickle that runs code":
        path = path / "a.pth"
        path.write_bytes(pickle.dumps({"a": Bomb()}))
    elif kind == "truncated pth":
        path, buffer = path / "a.pth", io.BytesIO()
        torch.save(V.read(good), buffer)
        path.write_bytes(buffer.getvalue()[:5000])
    elif kind == "another network":
        path = path / "a.pth"
        torch.save({"cls_token": torch.zeros(1, 1, 8)}, path)
    elif kind == "a key too many":
        path = path / "a.pth"
        torch.save({**V.read(good), "extra.weight": torch.zeros(1)}, path)
    elif kind == "a key missing":
        path = path / "a.pth"
        torch.save({k: v for k, v in V.read(good).items() if k != "decoder.conv_out.bias"}, path)
    elif kind == "no name":
        path = path / "a.pth"
        torch.save({0: torch.zeros(1)}, path)
    elif kind == "empty tensors that promise much":
        path = path / "a.pth"
        empty = torch.zeros(64000, 0, 3, 3)
        torch.save({k: empty if ".conv1.weight" in k else v for k, v in V.read(good).items()}, path)
    elif kind in ("a scalar, in", "a scalar, out"):
        path = path / "a.pth"
        name = "encoder.conv_out.weight" if "out" in kind else "encoder.down_blocks.1.resnets.0.conv1.weight"
        torch.save({**V.read(good), name: torch.zeros(())}, path)
    elif "config" in kind:
        shutil.copy(good, path)
        config = {**json.loads((good.parent / "config.json").read_text()), "norm_num_groups": 7}
        text = json.dumps([config] if "list" in kind else config)
        (path / "config.json").write_text("<!DOCTYPE html>\n<html></html>" if "html" in kind else text)
    elif kind == "html in reals":
        shutil.copytree(good.parent, path, dirs_exist_ok=True)
        (path / "reals.json").write_text("<!DOCTYPE html>\n<html></html>")
    elif kind.endswith("settings"):
        shutil.copytree(good.parent, path, dirs_exist_ok=True)
        own = V.read_json(path / "reals.json")["vae"]
        odd = {"unknown": {**own, "depth": 3}, "impossible": {**own, "groups": 7}, "list of": [1, 2],
               "text for": {**own, "blocks": "2"}, "other": {**own, "ch": 64}}[kind.removesuffix(" settings")]
        V.save({"vae": odd}, path / "reals.json")
        path = path / "diffusion_pytorch_model.safetensors"
    return path


@pytest.mark.parametrize("kind", [
    "truncated safetensors", "offsets outside", "header longer than the file", "empty", "html, pth",
    "html, safetensors", "pickle that runs code", "truncated pth", "another network", "a key too many",
    "a key missing", "no name", "empty tensors that promise much", "a scalar, in", "a scalar, out",
    "html in config", "list in config", "groups in config", "html in reals", "unknown settings",
    "impossible settings", "text for settings", "other settings", "list of settings"])
def test_spoilt_files_end_in_one_line_that_names_them(folder, tmp_path, kind):
    path = spoilt(kind, folder / "diffusion_pytorch_model.safetensors", tmp_path)
    with pytest.raises(UserError) as e:
        V.VAE.load(path)
    assert path.name in str(e.value) and "\n" not in str(e.value)
    if "html," in kind:
        assert "begins with b'<!DOCTYPE" in str(e.value) and "get it again" in str(e.value)
    if "key" in kind:
        assert ('Unexpected key(s) in state_dict: "extra.weight"' if "many" in kind else
                'Missing key(s) in state_dict: "decoder.conv_out.bias"') in str(e.value)
    if "scalar" in kind:
        key = "encoder.conv_out.weight" if "out" in kind else "encoder.down_blocks.1.resnets.0.conv1.weight"
        assert f"{key} is ()" in str(e.value)
    if "settings" in kind:
        assert ("size mismatch for" if "other" in kind else "its settings make no VAE") in str(e.value)
    if "config" in kind or "reals" in kind:
        assert f"{kind.split()[-1]}.json" in str(e.value)
    assert not os.path.exists("/tmp/never-made-by-reals")


@pytest.mark.parametrize("load, file, url", [
    (lambda: V.VAE.load("sd-vae-ft-mse"), "sd-vae-ft-mse.safetensors", V.PUBLIC["sd-vae-ft-mse"][0]),
    (lambda: V.VAE.load("sd-vae-ft-ema"), "sd-vae-ft-ema.safetensors", V.PUBLIC["sd-vae-ft-ema"][0]),
    (fid.Inception.load, "pt_inception-2015-12-05-6726825d.pth", fid.PUBLIC["inception"][0]),
    (fid.LPIPS.load, "vgg16-397923af.pth", fid.PUBLIC["vgg16"][0]),
    (lambda: fid.LPIPS.load(fid.LPIPS([1] * 13).state_dict(), "lpips"), "lpips-v0.1-vgg.pth",
     fid.PUBLIC["lpips"][0])],
    ids=["sd-vae-ft-mse", "sd-vae-ft-ema", "inception", "vgg16", "lpips"])
def test_offline_the_error_names_file_url_and_folder(tmp_path, monkeypatch, load, file, url):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def offline(*a, **k):
        raise OSError("no route to host")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(UserError) as e:
        load()
    assert "\n" not in str(e.value) and url.startswith("https://")
    for part in (file, url, str(tmp_path / "checkpoints"), "no route to host"):
        assert part in str(e.value)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [".lock"]


def test_a_public_name_comes_from_the_hub_cache_and_is_asked_for_once(small, tmp_path, monkeypatch):
    asked = []

    def download(url, path, hash_prefix=None, progress=True):
        asked.append((url, path))
        V.write_safetensors(small.state_dict(), V.Path(path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        loaded = V.VAE.load("sd-vae-ft-ema")
        assert loaded.settings == sizes(small) and V.fingerprint(loaded) == V.fingerprint(small)
    url = "https://huggingface.co/stabilityai/sd-vae-ft-ema/resolve/main/diffusion_pytorch_model.safetensors"
    assert asked == [(url, str(tmp_path / "checkpoints" / "sd-vae-ft-ema.safetensors"))]


def test_a_download_of_another_hash_is_refused_and_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    (tmp_path / "file").write_bytes(b"not what it was")
    for sha256 in ("0" * 64, "6726825d"):
        with pytest.raises(UserError, match="invalid hash value"):
            V.fetch((tmp_path / "file").as_uri(), "name.pth", sha256)
    assert [p.name for p in (tmp_path / "hub/checkpoints").iterdir()] == [".lock"]
    digest = hashlib.sha256(b"not what it was").hexdigest()
    assert V.fetch((tmp_path / "file").as_uri(), "name.pth", digest[:8]).read_bytes() == b"not what it was"


def test_a_cached_file_of_another_size_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "sd-vae-ft-mse.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="334,643,276"):
        V.VAE.load("sd-vae-ft-mse")


TWO_WANT_ONE_FILE = """
import os, sys, time
sys.path.insert(0, "{root}")
import torch, dino, sit, vae

def download(url, path, hash_prefix=None, progress=True):
    open("{here}/downloads", "a").write(url.split("/")[-1] + " ")
    time.sleep(1)
    open(path, "wb").write(b"weights")

torch.hub.get_dir, torch.hub.download_url_to_file = lambda: "{here}", download

def main():
    vae.start()
    for k, fetch in enumerate((vae.fetch, sit.fetch)):
        path = fetch(f"https://nowhere/{{k}}.pth", f"{{k}}.pth")
        open(f"{here}/{{vae.rank()}}{{k}}", "wb").write(path.read_bytes())
    path = dino.fetch("2", "https://nowhere/2.pth")
    open(f"{here}/{{vae.rank()}}2", "wb").write(path.read_bytes())

vae.run_script(main)
"""


def test_of_several_processes_one_downloads_while_the_others_wait(tmp_path):
    """Each of the three files has its own fetch."""
    (tmp_path / "two.py").write_text(TWO_WANT_ONE_FILE.format(root=ROOT, here=tmp_path))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run([*launch, str(tmp_path / "two.py")], check=True, capture_output=True)
    assert (tmp_path / "downloads").read_text() == "0.pth 1.pth 2.pth "
    assert all((tmp_path / f"{rank}{k}").read_bytes() == b"weights" for rank in (0, 1) for k in (0, 1, 2))


# ------------------------------------------------------------------------------ heads, normaliser, statistics


def test_align_maps_tokens_and_their_mean():
    """Eq. 1: the patch MLP sees each latent vector, the cls MLP their average."""
    align, z = V.Align(3, 8), torch.randn(2, 3, 4, 5)
    patch, cls = align(z)
    assert patch.shape == (2, 20, 8) and cls.shape == (2, 8)
    assert torch.allclose(patch[1, 7], align.patch(z[1, :, 1, 2]), atol=1e-6)
    assert torch.allclose(cls, align.cls(z.mean((2, 3))), atol=1e-6)


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_align_depth_counts_linears(layers):
    linears = [m for m in V.Align(4, 16, layers).patch if isinstance(m, torch.nn.Linear)]
    assert len(linears) == layers and linears[0].in_features == 4 and linears[-1].out_features == 16


@pytest.mark.parametrize("features, left_out", [("patch", "cls"), ("cls", "patch")])
def test_one_mlp_alone_is_that_of_the_pair_and_the_other_is_none(small, tmp_path, features, left_out):
    """Table 5: one seed starts an MLP with the same weights, whatever is kept beside it."""
    torch.manual_seed(3)
    both = V.Align(4, 24, hidden=16)
    torch.manual_seed(3)
    alone, z = V.Align(4, 24, hidden=16, features=features), torch.randn(2, 4, 3, 5)
    kept = {"patch": 0, "cls": 1}[features]
    assert getattr(alone, left_out) is None and alone(z)[1 - kept] is None
    assert torch.equal(alone(z)[kept], both(z)[kept])
    assert {k.split(".")[0] for k in alone.state_dict()} == {features}
    small.save(tmp_path, alone)
    if features == "patch":
        loaded = V.Align.load(tmp_path)
        assert loaded.settings == alone.settings
        assert torch.equal(loaded(z)[0], alone(z)[0]) and loaded(z)[1] is None
    else:
        with pytest.raises(UserError, match="align.safetensors: its run had --features cls, .* no patch MLP"):
            V.Align.load(tmp_path)


def test_normalizer_is_equation_7_and_8_with_the_printed_constants():
    norm = V.Normalizer("max-min", V.PAPER)
    assert abs(norm.scale - 1.3853349) < 1e-6 and abs(norm.shift - 0.0765124) < 1e-6
    z = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    ours, sd = V.PAPER, V.SD_VAE
    our_range, sd_range = ours["max"] - ours["min"], sd["max"] - sd["min"]
    by_hand = (z - ours["mean"]) / our_range * sd_range + sd["mean"]     # Eq. 7
    assert relative(norm.encode(z), 0.18215 * by_hand) < 1e-12
    back = (by_hand - sd["mean"]) / sd_range * our_range + ours["mean"]  # Eq. 8
    assert relative(norm.decode(norm.encode(z)), back) < 1e-12


def test_std_normalisation_gives_the_standard_deviation_asked_for():
    z = torch.randn(64, 4, 8, 8, dtype=torch.float64) * 3 + 1
    stats = V.statistics([z[:10], z[10:]])
    assert abs(stats["std"] - z.std(correction=0)) < 1e-9 and abs(stats["mean"] - z.mean()) < 1e-9
    assert (stats["n"], stats["min"], stats["max"]) == (64, z.min(), z.max())
    assert abs(V.Normalizer("std", stats).encode(z).std() - 0.18215 * 4.58407) < 1e-3
    assert abs(V.Normalizer("std", stats, 1.0).encode(z).std() - 1) < 1e-3
    assert torch.equal(V.Normalizer("none").encode(z), 0.18215 * z)
    with pytest.raises(UserError, match="min"):
        V.Normalizer("max-min", {"mean": 0, "std": 1, "min": None})
    for kind, lacks in (("std", "mean"), ("max-min", "mean"), ("channel", "channel_mean")):
        with pytest.raises(UserError, match=f"normalisation {kind} needs the latents' {lacks}"):
            V.Normalizer(kind)


def channels_apart():
    """Latents [20,3,4,5] whose channels differ in mean and spread."""
    z = torch.randn(20, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return z * torch.tensor([0.1, 1.0, 7.0]).view(3, 1, 1) + torch.tensor([5.0, -2.0, 0.0]).view(3, 1, 1)


def test_statistics_know_each_channels_mean_and_std():
    z = channels_apart()
    stats = V.statistics([z[:3], z[3:4], z[4:]])             # batches of any sizes
    rows = z.transpose(0, 1).reshape(3, -1).numpy()
    assert stats["channel_mean"] == pytest.approx(rows.mean(1).tolist(), rel=1e-9)
    assert stats["channel_std"] == pytest.approx(rows.std(1).tolist(), rel=1e-9)
    assert stats["mean"] == pytest.approx(rows.mean()) and stats["std"] == pytest.approx(rows.std())
    assert (stats["n"], stats["min"], stats["max"]) == (20, rows.min(), rows.max())
    assert json.loads(json.dumps(stats)) == stats            # plain numbers, as files hold them


@pytest.mark.parametrize("std", [None, 0.5])
def test_channel_normalisation_brings_each_channel_to_mean_0_and_the_std_asked_for(std):
    z = channels_apart()
    stats = V.statistics([z])
    norm = V.Normalizer("channel", stats, std)
    by_hand = np.empty(z.shape)
    for c in range(3):
        own = z[:, c].numpy()
        by_hand[:, c] = (own - own.mean()) / own.std() * (std or 1)
    x = norm.encode(z)
    assert relative(x, by_hand) < 1e-12 and relative(norm.decode(x), z) < 1e-12
    assert x.mean((0, 2, 3)).abs().max() < 1e-12
    assert (x.std((0, 2, 3), correction=0) - (std or 1)).abs().max() < 1e-9
    assert norm.encode(z.float()).dtype == torch.float32 and relative(norm.encode(z[0]), by_hand[0]) < 1e-12
    assert norm.std_of(stats) == pytest.approx(std or 1) and "channel" in str(norm)


def test_a_normalizer_is_built_again_from_its_state_and_foretells_the_std():
    z = channels_apart()
    stats = V.statistics([z])
    for kind, std in (("none", None), ("max-min", None), ("std", None), ("std", 2.0),
                      ("channel", None), ("channel", 2.0)):
        norm = V.Normalizer(kind, stats, std)
        again = V.Normalizer(**json.loads(json.dumps(norm.state_dict())))
        assert (again.scale, again.shift) == (norm.scale, norm.shift) and str(again) == str(norm)
        assert torch.equal(again.encode(z), norm.encode(z))
        assert norm.std_of(stats) == pytest.approx(norm.encode(z).std(correction=0).item(), rel=1e-9)


# ------------------------------------------------------------------------------------------- images and draws


def golden_picture(width, height, seed):
    size = height // 8 + 2, width // 8 + 2, 3
    q = np.random.RandomState(seed).randint(0, 256, size=size).astype(np.int64)
    gh, gw = q.shape[:2]
    y, x = np.arange(height) * (gh - 1), np.arange(width) * (gw - 1)
    y0, x0 = np.minimum(y // (height - 1), gh - 2), np.minimum(x // (width - 1), gw - 2)
    fy, fx = (y - y0 * (height - 1))[:, None, None], (x - x0 * (width - 1))[None, :, None]
    top = (width - 1 - fx) * q[y0][:, x0] + fx * q[y0][:, x0 + 1]
    bottom = (width - 1 - fx) * q[y0 + 1][:, x0] + fx * q[y0 + 1][:, x0 + 1]
    den = (height - 1) * (width - 1)
    return ((2 * ((height - 1 - fy) * top + fy * bottom) + den) // (2 * den)).astype(np.uint8)


def test_center_crop_is_adms_byte_for_byte(golden):
    g = golden("images")
    names = [n[:-6] for n in g.d.files if n.endswith(".crc32") and ".to" not in n]
    assert len(names) == 3
    for name in names:
        width, height = map(int, name[2:].split("x"))
        picture = golden_picture(width, height, int(g[f"{name}.seed"]))
        assert zlib.crc32(picture.tobytes()) == int(g[f"{name}.crc32"])
        for size in (256, 64):
            crop = np.asarray(V.center_crop(Image.fromarray(picture), size))
            assert zlib.crc32(crop.tobytes()) == int(g[f"{name}.to{size}.crc32"])


def test_odd_images_are_read_and_bad_ones_named(tmp_path, capsys):
    rgb = (np.indices((40, 30)).sum(0) * 3 % 256).astype(np.uint8)
    for c in "ab":
        (tmp_path / c).mkdir()
    Image.fromarray(rgb).save(tmp_path / "a/gray.png")
    Image.fromarray(np.stack([rgb] * 4, 2), "CMYK").save(tmp_path / "a/cmyk.jpg")
    Image.fromarray(rgb).convert("P").save(tmp_path / "a/palette.png")
    Image.fromarray(rgb.astype(np.uint16) * 256).save(tmp_path / "a/sixteen.png")
    Image.fromarray(rgb[:1, :1]).save(tmp_path / "b/one.png")
    (tmp_path / "b/zbad.jpg").write_bytes(b"\xff\xd8\xff not a jpeg")
    data = V.Images(tmp_path, 32)
    assert data.classes == ["a", "b"] and data.labels.tolist() == [0, 0, 0, 0, 1, 1]
    assert all(data[i][0].shape == (3, 32, 32) for i in range(5))
    gray, sixteen = (data[data.paths.index(f"a/{n}.png")][0] for n in ("gray", "sixteen"))
    assert (gray.int() - sixteen.int()).abs().max() <= 1        # not clipped to white
    with pytest.raises(UserError, match="zbad.jpg: not a readable image"):
        data[5]
    for i in (0, 5, 5):
        image, label = data.first_readable(i)                # after the last one the first one follows
        assert torch.equal(image, data[0][0]) and label == 0
    named = capsys.readouterr().out
    assert named.count("\n") == 1 and named.count("zbad.jpg: not a readable image") == 1
    assert "the image after it takes its place" in named
    before = V.Images(tmp_path, 32).fingerprint
    (tmp_path / "b/zbad.jpg").write_bytes(b"longer than before, still not a jpeg")
    assert V.Images(tmp_path, 32).fingerprint != before
    with pytest.raises(UserError, match="no images here"):
        V.Images(tmp_path / "nowhere", 32)


def test_a_hundred_unreadable_files_in_a_row_end_in_one_line_and_each_is_named_once(tmp_path, capsys):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="100 files in a row are not readable images, from 1.png on") as e:
        V.Images(tmp_path, 8).first_readable(1)
    named = capsys.readouterr().out
    assert "\n" not in str(e.value)
    assert all(named.count(f"{i}.png: not a readable image") == 1 for i in range(3))


class Archive(V.Images):
    """Images in a zip file, by the three functions that say where files come from."""

    def find(self):
        return zipfile.ZipFile(self.root).namelist()

    def open(self, path):
        return zipfile.ZipFile(self.root).open(path)

    def bytes(self, path):
        return zipfile.ZipFile(self.root).getinfo(path).file_size


def test_an_archive_of_images_is_the_folder_that_it_holds(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as z:
        names = "b/2.png", "a/10.png", "a/1.jpg", "a/notes.txt", "a/.hidden.png", "b/broken.png"
        for k, name in enumerate(names):
            path = tmp_path / "folder" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith(("txt", "broken.png")):
                path.write_bytes(b"no picture")
            else:
                Image.fromarray(np.full((12, 16, 3), 40 * k, np.uint8)).save(path)
            z.write(path, name)
    folder, archive = V.Images(tmp_path / "folder", 8), Archive(tmp_path / "images.zip", 8)
    assert archive.paths == folder.paths == ["a/1.jpg", "a/10.png", "b/2.png", "b/broken.png"]
    assert archive.classes == ["a", "b"] and archive.labels.tolist() == folder.labels.tolist() == [0, 0, 1, 1]
    assert archive.fingerprint == folder.fingerprint
    for i in range(3):
        assert torch.equal(archive[i][0], folder[i][0]) and archive[i][1] == folder[i][1]
    with pytest.raises(UserError, match="images.zip/b/broken.png: not a readable image"):
        archive[3]
    for name in ("find", "open", "bytes"):                 # the same for every script, by replacing the three
        monkeypatch.setattr(V.Images, name, getattr(Archive, name))
    replaced = V.Images(tmp_path / "images.zip", 8)
    assert replaced.fingerprint == folder.fingerprint and torch.equal(replaced[2][0], archive[2][0])


def test_pixels_are_read_as_stored_and_splinters_are_no_pictures(tmp_path):
    """An EXIF tag that asks for rotation changes nothing, as in ADM's, DiT's and SiT's readers; 100:1 is a
    picture, 101:1 is none."""
    half = np.zeros((32, 32, 3), np.uint8)
    half[:16] = 255
    exif = Image.Exif()
    exif[274] = 6                                          # "turn by 90 degrees"
    Image.fromarray(half).save(tmp_path / "turned.png", exif=exif)
    assert Image.open(tmp_path / "turned.png").getexif()[274] == 6
    assert np.array_equal(V.Images(tmp_path, 32)[0][0].permute(1, 2, 0), half)
    for name, length in (("long", 200), ("splinter", 202)):
        Image.new("RGB", (length, 2)).save(tmp_path / f"{name}.png")
    data = V.Images(tmp_path, 8)
    assert data.paths == ["long.png", "splinter.png", "turned.png"] and data[0][0].shape == (3, 8, 8)
    with pytest.raises(UserError, match="splinter.png: not a readable image .202 x 2 pixels"):
        data[1]


def test_every_format_that_pillow_reads_is_an_image(tmp_path):
    from PIL import Image
    endings = "jpg jpeg jfif png apng bmp dib webp gif tif tiff ppm pgm pbm tga pcx sgi ico jp2 JPEG".split()
    for i, ending in enumerate(endings):
        mode = {"pbm": "1", "pgm": "L"}.get(ending, "RGB")
        Image.new(mode, (16, 16)).save(tmp_path / f"{i}.{ending}")
    (tmp_path / "notes.txt").write_text("no image")
    images = V.Images(tmp_path, 16)
    assert len(images) == len(endings) and all(images[i][0].shape == (3, 16, 16) for i in range(len(images)))


def test_a_flat_folder_has_no_classes(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    data = V.Images(tmp_path, 8)
    assert data.classes == [] and data[0][1] == -1


def test_a_flat_folder_with_labels_beside_is_like_class_folders(tmp_path):
    """As ImageNet's val is unpacked, with Kaggle's list; its classes are numbered as train's folders are."""
    wnids = {1: "n02", 2: "n01", 3: "n03"}
    for i, wnid in wnids.items():
        for path in (f"flat/ILSVRC2012_val_{i:08d}.JPEG", f"train/{wnid}/{i}.JPEG"):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (50 * i, 0, 0)).save(tmp_path / path, "JPEG")
    lines = [f"ILSVRC2012_val_{i:08d},{wnid} 85 1 499 272 {wnid} 1 1 2 2" for i, wnid in wnids.items()]
    (tmp_path / "flat/labels.csv").write_text("\n".join(["ImageId,PredictionString", *reversed(lines)]))
    flat, train = V.Images(tmp_path / "flat", 8), V.Images(tmp_path / "train", 8)
    assert flat.classes == train.classes == ["n01", "n02", "n03"] and flat.stray == []
    assert [flat[k][1] for k in range(3)] == [1, 0, 2] and [train[k][1] for k in range(3)] == [0, 1, 2]
    (tmp_path / "flat/labels.csv").write_text("\n".join(lines).replace("n01", "n03"))
    assert V.Images(tmp_path / "flat", 8).fingerprint != flat.fingerprint
    (tmp_path / "flat/labels.csv").write_text("\n".join(lines[:2]))
    with pytest.raises(UserError, match="labels.csv: no line PICTURE,CLASS of ILSVRC2012_val_00000003.JPEG"):
        V.Images(tmp_path / "flat", 8)
    (tmp_path / "flat/labels.csv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(
        f"ILSVRC2012_val_{i:08d}.JPEG, {wnid}" for i, wnid in wnids.items()).encode())     # by a spreadsheet
    assert np.array_equal(V.Images(tmp_path / "flat", 8).labels, flat.labels)


def test_draws_are_functions_of_all_of_their_key():
    keys = [(5,), (5 + 2**32,), (5, 0), (5, 1), (5, 0, 0), (0, 5), (2**40,), (1, 2**32), (1, 0, 1)]
    first = [V.rng(0, "noise", *k).integers(2**63) for k in keys]
    first += [V.rng(s, "noise", 5).integers(2**63) for s in (1, 2**32)]
    first += [V.rng(0, "flip", 5).integers(2**63)]
    assert len(set(first)) == len(first)
    assert V.rng(3, "noise", 4).random() == V.rng(3, "noise", 4).random()


def test_any_word_is_a_purpose_and_the_listed_ones_keep_their_numbers():
    def by_hand(*words):
        return np.random.Generator(np.random.Philox(np.random.SeedSequence(words))).integers(2**63)

    listed = ["order", "flip", "noise", "sample", "step", "augment", "init", "subset", "label"]
    assert V.PURPOSES[:9] == listed                          # every draw so far depends on these numbers
    first = {p: V.rng(7, p, 2**32 + 5).integers(2**63) for p in (*listed, "dropout", "crop")}
    assert len(set(first.values())) == 11
    for number, purpose in enumerate(listed):
        assert first[purpose] == by_hand(7, 0, number, 0, 5, 1)
    assert first["dropout"] == by_hand(7, 0, zlib.crc32(b"dropout"), 0, 5, 1)   # in any process, of any day
    assert first["crop"] == V.rng(7, "crop", 2**32 + 5).integers(2**63)
    assert torch.equal(V.normal((2, 3), 1, "crop", 4), V.normal((2, 3), 1, "crop", 4))
    assert not torch.equal(V.normal((2, 3), 1, "crop", 4), V.normal((2, 3), 1, "noise", 4))


def test_an_epoch_sees_each_image_once():
    seen = [V.shuffled_index(0, 7, k) for k in range(21)]
    assert all(sorted(seen[e:e + 7]) == list(range(7)) for e in (0, 7, 14)) and seen[:7] != seen[7:14]


def test_quantisation_rounds_half_up():
    assert V.to_uint8(torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])).tolist() == [0, 0, 128, 255, 255]
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(V.to_uint8(V.from_uint8(levels)), levels)


def test_a_grid_lays_images_out_row_by_row_with_their_names_below(tmp_path):
    x = torch.randint(256, (5, 3, 20, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for names, below in ((None, 0), (["disk", "", "a name too long for thirty pixels", "ring", "star"], 12)):
        sheet = np.asarray(V.grid(x, columns=3, names=names))
        assert sheet.shape == (2 * (2 + 20 + below) + 2, 3 * 32 + 2, 3)
        covered = np.zeros(sheet.shape[:2], bool)
        for i in range(5):
            top, left = 2 + i // 3 * (22 + below), 2 + i % 3 * 32
            assert (sheet[top:top + 20, left:left + 30] == x[i].permute(1, 2, 0).numpy()).all()
            covered[top:top + 20, left:left + 30] = True
            if names:                                        # dark letters, no wider than the image
                dark = (sheet[top + 20:top + 34, left:left + 32] < 128).all(2)
                assert dark.any() == bool(names[i]) and not dark[:, 30:].any()
                covered[top + 20:top + 34, left:left + 30] = True
        assert (sheet[~covered] >= (128 if names else 255)).all()           # a letter's edge may be soft
    V.save_picture(x, tmp_path / "new/grid.png", columns=3, names=names)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "new/grid.png")), sheet)


# ------------------------------------------------------------------------------------------------------ a run


def test_atomic_files_appear_whole_or_not_at_all(tmp_path):
    V.save({"a": 1}, tmp_path / "x.pt")
    with pytest.raises(RuntimeError):
        with V.atomic(tmp_path / "x.pt") as f:
            f.write(b"half of it")
            raise RuntimeError
    assert torch.load(tmp_path / "x.pt", weights_only=True) == {"a": 1}


def test_json_files_are_objects_or_named(tmp_path):
    V.save({"a": [1, None], "b": "x"}, tmp_path / "new/x.json")
    assert V.read_json(tmp_path / "new/x.json") == {"a": [1, None], "b": "x"}
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["x.json"]
    assert V.read_json(tmp_path / "none.json", {}) == {}
    with pytest.raises(UserError, match="none.json: no such file"):
        V.read_json(tmp_path / "none.json")
    for text in ("[1]", "{", "", "<!DOCTYPE html>"):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(UserError, match="x.json: not a readable JSON object"):
            V.read_json(tmp_path / "x.json", {})


def test_a_folder_is_one_runs_alone(tmp_path):
    with V.lock(tmp_path / "new", "--cache"):
        with pytest.raises(UserError, match="new: another run is writing here; --cache names another folder"):
            with V.lock(tmp_path / "new", "--cache"):
                pass
    with pytest.raises(RuntimeError):
        with V.lock(tmp_path / "new"):                       # free again, also after an error
            raise RuntimeError
    with V.lock(tmp_path / "new"):
        pass


def test_who_waits_for_a_folder_gets_it_when_it_is_free(tmp_path):
    events = []

    def waits():
        with V.lock(tmp_path, wait=True):
            events.append("second")

    other = threading.Thread(target=waits)
    with V.lock(tmp_path):
        other.start()
        other.join(0.3)
        events.append("first")
    other.join(30)
    assert events == ["first", "second"]


@pytest.fixture(params=["train_vae", "train_sit"])
def trainer(request, chain, monkeypatch):
    """(run, networks, norms): run(words) trains one step; the networks then, as copies of their start and as
    they end; and the norm of each gradient that an optimiser was given."""
    T, networks, norms = importlib.import_module(request.param), [], []
    words = {"train_vae": chain.stage1, "train_sit": chain.stage2}[request.param]
    build = T.build

    def watched(*args):
        built = build(*args)
        networks.extend((copy.deepcopy(net), net) for net in built if net is not None)
        return built

    def seen(optimizer, args, kwargs):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.cat([grad.flatten() for grad in grads if grad is not None]).norm().item())

    monkeypatch.setattr(T, "build", watched)
    for name in {"train_vae": ("picture", "finish"), "train_sit": ("sample_grid",)}[request.param]:
        monkeypatch.setattr(T, name, lambda *args: None)     # they take longer than all the rest
    handle = register_optimizer_step_pre_hook(seen)
    yield lambda more: call(T, words, "--steps 1 --log-every 1", more), networks, norms
    handle.remove()


@pytest.mark.filterwarnings("ignore")
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(trainer, request, tmp_path, capsys):
    run, networks, norms = trainer
    infinite = {"train_vae": "--kl 1e39", "train_sit": "--std 1e30"}[request.node.callspec.params["trainer"]]
    run(f"{infinite} --out {tmp_path}/run")
    assert "step 0: the gradient is not finite; the step was skipped" in capsys.readouterr().out and not norms
    assert networks and all(V.fingerprint(before) == V.fingerprint(after) for before, after in networks)


def test_gradients_are_clipped_to_the_norm_asked_for(trainer, tmp_path):
    run, networks, norms = trainer

    def norm(clip, name):
        """Of the first gradient: the one logged, and the one that the optimiser was given."""
        norms.clear()
        run(f"--clip {clip} --out {tmp_path}/{name}")
        return json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[-1])["grad norm"], norms[0]

    whole, given = norm(0, "free")
    assert given == pytest.approx(whole, rel=1e-5)
    assert norm(whole / 2, "clipped") == pytest.approx((whole, whole / 2), rel=1e-5)
    assert norm(whole * 2, "loose") == pytest.approx((whole, whole), rel=1e-5)


@pytest.mark.parametrize("script", ["train_vae", "train_sit"])
def test_the_learning_rate_warms_up_and_ends_at_zero(script):
    schedule = importlib.import_module(script).schedule

    class Args:
        warmup, schedule, steps = 10, "cosine", 100
    assert schedule(0, Args) == pytest.approx(0.1) and schedule(100, Args) == pytest.approx(0)
    assert schedule(50, Args) == pytest.approx(0.5)
    Args.schedule = "constant"
    assert schedule(99, Args) == 1


def test_a_store_goes_on_where_it_stopped_and_refuses_what_it_is_not(tmp_path):
    assert not V.same_manifest(tmp_path / "new", {"seed": 1}, "--out") and not (tmp_path / "new").exists()
    made_of = {"seed": 1, "shape": (10, 2)}                  # a tuple, which JSON turns into a list
    V.save(made_of, tmp_path / "manifest.json")
    assert V.same_manifest(tmp_path, made_of, "--out")
    with pytest.raises(UserError, match="seed 1, not 2: --out"):
        V.same_manifest(tmp_path, {**made_of, "seed": 2}, "--out")
    with pytest.raises(UserError, match="was made with size None, not 32: --out"):
        V.same_manifest(tmp_path, {**made_of, "size": 32}, "--out")
    done = np.zeros(10, np.uint8)
    assert V.missing_ranges(done, 4) == [range(0, 4), range(4, 8), range(8, 10)]
    done[4:8] = 1
    assert V.missing_ranges(done, 4) == [range(0, 4), range(8, 10)]
    done[0] = done[9] = 1
    assert V.missing_ranges(done, 2) == [range(1, 3), range(3, 4), range(8, 9)]
    assert V.missing_ranges(np.ones(10), 4) == V.missing_ranges([], 4) == []
    V.check_space(tmp_path, 1, "--out")
    with pytest.raises(UserError, match="1073741824.0 GiB are needed, .* free: --out names another place"):
        V.check_space(tmp_path, 2**60, "--out")


def test_a_log_says_what_made_it_at_every_start(tmp_path, monkeypatch, capsys):
    """One line a start, which a resumed run keeps up to its checkpoint: the command, the commit where git
    knows one, versions, device. And the disk that a run will take is said."""
    monkeypatch.setattr(sys, "argv", ["train_sit.py", "--out", "a b"])
    args = SimpleNamespace(out=str(tmp_path), batch=4, steps=1000)
    V.Log(args, 0, 2**30, 2**30).add({"loss": torch.ones(())})
    said = capsys.readouterr().out.removeprefix(str(tmp_path))
    assert re.fullmatch(r": will hold 3.00 GiB \(\d+ GiB free\)\n", said)
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write('{"step": 2, "loss": 1}\n{"step": 4, "start": "lost"}\n{"step": 4, "loss": 1}\n{"st')
    monkeypatch.setattr(V.subprocess, "check_output", no_git)
    V.Log(args, 2, 0, 2**60)                              # more than there is: said, but the run goes on
    first, line, second = (json.loads(line) for line in open(tmp_path / "log.jsonl"))
    assert (first["step"], second["step"], line) == (0, 2, {"step": 2, "loss": 1})
    assert first["command"] == second["command"] == "python train_sit.py --out 'a b'"
    begun = datetime.datetime.strptime(first["start"], "%Y-%m-%d %H:%M:%S %z")
    assert abs(begun.timestamp() - time.time()) < 100 and first["versions"]["torch"] == torch.__version__
    assert (first["device"], first["processes"], second["commit"]) == ("cpu", 1, None)
    if (ROOT / ".git").exists():
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
        assert first["commit"].removesuffix("-dirty") == head.strip()


def test_a_line_holds_the_means_of_the_steps_that_gave_a_value(tmp_path):
    log = V.Log(SimpleNamespace(out=str(tmp_path), batch=4, steps=8), 0, 0, 0)
    for step in range(8):
        for part in range(2):
            log.add({"loss": torch.tensor(float(step + part))}, 2)
        if step % 4 == 0:
            log.add({"penalty": 3.0 + step})                # a number, of two steps of eight
    log.line(8, {})
    said = json.loads(open(tmp_path / "log.jsonl").readlines()[-1])
    assert (said["loss"], said["penalty"]) == (4.0, 5.0)
    with pytest.raises(ValueError, match=r"mse has the shape \[2, 3\]; the log and the loss take one number"):
        log.add({"mse": torch.zeros(2, 3)})


def no_git(*words, **how):
    raise FileNotFoundError("git")


@pytest.mark.parametrize("script, words", [
    ("train_vae", "{c.stage1} --steps 4"),
    ("train_vae", "{c.stage1} --steps 4 --init {c.root}/vae --train align --gan 0"),
    ("train_sit", "{c.stage2} --steps 5 --keep 2 --log-every 100")])
def test_a_run_takes_the_disk_that_it_says(chain, tmp_path, monkeypatch, script, words):
    """Checkpoints, milestones and the VAE: to 15%, of which half is the discriminator, counted once too
    often where it is larger than the VAE."""
    sizes = []
    monkeypatch.setattr(V, "check_space", lambda folder, size: sizes.append((folder, size)))
    call(importlib.import_module(script), words.format(c=chain), f"--out {tmp_path}")
    files = [f for f in tmp_path.rglob("*") if f.suffix in (".pt", ".safetensors")]
    assert len(files) == (5 if script == "train_sit" else 4)
    assert sizes == [(str(tmp_path), pytest.approx(sum(f.stat().st_size for f in files), rel=0.15))]


def test_after_a_minute_a_run_says_how_long_it_will_take(tmp_path, monkeypatch, capsys):
    """Once, at the first line after it, by the speed since the line before: here 100 of 1,000 steps take 40
    s, so after 200 steps 320 s are left."""
    now = [1e9]
    monkeypatch.setattr(V, "time", SimpleNamespace(time=lambda: now[0], strftime=time.strftime))
    log, said = V.Log(SimpleNamespace(out=str(tmp_path), batch=4, steps=1000), 0, 0, 0), []
    capsys.readouterr()
    for step in range(100, 1100, 100):
        now[0] += 40
        log.add({"loss": torch.ones(())})
        log.line(step, {})
        said.append([line for line in capsys.readouterr().out.splitlines() if "to go" in line])
    assert said == [[], ["about 0:05:20 to go"], *[[]] * 8]
    log = V.Log(SimpleNamespace(out=str(tmp_path), batch=4, steps=1000), 900, 0, 0)
    now[0] += 4000
    log.add({"loss": torch.ones(())})
    log.line(1000, {})                                  # the last line: nothing is left
    assert "to go" not in capsys.readouterr().out


def test_what_a_user_can_mend_is_one_line_and_a_bug_is_none():
    for kind in (V.UserError, sit.UserError, dino.UserError):
        assert issubclass(kind, ValueError) and V.for_the_user(kind("mend it")) == "mend it"
    assert V.for_the_user(OSError(errno.ENOSPC, "No space left")).startswith("the disk is full: ")
    for full in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried\nmore")):
        line = V.for_the_user(full)
        assert line.startswith("out of memory; hold fewer images at once") and "\n" not in line
    for bug in (ValueError("x"), KeyError("x"), FileNotFoundError("x"), RuntimeError("UserError: x")):
        assert V.for_the_user(bug) is None


def test_an_unreadable_image_in_a_loaders_process_is_one_line_too(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(UserError) as e:
        list(torch.utils.data.DataLoader(V.Images(tmp_path, 8), num_workers=1))
    assert "Traceback" in str(e.value)                       # torch's, which nobody needs to see
    assert V.for_the_user(e.value).startswith(f"{tmp_path}/bad.png: not a readable image (")


@pytest.mark.parametrize("error, status, said", [
    (None, 0, ""), (sit.UserError("--steps 0: one at least"), 1, "x.py: --steps 0: one at least\n"),
    (KeyboardInterrupt(), 130, "x.py: stopped; what is finished is kept\n")])
def test_a_script_ends_with_the_status_that_says_how(monkeypatch, capsys, error, status, said):
    def main():
        if error is not None:
            raise error
    monkeypatch.setattr(sys, "argv", ["/somewhere/x.py"])
    with pytest.raises(SystemExit) as e:
        V.run_script(main)
    assert e.value.code == status and capsys.readouterr().err == said


def test_a_bug_keeps_its_traceback(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/somewhere/x.py"])
    with pytest.raises(SystemExit) as e:
        V.run_script(lambda: {}["key"])
    said = capsys.readouterr().err
    assert e.value.code == 1 and said.startswith("Traceback") and "KeyError: 'key'" in said


@pytest.mark.parametrize("fetch", ["vae", "sit", "dino"])
def test_a_download_folder_that_cannot_be_made_ends_in_one_line(tmp_path, monkeypatch, fetch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub/checkpoints").write_text("a file in the folder's place")
    load, error = {
        "vae": (lambda: V.VAE.load("sd-vae-ft-ema"), V.UserError),
        "sit": (lambda: sit.SiT.load("DiT-XL/2"), sit.UserError),
        "dino": (lambda: dino.DINOv2.load("vits14"), dino.UserError),
    }[fetch]
    with pytest.raises(error, match="checkpoints") as caught:
        load()
    assert "\n" not in str(caught.value)
