"""Streams of a live source: what a protocol hands to the joiner, what the joiner knows of each, and its figures.

A protocol is one file with a class that opens its stream where it is iterated: `records(stopped)` yields Began, Frames,
Samples and Ended until `stopped` is set. What it cannot decode it raises as ValueError, what it cannot reach as
OSError. Where a protocol has messages the class says how they are received (`messages`) and how they are decoded
(`decoder`), so that they can be recorded as they came.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

FRAMES = "frames"
"""Name of the stream of frames."""
POSITIONS = "positions"
ARMED = "armed"
"""In the header of a scan that begins: the stream is armed for it, which may be given up and done again."""
WHEN_SLOW = ("block", "drop oldest", "thin")
_REASONS = 20
"""Most reasons that are told apart."""


class Began(NamedTuple):
    """A scan begins: a series of a detector, an arming of an encoder."""

    name: str | None
    """None: the stream does not name its scans."""
    first: int | None = 0
    """Number of its first frame; None: not known."""
    header: Mapping[str, Any] = {}
    """What the stream says of it: pixels, energy and the like, in SI units."""


class Packed:
    """An image (y, x) that is made where it is looked at: `numpy.asarray` does that.

    Where prediction is slower than the detector most frames are thinned, and decompressing these would take the time of
    those that are predicted. Raises ValueError there for a payload that is damaged.
    """

    __slots__ = ("_made", "dtype", "shape")

    def __init__(self, shape: tuple[int, int], dtype: np.dtype, make: Callable[[], NDArray]) -> None:
        self.shape, self.dtype = shape, dtype
        self._made: NDArray | Callable[[], NDArray] = make

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> NDArray:
        if not isinstance(self._made, np.ndarray):
            self._made = self._made()  # what it was made of is not kept
        return np.array(self._made, dtype, copy=copy)


def damage(image: NDArray | Packed) -> str:
    """Make an image: what is wrong with its payload, in words; empty where nothing is."""
    try:
        np.asarray(image)
    except ValueError as error:
        return str(error)
    return ""


class Frame(NamedTuple):
    """One frame."""

    number: int
    counts: NDArray | Packed
    """(y, x) in the detector's dtype."""
    time: float
    """When it was received, seconds since the epoch."""
    own: Mapping[str, NDArray[np.float64]] = {}
    """(column,) the samples that came with it, by the companion's name."""


class Samples(NamedTuple):
    """Samples that follow one another, in the order of a companion's columns."""

    first: int
    """Index of the first sample since the scan began."""
    rows: NDArray[np.float64]
    """(sample, column)"""


class Unreadable(NamedTuple):
    """A message that could not be decoded, and why: it is counted and left out."""

    reason: str


class Ended(NamedTuple):
    """The scan is over, as far as this stream goes."""

    frames: int | None = None
    """That it had in all, where it says so."""
    last: bool = False
    """No further scan will come."""


Record = Began | Frame | Samples | Unreadable | Ended


class Stream(Protocol):
    """A stream of one protocol. It is made in the driver, pickled, and opened where `records` is iterated."""

    def records(self, stopped: threading.Event) -> Iterator[Record | None]:
        """What comes, until `stopped` is set; None, at least every 0.1 s, where nothing came, but not until it listens:
        nothing is measured before."""


class Message(NamedTuple):
    """What a protocol received at once, before any of it is decoded."""

    parts: tuple[Any, ...] = ()
    """Bytes, as they came."""
    fields: Mapping[str, Any] = {}
    """What came beside them: values that `steering.records.plain` understands."""


Decoder = Callable[[Message], Sequence[Record]]
"""Makes records of one message after the other. Raises ValueError, and nothing else, for what makes none."""


class WrongProtocol(ValueError):
    """The stream speaks another protocol: nothing of it can be read."""


@runtime_checkable
class MessageStream(Stream, Protocol):
    """A stream of messages."""

    def messages(self, stopped: threading.Event) -> Iterator[Message | None]:
        """What comes, as `records` says."""

    def decoder(self) -> Decoder:
        """A new decoder of the stream's messages, from the first one on."""


def decoded(decode: Decoder, message: Message) -> Sequence[Record]:
    """The records of a message; one that makes none is Unreadable. Raises WrongProtocol."""
    try:
        return decode(message)
    except WrongProtocol:
        raise
    except ValueError as error:
        return [Unreadable(str(error))]


def records_of(stream: MessageStream, stopped: threading.Event) -> Iterator[Record | None]:
    """The `records` of a stream of messages."""
    decode = stream.decoder()
    for message in stream.messages(stopped):
        if message is None:
            yield None
        else:
            yield from decoded(decode, message)


