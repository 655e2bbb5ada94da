"""A real browser for tests: Debian's Chromium, driven by Playwright's client."""

import contextlib
import shutil
from importlib.util import find_spec

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None or find_spec("playwright") is None,
    reason="no Chromium and Playwright's client: apt-get install chromium, pip install .[test]",
)


@contextlib.contextmanager
def browser():
    """A headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@contextlib.contextmanager
def tab(browser, address, **settings):
    """A page of a new visitor, with what went wrong in it: errors of scripts, refused requests, requests outside."""
    context = browser.new_context(**settings)
    opened = context.new_page()
    opened.set_default_timeout(60_000)
    site, wrong = address.split("/?")[0], []
    inside = (site, site.replace("http", "ws"), "data:", "blob:")
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    # 409 is the answer to a command that cannot be done now, as to a second approval.
    said = wrong.append
    opened.on("console", lambda one: said(one.text) if one.type == "error" and " 409 " not in one.text else None)
    opened.on("request", lambda asked: None if asked.url.startswith(inside) else wrong.append(asked.url))
    opened.on("websocket", lambda asked: None if asked.url.startswith(inside) else wrong.append(asked.url))
    opened.goto(address)
    opened.wait_for_selector("body[data-updates]")
    yield opened, wrong
    context.close()
