"""Whatever the bytes are, decode gives an upright RGB picture or says in one line why not."""

from __future__ import annotations

import io
import os
import random
import struct
import subprocess
import sys
import threading
import tracemalloc
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import examples, few
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, features

from retrieval_tip.data import images
from retrieval_tip.data.images import decode, find, read, thumbnail
from retrieval_tip.errors import InputError, UsageError

RED, GREEN, BLUE, YELLOW = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)
EXACT = ["PNG", "GIF", "TIFF", "BMP", "PPM"]
LOSSY = ["JPEG", "WEBP", "MPO"]
OTHERS = ["TGA", "PCX", "SGI", "IM", "DDS", "QOI", "ICO", "ICNS", "DIB", "XBM", "MSP", "EPS", "PDF"]
OPTIONAL = {"AVIF": "avif", "JPEG2000": "jpg_2000"}


def quarters(width: int = 32, height: int = 32) -> Image.Image:
    """Red, green over blue, yellow: each turn and each flip of it is another picture."""
    image = Image.new("RGB", (width, height))
    w, h = width // 2, height // 2
    for colour, x, y in ((RED, 0, 0), (GREEN, w, 0), (BLUE, 0, h), (YELLOW, w, h)):
        image.paste(colour, (x, y, x + w, y + h))
    return image


def encoded(image: Image.Image, style: str, **options: object) -> bytes:
    if style in OPTIONAL and not features.check(OPTIONAL[style]):
        pytest.skip(f"this Pillow cannot write {style}")
    buffer = io.BytesIO()
    image.save(buffer, style, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    picture = decode(data)
    assert picture.mode == "RGB"
    return np.asarray(picture)


def close(one: np.ndarray, other: Image.Image, most: float = 12) -> None:
    assert one.shape == np.asarray(other).shape
    assert np.abs(one.astype(int) - np.asarray(other).astype(int)).mean() < most


def refusal(data: bytes) -> str:
    with pytest.raises(InputError) as caught:
        decode(data)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_claiming(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG of a few bytes whose header claims this size."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")


@pytest.mark.parametrize("style", EXACT)
def test_a_lossless_format_gives_the_same_pixels(style: str) -> None:
    assert np.array_equal(pixels(encoded(quarters(), style)), np.asarray(quarters()))


@pytest.mark.parametrize("style", LOSSY)
def test_a_lossy_format_gives_nearly_the_same_pixels(style: str) -> None:
    close(pixels(encoded(quarters(), style)), quarters())


@pytest.mark.parametrize("style", ["GIF", "TIFF", "WEBP", "PNG", "MPO"])
def test_of_several_frames_the_first_is_taken(style: str) -> None:
    others = [Image.new("RGB", (32, 32), BLUE), Image.new("RGB", (32, 32), GREEN)]
    close(pixels(encoded(quarters(), style, save_all=True, append_images=others)), quarters())


@pytest.mark.parametrize("style", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(style: str, orientation: int) -> None:
    how = Image.Transpose
    by_hand = {
        1: None,
        2: how.FLIP_LEFT_RIGHT,
        3: how.ROTATE_180,
        4: how.FLIP_TOP_BOTTOM,
        5: how.TRANSPOSE,
        6: how.ROTATE_270,
        7: how.TRANSVERSE,
        8: how.ROTATE_90,
    }[orientation]
    stored = quarters(48, 32)
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = stored if by_hand is None else stored.transpose(by_hand)
    close(pixels(encoded(stored, style, exif=exif)), upright)


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0garbage",
        b"Exif\0\0",
        b"Exif\0\0II*\0\x08\0\0\0",
        b"Exif\0\0II*\0\xff\xff\xff\x7f",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 40,
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0six\0\0\0\0\0",  # orientation as text
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0\0\0\0\0",  # orientation 99
    ],
)
@pytest.mark.parametrize("style", ["JPEG", "PNG", "WEBP"])
def test_a_damaged_exif_block_does_not_spoil_the_picture(style: str, exif: bytes) -> None:
    close(pixels(encoded(quarters(), style, exif=exif)), quarters())


def test_a_readable_orientation_counts_where_another_exif_entry_is_damaged() -> None:
    entries = [
        struct.pack("<HHII", 0x0112, 3, 1, 6),
        struct.pack("<HHII", 0x0131, 2, 500, 0x7FFFFFFF),  # a text that lies behind the end
        struct.pack("<HHII", 0x8769, 4, 1, 0x7FFFFFF0),  # a sub-folder that lies behind the end
    ]
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + b"\0\0\0\0"
    stored = quarters(48, 32)
    close(pixels(encoded(stored, "JPEG", exif=exif)), stored.transpose(Image.Transpose.ROTATE_270))


def test_a_palette_gives_its_colours() -> None:
    palette = quarters().quantize(4)
    assert palette.mode == "P"
    for style in ("PNG", "GIF", "BMP", "TIFF"):
        assert np.array_equal(pixels(encoded(palette, style)), np.asarray(quarters()))


