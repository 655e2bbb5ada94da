"""What the model store promises: whole versions or none, never changed, never executed."""

import errno
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from steering.campaign import Campaign, CampaignSettings, ModelPublished
from steering.models import ModelStore, Optics, ProbeFirst, PtychoNN
from steering.ptychography import zone_plate
from steering.records import ModelVersion
from steering.runner.recovery import clean_store
from tests.test_folder import fill, small_disk  # noqa: F401 - a fixture

NETWORKS = {
    "ProbeFirst": lambda: ProbeFirst(window=32, patch=20, width=8, modes=2),
    "PtychoNN": lambda: PtychoNN(window=32, patch=20, width=4, depth=2, modes=2),
}


def network(kind="ProbeFirst", seed=0):
    torch.manual_seed(seed)
    made = NETWORKS[kind]()
    mask = np.zeros((32, 32), bool)
    mask[5] = True
    made.optics.set(np.repeat(zone_plate(32, 20.0), 2, axis=0), mask)
    return made.eval()


def version(number, of, **more):
    return ModelVersion(number=number, network=type(of).__name__, hyperparameters=dict(of.hyperparameters), **more)


@pytest.fixture
def store(tmp_path):
    return ModelStore(tmp_path / "models")


def test_a_version_that_finds_no_room_is_refused_with_the_systems_number_and_leaves_nothing(small_disk):  # noqa: F811
    """By the number the run knows that it may try again, also when the error comes from another process."""
    store, made = ModelStore(small_disk / "models"), network()
    store.publish(made, version(0, made))
    fill(small_disk)
    with pytest.raises(OSError, match="No space left") as caught:
        store.publish(made, version(1, made))
    assert pickle.loads(pickle.dumps(caught.value)).errno == errno.ENOSPC
    assert sorted(path.name for path in store.path.iterdir()) == ["00000", "newest.json"]
    assert store.newest() == 0


def test_a_version_is_on_the_disk_before_it_has_its_name_and_before_it_is_the_newest(store, monkeypatch):
    """After a reset of the machine a name that was not waited for may lead to empty files."""
    store.path.mkdir()
    done, fsync, rename, replace = [], os.fsync, os.rename, os.replace

    def note(what, path):
        done.append((what, os.path.relpath(path, store.path).replace(f".{os.getpid()}", "")))

    monkeypatch.setattr(
        os, "fsync", lambda handle: (fsync(handle), note("disk", os.readlink(f"/proc/self/fd/{handle}")))
    )
    monkeypatch.setattr(os, "rename", lambda old, new: (rename(old, new), note("name", new)))
    monkeypatch.setattr(os, "replace", lambda old, new: (replace(old, new), note("name", new)))
    made = network()
    store.publish(made, version(0, made))
    files = [
        (what, f".00000{name}")
        for file in ("weights.safetensors", "model.json")
        for what, name in (("disk", f"/.{file}"), ("name", f"/{file}"), ("disk", ""))
    ]
    pointer = [("disk", ".newest.json"), ("name", "newest.json"), ("disk", ".")]
    assert done == [*files, ("name", "00000"), ("disk", "."), *pointer]


def test_what_nobody_put_into_service_is_withdrawn_without_a_look_at_it(store):
    """A recovery after a reset of the machine: earlier states left versions whose files were empty."""
    made, campaign = network(), Campaign(CampaignSettings())
    for number in range(4):
        store.publish(made, version(number, made))
    campaign.handle(ModelPublished(time=0.0, version=0, validation_error=None, validation_residual=None))
    for number in (2, 3):
        for name in ("model.json", "weights.safetensors"):
            os.truncate(store.folder(number) / name, 0)
    clean_store(store, campaign, [1])
    assert (store.numbers(), store.newest()) == ([0, 1], 0)
    assert not list(store.path.glob(".*"))


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_version_comes_back_bit_by_bit(store, kind):
    made = network(kind)
    store.publish(made, version(0, made))
    loaded = store.load(0)
    assert type(loaded) is type(made)
    assert not loaded.training
    counts = torch.from_numpy(np.random.default_rng(0).poisson(20, (4, 32, 32)).astype(np.float32))
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(made(counts), loaded(counts), strict=True))
    assert torch.equal(loaded.optics.probe, made.optics.probe)
    assert torch.equal(loaded.optics.bad, made.optics.bad)


def test_what_is_said_of_a_version_survives(store):
    made = network()
    said = version(
        3,
        made,
        parents=(1, 2),
        trained_on={"zinc": 120, "brick": 40},
        steps=80,
        validation_error=0.125,
        validation_residual=0.03,
        validation_residuals=(0.02, 0.04),
        noise_share=0.5,
        validation_offsets=(0.1, -0.2),
    )
    store.publish(made, said)
    assert store.describe(3) == said


def test_an_error_that_is_no_number_is_not_known(store):
    made = network()
    store.publish(made, version(0, made, validation_error=float("nan"), validation_residual=float("inf")))
    assert "NaN" not in (store.folder(0) / "model.json").read_text()
    assert store.describe(0) == version(0, made)


