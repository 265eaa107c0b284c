"""The command line: formats, settings, explanations, exit statuses, and a whole session in real processes."""

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.types import FloatParamType, IntParamType
from conftest import COMMANDS, LIT_MINI, failed, few, json_of, json_rows, ok
from PIL import Image
from serving import caltech_photos
from tables import picture, tiny, unit_rows, write_table

from retrieval_tip.cli import opening
from retrieval_tip.cli.kinds import Number
from retrieval_tip.cli.options import FORMATS
from retrieval_tip.errors import InputError
from retrieval_tip.model import Index


@pytest.fixture
def small(tmp_path):
    """Six keys of two classes, built by the command line."""
    table = write_table(
        tmp_path / "train.parquet", unit_rows(6, 8), ["cat", "dog"] * 3, camera=list("abcabc")
    )
    text = write_table(tmp_path / "text.parquet", unit_rows(2, 8, 1), ["cat", "dog"])
    out = tmp_path / "index"
    ok("index build --fit none", table, "--text", text, "--out", out)
    return out


@pytest.fixture
def queries(tmp_path):
    return write_table(
        tmp_path / "queries.parquet", unit_rows(5, 8, 2), ids=["a", "b,c", 'd"', "é\n", "e"]
    )


INDEXES = os.path.relpath(Path(__file__).parent / "indexes" / "v11")


def test_classify_prints_the_logits_of_python(run, small, queries):
    features = np.stack(pq.read_table(queries)["feature"].to_pylist()).astype(np.float32)
    cache = Index.load(small)
    cache.settings = cache.settings.override(alpha=3.0, beta=2.0)
    for k in ("all", 2):
        for tail in ("--tail", "--no-tail"):
            settings = ("--alpha", 3, "--beta", 2, "-k", k, tail)
            shown = run(
                "classify", small, queries, *settings, "--logits", "--format", "json"
            ).stdout
            expected = cache.logits(features, k, tail == "--tail").numpy()
            np.testing.assert_allclose(
                [json.loads(line)["logits"] for line in shown.splitlines()], expected, rtol=1e-5
            )


def test_settings_of_the_index_apply_unless_given(run, tmp_path, queries):
    table = write_table(tmp_path / "t.parquet", unit_rows(6, 8), ["cat", "dog"] * 3)
    ok(
        "index build --fit none",
        table,
        "--alpha",
        7,
        "--beta",
        2,
        "-k",
        3,
        "--out",
        tmp_path / "i",
    )
    test = write_table(tmp_path / "test.parquet", unit_rows(4, 8, 5), ["cat", "dog"] * 2)
    result = json_of("evaluate", tmp_path / "i", test)
    assert (result["alpha"], result["beta"], result["k"], result["tail"]) == (7, 2, 3, True)
    assert result["zero_shot_top1"] is None  # the index has no text weights
    result = json_of("evaluate", tmp_path / "i", test, "-k", "all", "--no-tail", "--alpha", 0)
    assert (result["alpha"], result["k"], result["tail"]) == (0, "all", False)
    plain, more = (
        run("evaluate", tmp_path / "i", test, *verbose).stdout for verbose in ((), ("-v",))
    )
    assert [line.split()[0] for line in plain.splitlines()] == ["accuracy", "weakest", "confusions"]
    assert "zero_shot_top1" in more


def copy_photos(shared, folder):
    for name in ("panda", "pizza"):
        (folder / name).mkdir(parents=True)
        for path in sorted((shared / "data/caltech101/101_ObjectCategories" / name).iterdir())[:4]:
            shutil.copy(path, folder / name)
    return folder


def building(photos, model):
    return ("index build --fit none", photos, "--model", f"local-dir:{model}")


