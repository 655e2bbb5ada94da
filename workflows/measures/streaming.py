"""What live streams send, written to files, and read as a source reads it: for workflows/fuzz_readers.py."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from steering.sources.bluesky import BlueskyFrames, BlueskyPositions
from steering.sources.bluesky_documents import Documents
from steering.sources.panda import panda
from steering.sources.streams import Began, Ended, Frame, Record, Samples, Stream, Unreadable
from steering.sources.swmr import SwmrFrames, SwmrPositions
from steering.sources.swmr_rows import Followed
from steering.sources.tape import read as read_tape, record

N, FRAMES = 16, 6
DATA, KEYS, FINISHED = "/entry/data/data", "/entry/keys", "/entry/scan_finished"
NUMBERS = "/entry/instrument/NDAttributes/NDArrayUniqueId"
_QUIET_S, _LONGEST_S = 0.03, 20
_KINDS = {"ValueError": ValueError, "OSError": OSError}


def counts() -> np.ndarray:
    """Frames (n, y, x)."""
    return np.random.default_rng(0).poisson(20, (FRAMES, N, N)).astype(np.uint16)


def write_swmr(folder: Path) -> None:
    """A file as its writer leaves it at the end of a scan."""
    import h5py  # noqa: PLC0415
    import hdf5plugin  # noqa: PLC0415

    with h5py.File(folder / "scan.h5", "w", libver="latest") as file:
        rows = {"maxshape": (None, N, N), "chunks": (1, N, N)}
        file.create_dataset(DATA, data=counts(), **rows, **hdf5plugin.Bitshuffle(cname="lz4"))
        for name in ("y", "x"):
            file.create_dataset(f"/entry/{name}", data=np.arange(1.0, FRAMES + 1), maxshape=(None,), chunks=(4,))
        file.create_dataset(KEYS, data=np.arange(1, FRAMES + 1), maxshape=(None,), chunks=(4,))
        file.create_dataset(NUMBERS, data=np.arange(7, 7 + FRAMES, dtype=np.int32), maxshape=(None,), chunks=(4,))
        file[FINISHED] = 1


def follow_swmr(folder: Path) -> None:
    """Follow frames and positions to the scan's end, in a process of their own as the receiving one is."""
    where = Followed(file=str(folder / "scan.h5"), quiet_s=_QUIET_S, skip_s=_QUIET_S)
    streams = (
        SwmrFrames(where=where, data=DATA),
        SwmrPositions(where=where, columns=("/entry/y", "/entry/x"), scale=(1.0, 1.0)),
    )
    in_fork(lambda: [looked_at(_until_silent(stream)) for stream in streams])


def _until_silent(stream: Stream) -> Iterator[Record | None]:
    """What it says until nothing came for a while: so a source (`end_s`) ends a scan that its file says goes on."""
    stopped, heard = threading.Event(), time.monotonic()
    for one in stream.records(stopped):
        yield one
        if one is not None:
            heard = time.monotonic()
        elif time.monotonic() - heard > 10 * _QUIET_S:
            stopped.set()


def write_dectris(folder: Path) -> None:
    """The messages of a series, a file each."""
    import cbor2  # noqa: PLC0415

    from served.dectris import image  # noqa: PLC0415

    series = {"series_id": 1, "series_unique_id": "a"}
    mask = image(np.eye(N, dtype=np.uint32), "bslz4")
    start = {"incident_energy": 8800.0, "detector_translation": [0, 0, -2.0], "pixel_mask": {"threshold_1": mask}}
    messages: dict[str, dict[str, Any]] = {"0": {"type": "start", "user_data": {"scan": "a"}, **start}}
    for k, compression in enumerate(("bslz4", "lz4", None)):
        data = {"threshold_1": image(counts()[k], compression)}
        messages[str(k + 1)] = {"type": "image", "image_id": k, "data": data}
    messages["4"] = {"type": "end"}
    for name, fields in messages.items():
        (folder / f"{name}.cbor").write_bytes(cbor2.dumps(cbor2.CBORTag(55799, {**series, **fields})))


def read_dectris(folder: Path) -> None:
    """Decode them in their order."""
    from steering.sources.dectris import Stream2  # noqa: PLC0415

    decoder = Stream2()
    for path in sorted(folder.glob("*.cbor")):
        looked_at(refused(decoder, path.read_bytes()))


def write_panda(folder: Path) -> None:
    """A message with samples of a PandA, and one of MAX IV's variant."""
    data = {"starting_sample_number": 3, "size": 2, "dtype": "float64", "data": [1.0, 2.0]}
    datasets = {"/INENC1.VAL.Value": data, "/INENC2.VAL.Value": data}
    fields = {"message_type": "data", "frame_number": 3, "datasets": datasets}
    (folder / "panda.json").write_text(json.dumps(fields))
    (folder / "maxiv.json").write_text(json.dumps({"message_type": "data", "frame_number": 3, "y": [1.0], "x": [2.0]}))


