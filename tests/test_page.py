"""The live page in a real browser, while a campaign goes on."""

import contextlib
import json
import logging
import shlex
import time
import urllib.request
from dataclasses import replace
from http.client import HTTPConnection
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest

from steering import LivePage
from steering.campaign.events import COMMANDS
from steering.cli import main
from steering.clusters import local
from steering.commands import view
from steering.runner import RunFolder, start
from tests.browser import browser, needs_browser, tab
from tests.command_line import said
from tests.test_docs import blocks, commands
from tests.test_runner import experiment, told

pytestmark = [pytest.mark.slow, needs_browser, pytest.mark.xdist_group("browser")]
WIDTHS = {"desk": (1600, 1000), "beamline": (1280, 800), "phone": (390, 844)}


def until(true, what):
    deadline = time.monotonic() + 90
    while not (found := true()):
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.05)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return RunFolder.create(tmp_path_factory.mktemp("page") / "night")


@pytest.fixture(scope="module")
def client():
    with local(ranks=1) as client:
        yield client


@pytest.fixture(scope="module")
def campaign(client, folder):
    """A run whose decisions wait for a person."""
    parts = experiment(frames=5000, approval_s=300.0, unanswered="veto")
    run = start(replace(parts, ranks=1), client, folder)
    yield run
    if not run.done:
        run.command("stop")
        run.result()


@pytest.fixture(scope="module")
def page(campaign, folder):
    with LivePage(folder) as served:
        yield served


@pytest.fixture(scope="module")
def chromium():
    with browser() as started:
        yield started


@pytest.fixture(scope="module")
def desk(chromium, page):
    """The page as its operator has it open."""
    with tab(chromium, page.invite("ada"), viewport={"width": 1280, "height": 800}) as opened:
        yield opened


def shown(tab, script):
    return tab.evaluate(f"() => {{ {script} }}")


def open_limits(tab):
    """The page fills the form in the moment after it was opened: what was typed before that would be lost."""
    shown(tab, "window.filled = new Promise((done) => $('limits').addEventListener('toggle', done, {once: true}))")
    tab.locator("#limits summary").click()
    shown(tab, "return window.filled.then(() => null)")


def test_the_page_loads_without_a_request_outside_and_the_token_leaves_the_address(desk):
    opened, wrong = desk
    assert "token" not in opened.url
    assert opened.locator("#run").inner_text() == "night"
    assert wrong == []


def test_limits_are_in_the_geometrys_unit_before_the_first_frame_too(desk):
    opened, _ = desk
    open_limits(opened)
    assert shown(opened, "return image") is None
    assert opened.locator("#limit-unit").inner_text() == "µm"
    assert shown(opened, "return Number($('limit').dataset.factor)") == 1e-6
    opened.locator("#limits summary").click()


def test_a_veto_draws_other_positions_and_an_approval_measures_them(desk, folder, campaign):
    opened, wrong = desk
    proposed = "return JSON.stringify(model('proposed').data.x)"
    opened.wait_for_selector("#proposal:visible")
    before = json.loads(shown(opened, proposed))
    assert len(before) > 0
    first = told(folder, "DecisionProposed")[0]["reason"]
    assert first in opened.locator("#proposal-text").inner_text()
    opened.get_by_role("button", name="Veto").click()
    until(lambda: json.loads(shown(opened, proposed)) not in (before, []), "other positions")
    [word] = until(lambda: told(folder, "Command"), "the word in the log")
    assert (word["name"], word["by"].split()[0]) == ("veto", "ada")
    until(lambda: len(told(folder, "DecisionProposed")) > 1, "another proposal")
    assert not told(folder, "ChunkArrived")
    while not told(folder, "PredictionReady"):
        if opened.locator("#proposal").is_visible():
            opened.get_by_role("button", name="Approve").click()
        time.sleep(0.1)
    until(lambda: shown(opened, "return FRAMES.x.length") > 0, "measured positions")
    until(lambda: shown(opened, "return image.maps.phase.some((v) => !Number.isNaN(v))"), "a live phase")
    assert wrong == []


def test_the_button_pauses_and_resumes_the_run(desk, campaign):
    opened, _ = desk
    opened.get_by_role("button", name="Pause").click()
    until(lambda: campaign.snapshot()["paused"], "the pause")
    opened.locator("#status", has_text="paused").wait_for()
    opened.get_by_role("button", name="Resume").click()
    until(lambda: not campaign.snapshot()["paused"], "the run to go on")
    opened.locator("#pause:visible").wait_for()


