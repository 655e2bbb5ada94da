"""One message to the page: a header of JSON, and the bytes of an image's change behind it."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

from steering.inference import ImageChange
from steering.runner.folder import encoded


def message(facts: Mapping[str, Any], series: Mapping[str, Any], image: ImageChange | None) -> bytes:
    """Length of the header as uint32 (little-endian), the header, spaces up to a multiple of 8 bytes, the image's
    payload. Header: facts by name, rows of series by name, and the header of the image's change or null."""
    header = encoded({"facts": facts, "series": series, "image": None if image is None else image.header})
    header = header.rstrip(b"\n")
    header += b" " * (-(len(header) + 4) % 8)
    return struct.pack("<I", len(header)) + header + (b"" if image is None else image.payload)


def opened(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and payload of a message."""
    (length,) = struct.unpack_from("<I", data)
    return json.loads(data[4 : 4 + length]), data[4 + length :]
