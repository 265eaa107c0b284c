"""A real browser, for tests of pages."""

from __future__ import annotations

import base64
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
PATIENCE = 30_000  # ms, for busy machines with two cores


CAMERA = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]


def _executable() -> str | None:
    return next(filter(None, map(shutil.which, CHROMIUM)), None)


@contextmanager
def chromium() -> Iterator[Browser]:
    """Headless Chromium. Without it, the tests are skipped, but fail in CI."""
    found = _executable()
    if found is None:
        message = f"SKIPPED: no Chromium ({', '.join(CHROMIUM)}); apt-get install chromium"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=ARGUMENTS)
        yield browser
        browser.close()


@contextmanager
def another(browser: Browser, *arguments: str) -> Iterator[Browser]:
    """A second browser with further arguments."""
    started = browser.browser_type.launch(executable_path=_executable(), args=[*ARGUMENTS, *arguments])
    yield started
    started.close()


def drop(page: Page, *images: Path, names: list[str] | None = None) -> None:
    """Drop files on the page through its drop handler."""
    names = names or [image.name for image in images]
    files = [[name, base64.b64encode(image.read_bytes()).decode()] for name, image in zip(names, images, strict=True)]
    transfer = page.evaluate_handle(
        """files => {
            const transfer = new DataTransfer();
            for (const [name, data] of files) {
                const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
                transfer.items.add(new File([bytes], name, { type: "image/jpeg" }));
            }
            return transfer;
        }""",
        files,
    )
    for event in ("dragenter", "dragover", "drop"):
        page.dispatch_event("body", event, {"dataTransfer": transfer})


def drop_folders(page: Page, *folders: Path, at: tuple[float, float] = (600, 400)) -> None:
    """Drop folders or files on the page as the browser itself does."""
    drag_files(page, *folders, at=at, kinds=("dragEnter", "dragOver", "drop"))


def drag_files(
    page: Page, *files: Path, at: tuple[float, float], kinds: tuple[str, ...] = ("dragEnter", "dragOver")
) -> None:
    """Drag folders or files over the page as the browser itself does."""
    session = page.context.new_cdp_session(page)
    data = {"items": [], "files": [str(file.resolve()) for file in files], "dragOperationsMask": 1}
    for kind in kinds:
        session.send("Input.dispatchDragEvent", {"type": kind, "x": at[0], "y": at[1], "data": data})
    session.detach()
