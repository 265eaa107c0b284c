"""Reports: figures against evaluate and plain NumPy, hostile names, and display in a browser."""

import base64
import io
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from browser import chromium
from conftest import SHARED, command_line, json_rows
from dense import affinity, cache_logits
from html_tree import Tree
from numpy.random import default_rng
from PIL import Image
from tables import unit_rows, write_table

from retrieval_tip.backbones.base import Identity
from retrieval_tip.backbones.loading import load_backbone
from retrieval_tip.data.reader import Reader
from retrieval_tip.data.sources import open_source
from retrieval_tip.evaluation.evaluate import Answers
from retrieval_tip.fit import finetune
from retrieval_tip.fit.closed_form import wilson
from retrieval_tip.model import Index
from retrieval_tip.report import report
from retrieval_tip.report.report import MISTAKES, write_report
from retrieval_tip.settings import Recipe
from retrieval_tip.wording import one_line, percent

IMAGES = SHARED / "data/caltech101/101_ObjectCategories"
ALIKE = ["chair", "crayfish", "crocodile", "crocodile_head", "lobster", "windsor_chair"]
if IMAGES.is_dir() and not (IMAGES / ALIKE[0]).is_dir():  # use other classes instead
    ALIKE = sorted(folder.name for folder in IMAGES.iterdir())[:6]
MODEL = f"local-dir:{SHARED}/models/lit-mini"
HOSTILE = [
    "<script>alert(1)<",
    "\"><img src=x onerror='a()'>",
    "a\nb\x1b[31m",
    "\u202egnp.exe",
    "&lt;b&gt; $x^{",
]


def read(path):
    """Check what all reports have in common, and return the report as nodes."""
    source = Path(path).read_text(encoding="utf-8")
    assert not [part for part in ("\u202e", "url(", "@import") if part in source]
    page = Tree(source).root
    for node in page.all():
        assert node.name not in ("a", "script", "iframe", "object", "embed", "form", "base")
        assert not [name for name in node.attributes if name.startswith("on")]
        assert all(
            node.attributes.get(name, "data:").startswith("data:")
            for name in ("src", "href", "srcset")
        )
        assert node.attributes["alt"] if node.name == "img" else True
    ids = [node.attributes["id"] for node in page.all() if "id" in node.attributes]
    assert len(ids) == len(set(ids))
    assert [node.name for node in page.all("h1")] == ["h1"]
    assert page.first("html").attributes["lang"] == "en"
    return page


def section(page, name):
    return page.first("section", id=name)


def tiles(page):
    """The exact accuracies at the top, by what they count."""
    found = page.first("dl", class_="numbers").all("div")
    return {tile.first("dt").text: float(tile.first("data").attributes["value"]) for tile in found}


def advice(page):
    """The recommendations in order."""
    return [node.text for found in page.all("ol", class_="actions") for node in found.all("li")]


def done(*arguments, status=0):
    result = command_line(*arguments)
    assert result.exit_code == status, result.output
    return result


def evaluated(*arguments):
    """Return what ``evaluate --json`` prints."""
    return json.loads(done("-q", "evaluate", *arguments, "--json").stdout)


@pytest.fixture(scope="module")
def caltech(shared, tmp_path_factory):
    """Shots and test photos of classes that look alike, and an index of the shots."""
    place = tmp_path_factory.mktemp("caltech")
    for name in ALIKE:
        files = sorted((IMAGES / name).iterdir())
        for part, some in (("shots", files[:4]), ("test", files[-9:]), ("val", files[4:7])):
            (place / part / name).mkdir(parents=True)
            for file in some:
                shutil.copy(file, place / part / name)
    done(
        "-q",
        "index",
        "build",
        "--fit",
        "none",
        place / "shots",
        "--model",
        MODEL,
        "--out",
        place / "index",
    )
    return place