@pytest.mark.parametrize("transparency", [0, b"\x00", b"\x00\xff\x80"])
def test_a_transparent_palette_entry_is_laid_on_white(transparency: int | bytes) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((1, 0), 1)
    got = pixels(encoded(image, "PNG", transparency=transparency))
    assert got[0].tolist() == [[255, 255, 255], [0, 255, 0]]


def test_a_transparent_gif_is_laid_on_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((1, 0), 1)
    assert pixels(encoded(image, "GIF", transparency=0))[0].tolist() == [[255, 255, 255], [0, 255, 0]]


@pytest.mark.parametrize("style", ["PNG", "TIFF", "WEBP"])
def test_transparency_is_laid_on_white(style: str) -> None:
    image = Image.new("RGBA", (3, 1), (0, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    image.putpixel((2, 0), (0, 0, 0, 128))
    got = pixels(encoded(image, style, **({"lossless": True, "exact": True} if style == "WEBP" else {})))
    assert got[0].tolist() == [[0, 0, 0], [255, 255, 255], [127, 127, 127]]


def test_a_grey_with_alpha_is_laid_on_white() -> None:
    image = Image.new("LA", (2, 1), (50, 255))
    image.putpixel((1, 0), (50, 0))
    assert pixels(encoded(image, "PNG"))[0].tolist() == [[50, 50, 50], [255, 255, 255]]


@pytest.mark.parametrize(("mode", "key"), [("RGB", (10, 20, 30)), ("L", 10)])
def test_a_transparent_colour_is_laid_on_white(mode: str, key: object) -> None:
    image = Image.new(mode, (2, 1), key)
    image.putpixel((1, 0), 200 if mode == "L" else (200, 200, 200))
    assert pixels(encoded(image, "PNG", transparency=key))[0].tolist() == [[255] * 3, [200] * 3]


@pytest.mark.parametrize("style", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_greys_are_scaled_not_clipped(style: str) -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    got = pixels(encoded(Image.fromarray(ramp), style))
    assert np.array_equal(got[..., 0].ravel(), np.arange(256))
    assert (got[..., 0] == got[..., 1]).all()


def test_sixteen_bit_greys_in_the_other_byte_order_are_scaled() -> None:
    ramp = np.linspace(0, 65535, 256).astype(">u2")
    image = Image.frombytes("I;16B", (16, 16), ramp.tobytes())
    assert np.array_equal(pixels(encoded(image, "TIFF"))[..., 0].ravel(), np.arange(256))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 128, 255], [0, 128, 255]),
        ([0, 32768, 65535], [0, 128, 255]),
        ([0, 1_000_000, 2_000_000], [0, 128, 255]),
        ([-5, 0, 255], [0, 0, 255]),
        ([0, 0, 0], [0, 0, 0]),
    ],
)
def test_whole_number_greys_are_taken_at_their_scale(values: list[int], expected: list[int]) -> None:
    image = Image.fromarray(np.array([values], dtype=np.int32))
    assert image.mode == "I"
    assert pixels(encoded(image, "TIFF"))[0, :, 0].tolist() == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 127.6, 255.0], [0, 128, 255]),
        ([np.nan, 0.2, 1.0], [0, 51, 255]),
        ([np.inf, -np.inf, 1.0], [0, 0, 255]),
        ([np.nan] * 3, [0, 0, 0]),
        ([-3.0, -2.0, -1.0], [0, 0, 0]),
        ([0.0, 1.5e38, 3e38], [0, 128, 255]),
    ],
)
def test_floating_point_greys_are_taken_at_their_scale(values: list[float], expected: list[int]) -> None:
    image = Image.fromarray(np.array([values], dtype=np.float32))
    assert image.mode == "F"
    assert pixels(encoded(image, "TIFF"))[0, :, 0].tolist() == expected


@pytest.mark.parametrize("style", ["JPEG", "TIFF"])
def test_cmyk_gives_its_colours(style: str) -> None:
    close(pixels(encoded(quarters().convert("CMYK"), style)), quarters())


def test_lab_gives_its_colours() -> None:
    pytest.importorskip("PIL._imagingcms")
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    lab = to_lab.apply(quarters())
    assert lab.mode == "LAB"
    close(pixels(encoded(lab, "TIFF")), quarters())


def test_ycbcr_gives_its_colours() -> None:
    close(pixels(encoded(quarters().convert("YCbCr"), "TIFF")), quarters())


@pytest.mark.parametrize("style", ["PNG", "TIFF", "BMP", "PPM"])
def test_one_bit_gives_black_and_white(style: str) -> None:
    image = Image.new("1", (16, 1))
    image.putpixel((3, 0), 1)
    got = pixels(encoded(image, style))
    assert got[0, 3].tolist() == [255] * 3
    assert got.sum() == 3 * 255


