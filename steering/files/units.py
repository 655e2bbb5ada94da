"""Units as people spell them. None is assumed where a file says one; an unknown one is refused with the list.

A number whose unit was taken wrongly is off by orders of magnitude: what X-ray ptychography can be is kept here, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable

_LENGTHS = {
    "m": 1.0, "meter": 1.0, "metre": 1.0,
    "cm": 1e-2, "centimeter": 1e-2, "centimetre": 1e-2,
    "mm": 1e-3, "millimeter": 1e-3, "millimetre": 1e-3,
    "um": 1e-6, "micron": 1e-6, "micrometer": 1e-6, "micrometre": 1e-6, "microns": 1e-6,
    "nm": 1e-9, "nanometer": 1e-9, "nanometre": 1e-9,
    "angstrom": 1e-10, "ang": 1e-10, "a": 1e-10, "\u00e5": 1e-10, "\u00e5ngstr\u00f6m": 1e-10,
    "pm": 1e-12, "picometer": 1e-12, "picometre": 1e-12,
}  # fmt: skip
_ENERGIES = {
    "j": 1.0, "joule": 1.0,
    "ev": 1.602176634e-19, "electronvolt": 1.602176634e-19, "electron volt": 1.602176634e-19,
    "kev": 1.602176634e-16, "kiloelectronvolt": 1.602176634e-16,
}  # fmt: skip
_ANGLES = {"rad": 1.0, "radian": 1.0, "deg": math.pi / 180, "degree": math.pi / 180, "\u00b0": math.pi / 180}
KINDS = {
    "length": (_LENGTHS, "m, mm, um, nm, Angstrom, pm"),
    "energy": (_ENERGIES, "J, eV, keV"),
    "angle": (_ANGLES, "degree, rad"),
}
PLANCK_TIMES_C = 6.62607015e-34 * 299792458.0
"""Joule metres: wavelength = this / photon energy."""
ENERGY_TO_WAVELENGTH = PLANCK_TIMES_C / 1.602176634e-19
"""eV metres."""
_LEAST_WAVELENGTH, _MOST_WAVELENGTH = 1e-12, 2e-8
_POSSIBLE = {
    "wavelength": ("a wavelength", "length", _LEAST_WAVELENGTH, _MOST_WAVELENGTH, "give the energy in eV (--energy)"),
    "energy": (
        "a photon energy",
        "energy",
        PLANCK_TIMES_C / _MOST_WAVELENGTH,
        PLANCK_TIMES_C / _LEAST_WAVELENGTH,
        "give it in eV (--energy)",
    ),
    "distance": ("a distance", "length", 5e-3, 100.0, "give it in metres (--distance)"),
    "detector_pixel": ("a detector pixel", "length", 5e-7, 1e-2, "give it in metres (--pixel)"),
    "object_pixel": ("an object pixel", "length", 1e-12, 1e-5, "repair the file"),
}
"""What is called so, its kind, the least and the most it can be in metres or joules, and what to do.

From hard X-rays down to EUV light at 13.5 nm, from detectors centimetres behind the sample to those at the end of a
hall, with pixels that optics make smaller or binning makes larger.
"""


def decoded(text: object) -> str:
    """A unit or another short text of a file, whatever it is kept as: bytes in UTF-8 or Latin-1, str, arrays of one."""
    while hasattr(text, "tolist"):
        text = text.tolist()
    while isinstance(text, list):
        text = text[0] if text else ""
    if isinstance(text, str):
        text = text.encode("utf-8", "surrogateescape")
    if not isinstance(text, bytes):
        return str(text)
    try:
        return text.decode("utf-8").strip("\0 ")
    except UnicodeDecodeError:
        return text.decode("latin-1").strip("\0 ")


def factor(unit: object, kind: str, what: str) -> float:
    """What a value in this unit is multiplied with to be in metres, joules or radians.

    kind: "length", "energy" or "angle". Raises ValueError for an unknown unit.
    """
    text = decoded(unit)
    known, listed = KINDS[kind]
    # Either mu of Unicode, and the sign of Angstrom as a letter; capitals have no meaning here: MM is mm.
    plain = text.strip().casefold().replace("\u03bc", "u").replace("\u00b5", "u").replace("\u212b", "\u00e5")
    for name in (plain, plain.rstrip("s")):
        if name in known:
            return known[name]
    raise ValueError(
        f"found {what} in {text[:40]!r}, expected one of {listed}: say the unit where the values are given"
    )


def impossible(name: str, value: float, unit: str, where: str = "") -> str | None:
    """What is wrong with a number of the optics, a sentence that says in which unit it could be; None: it can be.

    name: `wavelength`, `energy` (of the photons), `distance`, `detector_pixel` or `object_pixel`. value: in `unit`.
    where: its place in the file. The sign of a distance says only from where it is counted.
    """
    words, kind, low, high, remedy = _POSSIBLE[name]
    own = factor(unit, kind, name)
    size = abs(value) if name == "distance" else value
    if low <= size * own <= high:
        return None
    likely = could_be(unit, kind, lambda ratio: low <= size * own * ratio <= high)
    hint = f"; it would be in {likely}" if likely else ""
    unit = decoded(unit)
    return (
        f"found {words} of {value:.6g} {unit}{f' ({where})' if where else ''}, expected {low / own:.3g} to "
        f"{high / own:.3g} {unit}{hint}: {remedy}"
    )


def could_be(unit: str, kind: str, fits: Callable[[float], bool]) -> str:
    """The other units than `unit` in which values would fit, as words; empty where there is none.

    fits: whether the values can be when they are so many times larger.
    """
    known, listed = KINDS[kind]
    own = factor(unit, kind, "values")
    names = listed.split(", ")
    return " or ".join(n for n in names if known[n.casefold()] != own and fits(known[n.casefold()] / own))
