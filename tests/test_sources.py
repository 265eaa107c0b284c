"""Each kind of source yields its items in order, or an error names the faulty row and file."""

import io
import json
import os
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import buckets
import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import command_line, failed, json_rows, needs_real, ok
from fastapi.testclient import TestClient
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from serving import app_of, caltech_photos, random_index, server
from tables import picture, tiny, touch

from retrieval_tip.data import remote
from retrieval_tip.data.reader import Reader
from retrieval_tip.data.sources import (
    Source,
    kinds,
    open_inputs,
    open_items,
    open_source,
    read_item,
)
from retrieval_tip.errors import InputError
from retrieval_tip.model import Index
from retrieval_tip.wording import show


def write(path, text):
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def parquet(path, columns):
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), path)
    return path


def features(rows):
    return pa.array(
        np.eye(4, dtype=np.float32)[np.arange(rows) % 4].tolist(), pa.list_(pa.float32(), 4)
    )


def relative(source, folder):
    return [Path(path).relative_to(folder).as_posix() for path in source.paths]


def refused(path, *words, **options):
    with pytest.raises(InputError) as caught:
        open_source(path, **options)
    message = str(caught.value)
    for word in (path.name, *words):
        assert word in message
    return message


def test_class_folders_are_read_in_name_order(tmp_path):
    cats = [
        "cat/B.PNG",
        "cat/a/10.jpg",
        "cat/a/2.jpg",
        "cat/a/z/1.webp",
        "cat/a.jpeg",
        "cat/b.png",
        "cat/c/1.gif",
    ]
    touch(
        tmp_path,
        "dog/2.png",
        "dog/1.png",
        *cats[::-1],
        "Bird/b.webp",
        "cat/notes.txt",
        "cat/a/x.eps",
        "cat/png",
    )
    touch(tmp_path, ".git/x.png", "cat/.thumbs/x.png", "cat/.hidden.png")
    source = open_source(tmp_path)
    assert source.class_names == ("Bird", "cat", "dog")
    assert relative(source, tmp_path) == ["Bird/b.webp", *cats, "dog/1.png", "dog/2.png"]
    assert source.labels == ["Bird", *["cat"] * 7, "dog", "dog"]
    assert source.sources == list(source.paths or ())
    assert len(source) == 10


def test_skipped_files_of_a_folder_are_reported(tmp_path, caplog):
    touch(
        tmp_path,
        "cat/a.png",
        "cat/b.cr2",
        "cat/deep/c.CR2",
        "cat/d.pdf",
        "empty/readme.txt",
        "stray.png",
    )
    source = open_source(tmp_path)
    assert source.class_names == ("cat",)
    assert "without images: empty" in caplog.text
    assert "1 file outside the class folders" in caplog.text
    assert "2 .cr2, 1 .pdf, 1 .txt" in caplog.text


def test_train_val_and_test_folders_are_splits_not_classes(tmp_path, caplog):
    touch(tmp_path, "train/cat/a.png", "train/dog/b.png", "Valid/cat/c.png", "test/dog/d.png")
    source = open_source(tmp_path)
    assert source.class_names == ("cat", "dog")
    assert relative(source, tmp_path) == ["train/cat/a.png", "train/dog/b.png"]
    assert "part train, ignoring Valid, test" in caplog.text
    assert relative(open_source(tmp_path, split="val"), tmp_path) == ["Valid/cat/c.png"]
    assert relative(open_items(tmp_path, split="test"), tmp_path) == ["test/dog/d.png"]
    (tmp_path / "train").rename(tmp_path / ".train")
    refused(tmp_path, "Valid, test", "no part 'train'")


@pytest.mark.parametrize("folders", [("train/a.png", "bus/b.png"), ("train/a.png", "test/b.png")])
def test_a_class_may_be_called_train(tmp_path, folders):
    touch(tmp_path, *folders)
    assert set(open_source(tmp_path).class_names) == {
        folder.partition("/")[0] for folder in folders
    }


def test_labels_of_a_hugging_face_folder_are_read_from_its_table(tmp_path):
    touch(tmp_path, "train/1.png", "train/2.png", "test/3.png", "test/deep/4.png")
    write(tmp_path / "train/metadata.csv", "file_name,label\n1.png,cat\n2.png,dog\n")
    source = open_source(tmp_path / "train")
    assert relative(source, tmp_path) == ["train/1.png", "train/2.png"]
    assert source.labels == ["cat", "dog"]
    assert relative(open_source(tmp_path), tmp_path) == ["train/1.png", "train/2.png"]
    touch(tmp_path, "whole/train/cat/1.png")
    write(tmp_path / "whole/metadata.csv", "file_name,label\ntrain/cat/1.png,cat\n")
    assert open_source(tmp_path / "whole").labels == ["cat"]


