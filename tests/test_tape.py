"""What is recorded is played again, record for record; a torn or damaged recording is told from a whole one."""

from __future__ import annotations

import io
import random
import threading
from dataclasses import dataclass

import numpy as np
import pytest

from steering.cli import main
from steering.sources.addresses import frames_at
from steering.sources.streams import Began, Ended, Frame, Samples, Unreadable
from steering.sources.tape import Played, read, record
from tests.test_streams import mutated

RNG = np.random.default_rng(0)
FRAMES = [
    Began("gravel", 0, {"distance": 2.0, "centre": (3.0, 4.0), "bad": np.eye(8, dtype=bool)}),
    Frame(0, RNG.poisson(3, (8, 8)).astype(np.uint16), 5.0),
    Unreadable("a torn message"),
    Frame(2, RNG.poisson(3, (8, 8)).astype(">u4"), 5.0, np.array([1.0, 2.0])),
    Ended(3),
]
POSITIONS = [Began(None), Samples(0, np.arange(6.0).reshape(3, 2)), Ended(3, last=True)]


@dataclass
class Given:
    """A stream of what it is given; the last of them to end stops the recording."""

    given: list
    left: list

    def records(self, stopped):
        for one in self.given:
            yield one
            yield None
        self.left.pop()
        if not self.left:
            stopped.set()


def recorded(path):
    left = [1, 2]
    return record({"frames": Given(FRAMES, left), "positions": Given(POSITIONS, left)}, path, threading.Event())


def same(one, other) -> bool:
    if type(one) is not type(other):
        return False
    match one:
        case Frame():
            own = (one.own is None) == (other.own is None) and (one.own is None or (one.own == other.own).all())
            return one.number == other.number and own and np.array_equal(one.counts, other.counts)
        case Samples():
            return one.first == other.first and np.array_equal(one.rows, other.rows)
        case Began():
            keys = one.header.keys() == other.header.keys()
            return (
                one[:2] == other[:2] and keys and all(np.array_equal(v, other.header[k]) for k, v in one.header.items())
            )
    return one == other


def test_what_is_recorded_is_played_again(tmp_path):
    assert recorded(tmp_path / "a.tape") == {"frames": len(FRAMES), "positions": len(POSITIONS)}
    for name, given in (("frames", FRAMES), ("positions", POSITIONS)):
        played, stopped = [], threading.Event()
        for one in Played(file=str(tmp_path / "a.tape"), stream=name, speed=0).records(stopped):
            if one is None:
                stopped.set()
            else:
                played.append(one)
        assert played[-1] == Ended(last=True)
        assert len(played) == len(given) + 1
        assert all(same(one, other) for one, other in zip(given, played, strict=False))
    with pytest.raises(FileExistsError):
        recorded(tmp_path / "a.tape")


def test_a_recording_is_played_step_by_step(tmp_path):
    """A line more, and one more frame comes, with all that came before it; positions keep step with the frames."""
    recorded(tmp_path / "a.tape")
    with (tmp_path / "a.tape").open("rb") as file:
        order = [(stream, type(one).__name__) for _, stream, one in read(file)]
    step, stopped, played = tmp_path / "steps", threading.Event(), {"frames": [], "positions": []}
    streams = {
        name: Played(file=str(tmp_path / "a.tape"), stream=name, step=str(step)).records(stopped) for name in played
    }

    def come() -> None:
        for name, stream in streams.items():
            while (one := next(stream)) is not None:
                played[name].append(type(one).__name__)

    places = [k for k, one in enumerate(order) if one == ("frames", "Frame")]
    for wanted, written in ((0, ""), (1, "\n"), (1, "0\n"), (2, "1\n"), (2, "")):
        with step.open("a") as file:
            file.write(written)
        come()
        there = (
            order[: places[wanted]] if wanted < len(places) else [*order, ("frames", "Ended"), ("positions", "Ended")]
        )
        assert played == {name: [kind for stream, kind in there if stream == name] for name in played}, wanted
    step.write_text("two\n")
    with pytest.raises(ValueError, match="found the line 'two', expected how many more frames"):
        next(Played(file=str(tmp_path / "a.tape"), stream="frames", step=str(step)).records(stopped))
    with pytest.raises(ValueError, match="found speed and step"):
        frames_at(f"play:{tmp_path / 'a.tape'}?speed=2&step={step}")


def test_the_command_line_records_what_an_address_gives(tmp_path, capsys):
    recorded(tmp_path / "a.tape")
    tape = f"play:{tmp_path / 'a.tape'}?speed=0"
    again = tmp_path / "b.tape"
    assert main(["record", tape, "--positions", tape, "--out", str(again), "--seconds", "0.5"]) == 0
    assert f"{len(FRAMES) + 1} records of frames, {len(POSITIONS) + 1} records of positions" in capsys.readouterr().out
    with again.open("rb") as file:
        kinds = [(stream, type(one).__name__) for _, stream, one in read(file)]
    assert sorted(kinds) == sorted(
        [("frames", type(one).__name__) for one in [*FRAMES, Ended()]]
        + [("positions", type(one).__name__) for one in [*POSITIONS, Ended()]]
    )
    assert main(["inspect", tape, "--positions", tape, "--listen", "0.3"]) == 0
    frames, positions = capsys.readouterr().out.splitlines()
    assert frames.startswith("frames: ")
    assert " at first" in positions
    assert main(["record", "tango://x", "--out", str(tmp_path / "c.tape")]) == 1
    assert "found the protocol 'tango'" in capsys.readouterr().err


def test_a_torn_recording_is_played_up_to_its_last_whole_record(tmp_path):
    recorded(tmp_path / "a.tape")
    whole = (tmp_path / "a.tape").read_bytes()
    every = len(list(read(io.BytesIO(whole))))
    counts = [len(list(read(io.BytesIO(whole[:end])))) for end in range(20, len(whole))]
    assert counts == sorted(counts)
    assert counts[-1] == every - 1


def test_whatever_is_read_is_a_recording_or_a_value_error(tmp_path):
    recorded(tmp_path / "a.tape")
    whole, rng, refused = (tmp_path / "a.tape").read_bytes(), random.Random(0), 0
    for _ in range(500):
        try:
            list(read(io.BytesIO(mutated(whole, rng))))
        except ValueError:
            refused += 1
    assert refused > 50
