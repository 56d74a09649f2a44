"""sit.py against the public SiT, DiT and REPA (golden numbers), diffusers, and closed forms."""
import argparse
import copy
import math
import shutil
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Golden, relative
from torch.utils.flop_counter import FlopCounterMode

import sit
from sit import Diffusion, Flow, Guided, SiT, UserError, size

SINGLE, DOUBLE = (torch.float32, ""), (torch.float64, ".f64")
PRECISIONS = pytest.mark.parametrize("dtype, suffix", [SINGLE, DOUBLE], ids=["float32", "float64"])
SIT, DIT, REPA = Golden("sit"), Golden("dit"), Golden("repa")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def golden_frequencies(monkeypatch):
    """The time embedding's frequencies on the machine that made the golden numbers, where the float32 exp
    (MKL's with MKL_CBWR=COMPATIBLE) is one bit too large at k = 12 and 106; with them, float64 agrees to
    1e-14."""
    def frequencies(device=None, exact=sit.frequencies):
        w = exact(device).clone()
        w[[12, 106]] = torch.nextafter(w[[12, 106]], torch.ones(2))
        return w
    monkeypatch.setattr(sit, "frequencies", frequencies)


def random_state(model, seed=0):
    """The state dict with every tensor but the position table drawn anew, so that no branch is zero."""
    g = torch.Generator().manual_seed(seed)

    def scale(v):
        return 0.1 if v.ndim == 1 else v[0].numel() ** -0.5

    return {k: v if k == "pos_embed" else torch.randn(v.shape, generator=g) * scale(v)
            for k, v in model.state_dict().items()}


def golden_state(g, network, side, dtype):
    state = {k: v.to(dtype) for k, v in g.state(network).items()}
    return {**state, "pos_embed": sit.position_table(side // 2, 96).to(dtype)}


def golden_net(g, network, side, process, dtype):
    return SiT.load(golden_state(g, network, side, dtype), process=process, heads=4)


def golden_repa(dtype):
    """The folded network of REPA's golden file, with its projector, which follows block 2."""
    state = golden_state(REPA, "net8", 8, dtype)
    sizes = sit.read_sizes(state, "golden", "repa", 4)
    model = SiT(**sizes, repa=(2, *state["projectors.0.4.weight"].shape)).to(dtype)
    model.load_state_dict(sit.fold_repa(state))
    return model


def stream(seed, shape, dtype, rows=None):
    """draw(k): the golden samplers' noise, drawn in order for the whole (for guidance: doubled) batch."""
    rs = np.random.RandomState(int(seed))
    return lambda k: torch.from_numpy(rs.standard_normal(shape).astype(np.float32)).to(dtype)[:rows]


def close(g, name, suffix, ours, tol, scale=1, rows=None):
    """Greatest absolute difference from golden `name` (over `scale`; "rel": over the largest value)."""
    truth = g[name + suffix][:rows]
    ours = g.pick(name, ours.detach())
    assert ours.shape == truth.shape
    error = np.abs(ours - truth).max() / (np.abs(truth).max() if scale == "rel" else scale)
    assert error <= (1e-10 if suffix and tol > 1e-10 else tol), (name, error)
    return error


# ------------------------------------------------------------------------------------------------ the network


@PRECISIONS
@pytest.mark.parametrize("side", [8, 16])
@pytest.mark.parametrize("network", ["sigma", "plain"])
def test_a_sit_is_the_public_sit(golden_frequencies, network, side, dtype, suffix):
    model = golden_net(SIT, f"net{side}.{network}", side, "sit", dtype)
    out = model(SIT.input(f"fwd.x{side}").to(dtype), SIT.input("fwd.t").to(dtype), SIT.input("fwd.y"))
    assert out.shape[1] == (8 if network == "sigma" else 4)
    close(SIT, f"fwd{side}.{network}.out", suffix, out[:, :4], 5e-6)


@PRECISIONS
@pytest.mark.parametrize("side", [8, 16])
def test_a_dit_is_the_public_dit(golden_frequencies, side, dtype, suffix):
    model = golden_net(DIT, f"net{side}", side, "dit", dtype)
    out = model(DIT.input(f"fwd.x{side}").to(dtype), DIT.input("fwd.t"), DIT.input("fwd.y"))
    close(DIT, f"fwd{side}.out", suffix, out, 5e-6)


@pytest.mark.parametrize("g, network, process", [(SIT, "net8.sigma", "sit"), (DIT, "net8", "dit")])
def test_every_kind_of_parameter_moves_the_output_by_more_than_one_percent(g, network, process):
    """So that agreement on the golden weights means agreement of every branch."""
    model = golden_net(g, network, 8, process, torch.float32)
    inputs = g.input("fwd.x8"), g.input("fwd.t"), g.input("fwd.y")

    def kind_of(name):
        return ".".join(part for part in name.split(".") if not part.isdigit())

    kinds = {kind_of(k) for k in model.state_dict()}
    assert len(kinds) == 20
    with torch.no_grad():
        full = model(*inputs)
        for kind in kinds:
            other = copy.deepcopy(model)
            for k, v in other.state_dict().items():
                if kind_of(k) == kind:
                    v.zero_()
            assert relative(other(*inputs), full) > 0.01, kind


@pytest.mark.parametrize("side", [8, 16])
@pytest.mark.parametrize("g, network, process", [(SIT, "sigma", "sit"), (SIT, "plain", "sit"),
                                                 (DIT, "", "dit")])
def test_networks_agree_in_float32_with_frequencies_as_they_are(g, network, process, side):
    end = f".{network}" if network else ""
    model = golden_net(g, f"net{side}{end}", side, process, torch.float32)
    out = model(g.input(f"fwd.x{side}"), g.input("fwd.t"), g.input("fwd.y"))
    close(g, f"fwd{side}{end}.out", "", out[:, :4] if process == "sit" else out, 5e-6)


def test_a_folded_repa_file_agrees_with_frequencies_as_they_are():
    for dtype, suffix, tol in ((*SINGLE, 5e-6), (*DOUBLE, 1e-7)):
        x, t = REPA.input("fwd.x8").to(dtype), 1 - REPA.input("fwd.t").to(dtype)
        out = golden_net(REPA, "net8", 8, "repa", dtype)(x, t, REPA.input("fwd.y"))
        assert np.abs(REPA.pick("fwd8.out", -out.detach()) - REPA["fwd8.out" + suffix]).max() <= tol


@pytest.mark.parametrize("dtype, suffix, tol", [(*SINGLE, 5e-6), (*DOUBLE, 1e-7)])
def test_a_folded_repa_file_is_minus_the_public_repa_at_the_mirrored_time(golden_frequencies, dtype, suffix,
                                                                          tol):
    model = golden_repa(dtype)
    t = 1 - REPA.input("fwd.t").to(dtype)
    out, tokens = model(REPA.input("fwd.x8").to(dtype), t, REPA.input("fwd.y"), return_tokens=True)
    assert model.process == "sit" and model.out_channels == 4 and model.classes == 1000
    plain = golden_net(REPA, "net8", 8, "repa", dtype)           # as a file loads: without the projector
    assert same(plain, {k: v for k, v in model.state_dict().items() if not k.startswith("projectors.")})
    for name, ours in (("fwd8.out", -out), ("fwd8.z0", tokens)):
        assert np.abs(REPA.pick(name, ours.detach()) - REPA[name + suffix]).max() <= tol


def test_an_embedding_that_somebody_adds_starts_as_the_labels_do():
    model = SiT(**sit.size("T"), input_size=8, classes=50)
    model.more = torch.nn.Embedding(50, 128)
    model.init_weights()
    for m in (model.more, model.y_embedder["embedding_table"]):
        assert 0.019 < m.weight.std() < 0.021


def test_positions_are_the_public_table():
    for side, name in ((4, "fwd8.sigma.pos_embed"), (8, "fwd16.sigma.pos_embed")):
        assert np.abs(SIT.pick(name, sit.position_table(side, 96)) - SIT[name]).max() < 1e-7


def test_time_embeddings_are_the_public_table(golden_frequencies):
    args = SIT.input("temb.t")[:, None] * sit.frequencies()
    table = SIT.pick("temb.out", torch.cat([args.cos(), args.sin()], 1))
    assert np.abs(table - SIT["temb.out"]).max() <= 1e-6
    assert np.abs(table - SIT["temb.exact"]).max() <= 5e-5


def test_frequencies_are_correctly_rounded_so_that_no_machine_differs():
    arguments = np.float32(-math.log(10000)) * np.arange(128, dtype=np.float32) / np.float32(128)
    assert sit.frequencies().tolist() == [float(np.float32(math.exp(a))) for a in arguments]


def mutate(name, model, monkeypatch):
    sdpa, modulate, embed = F.scaled_dot_product_attention, sit.modulate, sit.TimeEmbedder.forward
    if name == "norm eps":
        for m in model.modules():
            if isinstance(m, torch.nn.LayerNorm):
                m.eps = 1e-5
    elif name == "erf gelu":
        for block in model.blocks:
            block.mlp.gelu = torch.nn.GELU()
    elif name == "attention scale":
        monkeypatch.setattr(sit.F, "scaled_dot_product_attention",
                            lambda q, k, v: sdpa(q, k, v, scale=1 / q.shape[-1]))
    elif name == "scale before shift":
        monkeypatch.setattr(sit, "modulate", lambda x, a, b: modulate(x, b, a))
    elif name == "sin before cos":
        w = model.t_embedder.mlp[0].weight
        w.data = w.data.roll(128, 1)
    elif name == "row before column":
        model.pos_embed.data = model.pos_embed.unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2)
    elif name == "t times 1000":
        monkeypatch.setattr(sit.TimeEmbedder, "forward", lambda self, t: embed(self, 1000 * t))


@pytest.mark.parametrize("name, dtype, suffix, tol", [
    ("none", *SINGLE, 5e-6), ("none", *DOUBLE, 1e-10), ("norm eps", *DOUBLE, 1e-10),
    ("erf gelu", *SINGLE, 5e-6), ("attention scale", *SINGLE, 5e-6),
    ("scale before shift", *SINGLE, 5e-6), ("sin before cos", *SINGLE, 5e-6),
    ("row before column", *SINGLE, 5e-6), ("t times 1000", *SINGLE, 5e-6)])
def test_each_mutant_misses_by_ten_tolerances(golden_frequencies, monkeypatch, name, dtype, suffix, tol):
    model = golden_net(SIT, "net8.sigma", 8, "sit", dtype)
    mutate(name, model, monkeypatch)
    with torch.no_grad():
        out = model(SIT.input("fwd.x8").to(dtype), SIT.input("fwd.t").to(dtype), SIT.input("fwd.y"))[:, :4]
    error = np.abs(out.numpy() - SIT["fwd8.sigma.out" + suffix]).max()
    assert error <= tol if name == "none" else error >= 10 * tol, error


def to_diffusers(state, depth):
    """The state dict of diffusers' DiTTransformer2DModel, which repeats the two embedders in every block."""
    names = {"pos_embed.proj": "x_embedder.proj", "proj_out_1": "final_layer.adaLN_modulation.1",
             "proj_out_2": "final_layer.linear"}
    out = {}
    for i in range(depth):
        ours, theirs = f"blocks.{i}.", f"transformer_blocks.{i}."
        names[theirs + "norm1.emb.timestep_embedder.linear_1"] = "t_embedder.mlp.0"
        names[theirs + "norm1.emb.timestep_embedder.linear_2"] = "t_embedder.mlp.2"
        names[theirs + "norm1.linear"] = ours + "adaLN_modulation.1"
        names[theirs + "attn1.to_out.0"] = ours + "attn.proj"
        names[theirs + "ff.net.0.proj"], names[theirs + "ff.net.2"] = ours + "mlp.fc1", ours + "mlp.fc2"
        table = "embedding_table.weight"
        out[theirs + "norm1.emb.class_embedder." + table] = state["y_embedder." + table]
        for p in ("weight", "bias"):
            for x, part in zip("qkv", state[f"{ours}attn.qkv.{p}"].chunk(3)):
                out[f"{theirs}attn1.to_{x}.{p}"] = part
    return {**out, **{f"{a}.{p}": state[f"{b}.{p}"] for a, b in names.items() for p in ("weight", "bias")}}


@pytest.mark.parametrize("side", [8, 16])
def test_a_dit_is_diffusers_dit(side):
    diffusers = pytest.importorskip("diffusers")
    ours = SiT(2, 64, 4, input_size=side, classes=10, process="dit").double()
    state = random_state(ours)
    ours.load_state_dict(state)
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2,
        attention_bias=True,
        sample_size=side, patch_size=2, activation_fn="gelu-approximate", num_embeds_ada_norm=10,
        norm_type="ada_norm_zero", norm_elementwise_affine=False, norm_eps=1e-6).eval()
    missing, unexpected = theirs.load_state_dict(to_diffusers(state, 2), strict=False)
    assert not unexpected and set(missing) <= {"pos_embed.pos_embed"}
    for block in theirs.transformer_blocks:   # diffusers spaces the frequencies by 127, the public DiT by 128
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    x = torch.randn(3, 4, side, side, generator=torch.Generator().manual_seed(1))
    t, y = torch.tensor([0, 421, 999]), torch.tensor([0, 4, 10])
    with torch.no_grad():
        assert relative(ours.float()(x, t, y), theirs(x, timestep=t, class_labels=y).sample) <= 1e-5


