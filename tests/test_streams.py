"""Decoders of live streams: what real detectors send is read, and whatever else comes is a ValueError."""

from __future__ import annotations

import http.server
import io
import json
import random
import threading

import numpy as np
import pytest

cbor2 = pytest.importorskip("cbor2")
h5py = pytest.importorskip("h5py")

from steering.sources.address_text import parse  # noqa: E402
from steering.sources.addresses import __doc__ as GRAMMAR, frames_at, motion_at, positions_at, streams_at  # noqa: E402
from steering.sources.compression import compress  # noqa: E402
from steering.sources.dectris import DectrisFrames, Stream2  # noqa: E402
from steering.sources.panda import PandaPositions, panda  # noqa: E402
from steering.sources.pva import NdArrays, NoRecords, PvaFrames, PvaTable, table  # noqa: E402
from steering.sources.pva_motion import PvaMotion  # noqa: E402
from steering.sources.simplon import Simplon  # noqa: E402
from steering.sources.streams import Began, Ended, Frame, Message, Samples, WrongProtocol  # noqa: E402
from steering.sources.swmr import SwmrFrames  # noqa: E402

RNG = np.random.default_rng(0)
COUNTS = RNG.poisson(3, (24, 20)).astype(np.uint16)
TAGS = {"|u1": 64, "<u2": 69, "<u4": 70, "<f4": 85}


def start(series="a", **more) -> bytes:
    return cbor2.dumps({"type": "start", "series_id": 1, "series_unique_id": series, **more})


def end(**more) -> bytes:
    return cbor2.dumps({"type": "end", "series_id": 1, "series_unique_id": "a", **more})


def image(counts=COUNTS, number=0, series="a", codec="bslz4", channel="threshold_1", **more) -> bytes:
    payload = counts.tobytes()
    if codec:
        payload = cbor2.CBORTag(56500, [codec, counts.dtype.itemsize, compress(codec, counts)])
    array = cbor2.CBORTag(40, [list(counts.shape), cbor2.CBORTag(TAGS[counts.dtype.str], payload)])
    fields = {"type": "image", "series_id": 1, "series_unique_id": series, "image_id": number, "data": {channel: array}}
    fields |= more
    return cbor2.dumps(cbor2.CBORTag(55799, fields))


def nd_array(counts=COUNTS, codec="", number=7, parameters=6, **attributes) -> dict:
    value = counts.ravel()
    if codec == "jpeg":
        image = pytest.importorskip("PIL.Image")
        file = io.BytesIO()
        image.fromarray(counts.astype(np.uint8)).save(file, "JPEG", quality=100)
        value = np.frombuffer(file.getvalue(), np.uint8)
    elif codec:
        payload = compress("lz4" if codec == "lz4hdf5" else codec, counts)
        # As areaDetector sends them: bslz4 without its 12 bytes, lz4 as one block without the 16 of HDF5's filter.
        value = np.frombuffer(payload[{"bslz4": 12, "lz4": 16}.get(codec, 0) :], np.uint8)
    return {
        "value": value,
        "codec": codec,
        "parameters": parameters,
        "uncompressed": counts.nbytes,
        "unique": number,
        "size": [counts.shape[1], counts.shape[0]],
        "attributes": attributes,
    }


def panda_message(**more) -> bytes:
    data = {"starting_sample_number": 30, "size": 2, "dtype": "float64"}
    datasets = {"/INENC1.VAL.Value": {**data, "data": [1.0, 2.0]}, "/INENC2.VAL.Value": {**data, "data": [5.0, 6.0]}}
    return json.dumps({"message_type": "data", "frame_number": 15, "datasets": datasets, **more}).encode()


MAX_IV = json.dumps({"message_type": "data", "frame_number": 4, "y": [1.0, 2.0], "x": [3, 4], "version": 1}).encode()


