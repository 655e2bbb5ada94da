"""Images of classes from a folder: what is read, how it is decoded, in which order, and what is refused."""

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from steering.learning.epochs import Epochs
from steering.runner.folder import RunFolder
from tests.command_line import ran

sys.path.append(str(Path(__file__).parents[1] / "workflows"))

from bench_scaling import fit_runs, messages, sent_bytes
from classes.decoding import decode, random_box
from classes.folder import find_images
from classes.networks import checked, maker
from classes.schedule import Schedule


def blank(colour=(200, 100, 50), size=(64, 48)):
    """An image of one colour."""
    return Image.new("RGB", size, colour)


@pytest.fixture
def folder(tmp_path):
    """Four classes, each brightest in a channel of its own; the shade of the next but one tells images apart, that of
    the next grows to the right. Every third image is JPEG."""
    for part, count in (("train", 6), ("val", 3)):
        for kind, name in enumerate(("ant", "bee", "cat", "dog")):
            place = tmp_path / part / name
            place.mkdir(parents=True)
            for number in range(count):
                pixels = np.full((48 + number, 64, 3), 40 * kind + 4 * number, np.uint8)
                pixels[:, :, kind % 3] += 100
                pixels[:, :, (kind + 1) % 3] += np.arange(64, dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{number}{'.jpg' if number % 3 == 0 else '.png'}", quality=95)
    (tmp_path / "train" / "ant" / ".DS_Store").touch()
    (tmp_path / "train" / "ant" / "about.txt").write_text("not an image")
    return tmp_path


def found(folder, decoders=2):
    return find_images(folder, size=32, decoders=decoders)


def test_a_folder_is_its_classes_in_alphabetical_order(folder):
    images = found(folder)
    assert images.names == ("ant", "bee", "cat", "dog")
    assert images.label.tolist() == [kind for kind in range(4) for _ in range(6)]
    assert images.train[0] == "ant/0.jpg"
    assert images.test_label.tolist() == [kind for kind in range(4) for _ in range(3)]
    assert images.some(2).label.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda root: [file.unlink() for file in (root / "train" / "bee").iterdir()], r"train/bee: found no file"),
        (lambda root: (root / "train" / "fly").mkdir(), r"train/fly: found no file, expected images"),
        (lambda root: blank().save(_new(root / "val" / "fly") / "1.png"), r"the class fly in val and not in train"),
        (lambda root: blank().save(_new(root / "train" / "fly") / "1.png"), r"the class fly in train and not in val"),
        (lambda root: blank().save(_new(root / "train" / "fly") / "1.tif"), r"1 files of other kinds"),
        (lambda root: (root / "val").rename(root / "test"), r"val: found no such folder, expected train/CLASS and val"),
    ],
)
def test_a_folder_that_cannot_be_learnt_from_is_refused_before_anything_starts(folder, harm, says):
    harm(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        found(folder)


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def saved(image, path, **options):
    image.save(path, **options)
    return path


@pytest.mark.parametrize(
    ("make", "name", "colour"),
    [
        (lambda: blank().convert("L"), "grey.png", (124, 124, 124)),
        (lambda: blank().convert("L"), "grey.jpg", (124, 124, 124)),
        (lambda: blank().convert("CMYK"), "cmyk.jpg", (200, 100, 50)),
        (lambda: blank().convert("P", palette=Image.Palette.ADAPTIVE), "palette.png", (200, 100, 50)),
        (lambda: Image.new("RGBA", (64, 48), (200, 100, 50, 255)), "opaque.png", (200, 100, 50)),
        (lambda: Image.new("RGBA", (64, 48), (9, 9, 9, 0)), "transparent.png", (255, 255, 255)),
        (lambda: Image.fromarray(np.full((48, 64), 124 * 256, np.uint16)), "deep.png", (124, 124, 124)),
        (lambda: Image.new("1", (64, 48), 1), "bit.png", (255, 255, 255)),
    ],
)
def test_every_kind_of_pixel_becomes_the_colour_that_a_person_sees(tmp_path, make, name, colour):
    for rng in (None, np.random.default_rng(0)):
        pixels = decode(saved(make(), tmp_path / name), 32, rng)
        assert pixels.shape == (3, 32, 32)
        assert pixels.dtype == np.uint8
        np.testing.assert_allclose(pixels.mean((1, 2)), colour, atol=4)


def test_a_random_part_has_the_published_area_and_ratio_and_lies_inside():
    rng = np.random.default_rng(0)
    boxes = np.array([random_box(500, 375, rng) for _ in range(2000)])
    left, top, right, bottom = boxes.T
    assert left.min() >= 0 <= top.min()
    assert right.max() <= 500
    assert bottom.max() <= 375
    share, ratio = (right - left) * (bottom - top) / (500 * 375), (right - left) / (bottom - top)
    assert 0.075 < share.min() < 0.1
    assert share.max() > 0.85
    assert 0.74 < ratio.min() < 0.77
    assert 1.3 < ratio.max() < 1.35
    thin = random_box(1000, 2, rng)
    assert (thin[3] - thin[1], thin[2] - thin[0]) == pytest.approx((2, 2 * 4 / 3), abs=1)


def test_a_jpeg_of_which_the_decoder_leaves_out_the_finest_pixels_is_the_same_picture(tmp_path):
    y, x = np.mgrid[:1024, :1536] / 256
    picture = np.stack([128 + 100 * np.sin(x), 128 + 100 * np.cos(y), 128 + 60 * np.sin(x + y)], -1).astype(np.uint8)
    whole = decode(saved(Image.fromarray(picture), tmp_path / "whole.png"), 64, None)
    less = decode(saved(Image.fromarray(picture), tmp_path / "less.jpg", quality=95), 64, None)
    assert np.abs(whole.astype(int) - less).mean() < 3
    middle = picture[64:960, 320:1216].reshape(64, 14, 64, 14, 3).mean((1, 3)).transpose(2, 0, 1)
    assert np.abs(whole - middle).mean() < 3


def minibatches(images, count, batch=5, rank=0, ranks=1, seed=0):
    pool = torch.arange(6, 18)  # bees and cats
    order = Epochs(len(pool), seed=3, rank=rank, ranks=ranks)
    with images.loading(pool, order, batch, seed) as load:
        taken = []
        for _ in range(count):
            out = {"image": torch.zeros(batch, 3, 32, 32, dtype=torch.uint8)}
            out |= {name: torch.zeros(batch, dtype=torch.int64) for name in ("label", "stratum")}
            load(batch, out)
            taken.append(out)
    return {name: torch.cat([one[name] for one in taken]) for name in ("image", "label", "stratum")}


def test_minibatches_follow_the_epochs_whatever_the_number_of_threads(folder):
    """Labels belong to their images; the same seed gives the same pixels, another one other parts of them."""
    one, three = minibatches(found(folder, 1), 6), minibatches(found(folder, 3), 6)
    order = Epochs(12, seed=3)
    expected = 1 + (order.take(30) >= 6)
    assert one["label"].tolist() == expected.tolist()
    assert torch.equal(one["label"], one["stratum"])
    assert torch.equal(one["image"], three["image"])
    assert not torch.equal(minibatches(found(folder, 3), 6, seed=1)["image"], one["image"])
    brightest = one["image"].float().mean((2, 3)).argmax(1)
    assert torch.equal(brightest, one["label"])  # the channel in which a class is brighter


def test_two_ranks_see_each_image_once_in_a_pass_although_one_has_fewer(folder):
    parts = [minibatches(found(folder), 3, batch=2, rank=rank, ranks=2)["image"] for rank in range(2)]
    shade = torch.cat(parts).float().mean((2, 3)).min(1).values / 4
    assert sorted(shade.round().tolist()) == [10 + n for n in range(6)] + [20 + n for n in range(6)]


def cut(path):
    """Half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_file_that_cannot_be_decoded_is_replaced_by_one_of_its_class_and_named(folder, caplog):
    cut(folder / "train" / "bee" / "3.jpg")
    (folder / "train" / "cat" / "5.png").write_bytes(b"")
    (folder / "val" / "dog" / "1.png").write_text("no image")
    images = found(folder)
    taken = minibatches(images, 6)
    assert torch.equal(taken["image"].float().mean((2, 3)).argmax(1), taken["label"])
    assert sorted(images.unreadable) == ["train/bee/3.jpg", "train/cat/5.png"]
    tested = list(images.testing(torch.arange(12), 5))
    assert sum(len(label) for _, label in tested) == 11
    assert torch.cat([label for _, label in tested]).tolist().count(3) == 2
    assert images.unreadable[-1] == "val/dog/1.png"
    assert caplog.text.count("found a file that cannot be decoded") == 3


def test_a_folder_of_broken_files_ends_the_training_with_the_number_of_them(folder):
    for number, kind in itertools.product(range(5), ("bee", "cat")):
        cut(next(folder.glob(f"train/{kind}/{number}.*")))
    with pytest.raises(RuntimeError, match=r"found 10 files that cannot be decoded among \d+ read"):
        minibatches(found(folder), 6)
    cut(folder / "train" / "cat" / "5.png")
    with pytest.raises(RuntimeError, match=r"train/cat: found no image that can be decoded|found 1\d files"):
        minibatches(found(folder), 6)


def test_a_folder_that_a_rank_does_not_see_is_told_with_the_host(folder):
    images = found(folder)
    (folder / "train").rename(folder / "moved")
    with pytest.raises(RuntimeError, match=r"No such file or directory on .*, expected a folder that every rank can"):
        minibatches(images, 1)


def test_the_schedule_is_the_published_one_and_begins_anew_with_every_task():
    """30 epochs of 10 steps; a second task of half the length. 0.0125 times the factor is the learning rate."""
    factor = Schedule([300, 150], ranks=128, shape="paper")
    assert [factor(step) for step in (0, 50, 209, 210, 259, 260, 279, 280, 299)] == pytest.approx(
        [1, 64, 64, 32, 32, 3.2, 3.2, 0.64, 0.64]
    )
    assert factor(25) == pytest.approx((1 + 64) / 2)
    assert [factor(300), factor(325), factor(300 + 105)] == pytest.approx([1, 64, 32])
    assert factor(10_000) == pytest.approx(0.64)
    one = Schedule([100], ranks=2, shape="cosine")
    assert [one(0), one(50), one(100)] == pytest.approx([2, 1, 0])


NETWORK = """
import torch

def small(classes):
    see = torch.nn.Sequential(torch.nn.AvgPool2d(8), torch.nn.Flatten(), torch.nn.Linear(48, 16), torch.nn.ReLU())
    return torch.nn.Sequential(see, torch.nn.Linear(16, classes))
"""


def test_a_network_that_is_not_there_or_gives_no_logits_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_network.py").write_text(NETWORK)
    for name, says in (
        ("resnet7", "expected resnet18, resnet50 or module:function"),
        ("nowhere_at_all:make", "No module named 'nowhere_at_all', expected a module"),
        ("own_network:large", "no function large in "),
    ):
        with pytest.raises(ValueError, match=says):
            maker(name, width=4, size=32)
    make = maker("own_network:small", width=4, size=32)
    assert isinstance(checked(make(4), 4, (3, 32, 32)), nn.Module)
    with pytest.raises(
        ValueError, match=r"outputs \(2, 3, 32, 32\) of the network for 2 images, expected logits \(2, 4"
    ):
        checked(nn.Identity(), 4, (3, 32, 32))
    with pytest.raises(ValueError, match="found a str as the network"):
        checked("network", 4, (3, 32, 32))


@pytest.mark.slow
def test_a_folder_and_a_network_of_ones_own_through_all_tasks_on_two_ranks(folder, tmp_path, monkeypatch):
    """With a broken file; what was measured is then taken up by the model of the exchange."""
    cut(folder / "train" / "ant" / "3.jpg")
    (tmp_path / "network_of_ones_own.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    run, scaling = tmp_path / "run", tmp_path / "scaling"
    own = f"--data {folder} --network network_of_ones_own:small --strategies incremental,er_ace"
    quick = "--size 32 --epochs 30 --batch 4 --candidates 4 --representatives 4 --buffer 1"
    ran("class_incremental.py", run, *f"{own} {quick}".split())
    summary = RunFolder(run).summary()
    assert summary["ranks"] == 2
    assert summary["settings"]["schedule"] == "paper"
    learnt = summary["strategies"]["er_ace"]
    assert learnt["top1_after_task"][0] == 100
    assert learnt["top1_final"] > summary["strategies"]["incremental"]["top1_final"]
    assert learnt["top5_final"] == 100  # of four classes
    assert learnt["unreadable"] >= 1
    assert learnt["samples_per_s"] == pytest.approx(learnt["steps"] * 4 * 2 / learnt["runtime_s"])
    assert 0 < learnt["buffer_bytes"] <= 26 * (3 * 32 * 32 + 16 + 64)
    assert sum(learnt["seconds"].values()) < 1.05 * learnt["runtime_s"]
    ran("bench_scaling.py", scaling, "--ranks", "1", "--steps", "3", "--runs", run)
    [point] = RunFolder(scaling).summary()["runs"]
    assert (point["strategy"], point["ranks"], point["messages"]) == ("er_ace", 2, 1)
    assert point["exchange_ms"] == learnt["exchange_ms"] > 0
    assert RunFolder(scaling).summary()["fitted_to_runs"] is None  # one point says nothing of messages and bytes


def test_the_model_of_the_exchange_finds_latency_and_bandwidth_of_runs():
    """Runs on a network of 5 us and 10 GB/s, with 0.2 ms besides; one of them with two ranks to a core."""
    runs = []
    for ranks, shared in ((2, 1.0), (8, 2.0), (64, 1.0), (128, 1.0)):
        sent = sent_bytes(ranks, 7, 150_544)
        took = (0.2 + messages(ranks) * 5e-3 + sent / 10e6) * shared
        runs.append({"ranks": ranks, "bytes": sent, "exchange_ms": took, "ranks_per_core": shared})
    fitted = fit_runs(runs)
    assert fitted["latency_us"] == pytest.approx(5, rel=1e-3)
    assert fitted["bandwidth_gb_s"] == pytest.approx(10, rel=1e-3)
    assert fitted["fixed_ms"] == pytest.approx(0.2, rel=1e-3)
    assert fit_runs(runs[:2]) is None
