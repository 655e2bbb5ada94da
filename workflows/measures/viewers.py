"""Browser sessions that look at a live page, in a process of their own: it prints as JSON what each has seen.

python -m measures.viewers ADDRESS VIEWERS SECONDS
"""

import json
import os
import shutil
import sys

from playwright.sync_api import sync_playwright


def main(address: str, viewers: int, seconds: float) -> None:
    """Open the page in so many browsers' contexts, say "open", and after so many seconds what they have seen. The first
    one opens it alone, the others then at once.

    They compute only where nobody else of this machine wants to, as if they were on another one.
    """
    if hasattr(os, "SCHED_IDLE"):  # of Linux; what Chromium starts inherits it
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    with sync_playwright() as playwright:
        path = shutil.which("chromium") or shutil.which("chromium-browser")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        pages = []
        for _ in range(viewers):
            page = browser.new_context(viewport={"width": 1280, "height": 800}).new_page()
            page.goto(address, timeout=120_000, wait_until="commit" if pages else "load")
            pages.append(page)
            if page is pages[0]:
                page.wait_for_selector("body[data-painted]", timeout=120_000)
        for page in pages:
            page.wait_for_selector("body[data-painted]", timeout=300_000)
        before = [_seen(page) for page in pages]
        print("open", flush=True)
        pages[0].wait_for_timeout(1000 * seconds)
        after = [_seen(page) for page in pages]
        browser.close()
    found = [
        {
            "first_paint_s": float(now["painted"]) / 1e3,
            "seconds": now["at"] - then["at"],
            "updates": int(now["updates"]) - int(then["updates"]),
            "bytes": int(now["bytes"]) - int(then["bytes"]),
        }
        for then, now in zip(before, after, strict=True)
    ]
    print(json.dumps(found), flush=True)


def _seen(page) -> dict:  # noqa: ANN001
    """What the page says of itself, and the seconds since it was opened."""
    return page.evaluate("({...document.body.dataset, at: performance.now() / 1e3})")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
