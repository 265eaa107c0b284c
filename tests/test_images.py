"""Any bytes are decoded to an upright RGB image, or refused with a one-line error."""

import io
import os
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, features
from tables import png, png_chunk, touch

from retrieval_tip.data import images
from retrieval_tip.data.images import decode, find, thumbnail
from retrieval_tip.data.source import MAX_BYTES, read_item
from retrieval_tip.errors import InputError, UsageError

RED = (255, 0, 0)
GREEN = (0, 255, 0)
BLUE = (0, 0, 255)
YELLOW = (255, 255, 0)
EXACT = ["PNG", "GIF", "TIFF", "BMP", "PPM"]
LOSSY = ["JPEG", "WEBP", "MPO"]
OTHERS = ["TGA", "PCX", "SGI", "IM", "DDS", "QOI", "ICO", "ICNS", "DIB", "XBM", "MSP", "EPS", "PDF"]
OPTIONAL = {"AVIF": "avif", "JPEG2000": "jpg_2000"}


def quarters(width=32, height=32):
    """Return red and green above blue and yellow, so that each rotation and each flip looks different."""
    image = Image.new("RGB", (width, height))
    w = width // 2
    h = height // 2
    for colour, x, y in ((RED, 0, 0), (GREEN, w, 0), (BLUE, 0, h), (YELLOW, w, h)):
        image.paste(colour, (x, y, x + w, y + h))
    return image


def encoded(image, style, **options):
    if style in OPTIONAL and not features.check(OPTIONAL[style]):
        pytest.skip(f"this Pillow cannot write {style}")
    buffer = io.BytesIO()
    image.save(buffer, style, **options)
    return buffer.getvalue()


def pixels(data):
    picture = decode(data)
    assert picture.mode == "RGB"
    return np.asarray(picture)


def assert_close(one, other, most=12):
    assert one.shape == np.asarray(other).shape
    assert np.abs(one.astype(int) - np.asarray(other).astype(int)).mean() < most


def error_of(data):
    with pytest.raises(InputError) as caught:
        decode(data)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def png_claiming(width, height, depth=8, colour=2):
    """Return a PNG of a few bytes whose header claims this size."""
    return png(width, height, zlib.compress(b"\0" * 1000), depth, colour)