@pytest.mark.parametrize("style", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_a_single_pixel_is_a_picture(style: str) -> None:
    assert pixels(encoded(Image.new("RGB", (1, 1), (255, 255, 255)), style)).tolist() == [[[255, 255, 255]]]


@pytest.mark.parametrize("size", [(1, 50000), (50000, 1), (2, 40001)])
def test_a_very_long_picture_is_cut_to_its_middle(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, BLUE)
    width, height = size
    image.paste(RED, (width // 3, height // 3, width - width // 3, height - height // 3))
    got = decode(encoded(image, "PNG"))
    assert max(got.size) == images.MAX_ASPECT * min(size)
    assert min(got.size) == min(size)
    assert np.asarray(got).reshape(-1, 3).mean(axis=0).tolist() == [255, 0, 0]


def test_a_picture_of_the_allowed_aspect_stays_whole() -> None:
    assert decode(encoded(Image.new("RGB", (3, 3 * images.MAX_ASPECT)), "PNG")).size == (3, 3 * images.MAX_ASPECT)


@pytest.mark.parametrize("size", [(30000, 30000), (178956971, 1), (2**31 - 1, 2**31 - 1)])
def test_a_decompression_bomb_is_refused_by_its_header(size: tuple[int, int]) -> None:
    tracemalloc.start()
    message = refusal(png_claiming(*size))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "refused before decoding" in message
    assert peak < 10 << 20


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_a_picture_without_pixels_is_refused(size: tuple[int, int]) -> None:
    refusal(png_claiming(*size))


@pytest.mark.parametrize("style", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM"])
def test_a_file_cut_short_is_refused_wherever_it_is_cut(style: str) -> None:
    generator = np.random.default_rng(0)
    noise = Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, style)
    for length in np.linspace(1, len(data) * 0.9, 40).astype(int):
        refusal(data[:length])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        b"\0" * 5000,
        b"garbage" * 100,
        b"<html><body>404 Not Found</body></html>",
        b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        b"%PDF-1.7\n",
        b"PK\x03\x04" + b"\0" * 100,
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n",
        "größer".encode("utf-16"),
        b"\xff\xd8\xff\xe0",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"RIFF\xff\xff\xff\xffWEBPVP8 ",
        b"II*\0\x08\0\0\0",
        b"BM" + b"\xff" * 60,
        b"P6\n-1 -1\n255\n",
        b"P6\n99999999999999999999 1\n255\n",
        b"P5\n4 4\n99999999\n",
        b"8BPS\0\x01" + b"\0" * 100,
        b"\x89HDF\r\n\x1a\n" + b"\0" * 100,
        b"GRIB" + b"\0" * 3 + b"\x01" + b"\0" * 100,
    ],
)
def test_what_is_no_image_is_refused(data: bytes) -> None:
    refusal(data)


@pytest.mark.parametrize("style", [*OTHERS, *OPTIONAL])
def test_a_format_that_is_not_listed_is_not_read(style: str) -> None:
    buffer = io.BytesIO()
    if style in OPTIONAL and not features.check(OPTIONAL[style]):
        pytest.skip(f"this Pillow cannot write {style}")
    size = 1024 if style == "ICNS" else 64
    quarters(size, size).convert("1" if style in ("XBM", "MSP") else "RGB").save(buffer, style)
    assert "not an image" in refusal(buffer.getvalue())
    assert {".avif", ".jp2", ".ico", ".icns", ".tga", ".qoi", ".eps", ".pdf"}.isdisjoint(images.extensions())


@pytest.mark.parametrize("style", [*EXACT, *LOSSY])
def test_a_format_has_its_usual_extension(style: str) -> None:
    expected = {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif"}.get(style, f".{style.lower()}")
    assert images.extension(encoded(quarters(), style)) == expected
    assert expected in images.extensions()
    with pytest.raises(InputError, match="not an image"):
        images.extension(b"nothing")


def test_postscript_is_refused_so_that_ghostscript_never_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: started.append(a))
    buffer = io.BytesIO()
    quarters().save(buffer, "EPS")
    assert "not an image" in refusal(buffer.getvalue())
    assert not started
    assert not images.extensions() & {".eps", ".ps"}


SEEDS = {style: quarters(24, 16) for style in images.FORMATS}


@pytest.mark.parametrize("style", SEEDS)
def test_flipped_bytes_give_a_picture_or_a_reason(style: str) -> None:
    data = encoded(SEEDS[style], style)
    generator = random.Random(style)
    for _ in range(60):
        damaged = bytearray(data)
        for _ in range(generator.choice((1, 2, 8))):
            damaged[generator.randrange(min(len(damaged), generator.choice((64, len(damaged)))))] = generator.randrange(
                256
            )
        with suppress(InputError):
            assert decode(bytes(damaged)).mode == "RGB"


@settings(max_examples=examples(150), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    head=st.sampled_from(
        [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"II*\0", b"MM\0*", b"BM", b"P6\n", b"8BPS"]
    ),
    tail=st.binary(max_size=300),
)
def test_arbitrary_bytes_give_a_picture_or_a_reason(head: bytes, tail: bytes) -> None:
    with suppress(InputError):
        assert decode(head + tail).mode == "RGB"


def test_no_memory_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(images, "_rgb", full)
    assert "memory" in refusal(encoded(quarters(), "PNG"))


def _folder(path: Path) -> None:
    path.mkdir()


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


def _dangling(path: Path) -> None:
    path.symlink_to("nowhere.png")


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _endless(path: Path) -> None:
    path.symlink_to("/proc/kmsg")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_folder, "folder"),
        (os.mkfifo, "a pipe, not a file"),
        (_device, "a device, not a file"),
        (_endless, "kernel, not a file"),
        (lambda path: None, "no such file"),
        (lambda path: path.write_bytes(b""), "empty"),
        (_loop, "symbolic links|no such file"),
        (_dangling, "no such file"),
    ],
)
def test_read_names_what_a_path_is_instead_of_a_file(
    tmp_path: Path, make: Callable[[Path], object], words: str
) -> None:
    path = tmp_path / "x.png"
    make(path)
    with pytest.raises(InputError, match=words):
        read(path)  # the pipe has no writer: opening it would wait for ever


