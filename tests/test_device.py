"""Which device a process takes, and that no result of a collective that failed is used."""

import asyncio
import datetime
import socket
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.distributed as dist

from steering.campaign import GroupChanged
from steering.learning import group
from steering.learning.buffer import RehearsalBuffer
from steering.learning.channel import Channel, Messages
from steering.learning.clock import Clock
from steering.learning.exchange import Flight
from steering.learning.group import GroupLost, backend, is_of_group, settle
from steering.learning.loop import Loop
from steering.learning.rows import on_device
from steering.learning.staging import Staging
from steering.learning.strategies import STRATEGIES
from steering.learning.tally import Tally
from steering.ptychography.device import find_device, place_in_words
from steering.runner import devices
from steering.runner.devices import devices_in_words
from steering.runner.optional import Optional
from tests.test_strategies import SMALL, classification, give


@pytest.fixture
def gpus(monkeypatch):
    """Let torch see that many GPUs."""
    return lambda count: monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_auto_takes_a_gpu_where_there_is_one(gpus):
    gpus(0)
    assert find_device() == torch.device("cpu")
    gpus(2)
    assert find_device() == torch.device("cuda", 0)
    assert find_device("cuda:1") == torch.device("cuda", 1)


def test_ranks_of_a_host_share_out_its_gpus_and_the_predictor_takes_the_last(gpus):
    gpus(4)
    assert [find_device("cuda", local_rank=k).index for k in (0, 1, 2, 5, -1)] == [0, 1, 2, 1, 3]


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_without_a_gpu_cuda_is_refused(gpus, device):
    gpus(0)
    with pytest.raises(ValueError, match=r"found 0 GPU\(s\) that torch sees, expected one"):
        find_device(device)


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cpu:0"])
def test_another_name_is_refused(gpus, device):
    gpus(1)
    with pytest.raises(ValueError, match="expected auto, cpu, cuda, or cuda:NUMBER"):
        find_device(device)


def test_a_gpu_that_is_left_unused_is_said(gpus, caplog):
    gpus(1)
    find_device("cpu")
    assert "leaves unused" in caplog.text


def test_where_is_computed_is_said_with_the_gpu_as_its_host_counts_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    host = socket.gethostname()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert place_in_words(torch.device("cpu")) == f"cpu ({host})"
    assert place_in_words(torch.device("cuda", 1)) == f"NVIDIA H200 (GPU 5 of {host})"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert place_in_words(torch.device("cuda", 1)) == f"NVIDIA H200 (GPU 1 of {host})"
    assert devices_in_words(["cpu (a)", "cpu (b)"], "cpu (c)") == "2 ranks: cpu (a), cpu (b); predictor: cpu (c)"
    many = ["NVIDIA H200 (GPU 0 of a)"] * 7 + ["cpu (b)"]
    assert devices_in_words(many, "cpu (c)") == "8 ranks: 7 on NVIDIA H200, 1 on cpu; predictor: cpu (c)"


class Computing:
    """Ranks and a predictor that say where they compute."""

    def __init__(self):
        self.ranks = self.proxy = self
        self.generation, self.number, self.changing = 0, 0, True

    async def send(self, work, generation):
        if self.changing:
            self.changing = False
            return GroupChanged(time=0.0, lost=(), joined=(), ranks=1, generation=generation)
        return await work([self])

    async def computes_on(self):
        return f"cpu (node{self.generation})"

    async def ask(self, method, each):
        return {"device": "cpu (other)"}


def test_where_is_computed_is_logged_again_when_others_compute(monkeypatch):
    """And asked again where the group changed meanwhile; once where nothing has."""
    monkeypatch.setattr(devices, "LOOK_S", 0.0)
    found, actors = [], Computing()

    async def enough():
        async with asyncio.TaskGroup() as group:
            saying = group.create_task(devices.say_devices(actors, Optional(found.append), found.append))
            for generation in (0, 1):
                actors.generation = generation
                for _ in range(50):
                    await asyncio.sleep(0)
            saying.cancel()

    asyncio.run(enough())
    assert [(one.ranks, one.predictor) for one in found] == [
        (("cpu (node0)",), "cpu (other)"),
        (("cpu (node1)",), "cpu (other)"),
    ]


