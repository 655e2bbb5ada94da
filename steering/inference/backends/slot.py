"""The backends in which a network may be run on a machine, and the slot that holds one version of it, ready to run."""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from steering.inference.backends import onnx
from steering.models import Network, as_split

Read = Callable[..., tuple[Tensor, Tensor]]
GRAPH_FRAMES = (1, 4, 16, 64, 256)
"""Batch sizes that CUDA graphs are captured for; a batch in between is filled up to the next of them."""


@dataclass(frozen=True)
class Backend:
    """How a network is run: `eager`, `channels_last`, `compiled`, `graphs` or `onnx`, in float32 or bfloat16.

    `eager` in float32 is the network as it is trained, and what all others are held against. `channels_last` keeps a
    pixel's channels side by side. `compiled` is ahead-of-time compiled for this machine, which takes a minute and a C++
    compiler. `graphs` launches all of a GPU's work at once. `onnx` is ONNX Runtime, on the CPU and in float32 only: its
    export takes 3 seconds. What comes before the CNN is float32 in every backend.
    """

    kind: str
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """As in a summary: `channels_last_bfloat16`."""
        return f"{self.kind}_{str(self.dtype).removeprefix('torch.')}"

    @property
    def packaged(self) -> bool:
        """Whether it runs from a file that `compile_package` makes, once for all versions."""
        return self.kind in ("compiled", "onnx")


REFERENCE = Backend("eager", torch.float32)


