"""Laws of what is handed over before the job of a worker ends, with parts that only say what they are asked."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from steering.clusters.roles import INFERENCE, LABEL, RUNNER, SOURCE, TRAINER
from steering.runner.handover import HandedOver, HandOver
from steering.runner.optional import Optional

BEAMLINE = {SOURCE: 1, LABEL: 1, RUNNER: 1}


def workers(**resources):
    return {name: {"resources": roles} for name, roles in resources.items()}


@dataclass
class Parts:
    """Stands for ranks, predictor and source."""

    ranks: list[str]
    said: list[object] = field(default_factory=list)

    def hand_over(self):
        async def retire(addresses, folder):
            self.said.append(("retire", *addresses))

        async def move():
            self.said.append("move")

        async def write():
            self.said.append("checkpoint")

        parts = self

        class Ranks:
            addresses = self.ranks

            def __len__(self):
                return len(parts.ranks)

        Ranks.retire = staticmethod(retire)
        return HandOver(
            here="b",
            ranks=Ranks(),
            proxy=SimpleNamespace(address="p", move=move),
            source=SimpleNamespace(address="b"),
            optional=Optional(self.said.append),
            start=self._begin,
            checkpoints=None,
            write=write,
            end=lambda error: self.said.append(type(error)),
        )

    def _begin(self, work):
        self.tasks = [*getattr(self, "tasks", []), asyncio.ensure_future(work)]


def look(ranks, found, *, joining=False, looks=1):
    """What is asked at a look, or at several before anything is done."""

    async def main():
        parts = Parts(ranks)
        handover = parts.hand_over()
        for _ in range(looks):
            handover.look(found, joining=joining)
        await asyncio.gather(*getattr(parts, "tasks", []))
        return parts.said

    return asyncio.run(main())


WHOLE = workers(r0={TRAINER: 1}, r1={TRAINER: 1}, p={INFERENCE: 1}, b=BEAMLINE)
LAID = {name: {"resources": dict.fromkeys(one["resources"], 0)} for name, one in WHOLE.items()}


@pytest.mark.parametrize(
    ("leaving", "joining", "asked"),
    [
        ((), False, []),
        (("r0",), False, [("retire", "r0")]),
        (("r0",), True, []),  # first those join that take over
        (("r0", "r1"), False, ["checkpoint", HandedOver]),  # nobody would be left
        (("r0", "r1"), True, []),
        (("p",), False, ["move"]),
        (("b",), False, ["checkpoint", HandedOver]),
        (("r0", "p"), False, [("retire", "r0"), "move"]),
        (("r0", "b"), False, ["checkpoint", HandedOver]),
    ],
)
def test_each_part_is_handed_over_in_its_own_manner(leaving, joining, asked):
    found = WHOLE | {name: LAID[name] for name in leaving}
    assert look(["r0", "r1"], found, joining=joining) == asked
    assert look(["r0", "r1"], found, joining=joining, looks=3) == asked  # once


def test_what_is_lost_already_is_not_handed_over():
    found = {name: one for name, one in WHOLE.items() if name != "r0"}
    assert look(["r0", "r1"], found) == []


def test_a_checkpoint_that_cannot_be_written_does_not_keep_the_run_on_a_worker_that_ends():
    async def main():
        parts = Parts(["r0"])
        handover = parts.hand_over()

        async def full():
            raise OSError("no space")

        handover.write = full
        await handover.hand_over()
        return parts.said

    failed, ended = asyncio.run(main())
    assert failed.what.startswith("writing a checkpoint")
    assert ended is HandedOver
