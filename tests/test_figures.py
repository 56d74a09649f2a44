"""figures.py: t-SNE against scikit-learn's, cosines by hand, pictures of sample.py's own images, and what
each file must hold."""
import json
import sys

import figures
import numpy as np
import pytest
import torch
from conftest import call, relative
from PIL import Image
from scipy.spatial.distance import pdist, squareform
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE, _t_sne
from sklearn.model_selection import LeaveOneOut, cross_val_score
from sklearn.neighbors import KNeighborsClassifier

import sample
import train_sit
from vae import VAE, Images, UserError, fingerprint, from_uint8, rng, save


def blobs(n=40, seed=0, apart=6.0):
    """Three Gaussian clouds of n points in 10 dimensions, and their labels."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(3).repeat_interleave(n)
    centers = apart * torch.eye(10, dtype=torch.float64)[labels]
    return torch.randn(3 * n, 10, generator=g, dtype=torch.float64) + centers, labels


@pytest.fixture(scope="module")
def joint():
    """scikit-learn's joint probabilities of the clouds at perplexity 20, condensed."""
    x, _ = blobs()
    return _t_sne._joint_probabilities(squareform(pdist(x.numpy(), "sqeuclidean")), 20, 0)


# ----------------------------------------------------------------------------------------------------- t-SNE