PARAMETERS = {("S", "dit"): 32_963_360, ("S", "sit"): 32_957_200, ("B", "dit"): 130_512_416,
              ("B", "sit"): 130_500_112, ("L", "dit"): 458_102_816, ("L", "sit"): 458_086_416,
              ("XL", "dit"): 675_129_632, ("XL", "sit"): 675_111_184}


@pytest.mark.parametrize("name, process", PARAMETERS)
def test_every_size_has_the_published_number_of_parameters(name, process):
    with torch.device("meta"):
        model = SiT(**size(name), process=process)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name, process]
    if name == "XL":
        assert len(model.state_dict()) == 292


@pytest.mark.parametrize("name, block, total", [("B", 4, 137_845_008), ("L", 8, 465_955_600),
                                                ("XL", 8, 683_242_512)])
def test_repas_projector_has_the_published_number_of_parameters(name, block, total):
    with torch.device("meta"):
        assert sum(p.numel() for p in SiT(**size(name), repa=(block, 768)).parameters()) == total


@pytest.mark.parametrize("name, gmac", [("S/2", 6.054), ("S/4", 1.41), ("S/8", 0.36), ("B/2", 23.002),
                                        ("L/2", 80.693), ("XL/2", 118.617)])
def test_one_forward_pass_takes_the_published_work(name, gmac):
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        SiT(**size(name))(torch.zeros(1, 4, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmac, abs=0.006 if gmac < 2 else 0.0006)


def test_names_and_sizes_say_the_same():
    with torch.device("meta"):
        tiny, named = SiT(**size("T")), SiT(**size("XL/4"))
        assert SiT(4, 128, 4).settings == tiny.settings and named.patch == 4 and tiny.patch == 2
        assert size("T/1") == dict(depth=4, dim=128, heads=4, patch=1) and "patch" not in sit.SIZES["T"]
        for wrong in ("XXL", "XL/3", "XL/", "XL/2/2"):
            with pytest.raises(UserError, match=f"--model {wrong}: .*are known"):
                size(wrong)
        with pytest.raises(UserError, match="16 channels, not 4"):
            SiT(**size("T"), channels=8, out_channels=4, process="dit")
        with pytest.raises(UserError, match="process 'repa'"):
            SiT(**size("T"), process="repa")
        with pytest.raises(UserError, match="patch 8"):
            SiT(**size("T/8"), input_size=12)
        for block in (0, 5):
            with pytest.raises(UserError, match=f"repa after block {block}: the network has 4"):
                SiT(**size("T"), repa=(block, 24))


def test_settings_are_the_constructors_arguments_and_build_the_network_again():
    with torch.device("meta"):
        model = SiT(2, 64, 4, input_size=8, channels=16, process="dit", repa=(1, 24))
        assert model.settings == dict(depth=2, dim=64, heads=4, patch=2, input_size=8, channels=16,
                                      classes=1000, out_channels=None, process="dit", repa=[1, 24])
        again = SiT(**model.settings)
    assert [(k, v.shape) for k, v in again.state_dict().items()] == [
        (k, v.shape) for k, v in model.state_dict().items()]
    assert (again.channels, again.out_channels, again.repa_block) == (16, 32, 1) and again.info == {}
    with pytest.raises(TypeError, match="not JSON serializable"):
        SiT(**size("T"), repa=torch.relu_)


@pytest.mark.parametrize("kind", ["buffer", "attribute"])
def test_a_tensor_that_no_checkpoint_holds_is_named(kind, monkeypatch):
    """Networks are built empty and then given a file's weights: such a tensor would stay empty."""
    def init_weights(self):
        if kind == "buffer":
            self.final_layer.register_buffer("window", torch.ones(3), persistent=False)
        else:
            self.final_layer.window = torch.ones(3)

    monkeypatch.setattr(SiT, "init_weights", init_weights)
    model = SiT(**size("T"), input_size=8, classes=10)
    with pytest.raises(UserError, match="the tensor window is in no checkpoint; make it a persistent buffer"):
        SiT.load({"settings": model.settings, "ema": model.state_dict()})


def test_a_new_network_is_initialised_like_dits_and_answers_zero():
    torch.manual_seed(0)
    model = SiT(**size("T"), input_size=8, classes=10, repa=(2, 24))
    x, t, y = torch.randn(3, 4, 8, 8), torch.rand(3), torch.tensor([0, 5, 10])
    out, tokens = model(x, t, y, return_tokens=True)
    assert out.shape == (3, 4, 8, 8) and tokens.shape == (3, 16, 24)
    assert out.abs().max() == 0 and tokens.std() > 0
    params = dict(model.named_parameters())
    for key, std in (("y_embedder.embedding_table", .02), ("t_embedder.mlp.0", .02),
                     ("t_embedder.mlp.2", .02), ("blocks.3.attn.qkv", (2 / (4 * 128)) ** .5),
                     ("x_embedder.proj", (2 / (128 + 16)) ** .5)):
        assert params[key + ".weight"].std().item() == pytest.approx(std, rel=.05)
    zero = [p for k, p in params.items() if k.endswith("bias") or "adaLN" in k or "final_layer" in k]
    assert len(zero) > 20 and all(p.abs().max() == 0 for p in zero)
    assert not params["pos_embed"].requires_grad and "pos_embed" in model.state_dict()


def small(**kw):
    """A small network with random weights, float32, and inputs for it."""
    model = SiT(2, 64, 4, input_size=8, classes=10, **kw)
    model.load_state_dict(random_state(model))
    g = torch.Generator().manual_seed(1)
    t = torch.tensor([1, 500, 998, 999]) if model.process == "dit" else torch.tensor([0., .25, .5, 1.])
    return model, (torch.randn(4, 4, 8, 8, generator=g), t, torch.tensor([0, 3, 9, 10]))


@pytest.mark.parametrize("process", ["sit", "dit"])
def test_bf16_is_float32_within_its_rounding(process):
    model, (x, t, y) = small(process=process)
    with torch.no_grad():
        truth = model(x, t, y)
        with torch.autocast("cpu", torch.bfloat16):
            assert relative(model(x, t, y), truth) < 8 * 2 ** -8
        assert relative(model.bfloat16()(x, t, y), truth) < 8 * 2 ** -8     # x and t go in in float32
        blurred = model(x, t.bfloat16(), y)                                 # what bf16 would do to t = 998
    if process == "dit":
        assert relative(blurred, truth) > 3 * 8 * 2 ** -8


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")),
                    reason="torch.compile needs a C++ compiler")
