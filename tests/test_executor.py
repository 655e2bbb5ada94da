"""Laws of how actions are carried out: decisions keep their order, and optional work never ends a run."""

import asyncio
import time
from types import SimpleNamespace

import pytest

from steering.campaign import AskPolicy, DecisionSuggested, Finish, Publish, Steer, WorkFailed
from steering.inference import Installed
from steering.models import ModelStore
from steering.runner.actors import LostForGood
from steering.runner.executor import Executor
from steering.runner.metrics import Metrics
from steering.runner.optional import Optional
from tests.test_inference import publish


class Slow:
    """A source that takes the longer for a decision the earlier it comes."""

    def __init__(self, decisions):
        self.left, self.heard = decisions, []

    async def apply(self, steer):
        self.left -= 1
        await asyncio.sleep(0.01 * self.left)
        self.heard.append(steer.decision.reasons[0])

    async def close(self):
        self.heard.append("close")


def test_decisions_reach_the_source_in_the_order_in_which_they_were_made():
    async def main():
        source = Slow(5)
        parts = dict.fromkeys(("experiment", "folder", "campaign", "proxy", "ranks", "labelling", "optional"))
        executor = Executor(**parts, metrics=Metrics(None, None), source=source, take=None)
        actions = [
            Steer(DecisionSuggested(time=0.0, positions=(), reasons=(str(number),), stop=True), 0)
            for number in range(5)
        ]
        await asyncio.gather(*(asyncio.create_task(executor.carry_out(a)) for a in [*actions, Finish("over")]))
        return source.heard

    assert asyncio.run(main()) == ["0", "1", "2", "3", "4", "close"]


class Behind:
    """A predictor on a machine whose clock is five minutes behind, and ranks that have not changed."""

    generation = 0

    async def suggest(self, action):
        return DecisionSuggested(time=time.time() - 300, positions=(), reasons=("enough",), stop=True, action=action.id)


def test_the_time_to_approve_a_decision_counts_by_the_runners_clock():
    taken = []
    parts = dict.fromkeys(("experiment", "folder", "campaign", "source", "labelling", "optional"))
    executor = Executor(**parts, metrics=Metrics(None, None), proxy=Behind(), ranks=Behind(), take=taken.append)
    asked = time.time()
    asyncio.run(executor.carry_out(AskPolicy(4, id=7)))
    [decision] = taken
    assert decision.action == 7
    assert asked <= decision.time <= time.time()


class Serving:
    """A predictor and ranks, and what they serve."""

    generation = 0

    def __init__(self):
        self.installed = self.served = 0

    async def install(self, number):
        self.installed = number
        return Installed(accepted=True, version=number, reason="")

    async def serve(self, store, number):
        self.served = number


def test_a_version_that_was_on_its_way_when_everything_was_lost_serves_everywhere(tmp_path):
    """At the ranks too, which compare candidates with it, and for whoever reads the newest one from the store."""
    store, taken, one = ModelStore(tmp_path / "models"), [], Serving()
    for number in (0, 1):
        publish(store.path, number)
    store.point_to(0)  # what a recovery finds in service
    parts = dict.fromkeys(("experiment", "campaign", "source", "labelling", "optional"))
    folder = SimpleNamespace(models=store.path)
    executor = Executor(**parts, folder=folder, metrics=Metrics(None, None), proxy=one, ranks=one, take=taken.append)
    asyncio.run(executor.again(Publish(1, 3, id=4)))
    assert (one.installed, one.served, store.newest()) == (1, 1, 1)
    assert [(event.version, event.action) for event in taken] == [(1, 4)]


def test_optional_work_that_fails_is_told_once_with_its_traceback():
    told = []

    async def fails(error):
        raise error

    async def works():
        return 3

    async def main():
        optional = Optional(told.append)
        assert await optional.run("adding", works()) == 3
        for _ in range(3):
            assert await optional.run("dividing", fails(ZeroDivisionError("by nothing"))) is None
        assert await optional.run("dividing", fails(OSError("no disk")), lambda failed: failed.error) == (
            "OSError: no disk"
        )
        with pytest.raises(LostForGood):
            await optional.run("dividing", fails(LostForGood("no predictor")))

    asyncio.run(main())
    assert [(event.what, event.error) for event in told] == [
        ("dividing", "ZeroDivisionError: by nothing"),
        ("dividing", "OSError: no disk"),
    ]
    assert all(isinstance(event, WorkFailed) and "in fails" in event.traceback for event in told)
