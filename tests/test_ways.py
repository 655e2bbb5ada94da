"""The ways in which a training step is computed: the fastest is taken, by all ranks, and changes no result."""

import copy

import pytest
import torch

from steering.learning import Loop, TrainerSettings, loop
from steering.learning.group import Place, leave
from steering.learning.strategies import STRATEGIES
from steering.learning.ways import PLAIN, Way, fastest, possible
from tests.ranks import on_ranks
from tests.test_strategies import classification, give, reconstruction

LAST, FUSED, BOTH = Way("channels_last"), Way(fused=True), Way("channels_last", fused=True)
SETTINGS = TrainerSettings(batch=3, candidates=2, representatives=4, buffer_bytes=2**14, device="cpu")


def model():
    network = classification()[1]
    return network, torch.optim.AdamW(network.parameters(), 1e-3)


def way_of(network, optimiser):
    weights = [p for p in network.parameters() if p.ndim == 4 and p.shape[2] > 1]
    last = all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    return Way("channels_last" if last else "", fused=bool(optimiser.param_groups[0]["fused"]))


class Clock:
    """Steps cost what is said of their way."""

    def __init__(self, costs, losses=()):
        self.now, self.costs, self.losses = 0.0, costs, dict(losses)

    def step(self, network, optimiser):
        way = way_of(network, optimiser)
        self.now += self.costs[way]
        if isinstance(self.losses.get(way), Exception):
            raise self.losses[way]
        return torch.tensor(self.losses.get(way, 1.0))

    def __call__(self):
        return self.now


@pytest.mark.parametrize("best", [PLAIN, LAST, FUSED, BOTH], ids=str)
def test_the_fastest_way_is_taken_and_the_network_left_alone(best):
    network, optimiser = model()
    before = copy.deepcopy(network.state_dict())
    clock = Clock({way: 1.0 if way == best else 2.0 for way in (PLAIN, LAST, FUSED, BOTH)})
    assert fastest([PLAIN, LAST, FUSED, BOTH], network, optimiser, clock.step, clock) == best
    assert way_of(network, optimiser) == PLAIN
    assert not optimiser.state
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("found", [RuntimeError("no such kernel\nfor this"), 1.05, float("nan")], ids=str)
def test_a_way_that_fails_or_comes_to_another_loss_is_not_taken(found, caplog):
    caplog.set_level("INFO")
    clock = Clock({PLAIN: 2.0, LAST: 1.0}, {LAST: found})
    assert fastest([PLAIN, LAST], *model(), clock.step, clock) == PLAIN
    assert "training is not channels_last" in caplog.text
    with pytest.raises(RuntimeError, match="no such kernel"):
        fastest([PLAIN], *model(), Clock({PLAIN: 1.0}, {PLAIN: RuntimeError("no such kernel")}).step)


def test_which_ways_there_are():
    network, optimiser = model()
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert possible(cpu, network, optimiser, compiled=False) == [PLAIN]
    assert possible(cpu, network, optimiser, compiled=True) == [PLAIN, Way(compiled=True)]
    assert possible(gpu, network, optimiser, compiled=False) == [PLAIN, FUSED, LAST, BOTH]
    assert len(possible(gpu, network, optimiser, compiled=True)) == 8
    without = torch.optim.LBFGS(network.parameters())  # has no fused kernel
    assert possible(gpu, network, without, compiled=False) == [PLAIN, LAST]
    ours = reconstruction()[1]  # is made in channels_last
    assert Way("contiguous") in possible(gpu, ours, torch.optim.SGD(ours.parameters()), compiled=False)


def trained(way, monkeypatch, steps=6):
    """A loop that found this way the fastest, after some steps; with what it was made with."""
    monkeypatch.setattr(loop, "possible", lambda *_, **__: [PLAIN, way])
    monkeypatch.setattr(loop, "fastest", lambda ways, *_: ways[-1])
    objective, network, samples = classification()
    made = Loop(network, STRATEGIES["derpp"](objective), SETTINGS)
    made.connect(None)
    made.prepare({name: value[0] for name, value in samples(1).items()})
    made.run(steps, lambda n, out: give(samples(n, seed=made.steps), out))
    return made


@pytest.mark.parametrize("way", [LAST, FUSED, BOTH], ids=str)
def test_a_way_changes_how_a_loop_computes_and_not_what(way, monkeypatch):
    plain, other = trained(PLAIN, monkeypatch), trained(way, monkeypatch)
    assert way_of(other.network, other.optimiser) == other.way == way
    for one, two in zip(plain.network.parameters(), other.network.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)
    assert plain.buffer.fills == other.buffer.fills
    for parameter, state in other.optimiser.state.items():
        assert state["exp_avg"].stride() == parameter.stride()
        assert float(state["step"]) == 6


def test_a_real_measurement_leaves_training_as_it_is(monkeypatch):
    """By true steps of true copies: whichever way is found the fastest."""
    monkeypatch.setattr(loop, "possible", lambda *_, **__: [PLAIN, LAST, FUSED, BOTH])
    objective, network, samples = classification()
    before = copy.deepcopy(network.state_dict())
    made = Loop(network, STRATEGIES["er"](objective), SETTINGS)
    made.connect(None)
    made.prepare({name: value[0] for name, value in samples(1).items()})
    assert made.way in (PLAIN, LAST, FUSED, BOTH)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not made.optimiser.state
    assert len(made.buffer) == 0
    assert made.run(2, lambda n, out: give(samples(n, seed=made.steps), out)).loss > 0


def take_the_same(rank, ranks, where):
    """Two ranks choose, of which each found another way the fastest; then the last one is replaced by a new one."""
    loop.possible = lambda *_, **__: [PLAIN, BOTH]
    loop.fastest = lambda ways, *_: ways[1 - rank]
    objective, network, samples = classification()
    found = []
    for generation in range(2):
        if generation and rank == ranks - 1:
            objective, network, samples = classification()
        if not generation or rank == ranks - 1:
            made = Loop(network, STRATEGIES["er"](objective), SETTINGS, rank=rank)
        made.connect(Place(rank=rank, ranks=ranks, where=where, deadline=30).join(generation, device="cpu"))
        if not generation:
            assert made.way is None
        made.prepare({name: value[0] for name, value in samples(1).items()})
        made.run(3, lambda n, out, made=made, samples=samples: give(samples(n, seed=made.steps), out))
        found.append((str(made.way), str(way_of(made.network, made.optimiser)), made.digest()))
        made.disconnect()
        leave()
    return found


@pytest.mark.slow
def test_all_ranks_go_the_way_of_the_first_and_so_does_one_that_joins_later():
    one, two = on_ranks(2, take_the_same)
    assert one == two
    assert [way for way, _, _ in one] == [how for _, how, _ in one] == [str(BOTH)] * 2
