"""README.md and PAPER.md: every command parses, and runs to its result on tiny data; so does the Python.

bash itself reads the commands, loops and all, but `python` and `torchrun` are functions there that print
their words and wait until this process has done what they say.
"""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import figures
import numpy as np
import pytest
import shapes
import torch
from conftest import ROOT, call
from PIL import Image

import dino
import fid
import sample
import sit
import train_sit
import train_vae
import vae

SCRIPTS = {"train_vae.py": train_vae, "train_sit.py": train_sit, "sample.py": sample, "fid.py": fid,
           "tests/figures.py": figures}
ASK = 'python() { echo "$*"; read -r; }\ntorchrun() { shift; python "$@"; }\n'

SMALLER = {   # what makes the section's commands tiny; flags that a command gives itself come later and win
    "train_vae.py": "train_vae.py --size 32 --batch 4 --steps 1 --align-hidden 16 --workers 0 --no-compile",
    "train_sit.py": "train_sit.py --size 32 --batch 4 --steps 1 --keep 1 --model T --workers 0 --no-compile",
    "--model B": "", "--model XL": "", "--model $m": "",
    "sample.py": "sample.py --num 5 --steps 3",
    "fid.py": "fid.py --size 32",
    "--num-images 50000": "--num-images 6", "--num-images 10000": "--num-images 10",
    "figures.py tsne": "figures.py tsne --size 32 --num 2 --perplexity 5",
    "figures.py attention": "figures.py attention --size 32 --num 2",
    "0400000": "0000001", "1000000": "0000002", "2000000": "0000003",                               # steps
    "3250000": "0000004", "4000000": "0000005",
}
CONSISTENCY = {"sc_crop", "sc_flip", "sc_blur", "sc_grayscale", "sc_all"}
NUMBERS = {"table2.json": CONSISTENCY | {"rfid", "psnr", "ssim2"},
           "table10.json": {"z_mean", "z_std", "z_min", "z_max"}}
SAMPLES = {"fid", "sfid", "is", "precision", "recall"}


LOOP = "    for n in $(seq"       # five lines that score milestones, with a test of their own
README, PAPER = ((ROOT / name).read_text() for name in ("README.md", "tests/PAPER.md"))


def text_of(section):
    """What README says under this heading; PAPER.md goes on where README's Tables 1 and 3 end."""
    text = README.split(f"## {section}\n")[1].split("\n## ")[0].split(LOOP)[0]
    return f"{text}\n{PAPER}" if section == "Tables 1 and 3" else text


def commands(do, smaller=None, section="Tables 1 and 3"):
    """Calls do(script, words) for each command of the section, after the one before it is done."""
    code = "\n".join(line for line in text_of(section).splitlines() if line.startswith("    "))
    for at_full_size, tiny in (smaller or {}).items():
        assert at_full_size in code, at_full_size
        code = code.replace(at_full_size, tiny)
    told(code, do)


