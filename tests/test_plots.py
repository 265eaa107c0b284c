"""Diagrams show the counts that plain Python computes, and files contain images."""

from __future__ import annotations

import datetime
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import few
from PIL import Image
from test_calibration import food, rows_of

from retrieval_tip.data.encoder import Encoder
from retrieval_tip.data.sources import open_source
from retrieval_tip.errors import UsageError
from retrieval_tip.evaluation.evaluate import Affinities, Answers, Evaluation, evaluate
from retrieval_tip.report import plots
from retrieval_tip.settings import Settings

pytest.importorskip("matplotlib")

FILES = ["confusion.png", "per_class.png", "reliability.png", "coverage.png", "affinity.png"]


def made_up(truth, predicted, names, confidence=None, affinities=True, **changes):
    """Return an evaluation with these answers."""
    truth, predicted = np.asarray(truth), np.asarray(predicted)
    right = truth == predicted
    confidence = np.linspace(0.05, 1, len(truth)) if confidence is None else np.asarray(confidence)
    edges = np.linspace(-1, 1, 2001)
    counts = [np.histogram(np.random.default_rng(0).normal(m, 0.07, 999).clip(-1, 1), edges)[0] for m in (0.75, 0.5)]
    facts = {
        "top1": float(right.mean()), "top5": 1.0, "zero_shot_top1": None, "cache_top1": 0.5,
        "mean_per_class": 0.5, "ece": 0.1, "n": len(truth), "skipped": 0, "settings": Settings(),
        "confusions": [],
        "per_class": {names[i]: float(right[truth == i].mean()) for i in np.unique(truth)},
        "answers": Answers(truth, predicted, confidence, names, Affinities(edges, *counts) if affinities else None),
    }  # fmt: skip
    return Evaluation(**(facts | changes))


def check_png(path, least=3):
    """Check that a file is a large enough PNG of several colours with white edges."""
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).astype(np.int32) @ [1 << 16, 1 << 8, 1]
    assert min(pixels.shape) > 200
    assert len(np.unique(pixels)) >= least
    white = pixels == 0xFFFFFF
    assert white.mean() < 0.99
    assert all(edge.all() for edge in (white[0], white[-1], white[:, 0], white[:, -1])), "something is cut off"


# ------------------------------------------------------------------------------------------------------------- contents


def test_confusion_counts_every_pair():
    rng = np.random.default_rng(0)
    names = [f"class {i}" for i in range(7)]
    truth, predicted = rng.integers(0, 6, 300), rng.integers(0, 6, 300)  # the last class does not occur
    found = plots.confusion(made_up(truth, predicted, names).answers)
    pairs = Counter(zip(truth.tolist(), predicted.tolist(), strict=True))
    assert (found.names, found.of) == (names[:6], 6)
    assert found.counts.tolist() == [[pairs[i, j] for j in range(6)] for i in range(6)]
    assert found.totals.tolist() == found.counts.sum(axis=1).tolist()


def test_only_the_most_confused_of_many_classes_are_shown():
    c = plots.MOST_CLASSES + 50
    names = [f"class {i}" for i in range(c)]
    truth = np.repeat(np.arange(c), 3)
    predicted = truth.copy()
    confused = np.arange(5, 5 + 3 * 30, 3)  # thirty pairs of neighbours, each confused twice
    for i in confused:
        predicted[3 * i : 3 * i + 2] = i + 1
    found = plots.confusion(made_up(truth, predicted, names).answers)
    assert found.of == c
    assert len(found.names) == plots.FEWER_CLASSES
    errors = Counter(np.concatenate([truth[truth != predicted], predicted[truth != predicted]]).tolist())
    assert min(errors[names.index(n)] for n in found.names) == 2
    assert found.names == sorted(found.names, key=names.index)
    i = found.names.index("class 5")
    assert found.counts[i, found.names.index("class 6")] == 2
    assert (found.totals == 3).all()
    at_most = made_up(truth[:300], truth[:300], names).answers
    assert len(plots.confusion(at_most).names) == plots.MOST_CLASSES


