"""How new samples reach a GPU: written into pinned memory of the host, and sent while the host goes on."""

from __future__ import annotations

from collections.abc import Callable

import torch

from steering.learning.minibatch import Fields, Specification

Load = Callable[[int, Fields], None]
"""Write that many new samples into the first rows of these tensors, which are in the host's memory."""


class Staging:
    """Two sets of rows in pinned memory in turn: one is written while the other is on its way.

    A copy of what is not pinned would wait for all that the GPU was given before, and single rows cost as much each as
    a whole minibatch.
    """

    def __init__(self, fields: Specification, rows: int, device: torch.device) -> None:
        """fields, rows: of new samples. device: where they are sent; on the CPU nothing is pinned, for tests."""
        self._device = device
        pinned = device.type == "cuda"
        self._pair = [
            {
                name: torch.zeros((rows, *shape), dtype=dtype, pin_memory=pinned)
                for name, (shape, dtype) in fields.items()
            }
            for _ in range(2)
        ]
        self._sent: list[torch.cuda.Event | None] = [None, None]

    def fill(self, load: Load, n: int, out: Fields) -> Fields:
        """Load n samples and send them to the first rows of `out`, in the order of the current stream.

        Returns them as they are on the host, tensors (n, ...), which stay so until the second call after this one.
        """
        self._pair.reverse()
        self._sent.reverse()
        rows, sent = {name: value[:n] for name, value in self._pair[0].items()}, self._sent[0]
        if sent is not None:
            sent.synchronize()  # of two steps ago: what it waits for is over, unless the GPU is behind
        load(n, rows)
        for name, value in rows.items():
            out[name][:n].copy_(value, non_blocking=True)
        if self._device.type == "cuda":
            sent = self._sent[0] = torch.cuda.Event()
            sent.record(torch.cuda.current_stream(self._device))
        return rows
