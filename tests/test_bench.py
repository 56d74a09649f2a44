"""bench.py: every job runs at a tiny size and prints its rows; what only a GPU can show is left to
`python tests/bench.py`."""
import re
import subprocess
import sys

import bench
import pytest
import torch
from conftest import ROOT, call

import sit

TINY = "--tiny --steps 4"
TRAIN = f"{TINY} --batch 8 --micro 4 --compile off --workers 0"


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("bench")


def rows(text):
    """The cells of each printed row but for the heads: [[text or number, ...], ...]."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    cells = [[c.strip() for c in line] for line in lines]
    number = re.compile(r"[\d.,e+-]*\d[\d.,e+-]*")
    return [[float(c.replace(",", "")) if number.fullmatch(c) else c for c in row] for row in cells[2:]]


@pytest.mark.slow
def test_fid_prints_our_time_beside_torch_fidelitys_and_that_the_results_agree(out, capsys):
    call(bench, f"fid --images 3 --side 32 --n 40 80 --dim 20 --repeats 1 --out {out}")
    table = rows(capsys.readouterr().out)
    assert [row[0] for row in table] == [
        "Inception, 3 pictures of 32 px, from files to covariance",
        "distance from 40 + 40 features of 20", "distance from 80 + 80 features of 20"]
    for _, ours, theirs, ratio, apart in table:
        assert ours > 0 and theirs > 0 and apart < 1e-5
        assert ratio == pytest.approx(ours / theirs, rel=0.02)


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


def test_sampling_prints_the_ratio_to_the_official_way_and_its_parts(out, capsys):
    call(bench, f"sample {TINY} --model T --batch 2 3 --out {out}")
    text = capsys.readouterr().out
    table = rows(text)
    assert len(table) == 3 and all(row[2] > 0 for row in table)
    found = re.search(r"([\d.]+) times .*: ([\d.]+) by .* ([\d.]+) by", text)
    ratio, fewer, faster = map(float, found.groups())
    assert ratio == pytest.approx(max(table[1][2], table[2][2]) / table[0][2], rel=0.02)
    assert ratio == pytest.approx(fewer * faster, rel=0.02)
    assert float(re.search(r"PSNR ([\d.]+) dB", text)[1]) > 30


def test_the_official_way_asks_the_network_1000_times_an_image_and_ours_435_times():
    model = sit.SiT(depth=1, dim=8, heads=2, input_size=2, classes=3)
    assert bench.calls(bench.Official(model, 1.8), 250) == 1000
    assert bench.calls(sit.Guided(model, 1.8, (0, 0.75)), 250) == 250 + 185
    x, t, y = torch.randn(1, 4, 2, 2), torch.ones(1) / 2, torch.zeros(1, dtype=torch.long)
    assert torch.equal(bench.Official(model, 1.8)(x, t, y), sit.Guided(model, 1.8, channels=3)(x, t, y))
