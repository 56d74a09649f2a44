"""vae.py against diffusers, closed forms, golden crops, and files of every layout and kind of damage."""
import hashlib
import io
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import fid
import vae as V
from conftest import ROOT, relative

SMALL = dict(ch=32, mult=(1, 2, 4), blocks=2, z_channels=4)


def drawn(model, seed=0):
    """Every parameter non-zero, with gains and biases that matter."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=g, dtype=torch.float64)
            p.copy_(noise / math.sqrt(p[0].numel()) if p.ndim > 1 else 0.3 * noise + (1 if "norm" in name and "weight" in name else 0))
    return model


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


# ------------------------------------------------------------------------------------------------------- the network


def test_full_size_has_the_public_parameter_count():
    model = V.VAE()
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert count(model) == 83_653_863 and len(model.state_dict()) == 248
    assert count(model.encoder) == 34_163_592 and count(model.decoder) == 49_490_179


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (32, 48)])
def test_equals_diffusers(small, folder, size):
    from diffusers import AutoencoderKL
    theirs = AutoencoderKL.from_pretrained(folder).eval()
    x, z = images(2, 3, *size), torch.randn(2, 4, size[0] // 4, size[1] // 4, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        a, b = small.encode(x), theirs.encode(x).latent_dist
        assert relative(a.mean, b.mean) < 1e-5 and relative(a.std, b.std) < 1e-5
        assert relative(a.kl(), b.kl()) < 1e-5
        assert relative(small.decode(z), theirs.decode(z).sample) < 1e-5


@pytest.mark.parametrize("sizes", [dict(ch=16, mult=(1, 2, 4, 4)), dict(ch=16, mult=(1, 1, 2, 2, 4), z_channels=32),
                                   dict(ch=16, mult=(1, 2), z_channels=8),
                                   dict(ch=16, mult=(1, 3, 2), z_channels=16, blocks=1, groups=4)], ids=str)
def test_other_widths_equal_diffusers(tmp_path, sizes):
    """Both ways at relative 1e-5, every gain and bias drawn; and the folder gives back the sizes."""
    from diffusers import AutoencoderKL
    ours = drawn(V.VAE(**sizes), seed=3).eval()
    ours.save(tmp_path)
    theirs = AutoencoderKL.from_pretrained(tmp_path).eval()
    x, z = images(2, 3, 64, 96), torch.randn(2, ours.z_channels, 64 // ours.f, 96 // ours.f, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        a, b = ours.encode(x), theirs.encode(x).latent_dist
        assert relative(a.mean, b.mean) <= 1e-5 and relative(a.std, b.std) <= 1e-5
        assert relative(ours.decode(z), theirs.decode(z).sample) <= 1e-5
    again = V.VAE.load(tmp_path)
    assert again.config == ours.config and V.fingerprint(again) == V.fingerprint(ours)


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
    "pad on the left and top": lambda m: m.setattr(V.Downsample, "forward", lambda s, x: s.conv(F.pad(x, (1, 0, 1, 0)))),
    "bilinear upsampling": lambda m: m.setattr(V.Upsample, "forward", lambda s, x: s.conv(F.interpolate(x, scale_factor=2.0, mode="bilinear"))),
    "gelu for silu": lambda m: m.setattr(V.F, "silu", F.gelu),
    "attention without scale": lambda m: m.setattr(V.F, "scaled_dot_product_attention",
                                                   lambda q, k, v: (q @ k.transpose(-1, -2)).softmax(-1) @ v),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_miss_by_ten_tolerances(small, monkeypatch, name):
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        right = small.decode(small.encode(x).mean)
        MUTANTS[name](monkeypatch)
        assert relative(small.decode(small.encode(x).mean), right) > 1e-4


def test_norm_eps_is_1e6_in_float64(folder):
    """Float32 cannot show the eps of the norms; float64 against diffusers can, and another eps misses by far."""
    from diffusers import AutoencoderKL
    ours, theirs, x = V.VAE.load(folder).double(), AutoencoderKL.from_pretrained(folder).double(), images(1, 3, 32, 32).double()
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


# ------------------------------------------------------------------------------------------------------ weight files


def compvis(state, levels):
    """Our names -> CompVis', written from facts about that code, not from vae.py's rules."""
    out = {}
    for k, v in state.items():
        parts = k.split(".")
        if "down_blocks" in k:
            i, kind = parts[2], parts[3]
            k = f"encoder.down.{i}." + (f"block.{'.'.join(parts[4:])}" if kind == "resnets" else "downsample." + ".".join(parts[5:]))
        elif "up_blocks" in k:
            i, kind = levels - 1 - int(parts[2]), parts[3]
            k = f"decoder.up.{i}." + (f"block.{'.'.join(parts[4:])}" if kind == "resnets" else "upsample." + ".".join(parts[5:]))
        elif "mid_block.resnets" in k:
            k = f"{parts[0]}.mid.block_{int(parts[3]) + 1}." + ".".join(parts[4:])
        elif "mid_block.attentions" in k:
            rest = ".".join(parts[4:]).replace("group_norm", "norm").replace("to_out.0", "proj_out")
            k = f"{parts[0]}.mid.attn_1." + rest.replace("to_q", "q").replace("to_k", "k").replace("to_v", "v")
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


LAYOUTS = {
    "safetensors": lambda s, p: V.write_safetensors(s, p / "a.safetensors"),
    "bin": lambda s, p: torch.save(s, p / "a.bin"),
    "old diffusers names": lambda s, p: torch.save(old_diffusers(s), p / "a.bin"),
    "old names, 4-D attention": lambda s, p: torch.save(
        {k: v[:, :, None, None] if v.ndim == 2 else v for k, v in old_diffusers(s).items()}, p / "a.bin"),
    "new names, 4-D attention": lambda s, p: torch.save({k: v[:, :, None, None] if v.ndim == 2 else v for k, v in s.items()}, p / "a.bin"),
    "compvis, bare": lambda s, p: torch.save(compvis(s, 3), p / "a.ckpt"),
    "compvis, state_dict and loss": lambda s, p: torch.save(
        {"epoch": 3, "state_dict": {**compvis(s, 3), "loss.logvar": torch.zeros(()), "model_ema.decay": torch.zeros(())}}, p / "a.ckpt"),
    "inside an LDM": lambda s, p: torch.save({"state_dict": {
        **{f"first_stage_model.{k}": v for k, v in compvis(s, 3).items()}, "model.diffusion_model.x": torch.zeros(2)}}, p / "a.ckpt"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads(small, tmp_path, layout):
    LAYOUTS[layout](small.state_dict(), tmp_path)
    (file,) = tmp_path.iterdir()
    drawn = torch.get_rng_state()
    loaded = V.VAE.load(file)
    assert torch.equal(torch.get_rng_state(), drawn)             # loading draws no random numbers
    assert loaded.config == small.config and V.fingerprint(loaded) == V.fingerprint(small)


def test_diffusers_own_folders_load(tmp_path):
    """A folder that diffusers wrote, with its own norm groups, as safetensors and as .bin: 16 latent channels, f16."""
    from diffusers import AutoencoderKL
    theirs = AutoencoderKL(block_out_channels=(16, 16, 32, 32, 32), latent_channels=16, norm_num_groups=8, layers_per_block=1,
                           down_block_types=["DownEncoderBlock2D"] * 5, up_block_types=["UpDecoderBlock2D"] * 5).eval()
    for safe in (True, False):
        theirs.save_pretrained(tmp_path / str(safe), safe_serialization=safe)
        ours, x = V.VAE.load(tmp_path / str(safe)), images(1, 3, 64, 64)
        assert (ours.f, ours.z_channels, ours.config["groups"]) == (16, 16, 8)
        with torch.no_grad():
            assert relative(ours.encode(x).mean, theirs.encode(x).latent_dist.mean) < 1e-5


def test_a_runs_folder_holds_heads_and_statistics(small, tmp_path):
    align, info = V.Align(4, 24, layers=4, hidden=16), {"latents": {"mean": 0.5}}
    small.save(tmp_path / "vae", align, info)
    loaded, heads = V.VAE.load(tmp_path), V.Align.load(tmp_path)
    assert loaded.info == info and V.fingerprint(loaded) == V.fingerprint(small) and heads.config == align.config
    z = torch.randn(2, 4, 3, 5)
    assert all(torch.equal(a, b) for a, b in zip(heads(z), align(z)))
    other = tmp_path / "vae/other.safetensors"
    shutil.copy(tmp_path / "vae/diffusion_pytorch_model.safetensors", other)
    assert V.Align.load(other).config == align.config
    (tmp_path / "bare").mkdir()
    shutil.copy(other, tmp_path / "bare")
    for source in (tmp_path / "bare", V.VAE.load(tmp_path / "bare/other.safetensors").folder, "sd-vae-ft-ema"):
        with pytest.raises(FileNotFoundError, match="no align.safetensors beside this VAE"):
            V.Align.load(source)


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
        torch.save({k: torch.zeros(64000, 0, 3, 3) if ".conv1.weight" in k else v for k, v in V.read(good).items()}, path)
    elif kind in ("a scalar, in", "a scalar, out"):
        path = path / "a.pth"
        name = "post_quant_conv.weight" if "out" in kind else "encoder.down_blocks.1.resnets.0.conv1.weight"
        torch.save({**V.read(good), name: torch.zeros(())}, path)
    elif "config" in kind:
        shutil.copy(good, path)
        config = {**json.loads((good.parent / "config.json").read_text()), "norm_num_groups": 7}
        text = json.dumps([config] if "list" in kind else config)
        (path / "config.json").write_text("<!DOCTYPE html>\n<html></html>" if "html" in kind else text)
    elif kind == "html in reals":
        shutil.copytree(good.parent, path, dirs_exist_ok=True)
        (path / "reals.json").write_text("<!DOCTYPE html>\n<html></html>")
    return path


@pytest.mark.parametrize("kind", ["truncated safetensors", "offsets outside", "header longer than the file", "empty", "html, pth", "html, safetensors",
                                  "pickle that runs code", "truncated pth", "another network", "a key too many", "a key missing",
                                  "no name", "empty tensors that promise much", "a scalar, in", "a scalar, out", "html in config", "list in config", "groups in config",
                                  "html in reals"])
def test_spoilt_files_end_in_one_line_that_names_them(folder, tmp_path, kind):
    path = spoilt(kind, folder / "diffusion_pytorch_model.safetensors", tmp_path)
    with pytest.raises(ValueError) as e:
        V.VAE.load(path)
    assert path.name in str(e.value) and "\n" not in str(e.value)
    if "html," in kind:
        assert "begins with b'<!DOCTYPE" in str(e.value) and "delete it and get it again" in str(e.value)
    if "key" in kind:
        assert ("extra.weight" if "many" in kind else "decoder.conv_out.bias") in str(e.value)
    if "scalar" in kind:
        assert ("post_quant_conv.weight" if "out" in kind else "encoder.down_blocks.1.resnets.0.conv1.weight") + " is ()" in str(e.value)
    if "config" in kind or "reals" in kind:
        assert f"{kind.split()[-1]}.json" in str(e.value)
    assert not os.path.exists("/tmp/never-made-by-reals")


@pytest.mark.parametrize("load, file, url", [
    (lambda: V.VAE.load("sd-vae-ft-mse"), "sd-vae-ft-mse.safetensors", V.PUBLIC["sd-vae-ft-mse"][0]),
    (lambda: V.VAE.load("sd-vae-ft-ema"), "sd-vae-ft-ema.safetensors", V.PUBLIC["sd-vae-ft-ema"][0]),
    (fid.Inception.load, "pt_inception-2015-12-05-6726825d.pth", fid.PUBLIC["inception"][0]),
    (fid.LPIPS.load, "vgg16-397923af.pth", fid.PUBLIC["vgg16"][0]),
    (lambda: fid.LPIPS.load(fid.LPIPS([1] * 13).state_dict(), "lpips"), "lpips-v0.1-vgg.pth", fid.PUBLIC["lpips"][0])],
    ids=["sd-vae-ft-mse", "sd-vae-ft-ema", "inception", "vgg16", "lpips"])
def test_offline_the_error_names_file_url_and_folder(tmp_path, monkeypatch, load, file, url):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def offline(*a, **k):
        raise OSError("no route to host")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(FileNotFoundError) as e:
        load()
    assert "\n" not in str(e.value) and url.startswith("https://")
    for part in (file, url, str(tmp_path / "checkpoints"), "no route to host"):
        assert part in str(e.value)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_public_name_comes_from_the_hub_cache_and_is_asked_for_once(small, tmp_path, monkeypatch):
    asked = []

    def download(url, path, hash_prefix=None, progress=True):
        asked.append((url, path))
        V.write_safetensors(small.state_dict(), V.Path(path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        loaded = V.VAE.load("sd-vae-ft-ema")
        assert loaded.config == small.config and V.fingerprint(loaded) == V.fingerprint(small)
    url = "https://huggingface.co/stabilityai/sd-vae-ft-ema/resolve/main/diffusion_pytorch_model.safetensors"
    assert asked == [(url, str(tmp_path / "checkpoints" / "sd-vae-ft-ema.safetensors"))]


def test_a_download_of_another_hash_is_refused_and_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    (tmp_path / "file").write_bytes(b"not what it was")
    for sha256 in ("0" * 64, "6726825d"):
        with pytest.raises(FileNotFoundError, match="invalid hash value"):
            V.fetch((tmp_path / "file").as_uri(), "name.pth", sha256)
    assert list((tmp_path / "hub/checkpoints").iterdir()) == []
    digest = hashlib.sha256(b"not what it was").hexdigest()
    assert V.fetch((tmp_path / "file").as_uri(), "name.pth", digest[:8]).read_bytes() == b"not what it was"


def test_a_cached_file_of_another_size_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "sd-vae-ft-mse.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="334,643,276"):
        V.VAE.load("sd-vae-ft-mse")


TWO_WANT_ONE_FILE = """
import os, sys, time
sys.path.insert(0, "{root}")
import torch, vae

