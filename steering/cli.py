"""The command line: run a workflow, report on runs, print the status of a run, take part in it."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from steering.commands import attach, detach, memory, scans, start_here, view
from steering.commands.words import (
    add_insecure,
    complain as _complain,
    message as _message,
    say as _say,
    short as _short,
)
from steering.logs import KINDS, VARIABLE, begin as begin_log, chosen as chosen_log

if TYPE_CHECKING:
    from steering.runner.folder import RunFolder

# Each command imports what it needs when it runs: `steering --help` answers at once, without torch.

_SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code: 0, 1 for a failure, 2 for wrong arguments, 130 after Ctrl-C."""
    chosen = parser().parse_args(start_here.spelt_out(sys.argv[1:] if arguments is None else arguments))
    if chosen.log is not None:
        os.environ[VARIABLE] = chosen.log  # of the workers too, and of a driver that runs by itself

    def logged() -> int:
        begin_log(chosen_log())
        return chosen.command(chosen)

    ending = _attempt(logged)
    if ending.status != "finished" and not ending.returned:
        _complain(ending.reason)
    return ending.code


def parser() -> argparse.ArgumentParser:
    """Of all commands with their arguments."""
    parser = argparse.ArgumentParser(
        prog="steering",
        description="Run a workflow, follow it while it measures, and report on what it left.",
        epilog="Start with: steering demo",
    )
    parser.add_argument(
        "--log", choices=KINDS, help="form of the log: text for people, or one JSON object per line (text)"
    )
    parser.add_argument("--version", action="store_true", dest="of_steering", help="print the version of steering")
    parser.set_defaults(command=lambda chosen: _no_command(parser, chosen.of_steering))
    commands = parser.add_subparsers(metavar="COMMAND")
    run = commands.add_parser(
        "run",
        help="run a workflow file, and write a report at the end",
        usage="steering run [-h] [--out DIR] [--from RUN] [--memory DIR] [--detach] [--quiet] WORKFLOW.py "
        "[arguments of the workflow ...]",
        description="Run main(folder, arguments) of a workflow file and write DIR/report.html.",
        epilog="steering run WORKFLOW.py --help lists the arguments of the workflow itself.",
    )
    run.add_argument("--out", metavar="DIR", help="folder of the run, new or empty (runs/WORKFLOW-date-time)")
    run.add_argument("--from", metavar="RUN", action="append", dest="start", help="begin with what this run has learnt")
    run.add_argument("--memory", metavar="DIR", help="begin with this memory, and add to it at the end")
    detach.add_options(run)
    run.add_argument("workflow", metavar="WORKFLOW.py", help="a Python file with main(folder, arguments)")
    run.add_argument("arguments", nargs=argparse.REMAINDER, help="passed to the workflow unchanged")
    run.set_defaults(command=_run)
    start_here.add_commands(commands, parser)
    memory.add_commands(commands)
    recover = commands.add_parser(
        "recover",
        help="continue a run whose processes are all gone, in its folder",
        usage="steering recover [-h] DIR [-- other arguments of the workflow ...]",
        description="Run the workflow of DIR again, from its newest checkpoint and the events after it.",
        epilog="Arguments after -- take the place of those that the run had: another number of ranks, for example.",
    )
    recover.add_argument("folder", metavar="DIR", help="folder of a run that was killed")
    recover.add_argument("arguments", nargs=argparse.REMAINDER, help="passed to the workflow in place of its own")
    recover.set_defaults(command=_recover)
    report = commands.add_parser(
        "report",
        help="write the report of a run again, or compare several runs",
        description="One folder: write DIR/report.html again. Several: write a page that compares them.",
    )
    report.add_argument("folders", metavar="DIR", nargs="+", help="folder of a run")
    report.add_argument("--out", metavar="FILE", help="file of the comparison (comparison.html)")
    report.set_defaults(command=_report)
    scans.add_commands(commands)
    attach.add_commands(commands)
    view.add_commands(commands)
    _add_taking_part(commands)
    return parser


