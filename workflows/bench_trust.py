"""Does trust find wrong predictions? Shifts of sample, material, flux and defocus, judged without the truth.

    steering run workflows/bench_trust.py [--scans 120] [--frames 200] [--steps 500]

A network learns some samples from labelled frames and is published as a campaign publishes it. Simulated scans then
come in chunks, as from a beamline: of these samples at new positions and with new noise, and of samples that it was
not trained on. Bad frames are those whose phase error is above twice the median of the known samples.
"""

import argparse
import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from skimage import data, filters

from measures.patches import patches_of
from pictures.trust import Shift, trust_picture
from steering.campaign import CampaignSettings, DriftRaised, PredictionReady
from steering.campaign.drift import DriftTest, lowest_u
from steering.inference.evaluate import patch_phase_error
from steering.learning import Labels, MeetingPoint, Rank, Reconstruction, TrainerSettings
from steering.learning.strategies import Incremental
from steering.models import ModelStore, ProbeFirst
from steering.ptychography import (
    BAD,
    Canvas,
    Stitcher,
    Verdict,
    above_floor,
    extract_patches,
    far_field_residual,
    judge,
    neighbour_offset,
    patch_weight,
    poisson_floor,
    share_as_bad,
    simulate,
    zone_plate,
)
from steering.ptychography.device import add_device, find_device
from steering.records import Field, ModelVersion
from steering.runner import RunFolder
from steering.sources import sample

OFFSETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0)  # radians planted on a patch
LEAST_OFFSET = 0.3  # from which on they must be found
WINDOW, PATCH, DEFOCUS, COUNTS, CHUNK = 64, 40, 50.0, 1e5, 10
REACH = 64.0
CANVAS = Canvas.around(Field(-REACH, REACH, -REACH, REACH), WINDOW)
BEFORE = 32  # frames of what the network knows before each shift
GROWN = 1.5  # median error over that of the known frames, from which on an alarm must come


@dataclass(frozen=True)
class Scene:
    """What is in the beam: an object on CANVAS, the defocus, and photons relative to those of the training."""

    object: NDArray[np.complex64]
    flux: float = 1.0
    defocus: float = DEFOCUS


@dataclass(frozen=True)
class Scan:
    """Frames that were predicted and judged, a row each, and the image that the last of them make.

    above: residual above the Poisson floor. image: number of the image, and so of the scan; another object, another.
    """

    residual: NDArray
    above: NDArray
    error: NDArray
    verdict: Verdict
    image: NDArray[np.int64]
    patches: NDArray
    positions: NDArray
    stitcher: Stitcher


def probe_of(scene: Scene) -> NDArray[np.complex64]:
    """The beam at the scene's defocus."""
    return zone_plate(WINDOW, scene.defocus, aperture=0.52, counts=COUNTS)


KNOWN = ("gravel", "brick", "grass", "pores")
USUAL = {"phase": -1.2, "absorption": 0.2}


def samples(names: Sequence[str], *, phase: float, absorption: float) -> list[Scene]:
    """scikit-image's pictures by name as samples of one material."""
    pores = filters.gaussian(data.binary_blobs(256, blob_size_fraction=0.08, rng=1).astype(float), 1)
    pictures = (pores if name == "pores" else getattr(data, name)() for name in names)
    things = (sample(image, phase=phase, absorption=absorption, size=CANVAS.shape[0]) for image in pictures)
    return [Scene(thing) for thing in things]


def shifts(known: list[Scene]) -> dict[str, list[Scene]]:
    """By name, what replaces each of the known scenes."""
    return {
        "none": known,
        "new sample": samples(("coins", "text", "camera", "coffee"), **USUAL),
        "stronger material": samples(KNOWN, phase=-2.8, absorption=0.1),
        "material of the other sign": samples(KNOWN, phase=1.8, absorption=0.1),
        "flux x10": [replace(scene, flux=10.0) for scene in known],
        "flux x0.1": [replace(scene, flux=0.1) for scene in known],
        "defocus x1.1": [replace(scene, defocus=1.1 * DEFOCUS) for scene in known],
        "defocus x1.5": [replace(scene, defocus=1.5 * DEFOCUS) for scene in known],
    }


def measure(scene: Scene, positions: NDArray, rng: np.random.Generator) -> NDArray[np.uint16]:
    """Frames at positions (n, 2), object pixels."""
    expected = simulate(scene.object, probe_of(scene), CANVAS, positions)
    return np.minimum(rng.poisson(scene.flux * expected), 65535).astype(np.uint16)


