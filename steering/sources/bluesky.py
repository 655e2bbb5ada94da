"""Documents of a bluesky RunEngine: frames are read from the files that they name, positions from events or files.

A run counts from the descriptor on that has all data keys that are asked for; other streams of it are passed over,
other runs, also those within it, count as unreadable, and a run that is sent once more is no other one. The frame's
number is that of its event (seq_num - 1), its row in the file the one that stream_datum says. bluesky repeats points
after a pause: the joiner uses the first of each number.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import h5py
import hdf5plugin  # noqa: F401 - registers the compression filters that detectors write with
import numpy as np
from numpy.typing import NDArray

from steering.sources.bluesky_documents import Document, Documents, Refused, Rows, decoder_of, messages_of
from steering.sources.streams import (
    Began,
    Decoder,
    Ended,
    Frame,
    Message,
    Record,
    Samples,
    Unreadable,
    WrongProtocol,
)
from steering.sources.swmr_file import SwmrFile, rows_at_once

_POLL_S = 0.005


@dataclass(frozen=True, kw_only=True)
class _OfDocuments:
    """A stream that documents make; `said` makes its records of them."""

    documents: Documents

    def records(self, stopped: threading.Event) -> Iterator[Record | None]:
        """Its records, as their documents come. Raises ValueError for frames that are not in HDF5, or not one for each
        event, OSError for a file that cannot be read."""
        with _Files(self.documents.patience_s, stopped) as files:
            yield from self.said(self.documents.come(stopped), files.rows)

    def messages(self, stopped: threading.Event) -> Iterator[Message | None]:
        """The documents, each with the rows that were read for it. Raises as `records`."""
        with _Files(self.documents.patience_s, stopped) as files:
            yield from messages_of(self, files.rows, stopped)

    def decoder(self) -> Decoder:
        """See MessageStream."""
        return decoder_of(self)

    def said(self, documents: Iterator[Document | str | None], rows: Rows) -> Iterator[Record | None]:
        """See DocumentStream."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class BlueskyFrames(_OfDocuments):
    """Frames of a data key, (y, x) for each event, in HDF5 files."""

    data: str = ""
    """Data key; empty: the one external key with two dimensions or more."""
    beside: tuple[str, ...] = ()
    """Data keys that must be in the same descriptor."""
    name: str = "sample"
    """Key of the start document that names the scan; without it: scan-SCAN_ID."""

    def said(self, documents: Iterator[Document | str | None], rows: Rows) -> Iterator[Record | None]:
        """The frames of documents. rows: reads those that they name."""
        run = _Runs((self.data, *self.beside), self.name)
        for one in run.follow(documents):
            if not isinstance(one, _Rows):
                yield one
            elif one.key == run.frames:
                for k, frame in enumerate(chain.from_iterable(rows(one, 2))):
                    yield Frame(one.number + k, frame, time.time())


@dataclass(frozen=True, kw_only=True)
class BlueskyPositions(_OfDocuments):
    """Positions, or a monitor, of data keys: readings in events, or datasets with a value for each event."""

    columns: tuple[str, ...]
    """Data keys, of positions y first."""
    scale: tuple[float, ...]
    beside: tuple[str, ...] = ()
    """Data keys that must be in the same descriptor; one that is empty: of any frames."""

    def said(self, documents: Iterator[Document | str | None], rows: Rows) -> Iterator[Record | None]:
        """The samples of documents. rows: reads those that they name."""
        run, pending = _Runs((*self.beside, *self.columns)), dict[str, dict[int, float]]()
        for one in run.follow(documents, self.columns):
            if isinstance(one, Began):
                pending = {name: {} for name in self.columns}
            if isinstance(one, Ended):
                yield Ended(last=one.last)  # points that bluesky repeats make more samples than frames
            elif not isinstance(one, _Rows):
                yield one
            elif one.key in pending:
                values = one.values if one.values is not None else chain.from_iterable(rows(one, 0))
                pending[one.key] |= {one.number + k: float(value) for k, value in enumerate(values)}
                yield from self._complete(pending)

    def _complete(self, pending: dict[str, dict[int, float]]) -> Iterator[Samples]:
        for number in sorted(set.intersection(*(set(each) for each in pending.values()))):
            row = [pending[name].pop(number) for name in self.columns]
            yield Samples(number, np.array([row]) * np.asarray(self.scale))


@dataclass(frozen=True)
class _Rows:
    """What the documents say of some events in a row."""

    key: str
    number: int
    """Of the first, from 0."""
    values: tuple[float, ...] | None = None
    """Readings; None: they are in a file."""
    resource: Mapping[str, Any] = field(default_factory=dict)
    first: int = 0
    """Row in the file."""
    last: int = 0


class _Run:
    """A run that has begun."""

    def __init__(self, start: Mapping[str, Any]) -> None:
        self.start = start
        self.keys: set[str] = set()
        """Of its descriptors so far."""


