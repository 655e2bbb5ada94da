"""Each workflow end to end at small size, through the command line: real ranks and workers, real files."""

import bz2
import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest

from steering.campaign import fingerprint, replay
from steering.models import ModelStore
from steering.runner.folder import RunFolder
from tests.command_line import ran

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
FRAMES = 100
SMALL = ["--frames", str(FRAMES), "--frame-rate", "100", "--size", "128", "--step", "5", "--steps", "8"]
PARTS = ["acquire", "predict", "label", "load", "train", "populate", "augment", "wait", "publish"]


def started(command, cwd=ROOT, stdout=subprocess.PIPE, **options):
    """A command in a process group of its own."""
    return subprocess.Popen(
        command, stdout=stdout, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=cwd, **options
    )


class Terminal:
    """Reads what is written to a terminal, so that no writer waits for it."""

    def __init__(self, ours):
        self._ours, self._text = ours, b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        with contextlib.suppress(OSError):  # its other side is closed
            while piece := os.read(self._ours, 4096):
                self._text += piece
        os.close(self._ours)

    def text(self):
        """All of it, once nobody writes any more."""
        self._reader.join()
        return self._text.decode()


def finished(process, code=0):
    """Wait for it; what it wrote. Nothing it started may be left."""
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, f"exit {process.returncode}\n{out}\n{err}"
    assert gone(process.pid), f"processes left behind:\n{out}\n{err}"
    return out, err


def gone(group, seconds=15):
    """True once no process of the group is alive."""
    for _ in range(int(seconds * 10)):
        alive = [p for p in psutil.process_iter() if _group(p.pid) == group and p.status() != psutil.STATUS_ZOMBIE]
        if not alive:
            return True
        time.sleep(0.1)
    return False


def _group(pid):
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def test_the_demo_leaves_a_whole_run(tmp_path):
    """Three samples, two ranks, ER: what DESIGN.md lists is there, and nothing was lost on the way. The log alone
    leads to the same decisions."""
    out, _ = ran("simulated_drift.py", tmp_path / "run", *SMALL)
    assert out.strip().endswith("report.html")
    folder = RunFolder(tmp_path / "run")
    figures = folder.summary()
    assert figures["status"] == "finished"
    assert figures["scans"] == ["gravel", "pores", "brick"]
    assert figures["frames_acquired"] == figures["frames_predicted"] == 3 * FRAMES
    assert figures["frames_dropped"] == 0
    assert figures["versions_published"] >= 1
    assert figures["ranks"] == 2
    assert abs(figures["remote_representatives_share"] - 0.5) < 0.1
    assert set(figures["wall_s"]) == set(PARTS)
    assert figures["prediction_latency_ms"]["p50"] <= figures["prediction_latency_ms"]["p99"]
    for errors in figures["phase_error"].values():
        assert all(0 < errors[stage] < np.pi for stage in ("first", "own_end", "run_end"))
    for name, live in folder.objects().items():
        assert {"amplitude", "phase", "trust", "model_version", "truth_phase"} <= set(live.data_vars), name
        assert live["phase"].attrs["units"] == "rad"
        assert live.sizes["frame"] == FRAMES
        assert (live["frame_model_version"] == figures["final_refinement"][name]["version"]).all()
        assert live.attrs["refinement"].endswith(
            f"{figures['final_refinement'][name]['passes']} passes over all frames"
        )
    assert {"summary.json", "events.jsonl", "scheduler.json", "workflow.py", "report.html"} <= names(folder.path)
    store = ModelStore(folder.models)
    versions = store.versions()
    assert [v.number for v in versions] == list(range(figures["versions_published"] + 1))
    assert store.load(versions[-1].number).hyperparameters == versions[-1].hyperparameters
    taught = versions[-1].trained_on
    assert sum(taught.values()) <= 0.9 * 3 * FRAMES  # every tenth frame is never trained on
    replays(folder)


def names(path):
    """Names of what is in a folder."""
    return {p.name for p in path.iterdir()}


