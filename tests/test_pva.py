"""PV Access against a server: what a PV held before is no part of the scan, and a scan begins where its numbers do."""

from __future__ import annotations

import socket
import threading

import numpy as np
import pytest

pytest.importorskip("p4p")

from p4p.nt import NTEnum, NTNDArray, NTScalar, NTTable
from p4p.server import Server
from p4p.server.thread import SharedPV

from steering.sources import pva_client
from steering.sources.addresses import streams_at
from steering.sources.pva import GOES_ON, HELD, NdArrays, PvaFrames, PvaTable, nd_fields, nd_message
from steering.sources.pva_readings import PvaReadings
from steering.sources.pva_scans import Scans
from steering.sources.streams import Began, Ended, Frame, Message, Samples, Unreadable, WrongProtocol, decoded
from tests.test_streams import nd_array

HERE = {
    "EPICS_PVAS_INTF_ADDR_LIST": "127.0.0.1",
    "EPICS_PVAS_AUTO_BEACON_ADDR_LIST": "NO",
    "EPICS_PVAS_BEACON_ADDR_LIST": "127.0.0.1",
}


def array(number, when=100.0):
    value = NTNDArray().wrap(np.full((4, 4), number, np.uint16), timestamp=when)
    value["uniqueId"] = number
    return value


class Served:
    """A detector that has measured: its PVs hold the last frame of a scan, its position, and that it is done."""

    def __init__(self):
        self.image, self.done = SharedPV(), SharedPV(nt=NTScalar("?"))
        self.table = SharedPV(nt=NTTable([("number", "l"), ("y", "d"), ("x", "d")]))
        self.y = SharedPV(nt=NTScalar("d"))
        self.open(done=True)
        pvs = {"D:I": self.image, "D:D": self.done, "D:T": self.table, "D:Y": self.y}
        self.server = Server(providers=[pvs], conf={**HERE, "EPICS_PVAS_SERVER_PORT": "0"}, useenv=False)
        self.at = f"127.0.0.1:{self.server.conf()['EPICS_PVAS_SERVER_PORT']}"

    def open(self, done):
        self.image.open(array(9))
        self.done.open(done)
        self.table.open([self.row(9)])
        self.y.open(3.0, timestamp=50.0)

    def come_back(self):
        """As after a restart of the server: who has subscribed is connected anew."""
        for pv in (self.image, self.done, self.table, self.y):
            pv.close(destroy=True)
        self.open(done=False)

    def row(self, number):
        return {"number": number, "y": 1.0 * number, "x": 0.0}

    def measure(self, number):
        self.table.post([self.row(number)])
        self.image.post(array(number))


class Follower:
    """Follows a stream; `said` has what it says."""

    def __init__(self, stream):
        self.said, self.stopped, self.turn = [], threading.Event(), threading.Condition()
        self.idle = 0
        self.thread = threading.Thread(target=self.follow, args=(stream,), daemon=True)
        self.thread.start()

    def follow(self, stream):
        for record in stream.records(self.stopped):
            with self.turn:
                self.said += [] if record is None else [record]
                self.idle += record is None
                self.turn.notify_all()

    def until(self, true):
        with self.turn:
            assert self.turn.wait_for(lambda: true(self.said), 30), self.said

    def looked(self, times):
        """It has looked so often and found nothing."""
        with self.turn:
            until = self.idle + times
            assert self.turn.wait_for(lambda: self.idle >= until, 30)

    def close(self):
        self.stopped.set()
        self.thread.join(30)


def numbers(said):
    return [one.number if isinstance(one, Frame) else one.first for one in said if isinstance(one, Frame | Samples)]


def held(said):
    return sum(one == Unreadable(HELD) for one in said)


