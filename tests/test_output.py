"""Printed tables and data, without escape sequences for a terminal."""

import csv
import io
import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retrieval_tip.cli.options import FORMATS
from retrieval_tip.cli.output import WIDE, write_table, write_tables
from retrieval_tip.errors import InputError
from retrieval_tip.wording import json_line, one_line

ESCAPES = "\x1b[2J\x07\x9b31m\u202e\u2066\u200f\u2028\r\n\t\x7f"
"""Two kinds of escape sequences, direction marks and line endings."""
HOSTILE = pa.table(
    {
        f"name{ESCAPES}": [f"a{ESCAPES}"],
        "list": [[f"b{ESCAPES}"]],
        "object": [{f"k{ESCAPES}": [f"c{ESCAPES}"]}],
        "bytes": [ESCAPES.encode()],
    }
)


class Terminal(io.TextIOWrapper):
    """Standard output that is a terminal or not."""

    def __init__(self, is_terminal):
        super().__init__(io.BytesIO())
        self.is_terminal = is_terminal

    def isatty(self):
        return self.is_terminal

    @property
    def text(self):
        assert isinstance(self.buffer, io.BytesIO)
        return self.buffer.getvalue().decode()


@pytest.mark.parametrize("style", ["table", "json", "csv"])
def test_no_escape_sequence_reaches_a_terminal_or_a_table_in_a_file(style, monkeypatch, tmp_path):
    terminal = Terminal(is_terminal=True)
    monkeypatch.setattr(sys, "stdout", terminal)
    write_table(HOSTILE, style, None)
    lines = terminal.text.splitlines()
    assert len(lines) == (1 if style == "json" else 2)
    assert all(line.isprintable() for line in lines)
    assert "u202e" in terminal.text
    write_table(HOSTILE, "table", tmp_path / "out")
    assert all(line.isprintable() for line in (tmp_path / "out").read_text().splitlines())


@pytest.mark.parametrize("to_file", [True, False])
def test_data_outside_a_terminal_is_unchanged(tmp_path, to_file, monkeypatch):
    """Data is written to a file or to standard output."""
    for style in ("json", "csv"):
        out = Terminal(is_terminal=False)
        monkeypatch.setattr(sys, "stdout", out)
        write_table(HOSTILE.drop_columns(["bytes"]), style, tmp_path / style if to_file else None)
        text = (tmp_path / style).read_bytes().decode() if to_file else out.text
        if style == "json":
            assert json.loads(text) == HOSTILE.drop_columns(["bytes"]).to_pylist()[0]
        else:
            heading, row = csv.reader(io.StringIO(text, newline=""))
            assert (heading[0], row[0]) == (f"name{ESCAPES}", f"a{ESCAPES}")
            assert json.loads(row[1]) == [f"b{ESCAPES}"]
    write_table(HOSTILE, "parquet", tmp_path / "parquet")
    assert pq.read_table(tmp_path / "parquet").equals(HOSTILE)


def test_escaping_preserves_json_and_printable_text():
    every = (
        "".join(chr(code) for code in range(0x11000) if not 0xD800 <= code < 0xE000)
        + "\U0001f600\U000e0001\U0010ffff"
    )
    assert json.loads(json_line(every)) == every
    assert json_line(every).isprintable()
    assert one_line(every).isprintable()
    for plain in ("Übergröße 猫 🐈", ""):
        assert (one_line(plain), json_line(plain)) == (plain, f'"{plain}"')
    assert json_line({"a": [1, None, True]}) == '{"a": [1, null, true]}'


