"""watch.py: curves of logs as they are after kills, and copies among samples, found as scikit-learn finds
them."""
import json

import figures
import numpy as np
import pytest
import shapes
import torch
import watch
from conftest import call, relative
from PIL import Image
from sklearn.neighbors import NearestNeighbors

import fid
from dino import DINOv2
from vae import Images, UserError, from_uint8


def write_log(folder, rows, more=""):
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + more)
    return folder


# -------------------------------------------------------------------------------------------- curves of runs


def test_a_log_is_read_past_its_damage(tmp_path):
    begun = {"step": 0, "start": "2026-01-01 00:00:00 +0000", "command": "python train_sit.py"}
    rows = [begun, {"step": 2, "loss": 1.5}, {"step": 2, "start": "later"}, {"step": 4, "loss": float("nan")}]
    damage = '[1]\n{"loss": 3}\n"text"\n{"step": 6, "loss": 0.5}\n{"step": 8, "lo'
    run = write_log(tmp_path / "run", rows, damage)
    lines, first = watch.read_log(run)
    assert first == begun and [line["step"] for line in lines] == [2, 4, 6]
    assert watch.series(lines, "loss") == [(2, 1.5), (6, 0.5)] and watch.series(lines, "PSNR") == []
    assert watch.read_log(run / "log.jsonl") == (lines, first)
    for name, says in (("none", "no such file"), ("empty", "no line with numbers yet")):
        if name == "empty":
            write_log(tmp_path / name, [begun])
        with pytest.raises(UserError, match=f"{name}/log.jsonl: {says}"):
            watch.read_log(tmp_path / name)


def test_loss_by_time_is_the_mean_of_the_last_tenth(tmp_path):
    """Of 20 lines the last two, bin by bin, without what no picture fell into."""
    lines = [{"step": k, "by time": [9.0, 9.0, 9.0, 9.0]} for k in range(18)]
    lines += [{"step": 18, "by time": [1.0, None, None, 4.0]}, {"step": 19, "by time": [2.0, 5.0, None, 6.0]}]
    assert watch.series(lines, "by time") == [(0.125, 1.5), (0.375, 5.0), (0.875, 5.0)]


@pytest.mark.parametrize("low, high", [
    (0, 1), (-3.7, 12), (0.0134, 0.0149), (1e-9, 3e-3), (999, 1001), (5, 5), (-3, -3), (0, 0)])
@pytest.mark.parametrize("may_be_log", [False, True])
def test_an_axis_has_round_numbers_inside_and_keeps_the_order(low, high, may_be_log):
    axis = watch.Axis([high, low], 230, 20, may_be_log)
    places = [axis(v) for v in (low, high)]
    assert 20 - 1e-6 <= min(places) and max(places) <= 230 + 1e-6 and (low == high or places[0] > places[1])
    assert axis.log == (may_be_log and low > 0 and high > 20 * low)
    assert low == high or 2 <= len(axis.ticks()) <= 7
    for tick in axis.ticks():
        assert 20 - 1e-6 <= axis(tick) <= 230 + 1e-6
        assert len(f"{abs(tick):.10e}".split("e")[0].rstrip("0")) <= 6          # few digits


def colored(image, ink, tolerance=12):
    return (np.abs(np.asarray(image).astype(int) - ink).max(2) < tolerance)


def test_a_curve_lies_where_its_numbers_are(tmp_path):
    """A line from (0, 0) to (100, 1) and one of a single point: the middle of one, the place of the other."""
    inks = watch.palette_of(2, (0.6, 0.45))
    image = watch.panel("loss", [[(0, 0.0), (100, 1.0)], [(50, 0.25)]], inks)
    (width, height) = watch.SIDE
    x = watch.LEFT + (width - watch.LEFT - watch.RIGHT) / 2
    low, high = height - watch.BOTTOM, watch.TOP

    def at(value):
        return low + (value + 0.04) / 1.08 * (high - low)

    body = image.crop((0, 25, width, height))                           # the numbers above have colors, too
    y, _ = np.nonzero(colored(body, inks[0])[:, round(x) - 1:round(x) + 2])
    assert y.mean() + 25 == pytest.approx(at(0.5), abs=1.5)
    y, there = np.nonzero(colored(body, inks[1]))
    assert (y.mean() + 25, there.mean()) == pytest.approx((at(0.25), x), abs=1.5)


