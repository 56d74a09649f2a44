"""recipes.py: what other programs read of a run, against the official layouts, diffusers and safetensors."""
import re
import subprocess
import sys

import pytest
import recipes
import torch
from conftest import ROOT, Golden, relative
from test_sit import golden_frequencies, golden_net, golden_state, random_state

import sample
import sit
from sit import SiT
from vae import VAE, Align, Normalizer, fingerprint, read, read_json

__all__ = ["golden_frequencies"]
NETS = {"plain": ("sit", "net8.plain"), "sigma": ("sit", "net8.sigma"), "dit": ("dit", "net8")}


def run_of(folder, model, **info):
    """A folder as train_sit.py leaves it, with this EMA."""
    folder.mkdir()
    torch.save({"ema": model.state_dict(), "settings": model.settings, "info": info}, folder / "ckpt.pt")
    return str(folder)


@pytest.mark.parametrize("name", ["plain", "dit"])
def test_the_official_pt_is_the_public_codes_own_state(tmp_path, name):
    """Golden weights in a run of ours come out under the public code's names, in its shapes, bit for bit; by
    them test_sit.py equals its outputs."""
    process, net = NETS[name]
    state = golden_state(Golden(process), net, 8, torch.float32)
    run = run_of(tmp_path / "run", golden_net(Golden(process), net, 8, process, torch.float32))
    recipes.official(run, tmp_path / "a.pt")
    recipes.safetensors(run, tmp_path / "a.safetensors")
    from safetensors.torch import load_file
    official = torch.load(tmp_path / "a.pt", weights_only=True)
    for read_back in (official, load_file(tmp_path / "a.safetensors")):
        assert read_back.keys() == state.keys()
        assert all(torch.equal(read_back[k], v) for k, v in state.items())


def test_eight_channels_are_the_released_sits_and_the_first_four_the_velocity(golden_frequencies, tmp_path):
    g = Golden("sit")
    model = golden_net(g, "net8.plain", 8, "sit", torch.float32)
    recipes.official(run_of(tmp_path / "run", model), tmp_path / "a.pt", "sigma")
    state = torch.load(tmp_path / "a.pt", weights_only=True)
    wanted = {k: v.shape for k, v in golden_state(g, "net8.sigma", 8, torch.float32).items()}
    assert {k: v.shape for k, v in state.items()} == wanted
    inputs = g.input("fwd.x8"), g.input("fwd.t"), g.input("fwd.y")
    out = SiT.load(state, "sit", heads=4)(*inputs)
    assert relative(out[:, :4], model(*inputs)) <= 1e-6 and not out[:, 4:].any()
    apart = state["final_layer.linear.weight"].roll(4, 0)                     # the idle four first
    moved = SiT.load({**state, "final_layer.linear.weight": apart}, "sit", heads=4)(*inputs)
    assert relative(moved[:, :4], model(*inputs)) > 0.1


def test_a_run_with_repa_leaves_out_the_projectors(tmp_path):
    model = SiT(**sit.size("T"), input_size=8, classes=10, repa=(2, 24, 32))
    model.load_state_dict(random_state(model))
    recipes.official(run_of(tmp_path / "run", model), tmp_path / "a.pt")
    state = torch.load(tmp_path / "a.pt", weights_only=True)
    assert not any(k.startswith("projectors") for k in state)
    loaded = SiT.load(tmp_path / "a.pt", "sit")
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in loaded.state_dict().items())


STATS = {"mean": 0.3, "std": 1.7, "min": -9.0, "max": 8.0, "channel_mean": [0.5, -1.0, 2.0, 0.1],
         "channel_std": [0.5, 1.5, 2.0, 1.0]}


