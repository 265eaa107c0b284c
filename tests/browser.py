"""A real browser, for tests of pages."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
PATIENCE = 30_000  # ms, for busy machines with two cores


@contextmanager
def chromium():
    """Headless Chromium. Without it, the tests are skipped."""
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if found is None:
        pytest.skip(f"SKIPPED: no Chromium ({', '.join(CHROMIUM)}); apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=ARGUMENTS)
        yield browser
        browser.close()


def choose_photos(page, *images, names=None):
    """Choose files on the screen of photos, under their own or other names."""
    named = zip(names or [image.name for image in images], images, strict=True)
    files = [{"name": name, "mimeType": "image/jpeg", "buffer": image.read_bytes()} for name, image in named]
    page.set_input_files("#files", files)


def drop(page, *files, at=(600, 400)):
    """Drop folders or files on the page as the browser itself does."""
    drag_files(page, *files, at=at, kinds=("dragEnter", "dragOver", "drop"))


def drag_files(page, *files, at, kinds=("dragEnter", "dragOver")):
    """Drag folders or files over the page as the browser itself does."""
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    session = page.context.new_cdp_session(page)
    data = {"items": [], "files": [str(file.resolve()) for file in files], "dragOperationsMask": 1}
    for kind in kinds:
        session.send("Input.dispatchDragEvent", {"type": kind, "x": at[0], "y": at[1], "data": data})
    session.detach()


class Opened:
    """An open page that records console messages, uncaught errors and requests to other hosts.

    ``expected`` holds the beginnings of allowed messages.
    """

    def __init__(self, browser, address, at="", ready="#index-facts", expected=(), **options):
        options = {"viewport": {"width": 1200, "height": 900}, "reduced_motion": "reduce"} | options
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.expected = [*expected]
        self.wrong = []
        self.page.set_default_timeout(PATIENCE)
        self.page.on("console", lambda message: self.wrong.append(message.text))
        self.page.on("pageerror", lambda error: self.wrong.append(f"uncaught: {error}"))
        self.page.on(
            "request",
            lambda request: (
                request.url.startswith((address, "blob:")) or self.wrong.append(f"request to {request.url}")
            ),
        )
        self.page.goto(f"{address}{at}")
        expect(self.page.locator(ready).first).not_to_be_empty()

    def close(self):
        """Close the page, and check that it recorded nothing unexpected."""
        self.context.close()
        unexpected = [text for text in self.wrong if not text.startswith(tuple(self.expected))]
        assert not unexpected, unexpected


def violations(page):
    """Return the accessibility violations that axe finds on the page."""
    axe = pytest.importorskip("axe_playwright_python", reason="SKIPPED: no axe; pip install -e '.[dev]'")
    page.evaluate((Path(axe.__file__).parent / "axe.min.js").read_text())
    found = page.evaluate("async () => (await axe.run()).violations")
    return [f"{one['id']}: {node['html']}" for one in found for node in one["nodes"]]


def refuse(route, status, detail, **headers):
    """Answer a request with a problem."""
    problem = {"type": "about:blank", "title": "Refused", "status": status, "detail": detail}
    route.fulfill(status=status, headers=headers, json=problem)


def hold(page, pattern):
    """Return the list of the requests that the page sends from now on. They wait until they are continued."""
    held = []
    page.route(pattern, lambda route: held.append(route))
    return held


def wait_for(page, held, number):
    """Wait for the given number of held requests, and return the last one."""
    while len(held) < number:
        page.wait_for_timeout(50)
    return held[number - 1]


def tab_to(page, wanted):
    """Press Tab until ``wanted`` has the focus."""
    for _ in range(60):
        if wanted.evaluate("element => element === document.activeElement"):
            return
        page.keyboard.press("Tab")
    pytest.fail(f"{wanted} is not reached")


def get(page, path):
    """Return an answer of the server."""
    return page.request.get(f"{page.evaluate('location.origin')}{path}").json()


def submit(page, field, text):
    """Fill in a field, and press Enter."""
    page.fill(field, text)
    page.keyboard.press("Enter")