@pytest.mark.parametrize("style", [*EXACT, *LOSSY])
def test_pixels_and_extension_of_each_format(style):
    data = encoded(quarters(), style)
    assert_close(pixels(data), quarters(), 12 if style in LOSSY else 1e-9)
    expected = {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif"}.get(style, f".{style.lower()}")
    assert images.extension(data) == expected
    assert expected in images.extensions()
    with pytest.raises(InputError, match="not a readable image"):
        images.extension(b"nothing")


@pytest.mark.parametrize("style", ["GIF", "TIFF", "WEBP", "PNG", "MPO"])
def test_the_first_of_several_frames_is_decoded(style):
    others = [Image.new("RGB", (32, 32), BLUE), Image.new("RGB", (32, 32), GREEN)]
    assert_close(
        pixels(encoded(quarters(), style, save_all=True, append_images=others)), quarters()
    )


TURNED = [None, *(Image.Transpose(number) for number in (0, 3, 1, 5, 4, 6, 2))]
"""Transposition that makes an image of EXIF orientation 1, 2 ... 8 upright."""


@pytest.mark.parametrize("style", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(style, orientation):
    stored = quarters(48, 32)
    turn = TURNED[orientation - 1]
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert_close(
        pixels(encoded(stored, style, exif=exif)),
        stored if turn is None else stored.transpose(turn),
    )


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
def test_damaged_exif_data_does_not_change_the_pixels(style, exif):
    assert_close(pixels(encoded(quarters(), style, exif=exif)), quarters())


def test_orientation_is_applied_even_if_other_exif_entries_are_damaged():
    entries = [
        struct.pack("<HHII", 0x0112, 3, 1, 6),
        struct.pack("<HHII", 0x0131, 2, 500, 0x7FFFFFFF),  # a text beyond the end
        struct.pack("<HHII", 0x8769, 4, 1, 0x7FFFFFF0),  # a sub-folder beyond the end
    ]
    exif = (
        b"Exif\0\0II*\0\x08\0\0\0"
        + struct.pack("<H", len(entries))
        + b"".join(entries)
        + b"\0\0\0\0"
    )
    stored = quarters(48, 32)
    assert_close(
        pixels(encoded(stored, "JPEG", exif=exif)), stored.transpose(Image.Transpose.ROTATE_270)
    )


def few_pixels(mode, *values):
    image = Image.new(mode, (len(values), 1))
    if mode == "P":
        image.putpalette([255, 0, 0, 0, 255, 0])
    image.putdata(values)
    return image


WHITE = [255] * 3
LOSSLESS = {"lossless": True, "exact": True}
PALETTE = few_pixels("P", 0, 1)
ALPHA = few_pixels("RGBA", (0, 0, 0, 255), (0, 0, 0, 0), (0, 0, 0, 128))
FEW_PIXELS = [
    (PALETTE, "PNG", {"transparency": 0}, [WHITE, [0, 255, 0]]),
    (PALETTE, "PNG", {"transparency": b"\x00\xff\x80"}, [WHITE, [0, 255, 0]]),
    (PALETTE, "GIF", {"transparency": 0}, [WHITE, [0, 255, 0]]),
    *((ALPHA, style, LOSSLESS, [[0] * 3, WHITE, [127] * 3]) for style in ("PNG", "TIFF", "WEBP")),
    (few_pixels("LA", (50, 255), (50, 0)), "PNG", {}, [[50] * 3, WHITE]),
    (
        few_pixels("RGB", (10, 20, 30), (200,) * 3),
        "PNG",
        {"transparency": (10, 20, 30)},
        [WHITE, [200] * 3],
    ),
    (few_pixels("L", 10, 200), "PNG", {"transparency": 10}, [WHITE, [200] * 3]),
    *(
        (few_pixels("1", 0, 255), style, {}, [[0] * 3, WHITE])
        for style in ("PNG", "TIFF", "BMP", "PPM")
    ),
    *(
        (few_pixels("RGB", (255,) * 3), style, {}, [WHITE])
        for style in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")
    ),
]


@pytest.mark.parametrize(("image", "style", "options", "expected"), FEW_PIXELS)
def test_colours_are_exact_and_transparent_pixels_become_white(image, style, options, expected):
    assert pixels(encoded(image, style, **options))[0].tolist() == expected


@pytest.mark.parametrize("style", ["PNG", "TIFF", "PPM", "other byte order"])
def test_sixteen_bit_greys_are_scaled_to_eight_bits(style):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    image = Image.fromarray(ramp)
    if style == "other byte order":
        image = Image.frombytes("I;16B", (16, 16), ramp.astype(">u2").tobytes())
        style = "TIFF"
    got = pixels(encoded(image, style))
    assert (got == np.arange(256).reshape(16, 16, 1)).all()


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        (np.int32, [0, 128, 255], [0, 128, 255]),
        (np.int32, [0, 32768, 65535], [0, 128, 255]),
        (np.int32, [0, 1_000_000, 2_000_000], [0, 128, 255]),
        (np.int32, [-5, 0, 255], [0, 0, 255]),
        (np.int32, [0, 0, 0], [0, 0, 0]),
        (np.float32, [0.0, 0.5, 1.0], [0, 128, 255]),
        (np.float32, [0.0, 127.6, 255.0], [0, 128, 255]),
        (np.float32, [np.nan, 0.2, 1.0], [0, 51, 255]),
        (np.float32, [np.inf, -np.inf, 1.0], [0, 0, 255]),
        (np.float32, [np.nan] * 3, [0, 0, 0]),
        (np.float32, [-3.0, -2.0, -1.0], [0, 0, 0]),
        (np.float32, [0.0, 1.5e38, 3e38], [0, 128, 255]),
    ],
)
def test_32_bit_greys_are_scaled_by_their_range(kind, values, expected):
    assert (
        pixels(encoded(Image.fromarray(np.array([values], dtype=kind)), "TIFF"))[0, :, 0].tolist()
        == expected
    )


@pytest.mark.parametrize(
    ("mode", "style"), [("CMYK", "JPEG"), ("CMYK", "TIFF"), ("LAB", "TIFF"), ("YCbCr", "TIFF")]
)
def test_other_colour_spaces_are_converted_to_rgb(mode, style):
    image = quarters()
    if mode == "LAB":
        pytest.importorskip("PIL._imagingcms")
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.buildTransform(*profiles, "RGB", "LAB").apply(image)
    assert_close(
        pixels(encoded(image if mode == "LAB" else image.convert(mode), style)), quarters()
    )