def told(code, do):
    """Calls do(script, words) for each command of this bash code, likewise."""
    with subprocess.Popen(["bash", "-euc", ASK + code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as bash:
        for line in bash.stdout:
            script, *words = line.split()
            do(script, words)
            bash.stdin.write("\n")
            bash.stdin.flush()
    assert bash.returncode == 0


needs_bash = pytest.mark.skipif(not shutil.which("bash"), reason="no bash")


def parse(script, words):
    kept, sys.argv = sys.argv, [script, *words]
    try:
        return SCRIPTS[script].flags()
    finally:
        sys.argv = kept


@needs_bash
def test_every_command_parses():
    seen = []
    commands(lambda script, words: seen.append(script) or parse(script, words))
    assert set(seen) == set(SCRIPTS) and len(seen) > 90
    del seen[:]
    section = "A laptop, one GPU, eight"
    commands(lambda script, words: seen.append(script) or parse(script, words), section=section)
    paper = ["train_vae.py", "train_sit.py", "sample.py", "sample.py", "fid.py", "fid.py"]
    claim = ["train_vae.py", "train_sit.py", "train_sit.py", "sample.py", "sample.py", "fid.py"]
    assert seen == paper + claim


@needs_bash
def test_the_loop_scores_each_milestone_once_it_is_there(tmp_path, monkeypatch):
    """A sleep in which the next one appears, and each is sampled and scored in its turn."""
    monkeypatch.chdir(tmp_path)
    Path("out/B-vae").mkdir(parents=True)
    Path("out/B-vae/0050000.pt").touch()
    code, seen = "".join(README[README.index(LOOP):].splitlines(keepends=True)[:5]), []
    told('sleep() { echo "sleep $1"; read -r; }\n' + code, lambda *call: seen.append(call) or appear(*call))
    slept, asked = [c for c in seen if c[0] == "sleep"], [c for c in seen if c[0] != "sleep"]
    assert len(code.splitlines()) == 5 and len(slept) == 7 and len(asked) == 16
    for k, (draw, score) in enumerate(zip(asked[::2], asked[1::2])):
        name = f"out/B-vae/{50_000 * (k + 1):07d}"
        drawn, scored = parse(*draw), parse(*score)
        assert (draw[0], drawn.ckpt, drawn.out, drawn.npz) == ("sample.py", f"{name}.pt", f"{name}-10k", "")
        assert (score[0], scored.samples) == ("fid.py", [f"{name}-10k/samples.npz"])


def appear(script, words):
    """While the loop sleeps, the trainer writes its next milestone."""
    if script == "sleep":
        Path(f"out/B-vae/{50_000 * (1 + len(list(Path('out/B-vae').iterdir()))):07d}.pt").touch()


@pytest.mark.parametrize("name", ["README.md", "tests/PAPER.md", "tests/RESULTS.md"])
def test_pages_are_short_and_their_links_lead_somewhere(name):
    text = (ROOT / name).read_text()
    lines = text.splitlines()
    assert name != "README.md" or len(lines) <= 200
    assert [line for line in lines if len(line) >= 140 and line[0] != "|" and "$O/" not in line] == []
    for target in re.findall(r"\]\(([^)]+)\)", text):
        path, _, heading = target.partition("#")
        if not path.startswith("https:"):
            file = (ROOT / name).parent / path
            assert file.exists(), target
            headings = re.findall(r"^#+ (.*)", file.read_text(), re.M) if heading else []
            assert not heading or heading in [h.lower().replace(" ", "-") for h in headings]


def test_the_diff_that_readme_shows_is_the_one_in_changes():
    shown = README.split("```diff\n")[1].split("```")[0]
    assert (ROOT / "tests/changes/times.diff").read_text().endswith(shown)
    for name, lines in re.findall(r"\| ([\w-]+): [^|]*\| [\w.]+ \| (\d+)", README):
        diff = (ROOT / f"tests/changes/{name}.diff").read_text()
        added = [line[1:].strip() for line in diff.splitlines() if re.match(r"\+(?!\+\+ )", line)]
        code = [line for line in added if line and line[0] != "#"]
        assert len(code) == int(lines) or name == "teacher", (name, len(code))


class Features(torch.nn.Module):
    """In Inception's place: means of patches."""

    def forward(self, x):
        f = torch.nn.functional.adaptive_avg_pool2d(x.float() / 255, 2).flatten(1)
        return f, f[:, :7] ** 2, f.softmax(1)


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder with ImageNet's layout, ADM's reference batch, and under each public name a small random
    network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    for owner, name in ((vae, "PUBLIC"), (fid, "PUBLIC"), (dino, "SIZES"), (dino, "BACKBONES"),
                        (dino, "SEGMENTERS"), (dino, "DEPTHS")):
        monkeypatch.setattr(owner, name, {})             # so that public names are files and folders here
    shapes.write("imagenet/train", 20, 32, 1)
    shapes.write("imagenet/val", 20, 32, 2)
    np.savez("VIRTUAL_imagenet256_labeled.npz", arr_0=shapes.draw(12, 32, 3)[0])
    torch.manual_seed(0)
    small = vae.VAE(16, (1, 1, 1, 1), 1)                 # f = 8, as SD-VAE: 4 x 4 latents
    for name in ("sd-vae-ft-ema", "sd-vae-ft-mse"):
        small.save(name)
    for name in ("vitl14_reg", "vitb14_reg", "vitl14", "vitb14"):
        net = dino.DINOv2(64, 1, patch=4, registers=4 * name.endswith("_reg"), grid=4)
        torch.save(net.state_dict(), name)
    lpips = fid.LPIPS([4] * 13)
    torch.save({f"features.{k}": v for k, v in lpips.features.state_dict().items()}, "vgg16")
    torch.save({f"{k}.model.1.weight": v.data for k, v in lpips.lin.items()}, "lpips")
    head = {f"bn.{k}": torch.ones(64) for k in ("weight", "bias", "running_mean", "running_var")}
    head |= {"conv_seg.weight": torch.randn(21, 64, 1, 1), "conv_seg.bias": torch.zeros(21)}
    torch.save(head, "vitl14_voc2012")
    depth = dino.Depth(64, 32, (32, 32, 32), 1, 1, 8)
    torch.save({"model": {f"head.{k}": v for k, v in depth.state_dict().items()}}, "moge-vitl")
    Path("hub/hub/checkpoints").mkdir(parents=True)
    for process, file, _ in sit.PUBLIC.values():
        process = "dit" if process == "dit" else "sit"
        model = sit.SiT(**sit.size("T"), input_size=4, classes=10, process=process)
        torch.save(model.state_dict(), Path("hub/hub/checkpoints", file))
    monkeypatch.setattr(fid.Inception, "load", lambda source="inception": Features())


def result(script, args):
    """Asserts that what a command makes is there, and that numbers are under the names that the section gives
    them."""
    if script == "train_vae.py":
        info = json.loads(Path(args.out, "vae/reals.json").read_text())
        assert {"mean", "std", "min", "max"} <= info["latents"].keys()
        teacher = args.dino if args.align else None
        assert (info["kl"], info["features"], info.get("dino")) == (args.kl, args.features, teacher)
    elif script == "train_sit.py":
        held = torch.load(Path(args.out, f"{args.steps:07d}.pt"), weights_only=True)
        norm = args.norm or ("none" if "sd-vae" in args.vae else "max-min")
        assert held["info"]["normalizer"]["kind"] == norm
        assert (held["settings"]["process"], held["step"]) == (args.process, args.steps)
    elif script == "sample.py":
        assert Path(args.out, "grid.png" if args.npz is None else "samples.npz").is_file()
        assert not args.tasks or Path(args.out, "tasks.png").is_file()
    elif script == "fid.py":
        source = Path((args.vae or args.samples)[0])
        file = Path(args.out or (source if source.is_dir() else source.parent) / "results.json")
        names = NUMBERS.get(file.name, NUMBERS["table2.json"] if args.vae else SAMPLES)
        book = json.loads(file.read_text())
        assert set(args.vae or args.samples) == set(book)
        assert np.isfinite([entry["value"][name] for entry in book.values() for name in names]).all()
    else:
        assert Path(args.out).is_file()


def test_the_python_of_the_readme_runs(world, capsys):
    """As it stands, but for sizes, labels and folders."""
    call(train_sit, "--size 32 --batch 4 --steps 1 --model T --workers 0 --no-compile --vae sd-vae-ft-ema")
    code = README.split("```python\n")[1].split("```")[0]
    for at_full_size, tiny in {"4, 4, 32, 32": "4, 4, 4, 4", "207, 360, 387, 974": "0, 1, 2, 3", "250": "3",
                               "256": "32", "grid=32": "grid=4", "folder/of/samples": "imagenet/train",
                               "folder/of/reals": "imagenet/val"}.items():
        assert at_full_size in code
        code = code.replace(at_full_size, tiny)
    names = {}
    capsys.readouterr()
    exec(code, names)
    assert Image.open("four.png").size == (4 * 34 + 2, 36) and float(capsys.readouterr().out) > 0
    assert names["z"].shape == (1, 4, 4, 4) and names["patch"].shape == (1, 16, 64)


@pytest.mark.slow
@needs_bash
@pytest.mark.parametrize("section", ["A laptop, one GPU, eight", "Tables 1 and 3"])
def test_every_command_runs_to_its_result(world, section):
    def run(script, words):
        call(SCRIPTS[script], *words)
        result(script, parse(script, words))

    whole = "Table" in section                          # there every rule of SMALLER must find its place
    commands(run, {k: v for k, v in SMALLER.items() if whole or k in text_of(section)}, section)
