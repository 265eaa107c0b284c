"""JPEGs that a backbone decodes by itself, with torchvision's decoder for CPUs in the place of nvJPEG."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import needs_shared
from PIL import Image

from retrieval_tip import CacheModel, Encoder, EncodingCache, build_index, load_backbone, open_source
from retrieval_tip.backbones import nvjpeg
from retrieval_tip.backbones.loading import load_when_needed
from retrieval_tip.data import images
from retrieval_tip.data.encoder import pixels_of
from retrieval_tip.errors import BackboneError, UsageError

pytestmark = needs_shared


@pytest.fixture
def decoding(shared: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A backbone that decodes JPEGs, on a CPU, for nothing but the decoder's own place is asked of the device."""
    real = nvjpeg.check
    monkeypatch.setattr(nvjpeg, "check", lambda decoder, _, how: real(decoder, torch.device("cuda"), how))
    return load_backbone(f"local-dir:{shared / 'models' / 'lit-mini'}", device="cpu", decoder="nvjpeg")


@pytest.fixture
def folder(shared: Path, tmp_path: Path) -> Path:
    """Photographs, some as they are and some as no JPEG decoder but Pillow's takes them."""
    found = sorted((shared / "data" / "caltech101").rglob("*.jpg"))
    for number, path in enumerate(found[:: len(found) // 6][:6]):
        (tmp_path / "pictures" / "thing").mkdir(parents=True, exist_ok=True)
        image = Image.open(path).convert("RGB")
        place = tmp_path / "pictures" / "thing" / f"{number}"
        if number == 1:
            image.convert("L").save(f"{place}.jpg")
        elif number == 2:
            exif = Image.Exif()
            exif[0x0112] = 6
            image.save(f"{place}.jpg", exif=exif)
        elif number == 3:
            image.save(f"{place}.png")
        else:
            image.save(f"{place}.jpg", quality=92)
    return tmp_path / "pictures"


def encoded(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())


def test_its_features_are_another_backbones_by_a_hair(decoding: Any, lit_mini: Any, folder: Path) -> None:
    source = open_source(folder)
    plain, own = (Encoder(model, cache=None, reduce=False).encode(source).features for model in (lit_mini, decoding))
    assert ((plain * own).sum(axis=1) > 0.999).all()
    assert not np.array_equal(plain, own)
    assert decoding.identity.preprocess["decoder"] == "nvjpeg"
    assert decoding.identity.weights == lit_mini.identity.weights
    assert decoding.identity.fingerprint != lit_mini.identity.fingerprint
    one = (folder / "thing" / "0.jpg").read_bytes()
    assert torch.equal(pixels_of(one, decoding), decoding.views_of_jpegs([encoded(one)])[0])  # as the server does


def test_what_it_does_not_take_is_decoded_by_pillow(decoding: Any, lit_mini: Any, folder: Path, monkeypatch) -> None:
    taken = {path.name: images.is_plain_jpeg(path.read_bytes()) for path in sorted((folder / "thing").iterdir())}
    assert taken == {"0.jpg": True, "1.jpg": False, "2.jpg": False, "3.png": False, "4.jpg": True, "5.jpg": True}
    for damage in (b"", b"\xff\xd8\xff\xd9", (folder / "thing" / "0.jpg").read_bytes()[:-100]):
        assert not images.is_plain_jpeg(damage)
    asked: list[int] = []
    views = decoding.views_of_jpegs
    monkeypatch.setattr(decoding, "views_of_jpegs", lambda given: asked.append(len(given)) or views(given))
    Encoder(decoding, cache=None, batch_size=6).encode(open_source(folder))
    assert asked == [3]  # all of a batch at once


def test_a_picture_that_it_cannot_decode_costs_the_others_nothing(
    decoding: Any, lit_mini: Any, folder: Path, monkeypatch
) -> None:
    source = open_source(folder)
    expected = Encoder(decoding, cache=None).encode(source).features
    views, bad = decoding.views_of_jpegs, (folder / "thing" / "4.jpg").read_bytes()

    def some(given: list[torch.Tensor]) -> torch.Tensor:
        if any(len(one) == len(bad) for one in given):
            raise RuntimeError("nvjpegDecode failed: 6")
        return views(given)

    monkeypatch.setattr(decoding, "views_of_jpegs", some)
    found = Encoder(decoding, cache=None).encode(source).features
    assert np.array_equal(np.delete(found, 4, 0), np.delete(expected, 4, 0))
    assert float(found[4] @ expected[4]) > 0.999  # Pillow's

    def lacking(given: list[torch.Tensor]) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(decoding, "views_of_jpegs", lacking)
    with pytest.raises(torch.OutOfMemoryError):
        Encoder(decoding, cache=None).encode(source)


def test_one_that_nobody_can_decode_is_named(decoding: Any, folder: Path) -> None:
    place = folder / "thing" / "5.jpg"
    data = bytearray(place.read_bytes())
    data[700:-2] = bytes(len(data) - 702)  # whole by its header and end
    place.write_bytes(data)
    encoder = Encoder(decoding, cache=None)
    found = encoder.encode(open_source(folder))
    assert len(found.features) in (5, 6)  # some decoders paint what is missing grey
    assert len(encoder.skipped) == 6 - len(found.features)


def test_an_encoding_cache_tells_the_decoders_apart(
    decoding: Any, lit_mini: Any, folder: Path, tmp_path: Path, monkeypatch
) -> None:
    source, cache = open_source(folder), EncodingCache(tmp_path / "cache")
    first = Encoder(decoding, cache=cache).encode(source).features
    plain = Encoder(lit_mini, cache=cache).encode(source).features
    assert not np.array_equal(first, plain)
    monkeypatch.setattr(decoding, "views_of_jpegs", lambda _: pytest.fail("decoded again"))
    assert np.array_equal(Encoder(decoding, cache=cache).encode(source).features, first)


def test_an_index_remembers_its_decoder_and_refuses_another(
    decoding: Any, lit_mini: Any, folder: Path, tmp_path: Path, monkeypatch
) -> None:
    (folder / "other").mkdir()
    (folder / "thing" / "0.jpg").rename(folder / "other" / "0.jpg")
    built = build_index(open_source(folder), tmp_path / "x", Encoder(decoding, cache=None), fit="none", device="cpu")
    assert isinstance(built, CacheModel)
    assert built.backbone is not None
    again = load_when_needed(built.backbone, built.d, device="cpu")
    assert again.decodes_jpegs  # type: ignore[attr-defined]
    assert again.encode_images(torch.zeros(1, 3, *decoding.size)).shape == (1, built.d)  # loads it, and compares
    assert again.identity.fingerprint == built.backbone.fingerprint
    from retrieval_tip.data.feature_tables import check_backbone

    with pytest.raises(BackboneError, match="cannot be compared"):
        check_backbone(built.backbone, built.d, lit_mini, [])
    monkeypatch.undo()
    with pytest.raises(UsageError, match="decodes on a GPU, and the backbone is on the CPU"):
        load_when_needed(built.backbone, built.d, device="cpu")


def test_a_decoder_that_is_not_here_is_refused(run: Any, shared: Path, folder: Path, tmp_path: Path) -> None:
    place = f"local-dir:{shared / 'models' / 'lit-mini'}"
    with pytest.raises(UsageError, match="on the CPU"):
        load_backbone(place, device="cpu", decoder="nvjpeg")
    with pytest.raises(UsageError, match="expected one of pillow, nvjpeg"):
        load_backbone(place, device="cpu", decoder="x")
    for squash in ({"resize_mode": "squash"}, {"size": [224, 112]}, {"interpolation": "random"}):
        how = {"size": 224, "resize_mode": "shortest", "interpolation": "bicubic"} | squash
        with pytest.raises(UsageError, match="square views"):
            nvjpeg.check("nvjpeg", torch.device("cuda"), how)
    command = ("encode", folder, "--model", place, "--device", "cpu", "--out", tmp_path / "t.parquet", "--decoder")
    failed = run(*command, "nvjpeg")
    assert failed.exit_code == 2
    assert "give --decoder pillow" in failed.stderr
    assert run(*command, "pillow").exit_code == 0
    assert "--engine ray" in run(*command, "nvjpeg", "--engine", "ray").stderr


@pytest.mark.gpu
def test_nvjpeg_decodes_as_pillow_does(shared: Path, lit_mini: Any, folder: Path) -> None:
    place = f"local-dir:{shared / 'models' / 'lit-mini'}"
    own = load_backbone(place, device="cuda", precision="float32", decoder="nvjpeg")
    source = open_source(folder)
    plain, found = (Encoder(model, cache=None, reduce=False).encode(source).features for model in (lit_mini, own))
    assert ((plain * found).sum(axis=1) > 0.999).all()
    assert all(isinstance(path, str) for path in source.paths or ())


def test_bytes_reach_the_decoder_as_they_are(decoding: Any) -> None:
    file = io.BytesIO()
    Image.new("RGB", (300, 200), (200, 10, 10)).save(file, "JPEG", quality=95)
    [view] = decoding.views_of_jpegs([encoded(file.getvalue())])
    expected = decoding.preprocess(images.decode(file.getvalue()))
    torch.testing.assert_close(view, expected, rtol=0, atol=0.03)
