"""Whatever stands in the files of a checkpoint: a clear error or the whole; no code, no hang, bounded memory."""

import contextlib
import json
import random
import tracemalloc

import numpy as np
import pytest

from steering.campaign import Campaign, DecisionSuggested, campaign_from, state_of
from steering.inference import PolicyAnswer, SavedPolicy
from steering.inference.saved_policy import policy_state
from steering.policies import SpaceFilling
from steering.records.npz import read_arrays, write_arrays
from steering.runner.event_log import events_after, repaired
from steering.runner.manifest import NoCheckpoint, newest_whole
from tests.test_campaign import SETTINGS, decision, published
from tests.test_manifest import folder, write  # noqa: F401 - a fixture

ROUNDS = 500
CLEAR = (ValueError, OSError, NoCheckpoint)
JUNK = [b"\x00", b"\xff" * 9, b"9" * 400, b"[" * 2000, b'{"~": "class", "v": "type"}', b"null", b"1e999", b"-1", b'""']


def mutated(data, draws):
    data = bytearray(data)
    for _ in range(draws.randint(1, 4)):
        at = draws.randrange(len(data) + 1)
        match draws.randrange(4):
            case 0:
                data[at : at + draws.randrange(1, 40)] = b""
            case 1:
                data[at:at] = draws.choice(JUNK)
            case 2 if at < len(data):
                data[at] = draws.randrange(256)
            case _:
                start = draws.randrange(len(data) + 1)
                data[at : at + 30] = data[start : start + 30]
    return bytes(data)


def attempt(read):
    with contextlib.suppress(*CLEAR):
        read()


def test_arrays(tmp_path):
    path, draws = tmp_path / "a.npz", random.Random(1)
    write_arrays(
        path, {"counts": np.arange(600, dtype=np.uint16).reshape(6, 10, 10), "x": np.zeros(3), "n": np.array(1.0)}
    )
    good = path.read_bytes()
    tracemalloc.start()
    for _ in range(ROUNDS):
        path.write_bytes(mutated(good, draws))
        attempt(lambda: read_arrays(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5e7
    path.unlink()
    path.symlink_to("/etc/hostname")
    with pytest.raises(OSError, match="symbolic"):
        read_arrays(path)


def test_manifests(folder):  # noqa: F811
    root, draws = write(folder, 1, ("frames/a.npz", "frames/b.npz")), random.Random(2)
    path = root / "1/manifest.json"
    good = path.read_bytes()
    for _ in range(ROUNDS):
        path.write_bytes(mutated(good, draws))
        attempt(lambda: newest_whole(folder))


def test_states_of_campaign_and_policy():
    draws, campaign = random.Random(3), Campaign(SETTINGS)
    for event in (published(0), decision(3)):
        campaign.handle(event)
    answer = PolicyAnswer(decision=DecisionSuggested(time=0.0, positions=(), reasons=()), asked=1, ingested={"a": 3})
    policy = policy_state(
        SpaceFilling(np.random.default_rng(0).normal(size=(9, 2))), ({}, (), False), {"a": 3}, [answer]
    )
    for state, read in ((state_of(campaign), campaign_from), (policy, SavedPolicy.read)):
        good = json.dumps(state).encode()
        for _ in range(ROUNDS):
            with contextlib.suppress(ValueError, RecursionError):  # of json
                found = json.loads(mutated(good, draws))
                attempt(lambda: read(found))  # noqa: B023


def test_logs(folder):  # noqa: F811
    path, draws = folder.path / "events.jsonl", random.Random(4)
    good = b"".join(json.dumps({"event": "Tick", "time": 1.0, "seq": n}).encode() + b"\n" for n in range(1, 40))
    for _ in range(ROUNDS):
        path.write_bytes(mutated(good, draws))
        attempt(lambda: repaired(folder))
        attempt(lambda: events_after(folder, 20))
