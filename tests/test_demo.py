"""The demo is whole: every stage runs, prints its command, and is not run again; what cannot be is refused
before anything is made; its mask head and its measures are right."""
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import demo
import nets
import numpy as np
import pytest
import shapes
import torch
from conftest import ROOT, call
from PIL import Image
from sklearn.metrics import jaccard_score

from vae import Images, UserError

MEASURED = {"samples cfg 1", "samples cfg 2", "vae", "judge"}


def quick(folder, *words):
    command = [sys.executable, "tests/demo.py", "--quick", "--out", str(folder), *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})       # on busy cores two are slower
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_quick_demo_runs_prints_its_commands_and_goes_on_where_it_was(tmp_path):
    out = quick(tmp_path / "demo")
    commands = re.findall(r"^\$ python (\S+)", out, re.M)
    assert commands == ["train_vae.py", "train_vae.py", "train_sit.py", "sample.py", "sample.py", "fid.py",
                        "tests/nets.py"]
    table = json.loads((tmp_path / "demo/table.json").read_text())
    assert {"FD cfg 1", "FD cfg 2", "named cfg 1", "named cfg 2", "PSNR", "SC raw",
            "SC centred"} <= set(table["rows"]["aligned"])
    assert all(isinstance(v, float) for v in table["rows"]["aligned"].values())
    assert set(table["commands"]["aligned"]) == MEASURED
    assert {"teacher's features", "encoded latents", "generated latents"} <= set(table["masks"])
    assert Image.open(tmp_path / "demo/story.png").width > 500
    files = (tmp_path / "demo").rglob("*.pt*")
    weights = {p: p.stat().st_mtime_ns for p in files if p.suffix in (".pt", ".pth")}
    (tmp_path / "demo/samples-aligned-cfg2/samples.npz").unlink()        # as if stopped there
    again = quick(tmp_path / "demo")
    assert again.count("is finished") >= 3
    assert json.loads((tmp_path / "demo/table.json").read_text())["rows"] == table["rows"]
    assert all(p.stat().st_mtime_ns == t for p, t in weights.items())


@pytest.mark.slow
def test_two_arms_each_have_their_numbers_and_the_commands_that_made_them(tmp_path):
    out = quick(tmp_path / "demo", "--compare")
    table = json.loads((tmp_path / "demo/table.json").read_text())
    assert set(table["rows"]) == set(table["commands"]) == {"aligned", "plain"}
    for name, other in (("aligned", "plain"), ("plain", "aligned")):
        assert {"random FD cfg 1", "random FD cfg 2"} <= set(table["rows"][name])
        assert all(isinstance(v, float) for v in table["rows"][name].values())
        assert set(table["commands"][name]) == MEASURED | {"random"}
        for what, command in table["commands"][name].items():
            assert f"-{name}" in command and f"-{other}" not in command and f"$ {command}\n" in out
            under_the_table = rf"^{name}:\n(  .*\n)*  {what} +{re.escape(command)}$"
            assert re.search(under_the_table, out, re.M)
    assert table["rows"]["aligned"]["PSNR"] != table["rows"]["plain"]["PSNR"]


# --------------------------------------------------------------------------- the picture that tells the story


def test_a_storys_columns_have_their_classes_names_above_them():
    """There is ink above each column that has a name, within its width: a long name is cut."""
    blank, names = torch.full((6, 3, 32, 32), 255, dtype=torch.uint8), ["one", "a name far too long", ""]
    sheet = np.array(demo.page({"six": blank, "three": blank[:3]}, names).convert("L"))
    assert sheet.shape == (20 + (2 * 67 + 3 + 6) + (67 + 3 + 6), 106 + 3 * 67 + 3)
    above = [(sheet[:20, 106 + 67 * k:106 + 67 * (k + 1)] < 128).sum() for k in range(3)]
    assert above[0] > 20 and above[1] > 60 and above[2] == 0
    assert (sheet[:20, :106] == 255).all() and (sheet[20:, 106:] == 255).all()
    assert (sheet[20:, :106] < 128).any()                                    # the rows' texts


# ---------------------------------------------------------------------------- photographs, and what cannot be


def photographs(folder, **classes):
    """PNGs of 40 x 50 px, each of a color of its own: `classes` counts those of each class folder."""
    for c, (name, number) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True)
        for i in range(number):
            Image.new("RGB", (40, 50), (80 * c, 5 * i, 100)).save(folder / name / f"{i:02}.png")
    return folder


class Stop(Exception):
    pass


@pytest.fixture
def only_pictures(monkeypatch):
    """The demo goes no further than its pictures."""
    def stop(args):
        raise Stop
    monkeypatch.setattr(demo, "teacher_and_judge", stop)


