"""What happened, as records that carry their own time and travel as lines of JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from steering.campaign import losses, run_events
from steering.campaign.event import Answer, Event

COMMANDS = ("pause", "resume", "stop", "approve", "veto", "rollback", "limit")


@dataclass(frozen=True, kw_only=True)
class AnswerIgnored(Event):
    """An event of this kind answered `action`, which is not open (any more): it changed nothing."""

    kind: str
    action: int | None


@dataclass(frozen=True, kw_only=True)
class ScanRevisited(Event):
    """The source came back to a scan that it had left, or calls one as no folder can be called: what is measured now is
    the new scan `visit`."""

    scan: str
    visit: str


@dataclass(frozen=True, kw_only=True)
class ChunkArrived(Event):
    """The source measured frames of a scan; they are on their way to the predictor."""

    scan: str
    frame_ids: tuple[int, ...]
    asked: tuple[tuple[float, float], ...] = ()
    """Of frames that come late, after everything was lost: for which positions they were asked for. Empty: in their
    order."""


@dataclass(frozen=True, kw_only=True)
class PredictionReady(Event):
    """The predictor has seen frames; residual is their median far-field residual under `version`.

    Trust is given frame by frame, by residual and by neighbour offset, as shares of the version's `validation_frames`
    held-out frames that look as bad or worse; None or NaN where a frame is no evidence. `why_not` has the reason for
    each frame, empty where it is evidence.
    """

    scan: str
    frame_ids: tuple[int, ...]
    version: int
    residual: float | None
    trust_by_residual: tuple[float | None, ...] = ()
    trust_by_offset: tuple[float | None, ...] = ()
    validation_frames: int = 0
    why_not: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DecisionSuggested(Answer):
    """The policy's answer: positions (y, x) in the length unit of the geometry, a reason for each, dwell in seconds."""

    positions: tuple[tuple[float, float], ...]
    reasons: tuple[str, ...]
    dwell: tuple[float, ...] | None = None
    stop: bool = False
    scan: str | None = None
    """The newest scan of which the policy knew a frame; None: it knew none."""
    ingested: tuple[tuple[str, int], ...] = ()
    """How many frames of each scan the policy had taken in, as far as the predictor says so."""


@dataclass(frozen=True, kw_only=True)
class DecisionLimited(Event):
    """Of a suggested decision, `count` positions were refused by the safe limits, with the reason."""

    count: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class DecisionProposed(Event):
    """A decision, as far as the safe limits allow it, waits for a person's answer until `until`; then `default`
    (approve or veto) holds."""

    positions: int
    reason: str
    stop: bool
    until: float
    default: str


@dataclass(frozen=True, kw_only=True)
class DecisionSettled(Event):
    """The proposed decision was approved or vetoed, by a person or because nobody answered in time."""

    approved: bool
    by: str


@dataclass(frozen=True, kw_only=True)
class Tick(Answer):
    """The time of a reminder has come."""


@dataclass(frozen=True, kw_only=True)
class LabelsReady(Answer):
    """Refinement labelled `count` frames of a scan, and they are with the ranks; residual is their median.

    count is 0 where no labels could be made, or a rank has none yet: `reason` says why. `left_out` more were made and
    explain their frames too badly to teach.
    One comes for every action to label, unless the group of ranks changes before the labels are with them.
    """

    scan: str
    count: int
    residual: float | None
    seconds: float
    left_out: int = 0
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class ScanNotLabelled(Event):
    """A scan is over after so many frames, and none of them was ever labelled by refinement: nothing of it was learnt.
    reason: why, and what to do."""

    scan: str
    frames: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class ExternalLabelsRead(Event):
    """A file of external labels was read: labels of `count` frames are with the ranks, `refused` were refused, for
    these reasons. Medians over those accepted: seconds since the frame was acquired, model versions published since
    then.
    """

    file: str
    scan: str
    count: int
    refused: int
    reasons: tuple[str, ...]
    late_s: float | None
    versions_late: float | None


@dataclass(frozen=True, kw_only=True)
class ScanRefined(Event):
    """A scan is over: its network image is by `version`, and its object was refined by all `frames` until `converged`,
    or for the most passes; residual is their median under it. Where `reason` is not empty it tells why neither was
    done: what the live image had by then stands."""

    scan: str
    version: int
    frames: int = 0
    passes: int = 0
    converged: bool = False
    residual: float | None = None
    seconds: float = 0.0
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class CandidateReady(Answer):
    """A training round is over. Errors on frames that are never trained on: the candidate's, and that of the weights
    in service on the same frames; residual is the candidate's, and `loss` the mean of the round's training loss.

    Both errors are None or NaN where no such frame is labelled. One comes for every action to train, unless the group
    of ranks changes before the round is over.
    """

    scan: str
    steps: int
    error: float | None
    served_error: float | None
    residual: float | None
    loss: float | None