def test_versions_come_in_order_and_the_newest_is_the_last_published(store):
    made = network()
    assert store.newest() is None
    assert store.versions() == []
    for number in (0, 2, 10, 100_001):
        store.publish(made, version(number, made))
        assert store.newest() == number
    (store.path / "00002 (copy)").mkdir()
    (store.path / "notes.txt").write_text("mine")
    assert [v.number for v in store.versions()] == [0, 2, 10, 100_001]
    assert not list(store.path.glob(".*"))


def test_a_version_is_never_changed(store):
    first, other = network(seed=0), network(seed=1)
    folder = store.publish(first, version(1, first, steps=5))
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(FileExistsError, match=r"found model version 1 .*expected a number not yet used"):
        store.publish(other, version(1, other, steps=9))
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert not list(store.path.glob(".*"))


def test_a_version_that_describes_another_network_is_refused(store):
    made = network()
    for wrong in (version(0, network("PtychoNN")), version(0, ProbeFirst(window=32, patch=20, width=4))):
        with pytest.raises(ValueError, match="expected both alike"):
            store.publish(made, wrong)
    assert store.versions() == []


def test_a_publication_that_fails_half_way_leaves_nothing(store):
    made = network()
    store.publish(made, version(0, made))
    with pytest.raises(TypeError, match="not JSON serializable"):
        store.publish(made, version(1, made, trained_on={"zinc": object()}))  # after the weights are written
    assert store.newest() == 0
    assert [v.number for v in store.versions()] == [0]
    assert not list(store.path.glob(".*"))


def test_what_is_withdrawn_twice_is_gone_once(store):
    made = network()
    store.publish(made, version(0, made))
    store.publish(made, version(1, made))
    for _ in range(2):  # a disk that failed after it had: the runner tries again
        store.withdraw(1, 0)
        assert (store.newest(), [v.number for v in store.versions()]) == (0, [0])
    assert not list(store.path.glob(".*"))


def test_a_version_that_is_not_there_is_named(store):
    made = network()
    store.publish(made, version(0, made))
    for read in (store.describe, store.load, store.weights):
        with pytest.raises(FileNotFoundError, match="of model version 7"):
            read(7)


class Malice:
    """Executes something as soon as it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def torch_file(thing, path):
    torch.save({"weights": thing}, path)


def pickle_file(thing, path):
    path.write_bytes(pickle.dumps(thing))


@pytest.mark.parametrize("write", [torch_file, pickle_file])
def test_a_pickle_in_the_place_of_a_file_is_refused_and_never_run(store, tmp_path, write):
    made, marker = network(), tmp_path / "executed"
    store.publish(made, version(0, made))
    write(Malice(marker), store.folder(0) / "weights.safetensors")
    with pytest.raises(ValueError, match="expected safetensors"):
        store.load(0)
    for name, read in (("00000/model.json", lambda: store.load(0)), ("newest.json", store.newest)):
        write(Malice(marker), store.path / name)
        with pytest.raises(ValueError, match=r"that is no JSON .*expected a JSON object"):
            read()
    assert not marker.exists()
    write(Malice(marker), tmp_path / "proof")
    torch.load(tmp_path / "proof", weights_only=False) if write is torch_file else pickle.loads(
        (tmp_path / "proof").read_bytes()
    )
    assert marker.exists()  # the bait was good


class Mine(torch.nn.Module):
    """A network of somebody's own, with a number that is no integer among its hyperparameters."""

    def __init__(self, *, window, patch, gain=1.0):
        super().__init__()
        self.hyperparameters = {"window": window, "patch": patch, "gain": gain}
        self.optics = Optics(window, 1)
        self.layer = torch.nn.Linear(window**2, 2 * patch**2)

    def forward(self, counts):
        n, patch = len(counts), self.hyperparameters["patch"]
        out = self.layer(self.optics.amplitude(counts).flatten(1)).view(n, 2, patch, patch)
        return out[:, 0].exp(), out[:, 1] * self.hyperparameters["gain"]


def test_a_network_of_ones_own_is_loaded_by_its_class_and_never_by_its_name(store):
    made = Mine(window=16, patch=4, gain=0.5)
    store.publish(made, version(0, made))
    loaded = store.load(0, network=Mine)
    assert loaded.hyperparameters == made.hyperparameters
    counts = torch.ones(2, 16, 16)
    assert all(torch.equal(a, b) for a, b in zip(made(counts), loaded(counts), strict=True))
    with pytest.raises(ValueError, match=r"found network 'Mine', expected one of .*supply its class"):
        store.load(0)
    with pytest.raises(ValueError, match=r"of a Mine .*expected a PtychoNN"):
        store.load(0, network=PtychoNN)


def test_a_model_file_of_the_first_runs_is_still_read(store):
    """Its hyperparameters stand under another key, `dials`."""
    made = network()
    store.publish(made, version(0, made))
    old = asdict(version(0, made))
    old["dials"] = old.pop("hyperparameters")
    (store.folder(0) / "model.json").write_text(json.dumps(old))
    assert store.load(0).hyperparameters == made.hyperparameters