def test_parquet_uses_dictionaries_only_for_text(tmp_path):
    """For numbers, dictionaries cost time and space."""
    near = [
        [{"source": f"s{i % 3}", "affinity": i / 7, "gives": [i / 3], "labels": ["a"]}]
        for i in range(2000)
    ]
    table = pa.table(
        {
            "input": [f"q{i}" for i in range(2000)],
            "probability": np.arange(2000) / 11,
            "neighbours": near,
        }
    )
    write_table(table, "parquet", tmp_path / "out")
    file = pq.ParquetFile(tmp_path / "out")
    group = file.metadata.row_group(0)
    texts = {
        group.column(i).path_in_schema: "RLE_DICTIONARY" in group.column(i).encodings
        for i in range(6)
    }
    assert [path for path, has in texts.items() if has] == [
        "input",
        "neighbours.list.element.source",
        "neighbours.list.element.labels.list.element",
    ]
    assert file.read().equals(table)


PREDICTED = ("labels", "probabilities", "neighbours", "opposing", "logits")


@pytest.mark.parametrize("name", PREDICTED)
@pytest.mark.parametrize(
    "value", ["text", 1, None, [1], ["a"], [{"a": 1}], [[None]], {"a": 1}, []], ids=repr
)
def test_column_names_have_no_special_meaning(name, value, tmp_path):
    table = pa.table({name: [value], "after": ["x"]})
    for style in FORMATS:
        write_table(table, style, tmp_path / style)
    heading, row = (tmp_path / "table").read_text().splitlines()
    assert heading.split() == [name, "after"]
    assert row.strip().startswith(
        "-" if value is None else value if isinstance(value, str) else json.dumps(value)
    )
    assert row.endswith("  x")


def test_predictions_are_followed_by_details(tmp_path):
    near = {
        "key_id": 3,
        "source": f"s{ESCAPES}",
        "label": "cat",
        "affinity": 0.5,
        "weight": 0.25,
        "gives": [-0.5],
    }
    row = {
        "input": "a",
        "label": "cat",
        "labels": ["cat", f"d{ESCAPES}"],
        "probabilities": [0.75, 0.25],
    }
    row |= {"logits": [1.0, 2.0], "neighbours": [near], "opposing": near}
    table = pa.Table.from_pylist([row, row | {"neighbours": [], "opposing": None}])
    write_tables([table], table.schema, "table", tmp_path / "out", predictions=True)
    lines = (tmp_path / "out").read_text().splitlines()
    assert lines[0].split() == ["input", "label"]
    starts = ["input", "a", "contribution", "-0.5000", "strongest", "-0.5000", "cat", "a", "cat"]
    assert [line.split()[0] for line in lines] == starts
    assert all(line.isprintable() for line in lines)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1.0, ">0.9999"),
        (0.99996, ">0.9999"),
        (0.99994, "0.9999"),
        (0.5, "0.5000"),
        (1e-7, "1.0e-07"),
    ],
)
def test_a_probability_is_never_rounded_to_1(value, shown, tmp_path):
    row = {"probability": value, "labels": ["cat"], "probabilities": [value], "neighbours": []}
    table = pa.Table.from_pylist([row])
    write_tables([table], table.schema, "table", tmp_path / "out", predictions=True)
    assert (tmp_path / "out").read_text().split() == ["probability", shown, "cat", shown]


def test_one_long_cell_does_not_lengthen_other_lines(tmp_path):
    long = "x" * (WIDE + 1)
    table = pa.table({"a": [long, *["y"] * 1000], "b": ["z"] * 1001})
    write_table(table, "table", tmp_path / "out")
    lines = (tmp_path / "out").read_text().splitlines()
    assert lines[:3] == ["a  b", f"{long}  z", "y  z"]


def test_an_output_pipe_is_written_to_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE, text=True) as reader:
        write_table(pa.table({"a": [1, 2]}), "csv", pipe)
        assert reader.communicate()[0].splitlines() == ["a", "1", "2"]
    assert pipe.is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


@pytest.mark.parametrize("style", FORMATS)
def test_a_failed_write_leaves_the_old_output(tmp_path, style):
    def tables():
        yield pa.table({"a": [1, 2]})
        raise InputError("the rest cannot be read")

    (tmp_path / "o").write_text("old output")
    with pytest.raises(InputError):
        write_tables(tables(), pa.schema({"a": pa.int64()}), style, tmp_path / "o")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("o", "old output")]
