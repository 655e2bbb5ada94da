"""Joins frames with what other streams say of them, by scan and frame number. Pure: no clock, no thread, no I/O.

The rules. The frame's number is authoritative. The samples of one frame are averaged. A frame that has no sample of a
stream waits for it until the deadline, or until the scan is over; then a gap between two samples is interpolated where
at most `gap` numbers in a row are missing. Nothing is extrapolated: such a frame is set aside, with its reason. What
comes twice, by (scan, number), or by (scan, number, sample), is used once.

The figures of a stream add up at every moment: received = joined + dropped + waiting.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steering.sources.open_scan import OpenScan, Value, interpolated
from steering.sources.streams import FRAMES, Companion, Joined, JoinSettings, StreamCounters

REPEAT, LATE, EARLIER = "repeat", "too late: its frame was settled before", "of a scan that was over"
FULL, THINNED = "the buffer was full: the oldest gave way", "thinned: the consumer is slower"
GIVEN_UP = "of an arming that was given up: another one followed before a frame came"
BEYOND = "of a scan after the last one that was asked for"
OLD = "older than oldest_s: the consumer is slower"
UNREADABLE = "unreadable: "
"""How the reason begins of what came and could not be decoded: its number is missing, and counts as lost."""
DAMAGED = "damaged: "
"""That of a frame which was numbered, and whose counts could not be decompressed."""
NO_LOSS = (REPEAT, LATE, EARLIER, BEYOND)
"""Reasons for which a frame is dropped that was joined, or lost, before, or is not one of the run's."""
_NO_FRAME, _FRAME_DROPPED = "no frame came", "its frame was dropped"
_OPEN_SCANS = 4