def test_heic_photos_are_read_with_an_extra_that_errors_mention(tmp_path, monkeypatch):
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "pillow_heif", None)
        assert "pip install 'pillow-heif>=" in kinds(Counter({".heic": 1, ".txt": 2}))
        assert "heic" not in kinds(Counter({".txt": 2}))
    pillow_heif = pytest.importorskip("pillow_heif")
    from PIL import Image

    from retrieval_tip.data import images

    pillow_heif.register_heif_opener()
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (64, 48), (200, 30, 30)).save(tmp_path / "cat/a.heic", quality=95)
    assert open_source(tmp_path).labels == ["cat"]
    picture = images.decode(read_item(tmp_path / "cat/a.heic"))
    assert picture.size == (64, 48)
    assert abs(picture.getpixel((30, 20))[0] - 200) < 6


@pytest.mark.parametrize(
    "read", [open_source, open_items, lambda where: list(open_inputs([where]))]
)
def test_web_addresses_are_not_read(read):
    with pytest.raises(InputError, match=r"https://x\.org/a\.jpg"):
        read("https://x.org/a.jpg")


def test_labels_match_known_classes_in_other_spellings(caplog):
    labels = ["Grand Piano", "straw-berry", "cat", "CAT", "unknown"]
    source = Source("s", pa.table({"source": labels, "label": labels}), tuple(labels))
    known = source.known_as(["grand_piano", "straw berry", "cat", "A", "a"])
    assert known.labels == ["grand_piano", "straw berry", "cat", "cat", "unknown"]
    assert known.class_names == ("grand_piano", "straw berry", "cat", "unknown")
    assert "Grand Piano to grand_piano" in caplog.text
    assert known.known_as(["grand_piano", "straw berry", "cat"]) is known
    either = Source("s", pa.table({"source": ["A "], "label": ["A "]}), ("A ",))
    assert either.known_as(["A", "a"]) is either  # ambiguous


def test_broken_and_circular_links_in_a_folder_are_skipped(tmp_path):
    touch(tmp_path, "cat/a.png")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "cat" / "up").symlink_to("..")
    (tmp_path / "cat" / "b.png").symlink_to("a.png")
    (tmp_path / "cat" / "loop.png").symlink_to("loop.png")  # reading it reports the loop
    (tmp_path / "linked").symlink_to("cat")
    source = open_source(tmp_path)
    names = ("a.png", "b.png", "loop.png")
    assert relative(source, tmp_path) == [
        f"{folder}/{name}" for folder in ("cat", "linked") for name in names
    ]
    assert source.class_names == ("cat", "linked")


@pytest.mark.parametrize("make", [[], ["a.png"], ["cat/notes.txt"], [".hidden/a.png"]])
def test_a_folder_without_class_folders_is_refused(tmp_path, make):
    touch(tmp_path, *(f"star fish/{name}" for name in make))
    (tmp_path / "star fish").mkdir(exist_ok=True)
    words = ["1 image directly", str(tmp_path)] if make == ["a.png"] else []
    refused(tmp_path / "star fish", "one folder of images per class", *words)


def test_files_with_names_that_are_not_utf8_can_be_read(tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)  # noqa: PTH102 - bytes
    Path(os.fsdecode(folder + b"/\xff.png")).write_bytes(b"x")
    source = open_source(tmp_path)
    assert source.class_names == ("caf\\xe9",)
    assert source.sources == [f"{tmp_path}/caf\\xe9/\\xff.png"]
    assert Path(source.paths[0]).read_bytes() == b"x"


def test_two_folders_with_the_same_printed_name_are_refused(tmp_path):
    touch(tmp_path, "caf\\xe9/a.png")
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)  # noqa: PTH102 - bytes
    Path(os.fsdecode(folder + b"/b.png")).touch()
    refused(tmp_path, "caf\\xe9", "two")


