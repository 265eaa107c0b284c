"""Labels and predictions in the formats of other programs, checked by these programs if they are installed."""

import io
import json
from contextlib import suppress
from pathlib import Path

import buckets
import numpy as np
import pytest
from clusters import clusters, text_of
from conftest import failed, ok
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from serving import caltech_photos
from tables import tiny

from retrieval_tip import Index
from retrieval_tip.data import remote
from retrieval_tip.data.boxes import PhotoBoxes
from retrieval_tip.data.sources import open_items, open_source
from retrieval_tip.errors import InputError, UsageError
from retrieval_tip.evaluation.held_out import held_out_probabilities
from retrieval_tip.fit import closed_form
from retrieval_tip.plugins.exchange import Coco, FiftyOne, LabelStudio
from retrieval_tip.writers import Answered

COLUMNS = ("input", "label", "probability")
NAMES = ["cat", "dög", "<b>", "owl", "a b"]
STRANGE = ["cat", "dög", "a/b", " x", '"q"']


def document(writer, answers, labels=()):
    """Return what a writer writes."""
    return writer.document(Answered(iter(answers), labels, None, (), PhotoBoxes()))


@pytest.fixture
def answers(shared):
    """Photos with spaces and special characters in their paths, one of them without a label."""
    names = [
        Path(name).absolute().as_posix()
        for name in ("/a b/1#?%.jpg", "/ü/3.jpg", "4.jpg", "/5.png")
    ]
    names.insert(1, "s3://bucket/2.jpg")
    labels = ["cat", "dög", "cat", "a/b", None]
    probabilities = [0.25 + row / 10 for row in range(5)]
    return [
        dict(zip(COLUMNS, row, strict=True))
        for row in zip(names, labels, probabilities, strict=True)
    ]


def written(folder, document):
    (folder / "labels.json").write_text(json.dumps(document), encoding="utf-8")
    return folder / "labels.json"


def classified(run, things, paths, style, *options):
    """Return the rows of ``classify``, and its document in another format."""
    rows = run("classify", things, *paths, "--format", "json", *options).stdout.splitlines()
    done = ok("classify", things, *paths, "--format", style, *options)
    return list(map(json.loads, rows)), json.loads(done.stdout)


def test_classify_writes_every_format(run, things, shared, tmp_path):
    paths = [path for path, _ in caltech_photos(shared, "test", 3, 1)]
    names = Index.load(things).class_names
    for style, writer in (
        ("coco", Coco()),
        ("fiftyone", FiftyOne()),
        ("label-studio", LabelStudio()),
    ):
        for options in ([], ["--abstain", 0.9999], ["--burst", 10]):
            rows, made = classified(run, things, paths, style, *options)
            assert made == json.loads(json.dumps(document(writer, rows, names)))
    out = tmp_path / "answers.json"
    ok("classify", things, *paths, "--format", "coco", "--out", out)
    assert open_source(out).paths == tuple(path.as_posix() for path in paths)
    failed(
        run("classify", things, *paths, "--format", "coco", "--boxes", out), 2, "leave out --boxes"
    )


def test_written_coco_is_read_back(answers, tmp_path):
    file = written(tmp_path, document(Coco(), answers, STRANGE))
    source = open_source(file, root="s3://bucket")
    assert list(source.paths) == [answer["input"] for answer in answers[:4]]
    assert source.labels == [answer["label"] for answer in answers[:4]]
    assert source.class_names == ("a/b", "cat", "dög")
    assert open_items(file, root="s3://bucket").items["label"].to_pylist() == [
        answer["label"] for answer in answers
    ]


def test_pycocotools_reads_coco(answers, tmp_path):
    pycocotools = pytest.importorskip("pycocotools.coco")
    found = pycocotools.COCO(str(written(tmp_path, document(Coco(), answers, STRANGE))))
    assert [category["name"] for category in found.loadCats(found.getCatIds())] == STRANGE
    for label in STRANGE:
        images = found.loadImgs(found.getImgIds(catIds=found.getCatIds(catNms=[label])))
        assert [image["file_name"] for image in images] == [
            one["input"] for one in answers if one["label"] == label
        ]
    notes = found.loadAnns(found.getAnnIds())
    assert [note["score"] for note in notes] == [one["probability"] for one in answers[:4]]