def test_what_pvs_held_before_is_left_out_and_counted_also_when_their_server_comes_back():
    served = Served()
    frames = PvaFrames(pv="D:I", server=served.at, done="D:D")
    followers = [
        Follower(frames),
        Follower(PvaTable(pv="D:T", columns=("y", "x"), scale=(1.0, 1.0), server=served.at)),
        Follower(PvaReadings(pvs=("D:Y",), scale=(1.0,), frames=frames, late_s=0.0)),
    ]
    for one in followers:
        one.until(held)
    followers[0].looked(3)  # that it was done before ends nothing
    for number in (1, 2):
        served.measure(number)
    for one in followers:
        one.until(lambda said: numbers(said) == [1, 2])
        assert held(one.said) == 1
    assert followers[2].said[-1].rows.tolist() == [[3.0]]  # it held before, and holds still
    followers[0].looked(3)
    assert Ended(last=True) not in followers[0].said
    served.come_back()
    for one in followers:
        one.until(lambda said: held(said) == 2)
    served.measure(3)
    followers[0].until(lambda said: numbers(said) == [1, 2, 3])
    served.done.close(destroy=True)
    served.done.open(True)  # it became true while it was not there
    followers[0].until(lambda said: said[-1] == Ended(last=True))
    for one in followers:
        one.until(lambda said: numbers(said) == [1, 2, 3])
        one.close()
    assert [one for one in followers[0].said if isinstance(one, Began)] == [Began(None, None)]
    served.server.stop()


