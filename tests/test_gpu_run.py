"""The command that measures everything on a GPU works where there is none, and asks for what exists."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu import parts
from tests.test_docs import generate

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_one_command_runs_its_parts_on_a_cpu_and_says_how_they_went(tmp_path):
    command = [ROOT / "tests" / "gpu" / "run.sh", tmp_path, "cpu", "refine"]
    named = {"PYTHON": sys.executable, "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        command, env={**os.environ, **named}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {name: said["ended"] for name, said in summary["parts"].items()} == {"refine": "ok"}
    assert summary["parts"]["refine"]["figures"]["labels_per_s"] > 0
    screen = (tmp_path / "summary.txt").read_text()
    assert screen == done.stdout
    assert "labels_per_s: " in screen


def test_a_part_that_fails_or_hangs_stops_no_other(tmp_path):
    def part(name, code, seconds=20.0):
        return parts.Part(name, (sys.executable, "-c", code), seconds)

    every = [
        part("fails", "raise SystemExit('no such kernel')"),
        part("hangs", "import time; print('begun', flush=True); time.sleep(600)", 5.0),
        part("goes", "print('all is well')"),
    ]
    found = parts.measure(every, tmp_path, "gpu", {"gpu": None})["parts"]
    assert {name: said["ended"] for name, said in found.items()} == {
        "fails": "exit 1",
        "hangs": "stopped after 5 s",
        "goes": "ok",
    }
    screen = (tmp_path / "summary.txt").read_text().splitlines()
    assert len(screen) <= parts.LINES
    assert "    | no such kernel" in screen
    assert "    | all is well" in screen


@pytest.mark.parametrize("kind", ["gpu", "cpu", "class", "compiled"])
def test_every_part_asks_its_workflow_for_options_that_it_has(kind, tmp_path):
    for part in parts.parts(tmp_path, kind):
        words = list(part.command)
        file = next((word for word in words if word.startswith("workflows/")), None)
        if file is None:
            assert Path(words[1]).name in ("refine.py", "-m")
            continue
        given = words[words.index(file) + 1 :]
        options = generate.parser_of(ROOT / file).parse_args(given)
        assert options.device == ("cpu" if kind == "cpu" else "cuda")
