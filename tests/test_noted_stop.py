"""A stop that no runner is there to take stands in the run's folder until one takes it."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys

import pytest

from steering import cli
from steering.campaign import Command
from steering.runner.attach import Attached, me
from steering.runner.folder import RunFolder
from steering.runner.handover import HandedOver
from steering.runner.noted import FILE, note_stop, noted_stop, take_noted
from steering.view.live.reader import Reader
from steering.view.status import status_lines

DEAD = 2**22 + 1
"""No process has this number."""


class Gone:
    """A runner that has handed over, or whose worker is lost."""

    def __init__(self, error):
        self.error = error

    def command(self, *words, **named):
        return self

    def result(self, timeout):
        raise self.error


def refused(*words, **named):
    """What Dask raises after ten seconds."""
    raise OSError("Timed out trying to connect")


@pytest.fixture
def folder(tmp_path):
    return RunFolder.create(tmp_path / "run")


@pytest.mark.parametrize("error", [HandedOver("found a run that has ended here"), OSError("cut off"), TimeoutError()])
def test_a_stop_is_never_lost_between_two_runners(folder, error):
    """That it was taken by one that has handed over already is not said: the next one takes it."""
    assert "its next runner ends it in order" in Attached(Gone(error), folder).command("stop")
    stop = noted_stop(folder)
    assert (stop.name, stop.by) == ("stop", me())
    assert f"noted by {me()}" in "\n".join(status_lines(folder))
    taken: list[Command] = []

    async def runs():
        watching = asyncio.ensure_future(take_noted(folder, taken.append))
        while (folder.path / FILE).exists():
            await asyncio.sleep(0.01)
        watching.cancel()

    asyncio.run(asyncio.wait_for(runs(), 60))
    assert taken == [stop]
    assert "noted by" not in "\n".join(status_lines(folder))


def test_other_commands_and_runs_that_have_ended_say_so(folder):
    handle = Attached(Gone(HandedOver("found a run that has ended here")), folder)
    with pytest.raises(HandedOver):
        handle.command("pause")
    folder.end("finished")
    with pytest.raises(HandedOver):
        handle.command("stop")
    assert noted_stop(folder) is None
    assert cli.main(["stop", str(folder.path)]) == 1


def test_a_stop_that_is_damaged_is_a_stop(folder):
    assert noted_stop(folder) is None
    (folder.path / FILE).write_bytes(b"\xff[")
    assert noted_stop(folder).name == "stop"


def test_a_folder_that_is_out_of_reach_is_no_stop(folder):
    """A person's stop is one that is there: a disk that is cut off for a while ends no run."""
    note_stop(folder, "anna")
    away = folder.path.rename(folder.path.with_name("away"))
    folder.path.touch()  # whatever is below it cannot be reached: not "no such file"
    assert noted_stop(folder) is None
    folder.path.unlink()
    away.rename(folder.path)
    assert noted_stop(folder).by == "anna"


def test_the_command_line_notes_a_stop_wherever_nobody_answers(folder, capsys, monkeypatch):
    """Before the campaign has begun, between two runners, and after all processes are gone."""
    monkeypatch.setattr(sys.modules["steering.runner.attach"], "Client", refused)
    assert cli.main(["stop", str(folder.path)]) == 0
    assert "nobody answers for run now; its next runner ends it in order" in capsys.readouterr().out
    where = {"address": "tcp://127.0.0.1:9", "runner": "steering-campaign", "pid": os.getpid()}
    folder.write_file("scheduler.json", json.dumps(where | {"host": socket.gethostname()}).encode())
    note_stop(folder, "other@elsewhere")
    assert cli.main(["stop", str(folder.path)]) == 0
    assert noted_stop(folder).by == me()
    folder.write_summary({"pid": DEAD})
    folder.write_file("workflow.json", b"{}")
    folder.write_file("scheduler.json", json.dumps(where | {"pid": DEAD, "host": socket.gethostname()}).encode())
    assert cli.main(["stop", str(folder.path)]) == 0
    assert f"steering recover {folder.path}" in capsys.readouterr().out


def test_the_page_notes_a_stop_as_well(folder):
    """Of the campaign that has not begun; other commands are refused in words."""
    page = Reader(folder)
    with pytest.raises(RuntimeError, match=r"found no scheduler\.json"):
        page.command("pause", None, "anna")
    assert "its next runner ends it in order" in page.command("stop", None, "anna")
    assert noted_stop(folder).by == "anna"
