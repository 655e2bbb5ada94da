"""The slot: one version of a network on one backend, ready to run."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steering.inference.backends import onnx
from steering.inference.backends.compiled import Compiled, available, compile_to
from steering.inference.backends.contract import REFERENCE, Backend, Decode, Decoder, prepared
from steering.inference.backends.eager import Eager
from steering.inference.backends.graphs import Graphs
from steering.models import Network, as_split


def possible(device: torch.device, *, compiled: bool = False, split: bool = True) -> list[Backend]:
    """The backends to be tried on a device, the reference first; a measurement says which is fastest.

    split: whether the network is a SplitNetwork; any other runs whole, uncompiled and in float32.

    ONNX Runtime goes with the compiled backends: its export takes 3 seconds, which every start would pay.
    """
    on_gpu = device.type == "cuda"
    kinds = ["channels_last"]
    if on_gpu:
        kinds.append("graphs")
    if compiled and available(device):
        kinds.append("compiled")
    backends = [REFERENCE, *(Backend(kind, dtype) for kind in kinds for dtype in (torch.float32, torch.bfloat16))]
    if compiled and device.type == "cpu" and onnx.installed():
        backends.append(Backend("onnx", torch.float32))
    return [each for each in backends if split or (each.dtype == torch.float32 and not each.packaged)]


class Slot:
    """One version of a network in the form in which it runs. Another version's weights are copied into its place."""

    def __init__(self, network: Network, backend: Backend, device: torch.device, package: str | None = None) -> None:
        """A copy of the network; `package` is the file of `make_package`, for a backend that needs one."""
        self.backend = backend
        self.device = device
        self.number = -1
        """The version that it holds."""
        self.expected = 0.0
        """Residual that this version should reach."""
        self.piece: int | None = None
        """Frames that are run at a time; a larger batch is cut into such pieces. None: all at once."""
        self.network = prepared(network, backend, device)
        self._parts = as_split(self.network)
        self.constants = [tensor.clone() for tensor in self._parts.constants()]
        self.decode: Decode = Eager(self._parts.decode)
        if package is not None and backend.kind == "onnx":
            self.decode = onnx.OnnxSession(package, Decoder(self.network))
        elif package is not None:
            self.decode = Compiled(package, self.network)
        self._graphs: Graphs | None = None
        if backend.kind == "graphs":
            with torch.inference_mode():
                self._graphs = Graphs(self._run, int(self.network.hyperparameters["window"]), device)

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], *, number: int = -1, expected: float = 0.0) -> None:
        """Take the weights and the optics of another version of the same architecture, in place.

        Raises ValueError for weights that do not fit.
        """
        try:
            self.network.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(
                f"found weights that do not fit {type(self.network).__name__} with {self.network.hyperparameters}, "
                f"expected another version of the same network ({str(error).splitlines()[-1].strip()})"
            ) from error
        self.decode.renew()
        self.number, self.expected = number, expected
        self._renew_constants()

    @torch.no_grad()
    def mask(self, mask: NDArray[np.bool_]) -> None:
        """Use another detector mask (y, x), True = do not use. Where it is the one in use, nothing is done."""
        if np.array_equal(self.network.optics.bad.cpu().numpy(), mask):
            return
        self.network.optics.bad.copy_(torch.from_numpy(np.ascontiguousarray(mask)))
        self._renew_constants()

    @property
    def probe(self) -> NDArray[np.complex64]:
        """(mode, y, x) of the version."""
        return self.network.optics.modes().cpu().numpy().copy()

    @torch.inference_mode()
    def __call__(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """counts (n, window, window) on the slot's device -> amplitude and phase (n, patch, patch) float32.

        Of graphs, the answer is overwritten by the next call.
        """
        if self._graphs is not None:
            return self._graphs(counts)
        if self.piece is None or len(counts) <= self.piece:
            return self._run(counts)
        amplitude, phase = zip(*(self._run(part) for part in counts.split(self.piece)), strict=True)
        return torch.cat(amplitude), torch.cat(phase)

    def _run(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        return self.decode(*self._parts.preprocess(counts, *self.constants))

    def _renew_constants(self) -> None:
        # In place: a captured graph reads this memory.
        for mine, new in zip(self.constants, self._parts.constants(), strict=True):
            mine.copy_(new)


def make_package(network: Network, backend: Backend, device: torch.device, file: str) -> None:
    """Compile a network for this machine into a file (.pt2), or export it (.onnx), for any batch size.

    The first takes about a minute, the second 3 seconds. The weights are not part of it: every slot brings its own.
    Raises whatever the compiler or the exporter raises.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler's own use of what torch deprecates
        decoder = Decoder(prepared(network, backend, device))
        window = network.hyperparameters["window"]
        views = tuple(
            decoder.network.preprocess(torch.ones(2, window, window, device=device), *decoder.network.constants())
        )
        many = torch.export.Dim("frames", min=1, max=4096)
        exported = torch.export.export(decoder, (views,), dynamic_shapes=(tuple({0: many} for _ in views),))
        if backend.kind == "onnx":
            onnx.export_graph(exported, {name for name, _ in decoder.named_parameters()}, file)
        else:
            compile_to(exported, file)
