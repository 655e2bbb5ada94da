"""Laws of the watch over workers, and of what takes the place of lost ones."""

import asyncio
import gc
import os
import signal
import time
import weakref
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from steering.campaign import FramesLost, GroupChanged, SourceReopened, SourceSilent, WorkerLost, decode, encode
from steering.clusters import local
from steering.learning import TrainerSettings
from steering.learning.samples import Samples, owner_of
from steering.learning.strategies import ER
from steering.ptychography import RefineSettings
from steering.runner import FinalSettings, LabelSettings, RunFolder, start
from steering.runner.actors import ActorHandle, losses
from steering.runner.watch import LOOK_S, Silence
from steering.view.status import status_lines
from tests.test_learning import labels, rank_of
from tests.test_runner import experiment


def beats(**ago):
    """What the scheduler knows of workers, from how long ago each was seen."""
    return {name: {"last_seen": 1000.0 - seconds} for name, seconds in ago.items()}


def test_a_silent_worker_is_named_at_the_second_look_and_only_if_it_is_watched():
    silence = Silence(3.0)
    found = beats(a=0.1, b=2.5, c=9.0)
    assert silence.judge(found, {"a", "b"}) == []
    assert silence.judge(found, {"a", "b"}) == ["b"]


def test_a_worker_that_gave_a_sign_between_two_looks_is_not_silent():
    silence = Silence(3.0)
    assert silence.judge(beats(a=0.1, b=4.0), {"b"}) == []
    assert silence.judge(beats(a=0.0, b=2.5), {"b"}) == []  # it came late, but it came
    assert silence.judge(beats(a=0.0, b=2.5), {"b"}) == ["b"]


def test_nobody_is_silent_where_the_scheduler_or_the_machine_stalled():
    silence = Silence(3.0)
    stalled = beats(a=30.0, b=30.2, c=30.4)  # nothing was heard of anybody
    for _ in range(3):
        assert silence.judge(stalled, {"a", "b", "c"}) == []
    assert silence.judge({}, {"a"}) == []


@pytest.mark.parametrize("workers", [2, 9])
def test_a_frozen_worker_is_named_within_the_stated_time_and_a_short_stall_never_counts(workers):
    """Beats each half second, looks each quarter: whatever the phases of the two."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        phase, look, stall = rng.uniform(0, 0.5), rng.uniform(0, LOOK_S), rng.uniform(0, 1.5)
        for length, expected in ((stall, None), (100.0, 3.0)):
            silence, now, named = Silence(3.0), look, None
            while now < 10.0 and named is None:
                seen = phase + 0.5 * np.floor((now - phase) / 0.5)
                if now > 4.0 > seen - length:  # it stalls at 4
                    last = phase + 0.5 * np.floor((4.0 - phase) / 0.5)
                    seen = last if now < 4.0 + length else seen
                found = {str(k): {"last_seen": now} for k in range(workers - 1)} | {"x": {"last_seen": seen}}
                named = now if silence.judge(found, {"x"}) else None
                now += LOOK_S
            assert (named is None) == (expected is None)
            assert named is None or named - 4.0 <= expected


def test_large_clusters_beat_less_often_and_have_more_patience():
    assert Silence(3.0).limit(5) == 2.0
    assert Silence(3.0).limit(40) == 4.0
    assert Silence(10.0).limit(40) == 8.5


def test_frames_of_a_lost_rank_that_is_replaced_leave_no_rank_without_a_share():
    """The survivors' frames, spread by the next generations, reach all ranks about evenly."""
    ids = np.arange(300)
    left = ids[owner_of(ids, 3, 0) != 0]
    for generation in range(1, 30):
        shares = Counter(owner_of(left, 3, generation).tolist())
        assert min(shares[rank] for rank in range(3)) > len(left) / 6


@pytest.mark.parametrize(
    ("keep", "optimiser", "batch", "representatives", "rate"),
    [
        ("rank", "sgd", 16, 24, 1e-3 / 3),
        ("rank", "adamw", 16, 24, 1e-3 / 3**0.5),
        ("global", "sgd", 48, 72, 1e-3),
        ("global", "adamw", 48, 72, 1e-3),
    ],
)
def test_the_learning_rate_follows_the_global_minibatch(keep, optimiser, batch, representatives, rate):
    settings = TrainerSettings(keep=keep, optimiser=optimiser)
    alone = settings.on(1, 3)
    assert (alone.batch, alone.representatives) == (batch, representatives)
    assert alone.learning_rate == pytest.approx(rate)
    assert settings.on(3, 3) == settings


