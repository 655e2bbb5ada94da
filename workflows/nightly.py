"""Learn at night from what the day has left, and put the outcome into service only if it is better.

    steering run --quiet workflows/nightly.py RUNS [--from-scratch] [--margin 0.05] [--ranks 2] [--cluster slurm] ...

RUNS is a folder of runs, or a memory (`steering run --memory`). Runs that have ended are added to the memory
RUNS/memory (or the one of --memory). A network is trained on all that it holds, and judged on held-out frames of every
past scan against the model in service: the one that runs with this memory begin with. If it is better on average, and
on no scan worse by more than the margin, it takes that one's place, and is published as the newest version of
MEMORY/models, which other programs may read as that of a run (`help(steering.ModelStore)`).

Exit codes: 0 done, or nothing is new (then no folder is left); 75 try later: another nightly run is at work, or a run
has ended meanwhile; 1 failed. Lines for cron, systemd and SLURM are in workflows/schedules.
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nights.left import Busy, State, alone, memory_of, take_in
from nights.training import CANDIDATE, IN_SERVICE, Changed, Night, Outcome, learn
from nights.verdict import Verdict, forgetting, verdict
from pictures.learning import nights_picture
from steering import ModelStore, ModelVersion, RunFolder, add_cluster, cluster, on_ranks
from steering.learning import Memory
from steering.learning.memory_index import INDEX
from steering.models import build_network, find_network
from steering.ptychography.device import add_device

TRY_LATER = 75
EARLIER = 8
"""Versions of earlier nights in the forgetting matrix, the newest."""


def main(folder: RunFolder, arguments: list[str]) -> int:
    """Take in, train, judge, publish. Returns the exit code."""
    options = _options(arguments)
    runs = Path(options.runs).absolute()
    memory = memory_of(runs, folder.start()["memory"])
    try:
        with alone(memory):
            return night(folder, runs, memory, options)
    except (Busy, Changed) as wait:
        print(wait, file=sys.stderr)
        return TRY_LATER


def night(folder: RunFolder, runs: Path, memory: Memory, options: argparse.Namespace) -> int:
    """One night, alone with its folder."""
    state = State.read(memory)
    if memory.path != runs:
        for complaint in take_in(runs, memory, state):
            print(complaint, file=sys.stderr)
    contents = memory.contents() if memory.path.is_dir() else None
    if contents is None or contents.samples is None:
        print(f"{runs}: nothing to learn from yet: no run has ended there that has trained")
        return 0
    chosen = {name: value for name, value in vars(options).items() if name not in ("cluster", "insecure", "runs")}
    inputs: dict[str, Any] = {"samples": contents.samples, "held_out": contents.held_out, **chosen}
    if state.done == inputs:
        print(f"{runs}: nothing is new since the last night, which {state.said}")
        return 0
    if contents.weights is None or contents.version is None:
        raise ValueError(
            f"{memory.path}: found samples without a model, expected that of a run: add one that has ended"
        )
    version = ModelStore.description(dict(contents.version), memory.path / INDEX)
    plan = _plan(memory, contents.samples, version, options)
    with cluster(options.cluster, ranks=options.ranks, folder=folder.path, insecure=options.insecure) as client:
        outcome = on_ranks(client, learn, plan, ranks=options.ranks)[0]
    decided = verdict(outcome.errors[IN_SERVICE], outcome.errors[CANDIDATE], options.margin)
    number = _publish(memory, plan, outcome, contents.weights) if decided.publish else None
    state.done, state.published = inputs, state.published or decided.publish
    state.said = f"published version {number}" if decided.publish else f"published nothing: {decided.reason}"
    state.write(memory)
    _report(folder, memory, outcome, decided, number)
    return 0


def _plan(memory: Memory, samples: str, version: ModelVersion, options: argparse.Namespace) -> Night:
    store = ModelStore(memory.path / "models")
    same = (version.network, dict(version.hyperparameters))
    earlier = [one for one in store.versions() if (one.network, dict(one.hyperparameters)) == same]
    return Night(
        memory=memory.path,
        samples=samples,
        version=version,
        scratch=options.from_scratch,
        epochs=options.epochs,
        batch=options.batch,
        learning_rate=options.learning_rate,
        device=options.device,
        seed=options.seed,
        earlier=tuple(one.number for one in earlier)[-EARLIER:],
    )


def _publish(memory: Memory, plan: Night, outcome: Outcome, instead_of: str) -> int:
    """Into the store, then into the memory; the number of the version. Raises Changed where a run has put another model
    there since the night began."""
    store, before = plan.store, plan.store.newest()
    number = max((one.number for one in store.versions()), default=-1) + 1
    quality = outcome.quality
    version = ModelVersion(
        number=number,
        network=plan.version.network,
        hyperparameters=dict(plan.version.hyperparameters),
        parents=() if before is None or plan.scratch else (before,),
        trained_on=outcome.trained_on,
        steps=outcome.steps + (0 if plan.scratch else plan.version.steps),
        validation_error=quality["error"],
        validation_residual=quality["residual"],
        validation_residuals=quality["residuals"],
        noise_share=quality["noise_share"],
        validation_offsets=quality["offsets"],
    )
    network = build_network(find_network(version.network), version.hyperparameters)
    network.load_state_dict(outcome.weights)
    if memory.contents().weights != instead_of:
        raise Changed(f"{memory.path}: found a run that has ended since the night began: try again later")
    store.publish(network, version)
    if not memory.serve(outcome.packed, asdict(version), instead_of=instead_of):
        if before is not None:
            store.withdraw(number, before)
        raise Changed(f"{memory.path}: found a run that has ended since the night began: try again later")
    return number


def _report(folder: RunFolder, memory: Memory, outcome: Outcome, decided: Verdict, number: int | None) -> None:
    errors = outcome.errors
    lost: Mapping[str, float] = forgetting(list(errors.values()))
    by_scan = {
        scan: {
            "in_service": errors[IN_SERVICE][scan],
            "this_night": error,
            "forgotten": lost[scan],
            "samples": outcome.trained_on.get(scan, 0),
        }
        for scan, error in errors[CANDIDATE].items()
    }
    said = f"published as version {number}" if decided.publish else "not published"
    figures = {
        "memory": memory.path,
        "published": decided.publish,
        "version": number,
        "decision": f"{said}: {decided.reason}",
        "steps": outcome.steps,
        "loss": outcome.loss,
        "training_s": outcome.seconds,
    }
    folder.write_summary(
        {
            "night": figures,
            "errors_by_scan": by_scan,
            "forgetting_matrix": errors,
            "judged_by_samples_of_the_memory": outcome.borrowed,
        }
    )
    folder.write_file("forgetting.png", nights_picture(errors))
    print(f"{said}: {decided.reason}")
    if outcome.borrowed:
        print(f"without held-out frames, judged by samples of the memory: {', '.join(outcome.borrowed)}")


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="nightly.py", description=__doc__.split("\n")[0])
    parser.add_argument("runs", metavar="RUNS", help="a folder of runs, or a memory")
    parser.add_argument(
        "--from-scratch", action="store_true", help="train an untrained network, not the model in service further"
    )
    parser.add_argument(
        "--margin", type=float, default=0.05, help="by how much it may be worse on a single scan (0.05: 5 %%)"
    )
    parser.add_argument("--ranks", type=int, default=2)
    add_device(parser)
    add_cluster(parser)
    parser.add_argument("--epochs", type=float, default=20, help="passes over all samples (20)")
    parser.add_argument("--batch", type=int, default=16, help="samples per rank and step (16)")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.margin < 0 or options.epochs <= 0 or min(options.ranks, options.batch) < 1:
        parser.error("found a margin, epochs, ranks or batch out of range, expected 0 or more, above 0, 1 or more")
    return options
