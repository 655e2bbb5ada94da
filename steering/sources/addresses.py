"""The addresses of live streams: one grammar for commands and notebooks.

    frames     dectris://HOST:31001  ?channel=threshold_1 &rest=HOST, which is
                                     then armed and disarmed, and triggered
                                     with &trigger=yes
               pva://PV              ?queue=1024 &scan=ATTRIBUTE &done=PV
                                     &first=N, see below
               swmr:FILE             ?data=/PATH &keys=/PATH &finished=/PATH
                                     &total=N &quiet=SECONDS &number=/PATH|none
                                     &first=N, see below
               bluesky://HOST:PORT   ?data=KEY &name=KEY of the start document
                                     (sample); documents by ZMQ
               bluesky:FILE          as above; documents of a file, a JSON
                                     array [name, document] in each line
               play:FILE             ?speed=1, what `steering record` has
                                     written; 0: without waiting; or
                                     ?step=FILE: a frame for each line that is
                                     appended to it (echo >> FILE)
    positions  zmq://HOST:PORT       ?y=NAME &x=NAME &socket=pull|sub
               pva://PV              ?y=ATTRIBUTE &x=ATTRIBUTE where PV is that
                                     of the frames
               pva://TABLE           ?y=COLUMN &x=COLUMN &number=COLUMN
               pva://PV_Y,PV_X       scalar PVs, as motors' readbacks: what
                                     holds at the time of the frame, which must
                                     come by pva as well
               swmr:FILE             ?y=/PATH &x=/PATH, and as above
               bluesky:...           ?y=KEY &x=KEY, readings in events or
                                     datasets in files
               play:FILE             ?speed=1 or ?step=FILE
    monitor    as positions          ?value=NAME in place of y and x: the
                                     incident intensity; or pva://PV
    motion     zmq://HOST:PORT
               pva://MOTOR_Y,MOTOR_X ?trigger=PV &dwell=PV &end=PV

A file that says when it is finished ends its scan so, any other after `quiet`
seconds (60) without a row. With a motion files that are there when the run
begins, and are not written to after that, are passed over and counted.

In a file the number of a frame is its row, or where areaDetector has written it
its NDArrayUniqueId less that of the first row, so that arrays that its writer
drops shift nothing: columns that are its NDAttributes are numbered alike. Where
the very first array may be dropped say what its number would be (first=1).
number=/PATH is another dataset of numbers, one for each row; number=none counts
rows. Frames and positions of one file take the same options.

Frames of pva have their uniqueId as number. Streams of zmq, swmr and bluesky
count from 0: beside them first=N says which one a scan begins with, 1 where the
detector's ArrayCounter is set to 0 before each scan, as it must be then.

Positions and motion take unit=m|mm|um|nm|px (m) and flip=y|x|yx, each as its
own server counts: where both are turned against the frames both need the flip,
or what is decided is measured at a mirrored place. Positions and monitor take
samples=N of a frame (1), gap=N frames that are interpolated (3; of positions
none where the scan is steered, or where each is a reading: of bluesky, of
scalar PVs), and when_slow=block, which does not read on where frames lag far
behind, in place of "drop oldest"; what is played takes those of its recording.
Two clients of a zmq address with socket=pull get half of it each. Every pva
address takes server=HOST:PORT, instead of EPICS's own search.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from steering.sources.address_text import FRAMES_AT, Address, parse, recorded_at, unit_of
from steering.sources.bluesky import BlueskyFrames, BlueskyPositions
from steering.sources.bluesky_documents import Documents
from steering.sources.dectris import DectrisFrames
from steering.sources.live import Streams
from steering.sources.motion import Motion, ZmqMotion
from steering.sources.panda import PandaPositions
from steering.sources.pva import NoRecords, PvaFrames, PvaTable
from steering.sources.pva_motion import PvaMotion
from steering.sources.pva_readings import PvaReadings
from steering.sources.streams import FRAMES, POSITIONS, Companion, Stream
from steering.sources.swmr import SwmrFrames, SwmrPositions
from steering.sources.swmr_rows import Followed
from steering.sources.tape import InOrder, Played

_OF_FILES = ("keys", "finished", "total", "quiet", "number", "first")
_OF_COMPANIONS = ("samples", "gap", "when_slow")


def frames_at(text: str) -> Stream:
    """The frames at an address."""
    address = parse(text)
    if address.scheme == "dectris":
        address.only("channel", "rest", "trigger")
        trigger = address.options.get("trigger", "no")
        if trigger not in ("yes", "no") or (trigger == "yes" and "rest" not in address.options):
            raise ValueError(f"{text}: found trigger={trigger}, expected yes or no, and yes with rest=HOST only")
        return DectrisFrames(
            address=_tcp(address, 31001),
            channel=address.options.get("channel", "threshold_1"),
            rest=address.options.get("rest", ""),
            trigger=trigger == "yes",
        )
    if address.scheme == "pva":
        address.only("queue", "server", "scan", "done", "first")
        return PvaFrames(
            pv=address.place,
            server=address.options.get("server", ""),
            queue=address.whole("queue", 1024),
            scan=address.options.get("scan", ""),
            done=address.options.get("done", ""),
            first=address.whole("first", 0),
        )
    if address.scheme == "swmr":
        address.only("data", *_OF_FILES)
        return SwmrFrames(where=_followed(address), data=address.options.get("data", "/entry/data/data"))
    if address.scheme == "bluesky":
        address.only("data", "name")
        name = address.options.get("name", "sample")
        return BlueskyFrames(documents=Documents(place=address.place), data=address.options.get("data", ""), name=name)
    if address.scheme == "play":
        address.only("speed", "step")
        return _played(address, FRAMES)
    raise _unknown(address, ", ".join(FRAMES_AT))


def positions_at(text: str, *, steered: bool = False) -> tuple[Companion, Stream]:
    """The positions at an address, and how they belong to frames. steered: they may be anywhere, and one between two
    frames is not between their places: nothing is interpolated unless that is asked for."""
    address = parse(text)
    if address.scheme == "play":
        address.only("speed", "step", "unit", *_OF_COMPANIONS)
        unit_of(text)
        what = _companion(address, POSITIONS, 2)
        return what, _played(address, what.name)
    return _beside(address, POSITIONS, ("y", "x"), address.scale(), ("unit", "flip"), steered=steered)


def monitor_at(text: str) -> tuple[Companion, Stream]:
    """The incident intensity at an address, and how it belongs to frames."""
    address = parse(text)
    if address.scheme == "play":
        address.only("speed", "step", *_OF_COMPANIONS)
        what = _companion(address, "monitor", 1)
        return what, _played(address, what.name)
    return _beside(address, "monitor", ("value",), (1.0,))


def _beside(
    address: Address,
    name: str,
    axes: tuple[str, ...],
    scale: tuple[float, ...],
    options: tuple[str, ...] = (),
    *,
    steered: bool = False,
) -> tuple[Companion, Stream]:
    """A stream of numbers that go with frames; `axes` are the options that name its columns."""
    what, place = _companion(address, name, len(axes), steered=steered), address.place
    kinds = {
        "zmq": ("socket",),
        "pva": ("number", "server"),
        "swmr": _OF_FILES,
        "bluesky": (),
    }
    if address.scheme not in kinds:
        raise _unknown(address, f"{', '.join(kinds)}, play")
    address.only(*axes, *kinds[address.scheme], *options, *_OF_COMPANIONS)
    more = address.options.get
    stream: Stream
    if _is_scalars(address, axes):
        pvs = tuple(address.place.split(","))
        if len(pvs) != len(axes):
            raise ValueError(
                f"{address.text}: found {len(pvs)} PVs, expected {len(axes)}, or ?{'=COLUMN&'.join(axes)}=COLUMN of a "
                "table or of the frames' attributes"
            )
        return what, PvaReadings(pvs=pvs, scale=scale, server=more("server", ""))
    columns = tuple(address.needed(axis) for axis in axes)
    if address.scheme == "zmq":
        stream = PandaPositions(address=_tcp(address), columns=columns, scale=scale, socket=more("socket", "pull"))
    elif address.scheme == "pva":
        stream = PvaTable(
            pv=place, columns=columns, scale=scale, server=more("server", ""), number=more("number", "number")
        )
    elif address.scheme == "swmr":
        if what.samples > 1 and {"number", "first"} & address.options.keys():
            raise ValueError(f"{address.text}: found samples={what.samples} with number or first, expected one of them")
        stream = SwmrPositions(where=_followed(address), columns=columns, scale=scale, samples=what.samples)
    else:
        stream = BlueskyPositions(documents=Documents(place=place), columns=columns, scale=scale)
    return what, stream


def _is_scalars(address: Address, axes: Sequence[str]) -> bool:
    """Whether scalar PVs are meant, and not columns of a table or of the frames' attributes."""
    return address.scheme == "pva" and not {*axes, "number"} & address.options.keys()


