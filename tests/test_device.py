"""Which device a process takes, and that no result of a collective that failed is used."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from steering.learning.group import backend, is_of_group, settle
from steering.learning.loop import Tally
from steering.learning.rows import on_device
from steering.ptychography.device import find_device, free_local_rank, local_ranks


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


def test_processes_are_numbered_on_each_host_by_themselves():
    assert local_ranks(["a", "b", "a", "a", "b"]) == [0, 0, 1, 2, 1]
    assert [free_local_rank(taken) for taken in ([], [0, 1], [0, 2], [1])] == [0, 2, 1, 0]


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
