"""What README.md says can be done: its workflow runs as it stands there, and what it points to exists."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from steering.runner.folder import RunFolder

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_what_it_points_to_is_there():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_its_map_names_every_room():
    rooms = {f"steering/{p.name}" for p in (ROOT / "steering").iterdir() if (p / "__init__.py").exists()}
    assert rooms == set(re.findall(r"^\| `(steering/\w+)`", README, re.MULTILINE))


def test_its_workflow_is_whole_and_short():
    assert len(example().splitlines()) <= 30


@pytest.mark.slow
def test_its_workflow_runs_as_it_stands(tmp_path):
    (tmp_path / "my_run.py").write_text(example())
    command = [sys.executable, "-m", "steering.cli", "run", "my_run.py", "--out", "run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=180)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout.splitlines()[-1] == "report: run/report.html"
    figures = RunFolder(tmp_path / "run").summary()
    assert figures["status"] == "finished"
    assert figures["frames_predicted"] == figures["frames_acquired"] == 300
    assert figures["frames_dropped"] == 0
    assert figures["versions_published"] >= 1


def example():
    """The Python file that the section on workflows shows."""
    section = README.split("\n## Write a workflow\n")[1].split("\n## ")[0]
    [found] = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    return found
