"""The demo is whole: every stage runs, prints its command, and is not run again."""
import json
import os
import re
import subprocess
import sys
import time

from PIL import Image

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
    assert Image.open(tmp_path / "demo/story.png").width > 500
    weights = {p: p.stat().st_mtime_ns for p in (tmp_path / "demo").rglob("*.pt*") if p.suffix in (".pt", ".pth")}
    (tmp_path / "demo/samples-aligned-cfg2/samples.npz").unlink()        # as if stopped there
    again, _ = demo(tmp_path / "demo")
    assert again.count("is finished") >= 3 and json.loads((tmp_path / "demo/table.json").read_text())["rows"] == table["rows"]
    assert all(p.stat().st_mtime_ns == t for p, t in weights.items())