def test_a_photo_is_only_encoded_by_the_backbone_of_the_index(run, shared, tmp_path):
    one = tiny(tmp_path / "one")
    other = tiny(tmp_path / "other", seed=1)
    photos = copy_photos(shared, tmp_path / "photos")
    ok(*building(photos, one), "--out", tmp_path / "i")
    image = next((photos / "panda").iterdir())
    ok("classify", tmp_path / "i", image)
    ok("encode", photos, "--model", f"local-dir:{other}", "--out", tmp_path / "t.parquet")
    for command in (
        ("classify", tmp_path / "i", image, "--model", f"local-dir:{other}"),
        ("evaluate", tmp_path / "i", tmp_path / "t.parquet"),  # the table names its encoder
    ):
        refused = run(*command)
        assert (refused.exit_code, str(one) in refused.stderr, str(other) in refused.stderr) == (
            1,
            True,
            True,
        )
    # the same weights in another folder are the same backbone
    shutil.move(one, tmp_path / "moved")
    failed(run("classify", tmp_path / "i", image), 2, "this file of the encoder is not on")
    ok("classify", tmp_path / "i", image, "--model", f"local-dir:{tmp_path / 'moved'}")


def test_unreadable_images_are_named_and_give_exit_status_3(run, shared, tmp_path):
    photos = copy_photos(shared, tmp_path / "photos")
    whole = next((photos / "pizza").iterdir())
    broken = next((photos / "panda").iterdir())
    broken.chmod(0o644)
    broken.write_bytes(broken.read_bytes()[:1000])
    build = building(photos, tiny(tmp_path / "model"))
    strict = run(*build, "--strict", "--out", tmp_path / "i")
    assert (strict.exit_code, str(broken) in strict.stderr, (tmp_path / "i").exists()) == (
        1,
        True,
        False,
    )
    failed(run(*build, "--out", tmp_path / "i"), 3, f"skipped {broken}: damaged")
    sources = {str(path) for path in photos.glob("*/*.jpg")} - {str(broken)}
    assert {*Index.load(tmp_path / "i").labels["source"].to_pylist()} == sources
    some = run(
        "classify", tmp_path / "i", whole, broken, tmp_path / "missing.jpg", "--format", "json"
    )
    assert [row["input"] for row in json_rows(some, 3)] == [str(whole)]
    assert "missing.jpg: no such file" in some.stderr
    assert run("classify", tmp_path / "i", broken).exit_code == 1


def test_paths_are_read_from_standard_input(run, things, shared, tmp_path):
    [(whole, _)], odd = caltech_photos(shared, "test", 1, 1), tmp_path / "two\nlines.jpg"
    shutil.copy(whole, odd)
    for given, paths in (
        (f"{whole}\n", [whole]),
        (f"{odd}\0{whole}\0", [odd, whole]),
    ):  # as find -print0 does
        rows = json_rows(run("classify", things, "-", "--format", "json", stdin=given))
        assert [row["input"] for row in rows] == list(map(str, paths))


def test_doctor_reports_versions_and_finds_two_faiss_packages(run, monkeypatch):
    from retrieval_tip import doctor

    done = run("doctor")
    assert "faiss SIMD level" in done.stdout
    assert json_of("doctor")["facts"]["torch"]
    real = doctor.version_of
    both = ("faiss-cpu", "faiss-gpu")
    monkeypatch.setattr(doctor, "version_of", lambda name: "1.15.1" if name in both else real(name))
    done = run("doctor")
    assert done.exit_code == 1
    assert "pip uninstall -y faiss-gpu faiss-cpu" in done.stdout


def test_doctor_names_the_encoders_of_this_machine_or_their_lack(run, tmp_path, monkeypatch):
    """Tests run offline, so that an encoder cannot be downloaded."""
    from retrieval_tip.backbones import catalogue

    monkeypatch.setattr(catalogue, "DEMO", catalogue.DEMO[:1])  # but not in the clone
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    bare = run("doctor")
    assert (bare.exit_code, "no problems found" in bare.stdout) == (1, False)
    assert (
        "problem: no encoder is on this machine, and none can be downloaded (HF_HUB_OFFLINE is set)"
        in bare.stdout
    )
    catalogue.DEMO[0].parent.mkdir(parents=True)
    catalogue.DEMO[0].touch()
    found = json_of("doctor")
    assert found["facts"]["encoders"] == f"timm:tf_efficientnet_lite0@{catalogue.DEMO[0]}"
    assert not [problem for problem in found["problems"] if "encoder" in problem]