def test_runs_of_both_stages_share_a_picture(chain, tmp_path):
    """Whatever some run has gets a panel; a run of one line is a dot."""
    alone = write_log(tmp_path / "alone", [{"step": 5, "loss": 2.0, "MFU": 0.4, "grad norm": None}])
    call(figures, f"curves {chain.root}/vae {chain.root}/sit {alone} --out {tmp_path}/curves.png")
    names = {name for run in ("vae", "sit") for line in watch.read_log(chain.root / run)[0] for name in line}
    assert {"loss", "mse", "PSNR", "z std", "grad norm", "by time", "lr"} <= names
    n = len((names | {"MFU"}) - {"step"})
    image = Image.open(tmp_path / "curves.png")
    assert image.size == (4 * watch.SIDE[0], 14 + 3 * 18 + -(-n // 4) * watch.SIDE[1])
    assert all(colored(image, ink).sum() > 100 for ink in watch.palette_of(3, (0.6, 0.45)))


# ---------------------------------------------------------------------------------------------- is it a copy?


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A random network that tells the shapes apart: its class token has seen its patches."""
    torch.manual_seed(0)
    net = DINOv2(64, 2, patch=4, registers=0, grid=8)
    for m in net.modules():
        if isinstance(m, torch.nn.Linear):
            m.weight.data.normal_(0, 0.3)
    for block in net.blocks:
        for name, p in block.named_parameters():
            if name.endswith("gamma"):
                p.data.fill_(1)
    file = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.save(net.state_dict(), file)
    return file


def features(teacher, images):
    """Of uint8 images [N,3,S,S], by another way than fid's: one image at a time, float64, unit length."""
    net = DINOv2.load(teacher).double()
    with torch.no_grad():
        f = [net.targets(from_uint8(x)[None].double(), 16, antialias=True)[1][0] for x in images]
    return torch.stack(f).numpy()


def pictures(images):
    return torch.stack([images[i][0] for i in range(len(images))])


def test_neighbours_are_scikit_learns(chain, teacher):
    """Distances and places of the four nearest of 60, in pieces of 64 and 7, of a sample or its mirror image:
    the least over both of scikit-learn's cosine distances. To 1e-5: ours are float32."""
    data = Images(chain.data, 32)
    queries = torch.randint(0, 256, (9, 3, 32, 32), dtype=torch.uint8)
    queries[:5] = pictures(data)[[3, 14, 15, 42, 59]] // 2 + 60                         # paler than they were
    train, both = features(teacher, pictures(data)), (queries, queries.flip(-1))
    found = [NearestNeighbors(n_neighbors=60, metric="cosine", algorithm="brute").fit(train)
             .kneighbors(features(teacher, q)) for q in both]
    all_distances = np.stack([np.take_along_axis(d, i.argsort(1), 1) for d, i in found]).min(0)     # [9, 60]
    expected = all_distances.argsort(1)[:, :4]
    args = type("Args", (), {"features": "dinov2", "dino": str(teacher)})
    net = fid.feature_net(args, "cpu")[0]
    distances, places = watch.nearest(net, watch.views(net, queries, "cpu", "samples"), data, "cpu")
    assert (places.numpy() == expected).all()
    assert np.abs(distances.numpy() - np.take_along_axis(all_distances, expected, 1)).max() < 1e-5
    assert len(set(expected[:, 0])) > 3 and np.diff(np.sort(all_distances, 1)[:, :5]).min() > 1e-5
    split = fid.batches

    def small(images, micro, device, desc):
        return split(images, 7, device, desc)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fid, "batches", small)
        again = watch.nearest(net, watch.views(net, queries, "cpu", "samples"), data, "cpu")
    assert torch.equal(again[1], places) and relative(again[0], distances) < 1e-4


def test_planted_copies_are_found_and_come_first(chain, teacher, tmp_path, capsys):
    """Two copies among other pictures, one of them mirrored: first on the sheet, beside what they copy."""
    data, other = Images(chain.data, 32), torch.from_numpy(shapes.draw(20, 32, 9)[0]).permute(0, 3, 1, 2)
    other = other.clone()
    other[6], other[11] = data[33][0], data[7][0].flip(-1)
    np.savez(tmp_path / "samples.npz", arr_0=other.permute(0, 2, 3, 1).numpy())
    shapes.write(tmp_path / "val", 40, 32, 5)
    words = f"--data {chain.data} --dino {teacher} --num 3 --out {tmp_path}/sheet.png"
    call(figures, f"neighbours {tmp_path}/samples.npz --val {tmp_path}/val", words)
    said = capsys.readouterr().out.splitlines()
    first = [line for line in said if line.startswith("sample ")]
    assert len(first) == 3 and {line.split()[1] for line in first[:2]} == {"6:", "11:"}
    assert any(line.startswith("sample 6: ") and line.endswith(data.paths[33]) for line in first)
    assert any(line.startswith("sample 11: ") and line.endswith(data.paths[7]) for line in first)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape[0] == 18 + 3 * 130 + 2
    left = sheet.shape[1] - (5 * 130 + 2)
    row = [line.split()[1] for line in first].index("6:")
    y = 18 + 2 + row * 130
    tiles = [sheet[y:y + 128, left + 2 + k * 130:left + 2 + k * 130 + 128] for k in (0, 1)]
    expected = data[33][0].permute(1, 2, 0).numpy().repeat(4, 0).repeat(4, 1)
    assert all((tile == expected).all() for tile in tiles)
    share = float(next(line for line in said if "of the samples are nearer" in line).split("%")[0])
    assert 10 <= share <= 50                                            # the two, and few by chance
    call(figures, f"neighbours {tmp_path}/val", words)                  # a folder; and without --val
    assert "% of the samples" not in capsys.readouterr().out


def test_suspicion_of_new_pictures_is_one_in_twenty():
    """Samples from the test pictures' own distribution: 5% and a ratio of 1; copies: all of them, and 0."""
    g = torch.Generator().manual_seed(0)
    ours, theirs = (torch.rand(20_000, generator=g) + 0.5 for _ in range(2))
    share, ratio = watch.suspicion(ours, theirs)
    assert share == pytest.approx(0.05, abs=0.01) and ratio == pytest.approx(1, abs=0.02)
    assert watch.suspicion(0 * ours, theirs) == (1.0, 0.0) and watch.suspicion(ours + 1, theirs)[0] == 0


def test_a_picture_that_cannot_be_read_ends_nothing(chain, teacher, tmp_path):
    """As in training: the next one takes its place. Statistics are no samples."""
    shapes.write(tmp_path / "data", 10, 32, 5)
    (tmp_path / "data/00_disk/000000.png").write_bytes(b"no picture")
    call(figures, f"neighbours {tmp_path}/data/03_triangle --data {tmp_path}/data --dino {teacher}",
         f"--out {tmp_path}/sheet.png")
    assert (tmp_path / "sheet.png").is_file()
    np.savez(tmp_path / "stats.npz", mu=np.zeros(2), sigma=np.eye(2))
    with pytest.raises(UserError, match="stats.npz: holds statistics and no images"):
        call(figures, f"neighbours {tmp_path}/stats.npz --data {chain.data} --dino {teacher}")