@pytest.fixture(scope="module")
def steered(tmp_path_factory):
    """The folder of a short run with another strategy, on one rank, with a policy that looks and a stage that moves."""
    folder = tmp_path_factory.mktemp("steered") / "run"
    options = ["--strategy", "derpp", "--ranks", "1", "--policy", "adaptive", "--velocity", "50"]
    ran("simulated_drift.py", folder, *SMALL, *options)
    return RunFolder(folder)


def test_the_log_replays_to_the_same_decisions(steered):
    figures = steered.summary()
    assert figures["strategy"] == "derpp"
    assert figures["remote_representatives_share"] == 0.0
    assert any(values[-1] > 0 for values in figures["rehearsal_buffer"]["stored"].values())
    replays(steered)


def test_a_campaign_is_steered_by_what_it_sees(steered):
    decisions = [event for event in steered.events() if event["event"] == "DecisionSuggested"]
    assert decisions
    assert all(len(one["reasons"]) == max(1, len(one["positions"])) for one in decisions)
    assert all(len(one["positions"]) <= 10 for one in decisions)
    assert steered.summary()["status"] == "finished"


def replays(folder):
    """The campaign comes to the same actions from the log alone, by the settings that stand in it: all of them."""
    campaign, actions = replay(folder.events())
    given = folder.summary()["actions"]
    assert Counter(type(action).__name__ for action in actions) == given["given"]
    assert fingerprint(actions) == given["sha256"]
    assert campaign.finished
    assert campaign.frames == 3 * FRAMES
    steered = [a.decision.positions for a in actions if type(a).__name__ == "Steer"]
    told = [e["event"] for e in folder.events()]
    # A policy that answers after the source's end steers nothing.
    logged = [e["positions"] for e in folder.events()[: told.index("SourceEnded")] if e["event"] == "DecisionSuggested"]
    assert json.loads(json.dumps(steered)) == logged
    published = [a.version for a in actions if type(a).__name__ == "Publish"]
    answered = [e["version"] for e in folder.events() if e["event"] in ("ModelPublished", "VersionRefused")]
    assert published == [version for version in answered if version]


def test_ctrl_c_ends_in_order(tmp_path):
    """No process is left, the folder says what happened, what was seen by then is there, and the terminal is given
    back: the cursor, and a line of its own to whatever is said next."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "steering.cli", "run", "workflows/simulated_drift.py"]
    command += ["--out", tmp_path / "run", "--frame-rate", "100"]
    process = started(command, stdout=theirs, env={**os.environ, "TERM": "xterm-256color"})
    os.close(theirs)
    shown = Terminal(ours)
    events = tmp_path / "run" / "events.jsonl"
    while not events.exists() or "PredictionReady" not in events.read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    _, err = finished(process, 130)
    text = shown.text()
    assert "\x1b[?25l" in text
    assert text.rindex("\x1b[?25l") < text.rindex("\x1b[?25h") < text.rindex("report: ")
    assert text.splitlines()[-1].removeprefix("\x1b[?25h").startswith("report: ")
    assert "Traceback" not in err
    folder = RunFolder(tmp_path / "run")
    assert folder.summary()["status"] == "interrupted"
    assert folder.objects()["gravel"].sizes["frame"] > 0


BREAKING = """
import numpy as np
from skimage import data

from steering import ER, Experiment, ProbeFirst, Raster, SimulatedBeamline, Stage, local, make_chunk, run
from steering import sample, zone_plate
from steering.records import chunk_geometry


class Breaking(SimulatedBeamline):
    # Its detector fails at the fourth chunk.
    def chunks(self):
        for number, chunk in enumerate(super().chunks()):
            if number == 3:
                counts = chunk["counts"].values.astype(np.float32)
                counts = FAULT(counts)
                where = np.stack([chunk["position_y"], chunk["position_x"]], 1)
                chunk = make_chunk(counts, chunk["frame"].values, where, chunk_geometry(chunk))
            yield chunk


def main(folder, arguments):
    probe = zone_plate(64, 50.0, aperture=0.52)
    stages = [Stage("brick", sample(data.brick(), phase=-2.0, absorption=0.1, size=128), 200)]
    source = Breaking(stages, probe=probe, step=5.0, frame_rate=100.0)
    policy = Raster(source.candidates)
    experiment = Experiment(source=source, policy=policy, network=ProbeFirst(width=8), strategy=ER())
    with local(ranks=1) as client:
        run(experiment, client, folder)
