"""What several test files share: the golden numbers and the rule behind their weights, and the optional
shared folder."""
import math
import os
import signal
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import vae

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / "golden"


def pytest_configure(config):
    """These tests compare on a CPU, also where there is a GPU; only those of public weights are for
    either. Under pytest -n each worker, and what it starts, has one thread: many would stand in line."""
    if config.option.markexpr != "public":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)


def gen(key, shape):
    """The weight that golden numbers were made with: a function of the public key's name alone
    (golden/README.md)."""
    a = np.random.RandomState(zlib.crc32(key.encode()) & 0x7FFFFFFF).standard_normal(shape)
    last = key.split(".")[-1]
    scale, offset = {
        "bias": (0.05, 0),
        "gamma": (0.1, 1),
        "running_mean": (0.3, 0),
        "running_var": (0.2, 1),
    }.get(last, (0.5, 0))
    if last == "weight":
        scale, offset = (.1, 1) if len(shape) == 1 else (1 / math.sqrt(math.prod(shape[1:])), 0)
    if "embedding_table" in key:
        scale = .5
    return (scale * a + offset).astype(np.float32)


class Golden:
    """One .npz of public code's results: g["name"], g.state("X"), g.input("name"), g.pick("name", full)."""

    def __init__(self, name):
        self.d = np.load(GOLDEN / f"{name}.npz")
        self.slices = dict(s.split("|") for s in self.d["slices"]) if "slices" in self.d else {}
        self.recipes = (
            {s.split("|")[0]: s.split("|")[1:] for s in self.d["recipes"]} if "recipes" in self.d else {}
        )

    def __getitem__(self, name):
        return self.d[name]

    def __contains__(self, name):
        return name in self.d

    def state(self, network, strip=""):
        """The state dict of a network, float32 torch tensors under the public names (less the prefix
        `strip`)."""
        pairs = [s.split(":") for s in self.d[f"{network}.keys"]]
        state = {k: torch.from_numpy(gen(k, tuple(map(int, s.split(","))))) for k, s in pairs}
        total = sum(v.double().abs().sum().item() for v in state.values())
        assert abs(total / float(self.d[f"{network}.abs_sum"]) - 1) < 1e-9
        return {k.removeprefix(strip): v for k, v in state.items()}

    def input(self, name):
        """An input tensor, stored or drawn again by its recipe."""
        if name in self.d:
            return torch.from_numpy(self.d[name])
        seed, shape, scale = self.recipes[name]
        a = np.random.RandomState(int(seed)).standard_normal(tuple(map(int, shape.split(","))))
        return torch.from_numpy((float(scale) * a).astype(np.float32))

    def pick(self, name, full):
        """The part of our full result that the file keeps of `name` (numpy)."""
        full = full.detach().numpy() if torch.is_tensor(full) else full
        return eval("full[" + self.slices[name] + "]", {"full": full}) if name in self.slices else full


@pytest.fixture(scope="session")
def golden():
    return Golden


@pytest.fixture(scope="session")
def shared():
    """The folder named by REALS_SHARED, with photographs and judge networks; tests that need it skip
    without."""
    if not os.environ.get("REALS_SHARED"):
        pytest.skip("REALS_SHARED is not set: no photographs and no judge networks here")
    return Path(os.environ["REALS_SHARED"])


@pytest.fixture(autouse=True)
def seeded():
    """What a test draws does not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """Sums in one order; the tests after it get their threads back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def relative(a, b):
    """Greatest absolute difference over greatest absolute value of b, the measure of every agreement in these
    tests."""
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    assert a.shape == b.shape, (a.shape, b.shape)
    return ((a - b).abs().max() / b.abs().max()).item()


def call(module, *words, run=lambda main: main()):
    """A script's main() in this process, with these words as its command line."""
    argv, kept = sys.argv, {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = [module.__name__ + ".py", *(w for part in words for w in str(part).split())]
    try:
        run(module.main)
    finally:
        sys.argv = argv
        for number, handler in kept.items():
            signal.signal(number, handler)


def ends(module, *words):
    """The status that a script's command ends with, in this process."""
    with pytest.raises(SystemExit) as end:
        call(module, *words, run=vae.run_script)
    return end.value.code


class Chain:
    """A tiny run of everything: pictures, a random teacher, a VAE of 4 steps and a SiT of 6, in one
    folder."""

    tune = ("--gan 0.1 --gan-start 1 --perceptual 0 --align 1 --align-hidden 32 --batch 8 "
            "--log-every 2 --save-every 2 --picture-every 4")
    small = "--init none --ch 16 --mult 1 2 4 --blocks 1 --workers 0"
    sit = ("--model T --norm std --std 1 --batch 8 --ema 0.5 --lr 1e-3 --log-every 2 --save-every 2 "
           "--picture-every 6 --workers 0")

    def __init__(self, root):
        import shapes

        import dino
        import train_sit
        import train_vae
        self.root, self.data = root, root / "data"
        shapes.write(self.data, 60, 32, 3)
        torch.manual_seed(0)
        torch.save(dino.DINOv2(64, 2, patch=4, registers=4, grid=8).state_dict(), root / "dino.pth")
        self.of_data = f"--data {self.data} --size 32"
        self.stage1 = f"{self.of_data} --val {self.data} --dino {root}/dino.pth {self.small} {self.tune}"
        self.stage2 = f"{self.of_data} --vae {root}/vae --cache {root}/latents {self.sit}"
        call(train_vae, self.stage1, f"--steps 4 --out {root}/vae")
        call(train_sit, self.stage2, f"--steps 6 --keep 3 --out {root}/sit")


@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    return Chain(tmp_path_factory.mktemp("chain"))