def test_paths_in_a_table_are_relative_to_its_folder(tmp_path):
    table = write(
        tmp_path / "caf\udce9.csv", "path,label\nb/2.png,dog\n/abs/1.png,cat\nc.png,dog\n"
    )
    source = open_source(table)
    assert source.name == f"{tmp_path}/caf\\xe9.csv"  # a name that is not UTF-8
    assert source.paths == (str(tmp_path / "b/2.png"), "/abs/1.png", str(tmp_path / "c.png"))
    assert source.labels == ["dog", "cat", "dog"]
    assert source.class_names == ("cat", "dog")
    assert open_source(table, root="/images").paths == (
        "/images/b/2.png",
        "/abs/1.png",
        "/images/c.png",
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", "\ufeffpath,label,note\nx.png,cat,n\n"),
        ("t.csv", "path,label,note\r\nx.png,cat,n\r\n"),
        ("t.csv", "path,label,note\nx.png,cat,n"),
        ("t.csv", "note,label,path\nn,cat,x.png\n"),
        ("t.csv", '"path","label","note"\n"x.png","cat","n"\n'),
        ("t.csv", "path,label,note\n\nx.png,cat,n\n\n"),
        ("t.tsv", "path\tlabel\tnote\nx.png\tcat\tn\n"),
        ("t.csv", "path;label;note\nx.png;cat;n\n"),
        ("t.csv", "path\tlabel\tnote\nx.png\tcat\tn\n"),
        ("t.csv", 'path|label|note\n"x.png"|cat|n\n'),
        ("t.csv", "file_name,class,note\nx.png,cat,n\n"),
        ("t.csv", "image,label,note\nx.png,cat,n\n"),
        ("T.CSV", "path,label,note\nx.png,cat,n\n"),
    ],
)
def test_delimiters_column_names_and_line_endings_are_detected(tmp_path, name, text):
    source = open_source(write(tmp_path / name, text))
    assert relative(source, tmp_path) == ["x.png"]
    assert source.labels == ["cat"]
    assert source.items["note"].to_pylist() == ["n"]


@pytest.mark.parametrize("encoding", ["cp1252", "utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
def test_tables_in_the_encodings_of_spreadsheets_are_read(tmp_path, encoding, caplog):
    mark = "\ufeff" if encoding.endswith("be") else ""
    many = 30_000  # more than a block, so that non-ASCII characters come late
    text = (
        f"{mark}path;label;note\r\n"
        + "x.png;cat;the same again and again\r\n" * many
        + "ä/y.png;Löwe;5 €\r\n"
    )
    source = open_source(write(tmp_path / "t.csv", text.encode(encoding)))
    assert source.labels[many - 1 :] == ["cat", "Löwe"]
    assert source.paths[-1] == str(tmp_path / "ä/y.png")
    assert source.items["note"][-1].as_py() == "5 €"
    assert [record.message for record in caplog.records] == (
        [
            f"{tmp_path}/t.csv: not UTF-8; reading it as Windows-1252 (if that is wrong, save it as UTF-8)"
        ]
        * (encoding == "cp1252")
    )


def test_quoted_fields_may_contain_anything(tmp_path):
    table = write(
        tmp_path / "t.csv",
        'path,label,note\n"a, b.png","the ""best"" cat","two\nlines"\n"new\nline.png",é,\n',
    )
    source = open_source(table)
    assert relative(source, tmp_path) == ["a, b.png", "new\nline.png"]
    assert source.labels == ['the "best" cat', "é"]
    assert source.items["note"].to_pylist() == ["two\nlines", None]


def test_labels_that_look_like_numbers_or_dates_stay_text(tmp_path):
    """A reader that guesses types would turn these labels into numbers, dates and nulls."""
    labels = ["007", "1e3", "NA", "null", "nan", "True", "2020-01-01", "-", "0x10", "inf", " cat "]
    table = write(
        tmp_path / "t.csv",
        "path,label\n" + "".join(f"{i}.png,{label}\n" for i, label in enumerate(labels)),
    )
    assert open_source(table).labels == labels


def test_classes_are_the_labels_that_occur(tmp_path):
    table = write(tmp_path / "t.csv", "path,label\na.png,dog\nb.png,\nc.png,cat\n")
    source = open_items(table)
    assert source.class_names == ("cat", "dog")
    with pytest.raises(InputError, match="row 1 without a label"):
        _ = source.labels
    refused(table, "row 1 without a label")


def dictionary(values):
    return pa.array(values).dictionary_encode()


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["7", "8", "7"]),
        pa.array(["7", "8", "7"], pa.large_string()),
        pa.array(["7", "8", "7"], pa.string_view()),
        dictionary(["7", "8", "7"]),
        dictionary([7, 8, 7]),
        pa.array([7, 8, 7], pa.int8()),
        pa.array([7, 8, 7], pa.uint64()),
    ],
)
def test_labels_and_ids_may_have_any_text_or_integer_type(tmp_path, column):
    for key, more in (("path", {}), ("id", {"feature": features(3)})):
        source = open_source(parquet(tmp_path / "t.parquet", {key: column, "label": column} | more))
        assert source.labels == ["7", "8", "7"]
        assert [Path(name).name for name in source.sources] == ["7", "8", "7"]
        assert source.class_names == ("7", "8")


