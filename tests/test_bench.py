"""bench.py: every job runs at a tiny size and prints its rows, and every peer does the work that ours does;
what only a GPU can show is left to `python tests/bench.py`."""
import itertools
import math
import re
import subprocess
import sys

import bench
import inside
import measure
import numpy as np
import peers
import pytest
import torch
from conftest import ROOT, call, relative

import sit
import train_sit
import train_vae
from vae import Images, Normalizer, UserError

TRAIN = "--tiny --steps 4 --batch 8 --micro 4 --compile off --workers 0"


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("bench")


def rows(text, heads=2):
    """The cells of each printed row but for the heads: [[text or number, ...], ...]."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    cells = [[c.strip() for c in line] for line in lines]
    number = re.compile(r"[\d.,e+-]*\d[\d.,e+-]*")
    return [[float(c.replace(",", "")) if number.fullmatch(c) else c for c in row] for row in cells[heads:]]


def side_by_side(out, capsys, words, apart):
    """The rows of a job against a peer, after the checks that all such rows stand."""
    call(bench, f"{words} --repeats 1 --out {out}")
    table = rows(capsys.readouterr().out)
    for what, ours, theirs, ratio, differ in table:
        assert what and ours > 0 and theirs > 0 and differ <= apart
        assert ratio == pytest.approx(ours / theirs, rel=0.02)
    return [row[0] for row in table]


# ---------------------------------------------------------------------------------------------- against peers


def test_a_step_of_stage_2_is_compared_with_four_ways(out, capsys):
    what = side_by_side(out, capsys, "step --tiny --model T --batch 4", 1e-6)
    assert [line.split(": ")[1] for line in what] == list(bench.WAYS.values())
    assert what[0].startswith("SiT-T/2, batch 4, fp32")


def test_a_step_of_stage_1_is_compared_with_three_packages(out, capsys):
    what, = side_by_side(out, capsys, "vae-step --tiny", 1e-5)
    assert what == "Eq. 6, 32 px, batch 2, vits14_reg, fp32: diffusers, transformers, lpips"


@pytest.mark.parametrize("peer, words", [
    (peers.DiffusionWay, "step --model T --against sit"),
    pytest.param(peers.TunedVAE, "vae-step", marks=pytest.mark.slow)])
def test_a_peer_that_does_other_work_is_no_peer(out, monkeypatch, peer, words):
    """A loss that differs by a hundredth ends the comparison."""
    own = peer.terms
    monkeypatch.setattr(peer, "terms", lambda *args: {k: 1.01 * v for k, v in own(*args).items()})
    with pytest.raises(AssertionError, match="loss"):
        call(bench, f"{words} --tiny --repeats 1 --out {out}")


def test_the_vae_is_compared_as_loaded_and_in_channels_last(out, capsys):
    assert side_by_side(out, capsys, "vae --tiny", 1e-5) == [
        "encode, ours as loaded", "decode, ours as loaded",
        "encode, ours channels_last", "decode, ours channels_last"]


def test_the_crop_is_adms_pixel_for_pixel(out, capsys):
    assert side_by_side(out, capsys, "crop --tiny", 0) == ["4 pictures of photographs-4-100x75, to 32 px"]


def test_cached_latents_are_read_as_one_file_for_each_would_be(out, capsys):
    call(bench, f"cache --tiny --repeats 1 --workers 0 --out {out}")
    warm, cold = rows(capsys.readouterr().out)
    assert warm[0] == "256 random reads, batches of 16, 0 worker(s), warm" and warm[4] == 0
    assert cold[0].endswith("cold") and (cold[4] == 0 or cold[1].startswith("not measured"))


def test_all_that_is_read_from_a_cache_and_from_files_is_equal(out):
    manifest = {"shape": (64, 2, 8, 32, 32), "classes": []}
    cache = train_sit.Cache(bench.once(out / "moments-64", lambda p: pytest.skip("made by the test before")),
                            manifest)
    files = peers.LatentFiles(cache, out / "moments-64-files")
    for i, flip in itertools.product((0, 7, 63), (0, 1)):
        assert torch.equal(files[i, flip][0], cache[i, flip]) and cache[i, flip].any()


@pytest.mark.slow
def test_fid_prints_our_time_beside_torch_fidelitys_and_that_the_results_agree(out, capsys):
    what = side_by_side(out, capsys, "fid --images 3 --side 32 --n 40 80 --dim 20", 1e-5)
    assert what == ["Inception, 3 pictures of 32 px, from files to covariance",
                    "distance from 40 + 40 features of 20", "distance from 80 + 80 features of 20"]


def test_sampling_prints_the_ratio_to_the_official_way_and_its_parts(out, capsys):
    call(bench, f"sample --tiny --model T --steps 4 --batch 3 --repeats 1 --out {out}")
    text = capsys.readouterr().out
    official, one, few = rows(text)
    assert [official[1], one[1], few[1]] == [16, 8, 7] and official[4] == 1
    assert few[4] == pytest.approx(official[2] / few[2], rel=0.02)
    whole, calls, guidance = map(float, re.search(
        r"([\d.]+) times as fast: ([\d.]+) by one call .* ([\d.]+) by guidance", text).groups())
    assert whole == pytest.approx(few[4], rel=0.02) == pytest.approx(calls * guidance, rel=0.02)
    assert float(re.search(r"differ by (\S+)", text)[1]) < 1e-5


def test_bf16_samples_are_compared_with_float32(out, capsys):
    call(bench, f"sample --tiny --model T --steps 4 --batch 2 --dtype bf16 --repeats 1 --out {out}")
    assert float(re.search(r"PSNR ([\d.]+) dB", capsys.readouterr().out)[1]) > 30


# ------------------------------------------------------------------------------------------- the peers' parts


def a_sit(side=8):
    torch.manual_seed(0)
    return measure.wake(sit.SiT(depth=2, dim=64, heads=2, input_size=side, classes=3))


def test_the_public_sit_is_ours():
    ours, x, t, y = a_sit(), torch.randn(3, 4, 8, 8), torch.rand(3), torch.tensor([0, 2, 3])
    theirs = peers.PublicSiT(ours)
    with torch.no_grad():
        assert relative(ours(x, t, y), theirs(x, t, y)) <= 1e-5
        pair = torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, 3)])
        guided = theirs.forward_with_cfg(*pair, 1.8)
        for half in guided[:, :3].chunk(2):
            assert relative(sit.Guided(ours, 1.8, channels=3)(x, t, y)[:, :3], half) <= 1e-5


def test_the_official_way_samples_what_ours_does_and_asks_1000_times_where_ours_asks_435_times():
    model, seen = a_sit(), []
    public, z, y = peers.PublicSiT(model), torch.randn(2, 4, 8, 8), torch.tensor([0, 1])
    public.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    forward, public.forward = public.forward, lambda *a: seen.append(len(a[0])) or forward(*a)
    noises = torch.randn(10, 2, 4, 8, 8)
    theirs = peers.official_sample(public, z, y, 1.8, 10, lambda k: 2 * [noises[k]])
    ours = sit.Flow().sample(sit.Guided(model, 1.8, channels=3), z, y, "sde", 10, lambda k: noises[k])
    assert relative(ours, theirs) <= 1e-5 and sum(seen) == 4 * 10 * 2
    assert bench.calls(sit.Guided(model, 1.8, (0, 0.75)), 250) == 250 + 185


@pytest.mark.parametrize("way", ["sit", "diffusers"])
def test_a_peers_step_ends_where_ours_does(out, monkeypatch, way):
    """One step on the same draws, no labels dropped: weights and EMA are equal."""
    kind, compared = {"sit": peers.DiffusionWay, "diffusers": peers.DiffusersWay}[way], []

    def feed(batches, nets, how, first):
        theirs, batch = kind(nets, how, Normalizer(), torch.device("cpu")), next(batches)
        theirs.terms(batch)
        draws = iter([torch.ones(len(batch[3])), batch[3].float()])
        with monkeypatch.context() as patch:
            patch.setattr(torch, "rand", lambda *_, **__: next(draws))
            patch.setattr(torch, "randn_like", lambda x: batch[2])
            theirs.step()
        yield batch                         # when the next one is asked for, ours has made its step
        name = {"sit": "blocks.1.mlp.fc1", "diffusers": "transformer_blocks.1.ff.net.0.proj"}[way] + ".weight"
        compared.append((nets[0].blocks[1].mlp.fc1.weight, dict(theirs.net.named_parameters())[name]))
        if way == "sit":                    # diffusers' average begins with the first step's weights
            compared.append((nets[1].blocks[1].mlp.fc1.weight, dict(theirs.ema.named_parameters())[name]))
        raise measure.Enough

    args = bench_args(out, "--tiny --batch 4 --model T")
    measure.watch(train_sit, measure.stage2_words(args, "T", 4, 32) + " --ema 0.9", feed, out / "one-step")
    assert len(compared) == (2 if way == "sit" else 1)
    for ours, theirs in compared:
        assert relative(ours.detach(), theirs.detach()) <= 1e-5


def bench_args(out, words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["bench.py", *f"step {words} --out {out}".split()])
        return bench.flags()


def test_a_missing_package_is_said_in_one_line(out, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r"needs diffusers .*pip install -r tests/requirements.txt"):
        call(bench, f"vae --tiny --out {out}")


# ---------------------------------------------------------------------------------------- jobs without a peer


def test_fids_memory_does_not_grow_with_the_images_and_kept_features_show(out):
    """In a process of its own, whose peak nothing else has raised. Both sets are larger than one pass of the
    covariance, whose rows are held (4 MiB here); 10,000 kept features of 256 would be 9.8 MiB."""
    command = [sys.executable, str(ROOT / "tests/bench.py"), "knn", "--fake", "10000", "--real", "4096",
               "--dim", "256", "--out", str(out)]
    few, many, kept = rows(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert many[1] - few[1] < 5 / 1024 and kept[1] - many[1] > 9.8 / 1024
    assert kept[2] == pytest.approx(14096 * 256 * 4 / 2**30, rel=0.01)


@pytest.mark.parametrize("job, more", [
    pytest.param("stage1", "", marks=pytest.mark.slow), ("stage2", "--model T")])
def test_training_prints_speed_and_memory(out, capsys, job, more):
    call(bench, f"{job} {TRAIN} {more} --out {out}")
    (what, setting, rate, memory, mfu), = rows(capsys.readouterr().out)
    assert what.startswith("stage " + job[-1]) and setting == "batch 8, micro-batch 4, compile off"
    assert rate > 0 and memory > 0.1 and mfu == "-"                          # no known GPU


def test_a_run_that_fails_says_why_in_its_row(out, capsys):
    call(bench, f"stage2 {TRAIN.replace('--micro 4', '--micro 3')} --model T --out {out}")
    (_, _, why, *_), = rows(capsys.readouterr().out)
    assert "--batch 8 is not a multiple of 1 process(es) x --micro 3" in why


@pytest.mark.slow
def test_a_start_is_listed_by_part(out, capsys):
    call(bench, f"start --tiny --repeats 1 --out {out}")
    table = rows(capsys.readouterr().out)
    for script in ("sample.py", "train_sit.py", "train_vae.py"):
        own = {part: seconds for what, part, seconds in table if what.startswith(script)}
        assert {"interpreter, torch", "other imports", "reading", "hashing networks", "rest"} <= own.keys()
        assert own.pop("in all") == pytest.approx(sum(own.values()), rel=0.02)
        assert ("sums of ckpt.pt" in own) == (script != "sample.py") and own["rest"] >= 0


def test_a_profile_lists_the_operations_of_three_steps(out, capsys):
    call(bench, f"profile --tiny --model T --top 2 --out {out}")
    table = rows(capsys.readouterr().out)
    assert [row[0] for row in table] == [name for name in ("train_sit", "train_vae", "sample, two steps")
                                         for _ in range(3)]
    for first, second, whole in zip(table[::3], table[1::3], table[2::3]):
        assert first[2] >= second[2] and whole[1] == "in all" and first[2] + second[2] <= whole[2] * 1.01


def test_scaling_prints_time_against_work_and_where_it_is_not_linear(out, capsys):
    call(bench, f"scaling --tiny --repeats 1 --out {out}")
    text = capsys.readouterr().out
    assert len(rows(text)) == 10 and all(row[2] > 0 for row in rows(text))
    assert len([line for line in text.splitlines() if "linear" in line]) == 5


@pytest.mark.parametrize("took, said", [
    (lambda n: 3 * n, "linear throughout"), (lambda n: n + 40, "less than linear up to 32 (a fixed cost)"),
    (lambda n: n + n * n / 40, "more than linear from 8"),
    (lambda n: 8 + n**3 / 999, "less than linear up to 16 (a fixed cost); more than linear from 16")])
def test_where_growth_stops_being_linear(capsys, took, said):
    works = [2, 4, 8, 16, 32]
    assert inside.growth("x", "images", works, [took(n) for n in works]) == "x: " + said
    powers = [row[4] for row in rows(capsys.readouterr().out, heads=1)]
    assert powers == pytest.approx([math.log2(took(2 * n) / took(n)) for n in works[:-1]], rel=0.01)


def test_the_plan_is_the_readmes_table(out, capsys):
    """Hours and disk there are these, rounded or rounded up, for one GPU."""
    call(bench, f"plan --out {out}")
    ours = [(row[2], row[5]) for row in rows(capsys.readouterr().out)]
    text = (ROOT / "README.md").read_text()
    readme = re.search(r"\| \| arithmetic \| hours.*\n\|[-|]+\n((?:\|.*\n)+)", text)
    theirs = [re.sub(r", for a while \d+", "", line).strip("| ").split(" | ")[2:]
              for line in readme[1].splitlines()]
    pairs = [tuple(re.findall(r"[\d.]+", cell)) for line in theirs for cell in line]
    (stage1, disk1), (cached, disk2), b_xl, (samples, disk4) = zip(pairs[::2], pairs[1::2])
    said = [(stage1[0], disk1[0]), (cached[0], disk2[0]), *zip(*b_xl), *zip(samples, 2 * disk4)]
    assert len(said) == len(ours) == 6
    for found, words in zip(ours, said):
        for value, word in zip(found, words):
            digits = len(word.partition(".")[2])
            assert round(value, digits) == float(word) or math.ceil(value) == float(word), (value, word)


def test_a_measured_rate_takes_the_place_of_a_guess(out, capsys):
    call(bench, f"plan --rate XL=1000 --mfu 0.5 --out {out}")
    table = rows(capsys.readouterr().out)
    assert table[3][1:5] == ["measured: 1000 images/s", *(
        pytest.approx(102.4e6 / 1000 / 3600 / n, rel=0.01) for n in (1, 8, 64))]
    assert table[1][2] == pytest.approx(2 * 1281167 * 272.7e9 / (0.5 * 989e12) / 3600, rel=0.01)
    with pytest.raises(UserError, match="--rate XS: stage1, cache, B, XL"):
        call(bench, f"plan --rate XS=1 --out {out}")


def test_what_a_trainer_logs_first_is_caught_and_its_own_step_runs(out):
    """The trainer's weights move between two micro-batches, and nothing of ours moves them."""
    seen = []

    def feed(batches, nets, args, first):
        before = nets[0].vae.decoder.conv_out.weight.clone()
        yield next(batches)
        seen.append((first["mse"], (nets[0].vae.decoder.conv_out.weight - before).abs().max().item()))
        raise measure.Enough

    args = bench_args(out, "--tiny --batch 2 --model T")
    measure.watch(train_vae, measure.stage1_words(args, "vits14_reg", 32), feed, out / "watched")
    (mse, moved), = seen
    assert mse > 0 and 0 < moved <= 1.1 * 5e-5
    assert len(Images(measure.pictures(args, 32), 32)) == 64 and np.isfinite(mse)