@pytest.mark.parametrize("size", [(1, 50000), (50000, 1), (2, 40001)])
def test_an_extremely_long_image_is_cropped_to_its_middle(size):
    image = Image.new("RGB", size, BLUE)
    width, height = size
    image.paste(RED, (width // 3, height // 3, width - width // 3, height - height // 3))
    got = decode(encoded(image, "PNG"))
    assert max(got.size) == images.MAX_ASPECT * min(size)
    assert min(got.size) == min(size)
    assert np.asarray(got).reshape(-1, 3).mean(axis=0).tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    "size", [(30000, 30000), (178956971, 1), (2**31 - 1, 2**31 - 1), (0, 5), (5, 0)]
)
def test_a_decompression_bomb_is_refused_before_it_is_decoded(size):
    tracemalloc.start()
    message = error_of(png_claiming(*size))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "too large" in message or 0 in size
    assert peak < 10 << 20
    assert images.area(png_claiming(*size)) == 0


@pytest.mark.parametrize("style", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM"])
def test_a_file_truncated_at_any_length_is_refused(style):
    generator = np.random.default_rng(0)
    noise = Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, style)
    for length in np.linspace(1, len(data) * 0.9, 40).astype(int):
        error_of(data[:length])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 5000,
        b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        b"%PDF-1.7\n",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n",
        b"\xff\xd8\xff\xe0",
        b"\x89PNG\r\n\x1a\n",
        b"RIFF\xff\xff\xff\xffWEBPVP8 ",
        b"BM" + b"\xff" * 60,
        b"P6\n99999999999999999999 1\n255\n",
        b"P5\n4 4\n99999999\n",
        b"\x89HDF\r\n\x1a\n" + b"\0" * 100,
    ],
)
def test_files_that_are_not_images_are_refused(data):
    error_of(data)


@pytest.mark.parametrize("style", [*OTHERS, *OPTIONAL])
def test_unlisted_formats_are_refused(style):
    buffer = io.BytesIO()
    if style in OPTIONAL and not features.check(OPTIONAL[style]):
        pytest.skip(f"this Pillow cannot write {style}")
    size = 1024 if style == "ICNS" else 64
    quarters(size, size).convert("1" if style in ("XBM", "MSP") else "RGB").save(buffer, style)
    assert "not a readable image" in error_of(buffer.getvalue())
    assert {".avif", ".jp2", ".ico", ".icns", ".tga", ".qoi", ".eps", ".pdf"}.isdisjoint(
        images.extensions()
    )


def test_running_out_of_memory_refuses_the_image(monkeypatch):
    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr(images, "_rgb", full)
    assert "memory" in error_of(encoded(quarters(), "PNG"))


NOT_FILES = {
    "a folder": lambda path: path.mkdir(),
    "a pipe, not a file": lambda path: os.mkfifo(path),  # has no writer, so opening it would block
    "a device, not a file": lambda path: path.symlink_to("/dev/zero"),
    "kernel, not a file": lambda path: path.symlink_to("/proc/kmsg"),
    "no such file": lambda path: path.symlink_to("nowhere.png"),
    "empty": lambda path: path.write_bytes(b""),
    "symbolic links|no such file": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("what", NOT_FILES)
def test_read_reports_why_a_path_is_not_a_file(tmp_path, what):
    NOT_FILES[what](tmp_path / "x.png")
    with pytest.raises(InputError, match=what):
        read_item(str(tmp_path / "x.png"))
    (tmp_path / "y.png").write_bytes(b"anything")
    assert read_item(str(tmp_path / "y.png")) == b"anything"


@pytest.mark.parametrize(
    "path", ["a\0b.png", "x" * 5000 + ".png", "/".join(["d"] * 3000), "\ud800.png", ""]
)
def test_read_refuses_impossible_paths(path):
    with pytest.raises(InputError) as caught:
        read_item(str(path))
    assert str(caught.value)


def test_read_refuses_a_huge_file_without_reading_it(tmp_path):
    path = tmp_path / "huge.png"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)  # sparse
    tracemalloc.start()
    with pytest.raises(InputError, match="bytes"):
        read_item(str(path))
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_find_descends_1500_folders(tmp_path):
    deep = str(tmp_path)
    for _ in range(1500):
        deep += "/d"
        os.mkdir(deep)  # noqa: PTH102 - pathlib fails on paths this long
    touch(Path(deep), "x.png")
    try:
        assert list(find(tmp_path)) == [tmp_path / ("d/" * 1500 + "x.png")]
    finally:
        subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)  # too deep for pytest to remove


