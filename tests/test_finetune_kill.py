"""A killed and resumed encoder training gives the result of an uninterrupted run, bit for bit.

Run as a script, this file is the trainer.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import killing
import pytest
from conftest import few, sampled

if __name__ != "__main__":
    import numpy as np
    import torch
    from tables import tiny
    from test_finetune import (  # noqa: F401 - fixtures
        image_index,
        index,
        model,
        model_folder,
        pictures,
        shots_table,
        without_seconds,
    )

    from retrieval_tip import CacheModel
    from retrieval_tip.backbones.loading import load_backbone
    from retrieval_tip.data.encoder import Encoder
    from retrieval_tip.data.sources import open_source
    from retrieval_tip.errors import InputError, UsageError
    from retrieval_tip.fit import finetune
    from retrieval_tip.fit.trainer import Recipe, Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
EPOCHS, STEPS = 3, 2
RECIPE: dict[str, Any] = {
    "train": ("keys", "visual"), "views": None, "batch": 6, "epochs": EPOCHS, "lr": 0.3, "precision": "float32",
}  # fmt: skip


def _train(job: dict[str, Any], steps: killing.Steps) -> None:
    """Train once, and write the number of steps and a digest of the result to a file."""
    import torch

    from retrieval_tip import CacheModel
    from retrieval_tip.backbones.loading import load_backbone
    from retrieval_tip.data.encoder import Encoder
    from retrieval_tip.data.sources import open_source
    from retrieval_tip.fit import finetune
    from retrieval_tip.fit.trainer import Recipe, Trainer

    def half(state: Any, path: Path) -> None:
        """Write in two parts, so that a kill between them leaves half a file."""
        save(state, path)
        data = Path(path).read_bytes()
        Path(path).write_bytes(data[: len(data) // 2])
        steps.step("half")
        Path(path).write_bytes(data)

    save = torch.save
    torch.save = half  # type: ignore[assignment]
    steps.before(torch, "save", after=True)
    steps.before(Trainer, "step", after=True)
    steps.events("os.rename")
    tuned = finetune.finetune(
        CacheModel.load(job["index"], device="cpu"),
        open_source(job["pictures"]),
        Encoder(load_backbone(job["model"], device="cpu")),
        Recipe(**RECIPE),
        checkpoint=job["checkpoint"],
        resume=True,
    )
    steps.at = None
    digest = hashlib.sha256(tuned.cache.keys.tobytes() + repr(tuned.curve.drop(["seconds"]).to_pylist()).encode())
    for tensor in tuned.encoders.values():
        digest.update(tensor.numpy().tobytes())
    Path(job["out"]).write_text(json.dumps([len(steps.names), digest.hexdigest()]))


if __name__ == "__main__":
    import torch._dynamo  # torch's optimisers import it when they first step, a second in every child

    import retrieval_tip.fit.finetune  # noqa: F401

    killing.serve(_train)
    raise SystemExit


class Trainings(killing.Server):
    """Runs fine-tunings in children of one process, and kills them."""

    def __init__(self, folder: Path, path: str, job: dict[str, str]) -> None:
        super().__init__(__file__, folder, path)
        self.job = job

    def train(self, place: Path, **when: Any) -> int:
        return self.run(self.job | {"checkpoint": str(place), "out": f"{place}.out"}, **when)


@pytest.fixture
def server(
    tmp_path: Path, warm_path: str, image_index: CacheModel, pictures: Path, model_folder: Path
) -> Iterator[Trainings]:
    image_index.save(tmp_path / "index")
    job = {"index": f"{tmp_path / 'index'}", "pictures": f"{pictures / 'train'}", "model": f"local-dir:{model_folder}"}
    server = Trainings(tmp_path, warm_path, job)
    yield server
    server.close()


@killing.needs_fork
def test_a_run_killed_at_any_step_and_resumed_gives_the_same_result(server: Trainings, tmp_path: Path) -> None:
    assert server.train(tmp_path / "whole") == 0
    steps, expected = json.loads((tmp_path / "whole.out").read_text())
    each = 2 * STEPS + 4  # two around each step of training and each write, one within the write, one rename
    assert steps == EPOCHS * each
    for step in sampled(steps):
        place = tmp_path / str(step)
        assert server.train(place, step=step) == -signal.SIGKILL
        assert place.exists() == (step >= each)
        assert server.train(place) == 0
        rest, result = json.loads(Path(f"{place}.out").read_text())
        assert result == expected
        assert rest == steps - step // each * each  # finished epochs are not trained again


class Stop(Exception):
    pass


def interrupted(monkeypatch: pytest.MonkeyPatch, steps: int, **arguments: Any) -> None:
    """Stop a training before step number ``steps``, and leave its checkpoint."""
    with monkeypatch.context() as patch:
        train, done = Trainer.step, iter(range(10**6))

        def stopping(self: Any, *rest: Any) -> Any:
            if next(done) == steps:
                raise Stop
            return train(self, *rest)

        patch.setattr(Trainer, "step", stopping)
        with pytest.raises(Stop):
            finetune.finetune(**arguments)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("with_val", [False, True])
@pytest.mark.parametrize("train", few([("keys", "values", "visual", "text"), ("visual",), ("text",)], 1))
def test_a_resumed_run_equals_an_uninterrupted_run(
    train: tuple[str, ...], with_val: bool, model_folder: Path, pictures: Path, image_index: CacheModel,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str,
) -> None:  # fmt: skip
    backbone = load_backbone(f"local-dir:{model_folder}", device=device)
    arguments: dict[str, Any] = {
        "cache": replace(image_index, device=device),
        "shots": open_source(pictures / "train"),
        "encoder": Encoder(backbone),
        "recipe": Recipe(**RECIPE | {"train": train}),
        "val": open_source(pictures / "val") if with_val else None,
    }
    whole = finetune.finetune(**arguments)
    arguments |= {"checkpoint": tmp_path / "x", "resume": True}
    interrupted(monkeypatch, STEPS + 1, **arguments)
    interrupted(monkeypatch, STEPS + 1, **arguments)
    again = finetune.finetune(**arguments)
    assert without_seconds(again.curve) == without_seconds(whole.curve)
    assert np.array_equal(again.cache.keys, whole.cache.keys)
    assert torch.equal(again.cache.text_weights, whole.cache.text_weights)
    assert "values" not in train or torch.equal(again.cache.values, whole.cache.values)
    assert all(torch.equal(tensor, whole.encoders[name]) for name, tensor in again.encoders.items())
    assert again.backbone.identity == whole.backbone.identity != backbone.identity
    assert (again.epoch, again.cache.settings) == (whole.epoch, whole.cache.settings)


# --- the checkpoint


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, image_index: CacheModel, model: Any, pictures: Path) -> Any:
    """Arguments of a finished run whose checkpoint still exists."""
    arguments: dict[str, Any] = {
        "cache": image_index,
        "shots": open_source(pictures / "train"),
        "encoder": Encoder(model),
        "recipe": Recipe(**RECIPE | {"epochs": 2, "train": ("text",)}),
        "checkpoint": tmp_path_factory.mktemp("finished") / "run.checkpoint",
    }
    finetune.finetune(**arguments)
    return arguments


@pytest.fixture
def resumed(finished: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    return finished | {"checkpoint": Path(shutil.copy(finished["checkpoint"], tmp_path / "run.checkpoint"))}


def test_an_existing_checkpoint_is_ignored_unless_resuming(
    resumed: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    resumed["checkpoint"].write_bytes(b"garbage")
    finetune.finetune(**resumed)
    assert f"{resumed['checkpoint']}: found an interrupted run" in caplog.text
    caplog.clear()
    assert len(finetune.finetune(**resumed, resume=True).curve) == 3  # resumes the new checkpoint
    assert not caplog.text
    resumed["checkpoint"].unlink()
    assert len(finetune.finetune(**resumed, resume=True).curve) == 3


def damages(raw: bytes, tensor: bytes) -> Iterator[bytes]:
    yield from (b"", b"garbage", bytes(len(raw)), raw[: len(raw) // 2], raw[:-1])
    for place in (raw.index(b"PK\5\6"), raw.index(tensor)):
        yield raw[:place] + bytes([raw[place] ^ 0x21]) + raw[place + 1 :]


def test_a_damaged_or_foreign_checkpoint_is_named(resumed: dict[str, Any]) -> None:
    place, raw = resumed["checkpoint"], resumed["checkpoint"].read_bytes()
    state = torch.load(place, weights_only=True)

    def refused() -> None:
        with pytest.raises(InputError) as error:
            finetune.finetune(**resumed, resume=True)
        assert str(error.value).startswith(f"{place}: not a checkpoint of finetune")
        assert "\n" not in str(error.value)

    for data in damages(raw, state["now"]["text_weights"].numpy().tobytes()):
        place.write_bytes(data)
        refused()
        assert place.read_bytes() == data
    for other in (
        [],
        {"a": 1},
        {"told": 3},
        state | {"optimizer": {}},
        state | {"now": {"x": torch.ones(1)}},
    ):
        torch.save(other, place)
        refused()
    place.unlink()
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), os.mkdir):
        make(place)
        refused()
        with pytest.raises(InputError, match="checkpoint"):
            finetune.finetune(**resumed)
        place.rmdir() if place.is_dir() else place.unlink()


def test_an_unwritable_checkpoint_is_named(resumed: dict[str, Any], tmp_path: Path) -> None:
    place = tmp_path / "missing" / "x"
    with pytest.raises(InputError, match=f"^{place}: "):
        finetune.finetune(**resumed | {"checkpoint": place})


def test_a_checkpoint_of_another_run_is_refused(resumed: dict[str, Any], pictures: Path, tmp_path: Path) -> None:
    cache, shots, recipe = resumed["cache"], resumed["shots"], resumed["recipe"]
    flipped = np.array(cache.keys)
    flipped[0] = -flipped[0]
    material = "index, shots or validation images"
    others: list[tuple[dict[str, Any], str]] = [
        ({"recipe": replace(recipe, seed=2)}, "seed"),
        ({"recipe": replace(recipe, lr=2e-3, eps=1e-5)}, "lr, eps"),
        ({"recipe": replace(recipe, train=("text", "keys"))}, "train"),
        ({"shots": shots.take([1, 0, *range(2, 12)])}, material),
        ({"val": open_source(pictures / "val")}, material),
        ({"cache": replace(cache, keys=flipped)}, material),
        ({"cache": cache.with_settings(cache.settings.override(beta=3.0))}, "beta"),
        (
            {"encoder": Encoder(load_backbone(f"local-dir:{tiny(tmp_path / 'other', seed=3)}", device="cpu"))},
            "backbone",
        ),
    ]
    for changes, words in others:
        with pytest.raises(UsageError) as error:
            finetune.finetune(**resumed | changes, resume=True)
        expected = f"{resumed['checkpoint']}: of a run with another {words}; start over without --resume"
        assert str(error.value) == expected
    finetune.finetune(**resumed, resume=True)


def test_only_encoders_have_checkpoints(tmp_path: Path) -> None:
    shots = shots_table(tmp_path / "shots.parquet")
    with pytest.raises(UsageError, match="checkpoint"):
        finetune.finetune(index(), shots, Encoder(), checkpoint=tmp_path / "x")
    with pytest.raises(UsageError, match="resume"):
        finetune.finetune_into(tmp_path / "out", index(), shots, Encoder(), resume=True)


def test_the_command_resumes_a_run_only_if_asked(
    run: Any, tmp_path: Path, pictures: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ("--model", f"local-dir:{model_folder}")
    assert run("index", "build", pictures / "train", *model, "--out", tmp_path / "index").exit_code == 0

    def tuned(out: str, epochs: int, *more: str) -> Any:
        how = ("--train", "visual", "--epochs", epochs, "--batch", 5, "--keep-last", "--json", *more)
        return run("finetune", tmp_path / "index", "--out", tmp_path / out, *how)

    unbroken, steps, checkpoint = tuned("whole", 3), finetune._Run._one_epoch, tmp_path / "broken.checkpoint"

    def interrupt_the_last_epoch(self: Any, bar: Any) -> None:
        if self.epoch == 2 and len(self.material.ids) == 12:  # not while a quarter of the shots is held out
            raise KeyboardInterrupt
        steps(self, bar)

    monkeypatch.setattr(finetune._Run, "_one_epoch", interrupt_the_last_epoch)
    interrupted = tuned("broken", 3)
    monkeypatch.undo()
    assert interrupted.exit_code == 130
    assert "--resume" in interrupted.stderr.splitlines()[-1]
    refused = tuned("broken", 5, "--resume")
    assert (refused.exit_code, checkpoint.exists()) == (2, True)
    assert "epochs" in refused.stderr
    resumed = tuned("broken", 3, "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    both = [json.loads(result.stdout) | {"seconds": 0} for result in (unbroken, resumed)]
    assert both[0] == both[1]  # including the held-out comparison
    assert both[0]["n"] == 3
    assert not checkpoint.exists()