@dataclass(frozen=True, kw_only=True)
class TrainingSkipped(Answer):
    """There was no training round: a rank has no labelled frame of the scan. Labels are due again."""

    scan: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class ScansJudged(Event):
    """Errors of a version, by scan so far, on some frames of it that were never trained on."""

    version: int
    errors: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class ModelPublished(Answer):
    """A version is in service; validation_residual is what trust expects of it on the scan it was made for.

    validation_frames: of the held-out frames that its error is the mean of, those with counts enough to measure trust
    against. None where nobody said. Version 0, which the campaign starts from, answers no action.
    """

    version: int
    validation_error: float | None
    validation_residual: float | None
    validation_frames: int | None = None


@dataclass(frozen=True, kw_only=True)
class VersionRefused(Answer):
    """The predictor tried a published version and did not put it into service: it has to be taken back."""

    version: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class CandidateRefused(Answer):
    """The candidate was no better, or its version was taken back; the ranks go on from it, the model in service
    stays."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class RolledBack(Answer):
    """An older version is in service again; validation_residual is its own."""

    version: int
    validation_residual: float | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class RollBackRefused(Answer):
    """The version before was tried, and did no better: the one in service stays."""

    version: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class FrameRefused(Event):
    """Frames that were asked for and will not come, with the reason."""

    count: int
    reason: str
    positions: tuple[tuple[float, float], ...] = ()
    """Where the source refuses to measure, (y, x) in the length unit; empty where frames were lost on their way."""


@dataclass(frozen=True, kw_only=True)
class FrameSetAside(Event):
    """Frames that were measured and reached the predictor, but cannot be used, with the reason."""

    scan: str
    frame_ids: tuple[int, ...]
    reason: str


@dataclass(frozen=True, kw_only=True)
class DriftRaised(Event):
    """Trust fell: the newest frames look worse than chance explains against the validation frames of their versions.

    by: what tells so, "residual" or "offset". version: the one that predicted the newest frame. trust: mean share of
    the validation frames that look as bad as the newest frames. worse: newest frames that are worse than nearly all
    validation frames. Drift is raised where trust is at most `lowest` or `worse` at least `most`, which happens by
    chance as rarely as the settings say. residual: median of the newest frames; expected: of the validation frames,
    None if not known.
    """

    scan: str
    version: int
    by: str
    trust: float
    lowest: float
    worse: int
    most: int
    residual: float | None
    expected: float | None


@dataclass(frozen=True, kw_only=True)
class DriftLowered(Event):
    """Trust is back, with `version`, after it had fallen with `since`; the others as in DriftRaised."""

    scan: str
    version: int
    since: int
    trust: float
    residual: float | None
    expected: float | None


@dataclass(frozen=True, kw_only=True)
class StreamsReported(Event):
    """What the streams of a live source have brought so far."""

    streams: Mapping[str, Mapping[str, Any]]
    """By name: received, joined, waiting, dropped by reason, lost, silent_s and others."""


@dataclass(frozen=True, kw_only=True)
class SourceEnded(Event):
    """No further frame will come."""


@dataclass(frozen=True, kw_only=True)
class Command(Event):
    """A person's command. Pause: ask for no further positions until resume. Stop: end the campaign without further
    training. Approve, veto: the decision that waits for it. Rollback: put `version` into service again, or where that
    is None the one served before. Limit: hold decisions within `area` and to `shortest_dwell` beside the limits of the
    settings, which stay; None: no further limit. Raises ValueError for any other word, so that a slip of the keyboard
    ends no run."""

    name: str
    version: int | None = None
    by: str = ""
    """Who gave it: user@host."""
    area: tuple[float, float, float, float] | None = None
    """y0, y1, x0, x1 in the geometry's unit."""
    shortest_dwell: float | None = None
    """Seconds."""

    def __post_init__(self) -> None:
        if self.name not in COMMANDS:
            raise ValueError(f"found command {self.name!r}, expected one of {', '.join(COMMANDS)}")


EVENTS: tuple[type[Event], ...] = tuple(
    kind
    for kind in {**vars(run_events), **vars(losses), **globals()}.values()
    if isinstance(kind, type) and issubclass(kind, Event)
)
"""Every kind of event."""
_KINDS: dict[str, type[Event]] = {kind.__name__: kind for kind in EVENTS}


def encode(event: Event) -> dict[str, Any]:
    """The event as a JSON-able dictionary, its kind under `event`."""
    return {"event": type(event).__name__, **{f.name: getattr(event, f.name) for f in fields(event)}}


def decode(line: Mapping[str, Any]) -> Event | None:
    """The event behind a line of the log; None for a line that is not the campaign's (how the run began or ended).

    Raises ValueError for a line that lacks a field of its event.
    """
    kind = _KINDS.get(str(line.get("event")))
    if kind is None:
        return None
    missing = {f.name for f in fields(kind) if f.default is MISSING} - set(line)
    if missing:
        raise ValueError(
            f"found a line of {kind.__name__} without {sorted(missing)}, expected every field that has no default"
        )
    return kind(**{f.name: _tuples(line[f.name]) for f in fields(kind) if f.name in line})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
