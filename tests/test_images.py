"""Whatever the bytes are, decode gives an upright RGB picture or says in one line why not."""

from __future__ import annotations

import io
import os
import random
import struct
import subprocess
import tracemalloc
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, features

from retrieval_tip.data import images
from retrieval_tip.data.images import decode, find, read, thumbnail
from retrieval_tip.errors import InputError, UsageError

RED, GREEN, BLUE, YELLOW = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)
EXACT = ["PNG", "GIF", "TIFF", "BMP", "PPM", "TGA", "PCX", "SGI", "IM", "DDS", "QOI", "ICO", "ICNS", "DIB"]
LOSSY = ["JPEG", "JPEG2000", "WEBP", "AVIF", "MPO"]
OPTIONAL = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}


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
    size = 1024 if style == "ICNS" else 16  # the largest of an icon's sizes is taken
    options = {"sizes": [(size, size)]} if style == "ICO" else {}
    image = quarters(size, size)
    assert np.array_equal(pixels(encoded(image, style, **options)), np.asarray(image))


@pytest.mark.parametrize("style", LOSSY)
def test_a_lossy_format_gives_nearly_the_same_pixels(style: str) -> None:
    close(pixels(encoded(quarters(), style)), quarters())


@pytest.mark.parametrize("style", ["GIF", "TIFF", "WEBP", "PNG", "AVIF", "MPO"])
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


@pytest.mark.parametrize("style", ["PNG", "TIFF", "WEBP", "TGA"])
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


@pytest.mark.parametrize("style", ["PNG", "TIFF", "BMP", "PPM", "XBM", "MSP"])
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


def test_postscript_is_refused_so_that_ghostscript_never_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: started.append(a))
    buffer = io.BytesIO()
    quarters().save(buffer, "EPS")
    assert "not an image" in refusal(buffer.getvalue())
    assert not started
    assert not images.extensions() & {".eps", ".ps"}


SEEDS = {
    style: quarters(24, 16)
    for style in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "ICO", "PPM", "TGA", "PCX", "SGI", "DDS", "QOI", "ICNS")
}


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


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_folder, "folder"),
        (os.mkfifo, "not a file"),
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


def test_read_refuses_a_huge_file_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "huge.png"
    with path.open("wb") as file:
        file.truncate(images.MAX_BYTES + 1)  # sparse
    monkeypatch.setattr(Path, "read_bytes", lambda _: pytest.fail("was read"))
    with pytest.raises(InputError, match="bytes"):
        read(path)


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


# ------------------------------------------------------------------------------- limits of the caller, and thumbnails


def icon_of(picture: bytes, width: int = 32, height: int = 32) -> bytes:
    """An ICO file that says this size and holds this picture."""
    return struct.pack("<HHH BBBBHHII", 0, 1, 1, width, height, 0, 0, 1, 32, len(picture), 22) + picture


def mac_icon_of(picture: bytes, code: bytes = b"ic07") -> bytes:
    """An ICNS file that says 128 x 128 and holds this picture."""
    return b"icns" + struct.pack(">I", 16 + len(picture)) + code + struct.pack(">I", 8 + len(picture)) + picture


def test_the_caller_may_allow_fewer_pixels() -> None:
    data = encoded(quarters(40, 20), "PNG")
    assert decode(data, most=800).size == (40, 20)
    with pytest.raises(InputError, match="40 x 20 pixels are more than 799: refused before decoding"):
        decode(data, most=799)
    with pytest.raises(InputError, match="more than 799"):  # of the full size, however small it would be decoded
        decode(encoded(quarters(40, 20), "JPEG"), 2, most=799)
    with pytest.raises(InputError, match="more than 799"):
        thumbnail(data, 4, most=799)


def test_the_caller_may_allow_fewer_formats() -> None:
    png, bmp = encoded(quarters(), "PNG"), encoded(quarters(), "BMP")
    assert decode(png, formats=("JPEG", "PNG")).size == (32, 32)
    for refused in (bmp, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"):
        with pytest.raises(InputError, match="not an image that Pillow can open"):
            decode(refused, formats=("JPEG", "PNG", "EPS"))
        with pytest.raises(InputError, match="not an image that Pillow can open"):
            thumbnail(refused, 8, formats=("JPEG", "PNG", "EPS"))
    with pytest.raises(InputError):
        decode(icon_of(png), formats=("PNG",))


@pytest.mark.parametrize(
    "data",
    [
        icon_of(png_claiming(20000, 9000)),
        icon_of(struct.pack("<IiiHHIIiiII", 40, 20000, 18000, 1, 24, 0, 0, 0, 0, 0, 0) + b"\0" * 99),
        mac_icon_of(png_claiming(20000, 9000)),
    ],
    ids=["PNG in ICO", "bitmap in ICO", "PNG in ICNS"],
)
def test_the_picture_within_an_icon_is_measured_before_it_is_decoded(data: bytes) -> None:
    tracemalloc.start()
    assert "20000 x 9000 pixels are more than 178,956,970: refused before decoding" in refusal(data)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(("pack", "style"), [(icon_of, "PNG"), (mac_icon_of, "PNG"), (mac_icon_of, "JPEG2000")])
def test_pictures_within_icons_are_read_within_the_limit(pack: Callable[[bytes], bytes], style: str) -> None:
    data = pack(encoded(quarters(128, 128), style))
    assert decode(data, most=128 * 128).size == (128, 128)
    with pytest.raises(InputError, match="128 x 128 pixels are more than 16,383"):
        decode(data, most=128 * 128 - 1)


def test_bitmaps_and_raw_data_within_icons_are_read_as_before() -> None:
    data = encoded(quarters(), "ICO", sizes=[(32, 32)], bitmap_format="bmp")
    close(pixels(data), quarters())
    with pytest.raises(InputError, match="32 x 32 pixels are more than 1,023"):
        decode(data, most=1023)
    assert decode(mac_icon_of(b"\x7f" * 32 * 32 * 3, b"il32")).size == (32, 32)
    for damaged in (b"\0\0\1\0", b"\0\0\1\0\1\0" + b"\xff" * 16, b"icns\0\0\0\x10ic07\0\0\0\0", b"icns"):
        refusal(damaged)


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
