"""What a researcher changes in the first weeks: each diff in changes/ is applied to a copy of the project,
and then trains, goes on where it stopped, and samples."""
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT

CHANGES = ROOT / "tests/changes"
SIT = "train_sit.py {sit} --vae {chain}/vae --steps {n} --out {t}/sit"
SAMPLE = "sample.py --ckpt {t}/sit --num 4 --steps 4 --out {t}/pictures"
RUNS = {  # change: what trains for {n} steps, then what samples
    "equivariance": ["train_vae.py {vae} --eq 0.5 --steps {n} --out {t}/vae"],
    "margins": ["train_vae.py {vae} --steps {n} --out {t}/vae"],
    "teacher": ["train_vae.py {vae} --dino {t}/mobilenet.pth --features patch --steps {n} --out {t}/vae"],
    "qk-norm-rope": [SIT + " --model T-rope", SAMPLE],
    "times": [SIT, SAMPLE],
    "sde-heun": [SIT, SAMPLE + " --sampler sde-heun"],
    "second-ema": [
        SIT + " --ema2 0.9 --keep {n}",
        "sample.py --ckpt {t}/sit/0000004-ema2.pt --num 4 --steps 4 --out {t}/pictures",
    ],
    "zip": [SIT + " --data {t}/data.zip --cache {t}/latents", SAMPLE],
}


def test_every_change_is_run():
    assert {p.stem for p in CHANGES.glob("*.diff")} == set(RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_a_change_is_one_file_and_a_few_lines(name):
    """Ten lines that are not blank or comment, eighteen for two changes in one; a class of its own aside."""
    header, diff = (CHANGES / f"{name}.diff").read_text().split("\n--- ", 1)
    if name == "teacher":
        diff = re.sub(r"^\+class .*\n(\+.*\n)+", "", diff, flags=re.M)
    added = [line[1:] for line in diff.splitlines() if line.startswith("+") and not line.startswith("+++")]
    code = [line for line in added if line.strip() and not line.strip().startswith("#")]
    assert len(re.findall(r"^\+\+\+ ", "--- " + diff, re.M)) == 1 and "Breaks " in header
    assert len(code) <= (18 if name == "qk-norm-rope" else 10), len(code)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "sde-heun" else pytest.mark.slow) for n in RUNS]
)
def test_a_change_trains_goes_on_and_samples(chain, tmp_path, name):
    copy = tmp_path / "project"
    copy.mkdir()
    for file in ROOT.glob("*.py"):
        shutil.copy(file, copy)
    subprocess.run(["git", "apply", str(CHANGES / f"{name}.diff")], cwd=copy, check=True,
                   env={**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path)})
    if name == "teacher":
        import torchvision
        torch.save(torchvision.models.mobilenet_v2().state_dict(), tmp_path / "mobilenet.pth")
    if name == "zip":
        with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
            for path in sorted(chain.data.rglob("*.png")):
                archive.write(path, path.relative_to(chain.data).as_posix())
    fill = {
        "t": tmp_path,
        "chain": chain.root,
        "vae": chain.stage1.replace("--workers 0", "--workers 1") + " --schedule constant",
        "sit": f"{chain.of_data} {chain.sit} --cache {chain.root}/latents",
    }
    train, *rest = RUNS[name]
    for n in (2, 4):
        run(copy, train.format(n=n, **fill))
    for command in rest:
        run(copy, command.format(**fill))
    if rest:
        assert len(list((tmp_path / "pictures/images").iterdir())) == 4
    else:
        assert (tmp_path / "vae/vae/reals.json").is_file()


def run(copy, command):
    script, *words = command.split()
    done = subprocess.run([sys.executable, str(Path(copy, script)), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
