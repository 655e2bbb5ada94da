"""The report and the comparison, on run folders with pictures of scikit-image and made-up curves."""

import shutil
import time
from datetime import UTC, datetime
from html.parser import HTMLParser

import numpy as np
import pytest
import xarray as xr
from scipy.ndimage import gaussian_filter
from skimage import data, transform

from steering.runner.folder import RunFolder
from steering.view.comparison import write_comparison
from steering.view.forgetting import forgetting, matrix
from steering.view.history import curves, history, running_median
from steering.view.notebook import LivePanel
from steering.view.pictures import live_picture, shown
from steering.view.report import write_report
from steering.view.status import status_lines

START = time.time() - 30
STREAM = {"received": 360, "joined": 358, "waiting": 0, "dropped": {"repeat": 2}, "lost": 0, "interpolated": 0}
PICTURES = {"camera": data.camera, "coins": data.coins, "bricks": data.brick}


def live_object(scan, place, frames=120, size=96, forgets=1.0):
    """The live object of a scan as a run leaves it: truth, a noisier network, a better refined image, and curves."""
    rng = np.random.default_rng(place)
    picture = transform.resize(PICTURES[scan]().astype(float) / 255, (size, size), anti_aliasing=True)
    other = transform.resize(data.moon().astype(float) / 255, (size, size), anti_aliasing=True)
    truth = (0.75 + 0.25 * other) * np.exp(1j * (1.6 * picture - 0.8))
    y, x = np.mgrid[:size, :size] / size
    gauge = np.exp(1j * (0.9 + 2.5 * y - 1.5 * x))
    edge = np.hypot(y - 0.5, x - 0.5) > 0.56
    noise = gaussian_filter(rng.normal(size=(2, size, size)), (0, 1.5, 1.5)) * 0.35 * forgets
    network = np.where(edge, 0, gaussian_filter(truth.real, 1) + 1j * gaussian_filter(truth.imag, 1))
    network = network * (1 + 0.1 * noise[0]) * np.exp(1j * noise[1])
    refined = np.where(edge, 0, truth * gauge)
    n = np.arange(frames)
    error = (0.45 if place else 1.1) * np.exp(-n / (0.2 * frames)) + 0.12 * forgets + 0.03 * rng.normal(size=frames)
    where = rng.uniform(-size / 3, size / 3, (frames, 2))
    pixels = {"y": (np.arange(size) - size / 2) * 1e-8, "x": (np.arange(size) - size / 2) * 1e-8}
    images = {
        "amplitude": np.abs(network),
        "phase": np.angle(network),
        "amplitude_refined": np.abs(refined),
        "phase_refined": np.angle(refined),
        "truth_amplitude": np.abs(truth),
        "truth_phase": np.angle(truth),
        "trust": np.where(edge, np.nan, np.clip(0.5 + 0.2 * noise[0], 0, 1)),
        "pixel_residual": np.where(edge, np.nan, 0.05 + 0.02 * np.abs(noise[0])),
        "model_version": np.where(edge, np.nan, place + 1.0),
    }
    per_frame = {
        "position_y": where[:, 0] * 1e-8,
        "position_x": where[:, 1] * 1e-8,
        "residual": 0.3 * np.clip(error, 0.02, None) ** 1.3 + 0.01,
        "offset": np.full(frames, np.nan),
        "frame_model_version": np.full(frames, place + 1),
        "held_out": n % 10 == 9,
        "error": np.abs(error),
        "acquired": START + 3 + (place * frames + n) / 50,
    }
    image = xr.Dataset(
        {name: (("y", "x"), value.astype(np.float32)) for name, value in images.items()}
        | {name: (("frame",), value) for name, value in per_frame.items()},
        coords=pixels,
    )
    for name in ("y", "x", "position_y", "position_x"):
        image[name].attrs["units"] = "m"
    return image