def test_limits_that_are_set_on_the_page_hold_and_are_in_the_log_with_the_name(desk, folder, campaign):
    opened, wrong = desk
    open_limits(opened)
    opened.get_by_label("Shortest dwell (s)").fill("0.02")
    for edge, value in {"y from": "-0.2", "y to": "0.2", "x from": "-0.2", "x to": "0.25"}.items():
        opened.get_by_label(edge).fill(value)
    assert opened.locator("#limit-unit").inner_text() == "µm"
    opened.get_by_role("button", name="Set limits").click()
    [word] = until(lambda: [one for one in told(folder, "Command") if one["name"] == "limit"], "the limits in the log")
    assert (word["by"].split()[0], word["shortest_dwell"]) == ("ada", 0.02)
    assert word["area"] == pytest.approx([-2e-7, 2e-7, -2e-7, 2.5e-7])
    until(lambda: shown(opened, "return model('area').data.left.length") == 1, "the area to be drawn")
    opened.locator("#limits summary").click()
    assert wrong == []


def test_no_serious_fault_of_accessibility_and_pictures_at_three_widths(desk, tmp_path_factory, record_property):
    from axe_playwright_python.sync_playwright import Axe

    opened, wrong = desk
    pictures = tmp_path_factory.getbasetemp() / "page"
    pictures.mkdir(exist_ok=True)
    for name, (width, height) in WIDTHS.items():
        opened.emulate_media(color_scheme="dark" if name == "desk" else "light")
        opened.set_viewport_size({"width": width, "height": height})
        assert opened.evaluate("document.documentElement.scrollWidth") <= width  # nothing to scroll sideways
        if name != "beamline":
            found = Axe().run(opened).response["violations"]
            assert [one["id"] for one in found if one["impact"] in ("serious", "critical")] == []
        whole = opened.evaluate("document.documentElement.scrollHeight")
        opened.set_viewport_size({"width": width, "height": whole})  # what is out of sight is not drawn
        opened.wait_for_timeout(500)
        opened.screenshot(path=pictures / f"{name}.png")
    assert wrong == []
    record_property("pictures", str(pictures))


def refusal(address, headers=None, body=None):
    where = urlsplit(address)
    with contextlib.closing(HTTPConnection(where.hostname, where.port, timeout=30)) as there:
        there.request("GET" if body is None else "POST", f"{where.path}?{where.query}", body, headers or {})
        return there.getresponse().status


def test_strangers_other_sites_and_readers_are_refused(page, folder, campaign):
    home = f"http://127.0.0.1:{page.port}"
    commands = len(told(folder, "Command"))
    assert refusal(f"{home}/") == refusal(f"{home}/document.json") == refusal(f"{home}/updates") == 403
    assert refusal(f"{home}/?token=guess") == 403
    reader = {"Cookie": f"steering-{page.port}={page.invite('bob', 'reader').split('=')[1]}", "X-Steering": "page"}
    operator = reader | {"Cookie": f"steering-{page.port}={page.invite('ada').split('=')[1]}"}
    stop = json.dumps({"name": "stop"}).encode()
    assert refusal(f"{home}/command", reader, stop) == 403
    assert refusal(f"{home}/command", operator | {"Origin": "http://evil.example"}, stop) == 403
    assert refusal(f"{home}/command", {"Cookie": operator["Cookie"]}, stop) == 400
    assert refusal(f"{home}/me", operator | {"Host": "evil.example"}) == 403
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    upgrade |= {"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==", "Origin": "http://evil.example"}
    assert refusal(f"{home}/updates", operator | upgrade) == 403
    assert len(told(folder, "Command")) == commands
    assert not campaign.done