def test_real_messages_of_a_detector_are_read(data):
    folder = data / "streams" / "dectris-stream2"
    if not folder.exists():
        pytest.skip(f"no {folder}")
    decoder = Stream2()
    [begun] = decoder((folder / "start.cbor").read_bytes())
    assert begun.name == "series-15614"
    assert begun.header["distance"] == pytest.approx(0.237159)  # its z is negative
    assert begun.header["wavelength"] == pytest.approx(0.918381e-10, rel=1e-5)
    assert begun.header["saturation"] == 21517.0
    assert "bad" not in begun.header  # cut short by those who published it
    [frame] = decoder((folder / "image.cbor").read_bytes())
    assert frame.number == 0
    assert frame.counts.shape == (4362, 4148)
    assert 0.02 < (np.asarray(frame.counts) >= 65534).mean() < 0.2  # gaps between the modules
    assert decoder((folder / "end.cbor").read_bytes()) == [Ended()]


def test_real_messages_of_a_positions_stream_are_read(data):
    file = data / "streams" / "pcap" / "pcap-zmq.cbors"
    if not file.exists():
        pytest.skip(f"no {file}")
    records, reader = [], file.open("rb")
    with reader:
        decoder = cbor2.CBORDecoder(reader)
        for _ in range(102):
            records += panda(decoder.decode()[0], ("energy", "inttime"), (1.0, 1.0))
    assert isinstance(records[0], Began)
    assert isinstance(records[-1], Ended)
    samples = [one for one in records if isinstance(one, Samples)]
    ends = [one.first + len(one.rows) for one in samples]
    assert [one.first for one in samples[1:]] == ends[:-1]  # every sample once, and in order
    assert np.isfinite(np.concatenate([one.rows for one in samples])).all()


def test_stream1_and_the_preview_are_refused_by_name(data):
    with pytest.raises(WrongProtocol, match="stream1"):
        Stream2()(b'{"htype":"dheader-1.0","series":6}')
    with pytest.raises(WrongProtocol, match="preview of stream2 of 2022"):
        Stream2()(cbor2.dumps({"type": "start", "series_number": 1}))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.float32])
@pytest.mark.parametrize("codec", ["bslz4", "lz4", ""])
def test_stream2_images_of_every_dtype_and_codec(dtype, codec):
    decoder = Stream2()
    decoder(start())
    [frame] = decoder(image(COUNTS.astype(dtype), 5, codec=codec))
    np.testing.assert_array_equal(frame.counts, COUNTS.astype(dtype))
    assert frame.counts.dtype == dtype
    assert frame.number == 5


def test_stream2_column_major_arrays_are_turned():
    decoder = Stream2()
    decoder(start())
    stored = np.ascontiguousarray(COUNTS.T)
    array = cbor2.CBORTag(1040, [list(COUNTS.shape), cbor2.CBORTag(69, stored.tobytes())])
    fields = {"type": "image", "series_unique_id": "a", "image_id": 0, "data": {"threshold_1": array}}
    [frame] = decoder(cbor2.dumps(fields))
    np.testing.assert_array_equal(frame.counts, COUNTS)


def test_messages_of_another_series_are_left_out_and_a_new_start_begins_anew():
    decoder = Stream2()
    decoder(start("a", user_data={"scan": "gravel"}))
    with pytest.raises(ValueError, match="another series"):
        decoder(image(series="before"))
    [again] = decoder(start("b"))
    assert isinstance(again, Began)
    with pytest.raises(ValueError, match="another series"):
        decoder(image(series="a"))
    with pytest.raises(ValueError, match=r"channels difference, expected threshold_1"):
        decoder(image(series="b", channel="difference"))
    assert decoder(image(series="b", number=3))[0].number == 3
    # Joined in the middle: the first message says which series it is.
    begun, frame = Stream2()(image(number=9))
    assert (begun.first, frame.number) == (None, 9)


