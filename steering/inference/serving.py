"""Which version serves: a newer one is made ready beside it, tried on frames nobody trained on, and then swapped in."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from steering.inference.backends import REFERENCE, Slot
from steering.inference.engine import MOST_WORSE, Engine, Stream
from steering.inference.settings import PredictorSettings
from steering.inference.transfer import Transfer
from steering.models import ModelStore, Network
from steering.ptychography import far_field_residual
from steering.records import ModelVersion

T = TypeVar("T")
_REST = 4
"""So many times as long as a canary frame took, or a load, nothing is done, for the thread that serves: the two share
an interpreter, and often a core."""
_EXACTLY = 4
"""Newest canary frames on which a backend is held against the reference: an error of the backend is in all of them."""
_PATIENCE_S, _MOMENT_S = 0.1, 0.02
"""How long such a step waits until no frame is there or expected while it lasts; where frames come too fast for that,
only for a moment in which none is there: just after one, when the next is farthest off."""
_POLL_S = 5e-4
"""Between two looks."""
_TOGETHER = (4, 2)
"""Canary frames that are predicted together where there is time for so many: each size has kernels of its own."""

Idle = Callable[[], float]
"""Seconds until the next frame is expected, infinite in a pause; 0 while one is being predicted or waits."""


@dataclass(frozen=True, kw_only=True)
class Installed:
    """What came of the wish to put a version into service."""

    accepted: bool
    version: int
    """In service from now on: the one asked for where it is accepted, else the one that was there."""
    reason: str
    frames: int = 0
    """Held-out frames that both versions were tried on."""
    before: float | None = None
    """Their median far-field residual by the version that was in service."""
    after: float | None = None
    """And by the one asked for."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Canary:
    """The newest frames that were never trained on."""

    counts: NDArray
    """(n, y, x)"""
    mask: NDArray[np.bool_]
    """(y, x), True = do not use."""
    known: NDArray[np.float32]
    """(n,) their far-field residual by the version in service, as it was found when they came; NaN where another
    version predicted them, or with another mask."""


class Serving:
    """The versions of a store, one of which an engine serves."""

    def __init__(self, store: ModelStore, engine: Engine, number: int, *, margin: float) -> None:
        """Put version `number` into service. margin: share by which a later version's residual may be higher."""
        self.engine = engine
        self.margin = margin
        self._store = store
        self._exact: Slot | None = None
        """What a version says in float32 is found out here."""
        described = store.describe(number)
        self._kind = (described.network, described.hyperparameters)
        self._known = {number: described}
        engine.serving.load(store.weights(number), number=number, expected=described.validation_residual or 0.0)

    @classmethod
    def begin(
        cls,
        store: ModelStore,
        settings: PredictorSettings,
        number: int | None = None,
        *,
        network: type[Network] | None = None,
        frame_rate: float = 0.0,
    ) -> Serving:
        """A version of a store, by default the newest, in service, run in the backend that is fastest here for a stream
        of so many frames per second (0: not known).

        network: its class, see ModelStore.load. Raises FileNotFoundError for a store without a version.
        """
        number = store.newest() if number is None else number
        if number is None:
            raise FileNotFoundError(f"found no model in {store.path}, expected version 0 before the first frame")
        loaded = store.load(number, network=network)
        engine = Engine(
            loaded,
            frames=settings.batch,
            device=settings.device,
            compiled=settings.compiled,
            stream=Stream(together=max(1, round(frame_rate * settings.gather_ms / 1e3)), frame_rate=frame_rate)
            if frame_rate
            else None,
        )
        return cls(store, engine, number, margin=settings.canary_margin)

    @property
    def version(self) -> int:
        """In service now."""
        return self.engine.serving.number

    @property
    def described(self) -> ModelVersion:
        """What the version in service is."""
        return self._known[self.version]

    @property
    def expected(self) -> float:
        """Residual that the version in service should reach; 0 where that is not known."""
        return self.engine.serving.expected

    def make_ready(
        self,
        number: int,
        canary: Canary | None,
        margin: float | None = None,
        idle: Idle = lambda: float("inf"),
    ) -> Installed:
        """Load a version into the spare slot, warm it, and say whether it may serve; for a thread of its own.

        margin: share by which its residual may be higher; below 0, by which it must be lower: without a frame to try it
        on it is refused then. None: the usual one.
        idle: asked before each step, so that frames do not meet it.

        Where the version in service has not predicted all of the frames when they came, it is tried on those others in
        the spare slot, so that both are run alike and the serving slot is left alone. Raises as `ModelStore.weights`
        does.
        """
        described = self._known[number] = self._store.describe(number)
        if (described.network, described.hyperparameters) != self._kind:
            return self._refused(
                f"version {number} is a {described.network} with {described.hyperparameters}, "
                f"expected {self._kind[0]} with {self._kind[1]} as in service: start another run for another network"
            )
        weights, expected = self._store.weights(number), described.validation_residual or 0.0
        if not all(bool(torch.isfinite(value).all()) for value in weights.values()):
            return self._refused(f"version {number} has weights that are not finite")
        spare, steps = self.engine.spare, _Steps(idle)
        if canary is None or not len(canary.counts):
            if margin is not None and margin < 0:
                return self._refused(f"no held-out frame to try version {number} on, which must do better")
            steps.do(lambda: spare.load(weights, number=number, expected=expected))
            if canary is not None:
                spare.mask(canary.mask)
            warm = np.zeros((1, *spare.network.optics.bad.shape), np.float32)
            steps.do(lambda: _patches(spare, warm))
            return Installed(accepted=True, version=number, reason="taken without a trial: no frame to try it on")
        before = float(np.median(self._served(canary, steps)))
        steps.do(lambda: spare.load(weights, number=number, expected=expected))
        found = _residuals(spare, canary.counts, canary.mask, steps)
        after = float(np.median(found))
        if spare.backend != REFERENCE:
            exact = self._exact = self._exact or self.engine.slot(REFERENCE)
            steps.do(lambda: exact.load(weights, number=number, expected=expected))
            few = canary.counts[-_EXACTLY:]
            own, standard = np.median(found[-_EXACTLY:]), np.median(_residuals(exact, few, canary.mask, steps))
            if own > MOST_WORSE * standard:
                self._exact = None  # it is the spare slot now
                self.engine.go_without(spare.backend, exact, f"residual {own:.4g}, {standard:.4g} in float32")
                after = float(np.median(_residuals(exact, canary.counts, canary.mask, steps)))
        n = len(canary.counts)
        said = f"residual {after:.4g} on {n} held-out frames, version {self.version} has {before:.4g}"
        if not after <= (1 + (self.margin if margin is None else margin)) * before:
            return self._refused(said, frames=n, before=before, after=after)
        return Installed(accepted=True, version=number, reason=said, frames=n, before=before, after=after)

    def swap(self, mask: NDArray[np.bool_]) -> None:
        """Put what `make_ready` has accepted into service; for the thread that predicts, between two frames."""
        self.engine.spare.mask(mask)
        self.engine.swap()

    def _served(self, canary: Canary, steps: _Steps) -> NDArray[np.float32]:
        """(n,) residual of canary frames by the version in service."""
        found, spare = canary.known.copy(), self.engine.spare
        lacking = np.isnan(found)
        if lacking.any():
            steps.do(lambda: spare.load(self.engine.serving.network.state_dict()))
            found[lacking] = _residuals(spare, canary.counts[lacking], canary.mask, steps)
        return found

    def _refused(self, reason: str, **figures: float) -> Installed:
        return Installed(accepted=False, version=self.version, reason=reason, **figures)  # type: ignore[arg-type]