@pytest.mark.parametrize(
    "column",
    [
        pa.array([0.5, 1.0]),
        pa.array([True, False]),
        pa.array([b"a", b"b"]),
        pa.array([["a"], ["b"]]),
        pa.array([{"a": 1}, {"a": 2}]),
        pa.array([1, 2], pa.timestamp("s")),
    ],
)
def test_labels_and_ids_of_other_types_are_refused(tmp_path, column):
    refused(
        parquet(tmp_path / "t.parquet", {"path": ["a", "b"], "label": column}),
        "'label'",
        "expected text",
    )
    refused(
        parquet(
            tmp_path / "u.parquet", {"id": column, "label": ["a", "b"], "feature": features(2)}
        ),
        "'id'",
        "expected",
    )


def test_a_null_label_column_counts_as_no_labels(tmp_path):
    table = parquet(
        tmp_path / "t.parquet", {"id": ["a", "b"], "label": pa.nulls(2), "feature": features(2)}
    )
    source = open_items(table)
    assert len(source) == 2
    assert source.class_names == ()
    refused(table, "rows 0, 1 without a label")


@pytest.mark.parametrize("column", ["embedding", "vector"])
def test_feature_columns_of_other_programs_are_recognised(tmp_path, column):
    table = parquet(
        tmp_path / "t.parquet", {"id": ["a", "b"], "class": ["x", "y"], column: features(2)}
    )
    source = open_source(table)
    assert source.labels == ["x", "y"]
    assert source.items.column_names == ["source", "label"]
    assert_array_equal(Reader().encode(source).features, np.eye(4)[:2])


def test_a_feature_column_makes_a_feature_table(tmp_path):
    table = parquet(
        tmp_path / "t.parquet",
        {
            "feature": features(3),
            "who": [1, 2, 3],
            "label": ["b", "a", "b"],
            "id": ["x", "y", "x"],
            "path": ["p"] * 3,
        }
        | {"feature.note": ["n"] * 3},
    )
    source = open_source(table)
    assert source.paths is None
    assert source.rows.tolist() == [0, 1, 2]
    assert source.sources == ["x", "y", "x"]
    assert source.class_names == ("a", "b")
    assert source.items.column_names == ["source", "label", "who", "path", "feature.note"]


def test_bad_parquet_is_refused(tmp_path):
    bad_text = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(np.array([0, 2], np.int32)), pa.py_buffer(b"\xff\xfe")]
    )
    tables = [
        (
            pa.table({"path": pa.array([], pa.string()), "label": pa.array([], pa.string())}),
            ["no rows"],
        ),
        (pa.table({"id": ["a"], "label": ["a"]}), ["no column 'path'"]),
        (pa.table({"path": ["a"]}), ["no column 'label'"]),
        (pa.table({"id": ["a"], "feature": features(1)}), ["no column 'label'", "feature table"]),
        (pa.table({"path": bad_text, "label": ["x"]}), ["UTF8"]),
        (pa.table({"path": ["x"], "label": bad_text}), ["UTF8"]),
        (pa.table([["a"], ["b"], ["c"]], names=["path", "path", "label"]), ["duplicate"]),
        (
            pa.table(
                [["a"], ["b"], features(1), features(1)],
                names=["id", "label", "feature", "feature"],
            ),
            ["duplicate"],
        ),
    ]
    for number, (table, words) in enumerate(tables):
        refused(parquet(tmp_path / f"{number}.parquet", table), *words)
    for number, raw in enumerate([b"", b"PAR1", b"PAR1" * 50, b"garbage" * 50]):
        refused(write(tmp_path / f"raw{number}.parquet", raw), "cannot be read")


def split(path, entries, part="train"):
    return write(path, json.dumps({"train": [], "val": [], "test": []} | {part: entries}))


def test_classes_of_a_split_are_ordered_by_label_number(tmp_path):
    touch(tmp_path, "z.png")
    file = split(
        tmp_path / "s.json", [["z.png", 5, "ant"], ["y.png", 0, "zebra"], ["x.png", 5, "ant"]]
    )
    source = open_source(file)
    assert source.class_names == ("zebra", "ant")
    assert source.labels == ["ant", "zebra", "ant"]
    assert relative(source, tmp_path) == ["z.png", "y.png", "x.png"]
    assert source.name == f"{file} (train)"


