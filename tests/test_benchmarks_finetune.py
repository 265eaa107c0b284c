"""The fine-tuning benchmark at a toy size: it runs, and both precisions answer alike."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import ROOT

pytestmark = pytest.mark.soak


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmarks_finetune", ROOT / "benchmarks" / "finetune.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_plain_and_ours_take_the_same_step(benchmark):
    """What is timed against each other gives the same loss, step after step."""
    material = benchmark.Material.make(classes=20, shots=4, dim=32, views=2, queries=1)
    plain, ours = benchmark.plain(material.cache), benchmark.ours(material.cache, "float32")
    batches = material.batches(16)
    losses = np.array([(plain(*batch), ours(*batch)[0]) for batch, _ in zip(batches, range(60), strict=False)])
    assert losses[:, 1] == pytest.approx(losses[:, 0], rel=1e-4)
    assert losses[-20:].mean() < 0.9 * losses[:20].mean()


def test_whole_runs_agree_and_better_the_index(benchmark, capsys):
    material = benchmark.Material.make(classes=50, shots=8, dim=64, views=4, queries=1000)
    found = benchmark.print_runs(material, batch=64, epochs=5)
    assert found["bfloat16"] == pytest.approx(found["float32"], abs=1.0)
    assert found["float32"] > found["training-free"] > found["zero-shot"]
    assert "fine-tuned, bfloat16" in capsys.readouterr().out


def test_the_command(benchmark):
    sizes = "--classes 40 --shots 4 --dim 32 --batch 32 --queries 40 --rounds 1 --epochs 0"
    result = CliRunner().invoke(benchmark.main, sizes.split())
    assert result.exit_code == 0, result.output
    for expected in (
        "plain, one-hot and autograd",
        "goals",
        "--precision auto chooses float32",
    ):
        assert expected in result.output
