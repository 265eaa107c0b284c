"""Changes to an index folder, from Python and the command line. Each makes one new version, or none if it fails."""

import json
import shlex
import shutil

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import SHARED, json_rows, ok
from numpy.testing import assert_allclose, assert_array_equal
from sealing import snapshot
from tables import tiny, unit_rows, write_table

from retrieval_tip import Index, verify
from retrieval_tip.backbones.prompts import text_weights
from retrieval_tip.cli.output import write_tables
from retrieval_tip.data.reader import Reader
from retrieval_tip.data.sources import open_source
from retrieval_tip.errors import BackboneError, StoreError, UsageError
from retrieval_tip.index import changes
from retrieval_tip.index.build import build_index
from retrieval_tip.settings import Settings
from retrieval_tip.store.edits import Edits, NewKeys
from retrieval_tip.store.versions import Versions

pytestmark = pytest.mark.usefixtures("one_thread")

D = 8
CALTECH = SHARED / "data" / "caltech101" / "101_ObjectCategories"
MODEL = f"local-dir:{(SHARED / 'models' / 'lit-mini').resolve().as_posix()}"
TEMPLATES = ["a photo of a {}.", "a drawing of a {}."]
QUERIES = unit_rows(7, D, 50)


def copy_photos(folder, **classes):
    """Create class folders with some of Caltech's photos, by their number."""
    for name, numbers in classes.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        images = sorted((CALTECH / name).iterdir())
        for number in numbers:
            shutil.copyfile(images[number], folder / name / images[number].name)
    return folder


@pytest.fixture(scope="module")
def built_pictures(tmp_path_factory, lit_mini):
    place = tmp_path_factory.mktemp("pictures")
    source = open_source(copy_photos(place / "photos", panda=range(4), pizza=range(4)))
    reader = Reader(lit_mini, views=2, seed=7)
    build_index(source, place / "index", reader, templates=TEMPLATES, fit="none")
    return place


@pytest.fixture
def pictures(built_pictures, tmp_path):
    """A copy of an index of four pandas and four pizzas, each with two views, with the photos beside it."""
    return shutil.copytree(built_pictures, tmp_path / "pictures") / "index"


def features_of(lit_mini, folder, **options):
    return Reader(lit_mini, **options).encode(open_source(folder)).features


@pytest.fixture
def table(tmp_path):
    labels = ["cat", "dog"] * 3
    cameras = list("abcabc")
    return write_table(tmp_path / "train.parquet", unit_rows(6, D), labels, camera=cameras)


@pytest.fixture
def text(tmp_path):
    return write_table(tmp_path / "text.parquet", unit_rows(2, D, 1), ["cat", "dog"])


@pytest.fixture
def index(tmp_path, table, text):
    """Six keys of two classes: 0, 2, 4 are cats, 1, 3, 5 dogs."""
    build_index(
        open_source(table),
        tmp_path / "index",
        Reader(),
        text=text,
        alpha=1.0,
        beta=4.0,
    )
    return tmp_path / "index"


@pytest.fixture
def grown(index, tmp_path):
    """The same index with two more keys."""
    changes.add(
        index,
        open_source(write_table(tmp_path / "late.parquet", unit_rows(2, D, 3), ["dog", "cat"])),
        Reader(),
    )
    return index


def opened(folder, **options):
    return Index.load(folder, **options)


def version(folder):
    return Versions(folder).manifest().version


def labels_of(folder):
    table = opened(folder).labels
    return dict(sorted(zip(table["key_id"].to_pylist(), table["label"].to_pylist(), strict=True)))


def data_files(folder):
    """Return the inode and the modification time of each data file."""
    found = ((path, path.stat()) for path in (folder / "data").iterdir())
    return {path.name: (stat.st_ino, stat.st_mtime_ns) for path, stat in found}


def flip(path):
    """Damage a file, or repair it again."""
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))


def refused(result, status, *words):
    """Check that a command failed without output, and that its error contains these words."""
    assert result.exit_code == status, result.output
    assert result.stdout == ""
    for word in words:
        assert str(word) in result.stderr