def test_class_accuracies_are_sorted_and_limited_to_the_worst():
    names, values = plots.class_accuracies({"a": 0.5, "b": 1.0, "c": 0.0})
    assert (names, values.tolist()) == (["b", "a", "c"], [1.0, 0.5, 0.0])
    names, values = plots.class_accuracies({str(i): i / 200 for i in range(200)})
    assert names == [str(i) for i in range(plots.FEWER_CLASSES - 1, -1, -1)]
    assert (np.diff(values) <= 0).all()


def test_the_affinity_histogram_counts_every_pair(shared, tmp_path):
    cache, val = food(shared, 4)
    pq.write_table(val, tmp_path / "val.parquet")
    source = open_source(tmp_path / "val.parquet")
    assert evaluate(cache, source, Encoder()).answers.affinities is None
    found = evaluate(cache, source, Encoder(), affinities=True).answers.affinities
    assert found is not None
    affinity = rows_of(val).astype(np.float64) @ cache.keys.T.astype(np.float64)
    same = np.array(val["label"].to_pylist())[:, None] == np.array(cache.labels["label"].to_pylist())[None]
    for counts, values in ((found.same, affinity[same]), (found.other, affinity[~same])):
        assert counts.sum() == len(values)
        expected = np.histogram(values, found.edges)[0]
        assert np.abs(np.cumsum(counts) - np.cumsum(expected)).max() <= 0.001 * len(values) + 2  # rounding at edges
        assert plots.mean_affinity(found, counts) == pytest.approx(values.mean(), abs=1e-3)
    edges, own, others = plots.affinity_bars(found)
    assert len(edges) == len(own) + 1 == len(others) + 1 <= plots.AFFINITY_BARS + 1
    assert (own.sum(), others.sum()) == (pytest.approx(1), pytest.approx(1))
    assert edges[0] <= affinity.min() + 1e-3
    assert edges[-1] >= affinity.max() - 1e-3


def test_keys_of_larger_norm_widen_the_histogram(shared, tmp_path):
    cache, val = food(shared, 1)
    cache = replace(cache, keys=cache.keys * np.float32(3))
    pq.write_table(val.slice(0, 5), tmp_path / "val.parquet")
    found = evaluate(cache, open_source(tmp_path / "val.parquet"), Encoder(), affinities=True).answers.affinities
    affinity = rows_of(val.slice(0, 5)) @ cache.keys.T
    assert affinity.max() > 1.5
    assert found.edges[-1] == pytest.approx(affinity.max(), rel=1e-5)
    assert found.same.sum() + found.other.sum() == affinity.size
    edges, own, others = plots.affinity_bars(Affinities(found.edges, 0 * found.same, 0 * found.other))
    assert (len(edges), own.tolist(), others.tolist()) == (2, [0], [0])
    assert plots.mean_affinity(found, 0 * found.same) is None


# -------------------------------------------------------------------------------------------------------------- drawing


def test_evaluate_writes_plots_and_prints_the_same(run, shared, tmp_path):
    cache, _ = food(shared)
    cache.save(tmp_path / "i")
    test = shared / "data/clip-food9/test.parquet"
    plain = run("evaluate", tmp_path / "i", test, "--json")
    done = run("evaluate", tmp_path / "i", test, "--json", "--plot", tmp_path / "new" / "plots")
    assert done.exit_code == 0
    assert json.loads(done.stdout) == json.loads(plain.stdout)
    assert done.stderr.strip() == f"{tmp_path / 'new' / 'plots'}: {', '.join(FILES)}"
    assert sorted(path.name for path in (tmp_path / "new" / "plots").iterdir()) == sorted(FILES)
    for name in FILES:
        check_png(tmp_path / "new" / "plots" / name, least=20)


