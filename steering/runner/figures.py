"""What a run says of itself to those who watch many: figures with names, units and labels, as Prometheus has them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any, Literal

from steering.learning import PARTS
from steering.runner.metrics import Metrics, snapshot

Kind = Literal["counter", "gauge", "histogram"]
Samples = list[tuple[tuple[str, ...], float]]


@dataclass(frozen=True)
class Family:
    """Figures of one name."""

    name: str
    """Without the `_total` that counters end in."""
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    samples: tuple[tuple[tuple[str, ...], float], ...] = ()
    """Values of the labels, and the figure. Of a histogram the last label is `le`, the upper limit, and figures count
    everything up to it."""
    sum: float = 0.0
    """Of what a histogram counts."""

    def to_json(self) -> dict[str, Any]:
        """In JSON's types."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Family:
        """What `to_json` returned, which may have become lists of lists on its way."""
        samples = tuple((tuple(labels), float(value)) for labels, value in data["samples"])
        return cls(**{**data, "labels": tuple(data["labels"]), "samples": samples})


def families(metrics: Metrics, source: Mapping[str, Any], predictor: Mapping[str, Any]) -> list[Family]:
    """All figures of a run. source, predictor: what these say of themselves."""
    now = snapshot(metrics, dict(source), dict(predictor))
    return [each for each in _all(metrics, source, predictor, now) if each.samples]


def _all(
    metrics: Metrics, source: Mapping[str, Any], predictor: Mapping[str, Any], now: Mapping[str, Any]
) -> Iterable[Family]:
    campaign = metrics.campaign
    yield _one("steering_elapsed_seconds", "gauge", "since the run began", now["elapsed_s"])
    yield _by(
        "steering_frames",
        "frames of the run by what became of them",
        "fate",
        {
            "acquired": source["frames_acquired"],
            "dropped": source["frames_dropped"],
            "predicted": metrics.predicted,
            "lost": sum(metrics.lost.values()),
            **{f"set_aside_{reason}": count for reason, count in metrics.aside.items()},
        },
    )
    yield from of_streams(source["streams"])
    yield _one("steering_version", "gauge", "model version in service", predictor["version"])
    fates = {"published": metrics.published, "refused": metrics.refused}
    yield _by("steering_versions", "model versions by what became of them", "fate", fates)
    yield _by(
        "steering_trust",
        "share of validation frames that look as bad, 0.5: none is worse",
        "by",
        campaign.trust,
        "gauge",
    )
    yield _one("steering_residual", "gauge", "median residual of the newest chunk of frames", now["residual"])
    yield _one("steering_residual_expected", "gauge", "of the version in service", now["residual_expected"])
    for name in ("drift", "training", "paused"):
        yield _one(f"steering_{name}", "gauge", f"1 while there is {name}", float(now[name]))
    seconds = {part: metrics.seconds[part] for part in ("label", *PARTS, "publish")}
    yield _by("steering_part_seconds", "seconds spent by part of the work, those of a training step included", "part",
              {**seconds, "acquire": source["acquire_s"], "predict": predictor["predict_s"]})  # fmt: skip
    yield _one("steering_training_steps", "counter", "of each rank", now["steps"])
    yield _one("steering_training_loss", "gauge", "mean of the newest round", now["loss"])
    yield from _buffer(metrics)
    yield _one(
        "steering_ranks", "gauge", "that took part in the newest round", len(metrics.rounds[-1:] and metrics.rounds[-1])
    )
    losses = {"rank": metrics.ranks_lost, "predictor": metrics.replaced, "silent": metrics.silent}
    yield _by("steering_workers_lost", "workers that were lost, or silent for too long", "role", losses)
    yield _by("steering_representatives", "stored samples used in training", "from",
              {"own": metrics.representatives - metrics.remote, "remote": metrics.remote})  # fmt: skip
    waiting = {
        "prediction": predictor["chunks_waiting"],
        "revision": predictor["frames_to_revise"],
        "report": sum(map(metrics.unreported, metrics.arrived)),
        "measurement": campaign.outstanding,
    }
    what = "what waits: chunks for prediction, frames for revision and for report, positions for measurement"
    yield _by("steering_queue_length", what, "queue", waiting, "gauge")
    buckets = tuple(((le,), float(count)) for le, count in predictor["latency_buckets"])
    what = "from a frame's arrival to its prediction"
    yield Family("steering_latency_seconds", "histogram", what, ("le",), buckets, float(predictor["latency_sum_s"]))
    yield _one("steering_checkpoint", "gauge", "number of the newest checkpoint", metrics.checkpoints)


def of_streams(streams: Mapping[str, Mapping[str, Any]]) -> Iterable[Family]:
    """Of the source's streams, see `Source.streams`."""
    fates: Samples = []
    for stream, figures in streams.items():
        counts = {"received": figures["received"], "joined": figures["joined"], "lost": figures["lost"]}
        counts |= {f"dropped_{reason}": count for reason, count in figures["dropped"].items()}
        fates += [((stream, fate), float(count)) for fate, count in counts.items()]
    yield Family("steering_stream_messages", "counter", "of each stream by fate", ("stream", "fate"), tuple(fates))
    waiting = {stream: figures["waiting"] for stream, figures in streams.items()}
    yield _by("steering_stream_waiting", "messages that wait for those of other streams", "stream", waiting, "gauge")
    silent = {stream: figures["silent_s"] for stream, figures in streams.items()}
    yield _by("steering_stream_silent_seconds", "since a stream's newest message", "stream", silent, "gauge")


def _buffer(metrics: Metrics) -> Iterable[Family]:
    rounds = metrics.rounds[-1] if metrics.rounds else []
    for name, what in (("stored", "samples"), ("capacity", "samples that fit")):
        total = sum(getattr(each, name) for each in rounds) if rounds else None
        yield _one(f"steering_buffer_{name}", "gauge", f"{what} in the rehearsal buffers of all ranks", total)
    held = {
        scan: sum(each.composition[key]["count"] for each in rounds if key in each.composition)
        for scan, key in metrics.strata.items()
    }
    yield _by("steering_buffer_samples", "stored samples by scan", "scan", held, "gauge")


def _one(name: str, kind: Kind, help_: str, value: float | None) -> Family:
    return Family(name, kind, help_, (), () if value is None or not isfinite(value) else (((), float(value)),))


def _by(name: str, help_: str, label: str, values: Mapping[str, Any], kind: Kind = "counter") -> Family:
    found = {key: float(value) for key, value in values.items() if value is not None}
    return Family(
        name, kind, help_, (label,), tuple(((key,), value) for key, value in found.items() if isfinite(value))
    )