def test_a_rollback_to_the_current_version_says_so(run, small):
    ok("index remove", small, "--key-ids", 1)
    before = {path: path.read_bytes() for path in small.rglob("*") if path.is_file()}
    same = run("index rollback", small, 2)
    assert (same.exit_code, same.stdout) == (
        0,
        f"{small}: version 2 is current already; nothing changed\n",
    )
    assert {path: path.read_bytes() for path in small.rglob("*") if path.is_file()} == before
    assert run("index rollback", small, 1).stdout == f"{small}: version 3, rolled back\n"


def test_a_table_has_no_suffix_of_another_format(run, small, queries, tmp_path):
    for command in (
        ["index", "export", small],
        ["index", "export", small, "--text"],
        ["encode", queries],
    ):
        option = [] if command[-1] == "--text" else ["--out"]
        done = run(*command, *option, tmp_path / "keys.csv")
        assert (
            done.exit_code,
            done.stdout,
            "keys.csv: a feature table is a Parquet file" in done.stderr,
        ) == (
            2,
            "",
            True,
        )
    assert not (tmp_path / "keys.csv").exists()


def test_a_reader_that_stops_early_causes_no_error(small, tmp_path, warm_path):
    many = write_table(tmp_path / "many.parquet", unit_rows(20000, 8, 3))
    command = [
        shutil.which("retrieval-tip", path=warm_path),
        "classify",
        str(small),
        str(many),
        "--format",
        "json",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        child.stdout.readline()
        child.stdout.close()
        assert child.stderr.read() == b""
        assert child.wait() in (0, 141)


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="SKIPPED: the size of a pipe is set on Linux only"
)
@pytest.mark.parametrize("style", few(["json", "csv", "table"], 2))
def test_answers_appear_before_all_images_are_read(style, tmp_path, warm_path):
    """The pipe only holds a few lines, so the command waits and has not opened the last photo yet."""
    import fcntl

    photos = tmp_path / "photos"
    new = tmp_path / ("new" * 30)
    for seed, path in enumerate(
        [*(photos / "ab"[i % 2] / f"{i}.png" for i in range(4)), new / "000.png"]
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        picture((50 + seed, 40)).save(path)
    model = f"local-dir:{tiny(tmp_path / 'model')}"
    ok("index build --fit none", photos, "--model", model, "--out", tmp_path / "i")
    paths = [new / f"{number:03}.png" for number in range(120)]
    for path in paths[1:]:
        shutil.copy(paths[0], path)
    command = [shutil.which("retrieval-tip", path=warm_path), "classify", tmp_path / "i", new]
    command += ["--batch-size", 4, "--format", style]
    with subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    ) as child:
        fcntl.fcntl(child.stdout, fcntl.F_SETPIPE_SZ, 4096)
        first = b""
        while str(paths[0]).encode() not in first:
            first += child.stdout.read(1)
        paths[-1].write_bytes(b"not an image")
        text = (first + child.stdout.read()).decode()
        assert f"skipped {paths[-1]}" in child.stderr.read().decode()
        assert child.wait() == 3
    assert [str(path) in text for path in paths] == [True] * 119 + [False]
    if style == "table":
        heading, *lines = text.splitlines()
        assert {
            line.index(label) for line in lines for label in (" a ", " b ") if label in line
        } == {heading.index(" label")}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="SKIPPED: no /dev/full here")