@pytest.fixture(scope="module")
def written(caltech):
    """A report on the index of ``caltech``, and the output of the command."""
    out = caltech / "report.html"
    result = done("evaluate", caltech / "index", caltech / "test", "--report", out)
    return out, result


def made(
    tmp_path, labels=("cat", "dog", "owl"), text=True, n=24, test_labels=None, noise=0.7, **table
):
    """A small index of synthetic features, and a test table in which some answers are wrong."""
    means = unit_rows(len(labels), 16)
    random = default_rng(1)

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
    """Write a report into a folder, and return it as nodes."""
    done("-q", "evaluate", folder, test, "--report", place / "r.html", *options)
    return read(place / "r.html")


def test_the_figures_equal_those_of_evaluate(written, caltech):
    out, result = written
    page = read(out)
    facts = evaluated(caltech / "index", caltech / "test")
    assert 0.5 < facts["top1"] < 1
    assert tiles(page) == {
        "correct": facts["top1"],
        "true class among the top five": facts["top5"],
        "correct with examples only": facts["cache_top1"],
        "correct with class names only": facts["zero_shot_top1"],
    }
    low, high = wilson(facts["top1"], 54)
    assert f"{100 * low:.0f} to {100 * high:.0f} %" in page.first("div", class_="verdict").text
    assert f"{percent(facts['top1'])} of 54 photos (95 % interval" in result.stdout.splitlines()[0]
    assert result.stderr.splitlines()[-1] == f"Report: {out}"
    every = {row[0]: row for row in section(page, "classes").first("table").rows()[1:]}
    assert set(every) == set(ALIKE)
    for name, accuracy in facts["per_class"].items():
        assert every[name][1] == percent(accuracy)
        assert every[name][3:5] == ["9", "4"]
    often = [(true, answer, times) for true, answer, times in facts["confusions"] if times > 1]
    for (true, answer, times), pair in zip(
        often, section(page, "confusions").all("li", class_="pair"), strict=True
    ):
        assert pair.first("h3").text == f"{true} classified as {answer}"
        assert f"{times} of 9 photos" in pair.text


def answers_of(truth, predicted, names):
    """Return these answers, which are equally probable."""
    n = len(truth)
    truth = np.asarray(truth)
    predicted = np.asarray(predicted)
    even = np.full(n, 0.5)
    return Answers(
        truth,
        predicted[:, None],
        even,
        np.arange(n),
        np.log(even),
        names,
        len(names),
        np.zeros(n, bool),
    )


def test_confusion_counts_every_pair_but_unknown_photos_without_a_match():
    truth = np.array([0, 1, 3, 3, 3])  # class 2 does not occur
    predicted = np.array([0, 0, 1, 1, 0])
    no_match = np.array([False, True, True, False, False])
    answers = answers_of(truth, predicted, ["a", "b", "never", "new"])
    answers = replace(answers, n_classes=3, no_match=no_match)
    assert answers.right.tolist() == [True, False, True, False, False]
    found = report.confusion_matrix(answers)
    assert (found.names, found.of) == (["a", "b", "new"], 3)
    assert found.counts.tolist() == [[1, 0, 0], [1, 0, 0], [1, 1, 0]]
    assert found.totals.tolist() == [1, 1, 3]


def test_only_the_most_confused_of_many_classes_are_shown():
    c = report.MATRIX + 60
    names = [f"class {i}" for i in range(c)]
    truth = np.repeat(np.arange(c), 3)
    predicted = truth.copy()
    confused = np.arange(5, 5 + 3 * 30, 3)  # thirty pairs of neighbours, each confused twice
    for i in confused:
        predicted[3 * i : 3 * i + 2] = i + 1
    found = report.confusion_matrix(answers_of(truth, predicted, names))
    assert found.of == c
    assert len(found.names) == report.MATRIX
    errors = Counter(
        np.concatenate([truth[truth != predicted], predicted[truth != predicted]]).tolist()
    )
    assert min(errors[names.index(n)] for n in found.names) == 2
    assert found.names == sorted(found.names, key=names.index)
    i = found.names.index("class 5")
    assert found.counts[i, found.names.index("class 6")] == 2
    assert (found.totals == 3).all()