def download(url, path, hash_prefix=None, progress=True):
    open("{here}/downloads", "a").write(os.environ["RANK"])
    time.sleep(1)
    open(path, "wb").write(b"weights")

torch.hub.get_dir, torch.hub.download_url_to_file = lambda: "{here}", download
def main():
    run = vae.Run()
    with run.first():
        path = vae.fetch("https://nowhere/w.pth", "w.pth")
    open("{here}/" + str(run.rank), "wb").write(path.read_bytes())

vae.main(main)
"""


def test_of_several_ranks_one_downloads_while_the_others_wait(tmp_path):
    (tmp_path / "two.py").write_text(TWO_WANT_ONE_FILE.format(root=ROOT, here=tmp_path))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run([*launch, str(tmp_path / "two.py")], check=True, capture_output=True)
    assert (tmp_path / "downloads").read_text() == "0"
    assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes() == b"weights"


# ----------------------------------------------------------------------------------------- heads, normaliser, statistics


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


def test_normalizer_is_equation_7_and_8_with_the_printed_constants():
    norm = V.Normalizer("max-min", V.PAPER)
    assert abs(norm.scale - 1.3853349) < 1e-6 and abs(norm.shift - 0.0765124) < 1e-6
    z = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    ours, sd = V.PAPER, V.SD_VAE
    by_hand = (z - ours["mean"]) / (ours["max"] - ours["min"]) * (sd["max"] - sd["min"]) + sd["mean"]     # Eq. 7
    assert relative(norm.encode(z), 0.18215 * by_hand) < 1e-12
    back = (by_hand - sd["mean"]) / (sd["max"] - sd["min"]) * (ours["max"] - ours["min"]) + ours["mean"]  # Eq. 8
    assert relative(norm.decode(norm.encode(z)), back) < 1e-12


def test_std_normalisation_gives_the_standard_deviation_asked_for():
    z = torch.randn(64, 4, 8, 8, dtype=torch.float64) * 3 + 1
    stats = V.statistics([z[:10], z[10:]])
    assert abs(stats["std"] - z.std(correction=0)) < 1e-9 and abs(stats["mean"] - z.mean()) < 1e-9
    assert (stats["n"], stats["min"], stats["max"]) == (64, z.min(), z.max())
    assert abs(V.Normalizer("std", stats).encode(z).std() - 0.18215 * 4.58407) < 1e-3
    assert abs(V.Normalizer("std", stats, 1.0).encode(z).std() - 1) < 1e-3
    assert torch.equal(V.Normalizer("none").encode(z), 0.18215 * z)
    with pytest.raises(ValueError, match="min"):
        V.Normalizer("max-min", {"mean": 0, "std": 1, "min": None})


def test_pca_recovers_three_planted_directions():
    g = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(16, 16, generator=g))[0][:, :3]
    amounts = torch.randn(4, 50, 3, generator=g) * torch.tensor([9.0, 3.0, 1.0])
    colours, _ = V.pca(amounts @ axes.T)
    for c in range(3):
        inside = (colours[..., c] > 0) & (colours[..., c] < 1)
        assert abs(torch.corrcoef(torch.stack([colours[..., c][inside], amounts[..., c][inside]]))[0, 1]) > 0.98


# --------------------------------------------------------------------------------------------------- images and draws


def golden_picture(width, height, seed):
    q = np.random.RandomState(seed).randint(0, 256, size=(height // 8 + 2, width // 8 + 2, 3)).astype(np.int64)
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


def test_odd_images_are_read_and_bad_ones_named(tmp_path):
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
    with pytest.raises(ValueError, match="zbad.jpg"):
        data[5]
    image, label, bad = data.near(5)
    assert torch.equal(image, data[0][0]) and label == 0 and bad == [5]
    before = V.Images(tmp_path, 32).fingerprint
    (tmp_path / "b/zbad.jpg").write_bytes(b"longer than before, still not a jpeg")
    assert V.Images(tmp_path, 32).fingerprint != before
    with pytest.raises(FileNotFoundError, match="no images here"):
        V.Images(tmp_path / "nowhere", 32)


def test_pixels_are_read_as_stored_and_splinters_are_no_pictures(tmp_path):
    """An EXIF tag that asks for rotation changes nothing, as in ADM's, DiT's and SiT's readers; 100:1 is a picture, 101:1 is none."""
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
    with pytest.raises(ValueError, match="splinter.png: not a readable image .202 x 2 pixels"):
        data[1]