@pytest.mark.parametrize("unbuffered", few(["", "1"], 1))
@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        *few(
            [
                (f"{command} > /dev/full", "")
                for command in (
                    "--version",
                    "--help",
                    "index --help",
                    "index build --help",
                    *(f"index list {INDEXES} --format {style}" for style in FORMATS),
                )
            ],
            3,
        ),
        ("--version >&-", "standard output: "),
        ("models <&- >&-", "standard output: "),
        ("classify . - <&-", ".: "),
    ],
)
def test_a_full_or_closed_standard_stream_gives_one_line(arguments, what, unbuffered):
    command = f"{shlex.quote(sys.executable)} -m retrieval_tip {arguments}"
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(
        ["sh", "-c", command], capture_output=True, env=environment, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"Error: {what}")
    assert what or "No space left" in line


def test_a_closed_standard_error_changes_nothing(small, tmp_path):
    command = f"{shlex.quote(sys.executable)} -m retrieval_tip index history {small} --out {tmp_path}/o.parquet 2>&-"
    subprocess.run(["sh", "-c", command], check=True)
    assert pq.read_table(tmp_path / "o.parquet").num_rows == 1


@pytest.mark.parametrize(
    "arguments", few([["--version"], ["--help"], ["index", "list", INDEXES]], 2)
)
def test_a_closed_pipe_causes_no_error(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "retrieval_tip", *arguments]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert done.returncode in (0, 1)
    assert done.stderr == b""


def on_stdin(monkeypatch, data):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    return list(opening.paths_on_stdin())


def test_paths_on_standard_input_end_with_newlines_or_nuls_and_are_limited(monkeypatch):
    given = {
        b"": [],
        b"a": ["a"],
        b"a\n\n\nb c\nlast": ["a", "b c", "last"],
        b"a\nb\0\xff\0": ["a\nb", "\udcff"],
    }
    for data, paths in (given | {b"\n" * 20: []}).items():
        assert on_stdin(monkeypatch, data) == paths
    monkeypatch.setattr(opening, "MAX_PATHS", 20)
    monkeypatch.setattr(opening, "MAX_PATHS_BYTES", 100)
    for data in (b"x" * 101, b"a\n" * 30, b"\0" * 200, b"abcdefgh\n" * 20):
        with pytest.raises(InputError, match=r"^standard input: "):
            on_stdin(monkeypatch, data)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "out of memory; use"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you"), "out of memory; use"),
        (
            torch.OutOfMemoryError("CUDA out of memory.\nGPU 0 has ..."),
            "out of memory on the GPU; use --device cpu",
        ),
    ],
    ids=["Python", "torch on a CPU", "torch on a GPU"],
)
def test_running_out_of_memory_prints_one_line(run, small, queries, monkeypatch, error, message):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(Index, "answers", fail)
    done = run("classify", small, queries)
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith(f"Error: {message}")


NUMBERS = [
    (" ".join(words), one)
    for words, command in COMMANDS.items()
    for one in command.params
    if isinstance(one.type, IntParamType | FloatParamType | Number)
    and not getattr(one, "count", False)
]


@pytest.mark.parametrize(
    ("name", "parameter"), NUMBERS, ids=[f"{name} {one.name}" for name, one in NUMBERS]
)
def test_every_number_option_refuses_invalid_values(name, parameter):
    for value in (
        "nan",
        "inf",
        "-inf",
        "1e400",
        "1e308",
        "-1",
        str(10**400),
        "9" * 5000,
        "",
        "x",
        "0x1",
        "1e-40",
        "1e-320",
    ):
        with pytest.raises(click.BadParameter):
            parameter.type.convert(value, parameter, None)


OPTIONS = [
    (words, one)
    for words, command in COMMANDS.items()
    for one in command.get_params(click.Context(command))
    if isinstance(one, click.Option) and "--help" not in one.opts
]


@pytest.mark.parametrize(
    ("words", "option"), OPTIONS, ids=[f"{' '.join(words)} {one.name}" for words, one in OPTIONS]
)
def test_an_option_given_twice_is_repeatable_or_refused(run, words, option):
    """Click itself would keep the last value without a word."""
    long = option.opts[0]
    short = option.opts[-1]
    values = ([] if option.is_flag or option.count else [value] for value in "12")
    typed = [long, *next(values), short, *next(values)]
    if option.multiple or option.count:
        command = COMMANDS[words]
        given = command.make_parser(click.Context(command)).parse_args(typed)[0][option.name]
        assert given == (["1", "2"] if option.multiple else 2)
        assert option.count or "Can be repeated" in option.help
    else:
        done = run(*words, *typed)
        assert (done.exit_code, done.stdout) == (2, "")
        assert f"Error: {long}: is given 2 times; give it once\n" in done.stderr