def read_panda(folder: Path) -> None:
    """Decode both."""
    for name, columns in (("panda", ("INENC1", "INENC2")), ("maxiv", ("y", "x"))):
        looked_at(
            refused(lambda message, c=columns: panda(message, c, (1.0, 1.0)), (folder / f"{name}.json").read_bytes())
        )


def write_documents(folder: Path) -> None:
    """The documents of a run of bluesky; the file with its frames lies beside the folder and stays whole."""
    import h5py  # noqa: PLC0415

    frames = folder.parent / "frames.h5"
    with h5py.File(frames, "w", libver="latest") as file:
        file[DATA] = counts()
    image = {"dtype": "array", "shape": [N, N], "external": "STREAM:", "source": ""}
    number = {"dtype": "number", "shape": [], "source": ""}
    resource = {"data_key": "one", "mimetype": "application/x-hdf5", "uri": f"file://localhost{frames.absolute()}"}
    documents: list[tuple[str, dict[str, Any]]] = [
        ("start", {"uid": "a", "time": 0.0, "scan_id": 7, "sample": "gravel"}),
        ("descriptor", {"uid": "b", "run_start": "a", "name": "primary",
                        "data_keys": {"one": image, "y": number, "x": number}}),
        ("stream_resource", {"uid": "c", "parameters": {"dataset": DATA}, **resource}),
    ]  # fmt: skip
    for k in range(FRAMES):
        ranges = {"indices": {"start": k, "stop": k + 1}, "seq_nums": {"start": k + 1, "stop": k + 2}}
        documents += [
            ("stream_datum", {"uid": f"c/{k}", "stream_resource": "c", "descriptor": "b", **ranges}),
            ("event", {"uid": f"e{k}", "descriptor": "b", "seq_num": k + 1, "data": {"y": 1.0 * k, "x": 2.0}}),
        ]
    documents.append(("stop", {"uid": "f", "run_start": "a", "num_events": {"primary": FRAMES}}))
    (folder / "documents.jsonl").write_text("".join(json.dumps(one) + "\n" for one in documents))


def read_documents(folder: Path) -> None:
    """Frames and positions of the run."""
    documents = Documents(place=str(folder / "documents.jsonl"), patience_s=0.0)
    positions = BlueskyPositions(documents=documents, columns=("y", "x"), scale=(1.0, 1.0))
    for stream in (BlueskyFrames(documents=documents), positions):
        unread = looked_at(stream.records(threading.Event()))
        if unread:  # counted, and passed over: of a bad file here an error
            raise ValueError(f"found {unread[0]}")


class _Given:
    def __init__(self, records: list[Record]) -> None:
        self._records = records

    def records(self, stopped: threading.Event) -> Iterable[Record]:
        """What is given; then it is over."""
        yield from self._records
        stopped.set()


def write_tape(folder: Path) -> None:
    """A recording of a stream."""
    began = Began("gravel", 0, {"distance": 2.0, "bad": np.eye(N, dtype=bool)})
    frames = [Frame(k, frame, 0.0, {"positions": np.ones(2)}) for k, frame in enumerate(counts())]
    records = [began, *frames, Unreadable("torn"), Samples(0, np.ones((3, 2))), Ended(FRAMES, last=True)]
    record({"frames": _Given(records)}, folder / "a.tape", threading.Event())


def play_tape(folder: Path) -> None:
    """All of its records."""
    with (folder / "a.tape").open("rb") as file:
        looked_at(one for _, _, one in read_tape(file))


def looked_at(records: Iterable[Record | None]) -> list[str]:
    """Look at every record, and at the counts of frames, which are decompressed for it. Returns what a stream says that
    it could not read; raises ValueError for a frame that cannot be decompressed."""
    unread = []
    for one in records:
        if isinstance(one, Unreadable):
            unread.append(one.reason)
        if isinstance(one, Frame):
            np.asarray(one.counts)
        if isinstance(one, Ended) and one.last:
            break
    return unread


def refused(decode: Callable[[bytes], list[Record]], message: bytes) -> list[Record]:
    """A message decoded; what a receiver would count as unreadable is an error here."""
    try:
        return decode(message)
    except ValueError as error:
        raise ValueError(f"found {error}") from error


class Crashed(OSError):
    """A library has ended the process that receives, as HDF5 does for some damaged files. A run says so in these words,
    and opens its source again or ends."""


def in_fork(call: Callable[[], Any]) -> None:
    """Call in a fork. Raises what it raises, Crashed where a library ended it, RuntimeError where it took too long."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            signal.alarm(_LONGEST_S)
            faulthandler.disable()  # the crash is told by who waits
            said: list[str] = []
            try:
                call()
            except Exception as error:  # the boundary of this process: raised in the other one
                kind = next((name for name, one in _KINDS.items() if isinstance(error, one)), type(error).__name__)
                said = [kind, str(error)[:2000]]
            os.write(writer, json.dumps(said).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        content = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT):
        raise Crashed(f"found the receiving process gone (exit code {-os.WTERMSIG(status)}), expected it to receive")
    if status:
        raise RuntimeError(f"it ended the process with status {status}")
    said = json.loads(content)
    if said:
        raise _KINDS.get(said[0], RuntimeError)(said[1])