def test_added_photos_become_the_keys_of_a_build(run, pictures, lit_mini, tmp_path):
    """Their views and the seed are those of the index."""
    new = copy_photos(tmp_path / "new", okapi=range(2), panda=range(4, 6))
    before = opened(pictures)
    done = ok("index add", pictures, new, "--device", "cpu")
    assert done.stdout == f"{pictures}: version 2, added 4 shots, 1 new class: okapi\n"
    cache = verify(pictures)
    assert cache.class_names == ["panda", "pizza", "okapi"]  # existing classes keep their place
    assert_allclose(
        cache.text_weights[2], text_weights(lit_mini, ["okapi"], TEMPLATES)[0], atol=1e-5
    )
    assert torch.equal(cache.text_weights[:2], before.text_weights)
    rows = {row["key_id"]: row for row in cache.labels.to_pylist()}
    assert [(rows[i]["label"], rows[i]["shot"]) for i in range(8, 12)] == [
        ("okapi", 0),
        ("okapi", 1),
        ("panda", 4),
        ("panda", 5),
    ]
    place = {key_id: row for row, key_id in enumerate(cache.labels["key_id"].to_pylist())}
    own = cache.keys[np.array([place[i] for i in range(8, 12)])]
    assert_allclose(own, features_of(lit_mini, new, views=2, seed=7), atol=1e-5)
    assert {rows[i]["views"] for i in range(8, 12)} == {2}
    assert all(rows[i]["digest"] and rows[i]["source"].startswith(str(new)) for i in range(8, 12))
    image = next((new / "okapi").iterdir())
    answer = run("classify", pictures, image, "--explain", "--format", "json", "--device", "cpu")
    assert json_rows(answer)[0]["shot"] is True
    assert "1 of 1 photo are shots of this index" in answer.stderr


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", ["", "lance://"])
def test_add_skips_known_features(run, tmp_path, kind, dtype, monkeypatch):
    rows = unit_rows(8, D, 5)
    rows[0, 0] = 0.0
    first = write_table(
        tmp_path / "first.parquet", rows[:4], ["cat", "dog"] * 2, digest=["", None, "", None]
    )
    rows[0, 0] = -0.0  # the same number
    second = write_table(
        tmp_path / "second.parquet", rows[2:], ["cat", "dog", "dog", "cat", "emu", "cat"]
    )
    place = f"{kind}{tmp_path / 'index'}"
    ok(
        "index build --fit none",
        first,
        "--norms",
        "keep",
        "--dtype",
        dtype,
        "--out",
        place,
    )
    add = ("index", "add", place, "--norms", "keep")
    assert run(*add, first).stdout == f"{place}: version 1, added 0 shots, skipped 4 known images\n"
    done = run(*add, second)  # two rows are known, both under the same label
    assert (
        done.stdout
        == f"{place}: version 2, added 4 shots, 1 new class: emu, skipped 2 known images\n"
    )
    for again in (first, second):
        assert "version 2, added 0 shots" in run(*add, again).stdout
    labels = ["dog", "cat", "cat", "emu"]  # only one is the same
    other = write_table(tmp_path / "other.parquet", rows[:4], labels)
    assert run(*add, other).stdout == f"{place}: version 3, added 3 shots, skipped 1 known image\n"
    monkeypatch.setattr(
        changes, "COMPARED", 3
    )  # beyond this number, features without a digest are not compared
    assert run(*add, first).stdout == f"{place}: version 4, added 4 shots\n"


def test_build_and_add_warn_about_a_photo_in_two_classes(run, pictures, tmp_path):
    wrong = tmp_path / "wrong"
    known = sorted((pictures.parent / "photos" / "panda").iterdir())[0]
    (wrong / "pizza").mkdir(parents=True)
    shutil.copyfile(known, wrong / "pizza" / "x.jpg")
    done = ok("index", "add", pictures, wrong, "--device", "cpu")  # known, but in another class
    assert done.stdout == f"{pictures}: version 2, added 1 shot\n"
    assert "in two classes:" in done.stderr
    assert "x.jpg (pizza)" in done.stderr
    assert f"{known.name} (panda)" in done.stderr
    copy_photos(wrong, panda=range(1))
    built = ok(
        "index build --fit none",
        wrong,
        "--model",
        MODEL,
        "--device",
        "cpu",
        "--out",
        tmp_path / "i",
    )
    assert "in two classes:" in built.stderr
    assert "identical image" in built.stderr
    quiet = run("--quiet index add", pictures, wrong, "--device", "cpu")
    assert quiet.stderr == ""


