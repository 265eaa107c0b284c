"""Reports: figures against evaluate and plain NumPy, hostile names, and display in a browser."""

from __future__ import annotations

import base64
import io
import json
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browser import chromium
from click.testing import CliRunner
from conftest import SHARED
from markupsafe import Markup
from PIL import Image
from tables import unit_rows, write_table
from test_html import VOID
from test_plots import made_up

from retrieval_tip.cache_model import CacheModel
from retrieval_tip.cli import main
from retrieval_tip.data.encoder import Encoder
from retrieval_tip.data.sources import open_source
from retrieval_tip.errors import InputError, UsageError, one_line
from retrieval_tip.evaluation import baselines
from retrieval_tip.evaluation.evaluate import Answers, judge
from retrieval_tip.report import plots, report
from retrieval_tip.report.mistakes import MISTAKES, wrong_answers
from retrieval_tip.report.report import wilson, write_report
from retrieval_tip.report.verdict import Way, differ, sentences

pytest.importorskip("matplotlib")

IMAGES = SHARED / "data/caltech101/101_ObjectCategories"
ALIKE = ["chair", "crayfish", "crocodile", "crocodile_head", "lobster", "windsor_chair"]
if IMAGES.is_dir() and not (IMAGES / ALIKE[0]).is_dir():  # others stand in for them
    ALIKE = sorted(folder.name for folder in IMAGES.iterdir())[:6]
MODEL = f"local-dir:{SHARED}/models/lit-mini"
INLINE = {"a", "b", "code", "data", "span"}
HOSTILE = ["<script>alert(1)<", "\"><img src=x onerror='a()'>", "a\nb\x1b[31m", "\u202egnp.exe", "&lt;b&gt; $x^{"]


class Node:
    """An element of a page: its attributes, and what is in it."""

    def __init__(self, name="", attributes=()):
        self.name, self.attributes, self.inside = name, dict(attributes), []

    def all(self, name=None, **attributes):
        for part in self.inside:
            if isinstance(part, Node):
                if name in (None, part.name) and all(
                    part.attributes.get(k.rstrip("_")) == v for k, v in attributes.items()
                ):
                    yield part
                yield from part.all(name, **attributes)

    def first(self, name=None, **attributes):
        return next(self.all(name, **attributes))

    @property
    def text(self):
        """As it is read: inline elements join what is beside them, others do not."""
        parts = (
            part if isinstance(part, str) else part.text if part.name in INLINE else f" {part.text} "
            for part in self.inside
        )
        return " ".join("".join(parts).split())

    def rows(self):
        return [[cell.text for cell in row.all() if cell.name in ("td", "th")] for row in self.all("tr")]


class Tree(HTMLParser):
    """A page as nodes; it has to be well-formed."""

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.open = [Node()]
        self.feed(source)
        self.close()
        assert len(self.open) == 1, f"<{self.open[-1].name}> has no end"

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"<{tag}> has an attribute twice"
        node = Node(tag, attrs)
        self.open[-1].inside.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_startendtag(self, tag, attrs):
        self.open[-1].inside.append(Node(tag, attrs))

    def handle_endtag(self, tag):
        assert self.open.pop().name == tag

    def handle_data(self, data):
        self.open[-1].inside.append(data)


def read(path):
    """A report taken apart, after looking at what every one of them has to be."""
    source = Path(path).read_text(encoding="utf-8")
    assert "\u202e" not in source
    page = Tree(source).open[0]
    ids = set()
    for node in page.all():
        assert node.name not in ("script", "iframe", "object", "embed", "form", "base")
        for name, value in node.attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "action", "srcset", "data", "poster"):
                assert value.startswith(("data:", "#")), value
            for url in (value or "").split("url(")[1:]:
                assert url.startswith("#"), value
            if name == "id":
                assert value not in ids
                ids.add(value)
        if node.name == "img":
            assert node.attributes["alt"]
        if node.name == "svg" and node.attributes.get("aria-hidden") is None:
            assert (node.attributes["role"], bool(node.attributes["aria-label"])) == ("img", True)
    style = page.first("style").text
    assert "url(" not in style
    assert "@import" not in style
    assert [node.name for node in page.all("h1")] == ["h1"]
    assert page.first("html").attributes["lang"] == "en"
    links = {node.attributes["href"] for node in page.all("a")}
    assert links <= {f"#{node.attributes['id']}" for node in page.all() if "id" in node.attributes}
    return page


def section(page, name):
    return page.first("section", id=name)


def figures(page):
    """The headline: exact accuracy, mean of classes and ECE by the way of answering."""
    found = {}
    for row in section(page, "accuracy").first("tbody").all("tr"):
        values = [float(node.attributes["value"]) for node in row.all("data")]
        found[row.first("b").text] = (*values, None)[:3]
    return found


