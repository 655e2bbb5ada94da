"""What a run says to those who watch many: scraped from a real run, and the dashboard that shows it."""

import json
import logging
import re
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families as parsed
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from steering.clusters import local
from steering.inference.latency import Latency
from steering.logs import VARIABLE, JSONLines
from steering.runner import RunFolder, start
from steering.runner.figures import Family, of_streams
from steering.runner.prometheus import text
from tests.test_runner import experiment, told

ROOT = Path(__file__).parents[1]
STREAMS = {
    "frames": {"received": 9, "joined": 7, "lost": 1, "dropped": {"late": 1}, "waiting": 2, "silent_s": 0.5},
    "positions": {"received": 8, "joined": 7, "lost": 0, "dropped": {}, "waiting": 1, "silent_s": None},
}


@pytest.fixture(scope="module")
def scraped(tmp_path_factory):
    """(Dask's /metrics while a run goes on, its folder, how workers log)."""
    folder = RunFolder.create(tmp_path_factory.mktemp("metrics") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "json")
        with local(ranks=1) as client:
            formatters = set(client.run(lambda: type(logging.getLogger().handlers[0].formatter).__name__).values())
            run = start(replace(experiment(frames=3000), ranks=1, tensorboard=True), client, folder)
            found = ""
            published, over = re.compile(r'steering_versions_total{fate="published",run="run"} [1-9]'), False
            while not (published.search(found) or over):  # the newest figures stay for a while after the end
                over = run.done
                time.sleep(0.2)
                if address := folder.summary().get("metrics"):
                    with urllib.request.urlopen(address, timeout=30) as answer:
                        found = answer.read().decode()
            if not run.done:
                run.command("stop")
            run.result()
    return found, folder, formatters


def samples_of(found):
    """Of each figure: its value by labels."""
    return {
        (sample.name, *sorted((k, v) for k, v in sample.labels.items() if k != "run")): sample.value
        for family in parsed(found)
        if family.name.startswith("steering_")
        for sample in family.samples
    }


@pytest.mark.slow
def test_dasks_own_server_shows_what_a_run_does(scraped):
    found, folder, _ = scraped
    figures, summary = samples_of(found), folder.summary()
    acquired, predicted = (figures["steering_frames_total", ("fate", fate)] for fate in ("acquired", "predicted"))
    assert 0 < predicted <= summary["frames_predicted"]
    assert 0 < acquired <= summary["frames_acquired"]
    assert 1 <= figures["steering_version",] <= summary["versions_published"]
    assert figures["steering_versions_total", ("fate", "published")] <= summary["versions_published"]
    assert 0 < figures["steering_residual",] < 10
    assert 0 <= figures.get(("steering_trust", ("by", "residual")), 0.5) <= 1  # it needs a version that was judged
    assert figures["steering_drift",] in (0, 1)
    for part in ("load", "train", "wait", "label", "publish", "predict"):
        assert figures["steering_part_seconds_total", ("part", part)] > 0
    assert figures["steering_training_steps_total",] >= 10
    assert figures["steering_buffer_samples", ("scan", "brick")] == figures["steering_buffer_stored",] > 0
    assert figures["steering_buffer_stored",] <= figures["steering_buffer_capacity",]
    assert {key[1][1] for key in figures if key[0] == "steering_queue_length"} == {
        "prediction",
        "revision",
        "report",
        "measurement",
    }
    buckets = [value for key, value in figures.items() if key[0] == "steering_latency_seconds_bucket"]
    assert buckets == sorted(buckets)
    assert buckets[-1] == figures["steering_latency_seconds_count",] > 0
    assert figures["steering_latency_seconds_sum",] > 0
    assert "dask_scheduler_workers" in found  # Dask's own are there as before


@pytest.mark.slow
def test_the_same_figures_become_curves(scraped):
    _, folder, _ = scraped
    curves = EventAccumulator(str(folder.path / "tensorboard"))
    curves.Reload()
    frames = [point.value for point in curves.Scalars("frames/predicted")]
    assert len(frames) > 1
    assert frames == sorted(frames)
    assert frames[-1] <= folder.summary()["frames_predicted"]
    steps = [point.step for point in curves.Scalars("training_loss")]
    assert steps == sorted(steps)
    assert steps[-1] >= 10