def _companion(address: Address, name: str, width: int, *, steered: bool = False) -> Companion:
    recorded = recorded_at(address.text, name)
    address = replace(address, options={**recorded.options, **address.options})
    readings = recorded.scheme == "bluesky" or _is_scalars(recorded, ("y", "x"))
    gap = address.whole("gap", 0 if name == POSITIONS and (steered or readings) else Companion.gap)
    samples = address.whole("samples", Companion.samples)
    when_slow = address.options.get("when_slow", Companion.when_slow)
    return Companion(name=name, width=width, samples=samples, gap=gap, when_slow=when_slow)


def motion_at(text: str) -> Motion:
    """The motion at an address."""
    address = parse(text)
    if address.scheme == "zmq":
        address.only("unit", "flip")
        return ZmqMotion(address=_tcp(address), scale=address.scale())
    if address.scheme == "pva":
        address.only("trigger", "dwell", "end", "server", "unit", "flip")
        names = address.place.split(",")
        if len(names) != 2:
            raise ValueError(f"{text}: found {len(names)} motors, expected two: MOTOR_Y,MOTOR_X")
        trigger, dwell, end, server = (address.options.get(name, "") for name in ("trigger", "dwell", "end", "server"))
        return PvaMotion(
            y=names[0], x=names[1], trigger=trigger, dwell=dwell, end=end, scale=address.scale(), server=server
        )
    raise _unknown(address, "zmq, pva")


