"""The Prefect flow, with a real Prefect in an environment of its own: PREFECT_PYTHON names its Python."""

import os
import subprocess
from pathlib import Path

import pytest

SCHEDULES = Path(__file__).parents[1] / "workflows" / "schedules"
FLOW = """
import sys
sys.path.insert(0, sys.argv[1])
from prefect.testing.utilities import prefect_test_harness
from prefect_nightly import COMMAND, night, nightly

with prefect_test_harness(server_startup_timeout=120):
    quick = night.with_options(retry_delay_seconds=0)
    nightly.fn.__globals__["night"] = quick
    state = nightly(["bash", "-c", sys.argv[2], *COMMAND], return_state=True)
    print("ENDED", state.type.value)
    try:
        state.result()
    except Exception as error:
        print("ENDED", type(error).__name__, error)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "said"),
    [
        # try later, then done: the count is in a file
        ('echo "$0 $*" >>starts; [ "$(wc -l <starts)" -gt 2 ] || exit 75', ["ENDED COMPLETED"]),
        ("echo no beam >&2; exit 1", ["ENDED FAILED", "ended with 1: no beam"]),
    ],
)
def test_a_night_is_tried_again_later_and_fails_in_words(tmp_path, script, said):
    python = os.environ.get("PREFECT_PYTHON")
    if python is None:
        pytest.skip("Prefect needs an environment of its own: PREFECT_PYTHON=its python, see prefect_nightly.py")
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PREFECT_HOME": str(tmp_path / "prefect")}
    command = [python, "-c", FLOW, str(SCHEDULES), script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(words in done.stdout for words in said), done.stdout + done.stderr[-2000:]
    starts = tmp_path / "starts"
    if starts.exists():
        assert starts.read_text().splitlines() == [".venv/bin/steering run --quiet workflows/nightly.py runs"] * 3


def test_the_flow_is_valid_python_and_starts_the_line_of_the_crontab():
    flow = (SCHEDULES / "prefect_nightly.py").read_text()
    compile(flow, "prefect_nightly.py", "exec")
    [line] = [line for line in flow.splitlines() if line.startswith("COMMAND = ")]
    words = eval(line.removeprefix("COMMAND = "))
    assert " ".join(words) in (SCHEDULES / "crontab").read_text()
