"""The page of docs/browser in Chromium, with onnxruntime-web from npm, gives the logits of the package."""

import functools
import http.server
import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from browser import PATIENCE, Opened, chromium
from conftest import ROOT, ok
from loopback import answering
from PIL import Image
from playwright.sync_api import expect
from sealing import manifest_of
from serving import caltech_photos

from retrieval_tip import Index, Reader, load_backbone
from retrieval_tip.data.sources import of_images

pytestmark = pytest.mark.soak

RUNTIME = ["ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"]


@pytest.fixture(scope="module")
def runtime():
    """The files of onnxruntime-web, kept in the clone between runs."""
    folder = ROOT / "build/onnxruntime-web"
    if not all((folder / name).is_file() for name in RUNTIME):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run(
                ["npm", "pack", "onnxruntime-web@1"], cwd=folder, check=True, capture_output=True
            )
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"SKIPPED: onnxruntime-web cannot be fetched from npm here ({error})")
        with tarfile.open(next(folder.glob("*.tgz"))) as package:
            for name in RUNTIME:
                (folder / name).write_bytes(package.extractfile(f"package/dist/{name}").read())
    return folder


class Files(http.server.SimpleHTTPRequestHandler):
    extensions_map = http.server.SimpleHTTPRequestHandler.extensions_map | {
        ".mjs": "text/javascript"
    }

    def log_message(self, *_):
        pass


@pytest.fixture
def fitted(own):
    """The index of ten classes, fitted, so that it knows which photos have no match."""
    ok("fit", own)
    return own


@pytest.fixture
def site(runtime, fitted, tmp_path):
    """The address of the page with an index of ten classes."""
    folder = tmp_path / "site"
    shutil.copytree(ROOT / "docs/browser", folder)
    shutil.copytree(runtime, folder / "ort")
    index = Index.load(fitted)
    Reader(load_backbone(index.backbone.model, device="cpu")).store_int8(
        of_images(index.labels["source"].to_pylist())
    )
    for name, precision in (("things", "float32"), ("int8", "int8")):
        ok("index export", fitted, "--onnx", folder / f"{name}.onnx", "--precision", precision)
    with answering(functools.partial(Files, directory=folder)) as address:
        yield f"{address}/"


LOGITS = """async ([graph, at]) => {
    const { open, classify } = await import("./classify.js");
    window[graph] ??= await open(graph);
    const file = await (await fetch(at)).blob();
    const { logits, probabilities, no_match } = await classify(window[graph], file);
    return { logits: [...logits], probabilities: [...probabilities], no_match, labels: window[graph].labels };
}"""


def test_a_photo_is_classified_in_the_browser(site, fitted, shared, run, tmp_path):
    paths = [Path(path) for path, _ in caltech_photos(shared, "test", 10, 1)]
    turned = tmp_path / "turned.jpg"
    clear = tmp_path / "clear.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(paths[0]).convert("RGB").save(turned, exif=exif, quality=95)
    cut_out = Image.open(paths[1]).convert("RGBA")
    cut_out.putalpha(Image.linear_gradient("L").resize(cut_out.size))
    cut_out.save(clear)
    stranger = tmp_path / "stranger.png"
    Image.effect_noise((300, 300), 200).convert("RGB").save(stranger)
    paths += [turned, clear, stranger]
    rows = run("classify", fitted, *paths, "--logits", "--format", "json", "--no-cache").stdout
    expected = {row["input"]: row for row in map(json.loads, rows.splitlines())}
    for number, path in enumerate(paths):
        shutil.copy(path, tmp_path / "site" / f"{number}{path.suffix}")
    with chromium() as browser:
        one = Opened(browser, site, ready="[role=status]")
        page = one.page
        expect(page.get_by_role("status")).to_contain_text("Ready: 10 classes", timeout=PATIENCE)
        page.get_by_label("Choose a photo").set_input_files(paths[0])
        expect(page.locator("li").first).to_contain_text(
            expected[str(paths[0])]["label"], timeout=PATIENCE
        )
        names = [f"{number}{path.suffix}" for number, path in enumerate(paths)]
        found, quick = (
            [page.evaluate(LOGITS, [f"{graph}.onnx", name]) for name in names]
            for graph in ("things", "int8")
        )
        page.get_by_label("Choose a photo").set_input_files(stranger)
        expect(page.get_by_role("status")).to_contain_text("No match", timeout=PATIENCE)
        page.get_by_label("Choose a photo").set_input_files(manifest_of(fitted))
        expect(page.get_by_role("status")).to_contain_text("cannot be read", timeout=PATIENCE)
        one.close()
    assert found[0]["labels"] == Index.load(fitted).class_names
    for path, one in zip(paths, found, strict=True):
        row = expected[str(path)]
        assert one["labels"][int(np.argmax(one["logits"]))] == row["label"], path
        assert one["no_match"] == row["no_match"], path
        np.testing.assert_allclose(
            one["logits"], row["logits"], rtol=1e-4, atol=1e-4 * np.abs(row["logits"]).max()
        )
    chances = [np.array([one["probabilities"] for one in rows]) for rows in (found, quick)]
    assert np.abs(chances[0] - chances[1]).max() > 0
    assert (chances[0].argmax(1) == chances[1].argmax(1)).mean() > 0.9
