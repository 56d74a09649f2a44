"""The demo is whole: every stage runs, prints its command, and is not run again; its mask head and its measures are right."""
import json
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import jaccard_score

import nets
import shapes
from conftest import ROOT


def demo(folder, *words):
    start = time.time()
    done = subprocess.run([sys.executable, str(ROOT / "tests/demo.py"), "--quick", "--out", str(folder), *words],
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, time.time() - start


def test_quick_demo_runs_prints_its_commands_and_goes_on_where_it_was(tmp_path):
    out, _ = demo(tmp_path / "demo")
    commands = re.findall(r"^\$ python (\S+)", out, re.M)
    assert commands == ["train_vae.py", "train_vae.py", "train_sit.py", "sample.py", "sample.py", "fid.py", "tests/nets.py"]
    table = json.loads((tmp_path / "demo/table.json").read_text())
    assert {"FD cfg 1", "FD cfg 2", "named cfg 1", "named cfg 2", "PSNR", "SC raw", "SC centred"} <= set(table["rows"]["aligned"])
    assert all(isinstance(v, float) for v in table["rows"]["aligned"].values())
    assert {"teacher's features", "encoded latents", "generated latents"} <= set(table["masks"])
    assert Image.open(tmp_path / "demo/story.png").width > 500
    weights = {p: p.stat().st_mtime_ns for p in (tmp_path / "demo").rglob("*.pt*") if p.suffix in (".pt", ".pth")}
    (tmp_path / "demo/samples-aligned-cfg2/samples.npz").unlink()        # as if stopped there
    again, _ = demo(tmp_path / "demo")
    assert again.count("is finished") >= 3 and json.loads((tmp_path / "demo/table.json").read_text())["rows"] == table["rows"]
    assert all(p.stat().st_mtime_ns == t for p, t in weights.items())


def test_mean_iou_is_scikit_learns():
    g = torch.Generator().manual_seed(0)
    seen, truth = torch.rand(5, 6, 6, generator=g) > 0.6, torch.rand(5, 6, 6, generator=g) > 0.3
    assert nets.mean_iou(seen, truth) == pytest.approx(jaccard_score(truth.flatten(), seen.flatten(), average="macro"))


def test_the_best_constants_are_the_larger_label_and_the_common_mask():
    truth = torch.zeros(4, 8, 8, dtype=torch.bool)
    truth[:, 2:6, 2:6] = True
    label, mask = nets.constant_guesses(truth)
    assert label == pytest.approx(0.75 / 2) and mask == 1


def test_a_linear_head_finds_the_planted_direction():
    """Foreground patches differ from the others along one direction, beside noise in all: new pictures are read right."""
    g = torch.Generator().manual_seed(0)
    patches = torch.rand(60, 1, 4, 4, generator=g) > 0.5
    masks = torch.nn.functional.interpolate(patches.float(), scale_factor=4)[:, 0] > 0
    features = torch.randn(60, 16, 8, generator=g) + 6 * patches.flatten(1)[..., None] * torch.nn.functional.one_hot(torch.tensor(3), 8)
    head = nets.train_mask_head(features[:40], masks[:40])
    assert (head(features[40:])[:, 1::4, 1::4] == patches[40:, 0]).float().mean() > 0.97


def test_a_colour_threshold_finds_drawn_shapes():
    x, masks, _ = shapes.draw(200, 32, seed=3)
    seen = nets.threshold_mask(torch.from_numpy(np.moveaxis(x, -1, 1)))
    assert nets.mean_iou(seen, torch.from_numpy(masks)) > 0.8