def test_new_classes_of_a_feature_table_need_a_text_table(run, index, tmp_path):
    more = write_table(tmp_path / "more.parquet", unit_rows(3, D, 4), ["owl", "bat", "cat"])
    before = snapshot(index)
    refused(run("index add", index, more), 1, "class 'bat'", "needs a text weight", "(text)")
    some = write_table(tmp_path / "some.parquet", unit_rows(1, D, 5), ["bat"])
    refused(run("index add", index, more, "--text", some), 1, "class 'owl'", "(text)")
    short = write_table(tmp_path / "short.parquet", unit_rows(2, D + 1, 5), ["bat", "owl"])
    refused(
        run("index add", index, more, "--text", short), 1, "short.parquet", f"{D + 1} values", D
    )
    assert snapshot(index) == before
    weights = unit_rows(3, D, 6)
    every = write_table(tmp_path / "every.parquet", weights, ["cat", "owl", "bat"])
    text = opened(index).text_weights
    ok("index add", index, more, "--text", every)
    cache = verify(index)
    assert cache.class_names == ["cat", "dog", "bat", "owl"]
    assert torch.equal(
        cache.text_weights[:2], text
    )  # also the cat's, although the table has another one
    assert_allclose(cache.text_weights[2:], weights[[2, 1]], atol=1e-6)


def test_add_warns_about_another_spelling_of_a_class(run, index, tmp_path):
    more = write_table(tmp_path / "more.parquet", unit_rows(3, D, 4), ["CAT", "cat", "the owl"])
    refused(run("index", "add", index, more), 1, "'CAT'", "'cat'")  # CAT has no text weight yet
    text = write_table(tmp_path / "new.parquet", unit_rows(2, D, 5), ["CAT", "the owl"])
    done = run("index add", index, more, "--text", text)
    assert done.stdout == f"{index}: version 2, added 3 shots, 2 new classes: CAT, the owl\n"
    (warning,) = done.stderr.splitlines()
    command = f"retrieval-tip index rename {index} CAT cat"
    assert "'CAT'" in warning
    assert "'cat'" in warning
    assert warning.endswith(command)
    assert (
        run(*shlex.split(command)[1:]).stdout
        == f"{index}: version 3, merged CAT into cat (1 shot)\n"
    )
    assert opened(index).class_names == ["cat", "dog", "the owl"]
    assert labels_of(index)[6] == "cat"
    other = Index.from_features(
        unit_rows(2, D, 6), ["The_Owl", "dog"], ["The_Owl", "dog"], text_weights=unit_rows(2, D)
    )
    other.save(tmp_path / "other")
    assert changes.merge(index, tmp_path / "other").alike == {"The_Owl": "the owl"}


@pytest.fixture
def other(tmp_path):
    """An index of three keys, two of them in a class that ``index`` lacks."""
    source = write_table(
        tmp_path / "o.parquet", unit_rows(3, D, 7), ["owl", "cat", "owl"], lens=["x", "y", "z"]
    )
    weights = write_table(tmp_path / "ot.parquet", unit_rows(2, D, 8), ["owl", "cat"])
    build_index(open_source(source), tmp_path / "other", Reader(), text=weights, fit="none")
    return tmp_path / "other"


