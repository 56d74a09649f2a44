"""Public weights and samples against published numbers, for whoever has a network, a GPU and the disk:

    pytest tests -m public -s

Networks are loaded by their public names, through torch.hub's cache (about 15 GB). What cannot be had by name
is named by environment variables; a test whose own is not set is skipped, and says so:
    REALS_ADM        folder with VIRTUAL_imagenet256_labeled.npz and, for the first test,
                     admnet_guided_upsampled_imagenet256.npz
                     (openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/)
    REALS_IMAGENET   folder of ImageNet's 50,000 validation images, flat or in class folders
    REALS_VAE        folder of the VAE that the authors of ReaLS released (config.json and weights)
    REALS_GENERATE   folder for 3 x 50,000 samples (20 GB each while it is filled); hours on a GPU
    REALS_LAUNCH     how to start a script; default: python; "torchrun --nproc_per_node=8" for many GPUs
Each number is printed beside the published one. The same functions run on small stand-ins by default, so that
a renamed flag or key does not wait for a GPU to be seen.
"""
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import shapes
import torch
from conftest import ROOT, call
from test_fid import calibrated_inception, moments, net
from test_fid import pictures as smooth

import dino
import fid
import sample
import sit
import vae as V

public = pytest.mark.public


def pictures(n=10, size=256):
    x, masks, labels = shapes.draw(n, size, seed=11)
    return V.from_uint8(torch.from_numpy(x).permute(0, 3, 1, 2)), torch.from_numpy(labels)


@public
@pytest.mark.parametrize("name", V.PUBLIC)
def test_sd_vae_reconstructs_pictures_above_25_db(name):
    model, (x, _) = V.VAE.load(name), pictures(4)
    assert sum(p.numel() for p in model.parameters()) == 83_653_863
    with torch.no_grad():
        y = model.decode(model.encode(x).mean).clamp(-1, 1)
    value = fid.psnr((y + 1) / 2, (x + 1) / 2).mean().item()
    print(f"{name}: PSNR {value:.2f} dB on pictures of shapes")
    assert value > 25


@public
@pytest.mark.parametrize("name", dino.SIZES)
def test_dinov2_tells_pictures_apart(name):
    """Two drawings of one shape are nearer in cosine of the class features than drawings of two shapes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, (x, labels) = dino.DINOv2.load(name).eval().to(device), pictures(40)
    cls = torch.cat([model.targets(part.to(device), 16)[1].cpu() for part in x.split(8)])
    cls = torch.nn.functional.normalize(cls, dim=1)
    cosine, same = cls @ cls.T, labels[:, None] == labels
    same.fill_diagonal_(False)
    other = labels[:, None] != labels
    within, between = cosine[same].mean(), cosine[other].mean()
    print(f"{name}: cosine {within:.3f} within a shape, {between:.3f} between shapes")
    assert within > between + 0.05


@public
@pytest.mark.parametrize("name, process", [(name, row[0]) for name, row in sit.PUBLIC.items()])
def test_generators_load_by_name(name, process):
    model = sit.SiT.load(name)
    assert model.process == ("dit" if process == "dit" else "sit") and model.classes == 1000
    assert sum(p.numel() for p in model.blocks.parameters()) > 6e8


@public
def test_inception_lpips_and_heads_load_by_name():
    net, (x, _) = fid.Inception.load().eval(), pictures(4)
    pool, spatial, probs = net(V.to_uint8(x))
    assert pool.shape == (4, 2048) and spatial.shape == (4, 2023)
    assert torch.allclose(probs.sum(1), torch.ones(4), atol=1e-4)
    distance = fid.LPIPS.load()(x, x.flip(-1))
    assert (distance > 0.01).all() and (fid.LPIPS.load()(x, x) == 0).all()
    for name in dino.SEGMENTERS:
        assert dino.Segmenter.load(name).linear.in_features == dino.SIZES[name.split("_")[0]]["dim"]
    points, _ = dino.Depth.load("moge-vitl").points(torch.randn(1, 256, 1024), 16, 224)
    assert points.shape == (1, 3, 224, 224)


# ----------------------------------------------------------------- the command line against published numbers


def place(variable, *files):
    """The folder that an environment variable names, in which these files must be."""
    if not os.environ.get(variable):
        pytest.skip(f"{variable} is not set: the head of test_public.py says what it names")
    folder = Path(os.environ[variable])
    for path in (folder, *(folder / f for f in files)):
        assert path.exists(), f"{variable}: there is no {path}"
    return folder


def run(script, words):
    """A script's command line, as REALS_LAUNCH says."""
    launch = shlex.split(os.environ.get("REALS_LAUNCH", sys.executable))
    subprocess.run([*launch, str(ROOT / script), *shlex.split(words)], check=True)


def scored(run, samples, reference, out, num, more=""):
    """fid.py's numbers of a sample file, as results.json has them."""
    run("fid.py", f"{samples} --ref {reference} --num-images {num} --out {out} {more}")
    return json.loads(Path(out).read_text())[str(samples)]["value"]