def possible(device: torch.device, *, compiled: bool = False, split: bool = True) -> list[Backend]:
    """The backends to be tried on a device, the reference first; a measurement says which is fastest.

    split: whether the network is a SplitNetwork; any other runs whole, uncompiled and in float32.

    ONNX Runtime goes with the compiled backends: where a CPU has bfloat16 it has not been the fastest in a trial, and
    its export would be paid at every start.
    """
    on_gpu = device.type == "cuda"
    kinds = ["channels_last"]
    if on_gpu:
        kinds.append("graphs")
    if compiled and (on_gpu or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
        kinds.append("compiled")
    backends = [REFERENCE, *(Backend(kind, dtype) for kind in kinds for dtype in (torch.float32, torch.bfloat16))]
    if compiled and device.type == "cpu" and onnx.installed():
        backends.append(Backend("onnx", torch.float32))
    return [each for each in backends if split or (each.dtype == torch.float32 and not each.packaged)]


class Slot:
    """One version of a network in the form in which it runs. Another version's weights are copied into its place."""

    def __init__(self, network: Network, backend: Backend, device: torch.device, package: str | None = None) -> None:
        """A copy of the network; `package` is the file of `compile_package`, for a backend that needs one."""
        self.backend = backend
        self.device = device
        self.number = -1
        """The version that it holds."""
        self.expected = 0.0
        """Residual that this version should reach."""
        self.network = prepared(network, backend, device)
        self._parts = as_split(self.network)
        self._known = [tensor.clone() for tensor in self._parts.constants()]
        self._read: Read = self._parts.decode
        self._graphs: dict[int, _Graph] = {}
        self._onnx: onnx.OnnxReader | None = None
        if package is not None and backend.kind == "onnx":
            self._read = self._onnx = onnx.OnnxReader(package, _Reader(self.network))
        elif package is not None:
            self._read = _compiled(package, self.network)
        if backend.kind == "graphs":  # captured now, in this thread, and not in front of the first frame of a size
            window = self.network.hyperparameters["window"]
            for size in GRAPH_FRAMES:
                self(torch.zeros(size, window, window, device=device))

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
        if self._onnx is not None:
            self._onnx.renew()
        self.number, self.expected = number, expected
        self._learn_optics()

    @torch.no_grad()
    def mask(self, mask: NDArray[np.bool_]) -> None:
        """Use another detector mask (y, x), True = do not use."""
        self.network.optics.bad.copy_(torch.from_numpy(np.ascontiguousarray(mask)))
        self._learn_optics()

    @property
    def probe(self) -> NDArray[np.complex64]:
        """(mode, y, x) of the version."""
        return self.network.optics.modes().cpu().numpy().copy()

    @torch.inference_mode()
    def __call__(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """counts (n, window, window) on the slot's device -> amplitude and phase (n, patch, patch) float32.

        Of graphs, the answer is overwritten by the next call.
        """
        if self.backend.kind != "graphs":
            return self._run(counts)
        size = next((size for size in GRAPH_FRAMES if size >= len(counts)), len(counts))
        if size not in self._graphs:
            self._graphs[size] = _Graph(self._run, counts.new_zeros(size, *counts.shape[1:]))
        return self._graphs[size](counts)

    def _run(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        return self._read(*self._parts.preprocess(counts, *self._known))

    def _learn_optics(self) -> None:
        # In place: a captured graph reads this memory.
        for mine, new in zip(self._known, self._parts.constants(), strict=True):
            mine.copy_(new)


class _Graph:
    """All kernels of one batch size as one launch."""

    def __init__(self, run: Callable[[Tensor], tuple[Tensor, Tensor]], counts: Tensor) -> None:
        self._counts = counts
        stream = torch.cuda.Stream(counts.device)
        stream.wait_stream(torch.cuda.current_stream(counts.device))
        with torch.cuda.stream(stream):
            for _ in range(3):  # plans of FFTs and choices of kernels are made before the capture, which allows none
                run(counts)
        torch.cuda.current_stream(counts.device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile: the version in service goes on.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._out = run(counts)

    def __call__(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        n = len(counts)
        self._counts[:n].copy_(counts)
        self._graph.replay()
        return self._out[0][:n], self._out[1][:n]


class _Reader(nn.Module):
    """The part of a network that is compiled or exported: complex numbers and FFTs stay outside."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network: Any = network  # a SplitNetwork

    def forward(self, views: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """What the network's `preprocess` makes of n frames -> amplitude and phase (n, patch, patch)."""
        return self.network.decode(*views)


def compile_package(network: Network, backend: Backend, device: torch.device, file: str) -> None:
    """Compile a network for this machine into a file (.pt2), or export it (.onnx), for any batch size.

    The first takes about a minute, the second 3 seconds. The weights are not part of it: every slot brings its own.
    Raises whatever the compiler or the exporter raises.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler's own use of what torch deprecates
        reader = _Reader(prepared(network, backend, device))
        window = network.hyperparameters["window"]
        views = tuple(
            reader.network.preprocess(torch.ones(2, window, window, device=device), *reader.network.constants())
        )
        many = torch.export.Dim("frames", min=1, max=4096)
        exported = torch.export.export(reader, (views,), dynamic_shapes=(tuple({0: many} for _ in views),))
        if backend.kind == "onnx":
            onnx.export_graph(exported, {name for name, _ in reader.named_parameters()}, file)
            return
        from torch._inductor import aoti_compile_and_package  # noqa: PLC0415 - a second that few need to pay

        # Else vectors of 8 numbers or fewer, such as the last bias, become part of the code.
        keep = {"always_keep_tensor_constants": True}
        aoti_compile_and_package(exported, package_path=file, inductor_configs=keep)


def _compiled(package: str, network: Network) -> Read:
    from torch._inductor import aoti_load_package  # noqa: PLC0415

    runner: Any = aoti_load_package(package)
    names = set(runner.get_constant_fqns())
    own = {name: weight for name, weight in _Reader(network).state_dict().items() if name in names}
    fixed = {f"network.{name}" for name, _ in network.named_parameters()} - names
    if fixed:
        raise RuntimeError(f"found weights that the compiler has made part of its code: {sorted(fixed)}, expected none")
    # The compiled code reads the slot's own memory: weights that are copied into it later need no further step.
    runner.load_constants(own, check_full_update=True, user_managed=True)
    return lambda *views: runner(views)


def prepared(network: Network, backend: Backend, device: torch.device) -> Network:
    """A copy of the network, in the precision and the layout of a backend, that learns no more."""
    ready = copy.deepcopy(network).to(device).eval().requires_grad_(False)
    for layer in ready.modules():
        if isinstance(layer, nn.Conv2d) and backend.kind != "eager":
            layer.to(dtype=backend.dtype, memory_format=torch.channels_last)
        elif isinstance(layer, nn.Linear):
            layer.to(dtype=backend.dtype)
    return ready
