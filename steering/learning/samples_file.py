"""The labelled frames of a rank in a file: those to train on and those held out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from steering.learning.samples import Row, Samples, ScanSamples
from steering.learning.tensor_file import TensorFile, TensorWriter

KIND = "labelled frames"
MOST_BYTES = 8 * 2**30
"""Of one file that is read: labelled frames are held in memory."""
_FIELDS = {"counts": 2, "amplitude": 2, "phase": 2, "stratum": 0, "identity": 0}
"""Of a sample, with the axes of each."""
_KINDS = ("train", "held_out")


@dataclass(frozen=True)
class SamplesCut:
    """The labelled frames of a rank at one moment. Rows are shared with the rank, which replaces them and never changes
    them."""

    scans: dict[str, ScanSamples]
    scan: str | None
    rng: dict[str, Any]

    @classmethod
    def of(cls, samples: Samples) -> SamplesCut:
        """As they are now."""
        scans = {
            name: ScanSamples(dict(scan.train), dict(scan.held_out), dict(scan.residual), scan.over)
            for name, scan in samples.scans.items()
        }
        return cls(scans, samples.scan, dict(samples.rng.bit_generator.state))

    def write(self, path: Path) -> int:
        """Write them to a file, whole or not at all; returns its bytes. Raises OSError."""
        tensors: dict[str, Any] = {}
        for number, scan in enumerate(self.scans.values()):
            tensors[f"{number}.given"] = (torch.int64, (len(scan.residual),))
            tensors[f"{number}.residual"] = (torch.float64, (len(scan.residual),))
            for kind in _KINDS:
                rows = getattr(scan, kind)
                tensors[f"{number}.{kind}"] = (torch.int64, (len(rows),))
                for name, value in next(iter(rows.values()), {}).items():
                    tensors[f"{number}.{kind}.{name}"] = (value.dtype, (len(rows), *value.shape))
        scalars = {
            "kind": KIND,
            "scans": list(self.scans),
            "over": [scan.over for scan in self.scans.values()],
            "scan": self.scan,
            "rng": self.rng,
        }
        with TensorWriter(path, tensors, scalars) as file:
            for number, scan in enumerate(self.scans.values()):
                file.write_tensor(f"{number}.given", torch.tensor(list(scan.residual), dtype=torch.int64))
                residual = torch.tensor(list(scan.residual.values()), dtype=torch.float64)
                file.write_tensor(f"{number}.residual", residual)
                for kind in _KINDS:
                    _write_rows(file, f"{number}.{kind}", getattr(scan, kind))
            return file.finish()


def write_held_out(scans: Mapping[str, dict[int, Row]], path: Path) -> int:
    """Write held-out frames alone, by scan and frame id; returns the bytes. Raises OSError."""
    held = {name: ScanSamples(held_out=rows) for name, rows in scans.items()}
    return SamplesCut(held, None, dict(np.random.PCG64(0).state)).write(path)


def _write_rows(file: TensorWriter, prefix: str, rows: dict[int, Row]) -> None:
    file.write_tensor(prefix, torch.tensor(list(rows), dtype=torch.int64))
    for place, row in enumerate(rows.values()):
        for name, value in row.items():
            file.write_tensor(f"{prefix}.{name}", value[None], place)


def read_samples(path: Path, *, most_bytes: int = MOST_BYTES) -> SamplesCut:
    """What `write` wrote. Raises OSError, and ValueError for a file that is damaged or not ours."""
    with TensorFile(path, KIND) as file:
        scalars = file.scalars
        names, over = scalars.get("scans") or [], scalars.get("over")
        if not _strings(names) or not isinstance(over, list) or len(over) != len(names):
            raise ValueError(f"found {path} without the names of its scans, expected a file that steering wrote")
        there = sum(place.nbytes for place in file.places.values())
        if there > most_bytes:
            raise ValueError(f"found {there} bytes in the tensors of {path}, expected {most_bytes} at most")
        scans = {name: _scan(file, number, bool(over[number])) for number, name in enumerate(names)}
        if scalars.get("scan") not in (None, *names):
            raise ValueError(f"found an unknown scan as the present one of {path}, expected one of its scans")
        return SamplesCut(scans, scalars.get("scan"), checked_rng(scalars.get("rng")))


def _scan(file: TensorFile, number: int, over: bool) -> ScanSamples:
    given = file.numbers(f"{number}.given", (None,)).tolist()
    if len(file.place(f"{number}.residual", torch.float64, len(given)).shape) != 1:
        raise ValueError(f"found residuals of several axes in {file.path}, expected one for each frame")
    residual = file.tensor(f"{number}.residual").tolist()
    found = ScanSamples(residual=dict(zip(given, residual, strict=True)), over=over)
    for kind in _KINDS:
        frames = file.numbers(f"{number}.{kind}", (None,)).tolist()
        fields = {}
        for name, axes in _FIELDS.items() if frames else ():
            place = file.place(f"{number}.{kind}.{name}", rows=len(frames))
            if len(place.shape) != 1 + axes:
                raise ValueError(f"found {name!r} of shape {place.shape} in {file.path}, expected {1 + axes} axes")
            fields[name] = file.tensor(f"{number}.{kind}.{name}")
        rows = getattr(found, kind)
        for row, frame in enumerate(frames):
            rows[frame] = {name: value[row].clone() for name, value in fields.items()}
    return found


def checked_rng(state: Any) -> dict[str, Any]:
    """A state of numpy's default generator, from outside. Raises ValueError for anything else."""
    try:
        probe = np.random.PCG64()
        probe.state = state
        found: dict[str, Any] = dict(probe.state)
    except (ValueError, TypeError, KeyError, OverflowError, AttributeError) as error:
        raise ValueError(f"found no state of a random generator ({error}), expected numpy's PCG64") from None
    return found


def _strings(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(v, str) for v in values) and len(set(values)) == len(values)
