"""A run folder from a stranger: models, labels, events and images execute nothing, lead nowhere, and stay in bounds."""

import base64
import json
import os
import zipfile

import numpy as np
import pytest
import torch
import xarray as xr

from steering import ModelStore, ModelVersion, ProbeFirst, RunFolder
from steering.labels.external import read_labels
from steering.learning.tensor_file import TensorFile, TensorWriter
from steering.runner.alone import unsteered
from steering.runner.liveness import whereabouts
from steering.runner.noted import noted_stop
from steering.runner.object_check import unpacked_size
from steering.runner.object_store import read_scan
from steering.view.report import write_report
from steering.view.status import status_lines, waits_for


@pytest.fixture
def models(tmp_path):
    network = ProbeFirst(window=16, patch=8, width=2)
    network.optics.set(np.ones((1, 16, 16), np.complex64))
    store = ModelStore(tmp_path / "models")
    store.publish(network, ModelVersion(number=0, network="ProbeFirst", hyperparameters=network.hyperparameters))
    return store


def changed(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    "bomb", [{"window": 2**20}, {"width": 2**16}, {"modes": 2**30}, {"width": 1e300}, {"modes": 2**63}]
)
def test_hyperparameters_are_held_against_the_weights_before_a_network_is_built(models, bomb):
    found = json.loads((models.folder(0) / "model.json").read_text())["hyperparameters"]
    changed(models.folder(0) / "model.json", hyperparameters=found | bomb)
    with pytest.raises(ValueError, match="found"):
        models.load(0)


@pytest.mark.parametrize("wrong", [{"hyperparameters": []}, {"network": ["x"]}, {"trained_on": 3}, {"number": "0"}])
def test_fields_of_another_kind_are_refused(models, wrong):
    changed(models.folder(0) / "model.json", **wrong)
    with pytest.raises(ValueError, match="expected those of"):
        models.describe(0)


def test_json_without_an_end_is_refused(models, tmp_path):
    (models.folder(0) / "model.json").write_text('{"a": ' + "[" * 200_000)
    with pytest.raises(ValueError, match="no JSON"):
        models.describe(0)
    run = RunFolder.create(tmp_path / "run")
    run.append_event({"event": "A"})
    with (run.path / "events.jsonl").open("a") as log:
        log.write("[" * 200_000 + "\n" + '{"event": "B"}\n')
    assert [event["event"] for event in run.events()] == ["A", "B"]


def test_links_out_of_a_folder_are_not_followed(models, tmp_path):
    outside = tmp_path / "outside.json"
    outside.write_text('{"number": 0, "secret": 1, "event": "secret"}')
    weights = models.folder(0) / "weights.safetensors"
    weights.rename(tmp_path / "weights.safetensors")
    weights.symlink_to(tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="link to"):
        models.load(0)
    (models.path / "newest.json").unlink()
    (models.path / "newest.json").symlink_to(outside)
    with pytest.raises(ValueError, match="link to"):
        models.newest()
    run = RunFolder.create(tmp_path / "run")
    (run.path / "events.jsonl").symlink_to(outside)
    with pytest.raises(ValueError, match="link to"):
        run.events()
    (run.path / "labels").mkdir()
    (run.path / "labels" / "a.npz").symlink_to(outside)
    with pytest.raises(ValueError, match="link to"):
        read_labels(run.path / "labels" / "a.npz")


@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_what_stands_in_the_place_of_a_small_file_is_not_read(tmp_path, kind):
    """A pipe is not waited for, and what a link leads to has no end."""
    names = ("scheduler.json", "jobs.json", "unsteered.json", "start.json", "stop.json", "workflow.json")
    run = RunFolder.create(tmp_path / "run")
    for name in names:
        os.mkfifo(run.path / name) if kind == "pipe" else (run.path / name).symlink_to("/dev/zero")
    for read in (status_lines, whereabouts, RunFolder.start, waits_for):
        with pytest.raises(ValueError, match="expected"):
            read(run)
    assert unsteered(run.path) is None
    assert noted_stop(run).by == "stop.json of the run's folder"
    (run.path / "scheduler.json").unlink()
    (run.path / "jobs.json").unlink()
    assert any("running" in line for line in status_lines(run))


