"""The settings of training: everything that changes what a training does, with its unit, default and reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import nn

from steering.learning.insertion import Policy
from steering.learning.sampling import Mode

Optimiser = Literal["adamw", "sgd"]
Precision = Literal["float32", "bfloat16"]
Kept = Literal["rank", "global"]


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """The settings of training. `Loop` does what stands here and nothing else."""

    batch: int = 16
    """New samples per rank and step (b), on as many ranks as the training began with."""
    candidates: int = 8
    """How many of them are offered to the local buffer (c)."""
    representatives: int = 24
    """Stored samples, drawn from the buffers of all ranks, that join each minibatch (r)."""
    keep: Kept = "rank"
    """Which minibatch stays as it is when ranks are lost or join. `rank`: that of each rank, so that a step takes as
    long as before and fits into the same memory, which is what a run beside a beam needs. `global`: that of all ranks
    together, new samples and representatives, as nearly as whole samples allow. The learning rate follows the global
    minibatch, see `on`."""
    optimiser: Optimiser = "adamw"
    """`adamw`, which needs little tuning and is torch's with its defaults beside the settings below, or `sgd`."""
    learning_rate: float = 1e-3
    """At the start; of each step where there is no schedule."""
    schedule: Callable[[int], float] | None = None
    """Factor of the learning rate as a function of the step, 0, 1, ...; None: constant, since a stream has no known
    end. It travels to the ranks, so it must be picklable: a function of a module."""
    weight_decay: float = 1e-4
    """Of the weights in each step, times the learning rate. Small: a stream that does not repeat overfits little."""
    momentum: float = 0.0
    """Of `sgd`; `adamw` has its own."""
    clip_norm: float | None = 1.0
    """Norm to which the gradient of all weights together is scaled down where it is larger; None: never. 1.0 keeps a
    network alive through a change of sample, when errors jump. It changes the balance between the terms of DER and
    DER++ (see bench_digits): use None to reproduce results that were made without it."""
    precision: Precision = "float32"
    """Of the network's forward and backward: `bfloat16` runs it under torch.autocast, which pays on processors that
    have it; weights, losses and optimiser stay float32."""
    buffer_bytes: int = 16 * 2**20
    """Budget of each rank's local buffer."""
    samples_bytes: int = 2**30
    """What a rank holds beside its buffer: labelled frames of the scan that is learnt, and as much again of labels that
    arrive while none are taken in. Past that the oldest go, which the buffer was offered already, and are counted. A
    strategy that restarts keeps all frames. Up to 512 frames are held out of a scan, in a quarter of it; held-out
    frames of all scans that are over have a 32nd of it besides."""
    insertion: Policy = "reservoir"
    """What the buffer keeps: `reservoir`, `replacement` (the paper's) or `balanced` over strata."""
    sampling: Mode = "uniform"
    """How representatives are drawn: `uniform`, `balanced` over strata, or by samples `seen`."""
    look_ahead: int = 1
    """Steps that an exchange is started before it is needed (k); more than 1 where a step is shorter than one."""
    deadline: float = 30.0
    """Seconds after which a collective that a rank does not enter raises on the others."""
    seed: int = 0
    """Of what is drawn and kept, and of the order of samples."""
    threads: int = 1
    """Of torch on each rank of a campaign. Ranks share a machine's cores, and steps on small frames gain nothing from
    more; more for ranks that have cores of their own and larger networks."""
    niceness: int = 5
    """Of the process of each rank of a campaign, as of `nice`: where cores are shared, training yields to prediction.
    0: it does not."""
    compiled: bool = False
    """Try torch.compile too where the fastest execution of a step is sought. That takes a minute on each rank when it
    begins: `deadline` must be longer. What else does not change results (channels_last, an optimiser in one kernel)
    is tried on every GPU."""
    device: str = "auto"
    """Where networks are trained: `auto`, a GPU where the rank sees one; `cpu`; or `cuda`. Ranks speak NCCL where each
    has a GPU of its own, gloo elsewhere."""
    buffer_device: str = "cpu"
    """Where samples are stored: `cpu`, or `cuda` for the memory of the rank's GPU."""

    def __post_init__(self) -> None:
        if self.batch < 1 or self.representatives < 0 or not 0 <= self.candidates <= self.batch:
            raise ValueError(
                f"found batch={self.batch}, candidates={self.candidates}, representatives={self.representatives}; "
                "expected a batch of 1 or more, candidates among its samples, representatives not below 0"
            )
        for name, least in (("look_ahead", 1), ("threads", 1), ("weight_decay", 0), ("momentum", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"found {name}={getattr(self, name)}, expected {least} or more")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"found clip_norm={self.clip_norm}, expected a norm above 0, or None for no clipping")
        for name, kinds in (
            ("optimiser", get_args(Optimiser)),
            ("precision", get_args(Precision)),
            ("keep", get_args(Kept)),
        ):
            if getattr(self, name) not in kinds:
                raise ValueError(f"found {name}={getattr(self, name)!r}, expected one of {', '.join(kinds)}")
        if self.buffer_device.startswith("cuda") and self.device == "cpu":
            raise ValueError("found device='cpu' with a buffer on the GPU, expected device='cuda' beside it")

    def on(self, ranks: int, began: int) -> TrainerSettings:
        """The settings of each of so many ranks, where the training began with `began`.

        The learning rate goes with the number of new samples in the global minibatch: in proportion to it for `sgd`
        (Goyal et al., arXiv 1706.02677), to its square root for `adamw` (Malladi et al., NeurIPS 2022, arXiv
        2205.10287).
        """
        share = began / ranks if self.keep == "global" else 1.0
        batch = max(1, round(self.batch * share))
        growth = batch * ranks / (self.batch * began)
        return replace(
            self,
            batch=batch,
            candidates=min(batch, round(self.candidates * share)),
            representatives=round(self.representatives * share),
            learning_rate=self.learning_rate * (growth if self.optimiser == "sgd" else growth**0.5),
        )

    def make_optimiser(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser that these settings describe."""
        if self.optimiser == "sgd":
            return torch.optim.SGD(
                parameters, self.learning_rate, momentum=self.momentum, weight_decay=self.weight_decay
            )
        return torch.optim.AdamW(parameters, self.learning_rate, weight_decay=self.weight_decay)