class _Runs:
    """Follows runs, of which the first descriptor with all keys is the one. Others may begin and end meanwhile."""

    def __init__(self, keys: tuple[str, ...], name: str = "") -> None:
        self._wanted, self._name = keys, name
        self.frames = ""
        """Data key of the frames."""
        self._seen: set[str] = set()
        """Uids of runs that began: for who subscribes late a run is sent once more, to all."""
        self._open: dict[str, _Run] = {}
        """Those that have not ended, by uid."""
        self._descriptor: Mapping[str, Any] = {}
        """That of the run which is followed; empty: none is."""
        self._resources: dict[str, Mapping[str, Any]] = {}
        self._missed = False

    def follow(
        self, documents: Iterator[Document | str | None], readings: tuple[str, ...] = ()
    ) -> Iterator[Record | _Rows | None]:
        """Began, Ended, and what is said of the data keys in between."""
        for one in documents:
            if one is None or isinstance(one, str):
                yield None if one is None else Unreadable(one)
                continue
            name, document = one
            try:
                yield from self._take(name, document, readings)
            except Refused as error:
                raise WrongProtocol(str(error)) from error
            except (KeyError, TypeError, AttributeError, ValueError, OverflowError):
                yield Unreadable(f"a document {name[:20]!r} without what it should hold")
        for uid in list(self._open):
            yield from self._end(uid, {})
        yield Ended(last=True)

    def _take(self, name: str, document: Mapping[str, Any], readings: tuple[str, ...]) -> Iterator[Record | _Rows]:
        if name == "start":
            if document["uid"] not in self._seen:
                self._seen.add(document["uid"])
                self._open[document["uid"]] = _Run(document)
        elif name == "descriptor":
            yield from self._begin(document)
        elif name == "stream_resource":
            self._resources[document["uid"]] = document
        elif name == "stream_datum" and document["descriptor"] == self._descriptor.get("uid"):
            yield self._external(document)
        elif name in ("event", "event_page") and document["descriptor"] == self._descriptor.get("uid"):
            yield from _readings(document, readings)
        elif name == "stop":
            yield from self._end(document["run_start"], document)
        elif name in ("event", "stream_datum") and not self._seen and not self._missed:
            self._missed = True
            yield Unreadable("a document of a run that began before: it is passed over")

    def _end(self, uid: str, stop: Mapping[str, Any]) -> Iterator[Record]:
        """A run is over. stop: its last document; empty: there was none."""
        if uid not in self._open:
            return
        if self._descriptor and uid == self._descriptor["run_start"]:
            events = stop.get("num_events", {}).get(str(self._descriptor.get("name")))
            status, why = str(stop.get("exit_status", "success")), " ".join(str(stop.get("reason", "")).split())
            if status != "success":
                yield Unreadable(f"the end of a run that did not succeed: {status[:20]}, {why[:100] or 'no reason'}")
            yield Ended(events if isinstance(events, int) else None)
            self._descriptor = {}
        else:
            wanted = ", ".join(dict.fromkeys(name or "frames" for name in self._wanted))
            found = ", ".join(sorted(self._open[uid].keys))[:100] or "none"
            yield Unreadable(f"a run with the data keys {found}, expected {wanted} in one of its streams")
        del self._open[uid]
        if not self._open:
            self._resources = {}

    def _begin(self, document: Mapping[str, Any]) -> Iterator[Record]:
        uid, followed = document["run_start"], self._descriptor.get("run_start")
        if uid not in self._open or uid == followed or document.get("name") == "baseline":
            return  # a baseline is read before and after a scan, and goes with no frame
        keys = document["data_keys"]
        run = self._open[uid]
        run.keys |= keys.keys()
        images = [name for name, key in keys.items() if "external" in key and len(key["shape"]) >= 2]
        wanted = [name for name in self._wanted if name]
        if not all(name in keys for name in wanted) or ("" in self._wanted and not images):
            return
        if "" in self._wanted and len(images) > 1:
            raise Refused(f"found the frames of {', '.join(images)}, expected one of them: add ?data=NAME")
        self.frames = images[0] if "" in self._wanted else self._wanted[0]
        old = [name for name in (self.frames, *wanted) if str(keys[name].get("external")).startswith("FILESTORE")]
        if old:
            raise Refused(
                f"found {old[0]} in files that the documents resource and datum name, expected stream_resource and "
                "stream_datum, as detectors of ophyd-async send them"
            )
        if followed is not None:
            yield Ended()
            yield Unreadable("the rest of a run that had not ended when another with the same data keys began")
            self._open.pop(followed, None)
        self._descriptor, start = document, run.start
        named = start.get(self._name) if self._name else None
        if isinstance(named, Mapping):  # a sample with properties
            named = named.get("name")
        number = start.get("scan_id")
        yield Began(
            str(named) if named else f"scan-{number}" if number is not None and self._name else None,
            header={"run": str(start["uid"])},
        )

    def _external(self, document: Mapping[str, Any]) -> _Rows:
        resource = self._resources[document["stream_resource"]]
        first, last = int(document["indices"]["start"]), int(document["indices"]["stop"])
        number = int(document["seq_nums"]["start"]) - 1
        if not 0 <= first < last < 2**40 or not 0 <= number < 2**40:
            raise ValueError("impossible indices")
        key = str(resource["data_key"])
        shape = self._descriptor["data_keys"].get(key, {}).get("shape", [])
        if key == self.frames and len(shape) > 2 and shape[0] not in (None, 1):
            raise Refused(f"found {shape[0]} frames of {key} for each event, expected one")
        return _Rows(key, number, None, resource, first, last)


