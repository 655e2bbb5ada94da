"""CUDA graphs: all kernels of a GPU for one batch size as one launch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

GRAPH_FRAMES = (1, 4, 16, 64, 256)
"""Batch sizes that graphs are captured for; a batch in between is filled up to the next of them."""


class Graphs:
    """A captured graph for each of these sizes. They read the memory of the network, which takes other weights."""

    def __init__(self, run: Callable[[Tensor], tuple[Tensor, Tensor]], window: int, device: torch.device) -> None:
        """run: counts (n, window, window) -> amplitude and phase. All are captured now, in this thread, and not in
        front of the first frame of a size."""
        self._run = run
        self._graphs = {n: _Graph(run, torch.zeros(n, window, window, device=device)) for n in GRAPH_FRAMES}

    def __call__(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """As `run`. The answer is overwritten by the next call."""
        size = next((size for size in GRAPH_FRAMES if size >= len(counts)), len(counts))
        if size not in self._graphs:
            self._graphs[size] = _Graph(self._run, counts.new_zeros(size, *counts.shape[1:]))
        return self._graphs[size](counts)


class _Graph:
    """One size."""

    def __init__(self, run: Callable[[Tensor], tuple[Tensor, Tensor]], counts: Tensor) -> None:
        self._counts = counts
        stream = torch.cuda.Stream(counts.device)
        stream.wait_stream(torch.cuda.current_stream(counts.device))
        with torch.cuda.stream(stream):
            for _ in range(3):  # plans of FFTs and choices of kernels are made before the capture, which allows none
                run(counts)
        torch.cuda.current_stream(counts.device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # On this stream, for torch captures on the current device's otherwise. Other threads may use the GPU meanwhile:
        # the version in service goes on.
        with (
            torch.cuda.device(counts.device),
            torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"),
        ):
            self._out = run(counts)

    def __call__(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        n = len(counts)
        self._counts[:n].copy_(counts)
        self._graph.replay()
        return self._out[0][:n], self._out[1][:n]