class _Steps:
    """Does one short thing after another, each when there is time for it, and rests in between."""

    def __init__(self, idle: Idle) -> None:
        self._idle = idle
        self._patience_s = _PATIENCE_S
        self._cost_s: dict[int, float] = {}
        """Of a step, at most lately, by the frames that it predicts; 0 frames: of any other step."""

    def do(self, step: Callable[[], T], frames: int = 0) -> T:
        """Do it; what it returns. frames: how many it predicts."""
        self._wait(self._cost_s.get(frames, 0.0))
        begun = time.perf_counter()
        done = step()
        took = time.perf_counter() - begun
        self._cost_s[frames] = max(took, 0.9 * self._cost_s.get(frames, 0.0))
        if np.isfinite(self._idle()):
            time.sleep(_REST * took)
        return done

    def fitting(self, most: int) -> int:
        """How many frames there is time to predict together now, of at most so many. The first one goes alone: what it
        takes is not known yet."""
        one = self._cost_s.get(1)
        if one is None:
            return 1
        self._wait(one)
        left = self._idle()
        return next((n for n in _TOGETHER if n <= most and self._cost_s.get(n, n * one) <= left), 1)

    def _wait(self, seconds: float) -> None:
        if not wait_for_idle(self._idle, seconds, self._patience_s):
            self._patience_s = 0.0  # what was not there once is not waited for again
            wait_for_idle(self._idle, 1e-4, _MOMENT_S)


def wait_for_idle(idle: Idle, seconds: float, within: float) -> bool:
    """Wait until there are so many seconds without a frame; False where there are not, within that time."""
    until = time.perf_counter() + within
    while idle() < seconds:
        if time.perf_counter() >= until:
            return False
        time.sleep(_POLL_S)
    return True


def _residuals(slot: Slot, counts: NDArray, mask: NDArray[np.bool_], steps: _Steps) -> NDArray[np.float32]:
    """(n,) far-field residual of counts (n, y, x), a few together."""
    steps.do(lambda: slot.mask(mask))
    probe, found, left = slot.probe, [], counts
    while len(left):
        some, left = np.split(left, [steps.fitting(len(left))])
        found.append(
            steps.do(
                lambda now=some: far_field_residual(_patches(slot, now), now, probe, mask, device=slot.device),  # type: ignore[misc]
                len(some),
            )
        )
    return np.concatenate(found)


def _patches(slot: Slot, counts: NDArray) -> NDArray[np.complex64]:
    patch = slot.network.hyperparameters["patch"]
    return Transfer(slot.device, frames=len(counts), window=counts.shape[-1], patch=patch)(slot, counts)