@pytest.mark.parametrize("path", ["a\0b.png", "x" * 5000 + ".png", "/".join(["d"] * 3000), "\ud800.png", ""])
def test_read_survives_impossible_paths(path: str) -> None:
    with pytest.raises(InputError) as caught:
        read(path)
    assert str(caught.value)


def test_read_refuses_a_huge_file_unread(tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    with path.open("wb") as file:
        file.truncate(images.MAX_BYTES + 1)  # sparse
    tracemalloc.start()
    with pytest.raises(InputError, match="bytes"):
        read(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_read_gives_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(b"anything")
    assert read(path) == b"anything"
    assert read(str(path)) == b"anything"


def names(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in find(folder)]


def touch(folder: Path, *paths: str) -> None:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()


def test_find_goes_depth_first_in_name_order(tmp_path: Path) -> None:
    touch(tmp_path, "b.png", "a/2.jpg", "a/10.jpg", "a/z/1.webp", "c/1.gif", "B.PNG", "a.jpeg")
    assert names(tmp_path) == ["B.PNG", "a/10.jpg", "a/2.jpg", "a/z/1.webp", "a.jpeg", "b.png", "c/1.gif"]


def test_find_leaves_out_hidden_and_other_files(tmp_path: Path) -> None:
    touch(
        tmp_path, ".hidden.png", ".git/x.png", "a/.DS_Store", "a/notes.txt", "a/x.eps", "a/x.png", "png", "a/Thumbs.db"
    )
    assert names(tmp_path) == ["a/x.png"]


def test_find_does_not_follow_links_between_folders(tmp_path: Path) -> None:
    touch(tmp_path, "a/x.png")
    (tmp_path / "a" / "up").symlink_to("..")
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "linked.png").symlink_to("a/x.png")
    assert names(tmp_path) == ["a/x.png", "linked.png"]


def test_find_passes_a_link_to_itself(tmp_path: Path) -> None:
    """Whoever reads it reports it; a folder does not become unreadable by it."""
    touch(tmp_path, "x.png")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "loop.png").symlink_to("loop.png")
    assert names(tmp_path) == ["loop.png", "x.png"]


def test_find_goes_as_deep_as_paths_can(tmp_path: Path) -> None:
    deep = str(tmp_path)
    for _ in range(1500):
        deep += "/d"
        os.mkdir(deep)  # noqa: PTH102 - pathlib is too deep for itself
    touch(Path(deep), "x.png")
    try:
        assert names(tmp_path) == ["d/" * 1500 + "x.png"]
    finally:
        subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)  # too deep for pytest to tidy


