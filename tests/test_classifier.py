"""The Python API: predict, explain, add, save, share, and its errors."""

import copy
import gc
import inspect
import io
import json
import pickle
import re
import shutil
import subprocess
import typing
from functools import partial
from operator import methodcaller as on
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import warm
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from tables import tiny, unit_rows, write_table

from retrieval_tip import (
    Classifier,
    Index,
    Prediction,
    Predictions,
    Reader,
    Recipe,
    build_index,
    load_backbone,
    open_images,
    open_source,
    settings,
)
from retrieval_tip.backbones.open_clip import wrapped
from retrieval_tip.classifier import ClassifierOptions
from retrieval_tip.data.sources import open_items
from retrieval_tip.errors import BackboneError, InputError, RetrievalTipError, UsageError
from retrieval_tip.evaluation import evaluate as evaluation
from retrieval_tip.evaluation.audit import audit
from retrieval_tip.fit.finetune import finetune_into
from retrieval_tip.index import changes
from retrieval_tip.index.changes import fit_index
from retrieval_tip.labelling.sort import sort_photos


def noisy_photo(seed, colour):
    noise = np.random.default_rng(seed).integers(0, 60, (40, 48, 3))
    noise[..., colour] += 180
    return Image.fromarray(noise.astype(np.uint8))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, six photos of each of three classes, and two new photos of each."""
    folder = tmp_path_factory.mktemp("classifier")
    tiny(folder / "model")
    for part, seeds in (("photos", range(6)), ("new", range(6, 8))):
        for colour, name in enumerate(("red", "green", "blue")):
            (folder / part / name).mkdir(parents=True)
            for seed in seeds:
                noisy_photo(10 * seed + colour, colour).save(folder / part / name / f"{seed}.png")
    return folder


@pytest.fixture(scope="module")
def kept(place):
    Classifier.from_folder(place / "photos", f"local-dir:{place / 'model'}", out=place / "index")
    return place / "index"


@pytest.fixture
def clf(kept, tmp_path):
    """A classifier whose index a test can change."""
    shutil.copytree(kept, tmp_path / "index")
    return Classifier.load(tmp_path / "index")


def test_predict_gives_the_answers_of_its_cache_model_and_encoder(place, kept, clf):
    backbone = load_backbone(f"local-dir:{place / 'model'}", device="cpu")
    source = open_source(place / "new")
    plain = clf.index.classify(Reader(backbone).encode(source).features)
    answers = clf.predict(place / "new")
    assert [answer.label for answer in answers] == [one.label for one in plain]
    assert [answer.probability for answer in answers] == pytest.approx(
        [one.probability for one in plain]
    )
    assert answers.inputs == source.sources
    assert clf.classes == ["blue", "green", "red"]
    assert len(clf) == 18


def test_a_photo_gets_the_same_answer_in_every_format(place, clf):
    path = place / "new/red/6.png"
    picture = Image.open(path)
    one = clf.predict(path)
    assert isinstance(one, Prediction)
    held = [str(path), picture, np.asarray(picture), path.read_bytes()]
    pixels = np.array(picture)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    held += [
        pixels / 255,
        pixels.astype(np.float32),
        tensor,
        tensor.numpy(),
        tensor / 255,
        (tensor / 255).numpy(),
    ]
    written = io.BytesIO()
    picture.save(written, "PNG")  # its position is at the end
    with path.open("rb") as file:
        held += [bytearray(path.read_bytes()), written, file]
        for given in held:
            assert clf(given).probability == pytest.approx(one.probability, abs=1e-6), type(given)
        several = clf.predict(held)
    assert isinstance(several, Predictions)
    assert [answer.label for answer in several] == [one.label] * len(held)
    assert several.inputs[:2] == [str(path), "photo 1"]
    assert [a.label for a in clf.predict(pa.array([str(path)] * 2).to_pylist())] == [one.label] * 2
    with pytest.raises(InputError, match=r"^photo 1: cannot be read \(.*closed file.*\); open"):
        clf.predict(held[-2:])


def test_batches_of_arrays_are_several_photos(place, clf):
    paths = [place / "new/red/6.png", place / "new/blue/7.png"]
    expected = clf.predict_proba(paths)
    photos = np.stack([np.asarray(Image.open(path)) for path in paths])
    batch = torch.from_numpy(photos).permute(0, 3, 1, 2)
    for given in (
        photos,
        photos / 255,
        batch,
        batch.numpy(),
        batch / 255,
        list(photos),
        list(batch / 255),
    ):
        assert_allclose(clf.predict_proba(given), expected, atol=1e-6)
    night = np.ones_like(photos)
    dim = clf.predict_proba(night)
    mixed = np.concatenate([night, photos]).astype(
        np.float32
    )  # the first photos only have ones, but not the batch
    assert_allclose(clf.predict_proba(mixed), np.concatenate([dim, expected]), atol=1e-6)
    grey = photos.mean(axis=3).astype(np.uint8)
    greys = clf.predict_proba([Image.fromarray(one) for one in grey])
    for given in (list(grey), grey[..., None], grey[:, None], grey[:, None] / 255):
        assert_allclose(clf.predict_proba(given), greys, atol=1e-6)
    assert clf.predict_proba(batch[:0]).shape == (0, 3)


NOT_PHOTOS = {
    "photo 0: values from -2.1 to 2.64; give the pixels before normalisation": [
        np.linspace(-2.1, 2.64, 192).reshape(8, 8, 3),
        [torch.linspace(-2.1, 2.64, 192).view(3, 8, 8)],
    ],
    "photos: values from 0 to 2.5; give the pixels before normalisation, as uint8 or as floats from 0 to 1": [
        torch.linspace(0, 2.5, 384).view(2, 3, 8, 8),
        np.linspace(0, 2.5, 384).reshape(2, 8, 8, 3),
    ],
    "photo 0: values from 0 to 254.5": [np.linspace(0, 254.5, 192).reshape(8, 8, 3)],
    "photo 0: contains NaN or infinity": [
        np.full((3, 8, 8), np.nan),
        torch.full((3, 8, 8), torch.inf),
    ],
    "photo 0: int64 pixels; give uint8, or floats from 0 to 1": [
        np.ones((8, 8, 3), int),
        torch.ones(3, 8, 8).long(),
    ],
    "photo 0: bool pixels": [np.ones((8, 8), bool)],
    "photo 0: uint8 of shape (5, 8, 8); expected [h, w, 3] or [3, h, w]": [
        np.zeros((5, 8, 8), np.uint8),
        torch.zeros(5, 8, 8, dtype=torch.uint8),
    ],
    "photo 0: uint8 of shape (3, 8, 3)": [np.zeros((3, 8, 3), np.uint8)],  # it could be either
    "photo 0: uint8 of shape (9,)": [np.zeros(9, np.uint8)],
    "photo 0: uint8 of shape (0, 8, 3)": [np.zeros((0, 8, 3), np.uint8)],
    "photo 0: float32 of shape (8, 8)": [
        [np.ones((8, 8), np.float32)]
    ],  # features, if it were not in a list
    "features: shape (8, 8); expected [q, 16]": [np.ones((8, 8)), torch.ones(8, 8)],
    "photo 0: cannot be read (read() returned a str); open the file in binary mode": [
        io.StringIO(),
        [io.StringIO()],
    ],
}


@pytest.mark.parametrize("words", NOT_PHOTOS)
def test_arrays_that_are_not_photos_are_refused_with_the_cause(clf, words):
    for given in NOT_PHOTOS[words]:
        with pytest.raises(InputError, match=f"^{re.escape(words)}") as error:
            clf.predict(given)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(("mode", "white"), [("F", 1.0), ("F", 255.0), ("I", 65535)])
def test_deep_grey_pictures_get_the_same_answer_as_their_files(clf, tmp_path, mode, white):
    deep = (np.asarray(noisy_photo(1, 1).convert("L")) / 255 * white).astype(
        np.float32 if mode == "F" else np.int32
    )
    picture = Image.fromarray(deep)
    picture.save(tmp_path / "deep.tif")
    assert picture.mode == mode
    assert clf.predict(picture).probabilities == clf.predict(tmp_path / "deep.tif").probabilities
    assert clf.similar(picture)[0].affinity == pytest.approx(
        clf.similar(noisy_photo(1, 1).convert("L"))[0].affinity, abs=0.01
    )


def test_pictures_are_rotated_like_their_files(clf):
    """``test_images.py`` tests the rotation of files."""
    exif = Image.Exif()
    buffer = io.BytesIO()
    exif[0x0112] = 6
    noisy_photo(1, 1).save(buffer, "JPEG", exif=exif)
    assert (
        clf.predict(Image.open(buffer)).probabilities
        == clf.predict(buffer.getvalue()).probabilities
    )


def test_unit_features_are_classified_and_others_refused(clf):
    keys = np.asarray(clf.index.keys)
    assert clf.predict(keys[0]).label == clf.index.labels["label"][0].as_py()
    assert len(clf.predict(keys[:4])) == 4
    tensor = torch.from_numpy(keys.copy())
    assert clf.predict(tensor[0]) == clf.predict(keys[0])
    assert_array_equal(clf.predict_proba(tensor[:4]), clf.predict_proba(keys[:4]))
    assert clf.similar(tensor[0]) == clf.similar(keys[0])
    assert clf.suggest(tensor[:4], 2).inputs == clf.suggest(keys[:4], 2).inputs
    for scale in (15, 2, 0.5):
        with pytest.raises(InputError, match=rf"row 0 has norm {scale}.* divide"):
            clf.predict(scale * keys[:2])
        with pytest.raises(InputError, match="divide"):
            clf.index.classify(scale * keys[:2])
    assert len(clf.index.classify(2 * keys[:2], norms="keep")) == 2


def test_unreadable_photos_are_named(place, clf, tmp_path):
    with pytest.raises(InputError, match=r"gone\.png: no such file$"):
        clf.predict("gone.png")
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(InputError, match=r"notes\.txt"):
        clf.predict([place / "new/red/6.png", tmp_path / "notes.txt"])
    for wrong in (3.5, np.zeros((4, 4, 5)), None):
        with pytest.raises(RetrievalTipError, match="photo 0"):
            clf.predict([wrong])


def test_predictions_can_be_read_as_an_arrow_table(place, clf):
    pd = pytest.importorskip("pandas")
    pl = pytest.importorskip("polars")
    answers = clf.predict(place / "new", top=2)
    table = pa.table(answers)
    assert pl.DataFrame(answers)["label"].to_list() == [answer.label for answer in answers]
    assert len(pd.DataFrame.from_arrow(answers)) == len(answers)
    assert table["input"].to_pylist() == answers.inputs
    assert table["label"].to_pylist() == [answer.label for answer in answers]
    assert table["labels"].to_pylist() == [answer.labels for answer in answers]
    assert table["neighbours"][0].as_py()[0]["label"] == answers[0].neighbours[0].label
    frame = answers.to_pandas()
    assert isinstance(frame, pd.DataFrame)
    assert frame["probability"].tolist() == [answer.probability for answer in answers]
    assert len(pa.table(Predictions())) == 0
    assert [answer.label for answer in answers[1:-1:2]] == table["label"].to_pylist()[1:-1:2]
    assert answers[-1] == list(answers)[-1]
    assert answers[3:].inputs == answers.inputs[3:]
    with pytest.raises(IndexError):
        print(answers[len(answers)])
    assert_array_equal(answers[2].logits, table["logits"][2].as_py())


@pytest.mark.parametrize("library", ["pandas", "polars", "pyarrow"])
def test_tables_in_memory_are_inputs(place, clf, library, monkeypatch):
    module = pytest.importorskip(library)
    frame = module.table if library == "pyarrow" else module.DataFrame
    monkeypatch.chdir(place)
    source = open_source("new")
    paths = list(source.paths)
    labels = source.labels
    expected = clf.predict(paths)
    right = clf.evaluate("new").to_dict()
    for path, label in (("path", "label"), ("input", "class"), ("filename", "class_name")):
        table = frame({"number": list(range(len(paths))), path: paths, label: labels})
        assert (found := clf.predict(table)) == expected
        assert found.inputs == paths
        assert clf.evaluate(table).to_dict() == right
    assert clf.score(table, labels) == right["top1"]
    features = clf.reader.encode(source).features
    table = frame({"id": paths, "feature": features.tolist(), "label": labels})
    for answers in (clf.predict(table), clf.index.classify(table)):
        assert [one.label for one in answers] == [one.label for one in expected]
    assert clf.predict(table).inputs == paths
    assert clf.evaluate(table).top1 == right["top1"]
    assert clf.predict(expected.to_arrow().select(["input"])) == expected
    if library != "pyarrow":
        assert (
            clf.predict(frame({"path": paths})["path"]) == expected
        )  # a series is a list of paths


def test_a_table_in_memory_that_cannot_be_read_gives_one_error(place, clf):
    pd = pytest.importorskip("pandas")
    path = str(place / "new/red/6.png")
    for method, frame, reason in (
        (
            clf.predict,
            pd.DataFrame({"photo": [path]}),
            "no column 'path' among photo; an image table has path",
        ),
        (clf.evaluate, pd.DataFrame({"path": [path]}), "no column 'label' among path"),
        (clf.predict, pd.DataFrame({"path": []}), "has no rows"),
        (
            clf.predict,
            pd.DataFrame([[path, path]], columns=["path", "path"]),
            "Duplicate column names",
        ),
        (clf.predict, pd.DataFrame({"path": [Path(path)]}), "Path"),
        (clf.predict, pd.DataFrame({"path": [path, None]}), "row 1 without a path"),
        (clf.predict, pd.DataFrame({"path": [1.5]}), "type double; expected text"),
        (clf.predict, pa.table({"feature": [[2.0] * clf.index.d]}), "norm"),
        (clf.predict, pa.table({"feature": [[1.0]]}), "expected [q, 16]"),
        (clf.index.classify, pa.table({"a": [1]}), "no column 'path' among a"),
        (clf.index.classify, pd.DataFrame({"path": [path]}), "photos need an encoder"),
        (clf.predict, pa.table({"path": ["gone.png"]}), "gone.png: no such file"),
        (clf.predict, {"path": [path]}, "photos: got an object of type dict"),
    ):
        with pytest.raises(RetrievalTipError, match=re.escape(reason)) as error:
            method(frame)
        assert "\n" not in str(error.value)
        assert error.value.__cause__ is None


def test_an_explanation_shows_the_pictures(place, clf):
    explained = clf.explain(place / "new/green/6.png", neighbours=3)
    assert explained.label == clf.predict(place / "new/green/6.png").label
    assert explained.shots[0] == Path(explained.prediction.neighbours[0].source).read_bytes()
    html = explained._repr_html_()
    assert html.count("data:image/jpeg;base64,") == 4
    gone = clf.explain(Image.new("RGB", (20, 20)))
    assert gone.picture.startswith(b"\x89PNG")


def test_after_each_change_the_new_version_is_used(place, tmp_path):
    """This includes an index that is not saved. ``test_living.py`` makes sure that the changes are right."""
    clf = Classifier.from_folder(place / "photos", f"local-dir:{place / 'model'}")
    assert "not saved" in repr(clf)
    other = Classifier.from_folder(held(range(30, 33)), f"local-dir:{place / 'model'}")
    yellow = [Image.new("RGB", (40, 40), (250, 250, i)) for i in range(3)]
    done = [
        clf.remove(key_ids=[0]),
        clf.relabel({1: "red", 2: "green"}),
        clf.add(place / "new/red/6.png", "RED"),  # a new class, because names are case-sensitive
        clf.add([*yellow, noisy_photo(1, 0)], ["yellow"] * 3 + ["red"]),
        clf.add(place / "new"),
        clf.merge(other),
        clf.rename("RED", "crimson", encode=True),
        clf.rename("crimson", "red"),
    ]
    assert [one.version for one in done] == [*range(2, 10)]
    assert [len(one.key_ids) for one in done] == [1, 2, 1, 4, 6, 3, 1, 1]
    assert (done[2].classes, [one.merged for one in done[6:]]) == (["RED"], [False, True])
    assert (len(clf), clf.classes) == (18 - 1 + 1 + 4 + 6 + 3, ["blue", "green", "red", "yellow"])
    assert clf.predict(yellow[0]).neighbours[0].label == "yellow"
    assert clf.index.find(key_ids=[1, 2])["label"].to_pylist() == ["green", "red"]
    told = clf.history()["change"].to_pylist()
    assert told[1] == "removed 1 photo: 1 blue"
    assert (clf.rollback(1).version, clf.index.version) == (10, 10)
    assert (len(clf), clf.classes) == (18, ["blue", "green", "red"])
    for wrong, labels, reason in (
        (place / "new/red/6.png", None, "label"),
        (yellow, ["yellow"], "labels: got 1 for 3"),
    ):
        with pytest.raises(RetrievalTipError, match=reason):
            clf.add(wrong, labels)
    assert clf.fit(metric="none").form.metric is None
    choice = clf.fit(place / "new", values="one-hot")
    assert (choice.judged_on, clf.index.values, clf.index.version) == (
        f"6 photos of {place / 'new'}",
        None,
        12,
    )
    before = clf.predict_proba(place / "new")
    result = clf.calibrate(held())
    assert clf.index.settings.temperature == result.temperature != 1
    assert (clf.predict_proba(place / "new").argmax(1) == before.argmax(1)).all()
    assert clf.audit(borderline=True).equals(audit(Index.load(clf.index.place), borderline=True))
    stored = clf.save(f"lance://{tmp_path}/store.lance")
    assert stored.remove(where="key_id = 3").version == stored.index.version
    assert [len(stored), len(stored.similar(place / "new/red/6.png", 30))] == [17, 17]
    for in_a_folder_only in (lambda: stored.calibrate(place / "new"), stored.finetune):
        with pytest.raises(UsageError, match=r"lance://.*needs an index in a folder"):
            in_a_folder_only()


def held(numbers=range(6), names=("red", "green", "blue")):
    """Open photos in memory, of each class in turn, with their labels."""
    photos = [noisy_photo(10 * (i // 3) + i % 3, i % 3) for i in numbers]
    return open_images(photos, [names[i % 3] for i in numbers])


def test_photos_in_memory_become_shots(place, clf):
    model = f"local-dir:{place / 'model'}"
    files = open_source(place / "photos")
    pictures = [Image.open(path) for path in files.paths]
    for photos in (
        pictures,
        iter(pictures),
        files.paths,
        [Path(path).read_bytes() for path in files.paths],
    ):
        made = Classifier.from_images(photos, iter(files.labels), model=model)
        assert_allclose(np.asarray(made.index.keys), np.asarray(clf.index.keys), atol=1e-5)
        assert made.classes == clf.classes
    new = open_source(place / "new")
    images = open_images([np.asarray(Image.open(path)) for path in new.paths], new.labels)
    assert made.evaluate(images).top1 == clf.evaluate(place / "new").top1
    ids = made.add(held([1, 4])).key_ids
    labels = {row["key_id"]: row["label"] for row in made.index.labels.to_pylist()}
    assert [labels[key] for key in ids] == ["green", "green"]
    for wrong in ([noisy_photo(1, 1)], place / "new/red/6.png"):
        with pytest.raises(UsageError, match="label: missing"):
            made.add(wrong)
    for call in (made.predict, made.evaluate):
        with pytest.raises(InputError, match=r"gone\.png: no such file"):  # and not a warning
            call(open_images([new.paths[0], "gone.png"], "red"))


def test_globs_are_accepted_as_in_the_commands(place, clf, tmp_path):
    assert clf.predict(place / "new/*/*.png").to_arrow() == clf.predict(place / "new").to_arrow()
    for wrong in ("https://example.org/a.png", str(tmp_path / "*.gif")):
        with pytest.raises(InputError, match=re.escape(wrong)):
            clf.predict(wrong)


def test_finetune_writes_a_new_index(place, clf, tmp_path):
    """The old index does not change. Its alpha is so small that training helps."""
    changes.configure(clf.index.place, alpha=0.0)
    clf, old = (Classifier.load(clf.index.place) for _ in "ab")
    recipe = Recipe(epochs=1)
    tuned = clf.finetune(tmp_path / "f", recipe, val=place / "new")
    assert clf.index.place == str(tmp_path / "f")
    assert_array_equal(clf.index.keys, tuned.index.keys)
    assert clf.reader.backbone.identity == clf.index.backbone == old.index.backbone
    changes.configure(tmp_path / "f", alpha=0.01)
    clf = Classifier.load(tmp_path / "f")
    clf.finetune(None, Recipe(epochs=20, lr=0.1))
    assert "not saved" in repr(clf)
    assert not np.array_equal(clf.index.keys, tuned.index.keys)
    photo = place / "new/red/6.png"
    data = pickle.dumps(clf.save(tmp_path / "saved"))
    expected = clf.predict(photo)
    shutil.rmtree(tmp_path / "saved")
    copied = pickle.loads(data)
    assert copied.predict(photo) == expected
    copied.save(tmp_path / "copied")
    assert (
        Classifier.load(tmp_path / "copied").predict(photo).probabilities == expected.probabilities
    )
    made = Classifier.from_folder(held(), f"local-dir:{place / 'model'}")
    with pytest.raises(InputError, match=r"photo \d: no such file"):
        made.finetune(None, recipe)
    assert made.finetune(None, recipe, source=held(), val=held()).compared.n == 6


def test_probabilities_and_similar_shots_match_the_definition(place, clf):
    cache = clf.index
    photos = open_source(place / "new")
    f = torch.from_numpy(clf.reader.encode(photos).features)
    expected = (cache.logits(f).double() / cache.settings.temperature).softmax(1)
    assert_allclose(clf.predict_proba(place / "new"), expected, atol=1e-6)
    assert_allclose(clf.predict_proba(f.numpy(), k="all"), expected, atol=1e-6)
    assert_allclose(clf.predict_proba(photos.paths[2]), expected[2:3], atol=1e-6)
    assert clf.predict_proba([]).shape == (0, 3)
    points, keys = (
        (x if cache.metric is None else cache.metric(x))
        for x in (f, torch.from_numpy(cache.keys[:]))
    )
    affinity = points.double() @ keys.double().T
    for row, path in enumerate(photos.paths):
        found = clf.similar(path, 4)
        best = affinity[row].argsort(descending=True)[:4]
        assert_allclose([shot.affinity for shot in found], affinity[row][best], atol=1e-5)
        rows = [cache.labels["key_id"].to_pylist().index(shot.key_id) for shot in found]
        assert_allclose(affinity[row][rows], affinity[row][best], atol=1e-5)
    assert [shot.key_id for shot in clf.similar(f[0].numpy(), 2)] == [
        s.key_id for s in clf.similar(photos.paths[0], 2)
    ]


def test_photos_are_sorted_and_two_classifiers_compared(place, kept, clf, tmp_path):
    done = clf.sort(
        [place / "new/red", place / "new/blue/6.png"], tmp_path / "out", min_probability=0
    )
    assert done.done == 3
    clf.relabel("red", where="label = 'blue'")
    for other in (kept, Classifier.load(kept)):
        both = clf.compare(other, place / "new")
        assert both.names == (clf.index.place, str(kept))
        assert [own.top1 for own in both.evaluations] == [
            one.evaluate(place / "new").top1 for one in (clf, Classifier.load(kept))
        ]
    in_memory = clf.compare(kept, held())
    assert (in_memory.n, in_memory.skipped) == (6, [])
    assert clf.compare(kept, place / "new/red").evaluations is None  # without labels


def test_photos_in_memory_are_suggested_even_if_shots_have_the_same_names(place):
    clf = Classifier.from_folder(held(), f"local-dir:{place / 'model'}")
    others = [noisy_photo(100 + seed, 0) for seed in range(3)]
    found = clf.suggest([*others, noisy_photo(0, 0)], 4)
    assert (sorted(found.inputs), found.known) == (["photo 0", "photo 1", "photo 2"], 1)


@pytest.mark.parametrize(("features", "entry"), [(True, "features"), (False, "pixels")])
def test_an_exported_graph_takes_features_or_pixels(clf, tmp_path, features, entry):
    """``test_onnx.py`` tests the graphs."""
    runtime = pytest.importorskip("onnxruntime")
    assert clf.export_onnx(tmp_path / "g.onnx", features=features)["labels"] == clf.classes
    assert [one.name for one in runtime.InferenceSession(tmp_path / "g.onnx").get_inputs()] == [
        entry
    ]


def test_score_and_classes_are_those_of_scikit_learn(place, clf):
    from sklearn.metrics import accuracy_score

    new = open_source(place / "new")
    clf.relabel("red", where="label = 'blue'")
    answers = [answer.label for answer in clf.predict(new.paths)]
    assert 0 < clf.score(new.paths, new.labels) == accuracy_score(new.labels, answers) < 1
    assert clf.score(place / "new", np.array(new.labels)) == clf.score(new.paths, new.labels)
    assert clf.score(Image.open(new.paths[0]), [answers[0]]) == 1
    assert clf.score(clf.reader.encode(new).features, answers) == 1
    assert isinstance(clf.classes_, np.ndarray)
    assert_array_equal(clf.classes_[clf.predict_proba(new.paths).argmax(1)], answers)
    with pytest.raises(InputError, match=r"^y: got 5 labels for 6 photos; give one per photo"):
        clf.score(new.paths, answers[1:])
    with pytest.raises(
        InputError, match=r"^y: 0 is not a class of this index; it has blue, green, red$"
    ):
        clf.score(new.paths, np.arange(6) % 3)


def test_a_pickled_classifier_works_in_another_process_without_its_folder(
    place, tmp_path, warm_path
):
    joblib = pytest.importorskip("joblib")
    sklearn = pytest.importorskip("sklearn.pipeline")
    from retrieval_tip import ImageEncoder, TipAdapterClassifier

    clf = Classifier.from_folder(place / "photos", f"local-dir:{place / 'model'}", views=2)
    folder = clf.index.folder
    photo = str(place / "new/red/6.png")
    photos = open_source(place / "photos")
    pipeline = sklearn.make_pipeline(
        ImageEncoder(clf.reader.backbone), TipAdapterClassifier(alpha=1.0, device="cpu")
    )
    pipeline.fit(photos.paths, photos.labels)
    expected = [clf.predict_proba(photo), pipeline.predict_proba([photo])]
    data = pickle.dumps(clf)
    joblib.dump(clf, tmp_path / "clf.joblib")
    del clf
    gc.collect()
    assert not folder.exists()
    assert str(folder.parent).encode() not in data
    (tmp_path / "both.pickle").write_bytes(pickle.dumps((pickle.loads(data), pipeline)))
    script = (
        "import joblib, pathlib, pickle, warnings; warnings.simplefilter('error')\n"
        "clf, pipeline = pickle.loads(pathlib.Path('both.pickle').read_bytes())\n"
        "mapped = joblib.load('clf.joblib', mmap_mode='r')  # as the arguments of a process of joblib\n"
        f"print([one.predict_proba([{photo!r}]).tolist() for one in (clf, mapped, pipeline)])\n"
        f"print(clf); print(clf.add({photo!r}, 'red').version, clf.index.labels['views'].to_pylist()[-1])\n"
        "clf.save('new')"
    )
    done = subprocess.run(
        [warm.python(warm_path), "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stderr == ""
    chances, shown, added = done.stdout.splitlines()
    assert_allclose(json.loads(chances), [expected[0], *expected], atol=1e-6)
    assert shown.endswith(f"{place / 'model'}, not saved)")
    assert added == "2 2"  # version and views
    assert len(Classifier.load(tmp_path / "new")) == 19


@pytest.mark.parametrize("carry", [copy.deepcopy, lambda clf: pickle.loads(pickle.dumps(clf))])
def test_a_copy_of_a_classifier_is_independent_of_its_index(place, clf, tmp_path, carry):
    clf.fit(metric="within", values="solved")
    clf.add(place / "new/red/6.png", "red")
    expected = clf.predict(place / "new")
    history = len(clf.history())
    other = carry(clf)
    other.remove(key_ids=[0])
    assert (len(clf), len(other), len(clf.history())) == (19, 18, history)
    assert copy.copy(clf).index is clf.index
    stored = Classifier.load(clf.index.folder).save(f"lance://{tmp_path}/store.lance")
    copies = [carry(clf), carry(stored)]
    shutil.rmtree(clf.index.folder)
    for one in copies:
        assert [answer.label for answer in one.predict(place / "new")] == [
            answer.label for answer in expected
        ]
        assert type(one.index.keys) is np.ndarray  # and not memory-mapped
        assert "not saved" in repr(one)
        assert len(one.remove(key_ids=[1]).key_ids) == 1


PHOTO = Image.new("RGB", (8, 8))
MISUSE = {
    "photos: got an object of type int; give a path, a PIL image, an array, bytes, or a list": [
        on("predict", 5),
        on("predict_proba", 5),
        on("suggest", 5),
        on("add", 5, "red"),
        on("from_images", 5, "red"),
    ],
    "photos: got an object of type int; give a path": [
        on("evaluate", 5),
        lambda clf: clf.compare(clf, 5),
        on("fit", 5),
        on("calibrate", 5),
        on("finetune", val=5),
        on("from_folder", 5),
    ],
    "photos: got an object of type NoneType; give": [
        on("predict", None),
        on("evaluate", None),
    ],
    "photos: got an object of type dict; give": [on("predict", {"image": PHOTO})],
    "photo 0: got a tuple; expected a path, a PIL image": [on("predict", [(PHOTO, "red")])],
    "photo: expected a single photo or feature; call similar for each": [
        on("similar", 5),
        on("similar", [PHOTO]),
        lambda clf: clf.similar(clf.index.keys[:2]),
    ],
    "what: expected a single photo; call explain for each": [on("explain", [PHOTO])],
    "https://e.org/a.png: a web address; download it first": [
        on("predict", "https://e.org/a.png"),
        on("predict", ["https://e.org/a.png"]),
        on("explain", "https://e.org/a.png"),
        on("similar", "https://e.org/a.png"),
        on("add", "https://e.org/a.png", "red"),
        on("sort", "https://e.org/a.png", "out"),
        on("evaluate", "https://e.org/a.png"),
        on("from_folder", "https://e.org/a.png"),
    ],
    "k is many: expected": [on("predict", PHOTO, k="many")],
    "neighbours is a: expected": [on("predict", PHOTO, neighbours="a")],
    "n is 0: expected": [on("similar", PHOTO, 0), on("suggest", [PHOTO], 0)],
    "photos: only files can be sorted; give the path": [
        on("sort", 5, "out"),
        on("sort", PHOTO, "out"),
        on("sort", [PHOTO], "out"),
    ],
    "label: got 5; give the name of a class": [on("relabel", 5, key_ids=[0])],
    "labels: got 5; give the name of a class, or one name per photo": [
        on("add", PHOTO, 5),
        on("add", [PHOTO], [5]),
        on("from_images", [PHOTO], [5]),
    ],
    "images: has no items; give at least one": [on("add", [], "red")],
    "where, key_ids: give exactly one": [
        on("remove"),
        on("relabel", "red"),
        on("remove", where="true", key_ids=[0]),
    ],
    "photos: got an object of type list; give a path": [on("from_folder", [PHOTO])],
    "model: got an object of type int; give a name": [lambda clf: clf.load(clf.index.place, 5)],
    "model: got 2 objects; give (model, preprocess, tokenizer)": [
        lambda clf: clf.load(clf.index.place, (1, 2))
    ],
    "key ids: got 5; give a list": [on("remove", key_ids=5)],
    "key ids: got ['a']; give a list": [
        on("remove", key_ids=["a"]),
        on("relabel", {"a": "red"}),
    ],
    "where: got 5; give an SQL condition": [on("remove", where=5)],
    "class name 5: expected text": [on("rename", "red", 5)],
    "version is x: expected": [on("rollback", "x")],
    "has no version 99; use one of": [on("rollback", 99)],
    "gone: no such folder; make one with": [
        on("merge", "gone"),
        on("compare", "gone", "new"),
        on("fit", prior="gone"),
        on("load", "gone"),
    ],
    "recipe: got an object of type int; give a Recipe": [on("finetune", recipe=5)],
    "got an object of type int; give a path": [
        on("load", 5),
        on("save", 5),
        on("merge", 5),
        on("finetune", 5),
        on("compare", 5, "new"),
        on("export_onnx", 5),
        on("report", "r.html", 5),
    ],
}


@pytest.mark.parametrize("words", MISUSE)
def test_misuse_gives_one_clear_error(place, kept, words):
    clf = Classifier.load(kept)
    for call in MISUSE[words]:
        with pytest.raises(RetrievalTipError, match=f"^[^;]*{re.escape(words)}") as error:
            call(clf)
        assert "\n" not in str(error.value)
    assert clf.index.reload() is clf.index  # nothing changed


def test_an_index_without_an_encoder_only_classifies_features(place, tmp_path):
    labels = ["red", "green", "blue"] * 2
    table = write_table(tmp_path / "t.parquet", unit_rows(6, 8), labels)
    bare = Classifier(Index.from_features(unit_rows(6, 8), labels, labels[:3]), Reader())
    new = place / "new"
    assert len(bare.predict(table)) == 6
    assert (len(bare.remove(key_ids=[0]).key_ids), len(bare), len(bare.history())) == (1, 5, 2)
    assert "not saved" in repr(bare)
    assert len(Classifier.load(bare.save(tmp_path / "saved").index.place)) == 5
    assert "features" in repr(bare)
    several = (
        bare.predict,
        bare.predict_proba,
        bare.suggest,
        bare.evaluate,
        bare.calibrate,
        bare.fit,
        bare.add,
        partial(bare.compare, bare),
    )
    single = (bare.similar, bare.explain, lambda one: bare.sort(one, tmp_path / "out"))
    for call in (
        *(partial(one, new) for one in several),
        *(partial(one, new / "red/6.png") for one in single),
    ):
        with pytest.raises(UsageError, match=r"photos need an encoder; name it"):
            call()
    with pytest.raises(UsageError, match="encode: the index has no encoder"):
        bare.rename("red", "blue", encode=True)


def test_a_misspelt_argument_is_refused(clf):
    for method in ("predict", "predict_proba", "similar", "suggest", "add", "fit", "from_folder"):
        with pytest.raises(TypeError, match="shotz"):
            getattr(clf, method)(PHOTO, shotz=1)
    with pytest.raises(TypeError, match="shotz"):
        clf.from_images([PHOTO], ["red"], shotz=1)


OPTIONS = {
    f"Unpack[{kind.__name__}]": kind
    for kind in (settings.AskOptions, settings.BuildOptions, ClassifierOptions)
}


def parameters(function):
    """Return the parameters with their defaults. Those of a TypedDict have none."""
    own = {name: given.default for name, given in inspect.signature(function).parameters.items()}
    for name, given in inspect.signature(function).parameters.items():
        if given.kind is inspect.Parameter.VAR_KEYWORD:
            kind = OPTIONS[
                given.annotation
            ]  # all keyword arguments are listed, and mypy checks them
            del own[name]
            own |= dict.fromkeys(typing.get_type_hints(kind), inspect.Parameter.empty)
    return own


def test_every_option_is_a_named_argument():
    """The defaults equal those of the functions that do the work."""
    for name, method in inspect.getmembers(Classifier, inspect.isroutine):
        assert name[0] == "_" or parameters(method) is not None
    for own, done_by, apart in (
        (parameters(Classifier.from_folder), build_index, {"source", "out", "reader"}),
        (parameters(Classifier.predict), Index.classify, {"self", "features"}),
        (parameters(Classifier.explain), Classifier.predict, {"norms", "group_no_match"}),
        (parameters(Classifier.add), changes.add, {"folder", "source", "reader", "manifest"}),
        (parameters(Classifier.remove), changes.remove, {"folder"}),
        (parameters(Classifier.relabel), changes.relabel, {"folder"}),
        (parameters(Classifier.rollback), changes.rollback, {"folder"}),
        (parameters(Classifier.fit), fit_index, {"folder", "validation", "reader"}),
        (parameters(Classifier.finetune), finetune_into, {"out", "index", "shots", "reader"}),
        (parameters(Classifier.predict_proba), Classifier.predict, {"group_no_match"}),
        (parameters(Classifier.similar), Index.similar, {"self", "features"}),
        (parameters(Classifier.sort), sort_photos, {"index", "sources", "reader"}),
        (parameters(Classifier.audit), audit, {"index"}),
        (
            parameters(Classifier.evaluate),
            evaluation.evaluate,
            {"index", "source", "reader", "blocks"},
        ),
    ):
        for name, default in parameters(done_by).items():
            assert name in apart | {"base", "expect"} or own[name] == default, (done_by, name)
    assert parameters(Classifier.from_folder).keys() - parameters(
        Classifier.from_images
    ).keys() == {"photos"}


def test_as_module_computes_logits_from_pixels(place, clf):
    paths = [place / "new/red/6.png", place / "new/blue/7.png"]
    backbone = clf.reader.backbone
    mean, std = (
        torch.tensor(backbone.identity.preprocess[name])[:, None, None] for name in ("mean", "std")
    )
    pixels = torch.stack(
        [255 * (backbone.preprocess(Image.open(path)) * std + mean) for path in paths]
    )
    module = clf.as_module()
    features = (
        Reader(backbone).encode(open_items(place / "new").take([0])).features
    )  # the module must not change them
    logits = module.double()(pixels.double())
    assert Reader(backbone).encode(open_items(place / "new").take([0])).features == pytest.approx(
        features
    )
    for row, path in zip(logits, paths, strict=True):
        answer = clf.predict(path, top=3)
        assert clf.classes[int(row.argmax())] == answer.label
        chances = (row / clf.index.settings.temperature).softmax(0)
        assert_allclose(
            [chances[clf.classes.index(name)] for name in answer.labels],
            answer.probabilities,
            atol=1e-3,
        )
    clf.index.settings = clf.index.settings.override(k=2)
    with pytest.raises(UsageError, match="all keys"):
        clf.as_module()


def test_an_index_without_a_folder_can_be_saved(place, tmp_path):
    model, _, preprocess = __import__("open_clip").create_model_and_transforms(
        f"local-dir:{place / 'model'}"
    )
    tokenizer = __import__("open_clip").get_tokenizer(f"local-dir:{place / 'model'}")
    clf = Classifier.from_folder(place / "photos", (model, preprocess, tokenizer), fit="none")
    assert "not saved" in repr(clf)
    before = clf.predict(place / "new/red/6.png")
    clf.save(tmp_path / "saved")
    assert clf.predict(place / "new/red/6.png").probability == pytest.approx(before.probability)
    again = Classifier.load(tmp_path / "saved", wrapped(model, preprocess, tokenizer))
    assert again.predict(place / "new/red/6.png").label == before.label
    with pytest.raises(BackboneError, match="cannot be compared"):
        Classifier.load(tmp_path / "saved", f"local-dir:{tiny(tmp_path / 'other', seed=1)}")


def test_a_report_shows_photos_in_memory_and_the_figures_of_evaluate(place, clf, tmp_path):
    clf.report(tmp_path / "r.html", held(names=["green", "blue", "red"]))
    assert 'alt="test photo of ' in (tmp_path / "r.html").read_text()
    assert clf.report(tmp_path / "r.html", place / "new").top1 == clf.evaluate(place / "new").top1


def test_a_scikit_learn_pipeline_can_start_with_paths(place):
    sklearn_pipeline = pytest.importorskip("sklearn.pipeline")
    from retrieval_tip import ImageEncoder, TipAdapterClassifier

    train = open_source(place / "photos")
    new = open_source(place / "new")
    pipeline = sklearn_pipeline.make_pipeline(
        ImageEncoder(f"local-dir:{place / 'model'}", device="cpu"), TipAdapterClassifier()
    )
    pipeline.fit(train.sources, train.labels)
    backbone = load_backbone(f"local-dir:{place / 'model'}", device="cpu")
    features = pipeline[0].transform(new.sources)
    plain = Reader(backbone).encode(new).features
    assert_allclose(features, plain / np.linalg.norm(plain, axis=1, keepdims=True), atol=1e-5)
    assert pipeline.score(new.sources, new.labels) > 1 / 3
    assert_array_equal(ImageEncoder(backbone).transform(new.sources), features)  # no fit is needed
    assert pytest.importorskip("sklearn").clone(ImageEncoder(backbone)).model is backbone
    with pytest.raises(InputError, match=r"^gone.png: no such file$"):
        ImageEncoder(backbone).transform(["gone.png"])