def test_the_compiled_network_is_the_eager_one():
    model, (x, t, y) = small()
    model.blocks = model.blocks[:1]                                          # compiling takes seconds a block
    compiled = torch.compile(model)
    with torch.no_grad():
        assert relative(compiled(x, t, y), model(x, t, y)) < 1e-5
        half = x[:2], t[:2], y[:2]                                   # doubled again: nothing is compiled anew
        assert relative(Guided(compiled, 1.5)(*half), Guided(model, 1.5)(*half)) < 1e-5


def test_activation_checkpointing_changes_no_gradient():
    model, (x, t, y) = small(repa=(1, 24))
    grads = []
    for model.grad_checkpoint in (False, True):
        model.zero_grad()
        out, tokens = model(x, t, y, return_tokens=True)
        (out.square().mean() + tokens.square().mean()).backward()
        grads.append({k: p.grad.clone() for k, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(grads[0][k], grads[1][k]) and grads[0][k].abs().max() > 0 for k in grads[0])


def test_tokens_are_the_projected_tokens_after_a_block_and_none_without_a_projector():
    model, (x, t, y) = small(repa=(1, 24))
    kept = []
    model.blocks[0].register_forward_hook(lambda block, args, out: kept.append(out))
    out, tokens = model(x, t, y, return_tokens=True)
    assert torch.equal(tokens, model.projectors[0](kept[0])) and torch.equal(model(x, t, y), out)
    plain, (x, t, y) = small()
    out, tokens = plain(x, t, y, return_tokens=True)
    assert tokens is None and torch.equal(plain(x, t, y), out)


# ----------------------------------------------------------------------------------------------- weight files


def same(model, state):
    ours = model.state_dict()
    return ours.keys() == state.keys() and all(torch.equal(ours[k], state[k]) for k in state)


def a_state(process="sit", classes=10, seed=0, **kw):
    sizes = {**size("T"), "input_size": 8, "classes": classes, "process": process, **kw}
    return random_state(SiT(**sizes), seed)


def ours(state, model, **more):
    """A checkpoint of ours: the state dict of a model with these settings, and what else lies in it."""
    return {"ema": state, "settings": model.settings, **more}


def test_flat_files_of_every_kind_round_trip(tmp_path):
    for process, kw in (("sit", {}), ("sit", dict(out_channels=8)), ("dit", {}), ("sit", dict(classes=0)),
                        ("dit", dict(channels=16)), ("sit", dict(patch=4))):
        state = a_state(process, **kw)
        torch.save(state, tmp_path / "net.pt")
        for source in (tmp_path / "net.pt", str(tmp_path / "net.pt"), state):
            model = SiT.load(source, process=process)
            assert same(model, state) and model.process == process and model.settings["heads"] == 4
            made = SiT(**{**size("T"), "input_size": 8, "classes": 10, "process": process, **kw})
            assert model.settings == {**made.settings, "out_channels": made.out_channels}
            assert not model.training and model.info == {}
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert same(SiT.load(tmp_path / "old.pt", process="sit"), state)


def test_a_loaded_model_shares_no_memory_with_its_source():
    state = a_state()
    SiT.load(state, process="sit").final_layer.linear.bias.data.fill_(7)
    assert (state["final_layer.linear.bias"] != 7).all()


def test_half_precision_files_are_widened():
    model = SiT.load({k: v.half() for k, v in a_state().items()}, process="sit")
    assert {v.dtype for v in model.state_dict().values()} == {torch.float32}


def test_official_training_checkpoints_give_their_ema(tmp_path):
    ema = a_state(seed=1)
    args = argparse.Namespace(model="SiT-XL/2", lr=1e-4, resume=None, path=["a"])
    opt = {"state": {0: {"step": torch.tensor(4.)}}, "param_groups": [{"lr": 1e-4}]}
    torch.save(dict(model=a_state(seed=2), ema=ema, opt=opt, args=args, steps=4), tmp_path / "0400000.pt")
    assert same(SiT.load(tmp_path / "0400000.pt", process="sit"), ema)


def test_our_checkpoints_know_process_and_heads(tmp_path):
    model = SiT(2, 64, 2, input_size=8, classes=5, process="dit", patch=1)
    state, info = random_state(model), {"normalizer": {"kind": "none"}, "classes": ["a", "b"],
                                        "vae": "out/vae"}
    torch.save(ours(state, model, info=info, net=state, step=3), tmp_path / "ckpt.pt")
    for source in (tmp_path, tmp_path / "ckpt.pt", torch.load(tmp_path / "ckpt.pt", weights_only=True)):
        loaded = SiT.load(source)
        assert same(loaded, state) and loaded.settings == model.settings and loaded.info == info
        assert not loaded.training
    assert same(SiT.load(tmp_path, process="dit", heads=2), state)     # what it says itself may be said again
    for wrong in (dict(process="sit"), dict(process="repa"), dict(heads=4)):
        with pytest.raises(UserError, match=f"ckpt.pt: {next(iter(wrong))} .* was asked for"):
            SiT.load(tmp_path, **wrong)


class Scaled(SiT):
    """A network with one argument more, as a reader of the code may write it."""

    def __init__(self, depth=28, dim=1152, heads=16, *more, gain=1.0, **named):
        super().__init__(depth, dim, heads, *more, **named)
        self.settings["gain"] = self.gain = gain

    def forward(self, x, t, y, return_tokens=False):
        return self.gain * super().forward(x, t, y)


def test_an_argument_more_lives_through_settings_a_checkpoint_and_its_loading(tmp_path):
    model = Scaled(2, 64, 4, input_size=8, classes=10, gain=3.0)
    state = random_state(model)
    model.load_state_dict(state)
    torch.save(ours(state, model), tmp_path / "ckpt.pt")
    again, (plain, inputs) = Scaled.load(tmp_path), small()
    assert again.settings == model.settings == {**plain.settings, "gain": 3.0} and same(again, state)
    assert torch.equal(again(*inputs), model(*inputs)) and relative(model(*inputs), 3 * plain(*inputs)) < 1e-6
    with pytest.raises(UserError, match="ckpt.pt: .*unexpected keyword argument 'gain'") as e:
        SiT.load(tmp_path)
    assert "\n" not in str(e.value)
    bare = Scaled.load(a_state(), process="sit")                             # a public file has the default
    assert bare.gain == 1.0 and same(bare, a_state())


def test_repa_files_fold_and_drop_their_projector_and_ours_keep_it(tmp_path):
    state = a_state(repa=(2, 24, 32))
    torch.save(state, tmp_path / "last.pt")
    plain, full = SiT.load(tmp_path / "last.pt", process="repa"), sit.fold_repa(state)
    assert not hasattr(plain, "projectors") and plain.settings["repa"] is None
    assert torch.equal(plain.final_layer.linear.bias, -state["final_layer.linear.bias"])
    unchanged = set(state) - {"t_embedder.mlp.0.weight", "final_layer.linear.weight",
                              "final_layer.linear.bias"}
    assert len(unchanged) == len(state) - 3 and all(torch.equal(full[k], state[k]) for k in unchanged)
    model = SiT(**size("T"), input_size=8, classes=10, repa=(2, 24, 32))
    kept = SiT.load(ours(state, model))                                      # no REPA file: nothing is folded
    assert same(kept, state) and kept.repa_block == 2 and kept.settings == model.settings
    assert torch.equal(kept.projectors[0][4].weight, state["projectors.0.4.weight"])
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([.3, .9]), torch.tensor([1, 10])
    bare = {k: v for k, v in state.items() if not k.startswith("projectors.")}       # as if it were a SiT's
    assert relative(plain(x, t, y), -SiT.load(bare, process="sit")(x, 1 - t, y)) < 1e-5


def test_repas_legacy_block_names_are_renamed():
    state = a_state(repa=(1, 24, 32))
    late = {f"blocks.{i}.": f"decoder_blocks.{i - 1}." for i in (1, 2, 3)}    # one block before the projector
    legacy = {k.replace(k[:9], late.get(k[:9], k[:9])): v for k, v in state.items()}
    assert "decoder_blocks.2.attn.qkv.weight" in legacy and "blocks.1.attn.qkv.weight" not in legacy
    assert same(SiT.load(legacy, process="repa"), SiT.load(state, process="repa").state_dict())


@pytest.mark.parametrize("legacy", [False, True], ids=["names of today", "legacy names"])
def test_repas_training_checkpoints_load_from_a_file(tmp_path, legacy):
    """{model, ema, opt, args, steps} with the projector, which follows block 1, among the EMA's tensors."""
    late = {f"blocks.{i}.": f"decoder_blocks.{i - 1}." for i in (1, 2, 3)} if legacy else {}
    ema, other = (a_state(seed=seed, repa=(1, 24, 32)) for seed in (1, 2))
    held, rest = ({k.replace(k[:9], late.get(k[:9], k[:9])): v for k, v in state.items()}
                  for state in (ema, other))
    assert ("decoder_blocks.2.attn.qkv.weight" in held) == legacy and "projectors.0.4.weight" in held
    args = argparse.Namespace(model="SiT-XL/2", encoder_depth=8, proj_coeff=0.5, enc_type="dinov2-vit-b",
                              legacy=legacy)
    opt = {"state": {0: {"step": torch.tensor(4.)}}, "param_groups": [{"lr": 1e-4}]}
    torch.save(dict(model=rest, ema=held, opt=opt, args=args, steps=4), tmp_path / "0400000.pt")
    plain = SiT.load(tmp_path / "0400000.pt", process="repa")
    folded = {k: v.float() for k, v in sit.fold_repa(ema).items()}
    assert plain.process == "sit" and plain.repa_block == 0
    assert same(plain, {k: v for k, v in folded.items() if not k.startswith("projectors.")})


def test_public_names_come_from_the_hub_cache_and_know_their_process(tmp_path, monkeypatch):
    asked = []

    def download(url, file, *a, **kw):
        asked.append(url)
        torch.save(a_state("dit" if "DiT" in file else "sit", repa=(1, 24) if "REPA" in file else None), file)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for name in (*sit.PUBLIC, *sit.PUBLIC):
        assert SiT.load(name).process == ("dit" if "DiT" in name else "sit")
    assert len(asked) == len(set(asked)) == 4
    assert len(list((tmp_path / "hub/checkpoints").glob("*.pt"))) == 4
    with pytest.raises(UserError, match="process sit was asked for, but its own is repa"):
        SiT.load("REPA-SiT-XL/2", process="sit")


def test_without_a_network_one_line_says_what_to_put_where(tmp_path, monkeypatch):
    def offline(*a, **kw):
        raise urllib.error.URLError("no network")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(UserError) as e:
        SiT.load("DiT-XL/2")
    url = "https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-256x256.pt"
    for part in ("DiT-XL-2-256x256.pt is neither", url, str(tmp_path), "no network"):
        assert part in str(e.value)
    assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="nothing.pt: no such file, and no public name .SiT-XL/2"):
        SiT.load(tmp_path / "nothing.pt", process="sit")


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
def test_code_in_a_file_is_refused_by_name_and_never_runs(tmp_path, old):
    state = {**a_state(), "bomb": Bomb(tmp_path / "ran")}
    torch.save(state, tmp_path / "evil.pt", _use_new_zipfile_serialization=not old)
    line = r"evil.pt: holds \S*(Path\.touch|getattr|PosixPath)\b.*torch.save\(model.state_dict\(\)"
    with pytest.raises(UserError, match=line) as e:
        SiT.load(tmp_path / "evil.pt", process="sit")
    assert "\n" not in str(e.value) and not (tmp_path / "ran").exists()
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert (tmp_path / "ran").exists()                                       # the bomb was live


