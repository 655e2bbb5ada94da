"""ONNX Runtime, where it is installed: a graph exported once without weights, and a session for each version."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

NEEDED = ("onnx", "onnxscript", "onnxruntime")
"""The extra `onnx`: torch's exporter needs the first two."""


def installed() -> bool:
    """Whether all that the export and the session need is there; nothing is imported to find out."""
    return all(importlib.util.find_spec(name) for name in NEEDED)


def export_graph(exported: Any, names: set[str], file: str) -> None:
    """Write an exported program (torch.export) as an ONNX graph without the weights of these names.

    Raises ImportError where a package is missing, RuntimeError for weights that the exporter has made part of the
    graph, and whatever the exporter raises.
    """
    from onnx.external_data_helper import set_external_data  # noqa: PLC0415 - an extra, and half a second

    with _quiet():
        model = torch.onnx.export(exported, dynamo=True, verbose=False).model_proto
    own = [tensor for tensor in model.graph.initializer if tensor.name in names]
    fixed = names - {tensor.name for tensor in own}
    if fixed:
        raise RuntimeError(f"found weights that are part of the exported graph: {sorted(fixed)}, expected none")
    for tensor in own:
        set_external_data(tensor, location="brought by each session")
        tensor.ClearField("raw_data")
    Path(file).write_bytes(model.SerializeToString())


class OnnxSession:
    """Runs a graph that `export_graph` wrote with the weights of a module, in as many threads as torch has.

    The weights are constants of a session, and another version's make another session, in 5 to 15 ms, beside the one in
    service. As inputs bound to the module's memory they would need no new session, but ONNX Runtime lays out constants
    only once and inputs for every batch: that is a fifth to two fifths slower, at times slower than plain torch.
    `SessionOptions.add_initializer` will not do: it comes after the weights of the file were laid out, and the answers
    go on being theirs, without an error.
    """

    def __init__(self, file: str, module: nn.Module) -> None:
        """Raises as ONNX Runtime does for a graph that it cannot run."""
        self._graph = Path(file).read_bytes()  # kept: a slot may outlive the engine, whose files go with it
        self._module = module
        self.renew()

    def renew(self) -> None:
        """Take the module's weights as they are now."""
        import onnxruntime  # noqa: PLC0415 - an extra

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
        # Threads that spin between two frames would take a core from the ranks.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        # Copies: the module's memory takes the next version while this session still has the old one.
        weights = {name: value.cpu().numpy().copy(order="C") for name, value in self._module.named_parameters()}
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(value) for value in weights.values()]
        options.add_external_initializers(list(weights), values)
        self._session = onnxruntime.InferenceSession(self._graph, options, providers=["CPUExecutionProvider"])
        self._inputs = [each.name for each in self._session.get_inputs()]
        self._weights = weights  # a session may read them where they lie

    def __call__(self, *views: Tensor) -> tuple[Tensor, Tensor]:
        """Amplitude and phase of the network's views."""
        given = {name: view.numpy() for name, view in zip(self._inputs, views, strict=True)}
        amplitude, phase = self._session.run(None, given)
        return torch.from_numpy(amplitude), torch.from_numpy(phase)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of torchvision, and of its own use of what torch deprecates."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
