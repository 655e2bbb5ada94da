"""The laws of rehearsal where samples, minibatches and networks are on a GPU, and the exchange speaks NCCL.

Several ranks share the one GPU that a test machine has. NCCL refuses that, unless each rank claims to be a host of its
own (NCCL_HOSTID) and they speak over the loopback interface: slow, but the same code path as on many machines.
"""

import os
import time

import numpy as np
import pytest
import torch

from steering.learning import Loop, Place, TrainerSettings
from steering.learning.buffer import RehearsalBuffer
from steering.learning.exchange import Exchange
from steering.learning.group import leave
from steering.learning.strategies import STRATEGIES
from tests.ranks import on_ranks
from tests.test_exchange import RANKS, B, R, improbable, stream, uneven
from tests.test_strategies import classification, give

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and torch sees none here"),
]
GPU = torch.device("cuda", 0)
STORAGES = ["cpu", "cuda"]  # the host's memory, or the GPU's own


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int64, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("width", [1, 3, 3000])
def test_every_dtype_survives_bit_for_bit(storage, dtype, width):
    torch.manual_seed(0)
    content = torch.randint(0, 256, (40, width * dtype.itemsize), dtype=torch.uint8)
    buffer = RehearsalBuffer(30 * (width * dtype.itemsize + 8 + 56), device=storage)
    ids = torch.arange(40)
    for part in (slice(0, 25), slice(25, 40)):
        buffer.insert({"x": content[part].to(GPU).view(dtype), "id": ids[part].to(GPU)}, ids[part] % 3)
    assert buffer.nbytes <= buffer.budget_bytes
    out = {
        "x": torch.zeros(32, width, dtype=dtype, device=GPU),
        "id": torch.zeros(32, dtype=torch.int64, device=GPU),
    }
    buffer.gather(torch.randperm(30).numpy(), out, 2)
    found = {name: tensor.cpu() for name, tensor in out.items()}
    assert torch.equal(found["x"][2:].view(torch.uint8), content[found["id"][2:]])
    assert not found["x"][:2].view(torch.uint8).any()


@pytest.mark.parametrize("storage", STORAGES)
def test_a_state_of_one_device_is_restored_on_another(storage):
    buffer = RehearsalBuffer(10_000, device=storage)
    buffer.insert({"x": torch.arange(50, device=GPU)}, torch.arange(50) % 3)
    other = RehearsalBuffer(10_000, device="cpu" if storage == "cuda" else "cuda")
    other.load(buffer.state())
    assert torch.equal(other.state().read("x", np.arange(50)).cpu(), torch.arange(50))
    assert other.fills == buffer.fills


def as_hosts(rank):
    """Let several ranks of one GPU pass for ranks of as many machines."""
    os.environ.update(NCCL_HOSTID=f"host-{rank}", NCCL_SOCKET_IFNAME="lo", NCCL_IB_DISABLE="1")


def laws(rank, ranks, where):
    """What the exchange does between ranks whose samples travel from GPU to GPU."""
    as_hosts(rank)
    place = Place(rank=rank, ranks=ranks, where=where, deadline=60.0)
    group = place.join(device=GPU)
    found = {}
    for storage in STORAGES:
        there = {"device": GPU, "storage": storage}
        assert Exchange(RehearsalBuffer(1000, device=storage), group, 1, device=GPU).channel.device == GPU
        found[storage] = {
            "uneven": uneven(rank, group, **there),
            "uniform": stream(rank, group, "uniform", 1, "reservoir", **there),
            "seen, three ahead": stream(rank, group, "seen", 3, "replacement", **there),
        }
    leave()
    return found


@pytest.fixture(scope="module")
def reports():
    """What every rank saw, by rank; starting the processes once serves all tests."""
    return on_ranks(RANKS, laws)