def test_the_worst_mistakes_are_explained(tmp_path):
    folder, test = made(tmp_path, n=120, noise=2.5)
    page = reported(tmp_path, folder, test, "--alpha", 2, "--beta", 3)
    cache = Index.load(folder)
    table = pq.read_table(test)
    f = np.stack(table["feature"].to_numpy()).astype(np.float64)
    own = cache.class_ids.numpy()
    truth = np.array([cache.class_names.index(label) for label in table["label"].to_pylist()])
    A = affinity(f, cache.keys)
    logits = 100 * affinity(f, cache.text_weights) + 2 * cache_logits(A, own, 3, 3)
    wrong = np.flatnonzero(logits.argmax(axis=1) != truth)
    whole = torch.from_numpy(logits).log_softmax(1).numpy()
    assert len(wrong) > 20
    names = table["id"].to_pylist()
    expected = [names[i] for i in sorted(wrong, key=lambda i: whole[i, truth[i]])[:12]]
    cards = list(page.first("ol", class_="cards").all("li", class_="card"))
    assert [card.attributes["data-item"] for card in cards] == expected
    i = names.index(expected[0])
    for name, chance in cards[0].first("table").rows():
        shown = float(chance.strip("<> %")) / 100
        assert shown == pytest.approx(np.exp(whole[i, cache.class_names.index(name)]), abs=1e-3)
    shown = [float(node.text.split()[-1]) for node in cards[0].first("ol").all("li")][:5]
    most = np.sort(A[i][own == logits[i].argmax()])[::-1]  # the contribution of other classes is 0
    assert shown[:4] == pytest.approx(np.exp(-3 * (1 - most)), rel=0.06)
    assert shown[4] == 0


def test_probabilities_are_compared_with_the_accuracy(tmp_path):
    folder, test = made(tmp_path, n=200, noise=2)
    page = reported(tmp_path, folder, test, "--abstain", 0.7)
    facts = evaluated(folder, test, "--abstain", 0.7)
    answers = pa.Table.from_pylist(
        json_rows(command_line("classify", folder, test, "--format", "json"))
    )
    p = answers["probability"].to_numpy()
    right = np.array(answers["label"].to_pylist()) == pq.read_table(test)["label"].to_numpy()
    bins, thresholds = (table.rows()[1:] for table in section(page, "probabilities").all("table"))
    assert sum(int(row[1]) for row in bins) == 200
    for name, *row in bins:
        low, _, high, _ = name.split()
        own = (p > float(low) / 100) & (p <= float(high) / 100)
        assert row[:3] == [str(own.sum()), percent(p[own].mean()), percent(right[own].mean())]
    for (name, *row), least in zip(thresholds, (0, 0.5, 0.7, 0.9, 0.99), strict=False):
        own = p >= least
        assert name == f"at least {100 * least:g} %"
        assert row[:3] == [str(own.sum()), percent(own.mean()), percent(right[own].mean())]
    assert thresholds[2][2:4] == [percent(facts["coverage"]), percent(facts["selective_top1"])]
    assert f"calibration error is {facts['ece']:.3f}" in section(page, "probabilities").text


def test_pictures_are_thumbnails_of_the_photos_and_their_keys(written, caltech):
    page = read(written[0])
    cards = list(page.first("ol", class_="cards").all("li", class_="card"))
    assert 2 < len(cards) <= MISTAKES
    for card in cards:
        (query,) = card.all("img", class_="query")
        assert query.attributes["title"] == card.attributes["data-item"]
        assert len(list(card.all("img", class_="key"))) == 6  # five for the answer, one against it
        data = base64.b64decode(query.attributes["src"].removeprefix("data:image/jpeg;base64,"))
        with (
            Image.open(io.BytesIO(data)) as small,
            Image.open(caltech / "test" / query.attributes["title"]) as large,
        ):
            assert max(small.size) == 180
            pair = [
                np.asarray(image.convert("L").resize((16, 16)), dtype=float)
                for image in (small, large)
            ]
        assert np.abs(pair[0] - pair[1]).mean() < 8
    assert written[0].stat().st_size < 2_000_000
    assert not list(page.all("span", role="img"))