def items(page, which):
    """The test items of a list of mistakes, in its order."""
    return [node.attributes["data-item"] for node in page.first("ol", id=which).all("li", class_="card")]


def done(*arguments, status=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result


@pytest.fixture(scope="module")
def photographs(shared, tmp_path_factory):
    """Shots and test photographs of classes that look alike, and an index of the shots."""
    place = tmp_path_factory.mktemp("photographs")
    for name in ALIKE:
        files = sorted((IMAGES / name).iterdir())
        for part, some in (("shots", files[:4]), ("test", files[-9:]), ("val", files[4:7])):
            (place / part / name).mkdir(parents=True)
            for file in some:
                shutil.copy(file, place / part / name)
    done("-q", "index", "build", "--fit", "none", place / "shots", "--model", MODEL, "--out", place / "index")
    return place


@pytest.fixture(scope="module")
def written(photographs):
    """A report on them, with what was printed."""
    out = photographs / "report.html"
    result = done("-q", "report", photographs / "index", "--test", photographs / "test", "--out", out, "--seeds", 2)
    return out, result


@pytest.fixture(scope="module")
def food(shared, tmp_path_factory):
    """An index of food features, 4 shots, and the test table: no pictures anywhere."""
    data, out = shared / "data/clip-food9", tmp_path_factory.mktemp("food") / "food"
    options = ("--text", data / "text.parquet", "--shots", 4, "--out", out)
    done("-q", "index", "build", "--fit", "none", data / "train.parquet", *options)
    return out, data / "test.parquet"


def made(tmp_path, labels=("cat", "dog", "owl"), text=True, n=24, test_labels=None, noise=0.7, **table):
    """A small index of made features, and a test table, of which some rows are answered wrongly."""
    means, random = unit_rows(len(labels), 16), np.random.default_rng(1)

    def rows(ids, seed):
        found = means[ids] + noise * unit_rows(len(ids), 16, seed)
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    keys = np.repeat(np.arange(len(labels)), 4)
    ids = random.integers(0, len(labels), n) if test_labels is None else np.asarray(test_labels)
    shots = write_table(tmp_path / "shots.parquet", rows(keys, 2), [labels[i] for i in keys])
    test = write_table(tmp_path / "test.parquet", rows(ids, 3), [labels[i] for i in ids], **table)
    words = ("--text", write_table(tmp_path / "text.parquet", means, list(labels))) if text else ()
    done("-q", "index", "build", "--fit", "none", shots, *words, "--out", tmp_path / "index")
    return tmp_path / "index", test


def reported(place, folder, test, *options):
    """A report in this folder, taken apart."""
    done("-q", "report", folder, "--test", test, "--out", place / "r.html", *options)
    return read(place / "r.html")


@pytest.fixture
def drawn():
    """Diagrams are drawn as SVG; without it they are only made, which takes a second less a report."""


@pytest.fixture(scope="module", autouse=True)
def _light_probe():
    """Of a linear probe, only that it is the one of ``evaluate`` is asked here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "STEPS", 10)
        yield


@pytest.fixture(autouse=True)
def _light(request, monkeypatch):
    if "drawn" not in request.fixturenames:

        def made_only(draw, label):
            draw()
            return Markup('<svg role="img" aria-label="{}"></svg>').format(one_line(label))

        monkeypatch.setattr(plots, "svg", made_only)


# ------------------------------------------------------------------------------------------------------------ figures


def test_the_figures_are_those_of_evaluate(written, photographs):
    out, result = written
    page = read(out)
    facts = json.loads(done("-q", "evaluate", photographs / "index", photographs / "test", "--json").stdout)
    found = figures(page)
    assert 0.5 < facts["top1"] < 1
    assert found["Tip-Adapter"] == (facts["top1"], facts["mean_per_class"], facts["ece"])
    assert found["class names only"][0] == facts["zero_shot_top1"]
    assert found["examples only"][0] == facts["cache_top1"]
    shown = section(page, "accuracy").text
    low, high = wilson(round(facts["top1"] * 54), 54)
    assert f"{low:.1%} to {high:.1%}" in shown
    assert (
        result.stdout.strip() == f"{out}: {out.stat().st_size / 1e6:.1f} MB, accuracy {facts['top1']:.4g} on 54 items"
    )
    every = {row[0]: row for row in section(page, "classes").first("table").rows()[1:]}
    assert set(every) == set(ALIKE)
    for name, accuracy in facts["per_class"].items():
        assert every[name][1] == f"{accuracy:.1%}"
        assert every[name][3:5] == ["9", "4"]
    for (true, answer, times), pair in zip(
        facts["confusions"], section(page, "confusions").all("li", class_="pair"), strict=False
    ):
        assert pair.first("h3").text == f"{true} classified as {answer}"
        assert f"{times} of 9 photos" in pair.text


@pytest.mark.parametrize(("hits", "n"), [(0, 7), (7, 7), (1, 1), (879, 999), (3, 10), (1, 10**6)])
def test_an_interval_is_wilsons(hits, n):
    for bound in (found := wilson(hits, n)):  # where the deviation is 1.96 standard errors of the bound itself
        assert (hits / n - bound) ** 2 == pytest.approx(1.959964**2 * bound * (1 - bound) / n, rel=2e-6, abs=1e-12)
    assert 0 <= found[0] <= hits / n <= found[1] <= 1


def log_softmax(z):
    z = z - z.max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def test_parts_are_judged_as_plain_numpy_would(photographs):
    cache = CacheModel.load(photographs / "index", device="cpu", precision="float32")
    rng = np.random.default_rng(0)
    keys = np.asarray(cache.keys, dtype=np.float64)
    rows = keys[rng.integers(0, 24, 90)] + 0.08 * rng.normal(size=(90, cache.d))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    ids = rng.integers(0, 6, 90)
    source = open_source(write_table(photographs / "made.parquet", rows, [ALIKE[i] for i in ids]))
    cache.settings = cache.settings.override(alpha=3.0, temperature=2.5)
    details = judge(cache, Encoder().blocks(source), cache.ids_of(source), details=True).answers.details
    text = cache.settings.logit_scale * rows @ cache.text_weights.numpy().astype(np.float64).T
    alone = 3.0 * np.exp(-cache.settings.beta * (1 - rows @ keys.T)) @ np.eye(6)[cache.class_ids.numpy()]
    whole = log_softmax((text + alone) / 2.5)
    np.testing.assert_allclose(details.log_truth, whole[np.arange(90), ids], rtol=1e-3, atol=1e-3)
    doubt = np.logaddexp.reduce(np.sort(whole, axis=1)[:, :-1], axis=1)
    np.testing.assert_allclose(details.log_doubt, doubt, rtol=1e-3, atol=1e-3)
    for part, logits in ((details.text, text), (details.cache, alone)):
        np.testing.assert_array_equal(part.predicted, logits.argmax(axis=1))
        np.testing.assert_allclose(part.confidence, np.exp(log_softmax(logits)).max(axis=1), rtol=1e-3, atol=1e-4)


def test_the_mistakes_are_the_worst_and_the_most_certain(tmp_path):
    folder, test = made(tmp_path, n=120, noise=2.5)
    page = reported(tmp_path, folder, test, "--no-curves", "--alpha", 2, "--beta", 3)
    cache, table = CacheModel.load(folder, device="cpu"), pq.read_table(test)
    f, own = np.stack(table["feature"].to_numpy()).astype(np.float64), cache.class_ids.numpy()
    truth = np.array([cache.class_names.index(label) for label in table["label"].to_pylist()])
    affinity = f @ np.asarray(cache.keys, dtype=np.float64).T
    logits = 100 * f @ cache.text_weights.numpy().T + 2 * np.exp(-3 * (1 - affinity)) @ np.eye(3)[own]
    wrong, whole = np.flatnonzero(logits.argmax(axis=1) != truth), log_softmax(logits)
    assert len(wrong) > 20
    names = table["id"].to_pylist()
    worst = [names[i] for i in sorted(wrong, key=lambda i: whole[i, truth[i]])[:12]]
    doubt = np.logaddexp.reduce(np.sort(whole, axis=1)[:, :-1], axis=1)
    certain = [names[i] for i in sorted(wrong, key=lambda i: doubt[i])[:12]]
    assert items(page, "worst") == worst
    assert items(page, "certain") == [item for item in certain if item not in worst]
    card, i = page.first("li", id="mistake-1"), names.index(worst[0])
    for name, chance, text, alone in ((row[0].split(" (")[0], *row[1:]) for row in card.first("table").rows()[1:]):
        c = cache.class_names.index(name)
        assert float(chance.strip("<> ").replace("1e-9", "0")) == pytest.approx(np.exp(whole[i, c]), abs=1e-4)
        assert float(text) + float(alone) == pytest.approx(logits[i, c], abs=0.02)
    shown = [float(node.text.split("A ")[1].split()[0]) for node in card.first("ol").all("li")]
    answer, rival = np.argsort(-logits[i])[:2]
    most = np.lexsort((-affinity[i], own != answer))[:5]
    assert shown == pytest.approx([*affinity[i][most], affinity[i][own == rival].max()], abs=6e-4)


def test_ties_go_by_the_order_of_the_source():
    predicted = np.array([1, 1, 1, 0, 1])
    answers = Answers(np.zeros(5, dtype=np.int64), predicted, np.ones(5), ["a", "b"])
    assert wrong_answers(answers, np.array([-2.0, -1, -2, 0, -900])) == [4, 0, 2, 1]


def test_the_curves_are_those_of_a_sweep_and_features_get_placeholders(food, tmp_path):
    folder, test = food
    page = reported(tmp_path, folder, test, "--seeds", 2)
    shots = [f"--shots={n}" for n in (1, 2, 4)]
    done("-q", "sweep", folder, test, *shots, "--seeds", 2, "--results", tmp_path / "r.parquet")
    rows = pq.read_table(tmp_path / "r.parquet").to_pylist()
    shown = section(page, "shots").first("tbody")
    found = {}
    for row in shown.all("tr"):
        cells = [node.text for node in row.all() if node.name in ("th", "td")]
        found[cells[0], int(cells[1])] = (int(cells[2]), float(row.first("data").attributes["value"]))
    assert set(found) == {(method, n) for method in ("zero-shot", "tip-adapter", "cache-alone") for n in (1, 2, 4)}
    for (method, n), (draws, mean) in found.items():
        own = [row["top1"] for row in rows if (row["method"], row["shots"]) == (method, n)]
        assert draws == (1 if n == 4 else 2)
        assert mean == pytest.approx(own[0] if n == 4 else np.mean(own))
    holders = list(page.all("span", role="img"))  # features have no pictures
    assert holders
    assert not list(page.all("img"))
    sources = CacheModel.load(folder, device="cpu").labels["source"]
    assert {holder.text for holder in holders} <= {*pq.read_table(test)["id"].to_pylist(), *sources.to_pylist()}
    assert all(", no preview: " in holder.attributes["aria-label"] for holder in holders)


def test_the_surface_is_that_of_the_shots_and_never_of_the_test(food, tmp_path):
    folder, test = food
    one = section(reported(tmp_path, folder, test, "--no-curves"), "settings")
    table = pq.read_table(test)
    pq.write_table(
        table.set_column(table.column_names.index("label"), "label", table["label"][::-1]), tmp_path / "t.parquet"
    )
    two = section(reported(tmp_path, folder, tmp_path / "t.parquet", "--no-curves"), "settings")
    assert one.text == two.text  # whatever the test says
    assert "36 photos, k = all), not on the test photos" in one.text
    page = reported(tmp_path, folder, test, "--no-curves", "--val", SHARED / "data/clip-food9/train.parquet")
    assert "train.parquet (1,800 photos" in section(page, "settings").text


# ---------------------------------------------------------------------------------------------------- pictures, names


def test_pictures_are_thumbnails_of_the_items_and_their_keys(written, photographs):
    page = read(written[0])
    cards = list(page.first("ol", id="worst").all("li", class_="card"))
    assert 2 < len(cards) <= MISTAKES
    for card in cards:
        (query,) = card.all("img", class_="query")
        assert query.attributes["title"] == card.attributes["data-item"]
        assert len(list(card.all("img", class_="key"))) == 6  # five for the answer, one against it
        data = base64.b64decode(query.attributes["src"].removeprefix("data:image/jpeg;base64,"))
        with (
            Image.open(io.BytesIO(data)) as small,
            Image.open(photographs / "test" / query.attributes["title"]) as large,
        ):
            assert max(small.size) == 180
            assert small.size[0] / small.size[1] == pytest.approx(large.size[0] / large.size[1], rel=0.02)
            pair = [np.asarray(image.convert("L").resize((16, 16)), dtype=float) for image in (small, large)]
        assert np.abs(pair[0] - pair[1]).mean() < 8
    assert written[0].stat().st_size < 2_000_000
    assert not list(page.all("span", role="img"))


def test_a_picture_that_moved_or_changed_is_not_shown(photographs, tmp_path):
    shutil.copytree(photographs / "shots", tmp_path / "shots")
    done("-q", "index", "build", "--fit", "none", tmp_path / "shots", "--model", MODEL, "--out", tmp_path / "i")
    for name in ALIKE[:3]:
        shutil.rmtree(tmp_path / "shots" / name)
    for name in ALIKE[3:]:
        for file in (tmp_path / "shots" / name).iterdir():
            Image.new("RGB", (40, 40), "red").save(file)
    page = reported(tmp_path, tmp_path / "i", photographs / "test", "--no-curves")
    assert {node.attributes["class"].split()[-1] for node in page.all("span", role="img")} == {"key", "small"}
    assert not list(page.all("img", class_="key"))
    assert list(page.all("img", class_="query"))


def test_ids_of_an_encoded_table_find_their_pictures(photographs, tmp_path):
    table = tmp_path / "test.parquet"
    done("-q", "encode", photographs / "test", "--model", MODEL, "--out", table)
    assert list(reported(tmp_path, photographs / "index", table, "--no-curves").all("img", class_="query"))


@pytest.mark.usefixtures("drawn")
def test_a_diagram_takes_any_name(recwarn):
    names = ["font: 1px '", "<!--", "--><style>", "#222222", '"><g id="', "</svg>", "$x^{", "\ud800"]
    evaluation = made_up(np.arange(16) % 8, np.arange(16) // 2, names)
    for draw in (plots.draw_confusion, plots.draw_per_class, plots.draw_affinity):
        (drawn,) = Tree(plots.svg(lambda draw=draw: draw(evaluation), "'\"<b>")).open[0].all("svg")
        assert drawn.attributes["aria-label"] == "'\"<b>"
        assert not list(drawn.all("style"))
        assert not list(drawn.all("metadata"))
        if draw is not plots.draw_affinity:
            texts = [node.text for node in drawn.all("text")]
            assert {name if name != "\ud800" else "\\ud800" for name in names} <= set(texts)
    assert not recwarn.list


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize("date", ["-", "", "9" * 30])
def test_a_diagram_reads_no_date_of_the_environment(date, monkeypatch, tmp_path):
    evaluation, drawn = made_up([0, 1], [1, 0], ["cat", "dog"]), []
    for value in (None, date):
        if value is not None:
            monkeypatch.setenv("SOURCE_DATE_EPOCH", value)
        drawn.append(plots.svg(lambda: plots.draw_confusion(evaluation), "x"))
        plots.write(lambda: plots.draw_confusion(evaluation), tmp_path / "x.svg", "x")
    assert drawn[0] == drawn[1]
    assert "<dc:date>" not in (tmp_path / "x.svg").read_text()  # it stands in the diagram


def test_the_cell_of_a_setting_is_the_next_one_by_ratio():
    panel = plots.Panel(0, np.array([0, 1.0, 10, 100]), np.array([0.5, 1, 2]), np.zeros((3, 4)))
    for (alpha, beta), cell in {(0, 1): (1, 0), (4, 1.3): (1, 2), (3, 1.5): (2, 1), (1e9, 0): (0, 3)}.items():
        assert panel.nearest(alpha, beta) == cell


@pytest.mark.usefixtures("drawn")
def test_hostile_names_stay_names(tmp_path):
    labels = [f"{name}{i}" for i, name in enumerate(HOSTILE)]
    ids = np.random.default_rng(0).integers(0, 5, 60)
    folder, test = made(tmp_path, labels, test_labels=ids, noise=2.5, ids=[f"{HOSTILE[i % 5]}/{i}" for i in range(60)])
    place = tmp_path / HOSTILE[0]
    place.mkdir()
    shutil.move(folder, place / "in'dex\"")
    moved = shutil.move(test, place / "t<b>.parquet")
    page = reported(tmp_path, place / "in'dex\"", moved, "--where", "label <> '<i>'")
    assert 'Accuracy of "in\'dex"" on "t<b>.parquet"' in page.first("h1").text
    assert "label <> '<i>'" in section(page, "provenance").text
    shown = {row[0] for row in section(page, "classes").first("table").rows()[1:]}
    assert shown == {one_line(label) for label in labels}
    assert not list(page.all("b", onerror="a()"))


# ------------------------------------------------------------------------------------------------------- other indexes


@pytest.mark.usefixtures("drawn")
def test_a_fine_tuned_index_is_set_beside_what_it_was_made_from(photographs, tmp_path):
    tuned = tmp_path / "tuned"
    done("-q", "finetune", photographs / "index", "--out", tuned, "--views-cache", 1, "--epochs", 3, "--keep-last")
    page = reported(tmp_path, tuned, photographs / "test")
    found = figures(page)
    before, after = (
        json.loads(done("-q", "evaluate", folder, photographs / "test", "--json").stdout)
        for folder in (photographs / "index", tuned)
    )
    assert found["Tip-Adapter"] == (before["top1"], before["mean_per_class"], before["ece"])
    assert found["Tip-Adapter-F"] == (after["top1"], after["mean_per_class"], after["ece"])
    assert "/index, version 1, before fine-tuning" in section(page, "accuracy").text
    training = section(page, "training").text
    assert "epoch 3 was kept" in training
    assert "weight_decay" in training
    for name in ("shots", "settings"):
        assert "Not shown: " in section(page, name).text
        assert "fine-tuned" in section(page, name).text
    away = shutil.copytree(photographs / "index", tmp_path / "away")
    done("-q", "finetune", away, "--out", tuned, "--views-cache", 1, "--epochs", 1, "--keep-last")
    shutil.rmtree(away)
    page = reported(tmp_path, tuned, photographs / "test")
    assert "Tip-Adapter" not in figures(page)
    assert f"{tmp_path.name}/away, cannot be used" in section(page, "accuracy").text


def test_a_fitted_index_is_set_beside_what_else_its_shots_allow(tmp_path):
    folder, test = made(tmp_path)
    results = tmp_path / "runs.parquet"
    rivals = ["--method", "class-means", "--method", "linear-probe", "--method", "untouched"]
    done("-q", "sweep", folder, test, "--shots", 4, "--seeds", 1, *rivals, "--results", results)
    accuracy = {row["method"]: row["top1"] for row in pq.read_table(results).to_pylist()}
    done("-q", "fit", folder)
    page = reported(tmp_path, folder, test, "--shots", 4)
    ways = {name: way[0] for name, way in figures(page).items()}
    assert set(ways) == {"class names only", "examples only", "class means", "linear probe", "Tip-Adapter", "fitted"}
    same = {"class-means": "class means", "linear-probe": "linear probe", "untouched": "Tip-Adapter"}
    assert accuracy == {name: ways[shown] for name, shown in same.items()}
    rows = section(page, "shots").first("table").rows()[1:]
    assert {row[0] for row in rows} == {"zero-shot", "tip-adapter", "closed-form"}


def test_the_verdict_comes_first_and_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, test = made(tmp_path, n=60, noise=2.0)
    page = reported(tmp_path, folder, test, "--no-curves")
    facts = json.loads(done("-q", "evaluate", folder, test, "--json").stdout)
    verdict = page.first("div", class_="verdict").text
    assert f"{round(60 * facts['top1'])} of 60 test photos were classified correctly: {facts['top1']:.1%}" in verdict
    alone, names = facts["cache_top1"], facts["zero_shot_top1"]
    assert f"The examples alone reach {alone:.1%}, the class names alone {names:.1%}" in verdict
    truth, answer, times = facts["confusions"][0]
    assert f"{truth} classified as {answer} ({times} times)" in verdict
    weakest = min(facts["per_class"], key=facts["per_class"].get)
    assert f"The weakest class is {weakest}: " in verdict
    first = page.first("ol", class_="actions").first("li")
    command = first.first("code").text
    assert first.text.startswith("Fit the index: ")
    assert command == "retrieval-tip fit index"
    done("-q", *command.split()[1:])
    after = list(reported(tmp_path, folder, test, "--no-curves").all("ol", class_="actions"))
    assert not after or "Fit the index" not in after[0].text


def test_the_verdict_spells_the_best_rival_as_it_is_called():
    right = np.array([True, False])
    ways = [Way(name, "", share, 0, 1, share, None, right) for name, share in
            (("examples only", 0.4), ("linear probe", 0.5), ("Tip-Adapter", 0.6), ("fitted", 0.7))]  # fmt: skip
    answers = SimpleNamespace(confidence=np.zeros(2), right=right)
    judged = SimpleNamespace(evaluation=SimpleNamespace(n=2, ece=0.1, confusions=[], answers=answers))
    assert "The examples alone reach 40.0%" in (said := " ".join(sentences(judged, ways)))
    assert "Tip-Adapter, reaches 60.0%" in said


def test_weak_classes_want_photographs_and_contradicted_shots_a_look(tmp_path):
    labels = ["cat", "dog", "owl"]
    folder, test = made(tmp_path, labels, n=40, noise=0.3, text=False)
    labels = CacheModel.load(folder, device="cpu").labels
    cats, owls = ([row["key_id"] for row in labels.to_pylist() if row["label"] == name] for name in ("cat", "owl"))
    moved = [*cats[:3], owls[0]]  # three of four, and one
    done("-q", "index", "relabel", folder, "dog", "--key-ids", ",".join(map(str, moved)))
    said = reported(tmp_path, folder, test, "--no-curves").first("ol", class_="actions").text
    assert "Add photos of cat" in said
    assert "1 example looks mislabelled" in said
    assert "Check the labels" in said


@pytest.mark.parametrize(("one", "other", "differs"), [(5, 5, False), (9, 1, True), (4, 0, True), (3, 0, False)])
def test_ways_differ_by_more_than_chance(one, other, differs):
    """Of these numbers of items that only one of them, or only the other, answers right."""
    first = np.array([True] * (20 + one) + [False] * other)
    second = np.array([True] * 20 + [False] * one + [True] * other)
    assert differ(first, second) == differ(second, first) == differs


def test_an_index_without_text_has_no_zero_shot(tmp_path):
    folder, test = made(tmp_path, text=False)
    page = reported(tmp_path, folder, test, "--shots", 2)
    assert set(figures(page)) == {"examples only", "class means", "linear probe", "Tip-Adapter"}
    assert "no text weights" in section(page, "accuracy").text
    assert {row[0] for row in section(page, "shots").first("table").rows()[1:]} == {"cache-alone"}


@pytest.mark.usefixtures("drawn")
def test_a_test_without_mistakes_has_no_list_of_them(tmp_path):
    folder, test = made(tmp_path, noise=0.1)
    page = reported(tmp_path, folder, test, "--no-curves")
    assert "No mistakes in 24 test photos." in section(page, "mistakes").text
    assert section(page, "confusions").text == "Confusions No confusions."


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize("labels", [("cat", "dog", "owl"), ("cat",)])
def test_a_test_of_one_class(labels, tmp_path):
    folder, test = made(tmp_path, labels, test_labels=[0] * 7, noise=2.5)
    page = reported(tmp_path, folder, test)
    assert [row[0] for row in section(page, "classes").first("table").rows()] == ["class", "cat"]
    said = "2 of the 3 classes in the index have no test photo"
    assert (said in page.first("header").text) == (len(labels) == 3)


def test_a_missing_diagram_says_why(tmp_path, monkeypatch):
    table = write_table(tmp_path / "one.parquet", unit_rows(3, 8), ["a", "a", "b"])
    done("-q", "index", "build", "--fit", "none", table, "--out", tmp_path / "one")
    page = reported(tmp_path, tmp_path / "one", table)
    assert "Not shown: class 'b' has one example" in section(page, "shots").text
    assert "class 'b' has one image" in section(page, "settings").text
    folder, test = made(tmp_path)
    monkeypatch.setattr(report, "SURFACE_KEYS", 11)
    monkeypatch.setattr(report, "CURVE_KEYS", 2)
    page = reported(tmp_path, folder, test)
    assert "3 classes are more than 2" in section(page, "shots").text
    assert "12 examples are more than 11" in section(page, "settings").text
    monkeypatch.setattr(report, "CURVE_KEYS", 6)
    monkeypatch.setattr(report, "SURFACE_KEYS", 12)
    monkeypatch.setattr(report, "SURFACE_QUERIES", 5)
    page = reported(tmp_path, folder, test)
    assert "Draws of more than 6 examples are skipped." in section(page, "shots").text
    assert {row[1] for row in section(page, "shots").first("table").rows()[1:]} == {"1", "2"}
    assert "5 photos, k = all" in section(page, "settings").text


def test_settings_say_where_they_come_from(tmp_path):
    folder, test = made(tmp_path)
    done("-q", "search-hp", folder, "--leave-one-out", "--greedy")
    page = reported(tmp_path, folder, test, "--no-curves", "--beta", 7, "-k", 4, "--no-tail")
    rows = {row[0]: row[1:] for row in section(page, "provenance").first("table").rows()}
    kept = CacheModel.load(folder, device="cpu")
    assert rows["alpha"] == [f"{kept.settings.alpha:.4g}", "search-hp"]
    assert rows["beta"] == ["7", f"set for this report; the index has {kept.settings.beta:.4g}"]
    assert rows["k"][0] == "4"
    assert rows["tail"] == ["False", "set for this report; the index has True"]
    assert "its own shots, each " in section(page, "provenance").text
    assert "version 2," in section(page, "provenance").text
    done("-q", "search-hp", folder, "--val", test, "--val-shots", "all")
    page = reported(tmp_path, folder, test, "--no-curves")
    assert "selected on these test photos" in page.first("header").text


def test_test_items_that_are_keys_are_counted(photographs, tmp_path):
    shutil.copytree(photographs / "test", tmp_path / "test")
    for file in sorted((photographs / "shots" / ALIKE[0]).iterdir())[:2]:
        shutil.copy(file, tmp_path / "test" / ALIKE[4] / f"x{file.name}")
    page = reported(tmp_path, photographs / "index", tmp_path / "test", "--no-curves")
    assert "2 of 56 test photos are also in the index" in page.first("header").text


# ------------------------------------------------------------------------------------------------- what can go wrong


def test_items_that_could_not_be_read_are_named(photographs, tmp_path):
    shutil.copytree(photographs / "test", tmp_path / "test")
    bad = tmp_path / "test" / ALIKE[0] / "<b>ad.jpg"
    bad.write_bytes(b"\xff\xd8\xff nothing")
    arguments = (
        "report", photographs / "index", "--test", tmp_path / "test", "--out", tmp_path / "r.html", "--no-curves",
    )  # fmt: skip
    result = done(*arguments, status=3)
    assert "1 input could not be read" in result.stderr
    assert "on 54 items" in result.stdout
    page = read(tmp_path / "r.html")
    assert "1 photo could not be read" in page.first("header").text
    said = section(page, "provenance").text
    assert "54 classified, 1 could not be read" in said
    assert f"{ALIKE[0]}/<b>ad.jpg: " in said
    assert str(tmp_path) not in (tmp_path / "r.html").read_text()
    out = (tmp_path / "r.html").read_bytes()
    refused = done(*arguments, "--strict", status=1)
    assert "<b>ad.jpg" in refused.stderr
    assert (tmp_path / "r.html").read_bytes() == out


def test_after_a_failure_nothing_was_written(tmp_path, monkeypatch):
    folder, test = made(tmp_path)
    out = tmp_path / "r.html"
    unknown = write_table(tmp_path / "u.parquet", unit_rows(2, 16), ["cat", "unicorn"])
    kept = write_table(tmp_path / "kept.html", unit_rows(1, 3))
    before = sorted(tmp_path.iterdir())
    for arguments, status, said in (
        (("--test", unknown, "--out", out), 1, "unicorn"),
        (("--test", tmp_path / "none", "--out", out), 1, "no such file"),
        (("--test", test, "--out", tmp_path / "no" / "r.html"), 1, f"there is no folder {tmp_path / 'no'}"),
        (("--test", test, "--out", folder), 2, "is a directory"),
        (("--test", test, "--out", out, "--shots", 5), 2, "shots 5: class 'cat' has 4 keys"),
        (("--test", test, "--out", out, "--shots", 1, "--no-curves"), 2, "--shots and --no-curves"),
        (("--test", test, "--out", out, "--val", test), 2, "is the test source"),
        (("--test", test, "--out", out, "--val", unknown), 1, "unicorn"),
        (("--out", out), 2, "--test"),
    ):
        refused = done("report", folder, *arguments, status=status)
        assert said in refused.stderr
        assert refused.stdout == ""
    monkeypatch.setattr(report, "render", lambda *_, **__: "\ud800")
    with pytest.raises(UnicodeEncodeError):
        done("report", folder, "--test", test, "--out", kept)
    assert sorted(tmp_path.iterdir()) == before


def test_a_missing_matplotlib_is_reported_before_any_work(tmp_path, no_matplotlib):
    refused = done("report", tmp_path / "none", "--test", tmp_path / "none", "--out", tmp_path / "r.html", status=2)
    assert "a report needs matplotlib: pip install 'retrieval-tip[plot]'" in refused.stderr


def test_from_python(tmp_path):
    folder, test = made(tmp_path)
    cache, source = CacheModel.load(folder, device="cpu"), open_source(test)
    found = write_report(cache, source, Encoder(), tmp_path / "r.html", seeds=1, shots=[1])
    assert found.path.stat().st_size == found.bytes
    assert found.left_out == {}
    page = read(found.path)
    assert figures(page)["Tip-Adapter"][0] == found.evaluation.top1
    assert page.first("h1").text == 'Accuracy of "index" on "test.parquet"'
    loose = cache.take(np.arange(cache.n))
    found = write_report(loose, source, Encoder(), tmp_path / "r.html", curves=False)
    assert set(found.left_out) == {"shots"}
    assert "Accuracy of an index on" in read(found.path).first("h1").text
    with pytest.raises(UsageError, match="seeds is 0"):
        write_report(cache, source, Encoder(), tmp_path / "r.html", seeds=0)
    with pytest.raises(InputError, match="is a folder"):
        write_report(cache, source, Encoder(), tmp_path)


def test_a_manifest_may_say_anything(tmp_path):
    folder, test = made(tmp_path)
    cache = CacheModel.load(folder, device="cpu")
    odd = {"alpha": {"<b>": ["<i>", 1.5, None]}, "search": ["x"], "source": "\u202e<u>", "skipped": ["<s>"] * 99}
    for parent in ("\0", str(folder), 7):
        odd |= {"finetune": {"parent": parent, "parent_version": 9, "epoch": "<b>", "train": ["<script>"]}}
        curve = pa.table({"epoch": ["<b>"]})
        strange = replace(cache, provenance=odd, curve=curve, settings=cache.settings.override(temperature=2.0))
        found = write_report(strange, open_source(test), Encoder(), tmp_path / "r.html")
        assert set(found.left_out) == {"shots", "settings", "training"}
        page = read(found.path)
        assert "The index before fine-tuning is not in this table" in section(page, "accuracy").text
        assert "<i>, 1.5, -" in section(page, "provenance").text


# ------------------------------------------------------------------------------------------------------------ a browser


@pytest.mark.skipif(not Path("/usr/bin/chromium").exists(), reason="SKIPPED: no Chromium here")
def test_a_browser_without_network_shows_it(written):
    said, asked = [], []
    with chromium() as browser:
        for width, scheme in ((1200, "light"), (360, "dark")):
            context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True)
            page = context.new_page()
            page.on("console", lambda message: said.append(message.text))
            page.on("pageerror", lambda error: said.append(str(error)))
            page.on("request", lambda request: asked.append(request.url))
            page.goto(written[0].as_uri())
            for summary in page.query_selector_all("summary"):
                summary.click()
            wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert wide == 0, f"{width} px: sticks out by {wide} px"
            broken = "[...document.images].filter(image => !image.complete || !image.naturalWidth).length"
            assert page.evaluate(broken) == 0
            light = page.evaluate("getComputedStyle(document.body).backgroundColor").removeprefix("rgb(")
            assert (int(light.partition(",")[0]) > 200) == (scheme == "light")
            context.close()
    assert said == []
    assert {url for url in asked if not url.startswith("data:")} == {written[0].as_uri()}
