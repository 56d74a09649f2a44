"""Public weights against published numbers, for whoever has a network and the disk (about 15 GB): pytest tests -m public.

Everything is loaded by its public name, through torch.hub's cache.
"""
import pytest
import torch

import dino
import fid
import shapes
import sit
import vae as V

pytestmark = pytest.mark.public


def pictures(n=10, size=256):
    x, masks, labels = shapes.draw(n, size, seed=11)
    return V.from_uint8(torch.from_numpy(x).permute(0, 3, 1, 2)), torch.from_numpy(labels)


@pytest.mark.parametrize("name", V.PUBLIC)
def test_sd_vae_reconstructs_pictures_above_25_db(name):
    model, (x, _) = V.VAE.load(name), pictures(4)
    assert sum(p.numel() for p in model.parameters()) == 83_653_863
    with torch.no_grad():
        y = model.decode(model.encode(x).mean).clamp(-1, 1)
    value = fid.psnr((y + 1) / 2, (x + 1) / 2).mean().item()
    print(f"{name}: PSNR {value:.2f} dB on pictures of shapes")
    assert value > 25


@pytest.mark.parametrize("name", dino.SIZES)
def test_dinov2_tells_pictures_apart(name):
    """Two drawings of one shape are nearer to each other, in cosine of the class features, than drawings of two shapes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, (x, labels) = dino.DINOv2.load(name).eval().to(device), pictures(40)
    cls = torch.nn.functional.normalize(torch.cat([model.targets(part.to(device), 16)[1].cpu() for part in x.split(8)]), dim=1)
    cosine, same = cls @ cls.T, labels[:, None] == labels
    same.fill_diagonal_(False)
    other = labels[:, None] != labels
    print(f"{name}: cosine {cosine[same].mean():.3f} within a shape, {cosine[other].mean():.3f} between shapes")
    assert cosine[same].mean() > cosine[other].mean() + 0.05


@pytest.mark.parametrize("name, process", [(name, row[0]) for name, row in sit.PUBLIC.items()])
def test_generators_load_by_name(name, process):
    model = sit.SiT.load(name)
    assert model.process == ("dit" if process == "dit" else "sit") and model.classes == 1000
    assert sum(p.numel() for p in model.blocks.parameters()) > 6e8


def test_inception_lpips_and_heads_load_by_name():
    net, (x, _) = fid.Inception.load().eval(), pictures(4)
    pool, spatial, probs = net(V.to_uint8(x))
    assert pool.shape == (4, 2048) and spatial.shape == (4, 2023) and torch.allclose(probs.sum(1), torch.ones(4), atol=1e-4)
    distance = fid.LPIPS.load()(x, x.flip(-1))
    assert (distance > 0.01).all() and (fid.LPIPS.load()(x, x) == 0).all()
    for name in dino.SEGMENTERS:
        if "vitl14" in name:
            assert dino.Segmenter.load(name).linear.in_features == 1024
    assert dino.Depth.load("moge-vitl").points(torch.randn(1, 256, 1024), 16, 224)[0].shape == (1, 3, 224, 224)