def smooth(width, height, mode="RGB"):
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
def test_a_jpeg_is_halved_while_its_shorter_side_is_long_enough(size, least, expected):
    data = encoded(smooth(*size), "JPEG", quality=95)
    found = decode(data, least)
    assert found.size == expected
    assert_close(np.asarray(found), decode(data).resize(expected, Image.Resampling.BOX), 2)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_reduced_jpeg_is_an_upright_rgb_image(mode, progressive, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(smooth(320, 240, mode), "JPEG", quality=95, progressive=progressive, exif=exif)
    whole = decode(data)
    reduced = decode(data, 100)
    assert reduced.mode == "RGB"
    assert reduced.size == (whole.width // 2, whole.height // 2)
    assert_close(np.asarray(reduced), whole.resize(reduced.size, Image.Resampling.BOX), 2)


@pytest.mark.parametrize("style", ["PNG", "MPO", "WEBP", "TIFF"])
def test_other_formats_are_never_reduced(style):
    more = {"save_all": True, "append_images": [smooth(320, 240)]} if style == "MPO" else {}
    data = encoded(smooth(320, 240), style, **more)
    assert np.array_equal(np.asarray(decode(data, 20)), pixels(data))


def test_a_damaged_jpeg_is_refused_at_a_reduced_size():
    data = encoded(smooth(320, 240), "JPEG")
    for wrong in (
        b"",
        b"\xff\xd8",
        b"\xff\xd8\xff" + b"garbage" * 100,
        data[:20],
        data[: len(data) // 2],
    ):
        with pytest.raises(InputError, match="damaged"):
            decode(wrong, 20)


def segment(marker, body):
    return bytes([255, marker]) + struct.pack(">H", len(body) + 2) + body


def png_with(*chunks):
    data = encoded(quarters(), "PNG")
    return data[:33] + b"".join(chunks) + data[33:]


def jpeg_with(*segments, **options):
    data = encoded(quarters(), "JPEG", **options)
    return data[:2] + b"".join(segments) + data[2:]


def jpeg_with_scans(number):
    """Return a black JPEG of 1024 x 1024 pixels whose last scan, of a few bytes, is repeated ``number`` more times."""
    data = encoded(Image.new("RGB", (1024, 1024)), "JPEG", progressive=True)[:-2]
    return data + data[data.rindex(b"\xff\xda") :] * number + b"\xff\xd9"


TEXT = png_chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(bytes(1_000_000)))
SLOW_TO_PARSE = {
    "segments of a JPEG": lambda: jpeg_with(segment(0xE5, b"") * 140_000),
    "fill bytes of a JPEG": lambda: jpeg_with(b"\xff" * 100_000),
    "scans of a JPEG": lambda: jpeg_with_scans(2100),
    "chunks before the pixels of a PNG": lambda: png_with(png_chunk(b"teSt", b"") * 40_000),
    "chunks without pixels of a PNG": lambda: png_with(png_chunk(b"IDAT", b"") * 40_000),
    "texts of a PNG": lambda: png_with(TEXT * 80),
    "letters of a PPM's comment": lambda: b"P6\n#" + b"x" * 100_000 + b"\n1 1\n255\n\0\0\0",
}


@pytest.mark.parametrize("what", SLOW_TO_PARSE)
def test_an_image_that_takes_long_to_parse_is_refused(what):
    error_of(SLOW_TO_PARSE[what]())


def test_a_huge_exif_block_is_ignored():
    exif = (
        b"II*\0\x08\0\0\0"
        + struct.pack("<HHHII", 1, 0x0112, 3, 1_000_000, 26)
        + bytes(4)
        + b"\6\0" * 1_000_000
    )
    assert_close(pixels(encoded(quarters(), "WEBP", exif=exif)), quarters())
    assert_close(pixels(encoded(quarters(), "PNG", exif=exif)), quarters())


MEASURED = """
import sys, threading
from pathlib import Path
from retrieval_tip.data import images
from retrieval_tip.data.source import read_item

def status(name):
    return next(int(line.split()[1]) << 10 for line in Path("/proc/self/status").open() if line.startswith(name))

for path in sys.argv[1:]:
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    working = [threading.Thread(target=lambda: images.decode(read_item(path), 300)) for _ in range(4)]
    for thread in working:
        thread.start()
    for thread in working:
        thread.join()
    print(status("VmHWM") - before)
"""


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory is known only on Linux"
)
@pytest.mark.parametrize(
    ("style", "options"), [("PNG", {}), ("JPEG", {"progressive": True}), ("WEBP", {"method": 0})]
)
def test_large_images_are_decoded_one_at_a_time(tmp_path, style, options):
    size = (4200, 4000)
    assert size[0] * size[1] > images.LARGE_PIXELS
    path = tmp_path / "large"
    Image.linear_gradient("L").resize(size).convert("RGB").save(path, style, **options)
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(path)], capture_output=True, text=True, check=True
    )
    assert (
        int(done.stdout) < 1.5 * 16 * size[0] * size[1]
    )  # a decoder uses at most 16 bytes per pixel