def _add_taking_part(commands: Any) -> None:
    status = commands.add_parser("status", help="print what a run is doing, or how it ended")
    status.add_argument("folder", metavar="DIR", help="folder of a run")
    status.set_defaults(command=_status)
    for name, meaning in _COMMANDS.items():
        command = commands.add_parser(name, help=meaning, description=f"{meaning[0].upper()}{meaning[1:]}.")
        command.add_argument("folder", metavar="DIR", help="folder of a run that has not ended")
        if name == "rollback":
            command.add_argument("--version", type=int, help="number of the model version (the previous one)")
        if name == "limit":
            command.add_argument(
                "--area", metavar="Y0,Y1,X0,X1", help="edges in the geometry's unit, as --area=-1e-6,0,0,1e-6"
            )
            command.add_argument("--shortest-dwell", type=float, metavar="SECONDS", help="of each position")
        add_insecure(command)
        command.set_defaults(command=_command, name=name, version=None)


_COMMANDS = {
    "pause": "pause a run: what is decided is still measured, nothing more is decided",
    "resume": "continue a paused run",
    "stop": "end a run in order: what was measured is kept, and the report is written",
    "approve": "carry out the decision that waits for approval",
    "veto": "drop the decision that waits for approval; the policy proposes another one",
    "rollback": "put an older model version back into service, and continue training from it",
    "limit": "hold decisions to an area and a shortest dwell, beside the workflow's limits; without options, end that",
}


def _no_command(parser: argparse.ArgumentParser, version: bool) -> int:
    _say(f"steering {importlib.metadata.version('steering')}" if version else parser.format_help().rstrip())
    return 0


def _run(chosen: argparse.Namespace) -> int:
    from steering.loading import loaded, located  # noqa: PLC0415

    own, arguments = taken_out(chosen.arguments)
    arguments = detach.take_flags(chosen, arguments)
    out = (own["--out"] or [chosen.out])[-1]
    runs = [*(chosen.start or []), *own["--from"]]
    kept = (own["--memory"] or [chosen.memory])[-1]
    start = _start(runs, kept) if runs or kept else None
    workflow = located(Path(chosen.workflow))
    if chosen.handed_over:
        return _run_in(detach.adopted(chosen.adopt), detach.handed_over(chosen.handed_over), workflow, arguments)
    if chosen.detach and workflow.is_file():
        return detach.run(_folder(workflow, out, start), workflow, arguments)
    with loaded(workflow) as entry:
        folder = detach.adopted(chosen.adopt) if chosen.adopt else _folder(workflow, out, start)
        with detach.silent(folder, chosen.quiet):
            return _run_in(folder, entry, workflow, arguments)


def _start(runs: list[str], memory: str | None) -> dict[str, Any]:
    """What the run's folder says of its start. Raises FileNotFoundError where an earlier run is not there."""
    for run in runs:
        if not any((Path(run) / name).is_file() for name in ("summary.json", "memory.json")):
            raise FileNotFoundError(f"{run}: found no run and no memory there, expected a folder to start from")
    return {
        "from": [str(Path(run).absolute()) for run in runs],
        "memory": str(Path(memory).absolute()) if memory else None,
    }


def _recover(chosen: argparse.Namespace) -> int:
    from steering.loading import loaded  # noqa: PLC0415
    from steering.runner.again import recoverable  # noqa: PLC0415

    given = chosen.arguments[1:] if chosen.arguments[:1] == ["--"] else chosen.arguments
    begun = recoverable(chosen.folder)
    for remark in begun.remarks:
        _complain(remark)
    _say(f"{begun.folder.name}: goes on from checkpoint {begun.checkpoint}, {begun.age_s:.0f} s before its last event")
    with loaded(begun.workflow) as entry:
        return _run_in(begun.folder, entry, begun.workflow, list(given or begun.arguments))


