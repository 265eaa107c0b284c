"""A real browser, for tests of pages."""

from __future__ import annotations

import shutil
from contextlib import contextmanager

import pytest
from playwright.sync_api import expect, sync_playwright

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
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
                request.url.startswith((address, "blob:"))
                or self.wrong.append(f"request to {request.url}")
            ),
        )
        self.page.goto(f"{address}{at}")
        expect(self.page.locator(ready).first).not_to_be_empty()

    def close(self):
        """Close the page, and check that it recorded nothing unexpected."""
        self.context.close()
        unexpected = [text for text in self.wrong if not text.startswith(tuple(self.expected))]
        assert not unexpected, unexpected