def test_a_series_whose_start_was_missed_begins_with_its_first_message():
    decoder = Stream2()
    decoder(start("a", series_id=5))
    decoder(image(number=0, series_id=5))
    assert decoder(end(series_id=5)) == [Ended()]
    with pytest.raises(ValueError, match="another series"):
        decoder(image(series="before", series_id=4))
    begun, frame = decoder(image(series="b", number=2, series_id=6))
    assert (begun, frame.number) == (Began(None, None), 2)
    assert len(decoder(image(series="b", number=3, series_id=6))) == 1
    # The end of that one was missed as well.
    assert decoder(image(series="c", series_id=7))[0] == Began(None, None)
    with pytest.raises(ValueError, match="another series"):
        decoder(image(series="b", number=4, series_id=6))
    # Without numbers the order is known only once a series has ended.
    decoder = Stream2()
    decoder(start("a", series_id=None))
    with pytest.raises(ValueError, match="another series"):
        decoder(image(series="b", series_id=None))
    decoder(end(series_id=None))
    assert decoder(image(series="b", series_id=None))[0] == Began(None, None)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (65534, 65534.0),
        ({"threshold_1": 12.0, "threshold_2": 9}, 12.0),
        ({"threshold_2": 9}, None),
        (0, None),
        (-1, None),
        (True, None),
        ("many", None),
        ({"threshold_1": None}, None),
    ],
)
def test_the_count_at_which_a_channel_is_saturated_is_in_the_header(said, expected):
    assert Stream2()(start(saturation_value=said))[0].header.get("saturation") == expected


@pytest.mark.parametrize("codec", ["", "bslz4", "lz4", "lz4hdf5", "blosc"])
def test_arrays_of_pv_access_in_every_codec(codec):
    begun, frame = NdArrays()(nd_array(codec=codec))
    assert isinstance(begun, Began)
    np.testing.assert_array_equal(frame.counts, COUNTS)
    assert frame.number == 7
    # One server sends the type in another enumeration: the size decides.
    np.testing.assert_array_equal(NdArrays()(nd_array(codec=codec, parameters=3))[1].counts, COUNTS)


def test_jpeg_arrays_are_read_in_grey():
    smooth = np.add.outer(np.arange(24), np.arange(20)).astype(np.uint16)
    np.testing.assert_allclose(NdArrays()(nd_array(smooth, "jpeg"))[1].counts, smooth, atol=3)


def test_the_first_update_of_an_idle_pv_is_no_frame_and_a_new_scan_is_noticed():
    assert NdArrays()(nd_array() | {"value": None, "size": []}) == []
    decoder = NdArrays({"positions": PvaTable(pv="PV", columns=("Y", "X"), scale=(1e-6, 1e-6))}, "Scan")
    begun, frame = decoder(nd_array(number=100, Scan="a", Y=2.0, X=3.0))
    assert begun == Began("a", None)
    np.testing.assert_allclose(frame.own["positions"], [2e-6, 3e-6])
    assert len(decoder(nd_array(number=101, Scan="a", Y=2.0, X=3.0))) == 1
    assert decoder(nd_array(number=102, Scan="b", Y=2.0, X=3.0))[0].name == "b"
    with pytest.raises(ValueError, match="expected the numbers Y, X"):
        decoder(nd_array(number=103, Scan="b"))
    restarted = NdArrays()
    restarted(nd_array(number=500))
    assert isinstance(restarted(nd_array(number=0))[0], Began)


def test_samples_of_a_panda_and_of_max_iv():
    [samples] = panda(panda_message(), ("INENC2", "INENC1"), (1e-6, -1e-6))
    assert samples.first == 30
    np.testing.assert_allclose(samples.rows, [[5e-6, -1e-6], [6e-6, -2e-6]])
    [samples] = panda(MAX_IV, ("y", "x"), (1.0, 1.0))
    assert (samples.first, samples.rows.tolist()) == (4, [[1.0, 3.0], [2.0, 4.0]])
    assert panda(b'{"message_type": "stop", "emitted_frames": 12}', ("y",), (1.0,)) == [Ended(12)]
    with pytest.raises(ValueError, match=r"2 columns that match 'INENC'"):
        panda(panda_message(), ("INENC", "INENC1"), (1.0, 1.0))


