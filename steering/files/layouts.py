"""The layouts of recorded scans in HDF5: where each keeps what, an entry each.

Names and units are those of the table in the documentation of the formats; a unit that a file says goes before the one
given here. Paths may have a * (every member that matches, in the order of the numbers in their names), and end in
@attribute. Where several are given the first that is there counts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class At:
    """Where a value may be, and its unit where the file says none."""

    paths: tuple[str, ...] = ()
    unit: str = "m"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where a kind of file keeps a scan."""

    name: str
    frames: tuple[str, ...]
    amplitude: bool = False
    """The frames are square roots of counts."""
    positions: At = At()
    """One array (n, 2 or 3), or (2 or 3, n)."""
    order: str = "xy"
    """Of the first two columns of positions."""
    x: At = At()
    """Or two arrays of n values each."""
    y: At = At()
    numbers: tuple[str, ...] = ()
    """Which frame each position is of, from 0; else they are in the frames' order."""
    angle: At = At(unit="degree")
    """By which the stage that scans along x is turned about the vertical axis, so that the beam sees x shortened."""
    other_beyond: float | None = None
    """Beyond so many degrees the stage scans along the beam's axis of 0 degrees in place of x."""
    wavelength: At = At()
    energy: At = At(unit="eV")
    distance: At = At()
    pixel: At = At()
    """Pitch of a detector pixel along x."""
    pixel_y: At = At()
    object_pixel: At = At()
    """Along x, where a file keeps this in place of wavelength, distance and detector pixel."""
    object_pixel_y: At = At()
    mask: tuple[str, ...] = ()
    """Of all frames (y, x), or an image for each."""
    mask_rule: str = "cxi"
    """`cxi`: the bad bits of CXI; `bad`: not 0 is bad; `good`: not 0 is good."""
    probe: tuple[str, ...] = ()
    dark: tuple[str, ...] = ()
    """What frames read without light."""
    pair: tuple[str, str] | None = None
    """Ends of the names of two files: frames in the first, all else in the second."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A text file of positions that a beamline writes beside its frames: rows of numbers, one or several of a frame."""

    name: str
    header: tuple[str, ...] = ()
    """Names that its columns have; empty: it has none, and columns are counted."""
    columns: int = 0
    """Of a table without names, or more."""
    y: str | int
    x: str | int
    frame: str | int
    """Column with the frame's number; rows of one frame are averaged."""
    unit: str
    signs: tuple[int, int] = (1, 1)
    """Of y and x, to be positions of the probe on the sample."""
    angle: At = At(unit="degree")
    """Where the frames' file says by how much the stage is turned, see `Layout`."""


TABLES = (
    Table(
        name="APS LYNX, Orchestra",
        header=("DataPoint", "Average_x_st_fzp", "Average_y_st_fzp"),
        y="Average_y_st_fzp",
        x="Average_x_st_fzp",
        frame="DataPoint",
        unit="um",
        signs=(-1, -1),
    ),
    Table(
        name="APS LYNX, softGlueZynq, every sample",
        header=("DataPoint", "x_st_fzp", "y_st_fzp", "Detector_Count"),
        y="y_st_fzp",
        x="x_st_fzp",
        frame="Detector_Count",
        unit="um",
        signs=(-1, -1),
    ),
    Table(
        name="APS LYNX, softGlueZynq",
        header=("Detector_Count", "Average_x_st_fzp", "Average_y_st_fzp"),
        y="Average_y_st_fzp",
        x="Average_x_st_fzp",
        frame="Detector_Count",
        unit="um",
        signs=(-1, -1),
    ),
    # y by the encoder; by the interferometer it is column 2, with its own sign: FILE:/1,/2[nm] has no frames' numbers
    Table(
        name="APS Velociprobe",
        columns=8,
        y=5,
        x=1,
        frame=7,
        unit="nm",
        signs=(-1, 1),
        angle=At(("entry/sample/goniometer/chi",), "degree"),
    ),
)
"""In the order in which they are tried."""