def _run_in(folder: RunFolder, entry: Callable[..., Any], workflow: Path, arguments: list[str]) -> int:
    from steering.runner.again import note_left, note_workflow  # noqa: PLC0415
    from steering.runner.event_log import events_after  # noqa: PLC0415
    from steering.runner.lock import DRIVER, held  # noqa: PLC0415

    with held(folder, DRIVER):
        before, last = note_workflow(folder, workflow, arguments), events_after(folder, 0)[1]
        ending = _watched(folder, entry, workflow, arguments)
        if folder.recovering and not ending.handed_over and events_after(folder, 0)[1] == last:
            note_left(folder, before)
            why = f": {ending.reason}" if ending.reason else ""
            _complain(f"{_short(folder.path)} was not continued, and is as it was{why}")
            return ending.code
        return _closed(folder, workflow, ending)


def _watched(folder: RunFolder, entry: Callable[..., Any], workflow: Path, arguments: list[str]) -> _Ending:
    """Run the workflow to its end, however that comes."""
    from steering.clusters.own_job import watched_end  # noqa: PLC0415

    if not {"-h", "--help"} & set(arguments):
        _say(f"run folder: {_short(folder.path)}")
    sys.argv = [f"steering run {workflow.name}", *arguments]  # the name that the workflow's own --help prints
    with watched_end():
        return _attempt(lambda: entry(folder, arguments))


def _closed(folder: RunFolder, workflow: Path, ending: _Ending) -> int:
    """Write down how the run ended, and its report; the exit code."""
    from steering.clusters.own_job import successor  # noqa: PLC0415

    if ending.handed_over:
        _complain(f"{_short(folder.path)} goes on in job {successor()}: the job of this process ends")
        return ending.code
    if ending.exited and not folder.events():
        shutil.rmtree(folder.path)  # --help or wrong arguments
        if ending.code:
            _complain(f"the workflow did not begin: its folder {_short(folder.path)} is removed again")
        return ending.code
    if ending.returned and ending.code in (0, 75) and detach.left_nothing(folder):
        shutil.rmtree(folder.path)
        return ending.code
    _hold_signals(True)
    folder.end(ending.status, ending.reason, traceback=ending.traceback)
    _hold_signals(False)
    if ending.status != "finished":
        _complain(f"{workflow.name} {_VERBS[ending.status]}: {ending.reason}")
    if ending.traceback:
        _complain(f"the traceback is in the last line of {_short(folder.path / 'events.jsonl')}")
    from steering.view.report import write_report  # noqa: PLC0415

    written = _attempt(lambda: _say(f"report: {_short(write_report(folder))}"))
    if written.status != "finished":
        _complain(f"the report could not be written: {written.reason}")
    return ending.code or written.code


_VERBS = {"failed": "failed", "interrupted": "was interrupted"}


def _report(chosen: argparse.Namespace) -> int:
    from steering.runner.folder import RunFolder  # noqa: PLC0415
    from steering.view.comparison import write_comparison  # noqa: PLC0415
    from steering.view.report import write_report  # noqa: PLC0415

    folders = [RunFolder(path) for path in chosen.folders]
    if len(folders) == 1 and chosen.out is None:
        _say(_short(write_report(folders[0])))
    else:
        _say(_short(write_comparison(folders, Path(chosen.out or "comparison.html"))))
    return 0


def _status(chosen: argparse.Namespace) -> int:
    from steering.runner.folder import RunFolder  # noqa: PLC0415
    from steering.view.status import status_lines  # noqa: PLC0415

    for line in status_lines(RunFolder(chosen.folder)):
        _say(line)
    return 0


