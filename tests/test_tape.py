"""What is recorded is played again, record for record; a torn or damaged recording is told from a whole one."""

from __future__ import annotations

import io
import itertools
import json
import random
import struct
import threading
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

from steering.cli import main
from steering.sources.address_text import unit_of
from steering.sources.addresses import frames_at, named_at, positions_at, streams_at
from steering.sources.compression import compress
from steering.sources.panda import panda
from steering.sources.pva import nd_message
from steering.sources.streams import (
    ARMED,
    Began,
    Ended,
    Frame,
    Message,
    Samples,
    Unreadable,
    WrongProtocol,
    records_of,
)
from steering.sources.tape import Address, Played, read, record
from tests.test_documents import DOCUMENTS
from tests.test_streams import COUNTS, image, mutated, panda_message, start

WHERE = {"frames": "dectris://127.0.0.1:{}", "positions": "zmq://127.0.0.1:{}?y=INENC2&x=INENC1&unit=um&samples=2"}
SENT = {
    "frames": [
        [start(user_data={"scan": "gravel"})],
        [image(), b"another part"],
        [b"torn"],
        [image(number=2, channel="threshold_2")],
        [image(number=3, codec="")],
        [b'{"htype": "dheader-1.0"}'],
    ],
    "positions": [[b'{"message_type": "start"}'], [panda_message()], [b'{"message_type": "stop", "last": true}']],
}

RNG = np.random.default_rng(0)
FRAMES = [
    Began("gravel", 0, {"distance": 2.0, "centre": (3.0, 4.0), "bad": np.eye(8, dtype=bool)}),
    Frame(0, RNG.poisson(3, (8, 8)).astype(np.uint16), 5.0),
    Unreadable("a torn message"),
    Frame(2, RNG.poisson(3, (8, 8)).astype(">u4"), 5.0, {"positions": np.array([1.0, 2.0])}),
    Ended(3),
]
POSITIONS = [Began(None), Samples(0, np.arange(6.0).reshape(3, 2)), Ended(3, last=True)]


@dataclass
class Given:
    """A stream of what it is given; the last of them to end stops the recording."""

    given: list
    left: list

    def records(self, stopped):
        for one in self.given:
            yield one
            yield None
        self.left.pop()
        if not self.left:
            stopped.set()


def messages_recorded(path) -> dict[str, str]:
    """A recording of what is sent over two sockets; the addresses of these."""
    zmq = pytest.importorskip("zmq")
    with zmq.Context() as context:
        sockets = {name: context.socket(zmq.PUSH) for name in SENT}
        ports = {name: socket.bind_to_random_port("tcp://127.0.0.1") for name, socket in sockets.items()}
        addresses = {name: where.format(ports[name]) for name, where in WHERE.items()}

        def send() -> None:
            for name, messages in SENT.items():
                for parts in messages:
                    sockets[name].send_multipart(parts)

        sending = threading.Thread(target=send)
        sending.start()
        command = ["record", addresses["frames"], "--positions", addresses["positions"], "--out", str(path)]
        assert main([*command, "--seconds", "1.5"]) == 0
        sending.join()
        for socket in sockets.values():
            socket.close(0)
    return addresses


def played(stream) -> list:
    """What a stream says without waiting, or until it raises."""
    found, stopped = [], threading.Event()
    for one in stream.records(stopped):
        if one is None:
            stopped.set()
        else:
            found.append(one)
    return found


@dataclass
class Messages:
    """A stream whose messages are given; the last of them stops the recording."""

    stream: object
    given: list
    stopped: threading.Event

    def records(self, stopped):
        return records_of(self, stopped)

    def messages(self, stopped):
        yield from self.given
        self.stopped.set()

    def decoder(self):
        return self.stream.decoder()


def recorded(path):
    left = [1, 2]
    return record({"frames": Given(FRAMES, left), "positions": Given(POSITIONS, left)}, path, threading.Event())


def same(one, other) -> bool:
    if type(one) is not type(other):
        return False
    match one:
        case Frame():
            own = one.own.keys() == other.own.keys() and all((row == other.own[k]).all() for k, row in one.own.items())
            return one.number == other.number and own and np.array_equal(one.counts, other.counts)
        case Samples():
            return one.first == other.first and np.array_equal(one.rows, other.rows)
        case Began():
            keys = one.header.keys() == other.header.keys()
            return (
                one[:2] == other[:2] and keys and all(np.array_equal(v, other.header[k]) for k, v in one.header.items())
            )
    return one == other


