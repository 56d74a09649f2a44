"""The demo's pictures against geometry, and what its small networks promise to the scripts that meet them."""
import nets
import numpy as np
import pytest
import shapes
import torch
from PIL import Image

import vae
from dino import DINOv2


@pytest.fixture(scope="module")
def drawn():
    return shapes.draw(1000, 32, seed=3)


def test_a_picture_depends_on_seed_and_place_alone(drawn):
    for n in (1, 99, 101, 333):
        for part, whole in zip(shapes.draw(n, 32, seed=3), drawn):
            assert np.array_equal(part, whole[:n])
    other = shapes.draw(100, 32, seed=4)
    assert not np.array_equal(other[2], drawn[2][:100]) and (other[0] != drawn[0][:100]).any((1, 2, 3)).all()


def test_every_ten_pictures_hold_each_class_once_in_changing_order(drawn):
    tens = drawn[2].reshape(-1, 10)
    assert (np.sort(tens, 1) == np.arange(10)).all() and len(np.unique(tens, axis=0)) > 90
    assert [a.dtype for a in drawn] == [np.uint8, bool, np.int64]


def test_every_shape_is_a_distance_inside_the_unit_circle():
    axis = np.linspace(-1.5, 1.5, 601, dtype=np.float32)
    x, y = np.meshgrid(axis, axis)
    for name, shape in shapes.SHAPES.items():
        d = shape(x[None], y[None])[0]
        assert (d[np.hypot(x, y) > 1.03] > 0).all(), name
        slope = np.hypot(*np.gradient(d, axis[1] - axis[0]))[np.abs(d) < .02]
        assert .98 < np.median(slope) < 1.02 and (np.abs(slope - 1) < .05).mean() > .9, name


@pytest.mark.parametrize("name, area", [("disk", np.pi * .82 ** 2), ("ring", np.pi * (.9 ** 2 - .42 ** 2)),
                                        ("square", 1.44 ** 2)])
def test_masks_have_the_area_of_their_shape(drawn, name, area):
    radius = (.72 ** 2 + .72 * .92 + .92 ** 2) / 3 * 16 ** 2    # a uniform radius's mean square, in pixels
    masks = drawn[1][drawn[2] == shapes.CLASSES.index(name)]
    assert abs(masks.sum((1, 2)).mean() / (area * radius) - 1) < .05


def test_the_mask_is_where_the_picture_has_its_edge(drawn):
    images, masks, _ = drawn
    change = np.abs(np.diff(images.astype(float), axis=2)).sum(-1)

    def at_the_edge(masks):
        """The mean change of color from one pixel to the next where the mask begins or ends."""
        edge = masks[:, :, 1:] != masks[:, :, :-1]
        return (change * edge).sum((1, 2)) / edge.sum((1, 2))
    there, moved, swapped = (at_the_edge(m) for m in (masks, np.roll(masks, 4, (1, 2)), np.roll(masks, 1, 0)))
    assert (there > moved).mean() > .97 and (there > swapped).mean() > .97
    assert there.mean() > 3 * max(moved.mean(), swapped.mean())


def test_colors_are_oklch():
    def rgb(*lch):
        return shapes.color(*(np.full((1, 1, 1), v) for v in lch)).ravel()
    assert np.abs(rgb(1, 0, 0) - 1).max() < 2e-3 and np.abs(rgb(.5998, 0, 0) - .5).max() < 2e-3
    assert np.abs(rgb(.62796, .25768, np.radians(29.234)) - (1, 0, 0)).max() < 5e-3     # sRGB's red
    assert np.abs(rgb(.45201, .31321, np.radians(264.05)) - (0, 0, 1)).max() < 5e-3     # and blue


def test_files_hold_the_pictures_and_the_masks_lie_in_the_order_of_listing(tmp_path):
    (tmp_path / "set.part/00_disk").mkdir(parents=True)
    (tmp_path / "set.part/00_disk/stale.png").write_bytes(b"of a run that was stopped")
    shapes.write(tmp_path / "set", 40, 32, seed=3)
    images, masks, labels = shapes.draw(40, 32, seed=3)
    listed, stored = vae.Images(tmp_path / "set", 32), np.load(tmp_path / "set/masks.npz")
    assert listed.paths == stored["paths"].tolist() and len(listed) == 40
    assert not (tmp_path / "set.part").exists()
    assert listed.classes == [f"{i:02}_{name}" for i, name in enumerate(shapes.CLASSES)]
    for k, path in enumerate(listed.paths):
        i = int(path[-10:-4])
        assert listed[k][1] == labels[i] and np.array_equal(stored["masks"][k], masks[i])
        assert np.array_equal(np.asarray(Image.open(tmp_path / "set" / path)), images[i])
    before = (tmp_path / "set/masks.npz").stat().st_mtime_ns
    shapes.write(tmp_path / "set", 20, 32, seed=9)
    assert (tmp_path / "set/masks.npz").stat().st_mtime_ns == before


def tensors(drawn, n):
    images, masks, labels = (torch.from_numpy(a[:n]) for a in drawn)
    return images.permute(0, 3, 1, 2), labels, masks


def test_a_patch_has_the_class_that_covers_half_of_it():
    masks = torch.zeros(1, 32, 32, dtype=torch.bool)
    masks[0, :4, 4:6] = masks[0, 8:11, 0] = True        # half of patch 1, 3 of 16 pixels of patch 16
    found = nets.patch_labels(masks, torch.tensor([7]), 4, 10)[0]
    assert found[1] == 7 and (found == 10).sum() == 63


def test_the_judges_see_bytes_and_give_features_and_probabilities(drawn, tmp_path):
    images, labels, masks = tensors(drawn, 200)
    nets.train_judge(images, labels, 2, tmp_path / "judge.pth", (images, labels, masks))
    judge = nets.trained(tmp_path / "judge.pth")
    features, probs = judge(images[:50])
    assert features.shape == (50, 128) and probs.shape == (50, 10) and not features.requires_grad
    assert torch.allclose(probs.sum(1), torch.ones(50))
    assert torch.allclose(features[:3], judge(images[:3])[0], atol=1e-5)    # whatever else is in the batch
    features, probs = nets.untrained(images)(images)
    spectrum = torch.linalg.svdvals(features - features.mean(0))
    assert probs is None and torch.isfinite(features).all() and (spectrum > 1e-2 * spectrum[0]).sum() > 20


@pytest.mark.parametrize("masked", [True, False])
def test_the_teachers_file_is_a_dinov2(drawn, tmp_path, masked):
    images, labels, masks = tensors(drawn, 200)
    masks = masks if masked else None
    nets.train_teacher(images, labels, masks, 2, tmp_path / "teacher.pth", (images, labels, masks))
    teacher = DINOv2.load(tmp_path / "teacher.pth")
    assert (teacher.patch, teacher.registers, teacher.grid, teacher.dim % 64) == (4, 4, 8, 0)
    patch, cls = teacher.targets(vae.from_uint8(images[:2]), grid=8)
    assert patch.shape == (2, 64, teacher.dim) and cls.shape == (2, teacher.dim)
