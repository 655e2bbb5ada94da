"""Where to measure: the error that each policy leaves over the number of frames and over beam time.

    steering run workflows/bench_steering.py [--sets sparse,dense,recorded] [--seeds 3] [--steps 500] ...

One network per set of samples, trained on others of the kind and then frozen, predicts every frame; the policies differ
only in where they measure, and are given predictions and the live image only. Errors are RMS differences of phase of
the network's stitched image, its global phase and ramp taken out over the whole field, with unseen pixels filled from
around them: over the whole field, and over the features alone. `raster` measures all candidates row by row;
`raster_planned` is one raster for each number of frames, even over the field: it needs that number beforehand.
Equal error is the feature error that the raster's full scan leaves, and a tenth. Policies are compared from
as many frames on as can cover the field once: before that, an empty image is as good as any.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
import torch
from numpy.typing import NDArray
from skimage import data, io

from measures.patches import patches_of
from pictures.policies import errors_picture, seen_picture
from steering.inference.live import Truth, place
from steering.learning import Reconstruction
from steering.models import ProbeFirst
from steering.policies import Adaptive, GradientResidual, Policy, Random, Raster, SpaceFilling, StopRule
from steering.policies.trial import Trial
from steering.ptychography import (
    Canvas,
    Stitcher,
    align,
    beam_diameter,
    extract_patches,
    far_field_residual,
    filled,
    patch_weight,
    rescale_probe,
    simulate,
    zone_plate,
)
from steering.ptychography.device import add_device, find_device
from steering.records import Field, Travel
from steering.runner import RunFolder
from steering.sources import SimulatedBeamline, Stage, line_field, particle_field, read_recording, sample

FRAME_S = 0.02
TRAVEL = Travel(velocity=5700.0, settling=0.01)  # object pixels per second: 50 um/s where a pixel is 8.8 nm
AT_ONCE = 10  # positions of a suggestion; one is always pending while the next is made
EQUAL = 1.1  # of the error that the raster's full scan leaves
DENSE = ("camera", "brick", "grass", "coins")
RATIOS = (1.1, 1.2)  # of the stop rule, its default first

LOOKING = {"travel": TRAVEL, "frame_s": FRAME_S}
POLICIES: dict[str, Callable[[Trial, int], Policy]] = {
    "raster": lambda trial, seed: Raster(trial.where),
    "random": lambda trial, seed: Random(trial.where, seed=seed),
    "space_filling": lambda trial, seed: SpaceFilling(trial.where),
    "gradient_residual": lambda trial, seed: GradientResidual(trial.where, beam=beam_diameter(trial.probe), **LOOKING),
    "adaptive": lambda trial, seed: Adaptive(trial.where, beam=beam_diameter(trial.probe), **LOOKING),
}


@dataclass(frozen=True, eq=False)
class Scan:
    """A sample, and what a frame at each candidate gives."""

    name: str
    object: NDArray[np.complex64]
    """(Y, X) on the trial's canvas."""
    trial: Trial
    area: NDArray[np.bool_]
    """(Y, X) where errors count: what the whole scan illuminates."""
    features: NDArray[np.bool_]
    """(Y, X) where the phase of the object differs from its background's."""

    def image(self, order: NDArray[np.int64]) -> Stitcher:
        """What is seen after these rows."""
        stitcher = Stitcher(self.trial.canvas, self.trial.weight)
        stitcher.add(self.trial.patches[order], self.trial.where[order])
        return stitcher


def sparse_images(size: int, seed: int) -> Iterator[tuple[str, NDArray]]:
    """Samples of which 2 to 15 % have content; those of recorded data where STEERING_DATA names their folder."""
    yield "cell", data.cell()
    yield "lines", line_field(size, lines=5, seed=100 + seed)
    yield "particles", particle_field(size, particles=12, seed=100 + seed)
    if folder := data_folder():
        yield "flakes", io.imread(folder / "object-images" / "sims_fused_full.tif")[:230, :230]
        gold = scipy.io.loadmat(folder / "ptycho-gold-balls-object" / "gold_balls.mat")["obj"]
        phase = -np.angle(gold * np.exp(-1j * np.angle(gold.sum())))
        yield "gold balls", np.clip(phase[113:497, 113:497] - 0.06, 0, 0.3)  # above the reconstruction's noise