def streams_at(frames: str, positions: str, motion: str | None = None, monitor: str | None = None) -> Streams:
    """The streams of a live source at these addresses. Raises ValueError for what is none."""
    beside = [positions_at(positions, steered=motion is not None), *([] if monitor is None else [monitor_at(monitor)])]
    _refuse_other_numbers(frames, [positions, *([] if monitor is None else [monitor])])
    stream, [(what, where), *monitors] = _together(frames_at(frames), beside)
    if motion is not None:
        stream, where = _steered(stream), _steered(where)
        monitors = [(each, _steered(other)) for each, other in monitors]
    return Streams(
        frames=stream,
        positions=where,
        positions_are=what,
        motion=None if motion is None else motion_at(motion),
        monitors=tuple(monitors),
    )


def named_at(addresses: Mapping[str, str]) -> Mapping[str, Stream]:
    """The streams at addresses by their names: frames, and positions and monitor where they are. Raises ValueError for
    what is none, and for a monitor, or positions, beside nothing."""
    frames, positions, monitor = (addresses.get(name) for name in (FRAMES, POSITIONS, "monitor"))
    if frames is None or (monitor is not None and positions is None):
        raise ValueError(
            f"found addresses of {' and '.join(addresses) or 'nothing'}, expected frames, with positions where there "
            "is a monitor"
        )
    return {FRAMES: frames_at(frames)} if positions is None else streams_at(frames, positions, None, monitor).named()


def _refuse_other_numbers(frames: str, beside: Sequence[str]) -> None:
    """Raise ValueError for frames with uniqueIds beside what counts from 0, where nobody says how they go together."""
    others = [text for text in beside if parse(text).scheme in ("zmq", "swmr", "bluesky")]
    address = parse(frames)
    if others and address.scheme == "pva" and "first" not in address.options:
        raise ValueError(
            f"{frames}: found no first beside {others[0]}, which counts frames from 0; expected the uniqueId of each "
            "scan's first frame: add first=1, and set the detector's ArrayCounter to 0 before each scan"
        )


