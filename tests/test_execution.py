"""How a training step is computed: the fastest is taken, by all ranks, and changes no result."""

import copy

import pytest
import torch

from steering.learning import Loop, TrainerSettings, loop
from steering.learning.execution import PLAIN, Execution, fastest, possible
from steering.learning.group import Place, leave
from steering.learning.strategies import STRATEGIES
from tests.ranks import on_ranks
from tests.test_strategies import classification, give, reconstruction

LAST, FUSED, BOTH = Execution("channels_last"), Execution(fused=True), Execution("channels_last", fused=True)
SETTINGS = TrainerSettings(batch=3, candidates=2, representatives=4, buffer_bytes=2**14, device="cpu")


def model():
    network = classification()[1]
    return network, torch.optim.AdamW(network.parameters(), 1e-3)


def execution_of(network, optimiser):
    weights = [p for p in network.parameters() if p.ndim == 4 and p.shape[2] > 1]
    last = all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    return Execution("channels_last" if last else "", fused=bool(optimiser.param_groups[0]["fused"]))


class Clock:
    """Steps cost what is said of their execution."""

    def __init__(self, costs, losses=()):
        self.now, self.costs, self.losses = 0.0, costs, dict(losses)

    def step(self, network, optimiser):
        execution = execution_of(network, optimiser)
        self.now += self.costs[execution]
        if isinstance(self.losses.get(execution), Exception):
            raise self.losses[execution]
        return torch.tensor(self.losses.get(execution, 1.0))

    def __call__(self):
        return self.now


@pytest.mark.parametrize("best", [PLAIN, LAST, FUSED, BOTH], ids=str)
def test_the_fastest_execution_is_taken_and_the_network_left_alone(best):
    network, optimiser = model()
    before = copy.deepcopy(network.state_dict())
    clock = Clock({execution: 1.0 if execution == best else 2.0 for execution in (PLAIN, LAST, FUSED, BOTH)})
    assert fastest([PLAIN, LAST, FUSED, BOTH], network, optimiser, clock.step, clock) == best
    assert execution_of(network, optimiser) == PLAIN
    assert not optimiser.state
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_where_the_plain_loss_is_not_finite_nothing_else_is_taken():
    network, optimiser = model()
    clock = Clock(dict.fromkeys((PLAIN, LAST), 1.0), {PLAIN: float("nan"), LAST: float("nan")})
    assert fastest([PLAIN, LAST], network, optimiser, clock.step, clock) == PLAIN


@pytest.mark.parametrize("found", [RuntimeError("no such kernel\nfor this"), 1.05, float("nan")], ids=str)
def test_a_execution_that_fails_or_comes_to_another_loss_is_not_taken(found, caplog):
    caplog.set_level("INFO")
    clock = Clock({PLAIN: 2.0, LAST: 1.0}, {LAST: found})
    assert fastest([PLAIN, LAST], *model(), clock.step, clock) == PLAIN
    assert "training is not channels_last" in caplog.text
    with pytest.raises(RuntimeError, match="no such kernel"):
        fastest([PLAIN], *model(), Clock({PLAIN: 1.0}, {PLAIN: RuntimeError("no such kernel")}).step)


def test_which_executions_there_are():
    network, optimiser = model()
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert possible(cpu, network, optimiser, compiled=False) == [PLAIN]
    assert possible(cpu, network, optimiser, compiled=True) == [PLAIN, Execution(compiled=True)]
    assert possible(gpu, network, optimiser, compiled=False) == [PLAIN, FUSED, LAST, BOTH]
    assert len(possible(gpu, network, optimiser, compiled=True)) == 8
    without = torch.optim.LBFGS(network.parameters())  # has no fused kernel
    assert possible(gpu, network, without, compiled=False) == [PLAIN, LAST]
    ours = reconstruction()[1]  # is made in channels_last
    assert Execution("contiguous") in possible(gpu, ours, torch.optim.SGD(ours.parameters()), compiled=False)


def trained(execution, monkeypatch, steps=6):
    """A loop that found this execution the fastest, after some steps; with what it was made with."""
    monkeypatch.setattr(loop, "possible", lambda *_, **__: [PLAIN, execution])
    monkeypatch.setattr(loop, "fastest", lambda executions, *_: executions[-1])
    objective, network, samples = classification()
    made = Loop(network, STRATEGIES["derpp"](objective), SETTINGS)
    made.connect(None)
    made.prepare({name: value[0] for name, value in samples(1).items()})
    made.run(steps, lambda n, out: give(samples(n, seed=made.steps), out))
    return made


@pytest.mark.parametrize("execution", [LAST, FUSED, BOTH], ids=str)
def test_a_execution_changes_how_a_loop_computes_and_not_what(execution, monkeypatch):
    plain, other = trained(PLAIN, monkeypatch), trained(execution, monkeypatch)
    assert execution_of(other.network, other.optimiser) == other.execution == execution
    for one, two in zip(plain.network.parameters(), other.network.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)
    assert plain.buffer.fills == other.buffer.fills
    for parameter, state in other.optimiser.state.items():
        assert state["exp_avg"].stride() == parameter.stride()
        assert float(state["step"]) == 6


def test_a_real_measurement_leaves_training_as_it_is(monkeypatch):
    """By true steps of true copies: whichever execution is found the fastest."""
    monkeypatch.setattr(loop, "possible", lambda *_, **__: [PLAIN, LAST, FUSED, BOTH])
    objective, network, samples = classification()
    before = copy.deepcopy(network.state_dict())
    made = Loop(network, STRATEGIES["er"](objective), SETTINGS)
    made.connect(None)
    made.prepare({name: value[0] for name, value in samples(1).items()})
    assert made.execution in (PLAIN, LAST, FUSED, BOTH)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not made.optimiser.state
    assert len(made.buffer) == 0
    assert made.run(2, lambda n, out: give(samples(n, seed=made.steps), out)).loss > 0


def take_the_same(rank, ranks, where):
    """Two ranks choose, of which each found another one the fastest; then the last one is replaced by a new one."""
    loop.possible = lambda *_, **__: [PLAIN, BOTH]
    loop.fastest = lambda executions, *_: executions[1 - rank]
    objective, network, samples = classification()
    found = []
    for generation in range(2):
        if generation and rank == ranks - 1:
            objective, network, samples = classification()
        if not generation or rank == ranks - 1:
            made = Loop(network, STRATEGIES["er"](objective), SETTINGS, rank=rank)
        made.connect(Place(rank=rank, ranks=ranks, where=where, deadline=30).join(generation, device="cpu"))
        if not generation:
            assert made.execution is None
        made.prepare({name: value[0] for name, value in samples(1).items()})
        made.run(3, lambda n, out, made=made, samples=samples: give(samples(n, seed=made.steps), out))
        found.append((str(made.execution), str(execution_of(made.network, made.optimiser)), made.digest()))
        made.disconnect()
        leave()
    return found


@pytest.mark.slow
def test_all_ranks_go_the_execution_of_the_first_and_so_does_one_that_joins_later():
    one, two = on_ranks(2, take_the_same)
    assert one == two
    assert [execution for execution, _, _ in one] == [how for _, how, _ in one] == [str(BOTH)] * 2
