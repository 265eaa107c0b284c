"""Building an index: shots, views, text weights, key types, versions and errors."""

import hashlib
import json
import logging
import subprocess

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import warm
from numpy.testing import assert_allclose
from tables import unit_rows, write_parts, write_table

from retrieval_tip import verify
from retrieval_tip.data import images
from retrieval_tip.data.reader import Reader
from retrieval_tip.data.source import few_shot, read_item
from retrieval_tip.data.sources import open_source
from retrieval_tip.errors import InputError, UsageError
from retrieval_tip.index.build import build_index
from retrieval_tip.index.items import read_text_table

NAMES = ["ant", "bee", "cat"]


@pytest.fixture
def table(tmp_path):
    """Thirty rows of three classes, in random order."""
    labels = np.random.default_rng(1).permutation(NAMES * 10).tolist()
    return write_table(tmp_path / "t.parquet", unit_rows(30, 8), labels)


def build(path, out, **options):
    return build_index(
        open_source(path), out, Reader(seed=options.pop("seed", 1)), **options, fit="none"
    )


def test_shots_are_drawn_by_the_published_rule(table, tmp_path):
    cache = build(table, tmp_path / "i", shots=4, seed=7)
    labels = open_source(table).labels
    assert sorted(cache.labels["source"].to_pylist()) == sorted(
        f"item-{i}" for i in few_shot(labels, 4, 7)
    )
    assert cache.provenance["shots"] == 4
    assert cache.provenance["seed"] == 7


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, ("Classes", 8 * 7 * 16)),  # 2240 keys, too many to search all
        ({"k": 50}, ("Classes", 50)),
        ({"k": "all"}, ("Classes", None)),
    ],
)
def test_auto_chooses_the_index_and_k_unless_k_is_given(tmp_path, more, expected):
    names = [f"class {i}" for i in range(20)]
    table = write_table(tmp_path / "many.parquet", unit_rows(7 * 16 * 20, 8), 7 * 16 * names)
    build(table, tmp_path / "auto", index="auto", **more)
    cache = verify(tmp_path / "auto")
    assert (cache.index_type, cache.settings.k) == expected


