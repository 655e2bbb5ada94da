"""The law of recoveries: however often everything is lost, each frame counts once, and no position waits for ever.

Checkpoints, log, spool and what goes on from them are those of a run; the source cannot say where it was, and around
them is a small world: a beamline that goes on by itself or dies too, and a predictor that keeps frames by their id.
"""

import json
import random
from collections import Counter

import numpy as np
import pytest

from steering.campaign import (
    AskPolicy,
    Campaign,
    ChunkArrived,
    DecisionSuggested,
    FrameRefused,
    FramesLost,
    GroupChanged,
    ModelPublished,
    PredictionReady,
    Steer,
    encode,
    state_of,
)
from steering.campaign.unmeasured import positions_of
from steering.inference.policy_host import PolicyHost
from steering.policies import SpaceFilling
from steering.records import Geometry, Ids, make_chunk
from steering.runner import RunFolder
from steering.runner.asked_before import AskedBefore
from steering.runner.event_log import EVERYDAY
from steering.runner.folder import encoded
from steering.runner.given_again import given_again, not_known, unlogged
from steering.runner.manifest import Manifest, checkpoints, commit, write_part
from steering.runner.metrics import Metrics, advance
from steering.runner.recovery import recover
from steering.runner.spool import write_spooled
from tests.test_runner import experiment

LOOKAHEAD, POSITIONS = 6, 60
EXPERIMENT = experiment(lookahead=LOOKAHEAD)
GEOMETRY = Geometry(shape=(8, 8), wavelength=1e-10, distance=1.0, detector_pixel=1e-4)
PLACES = np.linspace(EXPERIMENT.source.field.y0, EXPERIMENT.source.field.y1, POSITIONS + 2)[1:-1].tolist()
POLICY = PolicyHost(SpaceFilling(np.zeros((3, 2))), {}).state()