def test_damaged_files_never_load(tmp_path):
    torch.save(a_state(), tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    torch.save(a_state(), tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    legacy = (tmp_path / "legacy.pt").read_bytes()
    damaged = {"half": whole[:len(whole) // 2], "almost": whole[:-1], "start": whole[:1000], "empty": b"",
               "halflegacy": legacy[:len(legacy) // 2], "text": b"404 Not Found\n",
               "html": b"<!DOCTYPE html>\n<html><body>Sign in</body></html>\n"}
    for name, content in damaged.items():
        path = tmp_path / f"{name}.pt"
        path.write_bytes(content)
        message = f"{name}.pt: not a whole PyTorch weight file .begins with b'"
        with pytest.raises(UserError, match=message) as e:
            SiT.load(path, process="sit")
        assert "\n" not in str(e.value) and ("DOCTYPE" in str(e.value)) == (name == "html")


@pytest.mark.parametrize("key, value", [("x_embedder.proj.weight", torch.zeros(128, 4, 0, 0)),
                                        ("pos_embed", torch.zeros(1, 0, 128)),
                                        ("final_layer.linear.weight", torch.zeros(0, 128))])
def test_sizes_that_no_network_has_are_refused_by_name(tmp_path, key, value):
    torch.save({**a_state(), key: value}, tmp_path / "odd.pt")
    with pytest.raises(UserError, match="odd.pt: ") as e:
        SiT.load(tmp_path / "odd.pt", process="sit")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("settings", [
    dict(heads="x"), dict(heads=5), dict(patch=0), dict(dim=-128), dict(input_size=9), dict(process="repa"),
    dict(out_channels=8, process="dit", channels=3), dict(repa=(5, 24)), dict(repa=3), dict(depth=None),
    dict(unknown=1)], ids=str)
def test_settings_of_no_network_are_refused_in_one_line(tmp_path, settings):
    model = SiT(**size("T"), input_size=8, classes=3)
    held = ours(model.state_dict(), model)
    torch.save({**held, "settings": {**model.settings, **settings}}, tmp_path / "odd.pt")
    with pytest.raises(UserError, match="odd.pt: ") as e:
        SiT.load(tmp_path / "odd.pt")
    assert "\n" not in str(e.value)


def test_a_checkpoint_of_ours_loads_whole_or_is_refused_by_its_first_wrong_key(tmp_path):
    model = SiT(**size("T"), input_size=8, classes=10, repa=(2, 24))
    good = random_state(model)

    def refused(message, state):
        torch.save(ours(state, model), tmp_path / "ckpt.pt")
        with pytest.raises(UserError, match=message) as e:
            SiT.load(tmp_path)
        assert "ckpt.pt: " in str(e.value) and "\n" not in str(e.value)

    def without(*beginnings):
        return {k: v for k, v in good.items() if not k.startswith(beginnings)}

    refused(r'Missing key\(s\) in state_dict: "projectors.0.0.weight"', without("projectors."))
    refused(r'Missing key\(s\) in state_dict: "blocks.1.mlp.fc1.bias"', without("blocks.1.mlp.fc1.bias"))
    refused(r'Unexpected key\(s\) in state_dict: "extra"', {**good, "extra": torch.zeros(2)})
    refused("size mismatch for projectors.0.4.weight",
            {**good, "projectors.0.4.weight": torch.zeros(25, 2048)})
    refused(r'Missing key\(s\) in state_dict: "pos_embed"', without("pos_embed"))
    refused(r'Missing key\(s\) in state_dict: "pos_embed"', {})
    refused("neither a dict of tensors", None)


def test_another_networks_file_is_refused_by_its_first_wrong_key(tmp_path):
    good = a_state()

    def refused(state, message, **kw):
        torch.save(state, tmp_path / "net.pt")
        with pytest.raises(UserError, match=message) as e:
            SiT.load(tmp_path / "net.pt", **{"process": "sit", **kw})
        assert "net.pt: " in str(e.value) and "\n" not in str(e.value)

    def with_shape(key, *shape):
        return {**good, key: torch.zeros(shape)}

    refused(torch.nn.Linear(3, 3).state_dict(), "no key pos_embed")
    refused(with_shape("x_embedder.proj.weight", 3, 3),
            r"x_embedder.proj.weight has shape \[3, 3\], 4 dimensions")
    refused({k: v for k, v in good.items() if k != "blocks.2.mlp.fc1.bias"},
            r'Missing key\(s\) in state_dict: "blocks.2.mlp.fc1.bias"')
    refused(with_shape("extra", 2), r'Unexpected key\(s\) in state_dict: "extra"')
    refused(with_shape("t_embedder.mlp.0.bias", 5),
            r"size mismatch for t_embedder.mlp.0.bias: .*\[5\].*\[128\]")
    refused(with_shape("pos_embed", 1, 17, 128),
            r"size mismatch for pos_embed: .*\[1, 17, 128\].*\[1, 16, 128\]")
    refused(with_shape("t_embedder.mlp.0.weight", 128, 6), "size mismatch for t_embedder.mlp.0.weight",
            process="repa")
    refused([1, 2], "neither a dict of tensors")
    refused({**good, "step": 3}, "neither a dict of tensors")
    refused({}, "neither a dict of tensors")
    refused({**good, 0: torch.zeros(1)}, "neither a dict of tensors")
    refused(good, "say --process sit, dit or repa", process=None)
    refused(good, "noise and variance, 8 channels, not 4", process="dit")
    refused(random_state(SiT(2, 64, 4, input_size=8, classes=10)), "depth 2, width 64 is no known size")
    refused(random_state(SiT(2, 64, 4, input_size=8, classes=10)), "heads 5", heads=5)


# ------------------------------------------------------------------------------------------------- the losses


@PRECISIONS
def test_the_flows_loss_and_its_gradient_are_the_public_ones(golden_frequencies, dtype, suffix):
    model = golden_net(SIT, "net8.sigma", 8, "sit", dtype)
    noise = stream(SIT["loss.noise_seed"], (4, 4, 8, 8), dtype)(0)
    x, t, flow = SIT.input("loss.x1").to(dtype), SIT.input("loss.u").to(dtype), Flow()
    loss = flow.loss(model(flow.noised(x, noise, t), t, SIT.input("loss.y")), x, noise, t)
    name = "loss.Linear.velocity.None."
    error = np.abs(loss.detach().numpy() / SIT[name + "loss" + suffix] - 1)
    assert error.max() <= (1e-10 if suffix else 2e-6)
    loss.mean().backward()
    for key in ("final_layer.linear.bias", "x_embedder.proj.bias", "blocks.1.adaLN_modulation.1.bias"):
        close(SIT, name + "grad." + key, suffix, model.get_parameter(key).grad, 3e-7)


def test_the_flows_loss_on_a_case_made_by_hand():
    x, noise = torch.full((2, 1, 1, 2), 3.), torch.tensor([1., -1.]).expand(2, 1, 1, 2)
    flow, u = Flow(), torch.tensor([0.25, 1.0])
    t = flow.time(u)
    assert torch.equal(t, u)                                     # uniform times are the flow's own
    assert flow.noised(x, noise, t).flatten().tolist() == [1.5, 0, 3, 3]                # t x + (1 - t) noise
    out = torch.full((2, 2, 1, 2), 5.)                           # the second channel is no prediction
    assert flow.loss(out, x, noise, t).tolist() == [(3 ** 2 + 1 ** 2) / 2] * 2          # (5 - 2)^2, (5 - 4)^2
    assert flow.noised(x.double(), noise.double(), t).dtype == torch.float64


def test_the_diffusions_times_and_noised_data_on_a_case_made_by_hand():
    d = Diffusion()
    assert d.time(torch.tensor([0, .00099, .001, .5, .99999])).tolist() == [0, 0, 1, 500, 999]
    last = math.nextafter(1, 0)                                  # the largest below 1, as float64
    assert d.time(torch.tensor([last], dtype=torch.float64)).tolist() == [999]
    assert Diffusion(10).time(torch.tensor([0, .55, .99])).tolist() == [0, 5, 9]
    abar = np.cumprod(1 - np.linspace(1e-4, .02, 1000))
    x, noise = torch.full((2, 1, 1, 1), 3.).double(), torch.full((2, 1, 1, 1), -2.).double()
    by_hand = [math.sqrt(abar[t]) * 3 + math.sqrt(1 - abar[t]) * -2 for t in (0, 700)]
    assert d.noised(x, noise, torch.tensor([0, 700])).flatten().tolist() == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("process, name, samplers", [(Flow(), "sit", ["sde", "euler", "heun"]),
                                                     (Diffusion(), "dit", ["ddpm"])])
def test_both_processes_have_the_same_doors(process, name, samplers):
    """What a trainer and a sampling script ask for, of either; a loss has its output's gradient alone."""
    assert process.name == name and list(process.samplers) == samplers
    for model in (name, SiT(2, 64, 4, input_size=8, classes=10, process=name)):
        assert type(sit.process_of(model)) is type(process)
    x, noise, t = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), process.time(torch.tensor([0., .5, .999]))
    out = torch.randn(3, model.out_channels, 8, 8, requires_grad=True)
    loss = process.loss(out, x, noise, t)
    assert process.noised(x, noise, t).shape == x.shape and loss.shape == (3,) and (loss > 0).all()
    loss[1].backward()
    assert out.grad[1].abs().max() > 0 and out.grad[[0, 2]].abs().max() == 0
    for sampler in samplers:
        sampled = process.sample(model, noise, torch.tensor([0, 9, 10]), sampler, 2, lambda k: noise, None)
        assert sampled.shape == noise.shape and sampled.dtype == noise.dtype


@PRECISIONS
def test_dits_loss_and_its_gradient_are_the_public_ones(golden_frequencies, dtype, suffix):
    model, d = golden_net(DIT, "net8", 8, "dit", dtype), Diffusion()
    x, noise, t = DIT.input("loss.x0").to(dtype), DIT.input("loss.noise").to(dtype), DIT.input("loss.t")
    out = model(d.noised(x, noise, t), t, DIT.input("loss.y"))
    mse, vb = d.terms(out, x, noise, t)
    loss = d.loss(out, x, noise, t)
    for name, ours in (("mse", mse), ("vb", vb), ("loss", loss)):
        first = 0 if suffix or name == "mse" else 2      # t = 0 in float32: a difference of cdfs, see vb.near
        error = np.abs(ours.detach().numpy() / DIT[f"loss.{name}{suffix}"] - 1)
        assert error[first:].max() <= (1e-10 if suffix else 2e-6) and error.max() < 0.1
    loss[2:].mean().backward()
    for key in ("final_layer.linear.bias", "x_embedder.proj.bias", "blocks.1.adaLN_modulation.1.bias"):
        close(DIT, "loss.grad." + key, suffix, model.get_parameter(key).grad, 3e-7)


@PRECISIONS
def test_dits_loss_of_given_outputs_is_the_public_one(dtype, suffix):
    x, noise, t, far = (DIT.input(k) for k in ("loss.x0", "loss.noise", "loss.t", "vb.out"))
    x, noise, far = x.to(dtype), noise.to(dtype), far.to(dtype)
    near = torch.cat([noise + 0.1 * far[:, :4], 0.3 * far[:, 4:]], 1)
    for case, out in (("far", far), ("near", near)):
        mse, vb = Diffusion().terms(out, x, noise, t)
        tol = 1e-10 if suffix else 2e-6
        assert relative(mse, DIT[f"vb.{case}.mse{suffix}"]) <= tol
        for rows in (slice(0, 2), slice(2, 6)):                  # t = 0, then t > 0
            loose = case == "far" and rows.start == 0 and not suffix
            error = np.abs(vb.numpy() - DIT[f"vb.{case}.vb{suffix}"])[rows].max()
            assert error <= (1e-2 if loose else tol * max(1, np.abs(DIT[f"vb.{case}.vb"][rows]).max()))


def test_the_variational_bound_moves_the_variance_only():
    d, out = Diffusion(), DIT.input("vb.out").double().requires_grad_()
    x, noise = DIT.input("loss.x0").double(), DIT.input("loss.noise").double()
    mse, vb = d.terms(out, x, noise, DIT.input("loss.t"))
    of_vb, = torch.autograd.grad(vb.sum(), out, retain_graph=True)
    of_mse, = torch.autograd.grad(mse.sum(), out)
    assert of_vb[:, :4].abs().max() == 0 and of_mse[:, 4:].abs().max() == 0
    assert (of_vb[:, 4:].abs().amax((1, 2, 3)) > 0).all() and (of_mse[:, :4].abs().amax((1, 2, 3)) > 0).all()


def test_the_bins_likelihood_is_a_distribution_over_the_bins():
    """Over the 256 values of a pixel the masses add up to one, whatever mean and variance."""
    x = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, logvar in ((0.1, -4.), (-0.99, -9.), (3., 1.)):
        nll = sit.discrete_nll(x, torch.full_like(x, mean), torch.full_like(x, logvar))
        assert (-nll).exp().sum().item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("dtype, suffix, tol", [(*SINGLE, 5e-6), (*DOUBLE, 2e-7)])
def test_repas_two_losses_and_their_gradients_are_the_public_ones(golden_frequencies, dtype, suffix, tol):
    model, process = golden_repa(dtype), Flow()
    noise = stream(REPA["loss.noise_seed"], (4, 4, 8, 8), dtype)(0)
    x, t = REPA.input("loss.x").to(dtype), 1 - REPA.input("loss.t").to(dtype)
    out, tokens = model(process.noised(x, noise, t), t, REPA.input("loss.y"), return_tokens=True)
    flow = process.loss(out, x, noise, t)
    align = sit.repa_loss(tokens, REPA.input("loss.z").to(dtype))
    assert align.shape == (4,)
    assert relative(flow, REPA["loss.linear.denoise" + suffix]) <= tol
    assert relative(align.mean(), REPA["loss.linear.proj" + suffix]) <= tol
    (flow.mean() + 0.5 * align.mean()).backward()
    for key in ("projectors.0.4.bias", "final_layer.linear.bias", "x_embedder.proj.bias",
                "blocks.1.mlp.fc2.bias", "blocks.2.mlp.fc1.bias"):
        grad = model.get_parameter(key).grad * (-1 if "final" in key else 1)        # the fold turned its sign
        name = "loss.linear.grad." + key
        assert np.abs(REPA.pick(name, grad) - REPA[name + suffix]).max() <= min(tol, 3e-7)


# ----------------------------------------------------------------------------------------------- the samplers


def gauss_velocity(m, s):
    """The exact velocity (x, t) -> v for data N(m, s^2), element by element; and the score's closed form."""
    def variance(t):
        return (t * s) ** 2 + (1 - t) ** 2

    def velocity(x, t):
        return m + (t * s ** 2 - (1 - t)) / variance(t) * (x - t * m)

    return velocity, lambda x, t: -(x - t * m) / variance(t)


def sit_case(kind, dtype):
    """The model of a golden sampler job."""
    if kind == "toy":
        v, _ = gauss_velocity(SIT.input("toy.m").to(dtype), SIT.input("toy.s").to(dtype))
        return lambda x, t, y: v(x, t[:, None, None, None].to(x))
    model = golden_net(SIT, "net8.sigma", 8, "sit", dtype)
    return Guided(model, float(SIT["sample.cfg_scale"]), channels=3) if kind == "cfg" else model


@PRECISIONS
@pytest.mark.parametrize("kind, job", [("cfg", "euler5"), ("cfg", "sde10")] + [
    (kind, job) for kind in ("toy", "net") for job in ("euler5", "euler20", "heun2_20", "sde10", "sde50")])
def test_flow_samplers_are_the_public_ones(golden_frequencies, kind, job, dtype, suffix):
    model, calls = sit_case(kind, dtype), []
    name = f"{kind}.Linear.{job}."
    sampler = {"eul": "euler", "heu": "heun", "sde": "sde"}[job[:3]]
    n = int(job.removeprefix("heun2_").strip("eulrsd"))
    steps = n if sampler == "sde" else n - 1                     # the public code counts the ODE's points
    draw = stream(SIT["sample.noise_seed"], (4 if kind == "cfg" else 2, 4, 8, 8), dtype, rows=2)
    out = Flow().sample(model, SIT.input("sample.z").to(dtype), SIT.input("sample.y"), sampler, steps,
                        draw=draw, callback=lambda k, t, x, x0: calls.append(x))
    assert out.dtype == dtype and len(calls) == steps
    close(SIT, name + "out", suffix, out, 5e-6)
    if sampler == "sde":
        close(SIT, name + "before_last", suffix, calls[-1], 5e-6)


@PRECISIONS
@pytest.mark.parametrize("guided", ["plain", "cfg"])
@pytest.mark.parametrize("sampler, job", [("sde", "em10"), ("euler", "euler10")])
def test_flow_samplers_are_repas_on_folded_weights(golden_frequencies, sampler, job, guided, dtype, suffix):
    model, sizes = golden_net(REPA, "net8", 8, "repa", dtype), []
    model.register_forward_pre_hook(lambda m, args: sizes.append(len(args[0])))
    if guided == "cfg":
        model = Guided(model, float(REPA["sample.cfg_scale"]), tuple(REPA["sample.interval"]))
    draw = stream(REPA["sample.noise_seed"], (2, 4, 8, 8), torch.float64)
    z = REPA.input("sample.z").double()                   # REPA's state is float64 also for a float32 network
    out = Flow().sample(model, z, REPA.input("sample.y"), sampler, 10, draw=draw)
    assert out.dtype == torch.float64 and sizes == REPA[f"{job}.{guided}.batch_sizes"].tolist()
    assert np.abs(out.numpy() - REPA[f"{job}.{guided}.out{suffix}"]).max() <= (1e-7 if suffix else 1e-5)


@PRECISIONS
@pytest.mark.parametrize("scale", [1.5, 4])
@pytest.mark.parametrize("network", ["sigma", "plain"])
def test_guidance_of_three_channels_is_sits(golden_frequencies, network, scale, dtype, suffix):
    model = Guided(golden_net(SIT, f"net8.{network}", 8, "sit", dtype), scale, channels=3)
    out = model(SIT.input("cfg.x")[:2].to(dtype), SIT.input("cfg.t")[:2].to(dtype),
                SIT.input("cfg.y")[:2])[:, :4]
    close(SIT, f"fwd8.{network}.cfg{scale}", suffix, out, 6e-6 if scale == 1.5 else 1.2e-5, rows=2)


@PRECISIONS
def test_guidance_of_three_channels_is_dits_and_leaves_the_variance_alone(golden_frequencies, dtype, suffix):
    model = golden_net(DIT, "net8", 8, "dit", dtype)
    args = DIT.input("cfg.x")[:2].to(dtype), DIT.input("cfg.t")[:2], DIT.input("cfg.y")[:2]
    close(DIT, "fwd8.cfg1.5", suffix, Guided(model, 1.5, channels=3)(*args), 6e-6, rows=2)
    everything, plain = Guided(model, 1.5)(*args), model(*args)
    assert relative(everything[:, 4:], plain[:, 4:]) < 1e-6 < 0.1 < relative(everything[:, 3], plain[:, 3])


class Counting:
    """A stand-in network that counts the images of each call; its answer shows label and time."""
    channels, classes = 4, 10

    def __init__(self, process):
        self.process, self.sizes = process, []

    def __call__(self, x, t, y):
        self.sizes.append(len(x))
        return (y * 1.0)[:, None, None, None].expand(-1, 8, *x.shape[2:]).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("process, guided", [("sit", 185), ("dit", 119)])
def test_the_papers_interval_guides_185_or_119_of_250_evaluations(process, guided, dtype):
    net, z = Counting(process), torch.zeros(1, 4, 1, 1, dtype=dtype)
    {"sit": Flow, "dit": Diffusion}[process]().sample(Guided(net, 1.8, (0, 0.75)), z, torch.tensor([3]),
                                                      steps=250)
    assert sorted(set(net.sizes)) == [1, 2] and net.sizes.count(2) == guided and len(net.sizes) == 250
    assert net.sizes == [1] * (250 - guided) + [2] * guided              # the noisiest steps are left alone


@pytest.mark.parametrize("sampler, calls", [("sde", 6), ("euler", 6), ("heun", 12), ("ddpm", 6)])
def test_a_step_calls_the_network_once_and_heuns_twice(sampler, calls):
    net, z = Counting("dit" if sampler == "ddpm" else "sit"), torch.zeros(1, 4, 1, 1)
    process, how = (Diffusion(), {}) if sampler == "ddpm" else (Flow(), {"sampler": sampler})
    process.sample(net, z, torch.tensor([3]), steps=6, **how)
    assert len(net.sizes) == calls


@pytest.mark.parametrize("steps, interval, expected", [(4, (0, .75), 3), (4, (.25, .75), 3),
                                                       (10, (.3, .7), 5), (10, (.1, .1), 1), (5, (0, 1), 5)])
def test_both_bounds_of_the_interval_are_inside(steps, interval, expected):
    net = Counting("sit")
    Flow().sample(Guided(net, 2, interval), torch.zeros(1, 4, 1, 1), torch.tensor([3]), "euler", steps)
    assert net.sizes.count(2) == expected


def test_guidance_by_hand():
    y, x = torch.tensor([3, 4]), torch.zeros(2, 4, 2, 2)
    out = Guided(Counting("sit"), 1.5)(x, torch.tensor([.5, .5]), y)
    assert out[:, :, 0, 0].tolist() == [[10 + 1.5 * (3 - 10)] * 4 + [3] * 4,
                                        [10 + 1.5 * (4 - 10)] * 4 + [4] * 4]
    mixed = Guided(Counting("sit"), 1.5, (0, .75))(x, torch.tensor([.1, .5]), y)             # outside, inside
    assert mixed[0, 0, 0, 0] == 3 and mixed[1, 0, 0, 0] == out[1, 0, 0, 0]
    net = Counting("sit")
    assert (Guided(net, 1)(x, torch.tensor([.5, .5]), y)[:, 0, 0, 0] == y).all() and net.sizes == [2]
    for channels in (0, 5):
        with pytest.raises(UserError, match=f"--cfg-channels {channels}: 1 to 4, which the model predicts"):
            Guided(net, 2, channels=channels)
    with pytest.raises(UserError, match="--interval 0.8 0.2: the lower noise time comes first"):
        Guided(net, 2, (.8, .2))
    net.classes = 0
    with pytest.raises(UserError, match="--cfg 2: the model is unconditional"):
        Guided(net, 2)


def test_each_process_refuses_the_others_model_and_steps_that_it_cannot_take():
    z, y = torch.zeros(1, 4, 8, 8), torch.tensor([0])
    flow, dit = (SiT(**size("T"), input_size=8, classes=10, process=process) for process in ("sit", "dit"))

    def refused(message, process, *words):
        with pytest.raises(UserError, match=message):
            sit.check_sampling(process, *words[:1], *words[3:])
        with pytest.raises(UserError, match=message):
            process.sample(*words)

    for model in (dit, Guided(dit, 2)):
        refused("the model is a dit: Flow .*sde, euler, heun.* needs a sit", Flow(), model, z, y, "sde", 250)
    for model in (flow, Guided(flow, 2)):
        refused("the model is a sit: Diffusion .*ddpm.* needs a dit", Diffusion(), model, z, y, "ddpm", 250)
    refused("--sampler ddpm is not for a sit, which has sde, euler, heun", Flow(), flow, z, y, "ddpm", 250)
    refused("--sampler sde is not for a dit, which has ddpm", Diffusion(), dit, z, y, "sde", 250)
    for sampler, steps, least in (("sde", 1, 2), ("euler", 0, 1), ("heun", 0, 1)):
        refused(f"--steps {steps}: {sampler} takes {least} or more", Flow(), flow, z, y, sampler, steps)
    for steps in (0, 1, 1001):
        refused(f"--steps {steps}: ddpm takes 2 to 1000", Diffusion(), dit, z, y, "ddpm", steps)
        with pytest.raises(UserError, match=f"--steps {steps}: the diffusion can take 2 to 1000 steps"):
            Diffusion(keep=steps)
    with pytest.raises(UserError, match="the model is a dit"):              # also without naming the sampler
        Flow().sample(dit, z, y)
    with pytest.raises(UserError, match="the model is a sit"):
        Diffusion().sample(flow, z, y)
    assert sit.check_sampling(Flow(), lambda x, t, y: x, "euler", 1) is None  # a function carries no process


@pytest.mark.parametrize("keep", [1000, 250, 10])
def test_dits_schedules_are_the_public_ones(keep):
    d, name = Diffusion(keep=keep), f"sched{keep}."
    assert (d.times.numpy() == DIT[name + "timestep_map"]).all()
    for key, ours in (("betas", d.betas), ("alphas_cumprod", d.abar),
                      ("posterior_log_variance_clipped", d.log_min),
                      ("posterior_mean_coef1", d.c0), ("posterior_mean_coef2", d.ct)):
        assert relative(DIT.pick(name + key, ours), DIT[name + key]) < 1e-12


@PRECISIONS
@pytest.mark.parametrize("keep", [250, 10])
def test_one_reverse_step_is_dits(golden_frequencies, keep, dtype, suffix):
    d, i, x = Diffusion(keep=keep), DIT.input(f"pmv{keep}.t"), DIT.input("pmv.x").to(dtype)
    model = golden_net(DIT, "net8", 8, "dit", dtype)
    with torch.no_grad():
        mean, logvar, x0 = d.reverse(model(x, d.times[i], DIT.input("pmv.y")), x, i)
    close(DIT, f"pmv{keep}.mean", suffix, mean, 8e-6)
    close(DIT, f"pmv{keep}.log_variance", suffix, logvar, 8e-6)
    close(DIT, f"pmv{keep}.pred_xstart", suffix, x0, 2e-6, "rel")


def dit_case(kind, dtype):
    if kind == "toy":
        m, s, v = (DIT.input(f"toy.{k}").to(dtype) for k in "msv")

        def toy(x, t, y):
            a = sit.alphas_bar()[t][:, None, None, None].to(x)
            return torch.cat([(1 - a).sqrt() * (x - a.sqrt() * m) / (a * s ** 2 + 1 - a), v.expand_as(x)], 1)
        return toy
    model = golden_net(DIT, "net8", 8, "dit", dtype)
    return Guided(model, float(DIT["sample.cfg_scale"]), channels=3) if kind == "cfg" else model


@PRECISIONS
@pytest.mark.parametrize("kind", ["toy", "net", "cfg"])
def test_ten_ddpm_steps_are_dits(golden_frequencies, kind, dtype, suffix):
    draw = stream(DIT["sample.noise_seed"], (4 if kind == "cfg" else 2, 4, 8, 8), dtype, rows=2)
    z, y = DIT.input("sample.z").to(dtype), DIT.input("sample.y")
    out = Diffusion().sample(dit_case(kind, dtype), z, y, steps=10, draw=draw)
    close(DIT, f"{kind}.ddpm10.out", suffix, out, 5e-6 if kind == "toy" else 2e-6,
          1 if kind == "toy" else "rel")


@pytest.mark.parametrize("process, times", [(Flow(), [0, .24, .48, .72, .96]),
                                            (Diffusion(), [999, 749, 500, 250, 0])])
def test_samplers_draw_for_themselves_and_tell_the_callback(process, times):
    model = SiT(**size("T"), input_size=8, classes=10, process=process.name)
    z, y, outs, seen = torch.randn(2, 4, 8, 8), torch.tensor([0, 10]), [], []
    before = z.clone()
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(process.sample(model, z, y, steps=5, callback=lambda *a: seen.append(a)))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
    assert [k for k, *_ in seen] == 3 * [0, 1, 2, 3, 4]
    assert [t for _, t, *_ in seen[:5]] == pytest.approx(times)
    assert all(x.shape == x0.shape == z.shape for *_, x, x0 in seen)
    assert torch.equal(z, before) and torch.equal(seen[0][2], z)


# Gaussian data N(m, s^2): every scheme is linear there, so its mean and variance follow a recursion.

M, S = 0.7, 0.45
VELOCITY, SCORE = gauss_velocity(M, S)


def flow_net(x, t, y):
    return VELOCITY(x, t[:, None, None, None].to(x))


def dit_net(x, t, y, fraction=0.3):
    a = sit.alphas_bar()[t][:, None, None, None].to(x)
    eps = (1 - a).sqrt() * (x - a.sqrt() * M) / (a * S ** 2 + 1 - a)
    return torch.cat([eps, torch.full_like(x, 2 * fraction - 1)], 1)


def flow_recursion(sampler, steps):
    """Mean and variance of the scheme's last state, from the closed forms of velocity and score."""
    mean, var = 0.0, 1.0
    grid = np.append(np.linspace(0, .96, steps), 1) if sampler == "sde" else np.linspace(0, 1, steps + 1)
    for k, (t, u) in enumerate(zip(grid[:-1], grid[1:])):
        dt = u - t

        def step(x, t=t, u=u, dt=dt):
            if sampler == "sde":
                return x + (VELOCITY(x, t) + (1 - t) * SCORE(x, t)) * dt
            first = x + VELOCITY(x, t) * dt
            return first if sampler == "euler" else x + (VELOCITY(x, t) + VELOCITY(first, u)) * dt / 2
        noise = 2 * (1 - t) * dt if sampler == "sde" and k < steps - 1 else 0
        mean, var = step(mean), (step(1.) - step(0.)) ** 2 * var + noise
    return mean, var


def ddpm_recursion(steps):
    """The same for DiT's chain, written with the posterior of x_{t-1} given x_t and x_0."""
    kept = [round(i * 999 / (steps - 1)) for i in range(steps)]
    abar = np.cumprod(1 - np.linspace(1e-4, .02, 1000))[kept]
    mean, var = 0.0, 1.0

    def post(i):
        return (1 - abar[i] / abar[i - 1]) * (1 - abar[i - 1]) / (1 - abar[i])

    for i in reversed(range(steps)):
        a, before = abar[i], abar[i - 1] if i else 1.0
        gain = np.sqrt(a) * S ** 2 / (a * S ** 2 + 1 - a)         # E[x_0 | x_t] = M + gain (x_t - sqrt(a) M)
        c0, ct = np.sqrt(before) * (1 - a / before) / (1 - a), np.sqrt(a / before) * (1 - before) / (1 - a)

        def step(x, c0=c0, ct=ct, gain=gain, a=a):
            return c0 * (M + gain * (x - np.sqrt(a) * M)) + ct * x

        noise = (1 - a / before) ** 0.3 * post(i) ** 0.7 if i else 0
        mean, var = step(mean), (step(1.) - step(0.)) ** 2 * var + noise
    return mean, var


def moments_agree(sampler, steps, n):
    g = torch.Generator().manual_seed(steps)

    def normal(k=None):
        return torch.randn(1, 1, 1, n, generator=g, dtype=torch.float64)

    if sampler == "ddpm":
        out = Diffusion().sample(dit_net, normal(), None, steps=steps, draw=normal)
        mean, var = ddpm_recursion(steps)
    else:
        out = Flow().sample(flow_net, normal(), None, sampler, steps, draw=normal)
        mean, var = flow_recursion(sampler, steps)
    assert abs(out.mean().item() - mean) < 4 * math.sqrt(var / n), (out.mean().item(), mean)
    assert abs(out.var().item() - var) < 4 * var * math.sqrt(2 / n), (out.var().item(), var)


@pytest.mark.parametrize("steps", [10, 50, 250])
@pytest.mark.parametrize("sampler", ["sde", "euler", "heun", "ddpm"])
def test_gaussian_samples_follow_the_schemes_recursion(sampler, steps):
    moments_agree(sampler, steps, 200_000)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [10, 50, 250])
@pytest.mark.parametrize("sampler", ["sde", "euler", "heun", "ddpm"])
def test_a_million_gaussian_samples_follow_the_schemes_recursion(sampler, steps):
    moments_agree(sampler, steps, 1_000_000)


def exact_moments(steps):
    """Mean and variance of the SDE sampler itself without sampling error: pixel 0 gets no noise, pixel 1 a
    one at the start, pixel 2 + k a one at step k."""

    def one(j):
        return F.one_hot(torch.tensor(j), steps + 1).double()[None, None, None]

    out = Flow().sample(flow_net, one(1), None, "sde", steps, draw=lambda k: one(2 + k)).flatten()
    return out[0].item(), (out[1:] - out[0]).square().sum().item()


@pytest.mark.parametrize("steps", [2, 10, 50, 250])
def test_the_sde_sampler_equals_its_recursion(steps):
    assert exact_moments(steps) == pytest.approx(flow_recursion("sde", steps), rel=1e-12)


def order(errors):
    """The slope between errors at step counts that double."""
    return [math.log2(a / b) for a, b in zip(errors, errors[1:])]


@pytest.mark.parametrize("sampler, expected", [("euler", 1), ("heun", 2)])
def test_the_odes_samplers_have_their_order(sampler, expected):
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).view(1, 1, 3, 3)
    exact = M + S * x
    errors = [(Flow().sample(flow_net, x, None, sampler, n) - exact).abs().max().item()
              for n in (40, 80, 160, 320)]
    assert order(errors) == pytest.approx([expected] * 3, abs=0.1)


def test_the_sde_sampler_has_order_one():
    mean, var = flow_recursion("sde", 200_000)                     # the limit with the same last step of 0.04
    moments = [exact_moments(n) for n in (40, 80, 160, 320)]
    assert [m for m, _ in moments] == pytest.approx([mean] * 4, rel=1e-12)      # the mean has no error at all
    assert order([abs(v - var) for _, v in moments]) == pytest.approx([1] * 3, abs=0.1)


def test_the_score_from_the_velocity_is_the_closed_form_also_at_the_start():
    x = torch.linspace(-3, 3, 7, dtype=torch.float64)
    for t in (0.0, 0.01, 0.3, 0.96, 0.999):
        assert relative(Flow().score(VELOCITY(x, t), x, t), SCORE(x, t)) < 1e-10
    assert torch.equal(Flow().score(VELOCITY(x, 0.), x, 0.), -x)