OPENS = """
import json, os, sys
import pyarrow as pa
from retrieval_tip.cli.program import main

def noting(opens):
    return lambda path, *more: [opened.append(path), opens(path, *more)][1]

opened = []
pa.memory_map, pa.OSFile = noting(pa.memory_map), noting(pa.OSFile)  # Arrow opens these without Python
sys.addaudithook(lambda event, found: opened.append(found[0]) if event == "open" else None)
main(sys.argv[1:], standalone_mode=False)
print(json.dumps([os.fsdecode(path) for path in opened if not isinstance(path, int)]))
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_build_and_an_add_open_each_file_of_a_feature_table_once(
    tmp_path, table, kind, warm_path
):
    given = table
    files = [table]
    if kind == "folder":
        given = tmp_path / "x=1"
        whole = pq.read_table(table)
        files = write_parts(given, whole.slice(0, 12), whole.slice(12))
    for words in (("build", given, "--out", tmp_path / "i"), ("add", tmp_path / "i", given)):
        command = [warm.python(warm_path), "-c", OPENS, "-q", "index", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        opened = json.loads(done.stdout.splitlines()[-1])
        assert [opened.count(str(file)) for file in files] == [1] * len(files)
    labels = verify(tmp_path / "i").labels
    assert sorted(labels["source"].to_pylist()) == sorted(f"item-{row}" for row in range(30))
    assert not {"x", "part"} & set(labels.column_names)


def test_small_classes_repeat_images_with_a_warning(table, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        cache = build(table, tmp_path / "i", shots=12)
    assert cache.n == 36
    assert (
        "3 classes have fewer than 12 images, so some images are repeated: ant, bee, cat"
        in caplog.text
    )


def test_text_tables_average_prompts_and_order_the_classes(tmp_path, table):
    rows = unit_rows(5, 8, 3)
    text = write_table(tmp_path / "text.parquet", rows, ["cat", "dog", "ant", "cat", "bee"])
    names, weights = read_text_table(text)
    assert names == ("cat", "dog", "ant", "bee")
    mean = (rows[0] + rows[3]) / 2
    assert_allclose(weights[0], mean / np.linalg.norm(mean), rtol=1e-5)
    assert_allclose(weights[1:], rows[[1, 2, 4]], rtol=1e-5)
    cache = build(table, tmp_path / "i", text=text)  # dog has no key, which is allowed
    assert cache.class_names == ["cat", "dog", "ant", "bee"]
    assert cache.logits(unit_rows(2, 8)).shape == (2, 4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "int8"}, "dtype"),
        ({"alpha": -1.0}, "alpha"),
        ({"k": 0}, "k is 0"),
        ({"shots": 0}, "shots"),
        ({"index": "Nonsense"}, "Nonsense"),
        ({"templates": ["a {}"]}, "need a backbone"),
        ({"templates": ["a {}"], "text": "t"}, "give only one"),
    ],
)
def test_invalid_settings_are_refused_and_write_nothing(table, tmp_path, options, words):
    with pytest.raises(UsageError, match=words):
        build(table, tmp_path / "i", **options)
    assert not (tmp_path / "i").exists()


def test_views_of_photos_are_averaged_then_normalised(shared, lit_mini, tmp_path):
    source = open_source(shared / "data/caltech101/split_zhou_Caltech101.json").take([0, 1, 20])
    cache = build_index(source, tmp_path / "i", Reader(lit_mini, views=3, seed=5), fit="none")
    data = read_item(source.paths[2])
    digest = hashlib.sha256(data).hexdigest()
    pixels = [lit_mini.view(images.decode(data), f"{digest}/crop/5/{v}") for v in range(3)]
    mean = lit_mini.encode_images(torch.stack(pixels)).mean(axis=0)
    row = cache.labels["digest"].to_pylist().index(digest)
    assert_allclose(cache.keys[row], mean / np.linalg.norm(mean), atol=1e-5)
    assert cache.labels["views"].to_pylist() == [3, 3, 3]


def test_suspicious_sources_get_a_warning(tmp_path, caplog):
    rows = np.eye(6, dtype=np.float32)
    one = write_table(tmp_path / "one.parquet", rows[:2], ["cat", "cat"])
    build_index(open_source(one), tmp_path / "1", Reader(), fit="none")
    assert "only one class, cat" in caplog.text
    bare = write_table(tmp_path / "bare.parquet", rows[:3], ["cat", "cat", "dog"])
    build_index(open_source(bare), tmp_path / "2", Reader(), fit="none")
    assert "only one photo of dog" in caplog.text
    views = write_table(
        tmp_path / "views.parquet",
        rows,
        ["cat"] * 3 + ["dog"] * 3,
        ids=["a", "a", "a", "b", "b", "c"],
    )
    build_index(open_source(views), tmp_path / "4", Reader())
    assert "6 rows have 3 ids (a, b); rows with the same id count as one photo" in caplog.text
    assert caplog.text.count("only one photo of cat") == 1


def test_labels_take_the_spelling_of_the_text_table(tmp_path):
    rows = np.eye(4, dtype=np.float32)
    words = write_table(tmp_path / "words.parquet", rows[:2], ["grand_piano", "Cat"])
    shots = write_table(tmp_path / "shots.parquet", rows, ["Grand Piano", "cat"] * 2)
    cache = build_index(open_source(shots), tmp_path / "i", Reader(), text=words, fit="none")
    assert cache.class_names == ["grand_piano", "Cat"]
    assert cache.counts == [2, 2]


D = 8
TEXTS = {
    "another dimension": (unit_rows(3, 16), NAMES, "16"),
    "a class missing": (unit_rows(2, D), NAMES[:2], "cat"),
    "other classes": (unit_rows(3, D), ["x", "y", "z"], "ant, bee, cat"),
    "no labels": (unit_rows(3, D), [None] * 3, "label"),
    "NaN": ([*unit_rows(2, D), [np.nan] * D], NAMES, "row 2"),
    "zero": ([*unit_rows(2, D), [0.0] * D], NAMES, "row 2"),
    "not normalised": (unit_rows(3, D) * 3, NAMES, "norm 3"),
    "prompts that cancel out": (
        [*unit_rows(3, D), -unit_rows(3, D)[0]],
        [*NAMES, "ant"],
        "cancel out",
    ),
}


@pytest.mark.parametrize("case", TEXTS)
def test_a_mismatched_text_table_is_refused(table, tmp_path, case):
    rows, labels, words = TEXTS[case]
    text = write_table(tmp_path / "text.parquet", rows, pa.array(labels, pa.string()))
    with pytest.raises(InputError, match=words):
        build(table, tmp_path / "out", text=text)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("norms", ["unit", "keep"])
def test_text_weights_are_normalised_for_rows_of_any_norm(table, tmp_path, norms):
    texts = [
        write_table(tmp_path / f"{scale}.parquet", unit_rows(3, D, 2) * scale, NAMES)
        for scale in (1, 3)
    ]
    made = [
        build_index(
            open_source(table), tmp_path / path.stem, Reader(norms=norms), text=path, fit="none"
        )
        for path in texts
    ]
    assert_allclose(
        made[0].logits(unit_rows(4, D, 3)), made[1].logits(unit_rows(4, D, 3)), rtol=1e-5
    )


def test_kept_norms_beyond_float16_are_refused(tmp_path):
    table = write_table(tmp_path / "t.parquet", unit_rows(6, D) * 1e6, NAMES * 2)
    with pytest.raises(InputError, match="float16"):
        build_index(open_source(table), tmp_path / "out", Reader(norms="keep"), dtype="float16")
    assert not (tmp_path / "out").exists()