class World:
    """A run whose processes can all be lost at once. A position is told by its first number, and asked for by the
    policy once."""

    def __init__(self, path, seed, *, spool, queue_survives, deaf):
        self.draws = random.Random(seed)
        self.folder, self.spool = RunFolder.create(path), spool
        self.queue_survives, self.deaf = queue_survives, deaf
        self.queue, self.wire, self.measured, self.dropped = [], [], [], 0
        self.next_position, self.next_checkpoint, self.crashes = 0, 1, 0
        self.acknowledged, self.sent = set(), Counter()
        self.campaign = Campaign(EXPERIMENT.safe_campaign, 0.01)
        self.metrics = Metrics(EXPERIMENT, self.campaign)
        self.number, self.lines, self.asks = 0, [], []
        self.before, self.known = AskedBefore(), lambda frame: False
        self.before.listening(0.0)
        self.table, self.told, self.source_says, self.predictor_says = {}, Ids(), [], []
        self.take(ModelPublished(time=0.0, version=0, validation_error=None, validation_residual=None))
        self.checkpoint()

    # The runner.

    def log(self, event):
        self.number += 1
        self.lines.append(encoded({**encode(event), "seq": self.number}))
        self.metrics.note(event)
        if type(event).__name__ not in EVERYDAY:
            self.flush()

    def flush(self):
        with open(self.folder.path / "events.jsonl", "ab") as log:
            log.write(b"".join(self.lines))
        self.lines = []

    def take(self, event):
        self.log(event)
        actions = advance(self.campaign, self.metrics, event)
        for raised in self.campaign.raised:
            self.log(raised)
        self.campaign.raised.clear()
        for action in actions:
            if isinstance(action, Steer) and not self.before.holds(action):
                self.queue += positions_of(action)
            elif isinstance(action, AskPolicy):
                self.asks.append(action)
        assert self.campaign.outstanding >= 0

    def ask(self):
        action, count = self.asks.pop(), min(LOOKAHEAD, POSITIONS - self.next_position)
        where = tuple((PLACES[self.next_position + k], 0.0) for k in range(count))
        self.next_position += count
        self.take(DecisionSuggested(time=0.0, positions=where, reasons=("",) * count, action=action.id))

    def hear(self):
        for heard in self.draws.sample([self.source_says, self.predictor_says], 2):
            while heard:
                self.take(heard.pop(0))

    def checkpoint(self):
        root, parts = checkpoints(self.folder), {}
        parts["campaign"], parts["metrics"], event = state_of(self.campaign), self.metrics.state(), self.number
        told = {"reported": {"a": self.told.ranges}, "aside": {}}
        parts["runner"] = {"unsent": [], "over": [], **told, "source_ended": False}
        parts["source"] = {"source": None, "visits": {}, "steered": self.campaign.actions.given}
        self.hear()  # what the predictor has by now, the log learns of before the checkpoint is whole
        saved = Ids()
        saved.add(self.table)
        parts["predictor"] = {"policy": POLICY, "scans": [{"scan": "a", "ids": saved.ranges}] if self.table else []}
        parts["ranks"] = None
        self.flush()
        written = {name: write_part(root, self.next_checkpoint, name, part)[0] for name, part in parts.items()}
        commit(root, Manifest(number=self.next_checkpoint, event=event, time=0.0, parts=written, files={}, bytes=0))
        self.next_checkpoint += 1

    # Beamline, source and predictor.

    def measure(self):
        for _ in range(min(len(self.queue), self.draws.randint(1, 3))):
            self.wire.append((len(self.measured), self.queue.pop(0)))
            self.measured.append(self.wire[-1][1][0])

    def receive(self):
        """Frames on the wire reach the predictor, which acknowledges them."""
        ids, where = zip(*self.wire, strict=True)
        self.wire = []
        counts = np.ones((len(ids), 8, 8), np.uint16)
        chunk = not_known(make_chunk(counts, np.array(ids), np.array(where), GEOMETRY, scan="a"), self.known)
        if self.spool:
            write_spooled(checkpoints(self.folder) / "spool", chunk)
        self.acknowledge(chunk)
        self.arrive(chunk)

    def arrive(self, chunk):
        ids = chunk["frame"].values.tolist()
        asked = self.before.came(np.stack([chunk["position_y"].values, chunk["position_x"].values], axis=1))
        self.source_says.append(ChunkArrived(time=0.0, scan="a", frame_ids=tuple(ids), asked=asked))

    def acknowledge(self, chunk):
        new = [i for i in chunk["frame"].values.tolist() if i not in self.table]
        for i, y in zip(chunk["frame"].values.tolist(), chunk["position_y"].values.tolist(), strict=True):
            self.table.setdefault(i, y)
        self.acknowledged.update(new)
        self.report(i for i in new if i not in self.told)

    def report(self, ids):
        if ids := tuple(ids):
            self.told.add(ids)
            self.predictor_says.append(PredictionReady(time=0.0, scan="a", frame_ids=ids, version=0, residual=0.1))

    def drop(self):
        """A frame is lost on its way."""
        self.wire.pop(self.draws.randrange(len(self.wire)))
        self.before.lost(1)
        self.dropped += 1
        self.source_says.append(FrameRefused(time=0.0, count=1, reason="lost"))

    # Everything is lost.

    def crash(self):
        self.crashes += 1
        logged = {i for e in self.events("ChunkArrived") for i in e["frame_ids"]}
        arrived = {y for i, y in self.table.items() if i in logged or self.spool}
        self.table = {i: y for i, y in self.table.items() if i in self.saved_ids()}
        self.told, self.lines, self.source_says, self.predictor_says = Ids(), [], [], []
        if not self.queue_survives:
            self.queue.clear()
        if self.deaf:  # it measures while nobody listens
            self.measure_all(self.draws.randint(0, len(self.queue)))
            self.wire.clear()
        self.recover()
        for _ in range(self.draws.randint(0, 3)):  # what was in hand still comes
            self.step()
        while self.queue or self.wire:
            self.measure() if self.queue else self.receive()
        self.before.listening(0.0)
        due = [where for one in self.before.due(100.0) for where in positions_of(one)]
        assert not {*arrived, *self.table.values()} & {y for y, _ in due}, "its frame has come"
        self.queue += due

    def recover(self):
        recovery = recover(self.folder, EXPERIMENT)
        self.campaign, self.metrics, self.number = recovery.campaign, recovery.metrics, recovery.last
        source, predictor = recovery.source, recovery.predictor
        for told in predictor.reported.values():
            self.told.update(told)
        for known in predictor.predicted.values():
            self.told.add(known)
        new = unlogged(source)
        assert bool(new) <= self.spool
        self.known = lambda frame: frame in new or source.knows(frame)
        self.before = AskedBefore(source.asked)
        for event in recovery.unlogged:
            self.log(event)
        late = predictor.unheard("a", np.array(list(self.table), np.int64)).tolist()
        self.report(i for i, yes in zip(self.table, late, strict=True) if yes)
        for chunk in given_again(object(), source, new, self.source_says.append):
            self.acknowledge(chunk)
            if chunk["frame"].values[0] in new:
                self.arrive(chunk)
        self.asks = [one for one in recovery.open if isinstance(one, AskPolicy)]
        self.take(GroupChanged(time=0.0, lost=(), joined=(0,), ranks=1, generation=self.crashes))

    def measure_all(self, count):
        self.measured += [y for y, _ in self.queue[:count]]
        del self.queue[:count]

    def saved_ids(self):
        part = json.loads((checkpoints(self.folder) / str(self.next_checkpoint - 1) / "predictor.json").read_text())
        return Ids.of(each for scan in part["scans"] for each in scan["ids"])

    def events(self, name):
        return [event for event in self.folder.events() if event["event"] == name]

    # All of it.

    def step(self, *more):
        able = ["flush"] if self.lines else []
        able += ["ask"] * bool(self.asks and self.next_position < POSITIONS) + ["measure"] * bool(self.queue)
        able += ["receive"] * (2 * bool(self.wire)) + ["hear"] * bool(self.source_says or self.predictor_says)
        able += more
        if able:
            getattr(self, self.draws.choice(able))()
        return bool(able)

    def run(self, crashes):
        for _ in range(crashes):
            for _ in range(self.draws.randint(1, 40)):
                self.step("checkpoint") if self.draws.random() < 0.15 else self.step()
                if self.wire and self.draws.random() < 0.05:
                    self.drop()
            self.crash()
        while self.step():
            pass
        self.flush()
        return self