def test_rows_of_a_table():
    fields = {"number": [3, 5], "y": [1.0, 2.0], "x": [3.0, 4.0]}
    records = table(fields, "number", ("y", "x"), (1.0, 1.0))
    assert [(one.first, one.rows.tolist()) for one in records] == [(3, [[1.0, 3.0]]), (5, [[2.0, 4.0]])]
    with pytest.raises(ValueError, match="expected number"):
        table({"y": [1.0]}, "number", ("y",), (1.0,))


def mutated(message: bytes, rng: random.Random) -> bytes:
    """The message with a few bytes changed, cut out or put in."""
    out = bytearray(message)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(out) + 1)
        match rng.randrange(4):
            case 0 if at < len(out):
                out[at] = rng.randrange(256)
            case 1:
                del out[at : at + rng.randint(1, 30)]
            case 2:
                out[at:at] = rng.randbytes(rng.randint(1, 12))
            case _:
                del out[at:]
        out = out or bytearray(b"x")
    return bytes(out)


def nd_mutated(rng: random.Random) -> dict:
    fields = nd_array(codec=rng.choice(["bslz4", "lz4", "blosc", "lz4hdf5", "jpeg", ""]))
    name = rng.choice(list(fields))
    wrong = [None, -1, 2**70, "x", [], [1], [3, 4, 5], [-1, 2], np.zeros(3), np.zeros((2, 2)), 3.5, {"a": 1}]
    if name == "value" and rng.random() < 0.7:
        payload = mutated(np.asarray(fields["value"]).tobytes(), rng)
        fields["value"] = np.frombuffer(payload, np.uint8)
    else:
        fields[name] = rng.choice(wrong)
    return fields


@pytest.mark.parametrize("kind", ["start", "image", "plain", "panda", "max iv", "array"])
def test_whatever_comes_is_read_or_is_a_value_error(kind):
    rng = random.Random(0)
    whole = {
        "start": start(pixel_mask={"threshold_1": 3}, detector_translation=[0, 0, -1.0], user_data={"scan": "a"}),
        "image": image(),
        "plain": image(codec=""),
        "panda": panda_message(),
        "max iv": MAX_IV,
    }
    read = refused = 0
    decoder = Stream2()
    arrays = NdArrays()
    for _ in range(500):
        try:
            if kind == "array":
                records = arrays(nd_mutated(rng))
            elif kind in ("panda", "max iv"):
                columns = ("INENC1", "INENC2") if kind == "panda" else ("y", "x")
                records = panda(mutated(whole[kind], rng), columns, (1.0, 1.0))
            else:
                decoder.series = None if kind == "start" else "a"
                records = decoder(mutated(whole[kind], rng))
            images = [np.asarray(record.counts) for record in records if isinstance(record, Frame)]
        except ValueError:
            refused += 1
        else:
            read += 1
            assert all(image.ndim == 2 and image.nbytes < 2**31 for image in images)
    assert read + refused == 500
    assert refused > 50