def made_up_run(path, scans=("camera", "coins", "bricks"), frames=120, forgets=1.0, strategy="ER"):
    """A finished run: objects, events and figures, without its ending."""
    folder = RunFolder.create(path)
    version = 0
    for place, scan in enumerate(scans):
        folder.write_object(scan, live_object(scan, place, frames, forgets=forgets))
        for chunk in range(0, frames, 10):
            now = START + 3 + (place * frames + chunk) / 50
            ids = list(range(place * frames + chunk, place * frames + chunk + 10))
            level = 0.3 * float(np.exp(-chunk / 30)) + 0.02
            folder.append_event({"event": "ChunkArrived", "time": now, "scan": scan, "frame_ids": ids})
            folder.append_event(
                {
                    "event": "PredictionReady",
                    "time": now,
                    "scan": scan,
                    "frame_ids": ids,
                    "version": version,
                    "residual": level,
                }
            )
            trust = {"time": now, "scan": scan, "residual": level, "expected": 0.035}
            if place and chunk == 10:
                folder.append_event({"event": "DriftRaised", **trust})
            if place and chunk == 70:
                folder.append_event({"event": "DriftLowered", **trust})
            if chunk % 90 == 50:
                version += 1
                folder.append_event(
                    {
                        "event": "ModelPublished",
                        "time": now,
                        "version": version,
                        "validation_error": 0.6 / version**0.5,
                        "validation_residual": 0.03 + 0.01 / version,
                    }
                )
    folder.append_event({"event": "SourceEnded", "time": START + 12})
    folder.write_summary(
        {
            "started": datetime.fromtimestamp(START, UTC).isoformat(),
            "strategy": strategy,
            "ranks": 2,
            "scans": list(scans),
            "frames_acquired": frames * len(scans),
            "frames_predicted": frames * len(scans),
            "frames_dropped": 0,
            "versions_published": version,
            "remote_representatives_share": 0.493,
            "rehearsal_buffer": {
                "steps": [30, 60, 90],
                "stored": {scan: [10 * max(0, step - place) for step in (1, 2, 3)] for place, scan in enumerate(scans)},
                "age": {scan: {"age_p10": 5.0, "age_p50": 40.0, "age_p90": 90.0} for scan in scans},
            },
            "prediction_latency_ms": {"p50": 7.31, "p99": 31.2},
            "phase_error": {
                scan: {"first": 0.9 / (place + 1), "own_end": 0.13 * forgets, "run_end": 0.15 * forgets**2}
                for place, scan in enumerate(scans)
            },
            "forgetting": {
                "versions": [0, 1, 2, version],
                "own_end": {scan: min(place + 1, version) for place, scan in enumerate(scans)},
                "errors": {scan: [0.9, 0.5, None, 0.15 * forgets**2] for scan in scans},
            },
            "streams": {"frames": STREAM},
            "wall_s": {
                "acquire": 31.0,
                "predict": 4.2,
                "label": 22.5,
                "load": 0.4,
                "train": 41.0,
                "populate": 0.3,
                "augment": 0.9,
                "wait": 1.1,
                "publish": 0.6,
            },
            "total_s": 74.2,
        }
    )
    return folder