@needs_real
def test_published_split_files_are_read(shared):
    for file in (shared / "data/splits").glob("split_zhou_*.json"):
        for part, entries in json.loads(file.read_text()).items():
            source = open_source(file, split=part, root="/images")
            assert source.paths == tuple(f"/images/{path}" for path, _, _ in entries)
            assert source.labels == [name for _, _, name in entries]
            assert list(source.class_names) == [
                name for _, name in sorted({(n, name) for _, n, name in entries})
            ]
    photos = open_source(shared / "data/caltech101/split_zhou_Caltech101.json", split="test")
    assert (len(photos), all(map(os.path.isfile, photos.paths))) == (999, True)


def test_each_part_of_a_split_can_be_opened(tmp_path):
    touch(tmp_path, "a.png")
    file = split(tmp_path / "s.json", [["a.png", 0, "ant"]], "test")
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        saved = write(tmp_path / f"{encoding}.json", file.read_text().encode(encoding))
        assert open_source(saved, split="test").labels == ["ant"]
    refused(file, "(train)", "empty")
    refused(file, "no part 'validation'", "'train', 'val', 'test'", split="validation")


def test_the_image_folder_beside_a_split_is_found(tmp_path):
    touch(tmp_path, "wrong/readme.txt", "images/cat/1.png", "images/cat/2.png", ".hidden/x")
    file = split(tmp_path / "s.json", [["cat/1.png", 0, "cat"], ["cat/2.png", 0, "cat"]])
    assert relative(open_source(file), tmp_path) == ["images/cat/1.png", "images/cat/2.png"]


def test_a_given_image_folder_is_used_without_a_search(tmp_path):
    file = split(tmp_path / "s.json", [["cat/1.png", 0, "cat"]])
    assert (
        open_source(file, root="/images").paths
        == open_items(file, root="/images").paths
        == ("/images/cat/1.png",)
    )
    refused(file, "cat/1.png", "--root")


def test_lone_surrogates_in_names_are_escaped(tmp_path):
    raw = '{"train": [["x\\ud800.png", 0, "c\\udfff"], ["\\udcff.png", 0, "c\\udfff"]]}'
    source = open_source(write(tmp_path / "s.json", raw), root="/images")
    assert source.class_names == ("c\\udfff",)
    assert source.sources == ["/images/x\\ud800.png", "/images/\\xff.png"]


BAD = {
    "t.csv": [
        (b"", ["cannot be read"]),
        (b"path,label\n", ["no rows"]),
        (b"place,label\nx.png,cat\n", ["no column 'path'", "place, label"]),
        (b"path,kind\nx.png,cat\n", ["no column 'label'", "path, kind"]),
        (b"path,label,path\nx.png,cat,y.png\n", ["duplicate"]),
        (b"path,label\nx.png,cat,more\n", ["cannot be read"]),
        ("path,label\nü.png,cat\n".encode() + b"\xff.png,cat\n", ["cannot be read", "UTF8"]),
        ("path,label\nx.png,cat\n".encode("utf-16")[:-1], ["cannot be read", "truncated"]),
        (b"path,label\n\xff\x81.png,cat\n", ["cannot be read"]),
        (b"\x00" * 100, []),
        (b"path,label\nx.png," + b"c" * 5000 + b"\n", ["row 0", "longer than"]),
        (b'path,label\n"x.png,cat\n', []),
        ("path,label\n" + "x.png,\n" * 9, ["rows 0, 1, 2, 3, 4 and 4 more without a label"]),
        ("path,label\nx.png,cat\n,cat\n", ["row 1 without a path"]),
        *(
            (f"path,label\ny.png,cat\nx.png,{blank}\n", ["row 1 without a label"])
            for blank in ("", '""', '" "', '"\t"', '"\u00a0"')
        ),
    ],
    "s.json": [
        ("", ["not JSON"]),
        ("[" * 100_000, ["not JSON"]),
        (b"\xff\xfe\xff", ["not JSON"]),
        ("[]", ["none"]),
        ('{"a": []}', ["no part 'train'", "'a'"]),
        ('{"train": {}}', ["no part 'train'"]),
        ('{"train": []}', ["empty"]),
        ('{"train": [["a.png", 0, "x"], ["a.png", 0, "y"]]}', ["entry 1", "'x'", "'y'"]),
        ('{"train": [["a.png", 0, "x"], ["a.png", 1, "x"]]}', ["'x'", "several"]),
        *(
            (
                json.dumps({"train": [["a.png", 0, "cat"], entry]}),
                ["entry 1", "[path, label, class name]"],
            )
            for entry in (
                None,
                [],
                ["a.png", 0],
                ["a.png", 0, "cat", 1],
                ["a.png", "0", "cat"],
                ["a.png", 0.0, "cat"],
                ["a.png", True, "cat"],
                [1, 0, "cat"],
                ["a.png", 0, None],
                ["a.png", 0, ""],
                "a.png",
                {},
            )
        ),
        *(
            (json.dumps({"train": [[path, 0, "cat"]]}), [])
            for path in ("a\0b.png", "\ud800.png", "x" * 300, "d/" * 3000, "")
        ),
        ('{"train": [["a.png", 0, "%s"]]}' % ("x" * 5000), ["row 0", "longer"]),
        ('{"train": [["a.png", %s, "x"]]}' % ("9" * 5000), ["not JSON"]),
    ],
}