class Detector(http.server.BaseHTTPRequestHandler):
    """The part of a detector's REST interface that is asked for; it notes what was put, and pushes a series."""

    def do_PUT(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.put.append((self.path, body))
        if self.path.endswith("/config/no_such"):
            self.send_error(404, "no such parameter")
            return
        self.send_response(200)
        self.end_headers()
        if self.path.endswith("command/arm"):
            self.wfile.write(b'{"sequence id": 12}')
            self.server.socket_out.send(start())
        if self.path.endswith("command/trigger"):
            for message in (image(number=0), image(number=1)):
                self.server.socket_out.send(message)

    def log_message(self, *_):
        pass


def test_a_detector_is_armed_once_the_stream_is_connected_and_disarmed_at_the_end():
    zmq = pytest.importorskip("zmq")
    context = zmq.Context()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Detector) as server:
        server.put, server.socket_out = [], context.socket(zmq.PUSH)
        port = server.socket_out.bind_to_random_port("tcp://127.0.0.1")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        rest = f"127.0.0.1:{server.server_port}"
        stopped, numbers = threading.Event(), []
        frames = DectrisFrames(address=f"tcp://127.0.0.1:{port}", rest=rest, trigger=True)
        for record in frames.records(stopped):
            if isinstance(record, Frame):
                numbers.append(record.number)
                if len(numbers) == 2:
                    stopped.set()
        Simplon(host=rest).configure(ntrigger=5)
        with pytest.raises(OSError, match="found the answer 404"):
            Simplon(host=rest).configure(no_such=1)
        server.shutdown()
    context.destroy(linger=0)
    assert numbers == [0, 1]
    assert [path.rpartition("/")[2] for path, _ in server.put] == ["arm", "trigger", "disarm", "ntrigger", "no_such"]
    assert json.loads(server.put[3][1]) == {"value": 5}
    assert frames_at(f"dectris://det?rest={rest}&trigger=yes").trigger
    with pytest.raises(ValueError, match="yes with rest=HOST only"):
        frames_at("dectris://det?trigger=yes")
    with pytest.raises(OSError, match="found no answer from the detector"):
        Simplon(host=rest, timeout_s=1.0).arm()


OPTIONS = ["unit=px", "unit=um", "flip=y", "unit=mm&flip=x", "unit=nm&flip=yx"]


def test_positions_are_read_where_they_were_steered_to_in_every_unit_and_flipped():
    zmq = pytest.importorskip("zmq")
    where, asked = np.array([[1e-6, -2e-6], [0.0, 3e-6]]), []
    with zmq.Context() as context:
        server = context.socket(zmq.REP)
        port = server.bind_to_random_port("tcp://127.0.0.1")

        def answer() -> None:
            for _ in OPTIONS:
                asked.append(json.loads(server.recv()))
                server.send(b'{"queued": 2}')

        answering = threading.Thread(target=answer, daemon=True)
        answering.start()
        for options in OPTIONS:
            motion = motion_at(f"zmq://127.0.0.1:{port}?{options}").connected(threading.Event())
            motion.measure(where, None, False)
            motion.close()
        answering.join(30)
        server.close(0)
    for options, request in zip(OPTIONS, asked, strict=True):
        _, positions = positions_at(f"zmq://pc:5555?y=y&x=x&{options}")
        sent = json.dumps({"message_type": "data", "frame_number": 0, "y": request["y"], "x": request["x"]})
        [samples] = positions.decoder()(Message((sent.encode(),)))
        np.testing.assert_allclose(samples.rows, where, atol=1e-20)
        motors = "pva://M:Y,M:X?" + options
        assert motion_at(motors).scale == positions_at(motors)[1].scale == positions.scale


def test_the_grammar_of_addresses_fits_a_terminal():
    """It is the end of `live_scan.py --help`."""
    assert [line for line in GRAMMAR.splitlines() if len(line) > 80] == []