def changed(**changes):
    return lambda found: json.dumps({**found, **changes})


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda found: json.dumps(found)[:-20], "no JSON"),
        (lambda found: "", "no JSON"),
        (lambda found: "[1, 2]", "found a list .*expected a JSON object"),
        (changed(colour="red"), "'colour'.*expected those of"),
        (lambda found: json.dumps({k: v for k, v in found.items() if k != "parents"}), "expected those of"),
        (lambda found: json.dumps({k: v for k, v in found.items() if k != "network"}), "expected those of"),
        (changed(number="one"), "expected those of"),
        (changed(network="subprocess.Popen"), "found network 'subprocess.Popen', expected one of"),
        (changed(hyperparameters={"window": 32, "depth": 9}), "ProbeFirst cannot be built with"),
        (changed(hyperparameters={"window": 32, "patch": 20, "width": 16, "modes": 2}), "do not fit"),
    ],
)
def test_a_damaged_description_is_refused_in_words(store, damage, says):
    made = network()
    store.publish(made, version(0, made))
    (store.folder(0) / "model.json").write_text(damage(asdict(version(0, made))))
    with pytest.raises(ValueError, match=says):
        store.load(0)


@pytest.mark.parametrize("text", ["", "{}", '{"number": "x"}', "3"])
def test_a_damaged_pointer_is_refused_in_words(store, text):
    store.path.mkdir()
    (store.path / "newest.json").write_text(text)
    with pytest.raises(ValueError, match=r"newest\.json"):
        store.newest()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_cut_weights_are_refused_in_words(store, share):
    made = network()
    weights = store.publish(made, version(0, made)) / "weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match="expected safetensors"):
        store.load(0)


WRITER = """
import os, sys
from pathlib import Path
import torch
from steering.models import ModelStore, PtychoNN
from steering.records import ModelVersion

torch.set_num_threads(1)
store, network = ModelStore(Path(sys.argv[1])), PtychoNN(window=32, patch=20, width=8, depth=2)


def publish_for_ever():
    found = store.versions()
    number = found[-1].number + 1 if found else 0
    while True:
        for parameter in network.parameters():
            parameter.data.fill_(float(number))
        settings = network.hyperparameters
        store.publish(network, ModelVersion(number=number, network="PtychoNN", hyperparameters=settings, steps=number))
        number += 1


for _ in sys.stdin:  # each line asks for a new writer, and comes once the one before was killed
    child = os.fork()
    if child == 0:
        publish_for_ever()
    print(child, flush=True)
    os.waitpid(child, 0)
"""


@pytest.mark.slow
def test_a_reader_never_sees_half_a_model_though_writers_are_killed(store):
    """Writers are killed at any moment, again and again, while a reader loads whatever is newest."""
    draws = random.Random(0)
    before, loads = -1, 0
    mother = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(store.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with mother:
        for _ in range(15):
            mother.stdin.write("go\n")
            mother.stdin.flush()
            writer = int(mother.stdout.readline())
            try:
                begun, lives = time.monotonic(), draws.uniform(0.0, 0.15)
                while (age := time.monotonic() - begun) < lives or (not loads and age < 60):
                    newest = store.newest()
                    if newest is None:
                        continue
                    assert newest >= before
                    before, loads = newest, loads + 1
                    read = store.load(newest)
                    assert all((p == newest).all() for p in read.parameters())
                    assert store.describe(newest).steps == newest
            finally:
                os.kill(writer, signal.SIGKILL)
        mother.stdin.close()
    assert mother.returncode == 0
    found = store.versions()
    assert [v.number for v in found] == list(range(len(found)))
    assert found[-1].number - store.newest() in (0, 1)  # killed between the two renames
    assert loads
    for each in found:
        weights = store.weights(each.number)
        assert all((w == each.number).all() for name, w in weights.items() if not name.startswith("optics."))


def test_a_reader_outside_finds_what_newest_json_names_whatever_the_writer_does(store):
    """As the docstring of ModelStore says: by JSON and safetensors alone; what is gone is looked up once more."""
    made = network()
    store.publish(made, version(0, made))
    over, found = threading.Event(), set()

    def read_on():
        while not over.is_set():
            pointer = json.loads((store.path / "newest.json").read_text())
            folder = store.path / f"{pointer['number']:05d}"
            try:
                described = json.loads((folder / "model.json").read_text())
                weights = load_file(folder / "weights.safetensors")
            except FileNotFoundError:
                assert json.loads((store.path / "newest.json").read_text()) != pointer
                continue
            assert described["number"] == pointer["number"]
            assert set(weights) == set(made.state_dict())
            found.add(pointer["number"])

    with ThreadPoolExecutor(1) as outside:
        reading = outside.submit(read_on)
        try:
            for number in range(1, 30):
                store.publish(made, version(number, made))
                if number % 6 == 0:
                    store.point_to(number - 1)
                if number % 4 == 0:
                    store.withdraw(number, number - 1)
        finally:
            over.set()
        reading.result(timeout=60)
    assert found
