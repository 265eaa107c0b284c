"""What ``--coverage``, ``--at-least`` and ``--at-most-wrong`` promise, on photos that an index has never seen.

A promised share ``p`` was fitted on ``m`` held-out shots and is measured on ``n`` photos, so its tolerance is three
standard errors, ``3 (p (1 - p) (1 / m + 1 / n))^0.5``.
"""

import csv
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import command_line, needs_real, ok
from tables import write_table

SETS = {
    "food": ("clip-food9/train", "clip-food9/test", "feature", 40),
    "dtd": ("clip-vitb32/dtd/val", "clip-vitb32/dtd/test", "feature", 12),
    "caltech": ("two-encoders/photos_16", "two-encoders/photos_test", "feature_lite0", 6),
}
"""The table of shots, the table of other photos, the column of the features, and the number of shots per class."""
ASIDE = ("no match", "not sure")


@dataclass
class Built:
    """An index whose groups of ``classes`` are their first letters, and other photos with their labels by path."""

    index: Path
    classes: int
    held_out: int
    test: Path
    truth: dict[str, str]


@pytest.fixture(
    scope="module",
    params=["food", *(pytest.param(name, marks=needs_real) for name in ("dtd", "caltech"))],
)
def built(request, shared, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    train, test, column, each = SETS[request.param]
    train, test = (
        pq.read_table(shared / f"data/{name}.parquet").to_pandas() for name in (train, test)
    )
    train = train.groupby("label").sample(each, random_state=1)
    classes = sorted(set(train["label"]))
    names = [str(folder / f"{i}.png") for i in range(len(test))]
    for name in names:
        Path(name).write_text(name)
    (folder / "groups.csv").write_text(
        "class,letter\n" + "".join(f"{name},{name[0]}\n" for name in classes)
    )
    write_table(folder / "train.parquet", np.stack(train[column]), train["label"].tolist())
    other = write_table(
        folder / "test.parquet", np.stack(test[column]), test["label"].tolist(), names
    )
    options = ("--out", folder / "index", "--groups", folder / "groups.csv")
    ok("index build", folder / "train.parquet", *options)
    truth = dict(zip(names, test["label"], strict=True))
    return Built(folder / "index", len(classes), len(train), other, truth)


def tolerance(p, m, n):
    return 3 * (p * (1 - p) * (1 / m + 1 / n)) ** 0.5


@pytest.mark.parametrize("coverage", [0.8, 0.9])
def test_sets_hold_the_right_class_as_often_as_coverage_promises(built, coverage):
    done = command_line("evaluate", built.index, built.test, "--coverage", coverage, "--json")
    found = json.loads(done.stdout)
    assert found["set_coverage"] >= coverage - tolerance(coverage, built.held_out, len(built.truth))
    assert found["set_size"] < built.classes / 4


@pytest.mark.parametrize("least", [0.8, 0.95])
def test_answers_at_each_level_are_right_as_often_as_at_least_promises(built, least):
    done = command_line("evaluate", built.index, built.test, "--at-least", least, "--json")
    levels = json.loads(done.stdout)["levels"]
    assert levels["class"]["share"] > 0.2
    for level in filter(lambda level: level["share"], levels.values()):
        assert level["right"] >= least - tolerance(
            least, built.held_out, level["share"] * len(built.truth)
        )


@pytest.mark.parametrize("most", [5, 10])
def test_sorted_photos_are_wrong_as_rarely_as_at_most_wrong_promises(built, tmp_path, most):
    out = ("--into", tmp_path / "out", "--dry-run", "--at-most-wrong", f"{most}%")
    done = command_line("sort", built.index, built.test, *out)
    kept = [
        row
        for row in csv.DictReader(done.stdout.splitlines())
        if row["output"].split("/")[0] not in ASIDE
    ]
    held_out = int(re.search(r"(\d+) reach the limit", done.stderr)[1])
    wrong = np.mean([row["label"] != built.truth[row["input"]] for row in kept])
    assert wrong <= most / 100 + tolerance(most / 100, held_out, len(kept))
    assert len(kept) > 0.2 * len(built.truth)