@pytest.mark.parametrize(
    ("name", "text", "words"), [(name, *case) for name, cases in BAD.items() for case in cases]
)
def test_a_bad_file_is_refused(tmp_path, name, text, words):
    touch(tmp_path, "a.png")
    refused(write(tmp_path / name, text), *words)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x.png", "a single image"),
        ("a.zip", "unpack"),
        ("x.txt", "unknown file type"),
        ("x", "unknown file type"),
        ("gone.csv", "no such file"),
        ("gone", "no such file"),
        ("a\0b", "no such file"),
        ("x" * 5000, "no such file"),
        ("p.csv", "not a file"),
        ("p.parquet", "not a file"),
        ("p.json", "not a file"),  # pipes
    ],
)
def test_a_path_that_is_not_a_source_is_refused_with_the_reason(tmp_path, name, words):
    touch(tmp_path, "x.png", "a.zip", "x.txt", "x")
    if name.startswith("p."):
        os.mkfifo(tmp_path / name)
    refused(tmp_path / name, words)
    with pytest.raises(InputError, match=words):
        open_items(tmp_path / name)


def test_take_selects_items_in_any_order_with_repeats(tmp_path):
    table = write(tmp_path / "t.csv", "path,label,n\na,x,0\nb,y,1\nc,z,2\n")
    source = open_source(table).take([2, 0, 2])
    assert relative(source, tmp_path) == ["c", "a", "c"]
    assert source.labels == ["z", "x", "z"]
    assert source.items["n"].to_pylist() == ["2", "0", "2"]
    assert source.class_names == ("x", "y", "z")
    table = parquet(
        tmp_path / "t.parquet",
        {"id": ["a", "b", "c"], "label": ["x", "y", "z"], "feature": features(3)},
    )
    taken = open_source(table).take(np.array([2, 0, 2])).take([1, 2])
    assert taken.rows.tolist() == [0, 2]
    assert taken.sources == ["a", "c"]
    assert len(source.take([])) == 0


def test_items_need_no_labels(tmp_path):
    touch(tmp_path, "b.png", "a.jpg", ".c.png", ".thumbs/b.png", "empty/notes.txt")
    (tmp_path / "loop").symlink_to("loop")
    source = open_items(tmp_path)
    assert relative(source, tmp_path) == ["a.jpg", "b.png"]
    assert source.class_names == ()
    with pytest.raises(InputError, match="has no labels"):
        _ = source.labels
    touch(tmp_path, "classes/cat/b.png")
    assert open_items(tmp_path / "classes").labels == ["cat"]
    assert open_items(write(tmp_path / "t.csv", "path\na.png\n")).paths == (
        str(tmp_path / "a.png"),
    )
    assert open_items(
        parquet(tmp_path / "t.parquet", {"id": ["a"], "feature": features(1)})
    ).sources == ["a"]
    assert open_items(parquet(tmp_path / "u.parquet", {"feature": features(3)})).sources == [
        "0",
        "1",
        "2",
    ]


def open_all(arguments, stdin=()):
    return list(open_inputs([str(argument) for argument in arguments], stdin))


def test_inputs_are_read_in_the_given_order(tmp_path):
    touch(tmp_path, "f/2.png", "f/1.png", "f/sub/3.png", "z.png", "a.png")
    table = write(tmp_path / "t.csv", "path\nfrom-table.png\n")
    first, second, third = open_all(
        [tmp_path / "z.png", tmp_path / "f", table, "-", tmp_path / "a.png"], ["in.png\n"]
    )
    assert relative(first, tmp_path) == ["z.png", "f/1.png", "f/2.png", "f/sub/3.png"]
    assert relative(second, tmp_path) == ["from-table.png"]
    assert third.paths == ("in.png", str(tmp_path / "a.png"))


