"""The matrix of forgetting: whose errors it has, and of which versions."""

import json

from steering.campaign import Campaign, ChunkArrived, ModelPublished, PredictionReady, ScansJudged
from steering.learning import PARTS, Round
from steering.records.plain import plain, whole
from steering.runner.forgetting import forgetting, spread
from steering.runner.metrics import MOST_JUDGED, Metrics, advance


def judged(versions):
    """Of a run in which version 3 was refused."""
    metrics = Metrics(None, Campaign())
    metrics.campaign.served.extend(version for version in versions if version != 3)
    metrics.own_end = {"a": 2, "b": 7, "not judged yet": 7}
    for version in versions:
        errors = {"a": 0.1 * version} | ({"b": 0.5} if version > 2 else {})
        metrics.note(ScansJudged(time=0.0, version=version, errors=errors))
    return metrics


def test_every_scan_has_an_error_by_version_once_it_has_one():
    metrics = judged([1, 2, 3, 4])
    found = forgetting(metrics)
    assert json.loads(json.dumps(found)) == {
        "versions": [1, 2, 4],
        "own_end": {"a": 2, "b": 7},
        "errors": {"a": [0.1, 0.2, 0.4], "b": [None, None, 0.5]},
    }
    metrics.judged = whole(plain(metrics.judged))  # as a checkpoint keeps it
    assert forgetting(metrics) == found
    assert forgetting(judged([])) == {}


def test_a_run_of_days_keeps_some_of_its_versions():
    metrics = judged(range(5 * MOST_JUDGED))
    assert len(metrics.judged) <= MOST_JUDGED
    found = forgetting(metrics)["versions"]
    assert {2, 7} < set(found)
    assert len(found) == 16
    assert max(metrics.judged) == 5 * MOST_JUDGED - 1


def test_the_end_of_a_scan_is_its_last_frame():
    """Versions that come after it, as at the end of a run, are none of its own."""
    metrics = Metrics(None, Campaign())
    for event in (
        ModelPublished(time=0.0, version=0, validation_error=0.5, validation_residual=0.1),
        ChunkArrived(time=0.0, scan="a", frame_ids=(0, 1)),
        PredictionReady(time=0.0, scan="a", frame_ids=(0,), version=0, residual=0.1),
        PredictionReady(time=0.0, scan="a", frame_ids=(1,), version=3, residual=0.1),
        ModelPublished(time=0.0, version=4, validation_error=0.5, validation_residual=0.1),
    ):
        metrics.note(event)
        advance(metrics.campaign, metrics, event)
    assert metrics.own_end == {"a": 3}


def test_how_it_began_on_earlier_runs_frames_is_what_was_said_first():
    """A rank that takes the place of the first one knows only what serves now."""

    def trained(metrics, errors):
        said = {"steps": 1, "loss": 1.0, "representatives": 0, "remote": 0, "stored": 0, "capacity": 1}
        seconds = dict.fromkeys(PARTS, 0.0)
        metrics.trained([Round(**said, seconds=seconds, composition={}, seen={}, earlier_errors=errors)])

    metrics, other = Metrics(None, Campaign()), Metrics(None, Campaign())
    for errors in (None, (0.9, 0.8), (0.8, 0.6), None):
        trained(metrics, errors)
    other.restore(json.loads(json.dumps(metrics.state())))
    trained(other, (0.6, 0.5))
    assert (metrics.earlier, other.earlier) == ((0.9, 0.6), (0.9, 0.5))


def test_what_is_wanted_is_in_and_the_rest_is_spread_evenly():
    assert spread(range(100), {0, 40, 99}, 8) == [0, 10, 30, 40, 50, 69, 89, 99]
    assert spread(range(5), {0, 4}, 8) == [0, 1, 2, 3, 4]
    assert spread(range(9), {0, 3, 6, 8}, 2) == [0, 3, 6, 8]
    assert spread([], set(), 8) == []