def test_a_picture_that_moved_or_changed_is_not_shown(caltech, tmp_path):
    shutil.copytree(caltech / "shots", tmp_path / "shots")
    done(
        "-q",
        "index",
        "build",
        "--fit",
        "none",
        tmp_path / "shots",
        "--model",
        MODEL,
        "--out",
        tmp_path / "i",
    )
    for name in ALIKE[:3]:
        shutil.rmtree(tmp_path / "shots" / name)
    for name in ALIKE[3:]:
        for file in (tmp_path / "shots" / name).iterdir():
            Image.new("RGB", (40, 40), "red").save(file)
    page = reported(tmp_path, tmp_path / "i", caltech / "test")
    assert {node.attributes["class"].split()[-1] for node in page.all("span", role="img")} == {
        "key",
        "small",
    }
    assert not list(page.all("img", class_="key"))
    assert list(page.all("img", class_="query"))


def test_hostile_names_are_shown_as_text(tmp_path, monkeypatch):
    labels = [f"{name}{i}" for i, name in enumerate(HOSTILE)]
    ids = default_rng(0).integers(0, 5, 60)
    folder, test = made(
        tmp_path,
        labels,
        test_labels=ids,
        noise=2.5,
        ids=[f"{HOSTILE[i % 5]}/{i}" for i in range(60)],
    )
    place = tmp_path / HOSTILE[0]
    place.mkdir()
    shutil.move(folder, place / "in'dex\"")
    moved = shutil.move(test, place / "t<b>.parquet")
    where = ("--where", "label <> '<i>'")
    monkeypatch.setattr("sys.argv", ["", "evaluate", *where])
    page = reported(tmp_path, place / "in'dex\"", moved, *where)
    assert 'Accuracy of "in\'dex"" on "t<b>.parquet"' in page.first("h1").text
    assert "retrieval-tip evaluate --where 'label <> " in section(page, "provenance").text
    assert "<i>" in section(page, "provenance").text
    shown = {row[0] for row in section(page, "classes").first("table").rows()[1:]}
    assert shown == {one_line(label) for label in labels}
    assert not list(page.all("b", onerror="a()"))