def test_lines_of_standard_input_are_paths():
    lines = ["a b.png\n", "\n", "c.png\r\n", " d.png\n", "-\n", "*.png\n", "é.png"]
    (source,) = open_all(["-"], lines)
    assert source.paths == ("a b.png", "c.png", " d.png", "-", "*.png", "é.png")
    assert open_all(["-"], []) == []


def test_a_glob_matches_files_in_name_order(tmp_path):
    """Like a shell, except that folders are skipped: ``**`` matches their images anyway."""
    touch(tmp_path, "b.png", "a.png", "c.txt", "deep/er/d.png")
    assert relative(open_all([f"{tmp_path}/*.png"])[0], tmp_path) == ["a.png", "b.png"]
    assert relative(open_all([f"{tmp_path}/**/*.png"])[0], tmp_path) == [
        "a.png",
        "b.png",
        "deep/er/d.png",
    ]
    touch(tmp_path, "a[1].png")
    assert relative(open_all([tmp_path / "a[1].png"])[0], tmp_path) == [
        "a[1].png"
    ]  # an existing file, not a pattern
    write(tmp_path / "t.csv", "path\nx.png\n")
    images, table = open_all([f"{tmp_path}/deep/**", f"{tmp_path}/*.csv"])
    assert relative(images, tmp_path) == ["deep/er/d.png"]
    assert relative(table, tmp_path) == ["x.png"]


def test_a_glob_or_folder_without_images_is_refused(tmp_path):
    with pytest.raises(InputError, match="no file matches"):
        open_all([f"{tmp_path}/*.png"])
    for given in (lambda: open_all([tmp_path]), lambda: open_items(tmp_path)):
        with pytest.raises(InputError, match="no images in this folder"):
            given()


@pytest.mark.parametrize(
    "name", ["gone.png", "gone.csv", "x" * 5000, "a\0b.png", "\udcff.png", "\ud800"]
)
def test_a_missing_image_is_reported_only_when_it_is_read(name):
    (source,) = open_all([name])
    assert source.paths == (name,)
    assert source.sources == [show(name)]


def test_photos_in_a_bucket_are_read_as_those_in_a_folder(run, shared, tmp_path, monkeypatch):
    buckets.use(monkeypatch, buckets.endpoint())
    bucket = f"s3://{buckets.fresh_bucket()}"
    photos = caltech_photos(shared, "train", 3, 4)
    for path, label in photos:
        (tmp_path / "photos" / label).mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / label / path.name).write_bytes(path.read_bytes())
        remote.system_of(bucket).pipe_file(
            f"{bucket}/photos/{label}/{path.name}", path.read_bytes()
        )
    model = ("--model", f"local-dir:{tiny(tmp_path / 'model')}")
    for name, place in (("here", tmp_path), ("there", bucket)):
        done = ok(
            "index build", f"{place}/photos", "--out", tmp_path / name, *model, "--fit", "none"
        )
    here, there = (Index.load(tmp_path / name) for name in ("here", "there"))
    assert there.class_names == here.class_names
    assert_allclose(there.keys, here.keys, atol=1e-6)
    one = f"photos/{photos[0][1]}/{photos[0][0].name}"
    answers = [
        run("classify", tmp_path / "there", f"{place}/{one}", "--format", "json")
        for place in (tmp_path, bucket)
    ]
    same, found = (json.loads(done.stdout) for done in answers)
    assert found | {"input": None} == same | {"input": None}
    assert found["input"] == f"{bucket}/{one}"
    for wrong in (f"{bucket}/nothing", f"{bucket}/none.parquet"):
        done = run("index build", wrong, "--out", tmp_path / "x", *model)
        failed(done, 1, wrong)
    done = run("encode", tmp_path / "photos", *model, "--out", f"{bucket}/t.parquet")
    failed(done, 2, "encode --ray")


OUTSIDER = """
from pathlib import Path
from retrieval_tip.data.source import of_images

def open(rest, *, split, labelled):
    paths = sorted(Path(rest).rglob("*.png"))
    names = [f"stash:{path}#0" for path in paths]
    return of_images(names, f"stash:{rest}", [path.parent.name for path in paths])

def read(path):
    return Path(path.removeprefix("stash:").removesuffix("#0")).read_bytes()
"""