@dataclass(frozen=True, kw_only=True)
class Companion:
    """A stream that says something of each frame: its position, the incident intensity."""

    name: str
    width: int
    """Numbers in a sample: 2 for a position (y, x)."""
    samples: int = 1
    """Samples of one frame. They are averaged; at the deadline those that came."""
    gap: int = 3
    """Most numbers in a row without a sample that are interpolated; 0: none, as where positions are decided, and what
    lies between two frames is not between their places."""
    capacity: int = 65_536
    """Most frame numbers of which samples wait: they are small, and run ahead of frames that a detector holds back."""
    when_slow: str = "drop oldest"
    """What happens then: drop oldest; block: the stream is not read any more, where the protocol allows it. Samples are
    not thinned: a frame without its own would wait for it until the deadline, and then be interpolated or set aside."""

    def __post_init__(self) -> None:
        if self.width < 1 or self.samples < 1 or self.gap < 0 or self.capacity < 1:
            raise ValueError(
                f"{self.name}: found width={self.width}, samples={self.samples}, gap={self.gap}, "
                f"capacity={self.capacity}; expected 1 or more, 1 or more, 0 or more, 1 or more"
            )
        if self.when_slow not in WHEN_SLOW or self.when_slow == "thin":
            raise ValueError(
                f"{self.name}: found when_slow={self.when_slow!r}, expected block or drop oldest; frames alone can be "
                "thinned: one without its sample would wait for it until the deadline, and then be set aside"
            )


@dataclass(frozen=True, kw_only=True)
class JoinSettings:
    """How long frames wait, how many of them, and what happens when the consumer is slower."""

    wait_s: float = 5.0
    """Seconds that a frame waits for its samples, a sample for its frame, and a missing number until it is lost."""
    capacity: int = 4096
    """Most frames that are kept, those that wait and those that are ready."""
    oldest_s: float = float("inf")
    """Seconds after which a frame that is ready gives way where nobody takes it, unless when_slow is block: what a
    consumer sees is then never older."""
    when_slow: str = "block"
    """Of the frames, those of other streams are their own (`Companion.when_slow`). block: the stream is not read any
    more, where the protocol allows it; drop oldest; thin: the consumer gets the newest, evenly spaced."""

    def __post_init__(self) -> None:
        known = self.when_slow in WHEN_SLOW
        if not self.wait_s >= 0 or self.capacity < 2 or not self.oldest_s >= self.wait_s or not known:
            raise ValueError(
                f"found wait_s={self.wait_s}, capacity={self.capacity}, oldest_s={self.oldest_s}, "
                f"when_slow={self.when_slow!r}; expected 0 or more seconds, 2 or more frames, at least wait_s, "
                f"one of {', '.join(WHEN_SLOW)}"
            )


class Joined(NamedTuple):
    """A frame with what its companions say of it."""

    scan: Any
    number: int
    frame: Any
    values: dict[str, NDArray[np.float64]]
    """(width,) of each companion."""
    since: float
    """When the frame came."""
    rows: dict[str, int]
    """Samples of each companion that are in the value; 0: interpolated."""


@dataclass
class StreamCounters:
    """What is known of one stream; numbers of frames, or of samples of a companion."""

    received: int = 0
    joined: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """By reason."""
    out_of_order: int = 0
    """That came after one with a higher number; they are used like all others."""
    lost: int = 0
    """Frame numbers of which nothing came before the deadline; they were never received."""
    interpolated: int = 0
    """Frames whose value was interpolated."""
    last_seen: float | None = None
    last_number: int | None = None

    def reason(self, kind: str, words: str) -> str:
        """Why something is dropped, beginning with its kind; of many reasons later ones are not told apart."""
        found = kind + words[:200]
        return found if found in self.dropped or len(self.dropped) < _REASONS else f"{kind}for other reasons"

    def said(self, waiting: int, now: float, begun: float) -> dict[str, Any]:
        """All of it for a display; waiting: received, and neither joined nor dropped. begun: since when it is read."""
        return {
            "received": self.received,
            "joined": self.joined,
            "waiting": waiting,
            "dropped": dict(self.dropped),
            "lost": self.lost,
            "out_of_order": self.out_of_order,
            "interpolated": self.interpolated,
            "last_number": self.last_number,
            "silent_s": None if self.last_seen is None else round(now - self.last_seen, 3),
            "listens_s": round(now - begun, 3),
        }

    def left_out(self, reason: str) -> None:
        """One has come that nobody asked for."""
        self.received += 1
        self.dropped[reason] += 1

    def note(self, now: float, number: int) -> None:
        """One has come."""
        self.received += 1
        self.last_seen = now
        self.last_number = number