@pytest.mark.slow
def test_few_photographs_in_folders_with_spaces_in_their_names_come_to_a_table(tmp_path):
    data, out = photographs(tmp_path / "some photographs/train", ape=20, bee=20, cat=20), tmp_path / "a demo"
    photographs(data.parent / "val", ape=1, bee=5, cat=6)
    (data / "ape/19.png").write_bytes(b"no picture")
    said = quick(out, "--data", data)
    assert "1 unreadable files were left out: ape/19.png" in said and (out / "story.png").is_file()
    table = json.loads((out / "table.json").read_text())
    assert all(isinstance(v, float) for v in table["rows"]["aligned"].values()) and table["masks"] == {}
    assert f"$ {table['commands']['aligned']['vae']}\n" in said
    words = shlex.split(table["commands"]["aligned"]["vae"])
    assert words[words.index("--vae") + 1] == str(out / "vae-aligned")
    assert words[words.index("--num") + 1] == "12"


def test_photographs_are_copied_under_their_own_names_and_unreadable_ones_are_named(tmp_path, only_pictures,
                                                                                    capsys):
    data, copy = photographs(tmp_path / "train", ape=20, bee=20), tmp_path / "demo/data/train"
    photographs(tmp_path / "val", ape=3, bee=3)
    (data / "ape/19.png").write_bytes(b"no picture")      # the file after it is a bee
    (copy.with_name("train.part") / "ape").mkdir(parents=True)
    (copy.with_name("train.part") / "ape/stale.png").write_bytes(b"of a run that was stopped")
    with pytest.raises(Stop):
        call(demo, f"--quick --data {data} --out {tmp_path}/demo")
    assert "1 unreadable files were left out: ape/19.png" in capsys.readouterr().out
    source, made = Images(data, 32), Images(copy, 32)
    assert made.paths == [p for p in source.paths if p != "ape/19.png"]
    for i, path in enumerate(made.paths):
        assert torch.equal(made[i][0], source[source.paths.index(path)][0])


@pytest.mark.parametrize("words, line", [
    ("--data {}/lonely/train", "lonely/val: no images here.*--val"),
    ("--data {}/nothing --val {}/set/val", "nothing: no images here.*--data"),
    ("--data {}/set/train/ape --val {}/set/val",
     "train/ape: expected one folder of images per class.*; 00.png lies in none"),
    ("--data {}/set/train --val {}/set/val/ape",
     "val/ape: expected one folder of images per class.*; 00.png lies in none"),
    ("--data {}/lonely/train --val {}/set/val", "set/val: its class folders are not those of .*lonely/train"),
    ("--val {}/set/val", "--val .*set/val goes with --data"),
    ("--size 20", "--size 20 is not a multiple of 8"), ("--size 0", "--size 0 is not a multiple of 8"),
    ("--data {}/set/train --size 36", "--size 36 is not a multiple of 8")])
def test_wrong_folders_and_sizes_end_in_a_line_before_anything_is_made(tmp_path, only_pictures, words,
                                                                       line):
    photographs(tmp_path / "set/train", ape=2, bee=2)
    photographs(tmp_path / "set/val", ape=2, bee=2)
    photographs(tmp_path / "lonely/train", ape=2, cat=2)
    with pytest.raises(UserError, match=line) as e:
        call(demo, words.format(tmp_path, tmp_path), f"--quick --out {tmp_path}/demo")
    assert "\n" not in str(e.value) and not (tmp_path / "demo").exists()


