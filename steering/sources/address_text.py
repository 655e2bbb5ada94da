"""An address of a live stream as text: its scheme, place and options. What they may be says `addresses`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl

from steering.sources.streams import POSITIONS
from steering.sources.tape import addresses_in

_UNITS = {"m": 1.0, "mm": 1e-3, "um": 1e-6, "nm": 1e-9, "px": 1.0}
FRAMES_AT = ("dectris", "pva", "swmr", "bluesky", "play")
"""Schemes of frames."""


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


def is_live(text: str) -> bool:
    """Whether it is meant as an address of frames, and not as a file."""
    return text.partition(":")[0] in FRAMES_AT


def says_optics(text: str) -> bool:
    """Whether frames at an address may say wavelength, distance and pixel when a scan begins."""
    return parse(text).scheme in ("dectris", "play")


def parse(text: str) -> Address:
    """The parts of an address. Raises ValueError for what is none."""
    before, _, options = text.partition("?")
    scheme, colon, place = before.partition(":")
    if not colon or not place.removeprefix("//"):
        raise ValueError(f"found the address {text!r}, expected one like dectris://HOST:31001, pva://PV or swmr:FILE")
    # A plus in a file's name is a plus: parse_qsl would make it a space.
    pairs = parse_qsl(options.replace("+", "%2B"), keep_blank_values=True)
    return Address(text=text, scheme=scheme, place=place.removeprefix("//"), options=dict(pairs))


def recorded_at(text: str, stream: str) -> Address:
    """The address of a stream, of a recording that at which it was recorded. Raises ValueError for what is none."""
    address, known = parse(text), set[str]()
    while address.scheme == "play" and address.place not in known and Path(address.place).is_file():
        known.add(address.place)
        address = parse(addresses_in(Path(address.place)).get(stream, address.text))
    return address


def unit_of(positions: str) -> str:
    """The unit in which positions at an address are counted, also of recorded ones; of these `px` may be said where
    their own address says none."""
    address, recorded = parse(positions), recorded_at(positions, POSITIONS).options.get("unit")
    said = address.options.get("unit")
    if address.scheme == "play" and said is not None and (said != "px" or recorded not in (None, "px")):
        raise ValueError(
            f"{positions}: found unit={said} of positions that were recorded in {recorded or 'm'}, expected that it is "
            "left out, or px where they were recorded without a unit"
        )
    return said or recorded or "m"