def of_vae(run, source, data, out, more=""):
    """fid.py's numbers of a VAE on a folder of images, as results.json has them."""
    run("fid.py", f"--vae {source} --data {data} --out {out} {more}")
    return json.loads(Path(out).read_text())[str(source)]["value"]


GENERATORS = {   # the public name: guidance, published FID of 50,000 samples
    "SiT-XL/2": ("--cfg 1.5 --interval 0 1 --cfg-channels 3", 2.06),
    "DiT-XL/2": ("--cfg 1.5 --interval 0 1 --cfg-channels 3", 2.27),
    "REPA-SiT-XL/2": ("--cfg 1.8 --interval 0 0.7", 1.42),
}


def of_generator(run, ckpt, guidance, reference, out, num, more="", score=""):
    """fid.py's numbers of a generator's samples."""
    run("sample.py", f"--ckpt {ckpt} {guidance} --num-images {num} --npz --out {out} {more}")
    return scored(run, Path(out) / "samples.npz", reference, Path(out) / "results.json", num, score)


def beside(title, value, published):
    """Prints measured and published numbers, {key: (published, tolerance)}; None: no number is held to it."""
    print(f"\n{title}")
    for k, (p, t) in published.items():
        print(f"  {k:<14} measured {value[k]:9.4f}  published {p:9.4f}" + f"  +- {t}" * (t is not None))
    wrong = [k for k, (p, t) in published.items() if t is not None and abs(value[k] - p) > t]
    assert not wrong, f"{title}: {', '.join(wrong)}"


@public
def test_adms_own_example(tmp_path):
    """The same images and weights through another framework's kernels: half a percent, rounded up. Precision
    and recall: ADM rounds distances to float16, which moves neighbours at the border of a ball."""
    folder = place("REALS_ADM", "VIRTUAL_imagenet256_labeled.npz", "admnet_guided_upsampled_imagenet256.npz")
    value = scored(run, folder / "admnet_guided_upsampled_imagenet256.npz",
                   folder / "VIRTUAL_imagenet256_labeled.npz", tmp_path / "results.json", 50000)
    beside("ADM-G, ADM-U", value, {"fid": (3.9426, .02), "sfid": (6.1404, .03), "is": (215.84, 1),
                                   "precision": (.8265, .005), "recall": (.5309, .005)})


@pytest.fixture(scope="module")
def sd_vae(tmp_path_factory):
    """Numbers of sd-vae-ft-mse on ImageNet's validation images; its encoder is that of every SD-VAE."""
    data = place("REALS_IMAGENET")
    return of_vae(run, "sd-vae-ft-mse", data, tmp_path_factory.mktemp("sd-vae") / "results.json",
                  "--num-images 50000")


# published, tolerance
TABLE_8 = {"sd-vae-ft-mse": {"rfid": (.74, .02), "psnr": (25.68, .02), "ssim2": (.820, .002)},
           "ReaLS": {"rfid": (.85, .05), "psnr": (23.45, .1), "ssim2": (.768, .005)}}
TABLE_10 = {"z_mean": (.29287, .03), "z_std": (4.58407, .05), "z_min": (-65.73, 13), "z_max": (68.32, 13)}
TABLE_2 = {"sc_crop": (.33, None), "sc_flip": (.34, .03), "sc_blur": (.41, None), "sc_grayscale": (.37, .03),
           "sc_all": (.29, None)}


@public
def test_table_8_sd_vae(sd_vae):
    """The last printed digit and a little: noise of the posterior differs, 50,000 images level it."""
    beside("Table 8, SD-VAE", sd_vae, TABLE_8["sd-vae-ft-mse"])


@public
def test_table_8_the_released_vae(tmp_path):
    """Wider than SD-VAE's: the paper does not say how its own row was measured."""
    folder, data = place("REALS_VAE"), place("REALS_IMAGENET")
    beside("Table 8, ReaLS", of_vae(run, folder, data, tmp_path / "results.json", "--num-images 50000"),
           TABLE_8["ReaLS"])


@public
def test_table_10_sd_vae(sd_vae):
    """Other 10,000 images than the paper's: the mean over images is uncertain by about .01, and extremes by a
    fifth."""
    beside("Table 10, SD-VAE", sd_vae, TABLE_10)


@public
def test_table_2_sd_vae(sd_vae):
    """Flip and Grayscale leave no strength open, so they show whether Algorithm 1 is read as the paper meant
    it; the other three depend on strengths that it does not name."""
    beside("Table 2, SD-VAE", sd_vae, TABLE_2)


@public
@pytest.mark.parametrize("name", GENERATORS)
def test_fid_of_public_generators(name):
    """FID of 50,000 samples varies by about 2% from draw to draw (Karras et al. 2022); bf16 may add to it."""
    reference = place("REALS_ADM", "VIRTUAL_imagenet256_labeled.npz") / "VIRTUAL_imagenet256_labeled.npz"
    guidance, published = GENERATORS[name]
    value = of_generator(run, name, guidance, reference, place("REALS_GENERATE") / name.replace("/", "-"),
                         50000)
    beside(name, value, {"fid": (published, .06)})


