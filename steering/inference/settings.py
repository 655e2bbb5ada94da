"""The settings of live prediction."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PredictorSettings:
    """The predictor's settings."""

    backlog: int = 64
    """Chunks that may wait for prediction; a source that sends more waits for its acknowledgement."""
    again: int = 2
    """Frames that are predicted again in one go when a newer model is in service."""
    batch: int = 64
    """Most frames that are predicted together."""
    gather_ms: float = 2.0
    """How long a frame may wait for others to be predicted together with, milliseconds; it does not where none is
    expected so soon."""
    device: str = "auto"
    """`auto`, a GPU where the predictor sees one; `cpu`; or `cuda`. Of several GPUs it takes the last, since the ranks
    on its host begin with the first."""
    compiled: bool = False
    """Whether compiled backends may be tried: minutes at the start, and a C++ compiler; and ONNX Runtime: 3 seconds,
    and the extra `onnx`."""
    threads: int = 1
    """Of the network on a CPU; more where cores are left beside ranks and source: at 256 x 256 pixels one core predicts
    some 80 frames a second."""
    canary: int = 16
    """Newest held-out frames that a version is tried on before it goes into service; 0: it is not tried."""
    canary_margin: float = 0.1
    """Share by which their residual may be higher than that of the version in service."""

    memory_bytes: int = 2**30
    """Counts and predicted patches of frames, and images of scans that are over, that stay in memory. What is older
    goes to the folder `frames` of the run and is read from there. About 250 bytes of every frame stay besides."""
    keep_frames: bool = False
    """Whether the files in that folder stay when the run has ended."""
    keep_bytes: int = 2**31
    """Counts of scans that are not over are kept at the source as well, for a predictor that takes the place of a lost
    one, up to so many bytes: of a larger scan none are, and the loss of the predictor ends the run."""
    policy_share: float = 0.02
    """Share of the time that may go into saving the policy's state for a predictor that takes the place of a lost one.
    What the policy was asked since it was last saved is asked again there."""

    def __post_init__(self) -> None:
        shares = (self.gather_ms, self.canary, self.canary_margin, self.keep_bytes, self.memory_bytes)
        if (
            min(self.backlog, self.again, self.batch, self.threads) < 1
            or min(shares) < 0
            or not 0 < self.policy_share <= 1
        ):
            raise ValueError(
                f"found {self}, expected 1 or more chunks, frames and threads, times, bytes and shares of 0 or more, "
                "and a policy_share above 0"
            )