@pytest.mark.parametrize(
    "workflow", sorted((Path(__file__).parents[1] / "workflows").glob("*.py")), ids=lambda path: path.stem
)
def test_every_workflow_that_computes_is_told_where(workflow):
    """The two that are not read files and serve frames; they leave GPUs alone."""
    text = workflow.read_text()
    told = "    add_device(" in text or "    add_options(" in text  # the latter: of a benchmark with faults
    assert told != (workflow.stem in ("fuzz_readers", "serve_simulated"))


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        (["cpu", "cpu"], "gloo"),
        (["cuda A ", "cuda B "], "cpu:gloo,cuda:nccl"),
        (["cuda A ", "cuda A "], "gloo"),
        (["cuda A host-0", "cuda A host-1"], "cpu:gloo,cuda:nccl"),
        (["cuda A ", "cpu"], "gloo"),
    ],
)
def test_ranks_speak_nccl_only_where_each_has_a_gpu_of_its_own(devices, expected):
    assert backend(devices) == expected


class Event:
    """Is done after some questions."""

    def __init__(self, questions):
        self.left = questions

    def query(self):
        self.left -= 1
        return self.left < 0


class Collective:
    """A backend whose collective fails after some questions, and then looks done, as an aborted one of NCCL does."""

    def __init__(self, event, questions):
        self.event, self.left = event, questions

    def get_error(self):
        self.left -= 1
        if self.left < 0:
            self.event.left = 0
        return SimpleNamespace(name="REMOTE_ERROR" if self.left < 0 else "SUCCESS")


def test_what_is_queued_is_waited_for():
    event = Event(5)
    settle(event, [Collective(event, 100)], deadline=60, pause=0)
    assert event.left < 0


@pytest.mark.parametrize("fails_after", [0, 3])
def test_a_collective_that_failed_is_no_result_although_it_looks_done(fails_after):
    event = Event(5)
    with pytest.raises(dist.DistBackendError, match="REMOTE_ERROR") as raised:
        settle(event, [Collective(event, fails_after)], deadline=60, pause=0)
    assert is_of_group(raised.value)


def test_what_never_ends_is_given_up_at_the_deadline():
    event = Event(10**9)
    with pytest.raises(dist.DistBackendError, match="not done after 0 s"):
        settle(event, [], deadline=0, pause=0)


class Aborted(Collective):
    """A backend of a group that was given up: it has no error of its own, and what it had under way looks done."""

    def __init__(self, event):
        super().__init__(event, 10**9)
        self.by = []

    def _group_start(self):
        self.by.append("start")

    def _group_end(self):
        self.by.append("end")

    def abort(self):
        self.by.append(threading.current_thread().name)
        self.event.left = 0


def test_a_rank_that_waits_for_a_frozen_one_is_freed_from_another_thread(monkeypatch):
    event = Event(10**9)
    frozen = Aborted(event)
    monkeypatch.setattr(group, "NCCL", [frozen])
    elsewhere = threading.Timer(0.05, group.abandon)
    elsewhere.start()
    try:
        with pytest.raises(dist.DistBackendError, match="given up") as raised:
            settle(event, [frozen], deadline=60)
    finally:
        group.leave()
    assert is_of_group(raised.value)
    elsewhere.join()
    for thread in threading.enumerate():
        if thread.name == "abort NCCL":
            thread.join()
    assert frozen.by == ["start", "abort NCCL", "end"]
    settle(Event(0), [], deadline=60)  # the next group is not given up


def ready(kind="er"):
    """A loop that has taken some steps, and what is to be loaded in the next."""
    objective, network, samples = classification()
    loop = Loop(network, STRATEGIES[kind](objective), SMALL)
    loop.connect(None)
    loop.prepare({name: value[0] for name, value in samples(1).items()})

    def load(n, out):
        give(samples(n, seed=loop.steps), out)

    loop.run(5, load)
    return loop, load


def weights_of(loop):
    return torch.cat([p.detach().flatten() for p in loop.network.parameters()])


def holds_after(loop, load, error):
    """That a step which fails raises GroupLost and leaves weights, buffer and step as they were."""
    before, stored = weights_of(loop).clone(), loop.buffer.seen
    with pytest.raises(GroupLost, match=error):
        loop.run(1, load)
    assert torch.equal(weights_of(loop), before)
    assert (loop.buffer.seen, loop.steps) == (stored, 5)


