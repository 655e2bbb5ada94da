"""A policy steers a bluesky plan: a real RunEngine, bluesky-adaptive's own loop, real frames and predictions."""

import time

import numpy as np
import pytest
import torch

from steering.inference import LiveImage
from steering.models import ProbeFirst
from steering.policies import BlueskyAgent, SpaceFilling
from steering.ptychography import Canvas, far_field_residual, patch_weight, zone_plate
from steering.records import Decision, positions_px
from steering.sources import SimulatedBeamline, Stage, sample

WINDOW, PATCH = 32, 16


class Stage2D:
    """A beamline behind bluesky's protocols: two stage axes, and what the network says of the frame at their place."""

    def __init__(self, source):
        self.source, self.position, self.frames = source, {}, 0
        self.chunks = source.chunks()
        self.network = ProbeFirst(window=WINDOW, patch=PATCH, width=4)
        self.network.optics.set(source.probe)
        canvas = Canvas.around(source.field.scaled(1 / source.geometry.object_pixel), WINDOW)
        self.live = LiveImage("scan", canvas, patch_weight(source.probe, PATCH), source.geometry)

    def measure(self):
        """A frame where the stage stands, predicted and stitched; its residual."""
        where = (self.position["stage_y"], self.position["stage_x"])
        self.source.apply(Decision(positions=np.array([where]), reasons=("the plan",)))
        chunk = next(self.chunks)
        with torch.inference_mode():
            amplitude, phase = self.network(torch.from_numpy(chunk["counts"].values.astype(np.float32)))
        patches = torch.polar(amplitude, phase).numpy()
        self.live.stitch(patches, positions_px(chunk))
        self.frames += 1
        return float(far_field_residual(patches, chunk["counts"].values, self.source.probe)[0])


@pytest.fixture
def beamline():
    rng = np.random.default_rng(0)
    thing = sample(rng.random((64, 64)), phase=1.0, absorption=0.1)
    probe = zone_plate(WINDOW, 25.0, counts=1e4)
    source = SimulatedBeamline(
        [Stage("scan", thing, frames=10**6)], probe=probe, step=8.0, frame_rate=1e4, chunk_frames=1
    )
    return Stage2D(source)


def agent_of(beamline, policy, **more):
    pixel = beamline.source.geometry.object_pixel
    return BlueskyAgent(policy, live=beamline.live.view, object_pixel=pixel, **more)


def test_a_policy_steers_a_bluesky_plan_to_its_end(beamline):
    """bluesky-adaptive's optimize plan, until the policy stops: every candidate is measured once, in groups of 4."""
    plans = pytest.importorskip("bluesky_adaptive.plans", reason="bluesky-adaptive is not installed: the bluesky extra")
    from bluesky import RunEngine
    from bluesky_adaptive.protocols import OptimizationProblem, Optimizer, SupportsStoppingCriteria, TrialFaultAware

    axes, detector = devices(beamline)
    documents = []
    engine = RunEngine()
    engine.subscribe(lambda name, document: documents.append((name, document)))
    policy = SpaceFilling(beamline.source.candidates)
    agent = agent_of(beamline, policy)
    assert isinstance(agent, Optimizer)
    assert isinstance(agent, SupportsStoppingCriteria)
    assert isinstance(agent, TrialFaultAware)
    measured = []

    def outcomes(uid, suggestions):
        """By bluesky's own documents: the plan may have put the points into another order to save travel."""
        start = next(d for n, d in documents if n == "start" and d["uid"] == uid)
        descriptors = {d["uid"] for n, d in documents if n == "descriptor" and d["run_start"] == uid}
        events = [d["data"] for n, d in documents if n == "event" and d["descriptor"] in descriptors]
        assert len(events) == len(suggestions)
        measured.extend((event["stage_y"], event["stage_x"]) for event in events)
        order = start["blop_acquisition_order"]
        return [{"_id": i, "residual": event["residual"]} for i, event in zip(order, events, strict=True)]

    problem = OptimizationProblem(agent, axes, [detector], outcomes)
    engine(plans.optimize(problem, iterations=None, n_points=4))
    wanted = beamline.source.candidates
    assert beamline.frames == len(measured) == len(wanted)
    np.testing.assert_allclose(sorted(measured), sorted(map(tuple, wanted.tolist())))
    assert agent.should_stop()[0]
    assert (beamline.live.view()["weight"].values > 0).any()