def test_addresses_are_read_once_and_refused_in_a_sentence():
    streams = streams_at(
        "dectris://det?channel=threshold_2", "zmq://pc:5555?y=A&x=-B&unit=um&samples=10&gap=0", "zmq://pc:5556"
    )
    assert streams.frames == DectrisFrames(address="tcp://det:31001", channel="threshold_2")
    assert isinstance(streams.positions, PandaPositions)
    assert streams.positions.columns == ("A", "-B")
    assert (streams.positions_are.samples, streams.positions_are.gap) == (10, 0)
    streams = streams_at("pva://DET:image", "pva://DET:image?y=Y&x=X&unit=um&flip=y", "pva://M:Y,M:X?trigger=T")
    assert isinstance(streams.frames, PvaFrames)
    assert streams.frames.attributes["positions"].columns == ("Y", "X")
    assert streams.frames.attributes["positions"].scale == (-1e-6, 1e-6)
    assert isinstance(streams.positions, NoRecords)
    assert isinstance(streams.motion, PvaMotion)
    streams = streams_at(
        "dectris://det",
        "zmq://pc:5555?y=A&x=B&socket=sub",
        None,
        "zmq://pc:5555?value=I0&socket=sub&gap=0&when_slow=block",
    )
    [(what, monitor)] = streams.monitors
    assert (what.name, what.width, what.gap, what.when_slow) == ("monitor", 1, 0, "block")
    assert streams.positions_are.when_slow == "drop oldest"
    assert monitor == PandaPositions(address="tcp://pc:5555", columns=("I0",), scale=(1.0,), socket="sub")
    assert list(streams_at("pva://A", "pva://T?y=Y&x=X", None, "pva://A?value=I").frames.attributes) == ["monitor"]
    streams = streams_at("bluesky:a?data=d", "bluesky:a?y=y&x=x", None, "bluesky:a?value=i")
    assert streams.frames.beside == ("y", "x")
    assert [one.beside for one in (streams.positions, streams.monitors[0][1])] == [("d", "y", "x"), ()]
    streams = streams_at("swmr:/data/a+b.h5", "swmr:/data/p.h5?y=/e/y&x=/e/x")
    assert isinstance(streams.frames, SwmrFrames)
    assert streams.frames.where.file == "/data/a+b.h5"
    for wrong, words in {
        "det:31001": "found the protocol 'det'",
        "dectris": "expected one like",
        "dectris://det?chanel=x": "found the option chanel",
        "tango://x": "found the protocol 'tango'",
        "dectris://det:x": "expected HOST:PORT",
    }.items():
        with pytest.raises(ValueError, match=words):
            streams_at(wrong, "zmq://pc:5555?y=A&x=B")
    with pytest.raises(ValueError, match="found no x"):
        streams_at("dectris://det", "zmq://pc:5555?y=A")
    with pytest.raises(ValueError, match="expected two"):
        streams_at("dectris://det", "zmq://pc:5555?y=A&x=B", "pva://M:Y")
    with pytest.raises(ValueError, match="found the option trigger, expected one of unit, flip"):
        streams_at("dectris://det", "zmq://pc:5555?y=A&x=B", "zmq://pc:5556?trigger=T")
    with pytest.raises(ValueError, match="positions: found when_slow='thin', expected block or drop oldest"):
        streams_at("dectris://det", "zmq://pc:5555?y=A&x=B&when_slow=thin")
    assert parse("pva://A,B?unit=um").place == "A,B"


@pytest.mark.parametrize(
    ("positions", "steered", "gap"),
    [
        ("zmq://pc:1?y=y&x=x", False, 3),
        ("zmq://pc:1?y=y&x=x", True, 0),
        ("zmq://pc:1?y=y&x=x&gap=2", True, 2),
        ("swmr:a.h5?y=/y&x=/x", True, 0),
        ("bluesky:a.jsonl?y=y&x=x", False, 0),
        ("pva://Y,X", False, 0),
        ("pva://T?y=y&x=x", False, 3),
    ],
)
def test_positions_are_interpolated_only_where_a_path_leads_through_them(positions, steered, gap):
    """A decision may be anywhere, and so may the points of a plan."""
    frames = "pva://D?first=1" if positions.startswith("pva") else "dectris://d"
    streams = streams_at(frames, positions, "zmq://pc:2" if steered else None, "zmq://pc:3?value=i")
    assert streams.positions_are.gap == gap
    assert streams.monitors[0][0].gap == 3