@pytest.mark.slow
def test_every_query_of_the_dashboard_names_figures_and_labels_that_there_are(scraped):
    found, folder, _ = scraped
    there = {}
    trust = Family("steering_trust", "gauge", "of a version that was judged", ("by",), ((("residual",), 0.5),))
    for each in [*parsed(found), *parsed(text("run", [*of_streams(STREAMS), trust]).decode())]:
        for sample in each.samples:
            there.setdefault(sample.name, set()).update(sample.labels)
    dashboard = json.loads((ROOT / "dashboards" / "grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = set()
    for query in queries:
        names = set(re.findall(r"\bsteering_\w+", query))
        assert names <= set(there), query
        labels = set(re.findall(r"(\w+)=~?\"", query))
        labels |= {word for group in re.findall(r"by \(([^)]*)\)", query) for word in re.findall(r"\w+", group)}
        assert labels <= set.union(*(there[name] for name in names)), query
        asked |= names
    listed = {name.removesuffix("_sum").removesuffix("_count") for name in there if name.startswith("steering_")}
    shown = {name.removesuffix("_bucket") for name in asked}
    unseen = {"steering_elapsed_seconds", "steering_paused", "steering_checkpoint", "steering_buffer_stored"}
    assert {name.removesuffix("_bucket") for name in listed} - shown == unseen
    assert "steering_elapsed_seconds" in dashboard["templating"]["list"][1]["query"]["query"]
    assert not told(folder, "WorkFailed")


def test_streams_are_counted_by_fate():
    figures = samples_of(text("run", of_streams(STREAMS)).decode())
    assert figures["steering_stream_messages_total", ("fate", "received"), ("stream", "frames")] == 9
    assert figures["steering_stream_messages_total", ("fate", "dropped_late"), ("stream", "frames")] == 1
    assert figures["steering_stream_waiting", ("stream", "positions")] == 1
    assert ("steering_stream_silent_seconds", ("stream", "positions")) not in figures  # nothing has come yet


def test_figures_survive_their_way_to_the_scheduler():
    family = Family("steering_frames", "counter", "of it", ("fate",), ((("dropped",), 3.0),))
    assert Family.from_json(json.loads(json.dumps(family.to_json()))) == family
    assert b'steering_frames_total{fate="dropped",run="a \\"b\\""} 3.0' in text('a "b"', [family])


def test_latency_is_counted_up_to_limits():
    latency = Latency()
    latency.add(np.array([0.0005, 0.004, 0.004, 0.2, 30.0]))
    found = dict(latency.buckets())
    assert [found[limit] for limit in ("0.001", "0.005", "0.1", "0.25", "10", "+Inf")] == [1, 3, 3, 4, 4, 5]
    assert latency.sum_s == pytest.approx(30.2085)


@pytest.mark.slow
def test_workers_log_as_the_driver_does(scraped):
    assert scraped[2] == {JSONLines.__name__}


@pytest.mark.slow
def test_what_is_logged_is_an_object_a_line_where_that_is_wanted(tmp_path):
    workflow = tmp_path / "fails.py"
    workflow.write_text(
        "import logging\n"
        "def main(folder, arguments):\n"
        "    try:\n"
        "        1 / 0\n"
        "    except ZeroDivisionError:\n"
        "        logging.getLogger('mine').warning('with a\\nbreak, %s', 'and \"quotes\"', exc_info=True)\n"
        "    raise ValueError('found nothing, expected something')\n"
    )
    command = [sys.executable, "-m", "steering.cli", "--log", "json", "run", "--out", tmp_path / "run", workflow]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path)
    assert done.returncode == 1
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["level"] for line in lines] == ["warning", "error", "error"]
    assert lines[0]["message"] == 'with a\nbreak, and "quotes"'
    assert lines[0]["error"] == "ZeroDivisionError: division by zero"
    assert "1 / 0" in lines[0]["traceback"]
    assert "found nothing, expected something" in lines[1]["message"]
    assert all(line["time"].endswith("+00:00") and line["process"] > 0 and line["logger"] for line in lines)