class Done:
    """bluesky's status of something that is over at once."""

    done = success = True

    def add_callback(self, callback):
        callback(self)

    def exception(self, timeout=0.0):
        return None


class Signal:
    """What bluesky can read."""

    parent = None

    def __init__(self, name):
        self.name = name
        self.hints = {"fields": [name]}

    def describe(self):
        return {self.name: {"source": f"SIM:{self.name}", "dtype": "number", "shape": []}}

    def describe_configuration(self):
        return {}

    def read_configuration(self):
        return {}

    def read(self):
        return {self.name: {"value": self.value(), "timestamp": time.time()}}


class Axis(Signal):
    """One axis of the stage."""

    def __init__(self, name, beamline):
        super().__init__(name)
        self.beamline = beamline

    def set(self, value):
        self.beamline.position[self.name] = value
        return Done()

    def value(self):
        return self.beamline.position.get(self.name, 0.0)

    @property
    def position(self):
        return self.value()


class Detector(Signal):
    """A detector whose reading is what the network says of the frame."""

    def __init__(self, name, beamline):
        super().__init__(name)
        self.beamline, self.last = beamline, 0.0

    def trigger(self):
        self.last = self.beamline.measure()
        return Done()

    def value(self):
        return self.last


def devices(beamline):
    return [Axis("stage_y", beamline), Axis("stage_x", beamline)], Detector("residual", beamline)


class Recorder:
    """A policy of three positions that keeps what it is told."""

    def __init__(self):
        self.told, self.asked = [], 0

    def ingest(self, prediction, live):
        self.told.append((prediction, live))

    def suggest(self, n):
        self.asked += 1
        last = self.asked == 2
        return Decision(
            positions=np.array([[1.0, 2.0], [3.0, 4.0]][: 1 if last else 2]) * self.asked,
            reasons=("here",) * (1 if last else 2),
            dwell=np.array([0.5, 0.25][: 1 if last else 2]),
            stop=last,
        )


def test_ids_are_unique_and_outcomes_find_their_positions_in_any_order():
    policy = Recorder()
    agent = BlueskyAgent(policy, live=lambda: "live", object_pixel=0.5, exposure="shutter")
    first = agent.suggest(2)
    assert first == [
        {"_id": 0, "stage_y": 1.0, "stage_x": 2.0, "reason": "here", "shutter": 0.5},
        {"_id": 1, "stage_y": 3.0, "stage_x": 4.0, "reason": "here", "shutter": 0.25},
    ]
    patch = np.full((2, 2), 0.5)
    agent.ingest([{"_id": 1, "residual": 0.1}, {"_id": 0, "residual": 0.2}])
    prediction, live = policy.told[0]
    assert live == "live"
    assert prediction.frame_id.tolist() == [1, 0]
    assert prediction.position.tolist() == [[6.0, 8.0], [2.0, 4.0]]  # object pixels
    np.testing.assert_allclose(prediction.residual, [0.1, 0.2])
    assert not agent.should_stop()[0]
    (second,) = agent.suggest(2)
    assert second["_id"] == 2
    assert not agent.should_stop()[0]  # the last position is not measured yet
    agent.ingest([{"_id": 2, "residual": 0.1, "amplitude": patch, "phase": patch, "offset": 0.3, "model_version": 4}])
    prediction, _ = policy.told[1]
    assert prediction.patches.shape == (1, 2, 2)
    assert prediction.model_version.tolist() == [4]
    assert agent.should_stop() == (True, "here")
    assert agent.suggest(3) == []
    assert policy.asked == 2


def test_points_from_elsewhere_and_failures():
    policy = Recorder()
    agent = BlueskyAgent(policy, live=lambda: None, object_pixel=1.0)
    agent.ingest([{"stage_y": 7.0, "stage_x": 8.0, "residual": 0.5}])
    assert policy.told[0][0].position.tolist() == [[7.0, 8.0]]
    agent.ingest([])
    assert len(policy.told) == 1
    agent.suggest(2)
    agent.register_failures(agent.suggest(2))
    assert not agent.should_stop()[0]
    with pytest.raises(ValueError, match="expected `residual`"):
        agent.ingest([{"_id": 1}])
    with pytest.raises(ValueError, match="was not suggested"):
        agent.ingest([{"_id": 99, "residual": 0.5}])
