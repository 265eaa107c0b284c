"""An index as an ONNX graph gives the package's logits in another runtime."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
from clusters import C, clusters, text_of
from conftest import fitted, json_rows, ok
from numpy.testing import assert_allclose
from PIL import Image
from serving import caltech_photos

from retrieval_tip import Index
from retrieval_tip.data.sources import read_item
from retrieval_tip.errors import UsageError
from retrieval_tip.export.onnx_graph import export_onnx
from retrieval_tip.fit import closed_form

NAMES = ["cat", "dög", "<b>", "owl", "a b"]


def index(shots=6, **options):
    keys, ids = clusters(shots)
    return Index.from_features(keys, ids, NAMES, text_of(), **options)


def run_in(file, given):
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return session, session.run(None, {session.get_inputs()[0].name: given})


FORMS = [("none", "one-hot"), ("within", "one-hot"), ("none", "solved"), ("within", "solved"), None]


@pytest.mark.parametrize(
    ("form", "covered"), [*((form, C) for form in FORMS), (("within", "solved"), C - 1)], ids=str
)
def test_logits_of_features_equal_those_of_the_package(form, covered, tmp_path):
    cache = index()
    cache = cache.take(np.flatnonzero(cache.class_ids.numpy() < covered))
    if form is not None:
        cache = fitted(cache, closed_form.FitRequest(metric=form[0], values=form[1]))
    facts = export_onnx(cache, tmp_path / "i.onnx")
    onnx.checker.check_model(str(tmp_path / "i.onnx"), full_check=True)
    strangers = -clusters(20, seed=7)[0]
    for queries in (clusters(20, seed=7)[0], clusters(1, seed=8)[0][:1], strangers):
        session, (logits, probabilities, *no_match) = run_in(tmp_path / "i.onnx", queries)
        expected = cache.logits(queries).numpy()
        assert_allclose(logits, expected, rtol=1e-4, atol=1e-3)
        predictions = cache.classify(queries, top=C)
        for row, prediction in zip(probabilities, predictions, strict=True):
            ranked = [row[NAMES.index(label)] for label in prediction.labels]
            assert_allclose(ranked, prediction.probabilities, atol=1e-4)
        assert [one.tolist() for one in no_match] == (
            [] if form is None else [[p.no_match for p in predictions]]
        )
    assert form is None or no_match[0].any()
    props = session.get_modelmeta().custom_metadata_map
    assert json.loads(props["labels"]) == NAMES
    assert json.loads(props["settings"])["beta"] == cache.settings.beta
    assert facts["bytes"] == (tmp_path / "i.onnx").stat().st_size
    assert (facts["agreement"]["n"], facts["agreement"]["equal"]) == (10, 10)
    assert facts["agreement"]["difference"] < 1e-4


def test_an_exported_graph_with_an_encoder_classifies_pixels(run, things, shared, tmp_path):
    file = tmp_path / "things.onnx"
    done = ok("index export", things, "--onnx", file)
    assert "pixels to logits of 10 classes" in done.stdout
    assert (
        "10 of 10 photos classified as by the package, with probabilities within 0.0001\n"
        in done.stdout
    )
    props = onnxruntime.InferenceSession(file).get_modelmeta().custom_metadata_map
    labels = json.loads(props["labels"])
    preprocess = json.loads(props["preprocess"])
    assert (preprocess["size"], preprocess["resize_mode"], preprocess["shorter_side"]) == (
        [224, 224],
        "shortest",
        224,
    )
    paths = [path for path, _ in caltech_photos(shared, "test", 10, 2)]
    pixels = np.stack([prepared(path, 224) for path in paths])
    _, (logits, _) = run_in(file, pixels)
    answers = run("classify", things, *paths, "--logits", "--format", "json", "--no-cache")
    rows = json_rows(answers)
    expected = np.array([row["logits"] for row in rows])
    assert_allclose(logits, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    assert [labels[i] for i in logits.argmax(1)] == [row["label"] for row in rows]


def test_the_suffix_of_a_file_selects_onnx(run, things, tmp_path):
    ok("index export", things, "--out", tmp_path / "a.onnx", "--features")
    ok("index export", things, "--onnx", tmp_path / "b.onnx", "--features")
    one, other = (onnx.load(tmp_path / f"{name}.onnx").graph for name in "ab")
    assert one == other
    both = run("index export", things, "--out", tmp_path / "c.onnx", "--onnx", tmp_path / "d.onnx")
    assert (both.exit_code, both.stdout, sorted(one.name for one in tmp_path.iterdir())) == (
        2,
        "",
        ["a.onnx", "b.onnx"],
    )


def test_an_index_without_its_photos_is_exported_without_a_comparison(
    things, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "retrieval_tip.export.onnx_graph.read_item", lambda _: read_item(tmp_path / "gone.jpg")
    )
    done = ok("index export", things, "--onnx", tmp_path / "things.onnx")
    assert "no photo of the index could be read" in done.stderr
    assert "classified as" not in done.stdout


def prepared(path, side):
    """Prepare a photo like a user of the graph: resize its shorter side, and crop its centre."""
    image = Image.open(path).convert("RGB")
    scale = side / min(image.size)
    image = image.resize(
        [max(side, int(edge * scale)) for edge in image.size], Image.Resampling.BICUBIC
    )
    left = round((image.width - side) / 2)
    top = round((image.height - side) / 2)
    return np.asarray(image.crop((left, top, left + side, top + side)), dtype=np.float32).transpose(
        2, 0, 1
    )


def test_an_index_with_a_k_is_exported_with_all_keys(tmp_path):
    cache = index()
    cache.settings = cache.settings.override(k=3)
    cache.save(tmp_path / "i")
    ok("index export", tmp_path / "i", "--onnx", tmp_path / "i.onnx")
    queries = clusters(3, seed=7)[0]
    assert_allclose(
        run_in(tmp_path / "i.onnx", queries)[1][0],
        cache.logits(queries, k="all").numpy(),
        rtol=1e-4,
        atol=1e-3,
    )


def test_too_large_objects_are_refused_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr("retrieval_tip.export.onnx_graph.LARGEST", 100)
    with pytest.raises(UsageError, match="limit is 2 GB"):
        export_onnx(index(), tmp_path / "i.onnx")
    assert not list(tmp_path.iterdir())
