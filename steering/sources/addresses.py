"""The addresses of live streams: one grammar for the command line, `record`, `inspect` and notebooks.

    frames     dectris://HOST:31001            ?channel=threshold_1
               pva://PV                        ?queue=1024
               swmr:FILE                       ?data=/entry/data/data &keys=/entry/keys &wait_s=60
    positions  zmq://HOST:PORT                 ?y=NAME &x=NAME &socket=pull|sub
               pva://PV_Y,PV_X                 or pva://TABLE?y=COLUMN&x=COLUMN (with a column `number`)
               swmr:FILE                       ?y=/PATH &x=/PATH
    motion     zmq://HOST:PORT
               pva://MOTOR_Y,MOTOR_X           ?trigger=PV &dwell=PV &end=PV

Positions and motion take unit=m|mm|um|nm|px (m) and flip=y|x|yx; positions samples=N of a frame (1) and gap=N frames
that are interpolated (3).
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import parse_qsl

from steering.sources.dectris import DectrisFrames
from steering.sources.motion import Motion, ZmqMotion
from steering.sources.panda import PandaPositions
from steering.sources.streams import Companion, Stream

_UNITS = {"m": 1.0, "mm": 1e-3, "um": 1e-6, "nm": 1e-9, "px": 1.0}
_OF_POSITIONS = ("unit", "flip", "samples", "gap")


@dataclass(frozen=True, kw_only=True)
class Address:
    """An address in its parts."""

    text: str
    scheme: str
    place: str
    options: dict[str, str]

    def only(self, *names: str) -> None:
        """Raises ValueError for an option that is not among these."""
        unknown = sorted(set(self.options) - set(names))
        if unknown:
            raise ValueError(f"{self.text}: found the option {unknown[0]}, expected one of {', '.join(names)}")

    def whole(self, name: str, default: int) -> int:
        """An option that is a whole number of 0 or more."""
        text = self.options.get(name, str(default))
        if not text.isdigit():
            raise ValueError(f"{self.text}: found {name}={text}, expected a whole number")
        return int(text)

    def needed(self, name: str) -> str:
        """An option that must be there."""
        if not self.options.get(name):
            raise ValueError(f"{self.text}: found no {name}, expected it: add ?{name}=...")
        return self.options[name]

    def scale(self) -> tuple[float, float]:
        """What y and x are multiplied by to be metres, or object pixels."""
        unit, flip = self.options.get("unit", "m"), self.options.get("flip", "")
        if unit not in _UNITS or flip not in ("", "y", "x", "yx", "xy"):
            raise ValueError(
                f"{self.text}: found unit={unit}, flip={flip}; expected one of {', '.join(_UNITS)}, and y, x or yx"
            )
        y, x = (-_UNITS[unit] if axis in flip else _UNITS[unit] for axis in "yx")
        return y, x


def parse(text: str) -> Address:
    """The parts of an address. Raises ValueError for what is none."""
    before, _, options = text.partition("?")
    scheme, colon, place = before.partition(":")
    if not colon or not place.removeprefix("//"):
        raise ValueError(f"found the address {text!r}, expected one like dectris://HOST:31001, pva://PV or swmr:FILE")
    # A plus in a file's name is a plus: parse_qsl would make it a space.
    pairs = parse_qsl(options.replace("+", "%2B"), keep_blank_values=True)
    return Address(text=text, scheme=scheme, place=place.removeprefix("//"), options=dict(pairs))


def frames_at(text: str) -> Stream:
    """The frames at an address."""
    address = parse(text)
    if address.scheme == "dectris":
        address.only("channel")
        return DectrisFrames(address=_tcp(address, 31001), channel=address.options.get("channel", "threshold_1"))
    raise _unknown(address, "dectris, pva, swmr")


def positions_at(text: str) -> tuple[Companion, Stream]:
    """The positions at an address, and how they belong to frames."""
    address = parse(text)
    what = Companion(name="positions", width=2, samples=address.whole("samples", 1), gap=address.whole("gap", 3))
    if address.scheme == "zmq":
        address.only("y", "x", "socket", *_OF_POSITIONS)
        columns = address.needed("y"), address.needed("x")
        return what, PandaPositions(
            address=_tcp(address),
            columns=columns,
            scale=address.scale(),
            socket=address.options.get("socket", "pull"),
        )
    raise _unknown(address, "zmq, pva, swmr")


def motion_at(text: str) -> Motion:
    """The motion at an address."""
    address = parse(text)
    if address.scheme == "zmq":
        address.only()
        return ZmqMotion(address=_tcp(address))
    raise _unknown(address, "zmq, pva")


def _tcp(address: Address, port: int | None = None) -> str:
    host, _, given = address.place.partition(":")
    if not (given or port) or (given and not given.isdigit()):
        raise ValueError(f"{address.text}: found no port, expected HOST:PORT")
    return f"tcp://{host}:{given or port}"


def _unknown(address: Address, known: str) -> ValueError:
    return ValueError(f"{address.text}: found the protocol {address.scheme!r}, expected one of {known}")