def test_every_format_that_pillow_reads_is_an_image(tmp_path):
    from PIL import Image
    endings = "jpg jpeg jfif png apng bmp dib webp gif tif tiff ppm pgm pbm tga pcx sgi ico jp2 JPEG".split()
    for i, ending in enumerate(endings):
        Image.new("1" if ending == "pbm" else "L" if ending == "pgm" else "RGB", (16, 16)).save(tmp_path / f"{i}.{ending}")
    (tmp_path / "notes.txt").write_text("no image")
    images = V.Images(tmp_path, 16)
    assert len(images) == len(endings) and all(images[i][0].shape == (3, 16, 16) for i in range(len(images)))


def test_a_flat_folder_has_no_classes(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    data = V.Images(tmp_path, 8)
    assert data.classes == [] and data[0][1] == -1


def test_draws_are_functions_of_all_of_their_key():
    keys = [(5,), (5 + 2**32,), (5, 0), (5, 1), (5, 0, 0), (0, 5), (2**40,), (1, 2**32), (1, 0, 1)]
    first = [V.rng(0, "noise", *k).integers(2**63) for k in keys] + [V.rng(s, "noise", 5).integers(2**63) for s in (1, 2**32)]
    first += [V.rng(0, "flip", 5).integers(2**63)]
    assert len(set(first)) == len(first)
    assert V.rng(3, "noise", 4).random() == V.rng(3, "noise", 4).random()


def test_an_epoch_sees_each_image_once():
    seen = [V.order(0, 7, k) for k in range(21)]
    assert all(sorted(seen[e:e + 7]) == list(range(7)) for e in (0, 7, 14)) and seen[:7] != seen[7:14]


def test_quantisation_rounds_half_up():
    assert V.to_uint8(torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])).tolist() == [0, 0, 128, 255, 255]
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(V.to_uint8(V.from_uint8(levels)), levels)


