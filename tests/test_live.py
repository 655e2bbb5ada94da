"""Live sources against the simulated beamline in another process, behind real protocols."""

from __future__ import annotations

import re
import socket
import sys
import threading
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from steering.cli import main
from steering.records import Decision
from steering.runner.folder import RunFolder
from steering.sources.listening import listen
from steering.sources.streams import Began, Ended, Frame, Samples
from steering.sources.tape import record
from steering.view.status import status_lines
from tests.loop_beamline import Told
from tests.serving import beamline, gathered, live, measuring, served, steered_apart

sys.path.append(str(Path(__file__).parents[1] / "workflows"))
import live_scan

FRAMES = 60


def asked(positions: np.ndarray, *, stop: bool = False) -> Decision:
    return Decision(positions=positions, reasons=("test",) * len(positions), stop=stop)


def adds_up(source) -> None:
    for name, stream in source.streams.items():
        waiting = stream["waiting"]
        assert stream["received"] == stream["joined"] + sum(stream["dropped"].values()) + waiting, name


@pytest.mark.slow
def test_frames_of_the_served_beamline_are_those_of_the_embedded_one(tmp_path):
    here = beamline(FRAMES)
    wanted = here.candidates[7 : 7 + FRAMES]
    here.apply(asked(wanted))
    expected = {int(i): c for chunk in here.chunks() for i, c in zip(chunk["frame"], chunk["counts"], strict=True)}
    arguments = (
        "--protocol",
        "dectris",
        "--position-samples",
        "3",
        "--samples",
        "1",
        "--frames",
        str(FRAMES),
        "--frame-rate",
        "200",
    )
    with served(tmp_path, *arguments) as addresses:
        source = live(addresses, here)
        source.apply(asked(wanted))
        chunks = list(source.chunks())
    ids = gathered(chunks, "frame")
    assert sorted(ids.tolist()) == list(range(FRAMES))
    measured = np.stack([gathered(chunks, "position_y"), gathered(chunks, "position_x")], axis=1)
    np.testing.assert_allclose(measured, wanted[ids], atol=1e-11)
    for number, counts in zip(ids, gathered(chunks, "counts"), strict=True):
        np.testing.assert_array_equal(counts, expected[int(number)])
    assert {chunk.attrs["scan"] for chunk in chunks} == {"gravel"}
    assert source.frames_dropped == 0
    assert source.streams["frames"]["joined"] == FRAMES
    adds_up(source)


@pytest.mark.slow
def test_a_campaign_over_a_protocol_ends_with_what_it_learnt(tmp_path, capsys):
    """Steered through the protocol, with losses, repeats and disorder; every figure adds up, also in the summary. What
    the detector says of its optics is not given."""
    frames = 240
    faults = ("--drop", "0.03", "--repeat", "0.03", "--reorder", "0.1")
    arguments = ("--protocol", "dectris", "--samples", "1", "--frames", str(frames), "--frame-rate", "60", *faults)
    with served(tmp_path, *arguments) as addresses:
        out = tmp_path / "run"
        command = ["run", "--out", str(out), "workflows/live_scan.py", *measuring(addresses, optics=False)]
        command += ["--wait", "1", "--ranks", "1", "--steps", "10", "--rounds", "3", "--end-after", "60"]
        assert main(command) == 0
    assert "the detector says: distance 2.4" in capsys.readouterr().out
    summary = RunFolder(out).summary()
    assert summary["status"] == "finished"
    assert summary["versions_published"] >= 1
    counters = summary["streams"]["frames"]
    assert counters["joined"] == summary["frames_predicted"]
    assert counters["joined"] + counters["lost"] == frames
    assert 0 < counters["lost"] < frames / 5
    assert counters["dropped"]["repeat"] > 0
    for stream in summary["streams"].values():
        assert stream["received"] == stream["joined"] + sum(stream["dropped"].values()) + stream["waiting"]
    assert steered_apart(RunFolder(out), frames) < 1e-12  # each number measured where it was decided
    errors = summary["phase_error"]["gravel"]
    assert errors["run_end"] < 0.8 * errors["first"]
    lines = "\n".join(status_lines(RunFolder(out)))
    assert f"frames: {counters['received']} received, {counters['lost']} lost" in lines


