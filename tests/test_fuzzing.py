"""Damaged and hostile files against every reader: only clear errors, no hang, no memory beyond the bound."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "workflows"))

from workflows import fuzz_readers


@pytest.mark.slow
@pytest.mark.parametrize("reader", fuzz_readers.READERS)
def test_bad_inputs_end_in_clear_errors(reader, tmp_path):
    """In the full run 10,000: steering run workflows/fuzz_readers.py."""
    inputs = (
        40 if reader in ("swmr", "table") else 150
    )  # one may be written still, and is waited for; the other is slow
    outcome = fuzz_readers.fuzz(reader, inputs, tmp_path / "inputs", seed=1)
    assert outcome.findings == []
    assert outcome.read + sum(outcome.refused.values()) == inputs
    assert sum(outcome.refused.values()) > inputs / 10, "the inputs are bad ones"
    assert outcome.memory_mib < 256