"""


FAULTS = {
    "nan": ("lambda counts: np.where(counts > 100, np.nan, counts)", "found nan at pixel"),
    "shape": ("lambda counts: counts[:, :32, :32]", "found frames of shape"),
}
ONE_BY_ONE = """
import sys
from steering import cli

for name in sys.argv[1:]:
    code = cli.main(["run", "--out", name, f"{name}.py"])
    assert code == 1, code
    print("-" * 20, file=sys.stderr, flush=True)
"""


def test_a_detector_that_fails_mid_scan_ends_the_run_with_a_plain_error(tmp_path):
    """One clear sentence, no process left, the folder says how it ended. The source's class is the workflow's own."""
    for name, (fault, _) in FAULTS.items():
        (tmp_path / f"{name}.py").write_text(BREAKING.replace("FAULT", f"({fault})"))
    _, err = finished(started([sys.executable, "-c", ONE_BY_ONE, *FAULTS], cwd=tmp_path))
    assert "Traceback" not in err
    *complaints, rest = err.split("-" * 20)
    assert not rest.strip()
    for complaint, (name, (_, expected)) in zip(complaints, FAULTS.items(), strict=True):
        assert expected in complaint
        assert len(complaint.strip().splitlines()) <= 3
        assert RunFolder(tmp_path / name).summary()["status"] == "failed"


def test_a_recorded_scan_end_to_end(tmp_path, data):
    """The middle of the real Siemens scan, in a file of its own, from no trained model."""
    folder = data / "ptycho-aps-velociprobe-siemens"
    with bz2.open(folder / "siemens-star-small.npz.bz2") as packed, np.load(packed) as file:
        inside = np.abs(file["scan"][0] - file["scan"][0].mean(0)).max(1) < 60
        np.savez(
            tmp_path / "middle.npz", probe=file["probe"], scan=file["scan"][:, inside], data=file["data"][:, inside]
        )
    arguments = ["--rounds", "1", "--ranks", "1", "--frame-rate", "100", "--margin", "20"]
    ran("replay_scan.py", tmp_path / "run", tmp_path / "middle.npz", *arguments)
    figures = RunFolder(tmp_path / "run").summary()
    assert figures["scans"] == ["middle"]
    assert figures["frames_acquired"] == figures["frames_predicted"] == inside.sum()
    assert figures["versions_published"] >= 1
    refined = RunFolder(tmp_path / "run").objects()["middle"]["phase_refined"]
    assert np.isfinite(refined).any()


def few_of_each(archive, copy, count):
    """The first images of every class, to train on and to test."""
    taken = Counter()
    with zipfile.ZipFile(archive) as file, zipfile.ZipFile(copy, "w") as smaller:
        for name in sorted(file.namelist()):
            if taken[folder := name.rpartition("/")[0]] < count and name.endswith(".png"):
                taken[folder] += 1
                smaller.writestr(name, file.read(name))


def test_class_incremental_tells_what_each_strategy_keeps_and_costs(tmp_path, data, monkeypatch):
    """Real images, few of each class, a narrow network: a rehearsal and its upper bound, all four tasks, two ranks."""
    (tmp_path / "cifar100").mkdir()
    few_of_each(data / "cifar100" / "cifar100_250x50.zip", tmp_path / "cifar100" / "cifar100_250x50.zip", 6)
    monkeypatch.setenv("STEERING_DATA", str(tmp_path))
    names = ["derpp", "from_scratch"]
    quick = f"--strategies {','.join(names)} --images 5 --epochs 1 --width 2 --batch 14 --candidates 7".split()
    run = tmp_path / "run"
    out, _ = ran("class_incremental.py", run, *quick, "--representatives", "7")
    strategies = RunFolder(run).summary()["strategies"]
    assert list(strategies) == names
    for name, figures in strategies.items():
        assert name in out
        assert 0 <= figures["top1_final"] <= figures["top5_final"] <= 100
        assert len(figures["top5_after_task"]) == 4
        assert figures["top5_after_task"][-1] == figures["top5_final"]
        assert figures["runtime_s"] > 0
        rehearsed = name not in ("incremental", "from_scratch")
        assert (figures["representatives"] > 0) == rehearsed
        assert (0.3 < figures["remote"] / figures["representatives"] < 0.7) if rehearsed else not figures["stored"]
    page = (run / "report.html").read_text()
    assert "top5_final" in page
    assert 'alt="accuracy"' in page


@pytest.mark.parametrize("tasks", ["simulated", "siemens"])
def test_reconstruction_incremental_tells_every_error_after_every_task(tmp_path, data, tasks):
    """Two strategies through four samples, or the quarters of the real scan, at a small size."""
    quick = ["--strategies", "der,from_scratch", "--frames", "40", "--passes", "1", "--epochs", "0.3", "--width", "4"]
    out, _ = ran("reconstruction_incremental.py", tmp_path, "--tasks", tasks, *quick)
    summary = RunFolder(tmp_path).summary()
    assert len(summary["tasks"]) == 4
    for name in ("der", "from_scratch"):
        figures = summary["strategies"][name]
        matrix = np.array(figures["error_matrix"])
        assert matrix.shape == (4, 4)
        assert np.isfinite(matrix).all()
        assert (matrix > 0).all()
        assert figures["error_final"] == pytest.approx(matrix[-1].mean())
        assert name in out
    assert summary["strategies"]["der"]["remote"] > 0
    assert 'alt="errors"' in (tmp_path / "report.html").read_text()


def test_the_benchmarks_of_the_buffer_run_and_keep_their_keys(tmp_path):
    """At a tiny size: whether their bars are reached is another matter."""
    rehearsal, scaling = tmp_path / "rehearsal", tmp_path / "scaling"
    ran("bench_rehearsal.py", rehearsal, "--fraction", "0.01", "--repeats", "2")
    figures = RunFolder(rehearsal).summary()
    for payload in ("image", "ptycho", "ptycho_float32"):
        for key in ("step_us", "raw_step_us", "step_over_raw", "insert_samples_per_s", "draw64_samples_per_s"):
            assert figures[payload][key] > 0
        assert set(figures[payload]["peers"]) == {"torchrl", "avalanche"}
    ran("bench_scaling.py", scaling, "--ranks", "2", "--steps", "5")
    figures = RunFolder(scaling).summary()
    assert figures["measured"]["2"]["exchange_ms"] > 0
    assert figures["measured"]["2"]["messages"] == 1
    assert figures["projected"]["1024"]["exchange_ms"] > figures["projected"]["128"]["exchange_ms"]
    assert figures["fitted"]["exchange_ms"]["2"] > 0
    assert 'alt="scaling"' in (scaling / "report.html").read_text()
    overlap = tmp_path / "overlap"
    quick = ["--repeats", "1", "--workload", "reconstruction"]
    ran("bench_overlap.py", overlap, *quick)
    figures = RunFolder(overlap).summary()["reconstruction"]
    assert set(figures["step_ms"]) == {"incremental_same_work", "er", "incremental_b"}
    assert figures["er_over_same_work"] > 0
    assert figures["exposed_wait_ms"]["p99"] >= figures["exposed_wait_ms"]["p50"] > 0
    assert -0.5 < figures["idle_cpu_share"] < 1
    assert 'alt="steps"' in (overlap / "report.html").read_text()


def test_bench_recovery_keeps_its_keys(tmp_path):
    """At a tiny size: whether its bars are reached is another matter."""
    quick = "--frames 60 --old-frames 20 --old-steps 4 --steps 4 --rounds 2 --evaluations 1 --width 4 --batch 8"
    ran("bench_recovery.py", tmp_path / "run", *quick.split())
    figures = RunFolder(tmp_path / "run").summary()
    assert {"cpu_s_to_90_percent", "wall_s_to_90_percent"} <= set(figures)
    assert figures["old_error_over_start"] >= 1
    assert figures["old_error_over_joint"] > 0
    assert 0 < figures["label_cpu_s"] < figures["cpu_s"]["self-made labels"]
    assert set(figures["new_error"]) == {"start", "self-made labels", "true labels", "joint training"}
    assert 'alt="recovery"' in (tmp_path / "run" / "report.html").read_text()


def test_the_benchmark_of_inference_runs_and_keeps_its_keys(tmp_path):
    """At a tiny size, the part beside training ranks included."""
    quick = ["--repeats", "1", "--frames", "40", "--passes", "0", "--train-s", "0.1", "--part", "1.5", "--turns", "1"]
    quick += ["--batches", "1", "64", "--width", "4", "--no-compiled"]
    ran("bench_inference.py", tmp_path, *quick)
    figures = RunFolder(tmp_path).summary()
    rates = figures["batch64"]["frames_per_s"]
    assert {"eager_float32", "channels_last_float32", "channels_last_bfloat16"} <= set(rates)
    assert figures["batch64"]["best_over_eager"] == max(rates.values()) / rates["eager_float32"]
    assert 0 < figures["batch64"]["share_of_peak"] < 2
    assert set(figures["batch64"]["phase_error_over_float32"]["simulated"]) == {*rates, "float32_rad"}
    assert figures["swap"]["swaps"] == 2
    assert figures["swap"]["frames_dropped"] == 0
    assert figures["swap"]["delay_over_p99"] > 0
    assert figures["swap"]["median_over_without"] > 0
    assert 0 <= figures["swap"]["share_above_p90"] <= 1
    assert figures["batch1"]["share_of_peak"] > 0
    assert figures["frame_to_decision_ms"]["p50"] <= figures["frame_to_decision_ms"]["p99"]
    for network in ("ProbeFirst", "PtychoNN"):
        for told in (figures["networks"][network], figures["while_training"][network]):
            assert set(told["frames_per_s"]) == {"1", "64"}
            assert told["latency_ms"]["eager_float32"]["p50"] <= told["latency_ms"]["eager_float32"]["p99"]
    assert 'alt="inference"' in (tmp_path / "report.html").read_text()


def test_the_benchmark_of_scale_runs_and_keeps_its_keys(tmp_path):
    ran("bench_scale.py", tmp_path, "--tiny")
    figures = RunFolder(tmp_path).summary()
    assert min(figures["cost_over_smallest"][key] for key in ("frames_1e5", "canvas_4096")) > 0
    assert all(delay > 0 for delay in figures["delay_ms"]["p99"].values())
    assert {"memory_per_frame_bytes", "held_over_budget"} <= set(figures)
    assert figures["onlookers"]["p99_over_without"] > 0
    assert (tmp_path / "scale.png").exists()


def test_the_benchmark_of_trust_runs_and_keeps_its_keys(tmp_path):
    """A network that has hardly learnt: whether the bars are reached is another matter."""
    small = {"scans": 4, "frames": 16, "repeats": 1, "after": 16, "steps": 5, "learnt": 24, "validation": 8, "width": 4}
    quick = [part for name, value in small.items() for part in (f"--{name}", value)]
    out, _ = ran("bench_trust.py", tmp_path, *quick)
    figures = RunFolder(tmp_path).summary()
    assert 0 <= figures["auc_bad_frame"] <= 1
    assert {"max", "missed", "scans"} <= set(figures["frames_to_alarm"])
    assert 0 <= figures["false_alarms_per_100_scans"] <= 100
    assert 0 <= figures["offset_caught_share"] <= 1
    assert len(figures["shifts"]) == 8
    for shift in figures["shifts"].values():
        assert len(shift["growth"]) == len(shift["frames_to_alarm"]) == 4
        assert shift["residual"] > 0
    assert "AUC" in out
    assert 'alt="trust"' in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"this is no scan", "HDF5"), (b"", "empty"), (b"\x89HDF\r\n\x1a\n" + b"\0" * 100, "truncated")],
    ids=["not-hdf5", "empty", "truncated"],
)
def test_a_file_that_is_no_recording_is_refused_in_words(tmp_path, content, expected):
    path = tmp_path / "scan.h5"
    path.write_bytes(content)
    _, err = ran("replay_scan.py", tmp_path / "run", path, code=1)
    assert "Traceback" not in err
    assert "scan.h5" in err
    assert len(err.strip().splitlines()) <= 3
    assert RunFolder(tmp_path / "run").summary()["status"] == "failed"
    assert expected.lower() in err.lower()