@pytest.mark.slow
def test_the_benchmark_of_ingest_runs_and_keeps_its_keys(tmp_path):
    out = tmp_path / "run"
    quick = "--seconds 1 --rate 100 --rate-256 50 --overload-frames 6000 --settle-s 0.5 --protocols dectris"
    assert main(["run", "--out", str(out), "workflows/bench_ingest.py", "--no-compiled", *quick.split()]) == 0
    figures = RunFolder(out).summary()["dectris"]
    for part in (figures, figures["256"]):
        assert part["adds_up"]
        assert part["lost"] == 0
        assert {"frames_per_s", "predicted_per_s", "thinned", "latency_ms", "cpu_share"} <= part.keys()
        assert part["latency_ms"]["p50"] <= part["latency_ms"]["p99"]
    assert figures["overload"]["exact"]
    assert (out / "ingest.png").stat().st_size > 5000


def test_errors_over_a_protocol_are_held_against_the_range_of_the_embedded_runs():
    from bench_protocols import compared

    def run(kind: str, number: int, error: float) -> dict:
        errors = {"1.own_end": error, "1.run_end": error}
        return {"kind": kind, "number": number, "phase_error": errors, "lost": number, "steered_apart_nm": 0.0}

    runs = [run("embedded", 0, 0.2), run("embedded", 1, 0.25)]
    found = compared([*runs, run("pva", 0, 0.274), run("pva", 1, 0.276), run("pva", 2, 0.1)])
    assert found["embedded"]["1.run_end"] == [0.2, 0.25]
    assert found["pva"]["worse"] == {"1.own_end of run 1": 0.276, "1.run_end of run 1": 0.276}, "less error is no fault"
    assert found["pva"]["lost"] == 3


OPTICS = {"energy": 8800.0, "distance": 2.4, "pixel": 75e-6}


@pytest.mark.parametrize(
    ("wrong", "positions", "words"),
    [
        ({}, "unit=px", "object pixels"),
        ({"energy": 8.8}, "unit=um", "8.8 eV"),
        ({"distance": 2400.0}, "unit=um", "2400 m"),
        ({"pixel": 75.0}, "unit=um", "75 m"),
    ],
)
def test_optics_that_cannot_be_are_refused_live_too(wrong, positions, words):
    given = OPTICS | wrong | {"window": 64, "binning": 1}
    address = "zmq://127.0.0.1:1?y=a&x=b&"
    made = live_scan.geometry(Namespace(**given | OPTICS, positions=f"{address}unit=um"))
    assert made.object_pixel == pytest.approx(1.40891e-10 * 2.4 / (64 * 75e-6), rel=1e-4)
    with pytest.raises(ValueError, match=words):
        live_scan.geometry(Namespace(**given, positions=f"{address}{positions}"))


@pytest.mark.parametrize("unit", ["", "unit=m&", "unit=um&"])
def test_without_optics_positions_must_be_in_object_pixels_recorded_ones_too(tmp_path, unit):
    """Metres that are taken for object pixels put all frames at one place."""
    unknown = dict.fromkeys(OPTICS) | {"window": 64, "binning": 1}
    for given, right in ((unit, False), ("unit=px&", True)):
        address, tape, stopped = f"zmq://127.0.0.1:1?{given}y=a&x=b", tmp_path / f"{right}.tape", threading.Event()
        stopped.set()
        record({}, tape, stopped, {"positions": address})
        for positions in (address, f"play:{tape}?speed=0"):
            options = Namespace(**unknown, positions=positions)
            if right:
                assert live_scan.geometry(options).object_pixel == 1.0
                continue
            with pytest.raises(ValueError, match=f"found positions in {unit[5:-1] or 'm'} and no --energy"):
                live_scan.geometry(options)