def test_find_takes_names_that_are_not_utf8(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.png")).touch()
    assert [os.fsencode(path.name) for path in find(tmp_path)] == [b"\xff\xfe.png"]


# -- JPEGs at a reduced size --


def smooth(width: int, height: int, mode: str = "RGB") -> Image.Image:
    return quarters().resize((width, height), Image.Resampling.BICUBIC).convert(mode)


@pytest.mark.parametrize(
    ("size", "least", "expected"),
    [
        ((800, 600), 301, (800, 600)),
        ((800, 600), 300, (400, 300)),
        ((801, 601), 300, (401, 301)),
        ((800, 600), 151, (400, 300)),
        ((800, 600), 150, (200, 150)),
        ((800, 600), 75, (100, 75)),
        ((800, 600), 1, (100, 75)),
        ((600, 4000), 300, (300, 2000)),
    ],
)
def test_a_large_jpeg_is_reduced_and_keeps_enough(size: tuple[int, int], least: int, expected: tuple[int, int]) -> None:
    data = encoded(smooth(*size), "JPEG", quality=95)
    assert images.reducible(data, least) == (size != expected)
    found = decode(data, least)
    assert found.size == expected
    close(np.asarray(found), decode(data).resize(expected, Image.Resampling.BOX), 2)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_reduced_jpeg_is_upright_and_in_colour(mode: str, progressive: bool, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(smooth(320, 240, mode), "JPEG", quality=95, progressive=progressive, exif=exif)
    whole, reduced = decode(data), decode(data, 100)
    assert reduced.mode == "RGB"
    assert reduced.size == (whole.width // 2, whole.height // 2)
    close(np.asarray(reduced), whole.resize(reduced.size, Image.Resampling.BOX), 2)


@pytest.mark.parametrize("style", ["PNG", "MPO", "WEBP", "TIFF"])
def test_other_formats_are_never_reduced(style: str) -> None:
    more = {"save_all": True, "append_images": [smooth(320, 240)]} if style == "MPO" else {}
    data = encoded(smooth(320, 240), style, **more)
    assert not images.reducible(data, 20)
    assert np.array_equal(np.asarray(decode(data, 20)), pixels(data))


def test_limits_are_those_of_the_full_size() -> None:
    data = encoded(smooth(320, 240), "JPEG")
    with pytest.raises(InputError, match="320 x 240 pixels are more than"):
        decode(data, 20, most=320 * 240 - 1)


def test_what_is_no_jpeg_is_not_reducible_and_a_cut_one_is_named() -> None:
    data = encoded(smooth(320, 240), "JPEG")
    for wrong in (b"", b"\xff\xd8", b"\xff\xd8\xff" + b"garbage" * 100, data[:20]):
        assert not images.reducible(wrong, 20)
    assert images.reducible(data[: len(data) // 2], 20)
    with pytest.raises(InputError, match="damaged"):
        decode(data[: len(data) // 2], 20)


# ------------------------------------------------------------------------------------------------------ bounded work


def segment(marker: int, body: bytes) -> bytes:
    return bytes([255, marker]) + struct.pack(">H", len(body) + 2) + body


def after_ihdr(*chunks: bytes) -> bytes:
    data = encoded(quarters(), "PNG")
    return data[:33] + b"".join(chunks) + data[33:]


def after_start(*segments: bytes, **options: object) -> bytes:
    data = encoded(quarters(), "JPEG", **options)
    return data[:2] + b"".join(segments) + data[2:]


def with_scans(number: int) -> bytes:
    """A black JPEG of 1024 x 1024 pixels whose last scan, of a few bytes, comes so many times more."""
    data = encoded(Image.new("RGB", (1024, 1024)), "JPEG", progressive=True)[:-2]
    return data + data[data.rindex(b"\xff\xda") :] * number + b"\xff\xd9"


def after_palette(*blocks: bytes) -> bytes:
    data = encoded(quarters().quantize(4), "GIF")
    place = 13 + (3 << ((data[10] & 7) + 1))
    return data[:place] + b"".join(blocks) + data[place:]


def tiff(*entries: tuple[int, int, int, int], tail: bytes = b"", height: int = 16) -> bytes:
    """A grey TIFF, 16 pixels wide, whose pixels begin at byte 8, then ``tail``. Entries: tag, type, number, value."""
    tags = {256: (4, 1, 16), 257: (4, 1, height), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1), 273: (4, 1, 8)}
    tags |= {277: (3, 1, 1), 278: (4, 1, height), 279: (4, 1, 16 * height)}
    tags |= {tag: tuple(values) for tag, *values in entries}
    body = bytes(16 * height) + tail
    directory = b"".join(struct.pack("<HHII", tag, *values) for tag, values in sorted(tags.items()))
    return struct.pack("<2sHI", b"II", 42, 8 + len(body)) + body + struct.pack("<H", len(tags)) + directory + bytes(4)


TEXT = png_chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(b"x" * 500_000))
LONG_WINDED: dict[str, Callable[[], bytes]] = {
    "segments of a JPEG": lambda: after_start(segment(0xE5, b"") * 140_000),
    "segments that Pillow keeps": lambda: after_start(segment(0xE0, bytes(300)) * 40_000),
    "fill bytes of a JPEG": lambda: after_start(b"\xff" * 100_000),
    "scans of a JPEG": lambda: with_scans(1500),
    "chunks before the pixels of a PNG": lambda: after_ihdr(png_chunk(b"teSt", b"") * 40_000),
    "chunks without pixels of a PNG": lambda: after_ihdr(png_chunk(b"IDAT", b"") * 40_000),
    "chunks after the pixels of a PNG": lambda: encoded(quarters(), "PNG")[:-12] + png_chunk(b"teSt", b"") * 40_000,
    "texts of a PNG": lambda: after_ihdr(TEXT * 40),
    "letters of a PPM's comment": lambda: b"P6\n#" + b"x" * 100_000 + b"\n1 1\n255\n\0\0\0",
    "comments of a GIF": lambda: after_palette(b"!\xfe", b"\1x" * 40_000, b"\0"),
    "extensions of a GIF": lambda: after_palette(b"!\xf0\1x\0" * 40_000),
    "tags of a TIFF": lambda: tiff(*((1000 + number, 4, 1, 1) for number in range(5000))),
    "values of a tag": lambda: tiff((339, 3, 5_000_000, 264), tail=b"\1\0" * 5_000_000),
    "fractions of a tag": lambda: tiff((282, 5, 1000, 264), tail=bytes(8000)),
    "strips of a TIFF": lambda: tiff((273, 4, 140_000, 264), (278, 4, 1, 1), tail=struct.pack("<I", 8) * 140_000),
    "strips that are the whole file": lambda: tiff(
        (259, 3, 1, 32773), (266, 3, 1, 2), (273, 4, 2000, 264 + 31744), (278, 4, 1, 1), (279, 4, 2000, 8264 + 31744),
        tail=struct.pack("<I", 8) * 2000 + struct.pack("<I", 40_000) * 2000, height=2000,
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", few(LONG_WINDED, 6))
def test_what_would_take_long_is_refused(what: str) -> None:
    data = LONG_WINDED[what]()
    with Image.open(io.BytesIO(data)) as image:
        image.load()  # it is only long
    refusal(data)
    assert not images.reducible(data, 4)


RUNS_IN_BMP = struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 1102, 0, 0, 1078, 40, 4, 4, 1, 8, 1, 24, 0, 0, 0, 0)


@pytest.mark.parametrize(
    "data",
    [
        b"P5\n4 4\n254\n" + bytes(16),
        b"P6\n4 4\n65535\n" + bytes(96),
        b"P2\n4 4\n255\n" + b"0 " * 16,
        b"P1\n4 4\n" + b"0 " * 16,
        RUNS_IN_BMP + bytes(1024) + b"\4\0\0\0" * 4,
    ],
    ids=["PGM of 254", "PPM of 65535", "PGM of text", "PBM of text", "RLE in BMP"],
)  # fmt: skip
def test_nothing_is_decoded_in_python(data: bytes) -> None:
    with Image.open(io.BytesIO(data)) as image:
        image.load()  # which it would be
    assert "save it as PNG" in refusal(data)


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_a_jpeg_with_much_metadata_is_read_without_it(mode: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    plain = encoded(smooth(48, 32, mode), "JPEG", exif=exif)
    more = [segment(0xE1, b"http://ns.adobe.com/xmp/extension/\0" + bytes(60_000)), segment(0xFE, bytes(65_000))] * 20
    more += [segment(0xE1, b"Exif\0\0" + bytes(65_000))] * 40  # a second EXIF block, which would be appended 40 times
    place = plain.index(b"\xff\xdb")
    data = plain[:place] + b"".join(more) + plain[place:]
    assert len(images._Jpeg(data).lean) < len(plain) + 10
    assert np.array_equal(pixels(data), pixels(plain))
    assert pixels(data).shape == (48, 32, 3)
    assert images.reducible(data, 16)


def test_a_tile_that_is_larger_than_the_picture_is_not_decoded() -> None:
    tile = zlib.compress(bytes(10_000))
    for kind, words in ((4, "memory"), (9, "damaged")):  # of a type that libtiff reads, and Pillow does not
        tags = [
            (322, kind, 1, 30_000),
            (323, kind, 1, 30_000),
            (324, 4, 1, 264),
            (325, 4, 1, len(tile)),
            (259, 3, 1, 8),
        ]
        assert words in refusal(tiff(*tags, tail=tile))


def test_exif_as_long_as_a_film_is_left_alone() -> None:
    exif = b"II*\0\x08\0\0\0" + struct.pack("<HHHII", 1, 0x0112, 3, 1_000_000, 26) + bytes(4) + b"\6\0" * 1_000_000
    close(pixels(encoded(quarters(), "WEBP", exif=exif)), quarters())
    close(pixels(encoded(quarters(), "PNG", exif=exif)), quarters())


# ------------------------------------------------------------------------------------------------------ bounded memory


@pytest.mark.parametrize(
    ("size", "depth", "colour"),
    [((13_000, 13_000), 8, 6), ((13_000, 13_000), 16, 2), ((13_000, 13_000), 8, 4), ((90_000_000, 1), 8, 0)],
)
def test_a_picture_that_would_fill_memory_is_refused_by_its_header(
    size: tuple[int, int], depth: int, colour: int
) -> None:
    assert size[0] * size[1] <= images.MAX_PIXELS
    message = refusal(png_claiming(*size, depth, colour))
    assert f"{images.MAX_MEMORY / 1e6:,.0f}: refused before decoding" in message


@pytest.mark.parametrize("style", ["PNG", "TIFF", "GIF", "WEBP", "MPO", "JPEG"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_picture_that_is_too_large_comes_at_a_part_of_its_size(
    monkeypatch: pytest.MonkeyPatch, style: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {} if style == "GIF" else {"exif": exif}
    data = encoded(quarters(96, 64), style, **options)
    whole = decode(data)
    monkeypatch.setattr(images, "WHOLE_PIXELS", 96 * 64 // 4)
    found = decode(data)
    assert found.size == (whole.width // 2, whole.height // 2)
    close(np.asarray(found), whole.resize(found.size, Image.Resampling.BOX), 3)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "I", "F"])
@pytest.mark.parametrize("part", [7, 100, 1000])
def test_converting_part_by_part_changes_nothing(monkeypatch: pytest.MonkeyPatch, mode: str, part: int) -> None:
    generator = np.random.default_rng(0)
    noise = Image.fromarray(generator.integers(0, 256, (17, 23, 4), dtype=np.uint8))
    if mode in ("I;16", "I", "F"):
        kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        noise = Image.fromarray(generator.integers(0, 60_000, (17, 23)).astype(kind))
    data = encoded(noise.convert(mode) if mode != "P" else noise.convert("RGB").quantize(9), "TIFF")
    whole = pixels(data)
    monkeypatch.setattr(images, "PART_PIXELS", part)
    assert np.array_equal(pixels(data), whole)
    monkeypatch.setattr(images, "WHOLE_PIXELS", 17 * 23 // 3)
    small = pixels(data)
    monkeypatch.undo()
    monkeypatch.setattr(images, "WHOLE_PIXELS", 17 * 23 // 3)
    assert np.array_equal(pixels(data), small)
    assert small.shape == (9, 12, 3)


def test_who_needs_much_memory_is_not_passed_by_those_who_need_little() -> None:
    room, done = images._Room(10), []
    room.take(6)

    def take(size: int) -> None:
        room.take(size)
        done.append(size)

    waiting = [threading.Thread(target=take, args=(size,), daemon=True) for size in (8, 2)]
    for thread in waiting:
        thread.start()
        thread.join(0.1)
    assert done == []
    room.give(6)
    for thread in waiting:
        thread.join(10)
    assert sorted(done) == [2, 8]


def test_two_turns_that_need_more_do_not_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_room", images._Room(10 * images.SMALL))
    both, done = threading.Barrier(2), []

    @images.turn()
    def work() -> None:
        images._claim(5 * images.SMALL)
        both.wait(10)
        images._claim(10 * images.SMALL)
        done.append(True)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(done) == 2


def test_a_turn_gives_back_what_it_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(images, "_room", images._Room(images.MAX_MEMORY))
    data, path = encoded(quarters(), "PNG"), tmp_path / "large.png"
    path.write_bytes(data)
    monkeypatch.setattr(images, "LARGE_FILE", len(data) - 1)
    with images.turn():
        read(path)
        assert images._room._free == 0  # a large file, so that nobody else decodes
        decode(data)
        assert images._room._free == 0
    for wrong in (data[:-30], b"nothing"):
        with pytest.raises(InputError):
            decode(wrong)
    assert decode(data).size == (32, 32)
    assert images._room._free == images.MAX_MEMORY


MEASURED = """
import sys, threading
from pathlib import Path
from PIL import Image
from retrieval_tip.data import images

def status(name):
    return next(int(line.split()[1]) << 10 for line in Path("/proc/self/status").open() if line.startswith(name))

threads, memory = int(sys.argv[1]), int(sys.argv[2])
images.MAX_MEMORY, images._room, images.WHOLE_PIXELS, images.GIVEN_BACK = memory, images._Room(memory), 1 << 21, 1 << 20
images.SMALL = 0
needed, claim = [], images._claim
images._claim = lambda size: needed.append(size) or claim(size)

@images.turn()
def decode(path):
    images.decode(images.read(path)).getpixel((0, 0))

for path in sys.argv[3:]:
    images._give_memory_back()
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    working = [threading.Thread(target=decode, args=(path,)) for _ in range(threads - 1)]
    for thread in working:
        thread.start()
    decode(path)
    for thread in working:
        thread.join()
    print(path, status("VmHWM") - before, status("VmRSS") - before, needed.pop())
"""
LARGE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "RGB.jpg": ("JPEG", "RGB", {}),
    "turned.jpg": ("JPEG", "RGB", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6" + bytes(6)}),
    "progressive.jpg": ("JPEG", "RGB", {"progressive": True, "subsampling": 0}),
    "CMYK.jpg": ("JPEG", "CMYK", {"progressive": True}),
    "RGB.png": ("PNG", "RGB", {}),
    "RGBA.png": ("PNG", "RGBA", {}),
    "LA.png": ("PNG", "LA", {}),
    "P.png": ("PNG", "P", {"transparency": 0}),
    "1.png": ("PNG", "1", {}),
    "I16.png": ("PNG", "I;16", {}),
    "P.gif": ("GIF", "P", {"transparency": 0}),
    "RGB.webp": ("WEBP", "RGB", {"method": 0}),
    "RGBA.webp": ("WEBP", "RGBA", {"lossless": True, "method": 0, "quality": 0}),
    "RGB.tif": ("TIFF", "RGB", {}),
    "F.tif": ("TIFF", "F", {"compression": "tiff_lzw"}),
    "I.tif": ("TIFF", "I", {"compression": "packbits"}),
    "CMYK.tif": ("TIFF", "CMYK", {"compression": "tiff_lzw"}),
    "LAB.tif": ("TIFF", "LAB", {}),
    "YCbCr.tif": ("TIFF", "YCbCr", {"compression": "jpeg"}),
    "strip.tif": ("TIFF", "RGBA", {"compression": "tiff_lzw", "tiffinfo": {278: 3000}}),
    "turned.tif": ("TIFF", "RGBA", {"compression": "tiff_lzw", "tiffinfo": {274: 6}}),
    "RGB.bmp": ("BMP", "RGB", {}),
    "RGB.ppm": ("PPM", "RGB", {}),
    "L.pgm": ("PPM", "L", {}),
    "I.pgm": ("PPM", "I", {}),
    "F.pfm": ("PPM", "F", {}),
}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Images of each format and mode: half of them just come whole, where the limit is 2**21, half are too large."""
    folder, found = tmp_path_factory.mktemp("large"), []
    for number, (name, (style, mode, options)) in enumerate(LARGE.items()):
        image = Image.linear_gradient("L").resize((1500, 2000) if number % 2 else (1448, 1448))
        if mode == "LAB":
            image = Image.merge("LAB", [image] * 3)
        elif mode == "I;16":
            image = image.convert("I").convert(mode)
        else:
            image = image.convert("RGB").convert(mode) if mode not in ("I", "F", "LA", "1") else image.convert(mode)
        image.save(folder / name, style, **options)
        found.append(folder / name)
    return found


def measured(threads: int, memory: int, paths: list[Path]) -> dict[str, list[int]]:
    """Bytes by which a process grows at most, by which it stays larger, and that it said to need, for each image."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the peak of memory can only be asked for on Linux")
    command = [sys.executable, "-W", "ignore", "-c", MEASURED, str(threads), str(memory), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = (line.rsplit(" ", 3) for line in done.stdout.splitlines())
    return {Path(path).name: [int(value) for value in values] for path, *values in lines}


def test_decoding_takes_the_memory_that_it_is_said_to_take(large: list[Path]) -> None:
    found = measured(1, images.MAX_MEMORY, large)
    assert list(found) == list(LARGE)
    for name, (peak, stays, needed) in found.items():
        assert peak < needed + (16 << 20), (name, peak, needed)
        assert stays < 8 << 20, (name, stays)


def test_four_threads_take_no_more_memory_than_there_is(large: list[Path]) -> None:
    memory = 48 << 20
    some = [path for path in large if path.name in ("progressive.jpg", "RGBA.png", "RGBA.webp", "F.tif", "strip.tif")]
    found = measured(4, memory, some)
    assert len(found) == 5
    for name, (peak, _, needed) in found.items():
        assert memory < 4 * needed  # all at once would not fit
        assert peak < memory + (64 << 20), (name, peak)  # the C library keeps some for each thread


# ------------------------------------------------------------------------------- limits of the caller, and thumbnails


def test_the_caller_may_allow_fewer_pixels() -> None:
    data = encoded(quarters(40, 20), "PNG")
    assert decode(data, most=800).size == (40, 20)
    with pytest.raises(InputError, match="40 x 20 pixels are more than 799: refused before decoding"):
        decode(data, most=799)
    with pytest.raises(InputError, match="more than 799"):  # of the full size, however small it would be decoded
        decode(encoded(quarters(40, 20), "JPEG"), 2, most=799)
    with pytest.raises(InputError, match="more than 799"):
        thumbnail(data, 4, most=799)


@pytest.mark.parametrize("style", ["PNG", "JPEG", "GIF", "WEBP"])
def test_a_thumbnail_is_a_small_jpeg(style: str) -> None:
    found = thumbnail(encoded(quarters(300, 200), style), 60)
    with Image.open(io.BytesIO(found)) as image:
        assert (image.format, image.size, image.mode) == ("JPEG", (60, 40), "RGB")
        close(np.asarray(image), quarters(60, 40))
    assert len(found) < 2000


def test_a_thumbnail_is_upright_not_enlarged_and_says_nothing_else() -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "secret"  # turned by 90 degrees
    data = encoded(quarters(80, 40), "JPEG", exif=exif, comment=b"secret", icc_profile=b"secret" * 9)
    found = thumbnail(data, 200)
    with Image.open(io.BytesIO(found)) as image:
        assert image.size == (40, 80)
        close(np.asarray(image), quarters(80, 40).transpose(Image.Transpose.ROTATE_270))
    assert b"secret" in data
    assert b"secret" not in found
    with Image.open(io.BytesIO(thumbnail(encoded(quarters(4000, 2), "PNG"), 32))) as image:
        assert image.size == (32, 1)
    with pytest.raises(UsageError, match="size is 0"):
        thumbnail(data, 0)
    with pytest.raises(InputError, match="not an image"):
        thumbnail(b"nothing", 8)