def test_a_folder_of_other_pictures_is_refused_and_left_as_it_is(tmp_path, only_pictures):
    a, b = (photographs(tmp_path / name / "train", ape=2, bee=2) for name in "ab")
    for folder in (a, b):
        photographs(folder.parent / "val", ape=2, bee=2)

    def files():
        return {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    for out, first, others in (
            ("shapes", "--quick",
             {"": "number", "--quick --size 40": "size", f"--quick --data {a}": "source"}),
            ("photographs", f"--quick --data {a}",
             {"--quick": "source", f"--quick --data {b}": "source", f"--data {a}": "number",
              f"--quick --data {a} --val {b}": "source"})):
        with pytest.raises(Stop):
            call(demo, first, f"--out {tmp_path}/{out}")
        made = files()
        for words, key in others.items():
            says = f"{out}/data/.* was made with {key} .*: --out names another folder"
            with pytest.raises(UserError, match=says):
                call(demo, words, f"--out {tmp_path}/{out}")
        with pytest.raises(Stop):
            call(demo, first, f"--out {tmp_path}/{out}")
        assert files() == made


def test_ctrl_c_waits_for_the_script_that_saves_and_ends_in_a_line(tmp_path):
    """In a copy of the demo whose train_vae.py only waits for the signal, and takes its time to save."""
    (tmp_path / "tests").mkdir()
    for name in ("vae.py", "dino.py", "fid.py", "tests/demo.py", "tests/nets.py", "tests/shapes.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "train_vae.py").write_text(
        "import signal, sys, time\n"
        "def save(*_):\n    time.sleep(3)\n    open('saved', 'w').close()\n    sys.exit(130)\n"
        "signal.signal(signal.SIGINT, save)\nprint('ready', flush=True)\ntime.sleep(60)\n")
    (tmp_path / "out").mkdir()
    for name in ("teacher", "judge"):
        (tmp_path / f"out/{name}.pth").touch()
    run = subprocess.Popen([sys.executable, "tests/demo.py", "--quick", "--out", "out"], cwd=tmp_path,
                           text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                           preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    try:
        assert "ready\n" in run.stdout
        os.killpg(run.pid, signal.SIGINT)                 # as a terminal does
        assert run.wait(timeout=30) == 130 and (tmp_path / "saved").exists()
    finally:
        run.kill()
    assert run.communicate()[1] == "demo.py: stopped; what is finished is kept\n"


# ------------------------------------------------------------------------------------------- judges and masks


def test_a_foreign_judges_means_are_of_training_pictures(tmp_path, capsys):
    """A network whose logits are red and green. Training pictures are greener than red by 100, those to judge
    by 75, real ones by 60: red for pictures like the training ones, green among the real ones."""
    (tmp_path / "judge.py").write_text(
        "IMAGENETTE = {'red': 0, 'green': 1}\n"
        "class SqueezeNet:\n    def __init__(self, size=224):\n        pass\n"
        "    def __call__(self, x):\n        return x.mean((2, 3)), x.mean((2, 3))\n")
    g = np.random.RandomState(0)

    def pictures(n, *color):
        flat = np.array(color) + g.randint(-2, 3, (n, 1, 1, 3))
        return np.broadcast_to(flat, (n, 8, 8, 3)).astype(np.uint8)

    for split, color in (("train", (100, 200, 50)), ("val", (120, 180, 50))):
        (tmp_path / split / "red").mkdir(parents=True)
        for i, picture in enumerate(pictures(20, *color)):
            Image.fromarray(picture).save(tmp_path / split / f"red/{i:02}.png")
    np.savez(tmp_path / "samples.npz", arr_0=pictures(20, 115, 190, 50), arr_1=np.zeros(20, np.int64))

    def right(words=""):
        call(nets, f"{tmp_path}/samples.npz --judge {tmp_path}/judge.py --ref {tmp_path}/val --size 8",
             f"--out {tmp_path}/results.json", words)
        book = json.loads((tmp_path / "results.json").read_text())
        return book["foreign"]["value"][f"{tmp_path}/samples.npz"]["accuracy"]

    assert right() == 1 and "names 100.0% of real pictures" in capsys.readouterr().out
    assert right(f"--means {tmp_path}/val") == 0
    (tmp_path / "train").rename(tmp_path / "elsewhere")
    assert right() == 0 and right(f"--means {tmp_path}/elsewhere") == 1


def test_mean_iou_is_scikit_learns():
    g = torch.Generator().manual_seed(0)
    seen, truth = torch.rand(5, 6, 6, generator=g) > 0.6, torch.rand(5, 6, 6, generator=g) > 0.3
    theirs = jaccard_score(truth.flatten(), seen.flatten(), average="macro")
    assert nets.mean_iou(seen, truth) == pytest.approx(theirs)


def test_the_best_constants_are_the_larger_label_and_the_common_mask():
    truth = torch.zeros(4, 8, 8, dtype=torch.bool)
    truth[:, 2:6, 2:6] = True
    label, mask = nets.constant_guesses(truth)
    assert label == pytest.approx(0.75 / 2) and mask == 1


def test_a_linear_head_finds_the_planted_direction():
    """Foreground patches differ from the others along one direction, beside noise in all: new pictures are
    read right."""
    g = torch.Generator().manual_seed(0)
    patches = torch.rand(60, 1, 4, 4, generator=g) > 0.5
    masks = torch.nn.functional.interpolate(patches.float(), scale_factor=4)[:, 0] > 0
    planted = 6 * patches.flatten(1)[..., None] * torch.nn.functional.one_hot(torch.tensor(3), 8)
    features = torch.randn(60, 16, 8, generator=g) + planted
    head = nets.train_mask_head(features[:40], masks[:40])
    assert (head(features[40:])[:, 1::4, 1::4] == patches[40:, 0]).float().mean() > 0.97


def test_a_color_threshold_finds_drawn_shapes():
    x, masks, _ = shapes.draw(200, 32, seed=3)
    seen = nets.threshold_mask(torch.from_numpy(np.moveaxis(x, -1, 1)))
    assert nets.mean_iou(seen, torch.from_numpy(masks)) > 0.8