def test_fiftyone_reads_its_format(answers, tmp_path):
    importers = pytest.importorskip("fiftyone.utils.data.importers")
    file = written(
        tmp_path,
        document(FiftyOne(), [one for one in answers if "://" not in one["input"]], STRANGE),
    )
    with importers.FiftyOneImageClassificationDatasetImporter(labels_path=str(file)) as importer:
        found = {path: label and (label.label, label.confidence) for path, _, label in importer}
    local = [tuple(one.values()) for one in answers if "://" not in one["input"]]
    expected = {path: label and (label, probability) for path, label, probability in local}
    assert found == expected


CONFIG = """<View><Image name="image" value="$image"/><Choices name="label" toName="image">
<Choice value="cat"/><Choice value="dög"/><Choice value="a/b"/></Choices></View>"""


def test_label_studio_accepts_the_predictions(answers):
    interface = pytest.importorskip("label_studio_sdk.label_interface").LabelInterface(CONFIG)
    for task, answer in zip(document(LabelStudio(), answers), answers, strict=True):
        assert interface.validate_task({"data": task["data"]})
        assert len(task["predictions"]) == (answer["label"] is not None)
        for prediction in task["predictions"]:
            assert interface.validate_prediction(prediction, return_errors=True) == []


def exported(tasks):
    """Return Label Studio's JSON export after a user has accepted all predictions."""

    def accepted(task):
        return [{"was_cancelled": False, "result": one["result"]} for one in task["predictions"]]

    return [
        task | {"id": number, "annotations": accepted(task)} for number, task in enumerate(tasks)
    ]


def test_labels_come_back_from_label_studio(answers, tmp_path, caplog):
    source = open_source(
        written(tmp_path, exported(document(LabelStudio(), answers))), root="s3://bucket/"
    )
    assert list(source.paths) == [answer["input"] for answer in answers[:4]]
    assert source.labels == [answer["label"] for answer in answers[:4]]
    assert "left out 1 photo without a label" in caplog.text


def choice(*labels, **more):
    return {"result": [{"type": "choices", "value": {"choices": list(labels)}}]} | more


def test_photos_with_several_annotations(tmp_path):
    annotations = {
        "agreed": [choice("cat"), choice("cat")],
        "cancelled": [choice("dog", was_cancelled=True), choice("cat")],
        "other region": [
            {"result": [{"type": "rectanglelabels", "value": {"x": 1}}, *choice("cat")["result"]]}
        ],
        "disagreed": [choice("cat"), choice("dog")],
        "two": [choice("cat", "dog")],
        "none": [choice()],
        "odd": [None, {"result": None}, {"result": [None, {"value": {"choices": [1, None, " "]}}]}],
    }
    tasks = [
        {"data": {"photo": f"/data/upload/1/{name}.jpg", "n": 1}, "annotations": notes}
        for name, notes in annotations.items()
    ]
    source = open_source(written(tmp_path, tasks), root="/media")
    assert [Path(path).stem for path in source.paths] == ["agreed", "cancelled", "other region"]
    assert set(source.labels) == {"cat"}
    assert Path(source.paths[0]) == Path("/media/upload/1/agreed.jpg")
    assert [(Path(one.source).stem, one.reason) for one in source.failed] == [
        ("disagreed", "has several labels ('cat', 'dog')"),
        ("two", "has several labels ('cat', 'dog')"),
    ]


def test_photos_in_a_bucket_are_only_read_below_a_given_root(run, tmp_path, monkeypatch):
    """Somebody else's label file must not make the program send the user's credentials anywhere."""
    buckets.use(monkeypatch, buckets.endpoint())
    bucket = f"s3://{buckets.fresh_bucket()}"
    photo = io.BytesIO()
    Image.new("RGB", (8, 8)).save(photo, "PNG")
    remote.system_of(bucket).pipe_file(f"{bucket}/a.png", photo.getvalue())
    model = (
        "--model",
        f"local-dir:{tiny(tmp_path / 'model')}",
        "--out",
        tmp_path / "table.parquet",
    )
    coco = {
        "images": [IMAGE | {"file_name": f"{bucket}/a.png"}],
        "categories": [CATEGORY],
        "annotations": [NOTE],
    }
    for document in (
        coco,
        [{"data": {"image": f"{bucket}/a.png"}, "annotations": [choice("cat")]}],
    ):
        labels = written(tmp_path, document)
        for root in ((), ("--root", tmp_path), ("--root", f"{bucket}-2")):
            failed(
                run("encode", labels, *model, *root),
                1,
                f"{bucket}/a.png: lies outside the root; to read it there, give --root {bucket}",
            )
        ok("encode", labels, *model, "--root", bucket)