@pytest.fixture
def stash(tmp_path):
    """A folder of photos, and the environment in which a package that adds the scheme ``stash`` is installed."""
    for number, name in enumerate(("cat/0", "cat/1", "dog/0", "dog/1")):
        path = tmp_path / "photos" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture((40 + number, 40)).save(path)
    site = tmp_path / "site"
    info = site / "outsider-0.1.dist-info"
    info.mkdir(parents=True)
    write(site / "outsider.py", OUTSIDER)
    write(info / "METADATA", "Metadata-Version: 2.1\nName: outsider\nVersion: 0.1\n")
    write(info / "entry_points.txt", "[retrieval_tip.sources]\nstash = outsider\n")
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    return tmp_path / "photos", os.environ | {"PYTHONPATH": path}


def test_a_source_of_another_package_works_everywhere_by_its_scheme(stash, tmp_path):
    photos, installed = stash
    tiny(tmp_path / "model")

    def said(*arguments, environment=installed, status=0):
        command = [sys.executable, "-m", "retrieval_tip", "-q", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == status, done.stderr
        return done.stdout + done.stderr

    model = ["--model", f"local-dir:{tmp_path / 'model'}"]
    said("index", "build", f"stash:{photos}/", *model, "--out", tmp_path / "index")
    shots = Index.load(tmp_path / "index").labels["source"].to_pylist()
    item = f"stash:{photos / 'cat/0.png'}#0"
    assert shots[0] == item
    for given in (f"stash:{photos}", item):  # a source and an item
        rows = said("classify", tmp_path / "index", given, "--exif", "--format", "json")
        assert json.loads(rows.splitlines()[0])["input"] == item
    read = "import sys; from retrieval_tip.data.sources import read_item as r; print(len(r(sys.argv[1])))"
    size = subprocess.check_output([sys.executable, "-c", read, item], env=installed, text=True)
    assert int(size) == (photos / "cat/0.png").stat().st_size
    plain = {**installed, "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    command = ("index", "build", f"stash:{photos}", *model, "--out", tmp_path / "b")
    assert "no such file" in said(*command, environment=plain, status=1)


def test_an_unknown_scheme_is_answered_with_those_that_are_installed(stash, tmp_path, monkeypatch):
    index = random_index(tmp_path / "index", 6, 16, 2)
    commands = (("index build", "stach:x", "--out", tmp_path / "b"), ("classify", index, "stach:x"))
    for installed in (False, True):
        if installed:
            monkeypatch.syspath_prepend(tmp_path / "site")
        for command in commands:
            done = command_line(*command)
            failed(done, 1, "stach:x: no such file or folder, and no such source; installed: ")
            assert ("stash" in done.stderr) == installed


def test_a_source_by_its_scheme_is_labelled_served_added_audited_and_searched(
    stash, tmp_path, monkeypatch
):
    photos, installed = stash
    monkeypatch.setenv("PYTHONPATH", installed["PYTHONPATH"])
    monkeypatch.syspath_prepend(tmp_path / "site")
    model = ["--model", f"local-dir:{tiny(tmp_path / 'model')}"]
    index, new = tmp_path / "index", tmp_path / "new"
    ok("index build", f"stash:{photos}", *model, "--out", index)
    picture((90, 40)).save(photos / "cat/2.png")
    ok("index add", index, f"stash:{photos}")
    shots = Index.load(index).labels["source"].to_pylist()
    assert f"stash:{photos / 'cat/2.png'}#0" in shots
    ok("index audit", index)
    similar = json_rows(
        ok("find", f"stash:{photos}", shots[0], "--index", index, "--format", "json")
    )
    assert {row["input"] for row in similar} == {*shots[1:]}
    failed(command_line("sort", index, f"stash:{photos}", "--into", tmp_path / "s", "--move"), 2)
    with TestClient(app_of(index)) as client:
        shown = client.get("/v1/indexes/index/keys/0/image")
    assert Image.open(io.BytesIO(shown.content)).size == (40, 40)
    given = (f"stash:{photos}", "--out", new, *model)
    with server(*given, command="label") as (url, _):
        address, _, token = url.partition("/#token=")
        ask = partial(httpx.request, headers={"Authorization": f"Bearer {token}"})
        while (state := ask("GET", f"{address}/v1/label").json())["busy"]:
            pass
        photo = state["queue"][0]
        assert photo["name"] in shots
        shown = ask("GET", f"{address}/v1/label/photos/{photo['photo']}/image")
        assert Image.open(io.BytesIO(shown.content)).height == 40
        labels = {"labels": [{"photo": photo["photo"], "label": "x"}]}
        ask("POST", f"{address}/v1/label", json=labels)
    assert Index.load(new).labels["source"].to_pylist() == [photo["name"]]
