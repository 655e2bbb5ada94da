"""Dectris stream2: CBOR messages over ZMQ, one of a series' start, its images and its end each.

Images are numbered by `image_id`, never by a count of our own. A message of a series before the one that began is left
out and counted; one of a series after it begins that, where its start was missed. stream1 and the preview of stream2 of
2022 are refused by name. Needs the extra `dectris`.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from steering.files.units import ENERGY_TO_WAVELENGTH
from steering.sources.compression import LARGEST, Decompressor
from steering.sources.exposure import in_thread
from steering.sources.simplon import Simplon
from steering.sources.streams import Began, Decoder, Ended, Frame, Message, Packed, Record, WrongProtocol, records_of
from steering.sources.zmq_socket import received

_DTYPES = {64: "|u1", 69: "<u2", 70: "<u4", 71: "<u8", 72: "|i1", 77: "<i2", 78: "<i4", 65: ">u2", 66: ">u4", 85: "<f4"}
"""CBOR tags of typed arrays (RFC 8746)."""
_ROWS, _COLUMNS, _COMPRESSED = 40, 1040, 56500


@dataclass(frozen=True, kw_only=True)
class DectrisFrames:
    """Frames of a detector's stream2."""

    address: str
    """tcp://HOST:31001, which the detector pushes to; another client there takes half of the images."""
    channel: str = "threshold_1"
    high_water: int = 20_000
    """Messages that wait here before the detector has to."""
    rest: str = ""
    """HOST[:PORT] of the detector's REST interface: it is armed once this stream is connected, and disarmed at the end;
    empty: somebody else does that."""
    trigger: bool = False
    """It is triggered too, once it is armed: in its trigger modes `ints` and `inte`."""

    def records(self, stopped: threading.Event) -> Iterator[Record | None]:
        """The series' records, as they come."""
        return records_of(self, stopped)

    def decoder(self) -> Decoder:
        """See MessageStream."""
        decode = Stream2(self.channel)
        return lambda message: decode(message.parts[0])

    def messages(self, stopped: threading.Event) -> Iterator[Message | None]:
        """The series' messages; the detector is armed and triggered meanwhile, where that is asked for."""
        detector, armed = Simplon(host=self.rest), False
        exposing: Future[None] | None = None
        try:
            for message in received(self.address, "pull", self.high_water, stopped):
                # Armed once it is connected: the start message would be missed before.
                if message is None and self.rest and not armed:
                    detector.arm()
                    armed = True
                    exposing = in_thread(detector.trigger) if self.trigger else None
                if message is None and exposing is not None and exposing.done():
                    exposing.result()  # raises what kept it from being triggered
                yield message
        finally:
            if armed:
                detector.disarm()