@pytest.mark.parametrize("kind", ["none", "max-min", "std", "channel"])
def test_diffusers_reads_a_vae_with_the_normalisation_inside(tmp_path, kind):
    """x = 0.18215 z of the new VAE is what the generator sees, its decoder takes x / 0.18215: 1e-5."""
    peers = pytest.importorskip("diffusers")
    vae = VAE(16, (1, 2), 1, 4)
    vae.load_state_dict(random_state(vae))
    vae.save(tmp_path / "vae")
    model, norm = SiT(**sit.size("T"), input_size=8, classes=10), Normalizer(kind, STATS)
    info = {"normalizer": norm.state_dict(), "size": 16, "classes": [str(i) for i in range(10)],
            "vae": {"source": str(tmp_path / "vae"), "beside": "../vae",
                    "hash": fingerprint(vae, vae.encoder_parts)}}
    recipes.diffusers(run_of(tmp_path / "run", model, **info), tmp_path / "folded")
    peer = peers.AutoencoderKL.from_pretrained(tmp_path / "folded")
    factor = peer.config.scaling_factor
    pixels, x = torch.randn(2, 3, 16, 16), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        theirs, ours = peer.encode(pixels).latent_dist, vae.encode(pixels)
        assert relative(factor * theirs.mean, norm.encode(ours.mean)) <= 1e-5
        noise = torch.randn_like(x)
        assert relative(factor * (theirs.mean + theirs.std * noise), norm.encode(ours.sample(noise))) <= 1e-5
        assert relative(peer.decode(x / factor).sample, vae.decode(norm.decode(x))) <= 1e-5
        plain = peers.AutoencoderKL.from_pretrained(tmp_path / "vae")         # the mutant: nothing folded
        error = relative(plain.decode(x / factor).sample, vae.decode(norm.decode(x)))
        assert (error > 1e-2) == (kind != "none")


def test_commands_of_a_run_and_its_picture(chain, tmp_path):
    """From the command line, with a run of train_sit.py: our own readers take what it wrote, and with
    --norm none's factor draw what the run itself draws."""
    def command(*words):
        words = [sys.executable, str(ROOT / "tests/recipes.py"), *map(str, words)]
        subprocess.run(words, check=True, cwd=tmp_path)

    command("official", chain.root / "sit", tmp_path / "sit.pt")
    command("diffusers", chain.root / "sit", tmp_path / "vae")
    model, vae, norm, names = sample.load(chain.root / "sit")
    other, folded, plain, _ = sample.load(tmp_path / "sit.pt", tmp_path / "vae", "sit")
    assert norm.kind == "std" and plain.kind == "none" and len(names) == model.classes == other.classes
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.8]), torch.tensor([1, 3])
    with torch.no_grad():
        v = model(x, t, y)
        assert torch.equal(other(x, t, y), v)
        z = (x - v).double()                            # float32's own rounding takes the decoder to 4e-5
        assert relative(folded.double().decode(plain.decode(z)), vae.double().decode(norm.decode(z))) <= 1e-6


def test_each_recipe_has_ten_lines_at_most():
    text = (ROOT / "tests/recipes.py").read_text()
    for body in re.findall(r"^def .*\n((?:    .*\n|\n(?=    ))+)", text, re.M):
        assert len(body.splitlines()) <= 10


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_the_table_names_what_lies_in_a_vaes_folder(chain, layers):
    """The docstring's names and shapes, and the sentence on --align-layers."""
    rows = re.findall(r"\| ((?:patch|cls)\.\S+), (\S+) \| (\[.*?\]), (\[.*?\]) \|", recipes.__doc__)
    told = {name: shape for a, b, s, t in rows for name, shape in ((a, s), (b, t))}
    align = Align(4, 64, layers, 32)
    sizes = {"C": 4, "D": 64, "H": 32}
    told = {k: tuple(sizes[s] for s in re.findall("[A-Z]", v)) for k, v in told.items()}
    shapes = {k: tuple(v.shape) for k, v in align.state_dict().items()}
    if layers == 2:
        assert shapes == told
        in_file = {k: tuple(v.shape) for k, v in read(chain.root / "vae/vae/align.safetensors").items()}
        assert in_file == told
        stats = read_json(chain.root / "vae/vae/reals.json")["latents"]
        listed = re.findall(r"latents: (.*?) \|", recipes.__doc__)
        assert sorted(stats) == sorted(", ".join(listed).split(", "))
        assert len(stats["channel_mean"]) == len(stats["channel_std"]) == 4
    else:
        said = {1: "1 only 0 with [D, C]", 4: "4 has 0, 2, 4, 6 with [H, C], [H, H], [H, H], [D, H]"}[layers]
        assert said in " ".join(recipes.__doc__.split())
        numbers, *_ = said.split(" with ")
        for part in ("patch", "cls"):
            weights = [v for k, v in shapes.items() if k.startswith(part) and k.endswith("weight")]
            told = [tuple(sizes[s] for s in pair.split(", ")) for pair in re.findall(r"\[(.*?)\]", said)]
            assert weights == told
            assert [k for k in shapes if k.startswith(part) and k.endswith("weight")] == [
                f"{part}.{n}.weight" for n in re.findall(r"\d", numbers)[1:]]
