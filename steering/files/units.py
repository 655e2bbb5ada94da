"""Units as people spell them. None is assumed where a file says one; an unknown one is refused with the list."""

from __future__ import annotations

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
KINDS = {"length": (_LENGTHS, "m, mm, um, nm, Angstrom, pm"), "energy": (_ENERGIES, "J, eV, keV")}
PLANCK_TIMES_C = 6.62607015e-34 * 299792458.0
"""Joule metres: wavelength = this / photon energy."""
ENERGY_TO_WAVELENGTH = PLANCK_TIMES_C / 1.602176634e-19
"""eV metres."""


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
    """What a value in this unit is multiplied with to be in metres or joules. kind: "length" or "energy".

    Raises ValueError for an unknown unit.
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