_CXI = Layout(
    name="CXI",
    frames=("entry_1/data_1/data", "entry_1/instrument_1/detector_1/data"),
    positions=At(
        (
            "entry_1/data_1/translation",
            "entry_1/sample_1/geometry_1/translation",
            "entry_1/instrument_1/detector_1/translation",
        )
    ),
    wavelength=At(
        (
            "entry_1/instrument_1/beam_1/incident_wavelength",
            "entry_1/instrument_1/beam_1/wavelength",
            "entry_1/instrument_1/source_1/wavelength",
        )
    ),
    # Of the machine is source_1/energy in NXcxi_ptycho, of the photons in CXI: what is said of the beam goes first.
    energy=At(
        tuple(
            f"entry_1/instrument_1/{name}"
            for name in ("beam_1/incident_beam_energy", "beam_1/incident_energy", "beam_1/energy", "source_1/energy")
        ),
        "J",
    ),
    distance=At(("entry_1/instrument_1/detector_1/distance",)),
    pixel=At(("entry_1/instrument_1/detector_1/x_pixel_size",)),
    pixel_y=At(("entry_1/instrument_1/detector_1/y_pixel_size",)),
    mask=("entry_1/instrument_1/detector_1/mask",),
    dark=("entry_1/instrument_1/detector_1/data_dark",),
    probe=tuple(
        f"entry_1/instrument_1/{name}" for name in ("source_1/probe", "source_1/illumination", "detector_1/probe")
    ),
)
_NEXUS = Layout(
    name="NeXus (Eiger master, areaDetector)",
    frames=("entry/data/data", "entry/data/data_*", "entry/instrument/detector/data", "entry/detector/data"),
    x=At(("entry/sample/x", "entry/data/x", "entry/instrument/NDAttributes/SampleX"), "m"),
    y=At(("entry/sample/y", "entry/data/y", "entry/instrument/NDAttributes/SampleY"), "m"),
    wavelength=At(
        ("entry/instrument/beam/incident_wavelength", "entry/instrument/monochromator/wavelength"), "Angstrom"
    ),
    energy=At(
        (
            "entry/instrument/detector/detectorSpecific/photon_energy",
            "entry/instrument/beam/incident_energy",
            "entry/instrument/monochromator/energy",
        ),
        "eV",
    ),
    distance=At(("entry/instrument/detector/detector_distance", "entry/instrument/detector/distance")),
    pixel=At(("entry/instrument/detector/x_pixel_size",)),
    pixel_y=At(("entry/instrument/detector/y_pixel_size",)),
    mask=("entry/instrument/detector/detectorSpecific/pixel_mask", "entry/instrument/detector/pixel_mask"),
    mask_rule="bad",
)

LAYOUTS = (
    Layout(
        name="ptypy .ptyd",
        frames=("chunks/*/data",),
        positions=At(("chunks/*/positions",)),
        order="yx",
        energy=At(("meta/energy", "info/energy"), "keV"),
        distance=At(("meta/distance", "info/distance")),
        pixel=At(("meta/psize", "info/psize")),
        mask=("chunks/*/weights", "meta/weight2d", "info/weight2d", "common/weight2d"),
        mask_rule="good",
    ),
    Layout(
        name="dp/para pair",
        frames=("dp",),
        x=At(("probe_position_x_m",)),
        y=At(("probe_position_y_m",)),
        numbers=("probe_position_indexes",),
        wavelength=At(("@wavelength_m", "wavelength_m")),
        object_pixel=At(("object@pixel_width_m", "probe@pixel_width_m")),
        object_pixel_y=At(("object@pixel_height_m", "probe@pixel_height_m")),
        probe=("probe",),
        pair=("_dp", "_para"),
    ),
    Layout(
        name="HXN",
        frames=("diffamp",),
        amplitude=True,
        positions=At(("points",), "um"),
        angle=At(("angle",), "degree"),
        other_beyond=45.0,
        wavelength=At(("lambda_nm",), "nm"),
        distance=At(("z_m",)),
        pixel=At(("ccd_pixel_um",), "um"),
        probe=("probe",),
    ),
    Layout(
        name="NanoMAX",
        frames=tuple(
            f"entry/measurement/{name}/frames" for name in ("eiger1m", "eiger4m", "eiger500k", "pilatus", "merlin")
        ),
        x=At(("entry/measurement/pseudo/x",), "um"),
        y=At(("entry/measurement/pseudo/y",), "um"),
        energy=At(("entry/snapshots/post_scan/energy", "entry/snapshots/pre_scan/energy"), "eV"),
    ),
    # GDA names a scan's motors as the user does: positions=:/entry/.../x,/entry/.../y[mm] says which they are.
    replace(
        _NEXUS,
        name="Diamond p45 (GDA)",
        frames=tuple(f"entry/{name}/data" for name in ("merlin", "eiger", "excalibur", "medipix", "mandelbrot")),
        x=At(),
        y=At(),
    ),
    # Its numbers are attributes of the frames; where it keeps them as NeXus does, energies are in keV all the same.
    replace(
        _NEXUS,
        name="APS LYNX",
        frames=("entry/data/eiger_4",),
        energy=At(("entry/data/eiger_4@Photon_energy_kev", *_NEXUS.energy.paths), "keV"),
        distance=At(("entry/data/eiger_4@Detector_distance_m", *_NEXUS.distance.paths)),
        pixel=At(("entry/data/eiger_4@Pixel_size", *_NEXUS.pixel.paths)),
        pixel_y=At(("entry/data/eiger_4@Pixel_size", *_NEXUS.pixel_y.paths)),
    ),
    replace(
        _CXI,
        name="NXcxi_ptycho (Diamond)",
        frames=("entry_1/data/data",),
        positions=At(),
        x=At(("entry_1/data/x",)),
        y=At(("entry_1/data/y",)),
        energy=replace(_CXI.energy, unit="eV"),
        mask_rule="bad",
        mask=("entry_1/instrument_1/detector_1/mask", "entry_1/instrument_1/detector_1/pixel_mask"),
    ),
    _CXI,
    _NEXUS,
)
"""In the order in which they are tried."""

WRITTEN = ("entry/uniqueKeys", "entry/solstice_scan/keys/uniqueKeys", "entry/diamond_scan/keys/uniqueKeys")
"""Integers, one for each frame, 0 where it was not written: of a scan that was ended early."""