def _together(
    frames: Stream, beside: Sequence[tuple[Companion, Stream]]
) -> tuple[Stream, list[tuple[Companion, Stream]]]:
    """Frames and what goes with them, each told what it needs to know of the others."""
    found: list[tuple[Companion, Stream]] = []
    # Positions are in the frames' own stream of the run; a monitor may have one of its own.
    keys = next((where.columns for _, where in beside[:1] if isinstance(where, BlueskyPositions)), ())
    if isinstance(frames, BlueskyFrames):
        frames = replace(frames, beside=keys)
    if isinstance(frames, Played):
        frames = replace(frames, order=InOrder([FRAMES, *(what.name for what, where in beside if _as(where, frames))]))
    for what, where in beside:
        if isinstance(where, PvaReadings):
            found.append((what, _timed(where, frames)))
        elif isinstance(frames, PvaFrames) and isinstance(where, PvaTable) and where.pv == frames.pv:
            frames = replace(frames, attributes={**frames.attributes, what.name: where})
            found.append((what, NoRecords()))
        elif isinstance(frames, PvaFrames) and isinstance(where, PvaTable):
            found.append((what, replace(where, first=frames.first)))
        elif isinstance(frames, BlueskyFrames) and isinstance(where, BlueskyPositions):
            found.append((what, replace(where, beside=(frames.data, *keys) if what.name == POSITIONS else ())))
        elif isinstance(frames, Played) and isinstance(where, Played) and _as(where, frames):
            found.append((what, replace(where, order=frames.order)))
        else:
            found.append((what, where))
    return frames, found


def _steered(stream: Stream) -> Stream:
    """A stream of a scan that this run steers."""
    if isinstance(stream, SwmrFrames | SwmrPositions):
        return replace(stream, where=replace(stream.where, steered=True))
    return stream


def _as(one: Stream, other: Played) -> bool:
    """Whether a stream is played as another one is, of the same file."""
    mine = (one.file, one.speed, one.step) if isinstance(one, Played) else None
    return mine == (other.file, other.speed, other.step)


def _timed(where: PvaReadings, frames: Stream) -> PvaReadings:
    if not isinstance(frames, PvaFrames):
        raise ValueError(
            f"found {', '.join(where.pvs)} beside frames that are not of pva, expected these: the value that belongs "
            "to a frame is found by the frame's time stamp"
        )
    return replace(where, frames=frames)


def _played(address: Address, stream: str) -> Played:
    text, step = address.options.get("speed", "1"), address.options.get("step", "")
    if step and "speed" in address.options:
        raise ValueError(f"{address.text}: found speed and step, expected one of them: a step does not wait")
    try:
        speed = float(text)
    except ValueError:
        speed = -1.0
    if not 0 <= speed < float("inf"):
        raise ValueError(f"{address.text}: found speed={text}, expected 1 for its own, or 0 for without waiting")
    return Played(file=address.place, stream=stream, speed=speed, step=step, streams_at=named_at)


def _followed(address: Address) -> Followed:
    number, first = address.options.get("number", ""), address.options.get("first")
    if number == "none" and first is not None:
        raise ValueError(f"{address.text}: found first={first} with number=none, expected one of them")
    return Followed(
        file=address.place,
        keys=address.options.get("keys", ""),
        finished=address.options.get("finished", ""),
        number=number,
        first=None if first is None else address.whole("first", 0),
        total=address.whole("total", 0),
        quiet_s=float(address.whole("quiet", 60)),
    )


def _tcp(address: Address, port: int | None = None) -> str:
    host, _, given = address.place.partition(":")
    if not (given or port) or (given and not given.isdigit()):
        raise ValueError(f"{address.text}: found no port, expected HOST:PORT")
    return f"tcp://{host}:{given or port}"


def _unknown(address: Address, known: str) -> ValueError:
    return ValueError(f"{address.text}: found the protocol {address.scheme!r}, expected one of {known}")