# -------------------------------------------------------------------------------------- the same on stand-ins


def here(script, words):
    call({"fid.py": fid, "sample.py": sample}[script], words)


@pytest.fixture
def quick(monkeypatch):
    """A network that takes no time in Inception's place: two feature sets and probabilities."""
    def features(x):
        pool, probs = net(x)
        return pool, pool[:, :7] ** 2, probs
    stand_in = torch.nn.Module()
    stand_in.forward = features
    monkeypatch.setattr(fid.Inception, "load", lambda source: stand_in)
    return features


def reference(path, features, few, many):
    """A file like ADM's: some images, and the moments of more."""
    (mu, sigma), (mu_s, sigma_s) = (moments(f.double().numpy()) for f in features(many)[:2])
    np.savez(path, arr_0=few.permute(0, 2, 3, 1).numpy(), mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    return path


@pytest.mark.slow
def test_adms_example_on_stand_ins(tmp_path):
    """With random weights in Inception's file: the distance to the moments in the reference, precision
    against its images."""
    torch.save(calibrated_inception(smooth(12)), tmp_path / "inception.pth")
    inception, many, fake = fid.Inception.load(tmp_path / "inception.pth"), smooth(16), smooth(9, seed=5)
    np.savez(tmp_path / "samples.npz", arr_0=fake.permute(0, 2, 3, 1).numpy())
    with torch.no_grad():
        ref = reference(tmp_path / "ref.npz", inception, many[:8], many)
        pool, spatial, probs = inception(fake)
        real = inception(many[:8])[0]
    value = scored(here, tmp_path / "samples.npz", ref, tmp_path / "results.json", 9,
                   f"--inception {tmp_path}/inception.pth")
    with np.load(ref) as z:
        known = {"fid": fid.frechet(*moments(pool.double().numpy()), z["mu"], z["sigma"]),
                 "sfid": fid.frechet(*moments(spatial.double().numpy()), z["mu_s"], z["sigma_s"]),
                 "is": fid.inception_score(probs)}
    known["precision"], known["recall"] = fid.precision_recall(real, pool)
    beside("stand-ins", value, {k: (v, 1e-4 * v) for k, v in known.items()})
    with pytest.raises(AssertionError, match="stand-ins: fid, is"):
        beside("stand-ins", value, {"fid": (value["fid"] * 1.01, 1e-3), "recall": (9, None), "is": (0, 1e-3)})


def test_a_vaes_tables_on_stand_ins(quick, tmp_path):
    shapes.write(tmp_path / "data", 10, 32, 3)
    torch.manual_seed(0)
    V.VAE(8, (1, 2), 1, 4).save(tmp_path / "vae")
    value = of_vae(here, tmp_path / "vae", tmp_path / "data", tmp_path / "results.json",
                   "--num-images 10 --size 32 --vgg none")
    for published in (*TABLE_8.values(), TABLE_10, TABLE_2):
        beside("stand-ins", value, {k: (0, None) for k in published})
    assert value["n"] == 10 and value["z_min"] < value["z_mean"] < value["z_max"]


@pytest.mark.parametrize("name", GENERATORS)
def test_generators_on_stand_ins(quick, tmp_path, name):
    """A SiT of four blocks whose bare file is told what the public name implies."""
    process = sit.PUBLIC[name][0]
    torch.manual_seed(0)
    V.VAE(8, (1, 2), 1, 4).save(tmp_path / "vae")
    model = sit.SiT(**sit.size("T"), input_size=8, classes=5, process="dit" if process == "dit" else "sit")
    torch.save(model.state_dict(), tmp_path / "net.pt")
    images = torch.from_numpy(shapes.draw(8, 16, 1)[0]).permute(0, 3, 1, 2)
    ref = reference(tmp_path / "ref.npz", quick, images, images)
    value = of_generator(here, tmp_path / "net.pt", GENERATORS[name][0], ref, tmp_path / "out", 6,
                         f"--process {process} --vae {tmp_path}/vae --steps 4")
    assert value["n"] == 6 and value["fid"] > 0
    with np.load(tmp_path / "out/samples.npz") as z:
        assert z["arr_0"].shape == (6, 16, 16, 3)


def test_a_place_that_is_not_named_is_skipped_and_a_missing_file_is_not(monkeypatch, tmp_path):
    monkeypatch.delenv("REALS_ADM", raising=False)
    with pytest.raises(pytest.skip.Exception, match="REALS_ADM is not set"):
        place("REALS_ADM")
    monkeypatch.setenv("REALS_ADM", str(tmp_path))
    with pytest.raises(AssertionError, match="there is no .*ref.npz"):
        place("REALS_ADM", "ref.npz")