def test_a_pv_listens_once_it_is_connected_or_was_waited_for_long_enough(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{free.getsockname()[1]}"
    served = Served()
    monkeypatch.setattr(pva_client, "CONNECT_S", 30.0)
    here, nowhere = Follower(PvaFrames(pv="D:I", server=served.at)), Follower(PvaFrames(pv="D:I", server=nobody))
    here.looked(3)
    assert held(here.said) == 1
    assert nowhere.idle == 0
    monkeypatch.setattr(pva_client, "CONNECT_S", 0.2)
    never = Follower(PvaFrames(pv="D:I", server=nobody))
    never.looked(3)
    for one in (here, nowhere, never):
        one.close()
    served.server.stop()


def test_a_message_says_what_was_held_and_when_it_was_taken():
    decode = NdArrays()
    assert decode(nd_fields(nd_message(array(9), held=True))) == [Unreadable(HELD)]
    message = nd_message(array(1, when=7.5))
    assert message.fields["time"] == 7.5
    assert [type(one) for one in decode(nd_fields(message))] == [Began, Frame]
    assert [type(one) for one in decode({**nd_array(number=2), "time": "x"})] == [Frame]  # of before, or damaged


def begun(arrays):
    """The places among arrays (number, time stamp) where a scan begins."""
    scans = Scans()
    return [place for place, (number, when) in enumerate(arrays) if scans.begun({}, number, when)]


def scan(frames, begins=0.0, period=0.01, first=1):
    return [(number, begins + period * number) for number in range(first, first + frames)]


def test_numbers_that_begin_again_later_begin_a_scan_however_short_the_one_before_was():
    assert begun([*scan(49, 100.0), *scan(69, 100.6)]) == [0, 49]
    assert begun([*scan(49, 100.0), *scan(69, 100.6)[3:]]) == [0, 49], "its first arrays were missed"
    assert begun([*scan(9, 100.0), *scan(9, 100.5), *scan(20, 101.0)]) == [0, 9, 18]
    assert begun([(500, 0.0), (499, 0.0), (0, 0.0), (1, 0.0)]) == [0, 2], "without time stamps"
    assert begun([*[(n, 0.0) for n in range(100)], (30, 0.0)]) == [0, 100], "and with the first ones missed"


def test_arrays_out_of_order_or_twice_begin_no_scan():
    order = scan(400, 100.0)
    for k in range(0, 390, 13):  # by plugins in several threads: the array keeps its time stamp
        order[k : k + 9] = order[k : k + 9][::-1]
    assert begun(order) == [0]
    assert begun([*order, order[7], order[7]]) == [0]
    sent = [(number, 100.0 + 0.01 * place) for place, (number, _) in enumerate(order)]  # stamped when they are sent
    assert begun(sent) == [0]
    assert begun([*scan(60, 100.0), (60, 100.7), (59, 100.75)]) == [0]


def test_frames_beside_what_counts_from_0_are_counted_from_the_scans_first_also_where_that_is_lost():
    decode = streams_at("pva://D:I?first=1", "zmq://pc:5555?y=Y&x=X").frames.decoder()
    ids = [2, 3, *range(4, 9), 1, 2, 9]  # the first of the first scan was lost
    whens = [*(100.0 + 0.01 * number for number in ids[:7]), 101.0, 101.01, 102.0]
    said = [decode(nd_message(array(number, when))) for number, when in zip(ids, whens, strict=True)]
    assert [one.number for records in said for one in records if isinstance(one, Frame)] == [*range(1, 8), 0, 1, 8]
    assert [type(one) for one in said[7]] == [Began, Frame]
    [before] = decoded(decode, nd_message(array(0, 103.0)))
    assert before == Unreadable("the number 0, expected 1 or more, which first=1 says a scan begins with")


def test_a_scan_whose_numbers_go_on_beside_what_counts_from_0_is_said():
    decode = NdArrays(scan="Sample", first=1)
    said = []
    for number in (1, 2, 3, 4):
        message = nd_message(array(number))
        message.fields["attributes"]["Sample"] = "a" if number < 3 else "b"
        said += decode(nd_fields(message))
    assert [type(one) for one in said] == [Began, Frame, Frame, Began, Unreadable, Frame, Frame]
    assert said[4] == Unreadable(GOES_ON)


def test_pva_frames_beside_what_counts_from_0_need_the_number_that_scans_begin_with():
    for positions in ("zmq://pc:5555?y=Y&x=X", "swmr:a.h5?y=/y&x=/x"):
        with pytest.raises(ValueError, match=r"found no first beside .*add first=1"):
            streams_at("pva://D:I", positions)
    with pytest.raises(ValueError, match="found no first beside zmq"):
        streams_at("pva://D:I", "pva://D:I?y=Y&x=X", None, "zmq://pc:5555?value=I0")
    table = streams_at("pva://D:I?first=7", "pva://D:T?y=y&x=x").positions
    columns = {"number": np.array([7, 9]), "y": np.zeros(2), "x": np.zeros(2)}
    from_7 = table.decoder()(Message(fields={"columns": columns}))
    assert numbers(from_7) == [0, 2]


@pytest.mark.parametrize(("no", "yes"), [(False, True), ("No", "Done"), (0, 1)])
def test_done_may_be_a_number_or_a_record_with_named_states(no, yes):
    served = Served()
    kind = {bool: NTScalar("?"), str: NTEnum(), int: NTScalar("i")}[type(no)]
    done = SharedPV(nt=kind, initial={"index": 1, "choices": [no, yes]} if isinstance(no, str) else yes)
    at = {"D:I": served.image, "D:Done": done}
    with Server(providers=[at], conf={**HERE, "EPICS_PVAS_SERVER_PORT": "0"}, useenv=False) as server:
        frames = PvaFrames(pv="D:I", server=f"127.0.0.1:{server.conf()['EPICS_PVAS_SERVER_PORT']}", done="D:Done")
        follower = Follower(frames)
        follower.until(held)
        done.post(0 if isinstance(no, str) else no)  # the scan begins, which ends nothing
        follower.looked(15)
        assert Ended(last=True) not in follower.said
        served.measure(1)
        follower.until(lambda said: numbers(said) == [1])
        done.post(1 if isinstance(no, str) else yes)
        follower.until(lambda said: said[-1] == Ended(last=True))
        follower.close()
    served.server.stop()


def test_arrays_without_numbers_are_said_and_a_repeated_first_one_is_not():
    decode = NdArrays()
    for _ in range(3):
        decode(nd_fields(nd_message(array(0))))
    decode(nd_fields(nd_message(array(1))))
    for _ in range(3):
        decode(nd_fields(nd_message(array(0))))
    with pytest.raises(WrongProtocol, match="found the uniqueId 0 in 4 arrays in a row, expected one that counts"):
        decode(nd_fields(nd_message(array(0))))


@pytest.mark.parametrize("pv", ["D:Y", "D:T", "D:W"])
def test_a_pv_of_another_kind_is_said(pv):
    served = Served()
    pvs = {"D:Y": served.y, "D:T": served.table, "D:W": SharedPV(nt=NTScalar("ad"), initial=np.zeros(10))}
    with Server(providers=[pvs], conf={**HERE, "EPICS_PVAS_SERVER_PORT": "0"}, useenv=False) as server:
        at = f"127.0.0.1:{server.conf()['EPICS_PVAS_SERVER_PORT']}"
        with pytest.raises(WrongProtocol, match=f"{pv}: found epics:nt/NT.*, expected an NTNDArray"):
            list(PvaFrames(pv=pv, server=at).records(threading.Event()))
        readings = PvaReadings(pvs=("D:Y",), scale=(1.0,), frames=PvaFrames(pv=pv, server=at))
        with pytest.raises(WrongProtocol, match=f"{pv}: found .*, expected an NTNDArray"):
            list(readings.records(threading.Event()))
    served.server.stop()