@pytest.mark.slow
def test_a_dry_run_takes_the_optics_that_a_detector_says_with_any_wait(tmp_path, capsys):
    header = {"wavelength": 1.4089e-10, "distance": 2.4, "pixel_x": 75e-6, "centre": (30.0, 34.0)}
    frames = [Frame(number, np.ones((64, 64), np.uint16), 0.0) for number in range(5)]
    stopped = threading.Event()
    streams = {
        "frames": Told(records_=(Began("gravel", 0, header), *frames, Ended(5))),
        "positions": Told(records_=(Samples(0, 1e-8 * np.arange(10.0).reshape(5, 2)), Ended(5))),
    }
    threading.Timer(0.2, stopped.set).start()
    record(streams, tmp_path / "a.tape", stopped, {"frames": "dectris://d", "positions": "zmq://pc:1?y=y&x=x&unit=um"})
    tape = f"play:{tmp_path / 'a.tape'}?speed=0"
    words = ["run", "--out", str(tmp_path / "run"), "workflows/live_scan.py", "--source", tape, "--positions", tape]
    words += ["--dry-run", "--listen", "0.3", "--window", "64", "--orientation", "auto", "--wait", "20"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "the detector says: energy 8800" in said
    assert "the detector says: distance 2.4" in said
    assert "the detector says: centre 30 34, which is not used: give --centre 30 34" in said
    assert "orientation: not known: found 5 frames to begin a probe from, expected 30 or more" in said


def test_a_stream_that_is_armed_and_sends_nothing_says_what_was_announced():
    header = {"wavelength": 1.4089e-10, "distance": 2.4, "armed": True}
    streams = {"frames": Told(records_=(Began("gravel", 0, header),)), "positions": Told(records_=(None,))}
    found = listen({**streams, "monitor": Told(records_=(Began(None, 0, {}),))}, 0.3)
    assert found["frames"].line() == "armed (scan gravel, wavelength 1.4089e-10, distance 2.4), nothing more came"
    assert found["positions"].line() == "nothing came"
    assert found["monitor"].line() == "armed, nothing more came"


def test_a_scan_of_which_the_truth_has_nothing_is_named_once(capsys):
    live_scan.warn_of_unknown(Path("truth.npz"), {"gravel": None}, ["gravel"])
    assert capsys.readouterr().err == ""
    live_scan.warn_of_unknown(Path("truth.npz"), {"gravel": None}, ["gravel", "scan-2"])
    said = capsys.readouterr().err
    assert said.startswith("truth.npz: found arrays gravel and measured scan-2, expected an array of each scan's name")


@pytest.mark.slow
def test_the_addresses_of_the_page_are_those_of_the_served_beamline_and_a_dry_run_says_what_it_took(tmp_path, capsys):
    port = next(port for port in range(31001, 32000, 2) if free(port) and free(port + 1))
    with served(tmp_path, "--protocol", "dectris", "--port", str(port), "--samples", "1", "--frames", "9") as addresses:
        assert addresses["frames"] == f"dectris://127.0.0.1:{port}"
        assert addresses["positions"].startswith(f"zmq://127.0.0.1:{port + 1}?y=INENC1&x=INENC2&unit=um")
        words = ["run", "--out", str(tmp_path / "run"), "workflows/live_scan.py", "--source", addresses["frames"]]
        assert main([*words, "--positions", addresses["positions"], "--dry-run", "--listen", "2"]) == 1
    heard = capsys.readouterr()
    assert re.search(r"^frames: armed \(scan gravel, .*distance 2.4\), nothing more came$", heard.out, re.MULTILINE)
    assert "this dry run has taken the detector's start message: arm it anew before the run" in heard.out
    assert "silent for 2 s, expected it to send: what is armed waits for its trigger, or to be told where" in heard.err


def free(port):
    with socket.socket() as trial:
        return trial.connect_ex(("127.0.0.1", port)) != 0


def test_a_least_monitor_without_a_monitor_is_refused_before_anything_is_opened(tmp_path, capsys):
    words = ["run", "--out", str(tmp_path / "run"), "workflows/live_scan.py", "--source", "dectris://d"]
    words += ["--positions", "zmq://pc:1?y=y&x=x", "--field", "-1", "1", "-1", "1", "--least-monitor", "1"]
    assert main(words) == 2
    assert "found --least-monitor without --monitor" in capsys.readouterr().err