def test_what_is_recorded_is_played_again(tmp_path):
    assert recorded(tmp_path / "a.tape") == {"frames": len(FRAMES), "positions": len(POSITIONS)}
    for name, given in (("frames", FRAMES), ("positions", POSITIONS)):
        played, stopped = [], threading.Event()
        for one in Played(file=str(tmp_path / "a.tape"), stream=name, speed=0).records(stopped):
            if one is None:
                stopped.set()
            else:
                played.append(one)
        assert played[-1] == Ended(last=True)
        assert len(played) == len(given) + 1
        assert all(same(one, other) for one, other in zip(given, played, strict=False))
    with pytest.raises(FileExistsError):
        recorded(tmp_path / "a.tape")


def test_messages_are_kept_as_they_came_and_decoded_when_they_are_played(tmp_path, capsys):
    """A message that cannot be decoded, or by another setting only, is there to be looked at again."""
    tape = tmp_path / "a.tape"
    addresses = messages_recorded(tape)
    assert "6 records of frames, 3 records of positions" in capsys.readouterr().out
    with tape.open("rb") as file:
        blocks = [(stream, one) for _, stream, one in read(file)]
    assert blocks[:2] == [(name, Address(text)) for name, text in addresses.items()]
    for name, messages in SENT.items():
        came = [one for stream, one in blocks if stream == name][1:]
        assert came == [Message(tuple(parts), {}) for parts in messages]
    what, positions = positions_at(f"play:{tape}?speed=0&gap=1")
    assert (what.samples, what.gap) == (2, 1)  # as it was recorded
    assert unit_of(f"play:{tape}") == "um"
    [began, samples, *ended] = played(positions)
    assert (began, ended) == (Began(None, 0, {ARMED: True}), [Ended(None, last=True), Ended(last=True)])
    np.testing.assert_allclose(samples.rows, panda(panda_message(), ("INENC2", "INENC1"), (1e-6, 1e-6))[0].rows)
    stopped = threading.Event()
    frames = frames_at(f"play:{tape}?speed=0").records(stopped)
    first = [next(frames) for _ in range(5)]
    assert [type(one).__name__ for one in first] == ["Began", "Frame", "Unreadable", "Unreadable", "Frame"]
    assert [first[k].number for k in (1, 4)] == [0, 3]
    np.testing.assert_array_equal(first[1].counts, COUNTS)
    assert "expected threshold_1" in first[3].reason
    with pytest.raises(WrongProtocol, match="stream1"):
        next(frames)
    step = tmp_path / "steps"
    step.write_text("1\n")
    stepped = frames_at(f"play:{tape}?step={step}").records(stopped)
    assert [type(one).__name__ for one in itertools.takewhile(lambda one: one is not None, stepped)] == [
        "Began",
        "Frame",
        "Unreadable",
        "Unreadable",
    ]


def test_arrays_of_pv_access_are_kept_as_they_came(tmp_path):
    p4p = pytest.importorskip("p4p")
    from p4p.nt import NTNDArray

    arrays = [p4p.Value(NTNDArray.buildType())]
    for number, codec in ((1, ""), (2, "bslz4"), (3, "zstd")):
        array = NTNDArray().wrap(COUNTS, timestamp=1.0)
        array["uniqueId"] = number
        array["attribute"] = [
            {"name": name, "value": value, "descriptor": ""}
            for name, value in (("Y", 1.5), ("X", 2.5), ("I0", 0.5), ("Sample", "s"))
        ]
        if codec:
            payload = np.frombuffer(compress("bslz4", COUNTS)[12:], np.uint8)
            array["value"] = ("ubyteValue", payload)
            array["codec.name"], array["codec.parameters"] = codec, 6
            array["compressedSize"], array["uncompressedSize"] = len(payload), COUNTS.nbytes
        arrays.append(array)
    messages = [nd_message(array) for array in arrays] + [Message(fields={"done": True})]
    addresses = {"frames": "pva://DET:image?scan=Sample", "positions": "pva://DET:image?y=Y&x=X&unit=um"}
    addresses["monitor"] = "pva://DET:image?value=I0"
    live = named_at(addresses)["frames"]
    stopped = threading.Event()
    kept = Messages(live, messages, stopped)
    assert record({"frames": kept}, tmp_path / "a.tape", stopped, addresses) == {"frames": 5}
    with (tmp_path / "a.tape").open("rb") as file:
        came = [one for _, _, one in read(file)][3:]
    assert [[bytes(part) for part in one.parts] for one in came] == [
        [bytes(part) for part in m.parts] for m in messages
    ]
    assert [one.fields for one in came] == [dict(message.fields) for message in messages]
    again = played(frames_at(f"play:{tmp_path / 'a.tape'}?speed=0"))
    assert again[0] == Began("s", None)
    for number, one in zip((1, 2), again[1:3], strict=True):
        assert one.number == number
        np.testing.assert_array_equal(one.counts, COUNTS)
        np.testing.assert_allclose(one.own["positions"], (1.5e-6, 2.5e-6))
        np.testing.assert_allclose(one.own["monitor"], (0.5,))
    assert isinstance(again[3], Unreadable)
    assert "zstd" in again[3].reason
    assert again[4:] == [Ended(last=True), Ended(last=True)]