def test_each_points_distribution_has_the_perplexity_asked_for():
    far = 1e4 + 1e-3 * torch.randn(30, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = torch.cat([blobs()[0], far])                                                # and a far, dense cloud
    for perplexity in (2, 20, 45):
        p = figures.conditional(x, perplexity)
        entropy = -torch.special.xlogy(p, p).sum(1)
        assert (entropy.exp() / perplexity - 1).abs().max() < 1e-9 and (p.diagonal() == 0).all()


def test_joint_probabilities_are_scikit_learns(joint):
    """Theirs come from float32 distances and a search that stops at 1e-5: they agree to 5e-6 of the largest
    (measured)."""
    p = figures.conditional(blobs()[0], 20)
    assert relative((p + p.T) / (2 * len(p)), squareform(joint)) < 2e-5


def test_divergence_and_gradient_are_scikit_learns(joint):
    y = torch.randn(120, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    divergence, gradient = _t_sne._kl_divergence(y.numpy().ravel(), joint, 1, 120, 2)
    p = torch.from_numpy(squareform(joint))
    assert figures.divergence(p, y) == pytest.approx(divergence, rel=1e-12)
    assert relative(figures.gradient(p, y), gradient.reshape(120, 2)) < 1e-12


def test_the_descent_is_scikit_learns(joint):
    """In both phases, before rounding has grown (measured: 5e-14 after 10 steps; 7e-3 after 40, where P is
    exaggerated)."""
    y = 1e-2 * torch.randn(120, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for exaggeration, momentum in ((12, 0.5), (1, 0.8)):
        theirs, _, _ = _t_sne._gradient_descent(
            _t_sne._kl_divergence, y.numpy().ravel().copy(), 0, 10, n_iter_check=1000, momentum=momentum,
            learning_rate=50.0, min_grad_norm=0, args=[exaggeration * joint, 1, 120, 2])
        ours = figures.descend(torch.from_numpy(squareform(joint)), y, exaggeration, momentum, 10)
        theirs = theirs.reshape(120, 2)
        assert relative(ours, theirs) < 1e-11 and relative(y, theirs) > 1e-2


def test_clouds_stay_apart_on_the_map():
    """Each point's neighbor in its cloud is nearer than half of the least distance between clouds, and the
    divergence is that of scikit-learn's map, up to the local minimum that rounding chooses (measured: 0.96 to
    1.05 of theirs in three draws)."""
    x, labels = blobs()
    y, divergence = figures.embed(figures.principal(x), 20)
    theirs = TSNE(method="exact", perplexity=20, init="pca", random_state=0).fit(x.numpy())
    assert divergence == pytest.approx(theirs.kl_divergence_, rel=0.1)
    d, other = torch.cdist(y, y).fill_diagonal_(1e9), labels[:, None] != labels
    assert d.masked_fill(other, 1e9).amin(1).max() < 0.5 * d[other].min()


def test_principal_components_and_neighbors_are_scikit_learns():
    x, labels = blobs(apart=1.5)
    assert relative(figures.principal(x, 5).abs(), np.abs(PCA(5).fit_transform(x.numpy()))) < 1e-9
    theirs = cross_val_score(KNeighborsClassifier(1), x.numpy(), labels.numpy(), cv=LeaveOneOut()).mean()
    assert 0.4 < theirs < 0.95 and figures.neighbors(x, labels) == pytest.approx(theirs)


# ------------------------------------------------------------------------------------------- cosines, colors


def test_similarity_is_the_cosine_of_centered_vectors():
    v = np.random.RandomState(0).randn(2, 12, 4) + 3
    c, ours = v - v.mean(1, keepdims=True), figures.similarity(torch.from_numpy(v), 5)
    for b in range(2):
        for j in range(12):
            cosine = c[b, 5] @ c[b, j] / np.sqrt((c[b, 5] @ c[b, 5]) * (c[b, j] @ c[b, j]))
            assert ours[b, j].item() == pytest.approx(cosine)


def test_heat_brightens_from_zero_to_one():
    values = torch.linspace(-1, 1, 64).view(1, 8, 8)
    heat = figures.heat(values, torch.full((1, 3, 8, 8), 100, dtype=torch.uint8))
    brightness = heat.float().mean(1).flatten()
    assert (brightness.diff() >= 0).all() and (brightness[:32] == brightness[0]).all()
    assert brightness[-1] > 3 * brightness[0]


# --------------------------------------------------------------------------------- pictures from a checkpoint


def prepared(chain, words):
    """What figures.prepare gives for a command line."""
    argv, sys.argv = sys.argv, ["figures.py", "trajectory", *words.format(root=chain.root).split()]
    try:
        return figures.prepare(figures.flags(), torch.device("cpu"))
    finally:
        sys.argv = argv


def test_scales_shows_the_images_of_sample(chain, tmp_path):
    words = "--ckpt {root}/sit --num 3 --steps 4 --seed 7 --interval 0 1"
    latents, decode, names = prepared(chain, words)
    call(sample, words.format(root=chain.root), f"--cfg 3 --out {tmp_path}")
    theirs = np.stack([np.asarray(Image.open(tmp_path / f"images/{i:06d}.png")) for i in range(3)])
    ours = decode(latents(3)).permute(0, 2, 3, 1).numpy()
    assert np.abs(ours.astype(int) - theirs).max() <= 1                                # of 255: other kernels
    assert names == [Images(chain.data, 32).classes[rng(7, "label", i).integers(10)] for i in range(3)]


@pytest.mark.parametrize("process", ["sit", "dit"])
def test_the_last_prediction_of_the_data_is_the_sample(chain, tmp_path, process):
    """As it must be for Euler's ODE and for DDPM, whose last steps end at the prediction."""
    call(train_sit, chain.stage2, f"--steps 2 --process {process} --out {tmp_path}/net")
    sampler = {"sit": "euler", "dit": "ddpm"}[process]
    latents, decode, _ = prepared(chain, f"--ckpt {tmp_path}/net --num 2 --steps 5 --sampler {sampler}")
    seen = []
    x = latents(2, lambda k, t, x, x0: seen.append(x0))
    assert len(seen) == 5 and relative(seen[-1], x) < 1e-6 and relative(seen[0], x) > 1e-4
    assert torch.equal(decode(seen[-1]), decode(x))


# ------------------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize("words, size", [
    ("tsne --vae {r}/vae {r}/vae --data {r}/data --size 32 --num 5 --perplexity 5",
     (840, 420 + 24 + 2 * 16)),
    ("attention --vae {r}/vae --data {r}/data --size 32 --num 2 --token 0 7",
     (12 + 3 * 130 + 2, 18 + 2 * 130 + 2)),
    ("scales --ckpt {r}/sit --steps 3 --scales 1 2 --num 3 --classes 1",
     (12 + 7 * 5 + 3 * 130 + 2, 18 + 2 * 130 + 2)),
    ("trajectory --ckpt {r}/sit --steps 9 --points 4 --num 2 --classes 1",
     (12 + 7 * 7 + 5 * 130 + 2, 18 + 2 * 130 + 2))])
def test_a_picture_has_its_panels(chain, tmp_path, words, size, capsys):
    call(figures, words.format(r=chain.root), f"--out {tmp_path}/figure.png")
    image = Image.open(tmp_path / "figure.png")
    assert image.size == size and image.convert("L").getextrema()[0] < 50
    assert f"wrote {tmp_path}/figure.png, {size[0]} x {size[1]}" in capsys.readouterr().out


def test_tsne_prints_the_neighbors_of_the_latents(chain, tmp_path, capsys):
    words = f"--vae {chain.root}/vae --data {chain.data} --size 32 --num 6 --perplexity 3"
    call(figures, "tsne", words, f"--classes 00_disk 07_moon --out {tmp_path}/figure.png")
    data, vae = Images(chain.data, 32), VAE.load(chain.root / "vae")
    chosen = [i for i in range(60) if data.labels[i] in (0, 7)]
    with torch.no_grad():
        z = vae.encode(from_uint8(torch.stack([data[i][0] for i in chosen]))).mean.flatten(1)
    right = cross_val_score(KNeighborsClassifier(1), z, data.labels[chosen], cv=LeaveOneOut()).mean()
    says = f"{right:.3f} of 12 latents have a nearest neighbor of their class (chance 0.500)"
    assert says in capsys.readouterr().out


@pytest.fixture
def sweep(tmp_path):
    """Three VAEs, and results of samples on each, of samples on another VAE, and of a folder that is no
    samples at all."""
    book = {"elsewhere/samples.npz": {"value": {"fid": 1.0}}}
    for k, (weight, fid) in enumerate([(1e-5, 30.0), (0.0, 45.0), (2e-5, 27.5), (1.0, 99.0)]):
        torch.manual_seed(k)
        vae = VAE(16, (1, 2), 1)
        vae.save(tmp_path / f"vae{k}/vae", info={"kl": weight, "latents": {"mean": 0.0, "std": 1.0 + k}})
        save({"vae": fingerprint(vae)}, tmp_path / f"samples{k}/manifest.json")
        book[f"{tmp_path}/samples{k}/samples.npz"] = {"value": {"fid": fid}}
    (tmp_path / "results.json").write_text(json.dumps(book))
    return tmp_path


def test_kl_finds_each_vaes_samples_and_draws_a_point_for_each(sweep, capsys):
    call(figures, f"kl --vae {sweep}/vae0 {sweep}/vae1 {sweep}/vae2 --results {sweep}/results.json",
         f"--out {sweep}/kl.png")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("kl ")]
    assert lines == ["kl 0: FID 45.00, std of the latents 2.0000",
                     "kl 1e-05: FID 30.00, std of the latents 1.0000",
                     "kl 2e-05: FID 27.50, std of the latents 3.0000"]
    image = np.array(Image.open(sweep / "kl.png"))
    blue = (image == (70, 110, 190)).all(2)
    assert image.shape == (480, 900, 3)
    assert blue[60, 60] and blue[370, 840]                          # the largest FID at 0, the least at 2e-5
    area = [blue[:, c - 20:c + 20].sum() for c in (60, 840)]
    assert area[1] / area[0] == pytest.approx(((3 + 4 * 3) / (3 + 4 * 2)) ** 2, rel=0.15)