def _command(chosen: argparse.Namespace) -> int:
    from steering.campaign import Limits  # noqa: PLC0415
    from steering.records import Field  # noqa: PLC0415
    from steering.runner.attach import attach, stop  # noqa: PLC0415

    if chosen.name == "stop":
        _say(stop(chosen.folder, insecure=chosen.insecure))
        return 0
    limits = None
    if chosen.name == "limit":
        try:
            area = None if chosen.area is None else Field(*(float(edge) for edge in chosen.area.split(",")))
        except (TypeError, ValueError) as error:
            example = "four numbers, low before high: --area=Y0,Y1,X0,X1, as --area=-1e-6,0,0,1e-6"
            raise ValueError(f"found --area={chosen.area}, expected {example}") from error
        limits = Limits(area=area, shortest_dwell=chosen.shortest_dwell)
    with attach(chosen.folder, insecure=chosen.insecure) as run:
        _say(run.command(chosen.name, chosen.version, limits=limits))
    return 0


_OWN = ("--out", "--from", "--memory")


def taken_out(arguments: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Our own options may also come after the workflow's name: they are taken out, the rest is the workflow's."""
    own: dict[str, list[str]] = {name: [] for name in _OWN}
    rest = []
    words = iter(arguments)
    for word in words:
        name, given, value = word.partition("=")
        if name not in own:
            rest.append(word)
            continue
        folder = value if given else next(words, None)
        if folder is None:
            raise ValueError(f"found {name} without a folder, expected {name} DIR")
        own[name].append(folder)
    return own, rest


def _folder(workflow: Path, out: str | None, start: dict[str, Any] | None) -> RunFolder:
    from steering.runner.folder import RunFolder  # noqa: PLC0415

    if out is not None:
        return RunFolder.create(out, workflow, start=start)
    name = f"{workflow.stem}-{datetime.now().astimezone():%Y%m%d-%H%M%S}"
    for again in range(1, 100):
        with contextlib.suppress(FileExistsError):  # another run began in the same second
            return RunFolder.create(Path("runs") / (name if again == 1 else f"{name}_{again}"), workflow, start=start)
    raise FileExistsError(f"runs/{name}: found 99 runs of this second, expected a free name: use --out DIR")


@dataclass(frozen=True)
class _Ending:
    status: str
    reason: str = ""
    traceback: str = ""
    code: int = 0
    exited: bool = False
    """The code left by SystemExit, as argparse does."""
    returned: bool = False
    """The code was returned: 0 done or nothing to do, 75 try later, else failed."""
    handed_over: bool = False
    """The job of this process ends, and another one goes on with the run."""


def _attempt(action: Callable[[], Any]) -> _Ending:
    """Carry out an action and return how it ended: the process boundary, the one place that catches every error."""
    stopper = _Stopper()
    # A run under nohup outlives its terminal.
    watched = [n for n in _SIGNALS if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stopper) for number in watched}
    try:
        code = action()
        if not isinstance(code, int) or not code:
            return _Ending("finished", returned=isinstance(code, int))
        return _Ending("failed", f"its main returned {code}", code=code, returned=True)
    except KeyboardInterrupt:
        number = stopper.number or signal.SIGINT
        reason = f"stopped by {_SIGNALS[number]}"
        return _Ending("interrupted", reason, code=128 + number, handed_over=stopper.handed_over)
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
        reason = f"left with {left.code}" if left.code else ""
        return _Ending("failed" if code else "finished", reason, code=code, exited=True)
    except Exception as error:
        return _Ending("failed", _message(error), traceback.format_exc(), code=1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Stopper:
    """The first signal stops the run in order; a second one is answered by a message; a third one quits at once."""

    def __init__(self) -> None:
        self.number: signal.Signals | None = None
        self.handed_over = False
        self._count = 0

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        self._count += 1
        self.number = self.number or signal.Signals(number)
        if self._count == 2:
            if not self.handed_over:  # SLURM and the batch script both say it
                _complain("closing down already; press Ctrl-C once more to quit at once")
            return
        if self._count == 1 and number == signal.SIGTERM:
            from steering.clusters.own_job import JobEnds, successor  # noqa: PLC0415

            self.handed_over = successor() is not None
            if self.handed_over:
                raise JobEnds
        raise KeyboardInterrupt


def _hold_signals(hold: bool) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK if hold else signal.SIG_UNBLOCK, _SIGNALS)


if __name__ == "__main__":
    sys.exit(main())