def test_documents_of_bluesky_are_kept_with_the_rows_that_they_name(tmp_path):
    """What is played needs the files no more, and a document that cannot be read is there as it came."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "frames.h5", "w", libver="latest") as file:
        file["d"] = np.arange(48, dtype=np.uint16).reshape(3, 4, 4)
    documents = json.loads(json.dumps(DOCUMENTS))
    documents[2][1]["uri"] = f"file://localhost{tmp_path / 'frames.h5'}"
    begun, stop = documents[:3], documents[5]
    for k in range(3):
        ranges = {"indices": {"start": k, "stop": k + 1}, "seq_nums": {"start": k + 1, "stop": k + 2}}
        begun += [["stream_datum", {**documents[3][1], **ranges}], ["event", {**documents[4][1], "seq_num": k + 1}]]
    lines = [json.dumps(one) for one in [*begun, stop]]
    lines.insert(5, "torn")
    (tmp_path / "a.jsonl").write_text("".join(line + "\n" for line in lines))
    where = f"bluesky:{tmp_path / 'a.jsonl'}"
    streams = streams_at(where, f"{where}?y=y&x=x&unit=mm").named()
    live = {name: list(stream.records(threading.Event())) for name, stream in streams.items()}
    assert [type(one).__name__ for one in live["frames"]].count("Frame") == 3
    tape = tmp_path / "a.tape"
    assert main(["record", where, "--positions", f"{where}?y=y&x=x&unit=mm", "--out", str(tape)]) == 0
    with tape.open("rb") as file:
        for name in live:
            file.seek(0)
            *came, over = [one for _, stream, one in read(file) if stream == name and isinstance(one, Message)]
            assert [one.parts[0].decode().strip() for one in came] == lines
            assert over == Message((), {"over": True})
    for name in ("frames.h5", "a.jsonl"):
        (tmp_path / name).unlink()
    again = {"frames": frames_at(f"play:{tape}?speed=0"), "positions": positions_at(f"play:{tape}?speed=0")[1]}
    for name, stream in again.items():
        found = played(stream)
        assert found[-1] == Ended(last=True)
        assert len(found) == len(live[name]) + 1
        assert all(same(one, other) for one, other in zip(live[name], found, strict=False))


def test_messages_without_the_address_of_their_stream_are_refused(tmp_path):
    stopped = threading.Event()
    kept = Messages(frames_at("dectris://det"), [Message((start(),))], stopped)
    record({"frames": kept}, tmp_path / "a.tape", stopped, {"frames": "swmr:a.h5"})
    with pytest.raises(ValueError, match=r"found messages of frames in a recording of .*swmr:a.h5"):
        played(frames_at(f"play:{tmp_path / 'a.tape'}?speed=0"))


def test_a_recording_is_played_step_by_step(tmp_path):
    """A line more, and one more frame comes, with all that came before it; positions keep step with the frames."""
    recorded(tmp_path / "a.tape")
    with (tmp_path / "a.tape").open("rb") as file:
        order = [(stream, type(one).__name__) for _, stream, one in read(file)]
    step, stopped, played = tmp_path / "steps", threading.Event(), {"frames": [], "positions": []}
    streams = {
        name: Played(file=str(tmp_path / "a.tape"), stream=name, step=str(step)).records(stopped) for name in played
    }

    def come() -> None:
        for name, stream in streams.items():
            while (one := next(stream)) is not None:
                played[name].append(type(one).__name__)

    places = [k for k, one in enumerate(order) if one == ("frames", "Frame")]
    for wanted, written in ((0, ""), (1, "\n"), (1, "0\n"), (2, "1\n"), (2, "")):
        with step.open("a") as file:
            file.write(written)
        come()
        there = (
            order[: places[wanted]] if wanted < len(places) else [*order, ("frames", "Ended"), ("positions", "Ended")]
        )
        assert played == {name: [kind for stream, kind in there if stream == name] for name in played}, wanted
    step.write_text("two\n")
    with pytest.raises(ValueError, match="found the line 'two', expected how many more frames"):
        next(Played(file=str(tmp_path / "a.tape"), stream="frames", step=str(step)).records(stopped))
    with pytest.raises(ValueError, match="found speed and step"):
        frames_at(f"play:{tmp_path / 'a.tape'}?speed=2&step={step}")


def test_the_command_line_records_what_an_address_gives(tmp_path, capsys):
    recorded(tmp_path / "a.tape")
    tape = f"play:{tmp_path / 'a.tape'}?speed=0"
    again = tmp_path / "b.tape"
    assert main(["record", tape, "--positions", tape, "--out", str(again), "--seconds", "0.5"]) == 0
    assert f"{len(FRAMES) + 1} records of frames, {len(POSITIONS) + 1} records of positions" in capsys.readouterr().out
    with again.open("rb") as file:
        kinds = [(stream, type(one).__name__) for _, stream, one in read(file)]
    assert sorted(kinds) == sorted(
        [("frames", type(one).__name__) for one in [Address(tape), *FRAMES, Ended()]]
        + [("positions", type(one).__name__) for one in [Address(tape), *POSITIONS, Ended()]]
    )
    assert main(["inspect", tape, "--positions", tape, "--monitor", tape, "--listen", "0.3"]) == 0
    frames, positions, monitor = capsys.readouterr().out.splitlines()
    assert frames.startswith("frames: ")
    assert " at first" in positions
    assert monitor == "monitor: nothing came"
    assert main(["record", tape, "--out", str(again), "--seconds", "0.1"]) == 1
    assert "b.tape: found a file, expected a new name: a recording replaces nothing" in capsys.readouterr().err
    assert main(["record", tape, "--out", str(tmp_path / "none" / "c.tape"), "--seconds", "0.1"]) == 1
    assert f"c.tape: found no folder {tmp_path / 'none'}, expected it: make it first" in capsys.readouterr().err


def test_a_recording_of_nothing_leaves_no_file_and_says_so(tmp_path, capsys):
    nothing = tmp_path / "nothing.tape"
    assert main(["record", f"swmr:{tmp_path / 'no.h5'}", "--out", str(nothing), "--seconds", "0.3"]) == 1
    assert "found frames silent, expected them to send: nothing was recorded" in capsys.readouterr().err
    assert not nothing.exists()

    def broken(stopped):
        raise OSError("found the cable pulled out, expected it plugged in")

    with pytest.raises(OSError, match="cable"):
        record({"frames": SimpleNamespace(records=broken)}, nothing, threading.Event())
    assert not nothing.exists()


def test_a_file_that_is_followed_and_is_not_there_is_named(tmp_path, capsys):
    missing = tmp_path / "no.h5"
    assert main(["inspect", f"swmr:{missing}", "--listen", "0.2"]) == 0
    assert f"frames: nothing came: found no file {missing}, expected one that is being" in capsys.readouterr().out
    assert main(["record", "tango://x", "--out", str(tmp_path / "c.tape")]) == 1
    assert "found the protocol 'tango'" in capsys.readouterr().err


def test_a_torn_recording_is_played_up_to_its_last_whole_record(tmp_path):
    recorded(tmp_path / "a.tape")
    whole = (tmp_path / "a.tape").read_bytes()
    every = len(list(read(io.BytesIO(whole))))
    counts = [len(list(read(io.BytesIO(whole[:end])))) for end in range(20, len(whole))]
    assert counts == sorted(counts)
    assert counts[-1] == every - 1


@pytest.mark.parametrize("kind", ["records", "messages"])
def test_whatever_is_read_is_a_recording_or_a_value_error(tmp_path, kind):
    tape, stopped = tmp_path / "a.tape", threading.Event()
    if kind == "records":
        recorded(tape)
    else:
        said = {"size": [20, 24], "attributes": {"Y": 1.5, "mask": np.arange(3)}, "unique": 1, "dtype": "<u2"}
        kept = Messages(frames_at("pva://DET"), [Message((COUNTS.tobytes(),), said)] * 3, stopped)
        record({"frames": kept}, tape, stopped, {"frames": "pva://DET"})
    whole, rng, refused = tape.read_bytes(), random.Random(0), 0
    for _ in range(500):
        torn = mutated(whole, rng)
        try:
            list(read(io.BytesIO(torn)))
            if kind == "messages":
                tape.write_bytes(torn)
                played(frames_at(f"play:{tape}?speed=0"))
        except ValueError:
            refused += 1
    assert refused > 50


def test_positions_of_frames_in_an_older_recording_are_read():
    header = {"at": 0.0, "stream": "frames", "kind": "Frame", "number": 7, "dtype": "<u2", "shape": [8, 8]}
    for written, own in ((None, {}), ([1.0, 2.0], {"positions": [1.0, 2.0]})):
        text, counts = json.dumps({**header, "own": written}).encode(), np.ones((8, 8), "<u2").tobytes()
        file = io.BytesIO(b"steering streams 1\n" + struct.pack(">IQ", len(text), len(counts)) + text + counts)
        [(_, _, frame)] = read(file)
        assert {name: row.tolist() for name, row in frame.own.items()} == own