IMAGE = {"id": 1, "file_name": "a.jpg"}
CATEGORY = {"id": 1, "name": "cat"}
NOTE = {"image_id": 1, "category_id": 1}
WRONG = [
    ({"images": []}, "no list 'categories'"),
    ({"images": [], "categories": [], "annotations": None}, "no list 'annotations'"),
    ({"images": [], "categories": [], "annotations": []}, "no photo with one label"),
    ({"images": [IMAGE], "categories": [], "annotations": []}, "no photo with one label"),
    ({"images": [IMAGE, IMAGE], "categories": [], "annotations": []}, "image 1 has no file_name"),
    ({"images": [{"id": 1}], "categories": [], "annotations": []}, "image 0 has no file_name"),
    ({"images": [7], "categories": [], "annotations": []}, "image 0 has no file_name"),
    (
        {"images": [IMAGE | {"id": [1]}], "categories": [], "annotations": []},
        "image 0 has no file_name",
    ),
    (
        {"images": [IMAGE | {"id": 0.5}], "categories": [], "annotations": []},
        "image 0 has no file_name",
    ),
    (
        {"images": [IMAGE], "categories": [{"id": 1, "name": " "}], "annotations": []},
        "category 0 has no id",
    ),
    (
        {"images": [IMAGE], "categories": [{"id": None, "name": "x"}], "annotations": []},
        "category 0 has no id",
    ),
    (
        {"images": [], "categories": [CATEGORY, {"id": 1, "name": "dog"}], "annotations": []},
        "category 1 has the id 1",
    ),
    (
        {"images": [IMAGE], "categories": [CATEGORY], "annotations": [NOTE | {"category_id": 2}]},
        "annotation 0 names",
    ),
    (
        {"images": [IMAGE], "categories": [CATEGORY], "annotations": [NOTE | {"image_id": [1]}]},
        "annotation 0 names",
    ),
    (
        {"images": [IMAGE], "categories": [CATEGORY | {"name": "x" * 5000}], "annotations": [NOTE]},
        "longer",
    ),
    ([{"data": {}}], "task 0 has no photo"),
    ([{"data": None}], "task 0 has no photo"),
    ([{"data": {"a": "1.jpg", "b": "2.jpg"}}], "task 0 has no photo"),
    ([{"data": {"image": "1.jpg"}}, 7], "task 1 has no photo"),
    ([{"data": {"image": "1.jpg"}, "annotations": 7}], "no photo with one label"),
    ([7], "no part 'train'"),
]


@pytest.mark.parametrize(("document", "message"), WRONG, ids=[message for _, message in WRONG])
def test_malformed_label_files_are_refused(document, message, tmp_path):
    with pytest.raises(InputError, match=message):
        open_source(written(tmp_path, document))


KEYS = st.sampled_from(["data", "image", "annotations", "result", "value", "choices"])
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=12,
)


@given(st.lists(st.fixed_dictionaries({"data": JSON}, optional={"annotations": JSON}), max_size=3))
def test_any_task_is_read_or_refused(tmp_path_factory, tasks):
    with suppress(InputError):
        open_items(written(tmp_path_factory.getbasetemp(), tasks))


def index(wrong=()):
    keys, ids = clusters(12)
    ids = ids.copy()
    ids[list(wrong)] = (ids[list(wrong)] + 1) % len(NAMES)
    return Index.from_features(keys, ids, NAMES, text_of())


def test_held_out_probabilities_belong_to_the_photos_in_order():
    cache = index(wrong=[3, 30])
    chances, labels, key_ids = held_out_probabilities(cache)
    assert chances.shape == (cache.n, len(NAMES))
    assert_array_equal(labels, cache.class_ids.numpy())
    assert_array_equal(key_ids, cache.labels["key_id"])
    assert_allclose(chances.sum(1), 1, atol=1e-5)
    found = held_out_probabilities(cache, np.arange(cache.n))
    assert_array_equal(found.pred_probs, chances)
    assert_array_equal(found.right, chances.argmax(1) == labels)
    with pytest.raises(UsageError, match="one photo"):
        held_out_probabilities(cache.take(np.arange(1)))


def test_cleanlab_finds_wrong_labels_in_the_held_out_probabilities():
    filters = pytest.importorskip("cleanlab.filter")
    wrong = [3, 17, 30, 55]
    cache = index(wrong)
    cache, _ = closed_form.fit(cache)
    chances, labels, key_ids = held_out_probabilities(cache)
    found = filters.find_label_issues(labels, chances, filter_by="predicted_neq_given")
    assert set(wrong) <= set(key_ids[found].tolist())
    assert found.sum() <= 6