# ------------------------------------------------------------------------------------------------------------- a run


def test_atomic_files_appear_whole_or_not_at_all(tmp_path):
    V.save({"a": 1}, tmp_path / "x.pt")
    with pytest.raises(RuntimeError):
        with V.atomic(tmp_path / "x.pt") as f:
            f.write(b"half of it")
            raise RuntimeError
    assert torch.load(tmp_path / "x.pt", weights_only=True) == {"a": 1}


def test_a_folder_is_one_runs_alone(tmp_path):
    V.Run().lock(tmp_path)  # this process' lock goes with its file object
    run = V.Run()
    run.lock(tmp_path)
    with pytest.raises(ValueError, match="another run"):
        V.Run().lock(tmp_path)


def test_a_gradient_that_is_not_finite_never_reaches_the_weights():
    net = torch.nn.Linear(2, 2)
    before, optimizer = net.weight.clone(), torch.optim.AdamW(net.parameters(), 1.0)
    fine = torch.nn.Linear(2, 2)
    kept, healthy = fine.weight.clone(), torch.optim.AdamW(fine.parameters(), 1.0)
    (net(torch.ones(1, 2)).sum() * math.inf).backward()
    fine(torch.ones(1, 2)).sum().backward()
    with pytest.raises(ArithmeticError, match="step 7"):
        V.update([(healthy, fine), (optimizer, net)], 0, 7)
    assert torch.equal(net.weight, before) and torch.equal(fine.weight, kept)