def test_a_large_image_can_be_decoded_after_another_one_failed(monkeypatch):
    monkeypatch.setattr(images, "LARGE_PIXELS", 10)
    data = encoded(quarters(), "PNG")
    for _ in range(2):
        error_of(data[:-30])
        assert decode(data).size == (32, 32)


MODES = ["1", "L", "LA", "P", "RGBA", "CMYK", "I", "F", "I;16"]


@pytest.mark.parametrize(
    ("style", "mode"),
    [
        *((style, "RGB") for style in ("PNG", "GIF", "WEBP", "MPO", "JPEG")),
        *(("TIFF", mode) for mode in MODES),
    ],
)
@pytest.mark.parametrize("orientation", [1, 6])
def test_an_image_above_the_pixel_limit_is_halved(monkeypatch, style, mode, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {} if style == "GIF" else {"exif": exif}
    deep = {"I": np.int32, "F": np.float32, "I;16": np.uint16}.get(mode)
    image = quarters(96, 64).convert("L" if deep else mode)
    data = encoded(
        Image.fromarray(200 * np.asarray(image).astype(deep)) if deep else image, style, **options
    )
    whole = decode(data)
    monkeypatch.setattr(images, "WHOLE_PIXELS", 96 * 64 // 4)
    found = decode(data)
    assert found.size == (whole.width // 2, whole.height // 2)
    assert_close(np.asarray(found), whole.resize(found.size, Image.Resampling.BOX), 3)


@pytest.mark.parametrize("style", ["PNG", "JPEG"])
def test_a_caller_can_limit_pixels_and_formats(style):
    data = encoded(quarters(40, 20), style)
    assert decode(data, most=800, only=(style,)).size == (40, 20)
    assert images.area(data, most=800, only=(style,)) == 800
    for call in (
        lambda: decode(data, 2, most=799),
        lambda: thumbnail(data, 4, most=799),
    ):  # limit of the full size
        with pytest.raises(InputError, match="40 x 20 pixels"):
            call()
    with pytest.raises(InputError, match="not a readable image"):
        decode(data, only=("WEBP",))
    assert images.area(data, most=799) == images.area(data, only=("WEBP",)) == 0


@pytest.mark.parametrize("style", ["PNG", "JPEG", "GIF", "WEBP"])
def test_a_thumbnail_is_a_small_jpeg(style):
    found = thumbnail(encoded(quarters(300, 200), style), 60)
    with Image.open(io.BytesIO(found)) as image:
        assert (image.format, image.size, image.mode) == ("JPEG", (60, 40), "RGB")
        assert_close(np.asarray(image), quarters(60, 40))
    assert len(found) < 2000


def test_a_thumbnail_is_upright_not_enlarged_and_without_metadata():
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "secret"  # turned by 90 degrees
    data = encoded(
        quarters(80, 40), "JPEG", exif=exif, comment=b"secret", icc_profile=b"secret" * 9
    )
    found = thumbnail(data, 200)
    with Image.open(io.BytesIO(found)) as image:
        assert image.size == (40, 80)
        assert_close(np.asarray(image), quarters(80, 40).transpose(Image.Transpose.ROTATE_270))
    assert b"secret" in data
    assert b"secret" not in found
    with Image.open(io.BytesIO(thumbnail(encoded(quarters(4000, 2), "PNG"), 32))) as image:
        assert image.size == (32, 1)
    with pytest.raises(UsageError, match="size 0"):
        thumbnail(data, 0)
    with pytest.raises(InputError, match="not a readable image"):
        thumbnail(b"nothing", 8)