@pytest.mark.parametrize("storage", STORAGES)
def test_over_nccl_ranks_draw_from_all_buffers_equally_and_bit_for_bit(reports, storage):
    for report in reports:
        assert report[storage]["uneven"]["good"]
        assert improbable(report[storage]["uneven"]["hits"], 500 * R / 110) > 1e-3
    assert reports[2][storage]["uneven"]["remote"] == 500 * R


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", ["uniform", "seen, three ahead"])
def test_over_nccl_a_stream_is_rehearsed_without_gaps(reports, storage, name):
    for report in reports:
        said = report[storage][name]
        assert said["good"]
        assert set(said["counts"][said["counts"].index(R) :]) == {R}
        assert said["known"] == [40] * RANKS


def trained(rank, ranks, where, own_gpu, storage):
    """Every strategy in turn; weights, losses, what was delivered, and what the group spoke."""
    if own_gpu:
        as_hosts(rank)
    found = {}
    for generation, (name, kind) in enumerate(STRATEGIES.items()):
        objective, network, samples = classification()
        settings = TrainerSettings(
            batch=3, candidates=2, representatives=4, buffer_bytes=2**14, device="cuda", buffer_device=storage
        )
        loop = Loop(network, kind(objective), settings, rank=rank)
        group = Place(rank=rank, ranks=ranks, where=where, deadline=60.0).join(generation, device=loop.device)
        spoken = str(torch.distributed.get_backend_config(group))
        loop.connect(group)
        loop.prepare({key: value[0] for key, value in samples(1).items()})
        tally = loop.run(
            20, lambda n, out, loop=loop, samples=samples: give(samples(n, ranks * loop.steps + rank), out)
        )
        weights = torch.cat([p.detach().flatten() for p in network.parameters()]).cpu().numpy()
        found[name] = weights, tally.losses, tally.remote, spoken
        loop.disconnect()
        leave()
    return found


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("own_gpu", [True, False], ids=["nccl", "gloo: ranks share a GPU"])
def test_ranks_stay_alike_whatever_the_strategy(own_gpu, storage):
    one, two = on_ranks(2, trained, own_gpu, storage)
    for name, kind in STRATEGIES.items():
        assert ("nccl" in one[name][3]) == own_gpu
        np.testing.assert_array_equal(one[name][0], two[name][0])
        assert np.isfinite(one[name][1] + two[name][1]).all()
        assert (one[name][2] > 0) == kind.rehearses


def overlapping(rank, ranks, where, storage):
    """Exchanges launched before a second of matrix products on the training stream; which were over before those."""
    as_hosts(rank)
    group = Place(rank=rank, ranks=ranks, where=where, deadline=60.0).join(device=GPU)
    buffer = RehearsalBuffer(2**26, device=storage)
    size = 4096
    buffer.insert({"x": torch.full((256, size), float(rank), device=GPU)}, torch.zeros(256, dtype=torch.int64))
    exchange = Exchange(buffer, group, R, device=GPU)
    out = {"x": torch.full((B + R, size), -1.0, device=GPU)}
    for step in range(3):
        exchange.start(step)
        exchange.finish(out, B)
    left = torch.randn(4096, 4096, device=GPU)
    first, hidden, launch_s = True, 0, []
    for step in range(3, 8):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        exchange.start(step)
        launch_s.append(time.perf_counter() - begun)
        before, trained = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        product = left
        for _ in range(100):
            product = torch.nn.functional.normalize(product @ left)
        trained.record()
        while not exchange.flights[-1].messages.arrived.query() and not trained.query():
            time.sleep(1e-4)
        hidden += not trained.query()
        delivered = exchange.finish(out, B)
        first = first and delivered.count == R and bool((out["x"][B:] >= 0).all())
        trained.synchronize()
        assert before.elapsed_time(trained) > 0
    leave()
    return {"hidden": hidden, "whole": first, "launch_s": launch_s}


@pytest.mark.parametrize("storage", STORAGES)
def test_the_exchange_is_over_while_the_training_stream_still_computes(storage):
    for report in on_ranks(2, overlapping, storage):
        assert report["whole"]
        assert report["hidden"] >= 3  # of 5: another's process may hold the GPU for a while
