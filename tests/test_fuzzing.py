"""Damaged and hostile files against every reader: only clear errors, no hang, no memory beyond the bound."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "workflows"))

from workflows import fuzz_readers

INPUTS = 500
"""For each reader; in the full run 10,000: steering run workflows/fuzz_readers.py."""


@pytest.mark.slow
@pytest.mark.parametrize("reader", fuzz_readers.READERS)
def test_bad_inputs_end_in_clear_errors(reader, tmp_path):
    outcome = fuzz_readers.fuzz(reader, INPUTS, tmp_path / "inputs", seed=1)
    assert outcome.findings == []
    assert outcome.read + sum(outcome.refused.values()) == INPUTS
    assert sum(outcome.refused.values()) > INPUTS / 10, "the inputs are bad ones"
    assert outcome.memory_mib < 256