def test_an_invalid_merge_is_refused_and_changes_nothing(run, index, other, pictures, tmp_path):
    before = snapshot(index)
    values = Index.from_features(
        unit_rows(2, D),
        ["cat", "dog"],
        ["cat", "dog"],
        values=np.ones((2, 2), dtype=np.float32),
    )
    values.save(tmp_path / "values")
    refused(
        run("index merge", index, tmp_path / "values"), 1, tmp_path / "values", "trained values"
    )
    Index.from_features(unit_rows(1, D), ["owl"], ["owl"]).save(tmp_path / "bare")
    refused(run("index merge", index, tmp_path / "bare"), 1, "'owl'", "text weight")
    Index.from_features(unit_rows(1, D + 1), ["cat"], ["cat"]).save(tmp_path / "long")
    refused(run("index merge", index, tmp_path / "long"), 1, f"{D + 1} values", f"requires {D}")
    refused(run("index merge", index, tmp_path / "nowhere"), 1, "nowhere")
    refused(run("index merge", index, index), 2, "itself")
    assert snapshot(index) == before
    model = f"local-dir:{tiny(tmp_path / 'model')}"
    foreign = tmp_path / "foreign"
    photos = pictures.parent / "photos"
    ok(
        "index build --fit none",
        photos,
        "--model",
        model,
        "--device",
        "cpu",
        "--out",
        foreign,
    )
    refused(run("index merge", pictures, foreign), 1, MODEL, model, "cannot be compared")
    assert version(pictures) == 1


def test_key_ids_takes_several_ids_and_excludes_a_condition(run, index):
    before = snapshot(index)
    for command in (("remove", index), ("relabel", index, "cat")):
        for which in ((), ("--where", "shot = 0", "--key-ids", 1)):
            refused(run("index", *command, *which), 2, "where, key_ids")
        for wrong in ("1,", "x", "1.5", "1;2", "²"):
            refused(run("index", *command, "--key-ids", wrong), 2, "--key-ids", "key id")
    assert snapshot(index) == before
    done = run("index remove", index, "--key-ids", "0, 3", "--key-ids", 4)
    assert done.stdout == f"{index}: version 2, removed 3 shots\n"
    assert sorted(labels_of(index)) == [1, 2, 5]


@pytest.fixture
def lists(tmp_path):
    """An index of 40 keys in 16 lists."""
    cache = Index.from_features(unit_rows(40, D), ["a", "b"] * 20, ["a", "b"], index="IVF16,Flat")
    cache.save(tmp_path / "lists")
    return tmp_path / "lists"


def test_an_index_can_have_fewer_keys_than_lists(run, lists):
    ok("index remove", lists, "--where", "key_id > 9")
    assert verify(lists).n == 10
    refused(run("index set", lists, "--dtype", "float32"), 2, "'IVF16,Flat'")
    ok("index set", lists, "--index", "Flat")


def test_lists_are_trained_again_if_the_keys_double(lists):
    cache = opened(lists)
    for more, trained in ((3, 40), (40, 83)):
        cache = cache.edited(Edits(add=NewKeys(unit_rows(more, D, 9), ["a"] * more)))
        cache.save(lists)
        assert cache.index.trained == verify(lists).index.trained == trained


def test_trained_values_of_merged_classes_add_up(tmp_path):
    keys = unit_rows(6, D)
    values = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
    cache = Index.from_features(keys, list("aabbcc"), list("abc"), values=values)
    a, b, c = cache.terms(QUERIES).cache.T
    cache = cache.edited(Edits(rename=("a", "c")))
    assert_allclose(cache.terms(QUERIES).cache, torch.stack([b, a + c], dim=1), atol=1e-5)


def test_rename_refuses_unknown_classes_and_invalid_names(run, index, lit_mini):
    before = snapshot(index)
    refused(run("index rename", index, "owl", "kite"), 1, "'owl'", "cat, dog")
    for wrong in ("", " dog", "a\nb", "x" * 1025):
        refused(run("index rename", index, "dog", wrong), 1, "class name", "1,024")
    assert (
        run("index rename", index, "dog", "dog").stdout
        == f"{index}: version 1, renamed dog to dog (0 shots)\n"
    )
    with pytest.raises(BackboneError):
        changes.rename(index, "dog", "wolf", lit_mini)
    assert snapshot(index) == before