ODD = ["$a$_^{", "$", "n\new\x1b[31m", "猫 \u200f", "long " * 40, "\\frac", "%", "x", "y", "z"]


def test_the_search_surface_has_a_panel_for_each_of_the_best_k(tmp_path):
    ks, betas, alphas = [0, 1, 2, 4, 8, 16, 32, 64], np.geomspace(0.1, 100, 9), np.append(0, np.geomspace(1, 1e9, 12))
    rows = [(k, b, a) for k in ks for b in betas for a in alphas]
    accuracy = np.random.default_rng(0).random(len(rows)) * 0.5 + 0.3 + 0.02 * np.array([k == 4 for k, _, _ in rows])
    order = np.random.default_rng(1).permutation(len(rows))
    columns = dict(zip(("k", "beta", "alpha"), map(list, zip(*(rows[i] for i in order), strict=True)), strict=True))
    surface = pa.table(columns | {"accuracy": accuracy[order]})
    panels = plots.surface_panels(surface)
    found = [panel.k for panel in panels]
    best = {k: accuracy[[i for i, row in enumerate(rows) if row[0] == k]].max() for k in ks}
    assert set(found) == set(sorted(ks, key=lambda k: -best[k])[: plots.PANELS])
    assert found == sorted(found, key=lambda k: k or np.inf, reverse=True)
    for panel in panels:
        for (i, j), value in np.ndenumerate(panel.accuracy):
            assert value == accuracy[rows.index((panel.k, panel.betas[i], panel.alphas[j]))]
    plots.draw_surface(surface, tmp_path / "surface.png")
    check_png(tmp_path / "surface.png", least=20)
    plots.draw_surface(surface.slice(0, 1), tmp_path / "one.png")
    check_png(tmp_path / "one.png")
    plots.draw_surface(surface, tmp_path / "surface.svg", "my $index")
    drawn = (tmp_path / "surface.svg").read_text()
    assert drawn.startswith("<?xml")
    assert f"my $index, {datetime.date.today().isoformat()}" in drawn


DEGENERATE = {
    "odd names": made_up(range(10), range(10), ODD, [0.2] * 10, affinities=False, abstain=0.9, coverage=0.0),
    "one item": made_up([0], [0], ["only"], [1.0], abstain=1.0, coverage=1.0, selective_top1=1.0),
    "all wrong": made_up([0], [1], ["a", "b"], [0.5], abstain=1.0, coverage=0.0, mean_per_class=0.0),
    "many classes": made_up(
        np.arange(600) % 150, np.arange(600) % 149, [f"class {i}" for i in range(150)], mean_per_class=0.2
    ),
}


@pytest.mark.parametrize("name", few(DEGENERATE, 2))
def test_degenerate_evaluations_are_drawn(name, tmp_path, recwarn):
    (tmp_path / "coverage.png").write_text("old")
    (tmp_path / "mine.txt").write_text("mine")
    files = plots.write_plots(DEGENERATE[name], tmp_path)
    expected = FILES if DEGENERATE[name].answers.affinities else FILES[:-1]
    assert [file.name for file in files] == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*expected, "mine.txt"])
    for file in files:
        check_png(file)
    assert not [str(w.message) for w in recwarn]


def test_a_bad_plot_folder_and_a_missing_matplotlib_are_reported_first(run, tmp_path, request):
    (tmp_path / "file").write_text("")
    refused = run("evaluate", tmp_path / "no index", tmp_path / "none", "--plot", tmp_path / "file")
    assert refused.exit_code == 2
    assert "file: is a file; " in refused.stderr
    request.getfixturevalue("no_matplotlib")
    with pytest.raises(UsageError, match=r"pip install 'retrieval-tip\[plot\]'"):
        plots.check(tmp_path)
    refused = run("evaluate", tmp_path / "no index", tmp_path / "none", "--plot", tmp_path / "p")
    assert refused.exit_code == 2
    assert "pip install" in refused.stderr
    assert not (tmp_path / "p").exists()