def test_no_gradient_of_a_collective_that_failed_reaches_the_weights(monkeypatch):
    loop, load = ready()
    event = Event(3)
    failed = Collective(event, 2)
    failed.options = SimpleNamespace(_timeout=datetime.timedelta(seconds=60))
    loop.nccl = [failed]
    monkeypatch.setattr("steering.learning.loop.queued_so_far", lambda device: event)
    holds_after(loop, load, "REMOTE_ERROR")


class FailedWork:
    """An exchange whose other end is gone."""

    def wait(self):
        raise dist.DistBackendError("found a peer that has closed its connection")


def test_an_exchange_whose_wait_fails_changes_nothing():
    loop, load = ready()
    exchange = loop.rehearsal.exchange
    nothing = torch.zeros(0, dtype=torch.uint8)
    broken = Messages(nothing, nothing, [0], [0], 40, None, _work=FailedWork())
    exchange.channel, exchange.flights[0] = Channel(None), Flight(5, np.zeros(0, np.int64), [0], None, broken)
    holds_after(loop, load, "closed its connection")


def test_what_is_staged_on_its_way_to_a_gpu_trains_and_is_stored_as_what_is_loaded_there():
    (plain, load), (staged, load_staged) = (ready("derpp") for _ in range(2))
    loaded = {name: (tuple(value.shape[1:]), value.dtype) for name, value in classification()[2](1).items()}
    staged.staging = Staging(loaded, SMALL.batch, torch.device("cpu"))
    assert plain.run(9, load).losses == staged.run(9, load_staged).losses
    assert torch.equal(weights_of(plain), weights_of(staged))
    stored = [loop.buffer.state().packed().tensors for loop in (plain, staged)]
    assert all(torch.equal(stored[0][name], stored[1][name]) for name in stored[0])


def test_staged_rows_stay_until_the_one_after_next():
    staging = Staging({"x": ((2,), torch.uint16)}, 4, torch.device("cpu"))
    out, kept = {"x": torch.zeros(6, 2, dtype=torch.uint16)}, []
    for number in (1, 2, 3):
        kept.append(staging.fill(lambda n, rows, number=number: rows["x"].fill_(number), 3, out))
        assert out["x"].int().sum(1).tolist() == [2 * number] * 3 + [0] * 3
    assert [int(rows["x"][0, 0]) for rows in kept] == [3, 2, 3]


class Moment:
    """An event of a GPU that is ten times as far as the one before."""

    made: ClassVar = []

    def __init__(self):
        self.made.append(self)
        self.at, self.reached = 10.0 ** len(self.made), False

    def synchronize(self):
        for each in self.made:
            each.reached = each.at <= self.at or each.reached

    def elapsed_time(self, other):
        assert self.reached
        assert other.reached
        return other.at - self.at


def test_parts_of_a_step_are_timed_by_the_gpu_and_read_when_it_has_come_there(monkeypatch):
    monkeypatch.setattr(Moment, "made", [])
    tally = Tally(clock=Clock(torch.device("cpu"), mark=Moment))
    tally.clock.start()
    for part in ("load", "wait", "train", "load", "wait"):
        tally.lap(part)
    assert not tally.seconds
    tally.settle()
    tally.settle()
    assert dict(tally.seconds) == pytest.approx({"load": 0.09 + 90, "wait": 0.9 + 900, "train": 9.0})
    assert tally.waits == pytest.approx([0.9, 900])


def test_a_buffer_on_the_host_leaves_the_gpus_of_its_machine_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    pinned = []
    monkeypatch.setattr(torch, "empty", lambda *sizes, pin_memory=False, **named: pinned.append(pin_memory))
    buffer = RehearsalBuffer(10_000)
    buffer.insert({"x": torch.zeros(4, 5)}, torch.zeros(4, dtype=torch.int64))
    assert buffer.nbytes <= buffer.budget_bytes
    assert pinned == []


def test_losses_are_read_when_a_round_is_over():
    tally = Tally()
    for value in (1.0, 3.0):
        tally.add(torch.tensor(value))
    assert tally.losses == []
    tally.settle()
    tally.settle()
    assert (tally.losses, tally.loss) == ([1.0, 3.0], 2.0)


def test_a_read_only_plan_reaches_a_device():
    plan = np.arange(5)
    plan.flags.writeable = False
    assert on_device(plan, torch.device("cpu")).tolist() == plan.tolist()