def learn(folder: RunFolder, known: list[Scene], options: argparse.Namespace) -> None:
    """Train on frames of all known scenes, with the truth for labels; publish a version for each as the newest."""
    torch.manual_seed(options.seed)
    network = ProbeFirst(window=WINDOW, patch=PATCH, width=options.width)
    probe = probe_of(known[0])
    network.optics.set(probe)
    settings = {"batch": 32, "candidates": 0, "representatives": 0, "learning_rate": 2e-3}
    settings = TrainerSettings(**settings, seed=options.seed, device=options.device)
    rank, meeting = Rank(network, Incremental(Reconstruction(patch_weight(probe, PATCH))), settings), MeetingPoint()
    rank.join(meeting.rendezvous, rank=0, ranks=1)
    rng = np.random.default_rng(options.seed)
    labels = [labelled(scene, str(number), rng, options) for number, scene in enumerate(known)]
    names = ("frame_id", "counts", "amplitude", "phase", "residual", "held_out")
    whole = {name: np.concatenate([getattr(part, name) for part in labels]) for name in names}
    whole["frame_id"] = np.arange(len(whole["frame_id"]))
    asyncio.run(rank.receive(replace(labels[0], scan="all", **whole)))
    rank.fit("all", options.steps)
    for number, part in enumerate(labels):
        asyncio.run(rank.receive(part))
        fitted = rank.fit(part.scan, 0)
        version = ModelVersion(
            number=number,
            network="ProbeFirst",
            hyperparameters=network.hyperparameters,
            validation_residual=fitted.residual,
            validation_residuals=fitted.residuals,
            noise_share=fitted.noise_share,
            validation_offsets=fitted.offsets,
        )
        rank.publish(folder.models, version)
    rank.close()


def labelled(scene: Scene, name: str, rng: np.random.Generator, options: argparse.Namespace) -> Labels:
    """Frames of a scene with the truth for labels; `options.validation` of them are held out."""
    where = rng.uniform(-REACH, REACH, (options.learnt, 2))
    patches = extract_patches(scene.object, CANVAS, where, PATCH)
    return Labels(
        scan=name,
        stratum=0,
        frame_id=np.arange(len(where)),
        counts=measure(scene, where, rng),
        amplitude=np.abs(patches),
        phase=np.angle(patches),
        residual=np.zeros(len(where), np.float32),
        held_out=np.arange(len(where)) < options.validation,
        probe=probe_of(scene),
        mask=np.zeros((WINDOW, WINDOW), bool),
    )


class Judge:
    """Predicts and judges as the predictor does, with one version."""

    def __init__(self, store: ModelStore, version: ModelVersion, device: torch.device) -> None:
        self.network, self.version = store.load(version.number).to(device), version
        self.probe = self.network.optics.modes().cpu().numpy()
        self.weight = patch_weight(self.probe, PATCH)

    def scan(self, parts: Sequence[tuple[Scene, int]], rng: np.random.Generator, *, raster: bool = False) -> Scan:
        """Frames of each scene in turn, all in one image, at random positions or row by row."""
        rows: list[tuple[NDArray, ...]] = []
        stitcher, before, image = Stitcher(CANVAS, self.weight), parts[0][0], 0
        for scene, frames in parts:
            if scene.object is not before.object:
                stitcher, image = Stitcher(CANVAS, self.weight), image + 1
            before = scene
            order = by_rows(frames, rng) if raster else rng.uniform(-REACH, REACH, (frames, 2))
            for start in range(0, frames, CHUNK):
                where = order[start : start + CHUNK]
                counts = measure(scene, where, rng)
                patches = patches_of(self.network, counts)
                stitcher.add(patches, where)
                error = patch_phase_error(patches, extract_patches(scene.object, CANVAS, where, PATCH), self.weight)
                offset = neighbour_offset(patches, where, stitcher)
                rows.append((counts, where, patches, offset, error, np.full(len(where), image)))
        counts, where, patches, offset, error, images = (np.concatenate(one) for one in zip(*rows, strict=True))
        residual = far_field_residual(patches, counts, self.probe)
        above = above_floor(residual, poisson_floor(counts), self.version.noise_share)
        verdict = judge(counts, residual, offset, version=self.version)
        return Scan(residual, above, error, verdict, images, patches, where, stitcher)

    def alarm(self, scan: Scan, *, since: int = 0) -> int | None:
        """The number of frames from frame number `since` until drift is raised: 1 for that frame, None for never.

        What the frames before it raise does not count.
        """
        test = DriftTest(CampaignSettings().drift_window, CampaignSettings().drift_false_alarm)
        for number, (residual, offset) in enumerate(zip(scan.verdict.by_residual, scan.verdict.by_offset, strict=True)):
            event = PredictionReady(
                time=0.0,
                scan=str(scan.image[number]),
                frame_ids=(number,),
                version=self.version.number,
                residual=None,
                trust_by_residual=(float(residual),),
                trust_by_offset=(float(offset),),
                validation_frames=len(self.version.validation_residuals),
            )
            raised = any(isinstance(one, DriftRaised) for one in test.take(event, expected=None))
            if raised and number >= since:
                return number - since + 1
        return None


