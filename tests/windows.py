"""Plugin for pytest on Windows: which tests do not run there, and a table of the reasons at the end."""

import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

FORK = "forks, or imports fcntl or resource"
CHROMIUM = "needs Chromium, which the Python under Wine cannot start"
SHELL = "runs programs of Linux: bash, make, apt-get or uv"
PACKAGES = "needs packages that are not set up there: Ray, onnxruntime, nncf or Jupyter"
NOT_RUN = {
    "browser": CHROMIUM,
    "concurrent": FORK,
    "container": SHELL,
    "demo": SHELL,
    "hostile": FORK,
    "install": SHELL,
    "interrupted": FORK,
    "label_sessions": FORK,
    "notebooks": PACKAGES,
    "onnx": PACKAGES,
    "page": CHROMIUM,
    "precision": PACKAGES,
    "ray": PACKAGES,
    "readme": SHELL,
    "report": CHROMIUM,
}
"""Test files, or names of tests in other files, and why they do not run."""

outcomes = defaultdict(set)
"""The outcomes of the cases of each test function, with the reasons of those that were skipped."""


def pytest_ignore_collect(collection_path):
    return collection_path.stem.removeprefix("test_") in NOT_RUN or None


def pytest_collection_modifyitems(items):
    for item in items:
        if reason := NOT_RUN.get(item.originalname):
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_runtest_logreport(report):
    function = report.nodeid.partition("[")[0]
    if report.skipped:
        outcomes[function].add(str(report.longrepr[2]).removeprefix("Skipped: "))
    elif report.failed or report.when == "call":
        outcomes[function].add(report.outcome)


def pytest_terminal_summary(terminalreporter):
    """Print the number of test functions that passed, failed, or did not run, by reason."""
    table = Counter()
    for seen in outcomes.values():
        ran = seen & {"failed", "passed"}
        table[min(ran) if ran else min(seen)] += 1  # failed, if any case has
    for name, reason in NOT_RUN.items():
        file = Path(__file__).with_name(f"test_{name}.py")
        if file.exists():
            table[reason] += len(re.findall(r"^def test_", file.read_text("utf-8"), re.MULTILINE))
    terminalreporter.write_line(f"{table.total()} test functions:")
    for reason, number in table.most_common():
        terminalreporter.write_line(f"{number:5} {reason}")