class Loads(HTMLParser):
    """What a page would load, and the text of its pictures."""

    def __init__(self):
        super().__init__()
        self.sources, self.alts, self.tags = [], [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        attrs = dict(attrs)
        self.sources += [attrs[key] for key in ("src", "href", "srcset", "data", "action") if key in attrs]
        if tag == "img":
            self.alts.append(attrs.get("alt", ""))


def loads(path):
    parser = Loads()
    parser.feed(path.read_text())
    return parser


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = made_up_run(tmp_path_factory.mktemp("runs") / "er", forgets=1.0)
    folder.end("finished")
    write_report(folder)
    return folder


def test_the_report_loads_nothing_from_outside(run):
    found = loads(run.path / "report.html")
    assert found.sources
    assert all(source.startswith(("data:image/png;base64,", "data:image/webp;base64,")) for source in found.sources)
    assert not found.tags & {"script", "iframe", "object", "embed", "base"}
    text = (run.path / "report.html").read_text()
    assert "@import" not in text
    assert "url(" not in text
    assert "http://" not in text
    assert "https://" not in text


def test_the_report_shows_every_scan_curves_positions_and_figures(run):
    text = (run.path / "report.html").read_text()
    alts = " | ".join(loads(run.path / "report.html").alts)
    for scan in run.summary()["scans"]:
        assert f"Live object of {scan}: amplitude above, phase below; network, refined, the truth" in alts
        assert f"<h3>{scan}</h3>" in text
    for word in ("Error and far-field residual", "Positions measured", "Validation error", "rehearsal buffers"):
        assert word in alts
    for word in ("finished", "360 frames", "49%", "7.31 ms", "0.130", "s  the run finished"):
        assert word in text
    for word in ("<h2>Forgetting</h2>", "Validation error by version", "dropped.repeat", "456 ms"):
        assert word in text
    assert ", seq " not in text  # events are told in words, as on the live page
    assert text.count("<td class=own") == len(run.summary()["scans"])
    assert text.index("<img") < text.index("Key figures")


def test_the_report_stays_below_5_mb_and_says_which_objects_it_shows(run, tmp_path, monkeypatch):
    monkeypatch.setattr("steering.view.report.PICTURES_BYTES", 1)
    folder = RunFolder(shutil.copytree(run.path, tmp_path / "run"))
    text = write_report(folder).read_text()
    assert "The last 1 of 3 scans" in text
    assert [f"<h3>{scan}</h3>" in text for scan in folder.summary()["scans"]] == [False, False, True]
    assert (run.path / "report.html").stat().st_size < 5e6


def test_the_matrix_of_forgetting_has_the_scans_in_their_order():
    found = forgetting(
        {
            "scans": ["b", "a"],
            "forgetting": {
                "versions": [0, 3],
                "own_end": {"a": 3},
                "errors": {"a": [0.4, 0.1], "b": [0.2, None]},
            },
        }
    )
    assert list(found.errors) == ["b", "a"]
    assert matrix(found).count("background") == 3
    assert forgetting({}) is forgetting({"forgetting": {}}) is None


def test_a_benchmarks_figures_and_pictures_are_shown(tmp_path):
    """Nested figures become tables, a picture that the workflow wrote is shown; lists are left to the pictures."""
    folder = RunFolder.create(tmp_path / "bench")
    folder.write_summary(
        {
            "strategies": {"er": {"top5_final": 41.5, "top5_after_task": [1, 2]}, "agem": {"top5_final": 33.25}},
            "payload": {"step_us": 12.5, "peers": {"torchrl": {"step_us": 99.0}}},
        }
    )
    dot = bytes.fromhex(
        "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c6360606060000000050001"
        "a5f645400000000049454e44ae426082"
    )
    folder.write_file("accuracy_over_tasks.png", dot)
    folder.end("finished")
    page = write_report(folder)
    text = page.read_text()
    for word in ("41.5", "33.25", "12.5", "99", "torchrl", "<h3>payload, peers</h3>", "Accuracy over tasks"):
        assert word in text
    assert "top5_after_task" not in text
    assert "accuracy over tasks" in loads(page).alts


def test_the_report_is_a_function_of_the_folder(tmp_path):
    run = made_up_run(tmp_path / "run", scans=["camera"], frames=20)
    first = write_report(run).read_bytes()
    assert write_report(RunFolder(run.path)).read_bytes() == first


def test_whatever_a_run_says_stays_text(tmp_path):
    folder = made_up_run(tmp_path / "<i>run", scans=["camera"], frames=20)
    folder.append_event({"event": "<script>alert(1)</script>", "time": START, "note": "<b>x</b>"})
    folder.end("failed", "<img src=x onerror=alert(1)>", traceback="<script>y</script>")
    found = loads(write_report(folder))
    assert "script" not in found.tags
    text = (folder.path / "report.html").read_text()
    assert "&lt;img src=x onerror=alert(1)&gt;" in text
    assert "&lt;i&gt;run" in text


@pytest.mark.parametrize(("status", "said"), [("failed", "This run failed."), ("interrupted", "was interrupted")])
def test_a_run_that_broke_off_says_so_with_what_there_is(tmp_path, status, said):
    folder = RunFolder.create(tmp_path / "run")
    folder.end(status, "found nothing, expected something")
    text = write_report(folder).read_text()
    assert said in text
    assert "found nothing, expected something" in text
    assert "No frame had been measured" in text


def test_a_part_that_cannot_be_made_is_told_and_the_others_are_made(tmp_path, caplog):
    """A damaged object, and figures that are none."""
    run = made_up_run(tmp_path / "run", scans=("camera",), frames=30)
    for chunk in (run.path / "object.zarr" / "camera" / "phase").rglob("c/*/*"):
        chunk.write_bytes(b"damaged")
    run.write_summary({"wall_s": {"train": "long"}})
    page = write_report(run).read_text()
    assert page.count("This part could not be made.") == 2
    for heading in ("Objects", "Where the time went", "Key figures", "Last events"):
        assert f"<h2>{heading}</h2>" in page
    assert "the part 'Objects' of the report failed" in caplog.text
    assert "Traceback" in caplog.text


def test_a_picture_that_fails_is_said_and_logged_once_and_the_report_is_there(tmp_path, monkeypatch):
    folder = made_up_run(tmp_path / "run", scans=["camera"], frames=20)

    def broken(*_):
        raise ZeroDivisionError("found no ink")

    monkeypatch.setattr("steering.view.report.course_picture", broken)
    for _ in range(2):
        html = write_report(folder).read_text()
        assert "ZeroDivisionError: found no ink" in html
        assert "The live object" in html
    [event] = [e for e in folder.events() if e["event"] == "WorkFailed"]
    assert "in broken" in event["traceback"]
    assert any("found no ink" in line for line in status_lines(folder))


def test_a_run_whose_process_is_gone_says_so(tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    assert "has not ended yet" in write_report(folder).read_text()
    folder.write_summary({"pid": 2**22 + 1})
    assert "It ended without a message" in write_report(folder).read_text()


def test_objects_without_truth_or_refinement_or_frames_are_drawn(tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    whole = live_object("camera", 0, frames=30)
    folder.write_object("network", whole[["amplitude", "phase"]])
    folder.write_object("refined", whole[["amplitude", "phase", "amplitude_refined", "phase_refined", "residual"]])
    folder.write_object("nothing yet", whole[["amplitude", "phase"]] * np.nan)
    alts = " | ".join(loads(write_report(folder)).alts)
    assert "Live object of network: amplitude above, phase below; network |" in alts
    assert "Live object of refined: amplitude above, phase below; network, refined |" in alts
    assert "nothing yet" not in alts


def test_phases_are_shown_in_the_gauge_of_the_truth():
    network, refined, truth = shown(live_object("coins", 1))
    there = np.isfinite(refined.phase)
    assert [version.title for version in (network, refined, truth)] == ["network alone", "refined", "truth"]
    assert np.abs(refined.phase - truth.phase)[there].mean() < 0.05
    assert np.abs(network.phase - truth.phase)[there].mean() < 0.3
    dim = live_object("coins", 1)
    dim["amplitude_refined"] = dim["amplitude_refined"] * 0.7  # by half the flux
    np.testing.assert_allclose(shown(dim)[1].amplitude[there], refined.amplitude[there], rtol=1e-3)


def test_the_comparison_names_both_runs_and_what_each_forgot(run, tmp_path):
    other = made_up_run(tmp_path / "incremental", forgets=1.5, strategy="incremental")
    other.end("finished")
    out = write_comparison([run, other], tmp_path / "both.html")
    text, found = out.read_text(), loads(out)
    assert all(source.startswith(("data:image/png;base64,", "data:image/webp;base64,")) for source in found.sources)
    for word in ("er (finished)", "incremental (finished)", "camera, end of run / end of its scan", "1.15", "1.73"):
        assert word in text
    assert "Error over frames of er, incremental" in found.alts
    assert 'best">0.150' in text
    assert 'best">0.337' not in text


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    first, second = RunFolder.create(tmp_path / "a" / "er"), RunFolder.create(tmp_path / "b" / "er")
    text = write_comparison([first, second, first], tmp_path / "both.html").read_text()
    assert "2 runs side by side" in text
    assert "a/er (running), b/er (running)" in text


def test_frames_are_numbered_in_the_order_of_acquisition():
    late, early = live_object("camera", 1, frames=20), live_object("coins", 0, frames=20)
    found = curves({"late": late.isel(frame=slice(None, None, -1)), "early": early})
    assert [curve.scan for curve in found] == ["late", "early"]
    np.testing.assert_array_equal(found[0].number, np.arange(20, 40))
    np.testing.assert_array_equal(found[1].number, np.arange(20))
    np.testing.assert_allclose(found[0].error, late.error.values)


def test_history_counts_what_the_log_tells(run):
    past = history(run.events())
    assert (past.acquired, past.predicted, past.scans) == (360, 360, ("camera", "coins", "bricks"))
    assert [version.number for version in past.versions] == [1, 2, 3]
    assert [(drift.scan, drift.stop - drift.start) for drift in past.drifts] == [("coins", 60), ("bricks", 60)]
    assert past.versions[1].frame == 180


def test_the_running_median_leaves_out_what_is_unknown():
    values = np.array([1.0, np.nan, 3.0, 100.0, 5.0])
    np.testing.assert_allclose(running_median(values, 3), [1, 2, 51.5, 5, 52.5])
    assert np.isnan(running_median(np.full(4, np.nan), 3)).all()


def test_the_live_picture_needs_no_more_than_amplitude_and_phase():
    whole = live_object("bricks", 2, frames=10)
    for live in (whole, whole.drop_vars("trust"), whole[["amplitude", "phase"]]):
        assert live_picture(live).startswith(b"\x89PNG")
    assert live_picture(whole[["amplitude", "phase"]] * np.nan) is None


def test_the_notebook_panel_runs_without_a_front_end(capsys):
    panel = LivePanel(every_s=0)
    panel.update(live_object("bricks", 2, frames=10), {"scan": "bricks", "residual": 0.2, "drift": True})
    panel.update(live_object("bricks", 2, frames=10), {"status": "finished"})
