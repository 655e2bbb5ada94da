"""The figures of a run as curves for TensorBoard."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from steering.runner.figures import Family


class Curves:
    """Writes event files into a folder; a curve for each figure, over the steps of training and over time."""

    def __init__(self, folder: Path) -> None:
        """Raises ImportError without the extra `tensorboard`."""
        from tensorboard.compat.proto.event_pb2 import Event  # noqa: PLC0415 - an extra
        from tensorboard.compat.proto.summary_pb2 import Summary  # noqa: PLC0415
        from tensorboard.summary.writer.event_file_writer import EventFileWriter  # noqa: PLC0415

        self._event, self._summary = Event, Summary
        self._writer = EventFileWriter(str(folder))

    def add(self, figures: Iterable[Family]) -> None:
        """Add a point to each curve. Histograms are left out: TensorBoard's own are of another kind."""
        plain = [each for each in figures if each.kind != "histogram"]
        steps = next((each.samples[0][1] for each in plain if each.name == "steering_training_steps"), 0.0)
        values = [
            self._summary.Value(tag="/".join([each.name.removeprefix("steering_"), *labels]), simple_value=value)
            for each in plain
            for labels, value in each.samples
        ]
        self._writer.add_event(self._event(wall_time=time.time(), step=int(steps), summary=self._summary(value=values)))
        self._writer.flush()

    def close(self) -> None:
        """Write what is left, and end the writer's thread."""
        self._writer.close()