@pytest.mark.parametrize(
    ("ranks", "expected"), [(None, (1, None)), (3, (3, 3)), ((2, 8), (2, 8))], ids=["any", "number", "range"]
)
def test_the_number_of_ranks_may_be_a_range(ranks, expected):
    assert experiment_of(ranks).ranks_range == expected


def test_a_range_of_ranks_the_wrong_way_round_is_refused():
    with pytest.raises(ValueError, match="in this order"):
        experiment_of((8, 2))


def experiment_of(ranks):
    parts = experiment()
    return type(parts)(**{**vars(parts), "ranks": ranks})


def test_the_status_says_since_when_the_source_is_silent(tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    now = time.time()
    chunk = {"event": "ChunkArrived", "time": now - 80, "scan": "a", "frame_ids": [0, 1]}
    folder.append_event(chunk)
    assert not any("silent" in line for line in status_lines(folder))
    folder.append_event(encode(SourceSilent(time=now, since=now - 70)))
    [line] = [line for line in status_lines(folder) if "silent" in line]
    assert "1 min 10 s" in line
    folder.append_event(encode(SourceReopened(time=now, reason="OSError: no link", attempt=2, seconds=1.0)))
    [line] = [line for line in status_lines(folder) if "silent" in line]
    assert "OSError: no link" in line
    folder.append_event(chunk)
    assert not any("silent" in line for line in status_lines(folder))


def of(folder, kind, since=0.0):
    found = [decode(line) for line in folder.events()]
    return [event for event in found if isinstance(event, kind) and event.time >= since]


def until(true, run, seconds=60):
    end = time.monotonic() + seconds
    while not (found := true()):
        assert not run.done, run.result()
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def process_of(client, name):
    address = next(a for a, w in client.scheduler_info(n_workers=-1)["workers"].items() if w["name"] == name)
    return client.run(os.getpid, workers=[address])[address]


@pytest.mark.slow
def test_killed_and_frozen_ranks_are_replaced_and_a_frozen_one_does_no_harm(tmp_path):
    """Of three ranks one is killed, then one is frozen in the midst of a round: each time two go on, and a third joins.
    The frozen process is gone before it could go on."""
    folder = RunFolder.create(tmp_path / "run")
    with local(ranks=3) as client:
        run = start(experiment(frames=5000, rounds_after_end=100), client, folder)  # until it is stopped
        until(lambda: any(line["event"] == "CandidateReady" for line in folder.events()), run)
        # Of the objects of libraries, through which a full collection would look while nobody hears from the process.
        assert min(client.run(gc.get_freeze_count).values()) > 100_000
        for name, harm in (("trainer-0", signal.SIGKILL), ("trainer-1", signal.SIGSTOP)):
            pid, begun = process_of(client, name), time.time()
            os.kill(pid, harm)
            until(lambda t=begun: [e for e in of(folder, GroupChanged, t) if e.joined], run)
            changes = of(folder, GroupChanged, begun)
            joined = next(
                change for change in changes if change.joined
            )  # where cores are busy it is one change for both
            assert sum(len(change.lost) for change in changes[: changes.index(joined) + 1]) == 1
            assert (joined.joined, joined.ranks) == ((2,), 3)
            [gone] = of(folder, WorkerLost, begun)
            assert (gone.worker, gone.silent) == (name, harm == signal.SIGSTOP)
            with pytest.raises(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
            until(
                lambda t=joined.time: [e for e in folder.events() if e["event"] == "CandidateReady" and e["time"] > t],
                run,
            )
        run.command("stop")
        figures = run.result()
    assert (figures["ranks"], figures["ranks_lost"], figures["ranks_joined"], figures["workers_silent"]) == (3, 2, 2, 1)
    assert figures["frames_predicted"] == figures["frames_acquired"]
    assert figures["frames_unheard"] == 0


def test_labelled_frames_past_the_room_for_them_go_oldest_first_and_are_counted():
    found = labels(n=60)
    row = found.nbytes / len(found.frame_id)
    samples = Samples(seed=0, keep_all=False, most_bytes=int(20.5 * row + 20 * 16))
    samples.add(found)
    to_train_on = found.frame_id[~found.held_out].tolist()
    scan = samples.scans["a"]
    assert len(scan.held_out) == 5  # a quarter of the room
    assert list(scan.train) == to_train_on[-15:]
    assert samples.dropped == len(to_train_on) - 15
    assert samples.seen == {"a": len(to_train_on)}
    for _ in range(3):
        samples.add(found)
        rows = [*scan.train.values(), *scan.held_out.values()]
        assert sum(value.untyped_storage().nbytes() for each in rows for value in each.values()) <= samples.most_bytes
    everything = Samples(seed=0, keep_all=True, most_bytes=1)
    everything.add(found)
    assert everything.dropped == 0


def test_what_is_kept_of_labels_holds_no_more_than_itself():
    """As views rows would keep whole messages: a run grew by 20 KiB a frame and rank."""
    samples, found = Samples(seed=0, keep_all=False), labels(n=60)
    samples.begin("a")
    samples.add(found)
    kept = {frame: row["phase"].numpy().copy() for frame, row in samples.scans["a"].held_out.items()}
    arrived = [weakref.ref(field) for field in (found.counts, found.amplitude, found.phase)]
    del found
    assert all(field() is None for field in arrived)
    samples.begin("b")
    assert kept
    assert all((samples.scans["a"].held_out[frame]["phase"].numpy() == phase).all() for frame, phase in kept.items())


def test_held_out_frames_of_scans_that_are_over_share_their_room():
    found = labels(n=60)
    row = found.nbytes / len(found.frame_id) + 16
    samples = Samples(seed=0, keep_all=False, most_bytes=int(32 * 8.5 * row))
    for scan in "abcd":
        samples.begin(scan)
        samples.add(replace(found, scan=scan))
    assert [len(samples.scans[scan].held_out) for scan in "abc"] == [2, 2, 2]
    assert len(samples.scans["d"].held_out) == found.held_out.sum() > 2


def test_labels_that_nobody_takes_in_do_not_grow_without_bound():
    found = labels(n=60)
    me = rank_of(ER, samples_bytes=3 * found.nbytes, niceness=0)
    me.prepare(0)
    for _ in range(10):
        asyncio.run(me.receive(found))
    assert me.samples.dropped == 7 * 60


@pytest.mark.slow
def test_a_lost_label_worker_and_a_lost_source_are_replaced_and_no_frame_is_lost_or_measured_twice(tmp_path):
    """Each has a process of its own. The label worker is killed while it labels: the task is done again."""
    folder = RunFolder.create(tmp_path / "run")
    unrefined = LabelSettings(final=FinalSettings(refine=RefineSettings(passes=0)))
    parts = replace(experiment(frames=600, labels_after_end=2), labels=unrefined)
    kinds = [signal.SIGKILL, signal.SIGSTOP] if hasattr(parts.source, "resume") else []
    with local(ranks=1, apart=True) as client:
        run = start(parts, client, folder)
        until(lambda: any(line["event"] == "LabelsReady" for line in folder.events()), run)
        for harm in kinds:
            begun = time.time()
            os.kill(process_of(client, "source"), harm)
            until(lambda t=begun: of(folder, SourceReopened, t), run)
        begun = time.time()
        os.kill(process_of(client, "label"), signal.SIGKILL)
        until(lambda: [e for e in folder.events() if e["event"] == "LabelsReady" and e["time"] > begun], run)
        figures = run.result()
    assert {event.worker for event in of(folder, WorkerLost)} == {"label", *["source"] * bool(kinds)}
    assert not of(folder, FramesLost)
    [(_, image)] = folder.objects().items()
    assert sorted(image["frame"].values) == list(range(600))
    measured = np.stack([image["position_y"], image["position_x"]], 1).round(12)
    assert len(np.unique(measured, axis=0)) == 600
    assert figures["frames_predicted"] == figures["frames_acquired"] == 600


class Looks:
    """A client whose scheduler says, look by look, when each worker was seen last."""

    def __init__(self, *looks):
        self.left = list(looks)
        self.scheduler = self

    async def identity(self, n_workers):
        assert n_workers == -1
        seen = self.left.pop(0) if len(self.left) > 1 else self.left[0]
        return {"workers": {address: {"last_seen": when} for address, when in seen.items()}}


def test_losses_are_complete_once_all_others_have_given_a_sign_of_life():
    """Of two that froze together the second is noticed later; the third is known to live from its next beat on."""
    a, b, c = (ActorHandle(None, SimpleNamespace(status="finished"), name) for name in "abc")
    looks = Looks(
        {"a": 9.0, "b": 8.0, "c": 9.5, "other": 10.0},
        {"b": 8.0, "c": 9.5, "other": 10.0},
        {"b": 8.0, "c": 10.2, "other": 10.4},
        {"c": 10.6, "other": 10.4},
        {"c": 10.6, "other": 10.8},
        {"c": 11.1, "other": 10.8},
    )
    assert asyncio.run(losses(looks, [a, b, c])) == [a, b]
    assert len(looks.left) == 1  # and not before c had been heard of again