def test_rename_encodes_the_new_name_if_asked(run, pictures, lit_mini):
    old = opened(pictures).text_weights.numpy()
    ok("index rename", pictures, "panda", "crayfish")
    assert_array_equal(opened(pictures).text_weights.numpy(), old)
    done = run("index rename", pictures, "crayfish", "starfish", "--encode")
    assert "starfish (4 shots)" in done.stdout, done.output
    weights = verify(pictures).text_weights.numpy()
    assert_allclose(weights[0], text_weights(lit_mini, ["starfish"], TEMPLATES)[0], atol=1e-6)
    assert_array_equal(weights[1], old[1])
    assert "new text weight" in Versions(pictures).history()["change"].to_pylist()[-1]


def test_new_templates_give_new_text_weights(run, pictures, lit_mini, tmp_path):
    other = f"local-dir:{tiny(tmp_path / 'other')}"
    refused(run("index set", pictures, "--template", "a {}", "--model", other), 1, MODEL, other)
    ok(
        "index set",
        pictures,
        "--template",
        "the {}",
        "--template",
        "one {}",
        "--alpha",
        2,
        "--device",
        "cpu",
    )
    cache = verify(pictures)
    assert_allclose(
        cache.text_weights,
        text_weights(lit_mini, ["panda", "pizza"], ["the {}", "one {}"]),
        atol=1e-5,
    )
    assert (cache.templates, cache.settings.alpha) == (["the {}", "one {}"], 2)
    assert cache.provenance["text"] == "templates"
    assert Versions(pictures).history()["change"].to_pylist()[-1] == "set alpha 2, 2 templates"


def test_a_failed_rebuild_changes_nothing(run, index):
    before = snapshot(index)
    for factory in ("Nonsense", "IVF1000,Flat", "L2norm,Flat", ""):
        result = run("index set", index, "--index", factory)
        refused(result, 2, "index")
    refused(run("index set", index, "--dtype", "int8"), 2, "int8")
    with pytest.raises(UsageError, match="int8"):
        changes.rebuild(index, dtype="int8")
    large = Index.from_features(
        1e6 * unit_rows(2, D),
        ["cat", "dog"],
        ["cat", "dog"],
        settings=Settings(beta=0.0),
    )
    large.save(index.with_name("large"))
    refused(
        run("index set", index.with_name("large"), "--dtype", "float16"),
        1,
        "too large for float16",
    )
    assert snapshot(index) == before