def training_images(kind: str, size: int) -> list[NDArray]:
    """Images that the network of a set is trained on: of the same kind, and none of those that it is tested on."""
    if kind == "sparse":
        many = [line_field(size, lines=n, seed=n) for n in (6, 25)]
        many += [particle_field(size, particles=n, seed=n) for n in (14, 60)]
        return [*many, data.retina(), data.hubble_deep_field(), data.moon()]
    return [getattr(data, name)() for name in ("gravel", "astronaut", "chelsea", "coffee", "moon", "clock", "page")]


def data_folder() -> Path | None:
    """The folder of recorded data in STEERING_DATA."""
    named = os.environ.get("STEERING_DATA")
    return Path(named) if named else None


def centred(thing: NDArray) -> Canvas:
    """The canvas whose middle pixel is position (0, 0)."""
    return Canvas(thing.shape, (-(thing.shape[0] // 2), -(thing.shape[1] // 2)))


def train(objects: list[NDArray], probe: NDArray, patch: int, options: argparse.Namespace) -> ProbeFirst:
    """A network trained on frames at random positions of these objects."""
    torch.manual_seed(0)
    rng, window, device = np.random.default_rng(0), probe.shape[-1], find_device(options.device)
    network = ProbeFirst(window=window, patch=patch, width=24, modes=len(probe)).to(device)
    network.optics.set(probe)
    counts, patches = [], []
    for thing in objects:
        reach = thing.shape[0] // 2 - window // 2 - 1
        where = rng.uniform(-reach, reach, (options.frames, 2))
        counts.append(rng.poisson(simulate(thing, probe, centred(thing), where)).astype(np.uint16))
        patches.append(extract_patches(thing, centred(thing), where, patch))
    frames, wanted = (torch.from_numpy(np.concatenate(one)).to(device) for one in (counts, patches))
    objective = Reconstruction(patch_weight(probe, patch))
    optimiser = torch.optim.AdamW(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=options.steps, pct_start=0.1)
    for _ in range(options.steps):
        rows = torch.randint(0, len(frames), (32,)).to(device)
        fields = {"counts": frames[rows], "amplitude": wanted[rows].abs(), "phase": wanted[rows].angle()}
        loss = objective.error(objective.outputs(network, fields), fields).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    print(f"  trained: error {loss.item():.3f} on the last batch", flush=True)
    return network.eval()


def simulated(kind: str, options: argparse.Namespace) -> Iterator[tuple[int, Scan]]:
    """(seed, scan) of every sample of a set; the noise, the candidates and the generated samples follow the seed."""
    size = options.size if kind == "sparse" else 7 * options.size // 10  # dense content is alike everywhere
    look = {"phase": 0.8, "absorption": 0.1, "size": size}
    probe = zone_plate(64, 50.0, aperture=0.52, counts=1e5)
    network = train([sample(image, **look) for image in training_images(kind, size)], probe, 40, options)
    for seed in range(options.seeds):
        for name, image in sparse_images(size, seed) if kind == "sparse" else [(n, getattr(data, n)()) for n in DENSE]:
            thing = sample(image, **look)
            source = SimulatedBeamline([Stage(name, thing, 1)], probe=probe, step=options.step, seed=seed)
            where = source.candidates / source.geometry.object_pixel
            expected = simulate(thing, probe, centred(thing), where)
            counts = np.random.default_rng((seed, 1)).poisson(expected).astype(np.uint16)
            yield seed, scan_of(name, (thing, centred(thing)), network, where, counts)


def recorded(kind: str, options: argparse.Namespace) -> Iterator[tuple[int, Scan]]:
    """The recorded Siemens star; a position is answered with its frame. The network has seen simulated frames only."""
    if (folder := data_folder()) is None:
        print("  found no STEERING_DATA: the recorded scan is left out")
        return
    home = folder / "ptycho-aps-velociprobe-siemens"
    recording = read_recording(home / "siemens-star-small.npz.bz2", zero_frequency="corner")
    with np.load(home / "recon_ptychi_lsqml_2modes_20+25ep.npz") as trusted:
        thing, probe = trusted["object"], trusted["probe"][0]
    probe = rescale_probe(probe.astype(np.complex64), recording.counts)
    options.steps //= 2  # of four times the work
    objects = [sample(image, phase=-1.1, absorption=0.05, size=320) for image in training_images("dense", 320)]
    network = train(objects, probe, 64, options)
    where = recording.positions
    (y0, x0), (y1, x1) = where.min(0), where.max(0)
    canvas = Canvas.around(Field(y0, y1, x0, x1), 128)
    truth = place((thing, Canvas(thing.shape, (-255.0, -253.5))), canvas)
    whole = scan_of("Siemens star", (truth, canvas), network, where, recording.counts)
    same_gauge = align(truth, whole.image(np.arange(len(where))).image(), weight=whole.area.astype(np.float32))
    for seed in range(options.seeds):  # the frames are what they are; Random alone knows the seed
        yield seed, replace(whole, object=same_gauge)


SETS = {"sparse": simulated, "dense": simulated, "recorded": recorded}


def scan_of(name: str, thing: Truth, network: ProbeFirst, where: NDArray, counts: NDArray) -> Scan:
    """The predictions of the frozen network for every frame."""
    image, canvas = thing
    probe = network.optics.modes().cpu().numpy()
    patches = patches_of(network, counts, together=64)
    trial = Trial(
        canvas=canvas,
        probe=probe,
        weight=patch_weight(probe, patches.shape[-1]),
        where=where,
        counts=counts,
        patches=patches,
        residual=far_field_residual(patches, counts, probe),
    )
    stitcher = Stitcher(canvas, trial.weight)
    stitcher.add(patches, where)
    area = (stitcher.weight > 0.3) & (image != 0)
    phase = np.angle(image * np.exp(-1j * np.angle(image[area].sum())))
    contrast = np.abs(phase - np.median(phase[area]))
    features = area & (contrast > 0.25 * np.quantile(contrast[area], 0.999))
    return Scan(name, image, trial, area, features)


def planned(trial: Trial, frames: int) -> NDArray[np.int64]:
    """Rows of a raster of about so many frames over the whole field: the candidates nearest to its grid."""
    (y0, x0), (y1, x1) = trial.where.min(0), trial.where.max(0)
    rows = max(2, round(np.sqrt(frames * (y1 - y0) / (x1 - x0))))
    y, x = np.linspace(y0, y1, rows), np.linspace(x0, x1, max(2, round(frames / rows)))
    grid = np.stack(np.meshgrid(y, x, indexing="ij"), -1)
    grid[1::2] = grid[1::2, ::-1]
    return np.array(list(dict.fromkeys(trial.rows_at(grid.reshape(-1, 2)).tolist())))


def judge(stitcher: Stitcher, scan: Scan) -> tuple[float, float]:
    """Error of an image in radians, over the field and over the features."""
    y, x = (slice(k.min(), k.max() + 1) for k in np.nonzero(scan.area))
    truth, area = scan.object[y, x], scan.area[y, x]
    image = filled(stitcher.image()[y, x], stitcher.weight[y, x])
    aligned = align(image, truth, weight=area.astype(np.float32), max_shift=0.0)
    squared = np.angle(aligned * truth.conj()) ** 2
    return float(np.sqrt(squared[area].mean())), float(np.sqrt(squared[scan.features[y, x]].mean()))


def curve(scan: Scan, order: NDArray[np.int64], frames: list[int]) -> dict[str, list[float]]:
    """Errors and beam time of an order after some numbers of frames."""
    trial, stitcher, done, found = scan.trial, scan.image(order[:0]), 0, []
    spent = np.cumsum(TRAVEL.along(trial.where[order]) + FRAME_S)
    for upto in frames:
        rows = order[done:upto]
        stitcher.add(trial.patches[rows], trial.where[rows])
        done = upto
        found.append((upto, float(spent[upto - 1]), *judge(stitcher, scan)))
    return dict(zip(("frames", "seconds", "error", "feature_error"), map(list, zip(*found, strict=True)), strict=True))


def curves(scan: Scan, seed: int, frames: list[int]) -> tuple[dict[str, dict[str, list[float]]], dict[str, NDArray]]:
    """The curve of every policy on one scan, and its order of candidates."""
    orders = {}
    for name, choose in POLICIES.items():
        policy = choose(scan.trial, seed)
        guided = isinstance(policy, GradientResidual)  # the others do not use predictions
        orders[name] = scan.trial.run(policy, at_once=AT_ONCE if guided else len(scan.trial.where))
    found = {name: curve(scan, order, frames) for name, order in orders.items()}
    each = [curve(scan, rows, [len(rows)]) for rows in (planned(scan.trial, count) for count in frames)]
    found["raster_planned"] = {key: [one[key][0] for one in each] for key in each[0]}
    return found, orders


def first(curve: dict[str, list[float]], key: str, target: float) -> float:
    """How many frames or seconds (`key`) it takes until the feature error is at most `target`, and stays there."""
    error, at = np.array(curve["feature_error"]), np.array(curve[key], float)
    above = np.flatnonzero(error > target)
    if not len(above):
        return float(at[0])
    k = int(above[-1])
    if k + 1 == len(at):
        return float("nan")
    share = np.log(error[k] / target) / np.log(error[k] / error[k + 1])
    return float(at[k] ** (1 - share) * at[k + 1] ** share)


def stops(scan: Scan, order: NDArray[np.int64], coming: int = 48) -> list[dict[str, Any]]:
    """The result of the stop rule for an order, for each of its RATIOS that the order reaches and keeps.

    Its target: the next frames, which the image has not seen, are predicted to a ratio of what the network makes
    of them. The oracle knows them all, and stops where that is so for good, and no earlier than the rule ever does.
    """
    order = order[: len(order) // 2 + coming]
    done = list(scan.trial.with_prior_residuals(order, at_once=AT_ONCE, ahead=coming))
    shares = [rho.sum() / scan.trial.residual[order[k * AT_ONCE :][:coming]].sum() for k, (_, rho) in enumerate(done)]
    ahead, whole = np.array(shares), judge(scan.image(order), scan)[1]
    found = []
    for ratio in RATIOS:
        rule, steps = StopRule(ratio=ratio), 0
        oracle = max(1 + max(np.flatnonzero(ahead > ratio), default=0), -(-rule.least // AT_ONCE))
        while steps < len(done) and rule.reason() is None:
            rule.note(done[steps][0])
            steps += 1
        if oracle < len(ahead):
            steps = min(steps, len(done) - 2)
            frames, best = ((k + 1) * AT_ONCE for k in (steps, int(oracle)))  # what is pending is measured too
            error = judge(scan.image(order[:frames]), scan)[1] / whole
            stop = {"frames": frames, "oracle": best, "met": bool(ahead[steps + 1] <= ratio)}
            found.append({"ratio": ratio, **stop, "error_over_full_scan": error})
    return found


def main(folder: RunFolder, arguments: list[str]) -> None:
    """Measure every policy on every sample of the chosen sets."""
    options = _options(arguments)
    found, seen = {}, []
    for kind in options.sets.split(","):
        print(f"{kind}:", flush=True)
        for seed, scan in SETS[kind](kind, options):
            begun, total = time.perf_counter(), len(scan.trial.where)
            frames = sorted({max(8, round(total * share)) for share in SHARES})
            of_policy, orders = curves(scan, seed, frames)
            name = scan.name
            sample = found.setdefault(name, {"set": kind, "candidates": total, "by_seed": {}})
            sample["content"] = float(scan.features.sum() / scan.area.sum())
            sample["to_light_all"] = float(scan.area.sum() / (np.pi / 4 * beam_diameter(scan.trial.probe) ** 2))
            sample["by_seed"][str(seed)] = {"policies": of_policy, "stop": stops(scan, orders["adaptive"])}
            if seed == 0 and name in ("particles", "flakes", "coins"):
                seen.append(seen_by(scan, orders))
            print(f"  {name}, seed {seed}: {time.perf_counter() - begun:.0f} s", flush=True)
            folder.write_summary(summed_up(found))
    folder.write_file("errors.png", errors_picture(found))
    if seen:
        folder.write_file("seen.png", seen_picture(seen))


SHARES = (0.02, 0.03, 0.045, 0.065, 0.09, 0.12, 0.16, 0.21, 0.3, 0.45, 0.6, 0.75, 0.9, 1.0)
"""Of the candidates: the numbers of frames after which errors are taken."""


def summed_up(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The keys of the benchmark, and the table per sample and policy, and by seed."""
    figures: dict[str, Any] = {"samples": {name: {**one, **of_sample(one)} for name, one in found.items()}}
    sparse = [one for one in figures["samples"].values() if one["set"] == "sparse"]
    dense = [one for one in figures["samples"].values() if one["set"] != "sparse"]
    if sparse:
        figures["sparse"] = {key: float(np.median([one[key] for one in sparse])) for key in SAVED}
    if dense:
        figures["dense"] = {key: max(one[key] for one in dense) for key in WORSE}
    for ratio in RATIOS:
        runs = [seed["stop"] for one in found.values() for seed in one["by_seed"].values()]
        ends = [stop for run in runs for stop in run if stop["ratio"] == ratio]
        if ends:
            figures["stop" if ratio == RATIOS[0] else f"stop_at_{ratio}"] = {
                "frames_over_oracle": float(np.median([stop["frames"] / stop["oracle"] for stop in ends])),
                "target_met_share": float(np.mean([stop["met"] for stop in ends])),
                "error_over_full_scan": float(np.median([stop["error_over_full_scan"] for stop in ends])),
                "runs": len(ends),
            }
    return figures


SAVED = (
    "frames_saved_over_raster",
    "frames_saved_over_space_filling",
    "frames_saved_over_raster_planned",
    "time_saved_over_raster",
    "time_saved_over_raster_planned",
)
WORSE = ("error_over_raster", "error_over_raster_planned", "error_over_raster_from_the_first_frame")


def of_sample(one: dict[str, Any]) -> dict[str, float]:
    """What adaptive saves on a sample, and how much worse it is at most: medians over the seeds."""
    runs = [seed["policies"] for seed in one["by_seed"].values()]
    found: dict[str, list[float]] = {key: [] for key in SAVED + WORSE}
    for run in runs:
        target = EQUAL * run["raster"]["feature_error"][-1]
        for other in ("raster", "space_filling", "raster_planned"):
            for key, word in (("frames", "frames"), ("seconds", "time")):
                if (name := f"{word}_saved_over_{other}") in found:
                    found[name].append(first(run[other], key, target) / first(run["adaptive"], key, target))
        lit = np.array(run["adaptive"]["frames"]) >= one["to_light_all"]
        for key, other, counts in zip(
            WORSE, ("raster", "raster_planned", "raster"), (lit, lit, lit | True), strict=True
        ):
            ratio = np.array(run["adaptive"]["error"]) / np.array(run[other]["error"])
            found[key].append(float(ratio[counts].max()))
    return {key: float(np.median(values)) for key, values in found.items()}


def seen_by(scan: Scan, orders: dict[str, NDArray[np.int64]]) -> dict[str, Any]:
    """What each policy had seen of a sample after an eighth of its candidates, and the truth."""
    frames = len(scan.trial.where) // 8
    phases = {"truth": np.where(scan.area, np.angle(scan.object), np.nan)}
    for name, order in orders.items():
        stitcher = scan.image(order[:frames])
        phase = np.angle(align(stitcher.image(), scan.object, weight=stitcher.weight * scan.area, max_shift=0.0))
        phases[name] = np.where((stitcher.weight > 0.05) & scan.area, phase, np.nan)
    return {"sample": scan.name, "frames": frames, "phases": phases}


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench_steering.py", description=__doc__.split("\n")[0])
    parser.add_argument("--sets", default="sparse,dense,recorded", help="comma-separated (sparse,dense,recorded)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--size", type=int, default=320, help="object pixels of a simulated sample's side (320)")
    parser.add_argument("--step", type=float, default=6.0, help="object pixels between candidates (6)")
    parser.add_argument("--frames", type=int, default=600, help="frames of each sample to train on (600)")
    parser.add_argument("--steps", type=int, default=500, help="optimiser steps of the training (500)")
    add_device(parser)
    return parser.parse_args(arguments)