def _readings(document: Mapping[str, Any], columns: tuple[str, ...]) -> Iterator[_Rows]:
    """Of an event, or of a page of them."""
    page = isinstance(document["seq_num"], list)
    numbers = document["seq_num"] if page else [document["seq_num"]]
    for name in columns:
        if name in document["data"]:
            values = document["data"][name] if page else [document["data"][name]]
            for number, value in zip(numbers, values, strict=True):
                if not 0 < number < 2**40:
                    raise ValueError("an impossible seq_num")
                yield _Rows(name, int(number) - 1, (float(np.squeeze(value)),))


class _Files:
    """The files that stream_resource documents name, open while they are read from."""

    def __init__(self, patience_s: float, stopped: threading.Event) -> None:
        self._patience_s, self._stopped = patience_s, stopped
        self._path = Path()
        self._followed: Any = None
        self._shared: SwmrFile | None = None

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        self._leave()

    def rows(self, wanted: _Rows, inner: int) -> Iterator[NDArray]:
        """(row, ...) with `inner` dimensions each, some at once, when they are there. Raises OSError, ValueError."""
        path, dataset = _place(wanted.resource)
        first = wanted.first
        while first < wanted.last:
            rows = self._there(path, dataset, (first, wanted.last), inner)
            yield rows
            first += len(rows)

    def _there(self, path: Path, dataset: str, wanted: tuple[int, int], inner: int) -> NDArray:
        begun = time.monotonic()
        while True:
            try:
                return self._read(path, dataset, wanted, inner)
            except (OSError, KeyError, RuntimeError, IndexError) as error:
                if time.monotonic() - begun > self._patience_s or self._stopped.is_set():
                    raise OSError(
                        f"{path}: found no rows {wanted[0]} to {wanted[1]} of {dataset} ({error}), which a document "
                        "has said are there: is the file's folder reached from here?"
                    ) from error
            with SwmrFile.turn:
                self._leave()
            self._stopped.wait(_POLL_S)

    def _read(self, path: Path, dataset: str, wanted: tuple[int, int], inner: int) -> NDArray:
        """The first of these rows, as many as are read at once."""
        with SwmrFile.turn:
            if self._shared is None or path != self._path:
                self._leave()
                self._followed, self._path = SwmrFile.followed(path), path
                self._shared = self._followed.__enter__()
            node = self._shared.open()[dataset]
            if not isinstance(node, h5py.Dataset):
                raise KeyError(f"{dataset} is no dataset")
            node.refresh()
            first, last = wanted[0], min(wanted[1], wanted[0] + rows_at_once(node, inner))
            if len(node) < last:
                raise IndexError(f"{len(node)} rows so far")
            rows = np.asarray(node[first:last])
        shape = rows.shape[rows.ndim - inner :] if inner else ()
        return rows.reshape(len(rows), *shape)

    def _leave(self) -> None:
        if self._followed is not None:
            self._followed.__exit__(None, None, None)
        self._followed = self._shared = None


def _place(resource: Mapping[str, Any]) -> tuple[Path, str]:
    """File and dataset of a stream_resource. Raises ValueError for what is not read here."""
    kind, uri = str(resource.get("mimetype")), urlsplit(str(resource.get("uri")))
    parameters = resource.get("parameters") or {}
    if not isinstance(parameters, Mapping):
        raise Refused(f"found the parameters {str(parameters)[:200]}, expected a mapping that names a dataset")
    dataset = parameters.get("dataset", parameters.get("path"))
    if kind != "application/x-hdf5" or uri.scheme != "file" or uri.hostname not in (None, "localhost"):
        raise Refused(f"found {kind} at {uri.geturl()[:200]}, expected application/x-hdf5 at file://localhost/...")
    if not isinstance(dataset, str) or parameters.get("slice"):
        raise Refused(f"found the parameters {str(parameters)[:200]}, expected a dataset, without slice")
    return Path(unquote(uri.path)), dataset