@pytest.fixture
def flipped(tmp_path):
    """Ten shots of each of three classes; the labels of item-0 (a cat), item-10 (a dog), item-29 (an owl) are wrong."""
    keys = np.eye(D, dtype=np.float32)[np.arange(30) // 10] + 0.5 * unit_rows(30, D)
    labels = ["cat"] * 10 + ["dog"] * 10 + ["owl"] * 10
    labels[0], labels[10], labels[29] = "dog", "owl", "cat"
    rows = write_table(
        tmp_path / "rows.parquet", keys / np.linalg.norm(keys, axis=1, keepdims=True), labels
    )
    build_index(open_source(rows), tmp_path / "flipped", Reader())
    return tmp_path / "flipped"


@pytest.mark.parametrize("style", ["csv", "parquet"])
def test_an_edited_audit_is_applied_as_one_version(run, flipped, tmp_path, style):
    table = tmp_path / "suspects.csv"
    edited = tmp_path / f"edited.{style}"
    ok("index audit", flipped, "--out", table)
    rows = pd.read_csv(table).set_index("source", drop=False)
    assert rows["suggested"].to_dict() == {"item-0": "cat", "item-10": "dog", "item-29": "owl"}
    rows.loc["item-10", "suggested"] = "cat"
    some = pa.Table.from_pandas(rows.loc[["item-0", "item-10"]], preserve_index=False)
    write_tables([some], some.schema, style, edited)
    done = run("index audit", flipped, "--apply", edited)
    assert (done.exit_code, done.stdout) == (0, f"{flipped}: version 2, relabelled 2 shots\n"), (
        done.output
    )
    assert done.stderr == ""  # there are no photos to copy
    found = opened(flipped).labels
    labels = dict(zip(found["source"].to_pylist(), found["label"].to_pylist(), strict=True))
    assert (labels["item-0"], labels["item-10"], labels["item-29"]) == ("cat", "cat", "cat")
    assert Versions(flipped).history()["change"].to_pylist() == [
        "build",
        "2 examples: 1 dog became cat, 1 owl became cat",
    ]
    again = run("index audit", flipped, "--apply", edited)
    refused(again, 1, edited, f"key {rows['key_id']['item-0']}", "'cat'", "'dog'")
    assert version(flipped) == 2


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("key_id,label,suggested\n1,cat,dog\n99,cat,dog\n", "99"),
        ("key_id,label,suggested\n1,cat,dog\n2,owl,dog\n", "'owl'"),
        ("key_id,label,suggested\n1,cat,dog\n3,cat,whale\n", "'whale'"),
        ("key_id,label,suggested\n1,cat,dog\n1,cat,owl\n", "key 1"),
        ("key_id,label,suggested\n1,cat,dog\n1.5,cat,dog\n", "key_id"),
        ("key_id,label,suggested\n1,cat,dog\n2,,dog\n", "label"),
        ("key_id,label,suggested\n1,cat\n", ""),
        ("key_id,label\n1,cat\n", "suggested"),
        ("key_id,label,suggested\n" + "1,cat,dog\n" * 31, "31"),
        (
            '{"key_id": 1, "label": "cat", "suggested": "dog"}\n{"key_id": [2], "label": "cat"}',
            "key_id",
        ),
        ("", ""),
    ],
)
def test_an_invalid_audit_table_changes_nothing(run, flipped, tmp_path, text, word):
    table = tmp_path / "suspects.csv"
    before = snapshot(flipped)
    table.write_text(text)
    result = run("index audit", flipped, "--apply", table)
    refused(result, 1, table, word)
    assert result.stderr.count("\n") == 1
    assert snapshot(flipped) == before


def test_where_answers_like_an_index_of_the_matching_keys(run, grown, table, text, tmp_path):
    rows = pq.read_table(table)
    pq.write_table(
        rows.filter(pa.array([camera != "a" for camera in rows["camera"].to_pylist()])),
        tmp_path / "some.parquet",
    )
    build_index(
        open_source(tmp_path / "some.parquet"),
        tmp_path / "few",
        Reader(),
        text=text,
        alpha=1.0,
        beta=4.0,
    )
    asked = write_table(
        tmp_path / "q.parquet", QUERIES, ["cat", "dog", "cat", "dog", "cat", "dog", "cat"]
    )
    options = ("--logits", "--format", "json")
    where = ("--where", "camera <> 'a'")  # NULL, the camera of late keys, does not match
    done = ok("classify", grown, asked, *options, *where)
    assert done.stderr == "where: 4 of 8 shots match (cat 2/4, dog 2/4)\n"
    some = json_rows(done)
    few = json_rows(run("classify", tmp_path / "few", asked, *options))
    assert [row["label"] for row in some] == [row["label"] for row in few]
    assert_allclose([row["logits"] for row in some], [row["logits"] for row in few], atol=1e-4)
    done = run("evaluate", grown, asked, "--json", *where)
    assert done.stderr == "where: 4 of 8 shots match (cat 2/4, dog 2/4)\n"
    one = json.loads(done.stdout)
    other = json.loads(run("evaluate", tmp_path / "few", asked, "--json").stdout)
    assert {name: one[name] for name in ("top1", "cache_top1", "n")} == {
        name: other[name] for name in ("top1", "cache_top1", "n")
    }
    dogs = run("evaluate", grown, asked, "--json", "--where", "label = 'dog'")
    assert json.loads(dogs.stdout)["cache_top1"] == pytest.approx(
        3 / 7
    )  # the cache alone cannot answer cat
    for where in ("label = 'owl'", "true; DROP TABLE labels"):
        refused(run("classify", grown, asked, "--where", where), 2, "where:")