def test_the_pages_port_has_the_figures_that_dasks_server_has_for_those_who_may_look(page, folder, campaign):
    home = f"http://127.0.0.1:{page.port}"
    assert refusal(f"{home}/metrics") == refusal(f"{home}/metrics", {"Authorization": "Bearer guess"}) == 403
    token = page.invite("prometheus", "reader").split("=")[1]
    asked = urllib.request.Request(f"{home}/metrics", headers={"Authorization": f"Bearer {token}"})
    until(lambda: refusal(asked.full_url, asked.headers) == 200, "the first figures")
    with (
        urllib.request.urlopen(asked, timeout=30) as answer,
        urllib.request.urlopen(folder.summary()["metrics"]) as dasks,
    ):
        here, there = answer.read().decode(), dasks.read().decode()
    described = [line for line in here.splitlines() if line.startswith("#")]
    assert "# TYPE steering_frames_total counter" in described
    assert set(described) <= set(there.splitlines())
    assert 'steering_frames_total{fate="acquired",run="night"}' in here


def test_the_command_serves_it_until_it_is_interrupted(folder, campaign, monkeypatch, capsys):
    def interrupted(_seconds):
        first, *invited = capsys.readouterr().out.splitlines()
        assert "night: the page is served until Ctrl-C" in first
        for line, (name, role) in zip(invited, {"ada": "operator", "bob": "reader"}.items(), strict=True):
            home, token = line.split()[-1].split("/?token=")
            cookie = {"Cookie": f"steering-{home.split(':')[-1]}={token}"}
            with urllib.request.urlopen(urllib.request.Request(f"{home}/me", headers=cookie), timeout=30) as answer:
                assert json.load(answer) == {"name": name, "role": role}
        raise KeyboardInterrupt

    loud = [logging.getLogger(name) for name in ("distributed", "distributed.client", "distributed.core")]
    levels = [one.level for one in loud]
    monkeypatch.setattr(view, "time", SimpleNamespace(sleep=interrupted))
    try:
        assert main(["view", str(folder.path), "--operator", "ada", "--reader", "bob"]) == 0
    finally:
        for one, level in zip(loud, levels, strict=True):
            one.setLevel(level)
    assert "the page is closed; the run is as it was" in capsys.readouterr().out
    assert not campaign.done


def test_only_pages_of_this_machine_may_show_it_in_a_frame_and_only_once_a_notebook_has_asked(page):
    def ancestors():
        cookie = {"Cookie": f"steering-{page.port}={page.invite('ada').split('=')[1]}"}
        asked = urllib.request.Request(f"http://127.0.0.1:{page.port}/", headers=cookie)
        with urllib.request.urlopen(asked, timeout=30) as answer:
            return answer.headers["Content-Security-Policy"].split("frame-ancestors ")[1]

    assert ancestors() == "'none'"
    assert "<iframe" in page._repr_html_()
    assert ancestors() == "http://localhost:* http://127.0.0.1:*"


def test_dasks_own_server_shows_the_page_to_this_machine_alone_and_takes_no_command(campaign, client):
    there = f"http://127.0.0.1:{client.cluster.scheduler.http_server.port}/steering/"
    with urllib.request.urlopen(there, timeout=30) as answer:
        assert b"static/page.js" in answer.read()
    with urllib.request.urlopen(f"{there}me", timeout=30) as answer:
        assert json.load(answer) == {"name": "", "role": "reader"}
    assert refusal(f"{there}command", {"X-Steering": "page"}, b'{"name": "stop"}') == 403
    assert refusal(f"{there}me", {"Host": "evil.example"}) == 403


def test_a_run_that_goes_on_takes_every_command_that_the_documents_show(campaign, folder):
    """Those of docs/how-to/take-part.md in their order, stop last; what `view` does is tested above."""
    marked = [block for block in blocks("how-to/take-part") if block.mark == "not run"]
    written = [command for block in marked for command, _ in commands(block)]
    names = {command.split()[1] for command in written}
    assert names == {"view", "status", *COMMANDS}

    def waiting():
        return campaign.page_update().state["proposed"] is not None

    while campaign.snapshot()["versions_published"] < 1:
        if waiting():
            campaign.command("approve")
        time.sleep(0.1)
    for command in sorted(written, key=lambda command: "stop" in command):
        words = shlex.split(command.replace("DIR", str(folder.path)))[1:]
        if words[0] in ("approve", "veto"):
            until(waiting, "a decision that waits")
        if words[0] != "view":
            out, complaint = said(*words, code=None if "--version" in words else 0)
            assert out or "version" in complaint, command
    assert [one["name"] for one in told(folder, "Command") if one["name"] == "stop"] == ["stop"]
    until(lambda: campaign.done, "the end of the run")