def test_flags_that_contradict_each_other_are_refused(run, small, queries):
    for typed in (["--tail", "--no-tail"], ["--no-tail", "--tail"]):
        done = run("classify", small, queries, *typed)
        assert (done.exit_code, done.stdout, "--tail: is given 2 times" in done.stderr) == (
            2,
            "",
            True,
        )


NAMES = [
    "  two  ",
    'quo"te',
    "new\nline",
    "日本語",
    "שלום",
    "a,b;c",
    "*",
    "[x]",
    "{}",
    "$HOME",
    "-dash",
    "--out",
    "#",
    "%s",
    "é.png",
    "\x1b[31mred",
    "\udcff",
    "x" * 200,
    "~",
]


def test_any_name_works_for_images_classes_and_tables(run, shared, tmp_path):
    images = [tmp_path / "photos" / name / f"{name}.jpg" for name in NAMES]
    tables = [tmp_path / f"{name}.parquet" for name in NAMES]
    for image, (photo, _) in zip(images, caltech_photos(shared, "train", 10, 2), strict=False):
        image.parent.mkdir(parents=True)
        shutil.copy(photo, image)
    model = ("--model", LIT_MINI)
    build = (
        "index",
        "build",
        "--fit",
        "none",
        tmp_path / "photos",
        *model,
        "--alpha",
        1000,
    )  # text changes no answer
    ok(*build, "--out", tmp_path / "index")
    for image in images:  # the same picture in another file, which is not a shot
        image.write_bytes(image.read_bytes() + b"\0")
    ok("encode", tmp_path / "photos", *model, "--out", tmp_path / "features.parquet")
    for table in tables:
        ok("encode", tmp_path / "features.parquet", "--out", table)
    shown = {os.fsencode(image).decode("utf-8", "backslashreplace"): image for image in images}
    folders = [image.parent for image in images]
    done = run("classify", tmp_path / "index", *images, *folders, *tables, "--format", "json")
    found = json_rows(done)
    assert [row["input"] for row in found[: 2 * len(NAMES)]] == [*shown] * 2
    assert Counter(row["input"] for row in found) == dict.fromkeys(shown, 2 + len(NAMES))
    for row in found:
        name = shown[row["input"]].parent.name
        assert row["label"] == os.fsencode(name).decode("utf-8", "backslashreplace")
    table = run(
        "classify", tmp_path / "index", *images
    ).stdout  # names break no table, and are escaped
    assert len(table.splitlines()) == 1 + len(NAMES)
    assert "\x1b" not in table


def test_libraries_print_nothing(things, tmp_path, warm_path):
    """Damaged images are named, one per line, and nothing else is printed."""
    buffer = io.BytesIO()
    exif = b"Exif\0\0II*\0\x08\0\0\0\x03\0\x31\x01\x02\0\x04\0\0\x7fsix\0"
    Image.effect_noise((40, 30), 50).convert("RGB").save(buffer, "JPEG", exif=exif)
    raw = {
        "exif.jpg": buffer.getvalue(),
        "cut.jpg": buffer.getvalue()[:-300],
        "head.tif": b"II*\0\x08\0\0\0",
    }
    for name, data in raw.items():
        (tmp_path / name).write_bytes(data)
    program = str(shutil.which("retrieval-tip", path=warm_path))
    done = subprocess.run(
        [program, "classify", things, *(tmp_path / name for name in raw)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 3
    assert len(done.stdout.splitlines()) == 2
    *skipped, total = done.stderr.splitlines()
    assert all(name in line for name, line in zip(("cut.jpg", "head.tif"), skipped, strict=True))
    assert "2" in total