def test_gradients_are_clipped_to_the_norm_asked_for():
    for clip, moved in ((1.0, 1.0), (0, 5.0), (9.0, 5.0)):
        net = torch.nn.Linear(2, 1, bias=False)
        before = net.weight.detach().clone()
        net.weight.grad = torch.tensor([[3.0, 4.0]])
        assert V.update([(torch.optim.SGD(net.parameters(), 1.0), net)], clip, 0)[0].item() == pytest.approx(5)
        assert (before - net.weight).norm().item() == pytest.approx(moved, rel=1e-5) and net.weight.grad is None


def test_learning_rate_warms_up_and_ends_at_zero():
    class Args:
        lr, warmup, schedule, steps = 2.0, 10, "cosine", 100
    assert V.learning_rate(Args, 0) == pytest.approx(0.2) and V.learning_rate(Args, 100) == pytest.approx(0)
    assert V.learning_rate(Args, 50) == pytest.approx(1.0)
    Args.schedule = "constant"
    assert V.learning_rate(Args, 99) == 2.0


def test_store_goes_on_and_refuses_what_it_is_not(tmp_path):
    arrays = {"x": (np.float32, (10, 2))}
    run = V.Run()
    store = V.Store(run, tmp_path, arrays, {"seed": 1}, "--out")
    assert store.todo(run, 4) == [range(0, 4), range(4, 8), range(8, 10)]
    store.put(4, x=np.ones((4, 2)))
    run.locks.clear()
    again = V.Store(run, tmp_path, arrays, {"seed": 1}, "--out")
    assert again.todo(run, 4) == [range(0, 4), range(8, 10)] and again.arrays["x"][4:8].sum() == 8
    with pytest.raises(ValueError, match="seed 1, not 2: --out"):
        V.Store(run, tmp_path, arrays, {"seed": 2}, "--out")