class Stream2:
    """Decodes messages of stream2; it remembers which series began."""

    def __init__(self, channel: str = "threshold_1") -> None:
        self.channel = channel
        self.series: object = None
        """The unique id of the series that began, or of the first message where its start was missed."""
        self._number: int | None = None
        """Its series_id, which the detector counts up."""
        self._ended = False
        self._decompress = Decompressor()

    def __call__(self, message: bytes) -> list[Record]:
        """The records of one message. Raises ValueError, and nothing else, for what is no such message."""
        fields = _loads(message)
        kind = fields.get("type")
        if kind == "start":
            return self._start(fields)
        if kind not in ("image", "end"):
            raise _refusal(fields)
        series = _series(fields)
        began: list[Record] = []
        if self.series is None or (series != self.series and self._is_later(fields)):
            self._take(fields)
            began.append(Began(None, None))  # its start was missed: what that said is not known
        if series != self.series:
            raise ValueError("a message of another series than the one that began: left over from an aborted one")
        if kind == "end":
            self._ended = True
            return [*began, Ended()]
        if self._ended:
            raise ValueError("an image after the end of its series")
        return [*began, self._image(fields)]

    def _take(self, fields: Mapping[str, Any]) -> None:
        """The series of a message is the one that is followed."""
        self.series, self._number, self._ended = _series(fields), _series_number(fields), False

    def _is_later(self, fields: Mapping[str, Any]) -> bool:
        """A message of another series is of one that began later, and not left over; unique ids are no order."""
        number = _series_number(fields)
        return self._ended if number is None or self._number is None else number > self._number

    def _start(self, fields: Mapping[str, Any]) -> list[Record]:
        if "series_id" not in fields and "series_unique_id" not in fields:
            raise _refusal(fields)
        self._take(fields)
        own = fields.get("user_data")
        name = own.get("scan") if isinstance(own, Mapping) else None
        return [Began(str(name if name is not None else f"series-{fields.get('series_id')}"), 0, self._header(fields))]

    def _header(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """What the start says, in SI units; everything in it is optional."""
        found: dict[str, Any] = {"series": _series(fields)}
        for name, key in (("pixel_y", "pixel_size_y"), ("pixel_x", "pixel_size_x"), ("frame_time", "frame_time")):
            if _is_number(fields.get(key)):
                found[name] = float(fields[key])
        if _is_number(fields.get("incident_wavelength")):
            found["wavelength"] = float(fields["incident_wavelength"]) * 1e-10
        elif _is_number(fields.get("incident_energy")) and fields["incident_energy"] > 0:
            found["wavelength"] = ENERGY_TO_WAVELENGTH / float(fields["incident_energy"])
        translation = fields.get("detector_translation")
        if isinstance(translation, list | tuple) and len(translation) == 3 and _is_number(translation[2]):
            found["distance"] = abs(float(translation[2]))
        y, x = fields.get("beam_center_y"), fields.get("beam_center_x")
        if _is_number(y) and _is_number(x) and y > 0 and x > 0:
            found["centre"] = float(y), float(x)
        if _is_number(fields.get("number_of_images")):
            found["frames"] = int(fields["number_of_images"])
        return found | self._limits(fields)

    def _limits(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """What the start says of the channel's counts: from where on they are saturated, and which pixels are bad."""
        found: dict[str, Any] = {}
        saturation, mask = fields.get("saturation_value"), fields.get("pixel_mask")
        if isinstance(saturation, Mapping):
            saturation = saturation.get(self.channel)
        if _is_number(saturation) and saturation > 0:
            found["saturation"] = float(saturation)
        if isinstance(mask, Mapping) and self.channel in mask:
            with contextlib.suppress(ValueError):  # some have it cut short; the flags of the counts are left
                found["bad"] = np.asarray(self._array(mask[self.channel])) != 0
        return found

    def _image(self, fields: Mapping[str, Any]) -> Frame:
        number, data = fields.get("image_id"), fields.get("data")
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 2**40:
            raise ValueError(f"an image with image_id {number!r}, expected a number of 0 or more")
        if not isinstance(data, Mapping) or self.channel not in data:
            channels = ", ".join(map(str, data)) if isinstance(data, Mapping) else "none"
            raise ValueError(f"an image with the channels {channels}, expected {self.channel}: give ?channel=NAME")
        return Frame(number, self._array(data[self.channel]), time.time())

    def _array(self, tagged: Any) -> NDArray | Packed:
        """(y, x) from a multi-dimensional array of CBOR."""
        tag, value = _tagged(tagged)
        if tag not in (_ROWS, _COLUMNS) or not isinstance(value, list | tuple) or len(value) != 2:
            raise ValueError(f"an image under the CBOR tag {tag}, expected an array (40 or 1040)")
        shape = tuple(value[0]) if isinstance(value[0], list | tuple) else ()
        if len(shape) != 2 or not all(isinstance(n, int) and 0 < n < 2**16 for n in shape):
            raise ValueError(f"an image of shape {shape}, expected (y, x)")
        kind, payload = _tagged(value[1])
        if kind not in _DTYPES:
            raise ValueError(f"an image of the CBOR type {kind}, expected one of {sorted(_DTYPES)}")
        dtype = np.dtype(_DTYPES[kind])
        stored = shape if tag == _ROWS else shape[::-1]
        if isinstance(payload, bytes):
            if len(payload) != shape[0] * shape[1] * dtype.itemsize or len(payload) > LARGEST:
                raise ValueError(f"an image of {len(payload)} bytes, expected {shape} {dtype}")
            array = np.frombuffer(payload, dtype).reshape(stored)
            return array if tag == _ROWS else array.T
        packed = self._compressed(payload, stored, dtype)
        return packed if tag == _ROWS else Packed(shape, dtype, lambda: np.asarray(packed).T)

    def _compressed(self, tagged: Any, shape: tuple[int, int], dtype: np.dtype) -> Packed:
        tag, value = _tagged(tagged)
        if tag != _COMPRESSED or not isinstance(value, list | tuple) or len(value) != 3:
            raise ValueError(f"a payload under the CBOR tag {tag}, expected compressed bytes (56500)")
        algorithm, size, payload = value
        if size != dtype.itemsize or not isinstance(payload, bytes):
            raise ValueError(f"compressed elements of {size!r} bytes, expected {dtype.itemsize}")
        return self._decompress.later(str(algorithm), payload, shape, dtype)


def _loads(message: bytes) -> Mapping[str, Any]:
    cbor2 = cbor()
    if message[:1] == b"{":
        raise _refusal(_json(message))
    try:
        fields = cbor2.loads(message)
        while isinstance(fields, cbor2.CBORTag) and fields.tag == 55799:
            fields = fields.value
    except Exception as error:  # whatever the decoder meets in bytes from outside
        raise ValueError(f"a message of {len(message)} bytes that is no CBOR: {type(error).__name__}") from error
    if not isinstance(fields, Mapping):
        raise ValueError(f"a CBOR {type(fields).__name__}, expected a map with type, series_id and the rest")
    return fields


def _refusal(fields: Mapping[str, Any]) -> ValueError:
    if "htype" in fields:
        return WrongProtocol(
            f"found Dectris stream1 ({fields['htype']}), expected stream2: set the detector's stream config `format` "
            "to cbor"
        )
    if "series_number" in fields or "image_number" in fields:
        return WrongProtocol(
            "found the preview of stream2 of 2022 (series_number), expected stream2: update the detector's firmware"
        )
    return ValueError(f"a message of type {str(fields.get('type'))[:40]!r}, expected start, image or end")


def _json(message: bytes) -> Mapping[str, Any]:
    try:
        fields = json.loads(message)
    except ValueError:
        return {}
    return fields if isinstance(fields, Mapping) else {}


def _tagged(value: Any) -> tuple[int | None, Any]:
    return (value.tag, value.value) if isinstance(value, cbor().CBORTag) else (None, value)


def _series(fields: Mapping[str, Any]) -> object:
    found = fields.get("series_unique_id", fields.get("series_id"))
    return found if isinstance(found, str | int) else None


def _series_number(fields: Mapping[str, Any]) -> int | None:
    found = fields.get("series_id")
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300


def cbor() -> Any:
    """The library cbor2, imported late."""
    try:
        import cbor2  # noqa: PLC0415
    except ImportError as error:
        raise ImportError(
            "Dectris stream2 needs cbor2, which is not installed: pip install 'steering[dectris]'"
        ) from error
    return cbor2
