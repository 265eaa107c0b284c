"""Accuracy of the whole command line on real photos."""

import pytest
from conftest import json_of, needs_real, ok

pytestmark = pytest.mark.soak

TEMPLATE = "a photo of a {}."


@needs_real
def test_caltech_photos_reach_the_expected_accuracy(shared, tmp_path):
    """The expected values were measured with plain open_clip and the formula (lit-mini's MODEL.md)."""
    caltech = tmp_path / "index"
    split = shared / "data/caltech101/split_zhou_Caltech101.json"
    model = f"local-dir:{shared / 'models/lit-mini'}"
    built = ok(
        "index build --fit none",
        split,
        "--model",
        model,
        "--template",
        TEMPLATE,
        "--out",
        caltech,
    )
    assert "1,600 shots, 100 classes" in built.stdout

    def percent(*settings):
        result = json_of("evaluate", caltech, split, *settings)
        assert result["n"] == 999
        return {name: 100 * result[name] for name in ("zero_shot_top1", "top1", "cache_top1")}

    paper = percent("--alpha", 1, "--beta", 5.5)
    assert paper["zero_shot_top1"] == pytest.approx(43.9, abs=0.3)
    assert paper["top1"] == pytest.approx(46.3, abs=0.3)
    assert percent("--alpha", 50, "--beta", 1)["top1"] == pytest.approx(87.0, abs=0.3)
    assert percent("--beta", 10)["cache_top1"] == pytest.approx(88.3, abs=0.3)
