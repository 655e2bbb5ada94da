"""Work that a run can do without: a failure is logged once with its traceback, and the run goes on."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Awaitable, Callable
from typing import TypeVar, overload

from steering.campaign import Event, WorkFailed
from steering.runner.actors import LostForGood

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Optional:
    """Carries out optional work."""

    def __init__(self, emit: Callable[[Event], None]) -> None:
        """emit: where WorkFailed goes, once for each kind of work and of error."""
        self._emit = emit
        self._known: set[tuple[str, type[BaseException]]] = set()

    @overload
    async def run(self, what: str, work: Awaitable[T]) -> T | None: ...

    @overload
    async def run(self, what: str, work: Awaitable[T], otherwise: Callable[[WorkFailed], T]) -> T: ...

    async def run(self, what: str, work: Awaitable[T], otherwise: Callable[[WorkFailed], T] | None = None) -> T | None:
        """The result of the work. what: it, in words, as in "saving the live image". otherwise: gives what stands for
        the result where the work failed; without it, None does.

        Raises LostForGood: actors that nothing can replace are no matter of this work alone.
        """
        try:
            return await work
        except LostForGood:
            raise
        except Exception as error:  # whatever it is, the run does not depend on it
            self.note(what, error)
            return None if otherwise is None else otherwise(failure(what, error))

    def note(self, what: str, error: Exception) -> None:
        """Report that some work has failed, once for each kind of work and of error."""
        if (what, type(error)) not in self._known:
            self._known.add((what, type(error)))
            logger.warning("%s failed; the run goes on without it", what, exc_info=error)
            self._emit(failure(what, error))


def failure(what: str, error: BaseException) -> WorkFailed:
    """The event that tells of work that failed."""
    return WorkFailed(
        time=time.time(),
        what=what,
        error=f"{type(error).__name__}: {error}",
        traceback="".join(traceback.format_exception(error)),
    )