def by_rows(frames: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """(frames, 2) positions in a raster that fills the field, each slightly displaced."""
    side = int(np.ceil(np.sqrt(frames)))
    line = np.linspace(-REACH, REACH, side)
    grid = np.stack(np.meshgrid(line, line, indexing="ij"), axis=-1).reshape(-1, 2)[:frames]
    return np.clip(grid + rng.uniform(-1, 1, grid.shape), -REACH, REACH)


def planted(judged: Judge, scan: Scan, offsets: Sequence[float]) -> NDArray[np.bool_]:
    """(offset, frame) whether the neighbour test finds a constant phase that is put on one patch, the others as they
    are. Frames without a neighbour are left out."""
    usual, found = np.abs(judged.version.validation_offsets), []
    for number in np.flatnonzero(np.isfinite(scan.verdict.by_offset)):
        patch, where = scan.patches[[number]], scan.positions[[number]]
        scan.stitcher.remove(patch, where)
        row = []
        for offset in offsets:
            turned = patch * np.exp(1j * offset).astype(np.complex64)
            scan.stitcher.add(turned, where)
            offset_found = neighbour_offset(turned, where, scan.stitcher)
            scan.stitcher.remove(turned, where)
            row.append(share_as_bad(np.abs(offset_found), usual)[0] <= BAD)
        scan.stitcher.add(patch, where)
        found.append(row)
    return np.array(found).T


def auc(bad: NDArray[np.bool_], score: NDArray) -> tuple[float, tuple[NDArray, NDArray]]:
    """Area under the receiver operating characteristic, and the curve: false and true positive rates."""
    order = np.argsort(-score, kind="stable")
    true = np.r_[0, np.cumsum(bad[order])] / bad.sum()
    false = np.r_[0, np.cumsum(~bad[order])] / (~bad).sum()
    return float(np.trapezoid(true, false)), (false, true)


def replays(
    judges: Sequence[Judge],
    known: Sequence[Scene],
    then: Sequence[Scene],
    rng: np.random.Generator,
    options: argparse.Namespace,
) -> list[list[Scan]]:
    """For each known scene `options.repeats` scans that begin with it and change to another scene."""
    return [
        [judged.scan([(before, BEFORE), (scene, options.after)], rng) for _ in range(options.repeats)]
        for judged, before, scene in zip(judges, known, then, strict=True)
    ]


def after(rows: Sequence[Sequence[Scan]], name: str) -> NDArray[np.float64]:
    """A column of the frames after the shift, over all scans."""
    return np.concatenate([getattr(scan, name)[BEFORE:] for row in rows for scan in row])


def figures_of(judges: Sequence[Judge], rows: Sequence[Sequence[Scan]], usual: NDArray) -> dict[str, Any]:
    """The figures of a shift, a row for each known scene; usual: the scene's median error without it."""
    return {
        **{name: float(np.median(after(rows, name))) for name in ("error", "residual", "above")},
        "trust": float(np.nanmedian([scan.verdict.trust[BEFORE:] for row in rows for scan in row])),
        "growth": [float(np.median(after([row], "error")) / u) for row, u in zip(rows, usual, strict=True)],
        "frames_to_alarm": [
            [judged.alarm(scan, since=BEFORE) for scan in row] for judged, row in zip(judges, rows, strict=True)
        ],
    }


def false_alarms(
    judges: Sequence[Judge], known: Sequence[Scene], rng: np.random.Generator, options: argparse.Namespace
) -> dict[str, float]:
    """Share of scans of known samples in which drift is raised, by the order of their positions."""
    share = {}
    for order, scans in (("random", options.scans), ("raster", max(1, options.scans // 3))):
        raised = []
        for number in range(scans):
            judged, scene = judges[number % len(judges)], known[number % len(known)]
            scan = judged.scan([(scene, options.frames)], rng, raster=order == "raster")
            raised.append(judged.alarm(scan) is not None)
        share[order] = float(np.mean(raised))
    return share


def main(folder: RunFolder, arguments: list[str]) -> None:
    """Learn, measure, and write the figures and the picture."""
    options = _options(arguments)
    known = samples(KNOWN, **USUAL)
    learn(folder, known, options)
    store = ModelStore(folder.models)
    judges = [Judge(store, version, find_device(options.device)) for version in store.versions()]
    rng = np.random.default_rng(options.seed + 1)
    rows = {name: replays(judges, known, then, rng, options) for name, then in shifts(known).items()}
    usual = np.array([np.median(after([row], "error")) for row in rows["none"]])
    kinds = {name: figures_of(judges, scans, usual) for name, scans in rows.items()}
    worse = 2 * float(np.median(after(rows["none"], "error")))
    bad = np.concatenate([after(scans, "error") for scans in rows.values()]) > worse
    curves = {
        title: auc(bad, np.concatenate([after(scans, name) for scans in rows.values()]))
        for title, name in (("above the Poisson floor", "above"), ("as it is", "residual"))
    }
    quiet = false_alarms(judges, known, rng, options)
    found = [planted(judged, row[0], OFFSETS) for judged, row in zip(judges, rows["none"], strict=True)]
    share = np.concatenate(found, axis=1).mean(1)
    delays = [
        delay
        for kind in kinds.values()
        for row, growth in zip(kind["frames_to_alarm"], kind["growth"], strict=True)
        for delay in row
        if growth >= GROWN
    ]
    figures = {
        "auc_bad_frame": curves["above the Poisson floor"][0],
        "auc_bad_frame_as_it_is": curves["as it is"][0],
        "frames_to_alarm": {
            "max": None if None in delays else max(delays, default=None),  # None: in some scan there was none
            "missed": delays.count(None),
            "scans": len(delays),
        },
        "false_alarms_per_100_scans": 100 * quiet["random"],
        "false_alarms_per_100_raster_scans": 100 * quiet["raster"],
        "offset_caught_share": float(np.mean(share[np.array(OFFSETS) >= LEAST_OFFSET])),
        "offset_caught_by_radians": dict(zip(map(str, OFFSETS), share.tolist(), strict=True)),
        "shifts": kinds,
        "settings": vars(options),
    }
    folder.write_summary(figures)
    folder.write_file("trust.png", drawn(judges, rows, worse, curves, share))
    print(
        f"bad frames: AUC {figures['auc_bad_frame']:.3f}; alarm after at most {figures['frames_to_alarm']['max']} "
        f"frames in {len(delays)} scans; {figures['false_alarms_per_100_scans']:.1f} false alarms in 100 scans; "
        f"{100 * figures['offset_caught_share']:.0f} % of planted offsets found"
    )


def drawn(
    judges: Sequence[Judge],
    rows: dict[str, list[list[Scan]]],
    worse: float,
    curves: dict[str, tuple[float, tuple[NDArray, NDArray]]],
    share: NDArray,
) -> bytes:
    """The picture."""
    pictured = [
        Shift(
            name=name,
            residual=after(scans, "above"),
            error=after(scans, "error"),
            trust=np.array([scan.verdict.by_residual for row in scans for scan in row]),
        )
        for name, scans in rows.items()
    ]
    n, m = CampaignSettings().drift_window, len(judges[0].version.validation_residuals)
    return trust_picture(
        pictured,
        bad=worse,
        roc={title: (*curve, area) for title, (area, curve) in curves.items()},
        since=BEFORE,
        window=n,
        lowest=lowest_u(n, m, CampaignSettings().drift_false_alarm / 4) / (n * m),
        caught=(OFFSETS, share.tolist()),
    )


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench_trust.py", description=__doc__.split("\n")[0])
    parser.add_argument("--scans", type=int, default=120, help="of known samples, to count false alarms (120)")
    parser.add_argument("--frames", type=int, default=100, help="of each of them (100)")
    parser.add_argument("--repeats", type=int, default=5, help="scans of each shift and scene (5)")
    parser.add_argument("--after", type=int, default=40, help="frames of a scan after its shift (40)")
    parser.add_argument("--steps", type=int, default=600, help="optimiser steps of the network, 32 frames each (600)")
    parser.add_argument("--learnt", type=int, default=600, help="labelled frames of each scene (600)")
    parser.add_argument("--validation", type=int, default=60, help="of them held out (60)")
    parser.add_argument("--width", type=int, default=24, help="of the network (24)")
    parser.add_argument("--seed", type=int, default=0)
    add_device(parser)
    return parser.parse_args(arguments)