def test_the_report_takes_pictures_from_its_own_folder_alone(tmp_path):
    run = RunFolder.create(tmp_path / "run")
    (tmp_path / "secret").write_bytes(b"\x89PNG" + b"a key of this machine")
    (run.path / "a.png").symlink_to(tmp_path / "secret")
    os.mkfifo(run.path / "b.png")
    (run.path / "c.png").write_bytes((tmp_path / "secret").read_bytes().upper())
    report = write_report(run).read_text()
    assert base64.b64encode((run.path / "c.png").read_bytes()).decode() in report
    assert base64.b64encode((tmp_path / "secret").read_bytes()).decode() not in report


@pytest.fixture
def image(tmp_path):
    run = RunFolder.create(tmp_path / "run")
    frames = np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32)
    run.write_object("a", xr.Dataset({"phase": (("y", "x"), frames), "held_out": ("frame", np.ones(5, bool))}))
    return run.path / "object.zarr"


@pytest.mark.parametrize(
    "codec",
    [
        {"name": "numcodecs.pickle"},
        {"name": "numcodecs.json2"},
        {"name": "vlen-utf8"},
        {"name": "gzip", "configuration": {"level": 1}},
        {"name": "sharding_indexed", "configuration": {}},
    ],
)
def test_other_codecs_than_ours_are_never_asked(image, codec):
    described = image / "a" / "phase" / "zarr.json"
    changed(described, codecs=[{"name": "bytes", "configuration": {"endian": "little"}}, codec])
    with pytest.raises(ValueError, match="nothing else is read"):
        read_scan(image, "a")


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [2**20, 2**20], "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [2**20, 2**20]}}},
        {"shape": [64, 64]},
        {"data_type": "string"},
        {"data_type": {"name": "numpy.datetime64", "configuration": {}}},
        {"shape": "large"},
        {"chunk_grid": None},
        {"storage_transformers": [{"name": "x"}]},
        {"node_type": "group"},
    ],
)
def test_sizes_and_types_of_an_image_are_checked_first(image, change):
    changed(image / "a" / "phase" / "zarr.json", **change)
    with pytest.raises(ValueError, match="found"):
        read_scan(image, "a")


def test_a_chunk_that_unpacks_to_more_is_not_unpacked(image):
    chunk = next((image / "a" / "phase" / "c").rglob("*0"))
    while chunk.is_dir():
        chunk = chunk / "0"
    head = chunk.read_bytes()
    assert unpacked_size(head[:18]) == 32 * 32 * 4
    chunk.write_bytes(head[:4] + bytes([0xE0]) + (2**60).to_bytes(8, "little") + head[7:])
    assert unpacked_size(chunk.read_bytes()[:18]) == 2**60
    with pytest.raises(ValueError, match="when unpacked, expected 4,096"):
        read_scan(image, "a")
    assert unpacked_size(b"") == unpacked_size(b"x" * 18) == -1


def test_a_bomb_among_labels_is_refused(tmp_path):
    path = tmp_path / "labels.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed, packed.open("patches.npy", "w") as member:
        text = "{'descr': '<c16', 'fortran_order': False, 'shape': (1000000, 1000, 1000), }".ljust(117) + "\n"
        member.write(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + bytes(2**20))
    with pytest.raises(OSError, match="declares 16,000,000,000,000 bytes"):
        read_labels(path)


def test_a_column_that_takes_no_room_on_the_disk_takes_none_in_memory(tmp_path):
    """A file of terabytes of nothing is a few bytes in an archive."""
    writer = TensorWriter(tmp_path / "a", {"slot": (torch.int64, (2**36,))}, {"kind": "buffer"})
    assert writer.finish() > 2**38
    with TensorFile(tmp_path / "a", "buffer") as file, pytest.raises(ValueError, match="expected 134,217,728 numbers"):
        file.numbers("slot", (None,))