class Joiner:
    """Joins the streams of a source. Times are arguments, in any one clock; every call is cheap.

    Frames go in by `frame`, samples by `sample`, joined frames come out by `take`. `expire` settles what has waited too
    long. A scan ends when every stream has said so (`end`), or when a later one has begun and the deadline is over.
    """

    def __init__(
        self,
        companions: Sequence[Companion],
        settings: JoinSettings | None = None,
        judge: Callable[[Joined], str] = lambda _: "",
    ) -> None:
        """judge: says of each joined frame, once, why it is set aside; empty where it is not."""
        self._judge = judge
        self.companions = {c.name: c for c in companions}
        self.settings = settings or JoinSettings()
        self.counters = {FRAMES: StreamCounters(), **{c.name: StreamCounters() for c in companions}}
        self._scans: dict[Hashable, OpenScan] = {}
        self._over: set[Hashable] = set()
        self._ready: deque[Joined] = deque()
        self._came = [0, 0]
        """Joined frames since they were taken last, and those between the two times before."""
        self._behind = False
        """The consumer is slower: what waits is thinned as it is taken, until all of it has been."""

    def full(self, stream: str) -> bool:
        """No more of this stream should be read before some of it is joined, or dropped."""
        if stream == FRAMES:
            return self.settings.when_slow == "block" and self._kept() >= self.settings.capacity
        companion = self.companions[stream]
        return companion.when_slow == "block" and self._numbers(stream) >= companion.capacity

    @property
    def ready(self) -> int:
        """Joined frames that can be taken."""
        return len(self._ready)

    @property
    def remembered(self) -> int:
        """Frames of which a companion's value is kept, settled or not: what interpolation may need."""
        return sum(len(values) for scan in self._scans.values() for values in scan.values.values())

    def waiting(self, stream: str) -> int:
        """Of this stream: received, and neither joined nor dropped yet."""
        if stream == FRAMES:
            return self._kept()
        rows = sum(len(v.rows) for scan in self._scans.values() for v in scan.unsettled[stream].values())
        return rows + sum(joined.rows[stream] for joined in self._ready)

    def begin(self, scan: Hashable, first: int | None = 0) -> None:
        """A scan begins whose first frame has this number; None: from the first one that comes on."""
        if scan in self._scans and first is not None:
            self._scans[scan].numbers.expect(first)  # its samples came before it was said to begin
        elif scan not in self._scans and scan not in self._over:
            self._scans[scan] = OpenScan(tuple(self.companions.values()), first)
            while len(self._scans) > _OPEN_SCANS:
                self._close(next(iter(self._scans)))

    def frame(self, scan: Hashable, number: int, frame: Any, now: float) -> None:
        """A frame has come."""
        counters = self.counters[FRAMES]
        counters.note(now, number)
        here = self._open(scan, counters)
        if here is None:
            return
        fresh, in_order = here.numbers.add(number, now)
        if not fresh:
            counters.dropped[LATE if number in here.numbers.lost else REPEAT] += 1
            return
        counters.out_of_order += not in_order
        here.frames[number] = (frame, now)
        self._join_where_complete(scan, here, number)
        self._bound()

    def sample(
        self, stream: str, scan: Hashable, number: int, row: Sequence[float], now: float, *, sample: int = 0
    ) -> None:
        """A sample of a frame has come: `row` holds the companion's numbers."""
        counters = self.counters[stream]
        counters.note(now, number)
        here = self._open(scan, counters)
        if here is None:
            return
        values = np.asarray(row, np.float64)
        if values.shape != (self.companions[stream].width,) or not np.isfinite(values).all():
            counters.dropped["not finite, or not as many numbers as expected"] += 1
            return
        low, high = here.range.get(stream, (number, number))
        counters.out_of_order += number < high
        here.range[stream] = min(low, number), max(high, number)
        gone = number in here.numbers and number not in here.frames
        value = here.values[stream].get(number)
        if value is not None and value.settled and not gone:
            value = None  # no frame came in time: it may be of an earlier scan, and what comes now is newer
        if value is not None and sample in value.rows:
            counters.dropped[REPEAT] += 1
        elif gone:
            counters.dropped[LATE] += 1
        else:
            if value is None:
                value = here.values[stream][number] = here.unsettled[stream][number] = Value(now)
            value.rows[sample] = values
            value.mean = None
            self._join_where_complete(scan, here, number)
            self._bound_samples(stream)
            self._forget(stream, here)

    def end(self, stream: str, scan: Hashable, now: float, frames: int | None = None) -> None:
        """A stream will say no more of a scan. frames: how many frames it had in all, where that is known."""
        here = self._scans.get(scan)
        if here is None:
            return
        if frames is not None:
            here.frames_in_all = frames, now
        here.ended.add(stream)
        if FRAMES in here.ended:
            here.miss(now)
        self._close_where_done(scan, here)

    def withdraw(self, stream: str, scan: Hashable, reason: str) -> None:
        """What a companion has said of a scan, of which no frame has come, was of another one: it is dropped."""
        here = self._scans.get(scan)
        if here is None:
            return
        for number in list(here.unsettled[stream]):
            self._drop_samples(stream, here, number, reason)
        here.values[stream].clear()
        here.range.pop(stream, None)
        here.ended.discard(stream)
        self.counters[FRAMES].lost -= len(here.numbers.lost)
        here.numbers, here.frames_in_all = here.numbers.anew(), None

    def expire(self, now: float, quiet_since: float = -np.inf) -> None:
        """Settle what has waited for too long. quiet_since: since when all frames that came are read; infinite
        where some are not, as they are held back: then those that others say there are, or speak of, may be these."""
        limit = now - self.settings.wait_s
        for scan, here in list(self._scans.items()):
            while here.frames and next(iter(here.frames.values()))[1] <= limit:
                self._settle(scan, here, next(iter(here.frames)), f"within {self.settings.wait_s:g} s")
            if quiet := quiet_since <= limit:
                here.miss(quiet_since)
            self.counters[FRAMES].lost += here.numbers.give_up(limit)
            for stream in self.companions:
                for number in here.overdue(stream, limit, ahead=quiet):
                    self._drop_samples(stream, here, number, _NO_FRAME)
            self._close_where_done(scan, here)
        oldest = now - self.settings.oldest_s
        while self.settings.when_slow != "block" and self._ready and self._ready[0].since < oldest:
            self._drop_ready(self._ready.popleft(), self.counters[FRAMES], OLD)

    def finish(self) -> None:
        """Every scan is over."""
        for scan in list(self._scans):
            self._close(scan)

    def over(self, scan: Hashable) -> bool:
        """All of a scan is settled; frames that are ready may wait still."""
        return scan in self._over

    def take(self, most: int) -> list[Joined]:
        """The oldest joined frames, which count as joined from now on; of a consumer that is slower, where frames are
        thinned, those that stand evenly among them, and the others are dropped."""
        among = self._among(most)
        oldest = [self._ready.popleft() for _ in range(among)]
        places = {(k + 1) * among // most - 1 for k in range(most)} if among > most else range(among)
        taken = [one for k, one in enumerate(oldest) if k in places]
        for k, one in enumerate(oldest):
            if k not in places:
                self._drop_ready(one, self.counters[FRAMES], THINNED)
        self.counters[FRAMES].joined += len(taken)
        for name in self.companions:
            self.counters[name].joined += sum(joined.rows[name] for joined in taken)
        return taken

    def _among(self, most: int) -> int:
        """How many of the oldest ready frames so many are chosen from.

        Frames are thinned from the moment on when the buffer would not hold those that come until they are taken again.
        They then leave it twice as fast as they come, until none is left that is older: so the spacing does not jump,
        and what is taken is what has come since. Of two times between takings the shorter one counts: a consumer that
        was busy once is not slow.
        """
        waiting = len(self._ready)
        if not waiting:
            return 0
        now, before = self._came
        coming = min(now, before)
        self._came = [0, now]
        if self.settings.when_slow != "thin" or waiting <= most:
            self._behind = False
            return min(most, waiting)
        self._behind = self._behind or self._kept() + coming > self.settings.capacity
        return min(waiting, max(most, 2 * coming)) if self._behind else most

    def spoilt(self, joined: Joined, reason: str) -> None:
        """A frame that was taken proves to be none: it counts as dropped for this reason, and not as joined."""
        self.counters[FRAMES].joined -= 1
        for name, rows in joined.rows.items():
            self.counters[name].joined -= rows
        self._drop_ready(joined, self.counters[FRAMES], reason)

    def _kept(self) -> int:
        return len(self._ready) + sum(len(scan.frames) for scan in self._scans.values())

    def _numbers(self, stream: str) -> int:
        """Frame numbers of which samples of a companion wait."""
        return sum(len(scan.unsettled[stream]) for scan in self._scans.values())

    def _open(self, scan: Hashable, counters: StreamCounters) -> OpenScan | None:
        if scan in self._over:
            counters.dropped[EARLIER] += 1
            return None
        self.begin(scan, first=None)
        return self._scans[scan]

    def _join_where_complete(self, scan: Hashable, here: OpenScan, number: int) -> None:
        if number not in here.frames:
            return
        for name, companion in self.companions.items():
            value = here.values[name].get(number)
            # A value that was settled before its frame came is used where no newer one comes in time.
            if value is None or value.settled or len(value.rows) < companion.samples:
                return
        self._hand_out(scan, here, number, {name: here.values[name][number].average() for name in self.companions})

    def _hand_out(self, scan: Hashable, here: OpenScan, number: int, values: dict[str, NDArray[np.float64]]) -> None:
        frame, since = here.frames.pop(number)
        rows = {}
        for name in self.companions:
            value = here.unsettled[name].pop(number, None)
            rows[name] = len(value.rows) if value is not None else 0
            if value is not None:
                value.settled = True
        joined = Joined(scan, number, frame, values, since, rows)
        if reason := self._judge(joined):
            self._drop_ready(joined, self.counters[FRAMES], reason)
        else:
            self._ready.append(joined)
            self._came[0] += 1

    def _settle(self, scan: Hashable, here: OpenScan, number: int, when: str) -> None:
        """A frame that waits no longer: joined with what there is, or set aside."""
        values: dict[str, NDArray[np.float64]] = {}
        for name, companion in self.companions.items():
            value = here.values[name].get(number)
            if value is not None:
                values[name] = value.average()
                continue
            between = interpolated(here.values[name], number, companion.gap)
            if between is None:
                low, high = here.range.get(name, (number, number))
                why = "in a gap too wide to interpolate" if low < number < high else "outside the range of numbers"
                self._drop_frame(
                    here, number, f"no {name} {when}, {why}" if name in here.range else f"no {name} {when}"
                )
                return
            values[name] = between
        for name in values:
            self.counters[name].interpolated += number not in here.values[name]
        self._hand_out(scan, here, number, values)

    def _drop_frame(self, here: OpenScan, number: int, reason: str) -> None:
        here.frames.pop(number)
        self.counters[FRAMES].dropped[reason] += 1
        for name in self.companions:
            if number in here.unsettled[name]:
                self._drop_samples(name, here, number, _FRAME_DROPPED)

    def _drop_samples(self, stream: str, here: OpenScan, number: int, reason: str) -> None:
        """The value stays, to interpolate by."""
        value = here.unsettled[stream].pop(number)
        value.average()
        value.settled = True
        self.counters[stream].dropped[reason] += len(value.rows)

    def _bound(self) -> None:
        counters = self.counters[FRAMES]
        while self._kept() > self.settings.capacity:
            # Either the consumer is slow, and what is ready gives way, or frames wait for samples that do not come.
            here = next((scan for scan in self._scans.values() if scan.frames), None)
            if here is not None and 2 * len(self._ready) < self.settings.capacity:
                self._drop_frame(here, next(iter(here.frames)), FULL)
            else:
                reason = THINNED if self.settings.when_slow == "thin" else FULL
                self._drop_ready(self._ready.popleft(), counters, reason)

    def _drop_ready(self, joined: Joined, counters: StreamCounters, reason: str) -> None:
        counters.dropped[reason] += 1
        for name, rows in joined.rows.items():
            if rows:
                self.counters[name].dropped[_FRAME_DROPPED] += rows

    def _bound_samples(self, stream: str) -> None:
        companion = self.companions[stream]
        if companion.when_slow != "block" and self._numbers(stream) > companion.capacity:
            here = next(scan for scan in self._scans.values() if scan.unsettled[stream])
            number = next(iter(here.unsettled[stream]))
            self._drop_samples(stream, here, number, FULL)
            del here.values[stream][number]

    def _forget(self, stream: str, here: OpenScan) -> None:
        """Old settled values, which no frame will need to interpolate by."""
        values, most = here.values[stream], self.companions[stream].capacity
        if len(values) > 2 * most:
            for number in sorted(values)[: len(values) - most]:
                if values[number].settled:
                    del values[number]

    def _close_where_done(self, scan: Hashable, here: OpenScan) -> None:
        """Every stream has ended, or the frames have, and each of them has its samples."""
        all_there = FRAMES in here.ended and not here.frames and here.numbers.complete
        if all_there or here.ended >= self.counters.keys():
            self._close(scan)

    def _close(self, scan: Hashable) -> None:
        here = self._scans[scan]
        for number in list(here.frames):
            self._settle(scan, here, number, "when the scan was over")
        for stream in self.companions:
            for number in list(here.unsettled[stream]):
                self._drop_samples(stream, here, number, _NO_FRAME)
        here.miss()
        self.counters[FRAMES].lost += here.numbers.give_up(np.inf)
        del self._scans[scan]
        self._over.add(scan)