@pytest.mark.parametrize("words, says", [
    ("tsne --vae {r}/vae --data {r}/data --size 32", "holds 6 images, --num asks for 128"),
    ("tsne --vae {r}/vae --data {r}/data --size 32 --num 2",
     "--perplexity 30 needs more than 90 points, here are 20"),
    ("tsne --vae {r}/vae --data {r}/data --size 32 --num 2 --classes 00_disk unicorn",
     "--classes unicorn: no such folder"),
    ("tsne --vae {r}/vae --data {r}/data/00_disk --size 32 --num 2", "needs class folders"),
    ("tsne --vae {r}/vae --data {r}/data --size 30 --num 2 --perplexity 3",
     "--size 30 is not a multiple of 4"),
    ("attention --vae {r}/vae --data {r}/data --size 32 --token 8 0",
     "--token 8 0: .*8 x 8 of them, counted from 0"),
    ("attention --vae {r}/vae --data {r}/data --size 32 --num 61", "holds 60 images, --num asks for 61"),
    ("attention --vae {r}/none --data {r}/data --size 32", "none: no VAE here"),
    ("scales --ckpt {r}/sit --sampler ddpm", "--sampler ddpm is not for a sit"),
    ("scales --ckpt {r}/sit --classes unicorn", "unicorn: no such class"),
    ("trajectory --ckpt {r}/sit --steps 4 --points 5", "--points 5: 1 to --steps 4"),
    ("trajectory --ckpt {r}/none", "none"),
    ("kl --vae {r}/vae --results {r}/none.json", "none.json"),
    ("kl --vae {r}/bare --results {r}/none.json", "bare: no reals.json")])
def test_what_does_not_fit_is_said_in_one_line(chain, tmp_path, words, says):
    if "bare" in words:
        VAE.load(chain.root / "vae").save(chain.root / "bare")
    with pytest.raises(ValueError, match=says) as error:
        call(figures, words.format(r=chain.root), f"--out {tmp_path}/figure.png")
    assert type(error.value).__name__ == "UserError"               # vae's, or sit's own
    assert "\n" not in str(error.value) and not (tmp_path / "figure.png").exists()


def test_a_sweep_of_one_is_no_plot(sweep):
    with pytest.raises(UserError, match="holds an FID for 1 of the 1 VAEs in --vae, a plot needs two"):
        call(figures, f"kl --vae {sweep}/vae0 --results {sweep}/results.json --out {sweep}/kl.png")


@pytest.mark.parametrize("words", ["tsne --vae x --cfg 2", "scales --color red"])
def test_an_unknown_flag_is_refused(words, capsys):
    with pytest.raises(SystemExit):
        call(figures, words)
    assert "unrecognized arguments" in capsys.readouterr().err