def test_recommendations_depend_on_how_the_index_was_fitted(caltech, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, test = made(tmp_path)
    (fit,) = [said for said in advice(reported(tmp_path, folder, test)) if said.startswith("Fit")]
    command = fit.partition(". ")[2]
    assert command == "retrieval-tip fit index"
    done("-q", *command.split()[1:])
    tuned = tmp_path / "tuned"
    own = Index.load(caltech / "index")
    monkeypatch.setattr(finetune, "VIEWS", 1)
    finetune.finetune(
        own, finetune.shots_of(own), Reader(load_backbone(MODEL)), Recipe(epochs=1)
    ).save(tuned)
    for index, photos in ((folder, test), (tuned, caltech / "test")):
        page = reported(tmp_path, index, photos)
        assert not [said for said in advice(page) if said.startswith("Fit")]
        assert tiles(page)["correct"] == evaluated(index, photos)["top1"]


def test_the_report_names_the_weakest_class_and_the_labels_of_an_audit(tmp_path):
    labels = ["cat", "dog", "owl"]
    folder, test = made(
        tmp_path, labels, test_labels=[0] * 6 + [1] * 20 + [2] * 20, noise=0.3, text=False
    )
    rows = Index.load(folder).labels.to_pylist()
    cats, owls = (
        [row["key_id"] for row in rows if row["label"] == name] for name in ("cat", "owl")
    )
    moved = [*cats[:3], owls[0]]  # three of the four cats, and one owl
    done("-q", "index", "relabel", folder, "dog", "--key-ids", ",".join(map(str, moved)))
    twice = write_table(tmp_path / "t.parquet", np.asarray(Index.load(folder).keys)[-1:], ["cat"])
    done("-q", "index", "add", folder, twice)  # a copy of an example of another class
    said = advice(reported(tmp_path, folder, test))
    right = evaluated(folder, test)["per_class"]["cat"]
    assert said[0].startswith(f"cat: {100 * right:.0f} %, ")
    assert f"add photos to its 2 examples ({round((1 - right) * 6)} times" in said[0]
    listed = done("-q", "index", "audit", folder, "--format", "json").stdout.splitlines()
    assert any(json.loads(line)["duplicate_of"] is not None for line in listed)
    assert [one for one in said if one.startswith(f"Check {len(listed)} labels: ")]


def test_the_report_names_the_source_of_the_settings(tmp_path):
    folder, test = made(tmp_path)
    done("-q", "search-hp", folder)
    provenance = section(reported(tmp_path, folder, test, "--beta", 7, "--no-tail"), "provenance")
    _, used, _, made_by, _ = (dict(table.rows()) for table in provenance.all("table"))
    own = Index.load(folder).settings
    assert (used["alpha"], made_by["alpha"]) == (f"{own.alpha:.4g}", "search-hp")
    assert used["beta"] == f"7 (set for this report; the index has {own.beta:.4g})"
    assert used["tail"] == "False (set for this report; the index has True)"
    assert "version 2," in provenance.text
    done("-q", "search-hp", folder, "--val", test)
    page = reported(tmp_path, folder, test)
    assert "selected on these test photos" in page.first("header").text


def test_shots_unreadable_photos_and_unknown_classes_count_as_in_evaluate(caltech, tmp_path):
    shutil.copytree(caltech / "test", tmp_path / "test")
    for file in sorted((caltech / "shots" / ALIKE[0]).iterdir())[:2]:
        shutil.copy(file, tmp_path / "test" / ALIKE[4] / f"x{file.name}")
    (tmp_path / "test" / ALIKE[5]).rename(tmp_path / "test" / "unicorn")
    (tmp_path / "test" / ALIKE[0] / "<b>ad.jpg").write_bytes(b"\xff\xd8\xff nothing")
    done("fit", shutil.copytree(caltech / "index", tmp_path / "index"))
    out = tmp_path / "r.html"
    given = ("evaluate", tmp_path / "index", tmp_path / "test")
    done(*given, "--report", out, status=3)
    page = read(out)
    facts = json.loads(done("-q", *given, "--json", status=3).stdout)
    assert (facts["n"], facts["held_out"], facts["unknown"]) == (56, 2, {"unicorn": 9})
    said = page.first("header").text
    assert "2 test photos are shots of the index. Each was classified without itself." in said
    assert "9 test photos belong to 1 class that the index lacks (unicorn)." in said
    assert "1 photo could not be read" in said
    assert f"{ALIKE[0]}/<b>ad.jpg: " in section(page, "provenance").text
    assert tiles(page)["correct"] == facts["top1"]
    explained = {node.attributes["data-item"] for node in page.all("li", class_="card")}
    assert explained
    assert not [name for name in explained if "unicorn" in name or "/x" in name]
    before = out.read_bytes()
    assert "<b>ad.jpg" in done(*given, "--report", out, "--strict", status=1).stderr
    assert out.read_bytes() == before


def test_a_failure_writes_no_file(tmp_path, monkeypatch):
    folder, test = made(tmp_path)
    out = tmp_path / "r.html"
    unknown = write_table(tmp_path / "u.parquet", unit_rows(2, 16), ["unicorn", "yeti"])
    kept = write_table(tmp_path / "kept.html", unit_rows(1, 3))
    before = sorted(tmp_path.iterdir())
    for arguments, status, said in (
        ((unknown, "--report", out), 1, "unicorn"),
        (
            (test, "--report", tmp_path / "no" / "r.html"),
            1,
            f"there is no folder {tmp_path / 'no'}",
        ),
        ((test, "--report", folder), 2, "is a directory"),
    ):
        refused = done("evaluate", folder, *arguments, status=status)
        assert said in refused.stderr
        assert refused.stdout == ""
    monkeypatch.setattr(report, "render", lambda *_, **__: "\ud800")
    with pytest.raises(UnicodeEncodeError):
        done("evaluate", folder, test, "--report", kept)
    assert sorted(tmp_path.iterdir()) == before


def test_reports_are_written_from_python(tmp_path):
    folder, test = made(tmp_path)
    index = Index.load(folder)
    source = open_source(test)
    out = tmp_path / "r.html"
    found = write_report(index, source, Reader(), out)
    page = read(out)
    assert tiles(page)["correct"] == found.top1
    assert page.first("h1").text == 'Accuracy of "index" on "test.parquet"'
    write_report(index.take(np.arange(index.n)), source, Reader(), out)
    assert "Accuracy of an index on" in read(out).first("h1").text
    for encoder in (("timm:x", f"{tmp_path}/x.pth"), (f"timm:x@{tmp_path}/x.pth+y", None)):
        write_report(
            replace(index, backbone=Identity(*encoder, "w", "c", {})), source, Reader(), out
        )
        assert str(tmp_path) not in out.read_text()


def test_a_report_contains_no_local_path(caltech, tmp_path, monkeypatch):
    home = tmp_path / "home" / "jane"
    shutil.copytree(caltech / "test", home / "test")
    (home / "test" / ALIKE[0] / "bad.jpg").write_bytes(b"\xff\xd8\xff nothing")
    shutil.copytree(caltech / "index", home / "things")
    done("-q", "index", "clone", home / "things", home / "copy")  # its last change names the folder
    out = home / "r.html"
    where = f"source LIKE '{caltech}/%' AND label <> '{tmp_path}/x'"
    arguments = (home / "copy", home / "test", "--report", out, "--where", where)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr("sys.argv", ["", "evaluate", *map(str, arguments)])
    done("-q", "evaluate", *arguments, status=3)
    page = out.read_text()
    assert not [path for path in (str(tmp_path), str(caltech), str(SHARED), "jane") if path in page]
    assert "clone version 1 of things" in page


@pytest.mark.skipif(not Path("/usr/bin/chromium").exists(), reason="SKIPPED: no Chromium here")
def test_a_browser_shows_the_report_without_a_network(written):
    said, asked = [], []
    with chromium() as browser:
        for width, scheme in ((1200, "light"), (360, "dark")):
            context = browser.new_context(
                viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True
            )
            page = context.new_page()
            page.on("console", lambda message: said.append(message.text))
            page.on("pageerror", lambda error: said.append(str(error)))
            page.on("request", lambda request: asked.append(request.url))
            page.goto(written[0].as_uri())
            for summary in page.query_selector_all("summary"):
                summary.click()
            wide = page.evaluate(
                "document.documentElement.scrollWidth - document.documentElement.clientWidth"
            )
            assert wide == 0, f"{width} px: sticks out by {wide} px"
            broken = "[...document.images].filter(image => !image.complete || !image.naturalWidth).length"
            assert page.evaluate(broken) == 0
            light = page.evaluate("getComputedStyle(document.body).backgroundColor").removeprefix(
                "rgb("
            )
            assert (int(light.partition(",")[0]) > 200) == (scheme == "light")
            context.close()
    assert said == []
    assert {url for url in asked if not url.startswith("data:")} == {written[0].as_uri()}
