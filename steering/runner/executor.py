"""Carries out the campaign's actions, each in a task of its own; one event answers each."""

from __future__ import annotations

import asyncio
import errno
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from steering.campaign import (
    Action,
    Answer,
    AskPolicy,
    Campaign,
    CandidateReady,
    CandidateRefused,
    Event,
    Finish,
    GroupChanged,
    Label,
    ModelPublished,
    Publish,
    Refuse,
    Remind,
    RollBack,
    RollBackRefused,
    RolledBack,
    ScansJudged,
    Steer,
    TakeBack,
    Tick,
    Train,
    TrainingSkipped,
    VersionRefused,
)
from steering.inference import Installed
from steering.learning import NoSamples, Round
from steering.models import ModelStore
from steering.records import ModelVersion
from steering.runner.actors import answered
from steering.runner.experiment import Experiment
from steering.runner.folder import RunFolder
from steering.runner.labelling import Labelling
from steering.runner.metrics import Metrics
from steering.runner.optional import Optional
from steering.runner.predictor_proxy import PredictorProxy
from steering.runner.rank_group import RankGroup
from steering.runner.source_proxy import SourceProxy

_BETTER = 0.1
"""Share by which an older version's residual must be lower for the campaign to go back to it of its own accord."""

_OF_THE_DISK = {getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EROFS", "EIO", "ESTALE", "ENODEV", "ENOTCONN")}
"""What a full, read-only, broken or vanished disk says."""
_FIRST_REST_S, _LONGEST_REST_S = 1.0, 30.0
"""Such a disk is tried again after so long, and each time after twice as long."""

T = TypeVar("T")


@dataclass(kw_only=True)
class Executor:
    """Carries out actions, and gives each answer to `take`."""

    experiment: Experiment
    folder: RunFolder
    campaign: Campaign
    metrics: Metrics
    source: SourceProxy
    proxy: PredictorProxy
    ranks: RankGroup
    labelling: Labelling
    optional: Optional
    take: Callable[[Event], None]
    """Where events go."""
    _candidate: tuple[int, CandidateReady | None, list[Round]] = (0, None, [])
    """Of the newest training round: its action, and what the ranks said of it."""
    _to_source: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held during a call of the source: decisions reach it in the order in which they were made."""

    unsent: dict[int, Steer] = field(default_factory=dict)
    """What has not reached the source yet, by id."""

    def start(self, action: Action) -> Coroutine[Any, Any, None]:
        """What carries out an action."""
        if isinstance(action, Steer):
            self.unsent[action.id] = action
        return self.carry_out(action)

    async def again(self, action: Action) -> None:
        """Carry out an action that may have been carried out in part, before everything was lost."""
        store = ModelStore(self.folder.models)
        match action:
            case Publish() if not store.folder(action.version).exists():
                why = "its candidate was lost with all processes of the run"
                self._answer(action, CandidateRefused(time=time.time(), reason=why))
            case Publish():
                # Before it was lost, the group compared candidates with this version, and readers found it the newest.
                await asyncio.to_thread(store.point_to, action.version)
                await answered(lambda: self.ranks.serve(self.folder.models, action.version))
                await self._put_into_service(action, store.describe(action.version))
            case TakeBack() if not store.folder(action.version).exists():
                self._answer(action, CandidateRefused(time=time.time(), reason=action.reason))
            case _:
                await self.carry_out(action)

    async def carry_out(self, action: Action) -> None:
        """Do what an action asks for; the event that answers it carries its id."""
        match action:
            case AskPolicy():
                # From here, and by this machine's clock, counts the time that a person has to approve it.
                self._answer(action, replace(await self.proxy.suggest(action), time=time.time()))
            case Steer() | Finish():
                await self._tell_source(action)
            case Label():
                await self._label(action)
            case Train():
                await self._train(action)
            case Publish() | TakeBack() | RollBack():
                await self._change_version(action)
            case Remind():
                await asyncio.sleep(max(0.0, action.at - time.time()))
                self._answer(action, Tick(time=max(action.at, time.time())))
            case Refuse():
                self._answer(action, CandidateRefused(time=time.time(), reason=action.reason))

    async def _change_version(self, action: Publish | TakeBack | RollBack) -> None:
        """Where the disk takes nothing, again and again: what is in service stays there, and nothing is trained
        meanwhile, until there is room for what was learnt, or a person stops the run."""
        rest = _FIRST_REST_S
        while True:
            try:
                match action:
                    case Publish():
                        return await self._publish(action)
                    case TakeBack():
                        return await self._take_back(action)
                    case RollBack():
                        return await self._roll_back(action)
            except OSError as error:
                if error.errno not in _OF_THE_DISK and self.folder.path.is_dir():
                    raise
                self.optional.note("writing a version of the model, for now,", error)
                if self.campaign.stopped:
                    return self._give_up(action, error)
            await asyncio.sleep(rest)
            rest = min(2 * rest, _LONGEST_REST_S)

    def _give_up(self, action: Publish | TakeBack | RollBack, error: OSError) -> None:
        """The run ends with what is in service. Raises the error where a refused version would stay the newest."""
        now, why = time.time(), f"the run was stopped, and its disk took nothing: {error}"
        match action:
            case Publish():
                self._answer(action, CandidateRefused(time=now, reason=why))
            case RollBack():
                self._answer(action, RollBackRefused(time=now, version=action.version, reason=why))
            case TakeBack():
                raise error

    def _answer(self, action: Action, event: Answer) -> None:
        self.take(replace(event, action=action.id, generation=self.ranks.generation))

    async def _tell_source(self, action: Steer | Finish) -> None:
        async with self._to_source:
            if isinstance(action, Finish):
                await self.source.close()
                return
            if action.decision.reasons:
                self.metrics.reason = action.decision.reasons[0]
            await self.source.apply(action)
            self.unsent.pop(action.id, None)

    async def _label(self, action: Label) -> None:
        labels = await self.labelling.make(action.scan, action.generation)
        if labels is not None:  # else the group has changed, and the campaign asks again
            self._answer(action, labels)

    async def _train(self, action: Train) -> None:
        try:
            rounds = await self.ranks.fit(action.scan, action.steps, action.generation)
        except NoSamples as lacking:  # those of some rank went with a lost one
            self._answer(action, TrainingSkipped(time=time.time(), scan=action.scan, reason=str(lacking)))
            return
        if isinstance(rounds, GroupChanged):
            return  # the campaign asks again
        self.metrics.trained(rounds)
        first = rounds[0]
        candidate = CandidateReady(
            time=time.time(),
            scan=action.scan,
            steps=first.steps,
            error=_number(first.error),
            served_error=_number(first.served_error),
            residual=_number(first.residual),
            loss=sum(r.loss for r in rounds) / len(rounds),
        )
        self._candidate = (action.id, candidate, rounds)
        self._answer(action, candidate)

    async def _publish(self, action: Publish) -> None:
        begun = time.perf_counter()
        version = self._version(action)
        await answered(lambda: self.ranks.publish(self.folder.models, version))
        await asyncio.gather(self._put_into_service(action, version), self._recall(action.version))
        self.metrics.seconds["publish"] += time.perf_counter() - begun

    async def _recall(self, version: int) -> None:
        """Log how well a version does on each scan so far."""
        errors = await self.optional.run("judging a version on earlier scans", self.ranks.recalled())
        if isinstance(errors, dict) and errors:
            self.take(ScansJudged(time=time.time(), version=version, errors=errors))

    async def _put_into_service(self, action: Publish, version: ModelVersion) -> None:
        installed: Installed = await self.proxy.install(action.version)
        if not installed.accepted:
            reason = f"refused by the predictor: {installed.reason}"
            self._answer(action, VersionRefused(time=time.time(), version=action.version, reason=reason))
            return
        self._answer(
            action,
            ModelPublished(
                time=time.time(),
                version=action.version,
                validation_error=version.validation_error,
                validation_residual=version.validation_residual,
                validation_frames=len(version.validation_residuals),
            ),
        )

    async def _take_back(self, action: TakeBack) -> None:
        """Remove a version, so that its number is free for the next one. Later candidates are compared with the version
        in service."""
        store = ModelStore(self.folder.models)
        await asyncio.to_thread(store.withdraw, action.version, action.serving)
        await answered(lambda: self.ranks.serve(self.folder.models, action.serving))
        self._answer(action, CandidateRefused(time=time.time(), reason=action.reason))

    async def _roll_back(self, action: RollBack) -> None:
        """Put an older version into service, and have the ranks train on from it: candidates that descend from the
        newer one would bring its faults back."""
        number, margin = action.version, -_BETTER if action.if_better else None
        installed: Installed = await self.proxy.install(number, canary=action.if_better, margin=margin)
        if not installed.accepted:
            self._answer(action, RollBackRefused(time=time.time(), version=number, reason=installed.reason))
            return
        store = ModelStore(self.folder.models)
        await asyncio.to_thread(store.point_to, number)
        await answered(lambda: self.ranks.go_back(self.folder.models, number))
        residual = store.describe(number).validation_residual
        self._answer(
            action, RolledBack(time=time.time(), version=number, validation_residual=residual, reason=action.reason)
        )

    def _version(self, action: Publish) -> ModelVersion:
        """The description of a version, with the figures of the round that made its weights."""
        number, candidate, rounds = self._candidate
        if number != action.candidate or candidate is None:
            raise RuntimeError(
                f"found the round of action {number}, expected that of action {action.candidate}, whose candidate is "
                f"to be published as version {action.version}"
            )
        seen: Counter[str] = Counter()
        for one in rounds:
            seen.update(one.seen)
        network = self.experiment.network
        return ModelVersion(
            number=action.version,
            network=type(network).__name__,
            hyperparameters=dict(network.hyperparameters),
            parents=(self.campaign.version,),
            trained_on=dict(seen),
            steps=candidate.steps,
            validation_error=candidate.error,
            validation_residual=candidate.residual,
            validation_residuals=rounds[0].residuals,
            noise_share=rounds[0].noise_share,
            validation_offsets=rounds[0].offsets,
        )


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