def test_where_only_answers_with_matching_classes_if_there_is_no_text(run, tmp_path):
    names = [str(i) for i in range(36)]
    table = write_table(
        tmp_path / "t.parquet", unit_rows(36, 8), [str(i // 6) for i in range(36)], ids=names
    )
    ok("index build", table, "--out", tmp_path / "i")
    where = ("--where", "label IN ('0', '4')")
    done = run(
        "classify", tmp_path / "i", table, "--top", 6, "--logits", "--format", "json", *where
    )
    for row in json_rows(done):
        assert set(row["labels"]) == {"0", "4"}
        assert sum(row["probabilities"]) == pytest.approx(1)
        assert len(row["logits"]) == 2


def test_a_fast_check_hashes_small_files_and_compares_sizes_of_large_ones(run, tmp_path):
    place = tmp_path / "i"
    Index.from_features(unit_rows(1100, 1024), ["cat", "dog"] * 550, ["cat", "dog"]).save(place)
    large, small = (
        place / Versions(place).manifest().files[kind].name for kind in ("keys", "labels")
    )
    flip(large)
    assert opened(place, verify="fast").n == 1100
    more = write_table(tmp_path / "more.parquet", unit_rows(1, 1024, 4), ["cat"])
    refused(
        run("index add", place, more), 1, large.name
    )  # damage is not copied under a valid digest
    for options in ((), ("--verify", "full")):  # which is the default
        refused(run("classify", place, more, *options), 1, large.name, "damaged")
    flip(large)
    ok("classify", place, more, "--verify", "full")
    flip(small)
    refused(run("classify", place, more, "--verify", "fast"), 1, small.name, "damaged")
    flip(small)
    with large.open("ab") as file:
        file.write(b"x")
    refused(run("classify", place, more, "--verify", "fast"), 1, large.name, "damaged")
    with pytest.raises(UsageError, match="never"):
        opened(place, verify="never")


def test_reload_only_reads_changed_files(grown):
    """``test_living.py`` tests what a reader answers before and after."""
    reader = opened(grown)
    old = set(data_files(grown))
    changes.remove(grown, key_ids=[0, 7])
    Versions(grown).collect(1)
    unread = set(data_files(grown)) & old
    assert unread
    for name in unread:
        flip(grown / "data" / name)  # not noticed, because the file is not read again
    now = reader.reload()
    for name in unread:
        flip(grown / "data" / name)
    assert (now.version, now.n, reader.version, reader.n) == (3, 6, 2, 8)
    assert torch.equal(now.logits(QUERIES), opened(grown).logits(QUERIES))
    with pytest.raises(UsageError, match="reload:"):
        Index.from_features(unit_rows(2, D), ["a", "b"], ["a", "b"]).reload()


def test_saving_over_a_newer_version_is_refused(index):
    stale = opened(index)
    changes.remove(index, key_ids=[0])
    stale = stale.edited(Edits(add=NewKeys(unit_rows(1, D, 9), ["cat"])))
    before = snapshot(index)
    with pytest.raises(StoreError, match="from version 1 to 2"):
        stale.save(index)
    assert snapshot(index) == before
    fresh = stale.reload()
    fresh = fresh.edited(Edits(add=NewKeys(unit_rows(1, D, 9), ["cat"])))
    assert fresh.next_key_id == 7
    fresh.save(index)
    assert version(index) == 3
    with pytest.raises(StoreError, match="from version 1 to 3"):
        opened(index, version=1).save(index)


def test_a_clone_into_an_index_is_refused(index, other):
    for place, word in ((index / "copy", "inside the index"), (other, "already")):
        with pytest.raises(StoreError, match=word):
            changes.clone(index, place)
    assert not (index / "copy").exists()


def test_gc_keeps_the_last_ten_versions(run, flipped):
    for k in range(1, 12):
        changes.configure(flipped, k=k)
    assert run("index gc", flipped).stdout.startswith(f"{flipped}: deleted 2 versions, ")
    assert Versions(flipped).history()["version"].to_pylist() == list(range(3, 13))