WORLDS = [
    {"queue_survives": False, "deaf": False},
    {"queue_survives": True, "deaf": False},
    {"queue_survives": True, "deaf": True},
]


@pytest.mark.parametrize("world", WORLDS, ids=["all dies", "the beamline waits", "the beamline goes on"])
@pytest.mark.parametrize("spool", [False, True], ids=["", "spooled"])
@pytest.mark.parametrize("seed", range(6))
def test_after_any_number_of_recoveries_each_frame_counts_once_and_nothing_waits_for_ever(tmp_path, world, spool, seed):
    me = World(tmp_path / "run", seed, spool=spool, **world).run(crashes=seed % 4 + 1)
    assert me.campaign.outstanding == 0
    assert me.next_position == POSITIONS, "the policy was asked for all of them"
    arrived = Counter(i for e in me.events("ChunkArrived") for i in e["frame_ids"])
    predicted = Counter(i for e in me.events("PredictionReady") for i in e["frame_ids"])
    lost = Counter(i for e in me.events("FramesLost") for i in e["frame_ids"])
    assert set(arrived.values()) <= {1}
    assert set(predicted.values()) <= {1}
    assert set(lost.values()) <= {1}
    assert set(me.table) | set(lost) >= set(arrived), "each is in the image, or known as lost"
    assert not set(me.table) & set(lost)
    assert me.metrics.unreported("a") == 0
    assert (me.metrics.lost.total(), sorted(me.metrics.lost_ids)) == (lost.total(), sorted(lost))
    if spool:
        assert not lost
        assert set(me.table) == set(arrived) == me.acknowledged, "what was acknowledged is there"
    holes = set(PLACES) - {me.measured[i] for i in (*me.table, *lost)}
    assert len(holes) <= me.dropped, "no other position was forgotten"


def test_a_frame_that_is_told_lost_again_counts_once_and_none_that_is_under_way_is_passed_over():
    """As a second recovery may replay what the first one told; lost frames may have been reported before."""
    metrics = Metrics(EXPERIMENT, Campaign(EXPERIMENT.safe_campaign))

    def predicted(*ids):
        return PredictionReady(time=0.0, scan="a", frame_ids=ids, version=0, residual=0.1)

    def lost(*ids):
        return FramesLost(time=0.0, scan="a", frame_ids=ids, reason="gone")

    metrics.note(ChunkArrived(time=0.0, scan="a", frame_ids=tuple(range(10))))
    metrics.note(predicted(0, 1, 2))
    for again in (lost(1, 2, 3), lost(1, 2, 3), lost(3, 4)):
        metrics.note(again)
    assert (metrics.lost["a"], metrics.lost_ids) == (4, [1, 2, 3, 4])
    assert metrics.unreported("a") == 5
    metrics.note(predicted(5, 6, 7, 8, 9, 10))
    metrics.note(predicted(11))
    assert metrics.unreported("a") == 0
    metrics.note(ChunkArrived(time=0.0, scan="a", frame_ids=(10, 11, 12)))
    assert metrics.unreported("a") == 1, "two were reported before it was told that they arrived"
    other = Metrics(EXPERIMENT, Campaign(EXPERIMENT.safe_campaign))
    other.restore(json.loads(json.dumps(metrics.state())))
    assert (other.unreported("a"), other.lost, other.gone) == (1, metrics.lost, metrics.gone)
    other.note(lost(4, 12))
    assert (other.unreported("a"), other.lost["a"]) == (0, 5)
