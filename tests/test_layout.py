"""The house: which files stand at the top, what each may import, and where each equation of the paper
stands."""
import ast
import inspect
import io
import re
import subprocess
import sys
import tokenize

import pytest
from conftest import ROOT

import fid
import train_vae
import vae

ROOMS = {"vae": [], "dino": [], "sit": [], "fid": ["vae", "dino"], "train_vae": ["vae", "dino", "fid"],
         "train_sit": ["vae", "dino", "sit"], "sample": ["vae", "dino", "sit"]}
PACKAGES = {"torch", "torchvision", "numpy", "scipy", "PIL", "tqdm"}


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_the_top_level_is_the_seven_files():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    top = {p.split("/")[0] for p in listed if not p.startswith(".")}
    assert top == {f"{r}.py" for r in ROOMS} | {"README.md", "requirements.txt", "tests"}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_it_may(room):
    tree = ast.parse((ROOT / f"{room}.py").read_text())
    found = set(imports(tree))
    assert found & set(ROOMS) <= set(ROOMS[room])
    assert found - set(ROOMS) - PACKAGES <= set(sys.stdlib_module_names)
    top = {id(n) for n in tree.body} | {
        id(n) for t in tree.body if isinstance(t, ast.Try) for n in ast.walk(t)
    }
    assert all(id(n) in top for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))), (
        "an import inside a function"
    )


def test_requirements_are_the_six():
    names = {re.split(r"[<>=]", line)[0] for line in (ROOT / "requirements.txt").read_text().split()}
    assert names == {p.replace("PIL", "pillow") for p in PACKAGES}


@pytest.mark.parametrize(
    "mark, place",
    [
        ("Eq. 1", vae.Align.forward),
        ("Eq. 2", train_vae.align_loss),
        ("Eq. 3", train_vae.main),
        ("Eq. 4", train_vae.main),
        ("Eq. 5", train_vae.main),
        ("Eq. 6", train_vae.main),
        ("Eq. 7", vae.Normalizer.encode),
        ("Eq. 8", vae.Normalizer.decode),
        ("Algorithm 1", fid.consistency),
    ],
)
def test_each_equation_is_marked_at_the_one_place_where_it_is_computed(mark, place):
    """A comment behind its line; docstrings may speak of it elsewhere."""
    comments = [
        t.string
        for room in ROOMS
        for t in tokenize.generate_tokens(io.StringIO((ROOT / f"{room}.py").read_text()).readline)
        if t.type == tokenize.COMMENT and mark in t.string
    ]
    assert len(comments) == 1 and comments[0] in inspect.getsource(place)


def test_ruff_finds_nothing():
    """Imports, unused names, line length, complexity: .ruff.toml says what is checked."""
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--no-cache", str(ROOT)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
