"""A notebook in a real JupyterLab: its cells run, the live page is shown below one, and its button pauses the run."""

import os
import re
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from steering.runner import RunFolder, attach
from tests.browser import browser, needs_browser

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
TOKEN = "for-this-test"
pytestmark = [
    pytest.mark.slow,
    needs_browser,
    pytest.mark.skipif(find_spec("jupyterlab") is None, reason="no JupyterLab: pip install .[notebook]"),
    pytest.mark.xdist_group("browser"),
]


def until(true, what):
    deadline = time.monotonic() + 240
    while not (found := true()):
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.1)
    return found


@pytest.fixture
def lab(tmp_path):
    """The address of a JupyterLab whose folder is tmp_path, with the first look in it, measuring for long."""
    whole = (NOTEBOOKS / "first_look.ipynb").read_text()
    long = whole.replace("else 250", "else 5000").replace("step=6.0", "step=1.0")
    assert "else 5000" in long
    assert "step=1.0" in long
    (tmp_path / "first_look.ipynb").write_text(long)
    kept = {
        name: str(tmp_path / "jupyter") for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")
    }
    here = os.pathsep.join([str(NOTEBOOKS.parent), os.environ.get("PYTHONPATH", "")])
    of_tests = {"TMPDIR": str(tmp_path), "IPYTHONDIR": str(tmp_path / "ipython"), "PYTHONPATH": here}
    environment = {name: value for name, value in os.environ.items() if name != "STEERING_SHORT"} | kept | of_tests
    options = [
        "--no-browser",
        "--allow-root",
        "--expose-app-in-browser",
        "--port=0",
        f"--ServerApp.root_dir={tmp_path}",
    ]
    settings = tmp_path / "settings" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"windowingMode": "none"}')  # cells out of sight are there too
    environment["JUPYTERLAB_SETTINGS_DIR"] = str(tmp_path / "settings")
    log = tmp_path / "lab.log"
    with log.open("w") as out:
        command = [sys.executable, "-m", "jupyterlab", *options, f"--IdentityProvider.token={TOKEN}"]
        server = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
    try:
        address = until(lambda: re.search(r"http://(127\.0\.0\.1|localhost):\d+/", log.read_text()), "JupyterLab")[0]
        yield address
    finally:
        started = psutil.Process(server.pid).children(recursive=True)
        server.terminate()
        server.wait(timeout=60)
        for kernel in started:
            if kernel.is_running():
                kernel.kill()


def test_pause_on_the_page_in_a_notebook_pauses_the_run(lab, tmp_path):
    with browser() as started:
        page = started.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(120_000)
        page.goto(f"{lab}lab/tree/first_look.ipynb?token={TOKEN}")
        page.get_by_text("| Idle").wait_for()  # the kernel's state: what is asked before is lost
        page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells'); }")
        [path] = until(lambda: list(tmp_path.glob("*/first-look/scheduler.json")), "the run")
        with attach(path.parent) as run:
            try:
                inside = page.frame_locator('iframe[title="Live page of the run"]')
                inside.get_by_role("button", name="Pause").click()
                until(lambda: run.snapshot()["paused"], "the pause")
                inside.get_by_role("button", name="Resume").click()
                until(lambda: not run.snapshot()["paused"], "the run to go on")
            finally:
                page.screenshot(path=str(tmp_path / "lab.png"))
                run.command("stop")
                until(lambda: run.done, "the end of the run")
    assert RunFolder(path.parent).summary()["frames_predicted"] > 0
