"""Documents of strangers: any JSON in the place of a document's parts ends in a clear error, or is passed over."""

from __future__ import annotations

import json
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

from hypothesis import given, settings, strategies as st

from steering.sources.addresses import frames_at, positions_at

RANGES = {"indices": {"start": 0, "stop": 1}, "seq_nums": {"start": 1, "stop": 2}}
IMAGE = {"dtype": "array", "shape": [4, 4], "external": "STREAM:", "source": ""}
NUMBER = {"dtype": "number", "shape": [], "source": ""}
KEYS = {"one": IMAGE, "y": NUMBER, "x": NUMBER}
DOCUMENTS = [
    ["start", {"uid": "a", "time": 0.0, "scan_id": 7, "sample": "gravel"}],
    ["descriptor", {"uid": "b", "run_start": "a", "name": "primary", "data_keys": KEYS}],
    ["stream_resource", {"uid": "c", "data_key": "one", "mimetype": "application/x-hdf5", "uri": "file://localhost/no.h5",
                         "parameters": {"dataset": "d"}}],
    ["stream_datum", {"uid": "c/0", "stream_resource": "c", "descriptor": "b", **RANGES}],
    ["event", {"uid": "e", "descriptor": "b", "seq_num": 1, "data": {"y": 1.0, "x": 2.0}}],
    ["stop", {"uid": "f", "run_start": "a", "num_events": {"primary": 1}}],
]  # fmt: skip
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@given(st.lists(st.tuples(st.integers(0, len(DOCUMENTS) - 1), st.integers(0, 9), anything), min_size=1, max_size=3))
@settings(max_examples=150, deadline=None)
def test_documents_with_any_parts_raise_nothing_else(changes):
    documents = json.loads(json.dumps(DOCUMENTS))
    for which, part, value in changes:
        document = documents[which][1]
        document[list(document)[part % len(document)]] = value
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "documents.jsonl"
        lines.write_text("".join(json.dumps(one) + "\n" for one in documents))
        frames = frames_at(f"bluesky:{lines}")
        _, positions = positions_at(f"bluesky:{lines}?y=y&x=x&unit=mm")
        for stream in (frames, positions):
            said = "found "
            try:
                list(replace(stream, documents=replace(stream.documents, patience_s=0.0)).records(threading.Event()))
            except (ValueError, OSError) as error:
                said = str(error)
            assert "found" in said, said
