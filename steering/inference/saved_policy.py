"""The policy and the scans of a predictor as a checkpoint has them: data that a new predictor goes on from."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steering.campaign import DecisionSuggested
from steering.inference.answers import PolicyAnswer
from steering.inference.live import LiveImage
from steering.inference.policy_replay import OpenAccount, PolicyReplay
from steering.policies import Policy
from steering.records import Ids
from steering.records.optional_parts import offers
from steering.records.plain import plain, whole

logger = logging.getLogger(__name__)

_ALL = 2**62
"""Frames that a policy is said to have taken in of a scan of which it gets none any more."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SavedPolicy:
    """Where a new policy goes on: from the state that an earlier one gave, or, where it gave none, by asking it again
    for all that was answered since the scan began."""

    state: Mapping[str, Any] | None = None
    account: OpenAccount = field(default_factory=lambda: ({}, (), False))
    ingested: Mapping[str, int] = field(default_factory=dict)
    """How many frames of each scan it had taken in, the first to arrive."""
    answers: tuple[PolicyAnswer, ...] = ()
    """Of the scan, up to then; of a policy with a state the newest alone."""
    since: tuple[PolicyAnswer, ...] = ()
    """Answers after that, from the log."""

    @classmethod
    def read(cls, data: Mapping[str, Any], later: Sequence[PolicyAnswer] = ()) -> SavedPolicy:
        """From what `policy_state` returned. later: answers that the log knows, in order; those to actions that were
        answered by then already are left out. Raises ValueError for anything else."""
        known = (PolicyAnswer, DecisionSuggested)
        try:
            answers = tuple(whole(data["answers"], known))
            newest = answers[-1].action if answers else 0
            return cls(
                state=whole(data["state"]),
                account=whole(data["account"]),
                ingested=whole(data["ingested"]),
                answers=answers,
                since=tuple(answer for answer in later if answer.action > newest),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"found the state of a policy without {error}, expected it whole") from error

    @property
    def answered(self) -> tuple[PolicyAnswer, ...]:
        """All that is known to have been answered."""
        return (*self.answers, *self.since)

    def known(self, scans: Mapping[str, LiveImage]) -> dict[str, int]:
        """How many frames of each scan the new policy need not be given."""
        if self.state is not None:
            return dict(self.ingested)
        return {scan: _ALL for scan, live in scans.items() if live.retired}

    def applied(self, policy: Policy, scans: Mapping[str, LiveImage]) -> PolicyReplay:
        """Bring a new policy to that state; what it is to be asked again."""
        if self.state is None:
            return PolicyReplay((*self.answers, *self.since))
        goes_on = [live for live in scans.values() if not live.retired]
        policy.restore(self.state, goes_on[-1].view() if goes_on else None)
        return PolicyReplay(self.since, self.account)


@dataclass(frozen=True, kw_only=True, eq=False)
class SavedPredictor:
    """The part of a checkpoint from which a predictor goes on."""

    folder: Path
    """Of the files that `part` names."""
    part: Mapping[str, Any]
    """As `Predictor.checkpoint` returned it."""
    policy: SavedPolicy

    @property
    def frame_ids(self) -> Ids:
        """Of the frames that it holds. Raises ValueError where the part does not say so as `SavedScans` does."""
        return Ids.of(each for scan in self.part["scans"] for each in scan["ids"])


def policy_state(
    policy: Policy, account: OpenAccount, ingested: Mapping[str, int], answers: Sequence[PolicyAnswer]
) -> dict[str, Any]:
    """What `SavedPolicy.read` reads, in JSON's types."""
    state = None
    if offers(policy, "state") and offers(policy, "restore"):
        try:
            state = plain(policy.state())
        except TypeError as error:
            logger.warning("%s: its state is not saved, it will be asked again: %s", type(policy).__name__, error)
    return {
        "state": state,
        "account": plain(account),
        "ingested": plain(dict(ingested)),
        "answers": plain(list(answers if state is None else answers[-1:])),
    }
