"""Fine-tuning that is killed and resumed ends where an unbroken run ends, bit for bit.

Run as a script, this file is the trainer.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import killing
import pytest
from conftest import SOAK, few, sampled

if __name__ != "__main__":
    import numpy as np
    import torch
    from safetensors.torch import load_file, save_file
    from test_backbone import tiny
    from test_cli import unit_rows, write_table
    from test_finetune import (  # noqa: F401 - fixtures
        _one_thread,
        image_index,
        index,
        model,
        model_folder,
        pictures,
        queries_table,
        shots_table,
        state_of,
        told,
    )
    from test_search_hp import C, D, clusters

    from retrieval_tip import CacheModel
    from retrieval_tip.backbones.loading import load_backbone
    from retrieval_tip.data.encoder import Encoder
    from retrieval_tip.data.sources import open_source
    from retrieval_tip.errors import InputError, UsageError
    from retrieval_tip.fit import checkpoint, finetune
    from retrieval_tip.fit.trainer import Recipe, Trainer

EPOCHS, BATCHES = 3, 2


# --- the trainer


def _train(job: dict[str, Any], steps: killing.Steps) -> None:
    """One run; its result goes to a file, with the number of steps."""
    from retrieval_tip import CacheModel
    from retrieval_tip.data.encoder import Encoder
    from retrieval_tip.data.sources import open_source
    from retrieval_tip.fit import checkpoint, finetune
    from retrieval_tip.fit.trainer import Recipe, Trainer

    def half(tensors: Any, path: Path, metadata: Any) -> None:
        """A write in two parts: a kill between them leaves half a file."""
        save(tensors, path, metadata)
        data = Path(path).read_bytes()
        Path(path).write_bytes(data[: len(data) // 2])
        steps.step("half")
        Path(path).write_bytes(data)

    save = checkpoint.save_file
    checkpoint.save_file = half  # type: ignore[assignment]
    steps.before(checkpoint, "save_file", after=True)
    steps.before(Trainer, "step", after=True)
    steps.events("os.rename", "os.remove")
    folder = Path(job["folder"])
    cache = CacheModel.load(folder / "index", device="cpu")
    tuned = finetune.finetune(
        cache,
        open_source(folder / "shots.parquet"),
        Encoder(),
        Recipe(**job["recipe"] | {"train": tuple(job["recipe"]["train"])}),
        val=open_source(folder / "val.parquet"),
        checkpoint=job["checkpoint"],
        resume=True,
        checkpoint_seconds=0,
    )
    steps.at = None
    values = None if tuned.cache.values is None else tuned.cache.values.numpy().tobytes().hex()
    rows = repr(tuned.curve.drop(["seconds"]).to_pylist())
    result = [
        tuned.cache.keys.tobytes().hex(), values, tuned.epoch, rows, tuned.cache.settings.alpha,
        tuned.cache.settings.beta,
    ]  # fmt: skip
    Path(job["out"]).write_text(json.dumps([len(steps.names), result]))


if __name__ == "__main__":
    import torch._dynamo  # torch's optimisers import it when they first step, a second in every child

    import retrieval_tip.fit.finetune  # noqa: F401

    killing.serve(_train)
    raise SystemExit


# --- killed


class Trainings(killing.Server):
    """Runs fine-tunings in children of one process, and kills them."""

    def __init__(self, folder: Path, path: str) -> None:
        super().__init__(__file__, folder, path)
        self.folder = folder

    def train(self, recipe: dict[str, Any], place: Path, **when: Any) -> int:
        job = {"folder": str(self.folder), "recipe": recipe, "checkpoint": str(place), "out": f"{place}.out"}
        return self.run(job, **when)

    def result(self, place: Path) -> tuple[int, Any]:
        steps, result = json.loads(Path(f"{place}.out").read_text())
        return steps, result


RECIPES: dict[str, dict[str, Any]] = {
    "keys": {"train": ["keys"]},
    "keys and values": {"train": ["keys", "values"]},
    "nearest keys": {"train": ["keys"], "train_k": 6},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kill")
    index().save(folder / "index")
    shots_table(folder / "shots.parquet")
    queries_table(folder / "val.parquet")
    return folder


@pytest.fixture(scope="module")
def server(folder: Path, warm_path: str) -> Iterator[Trainings]:
    server = Trainings(folder, warm_path)
    yield server
    server.close()


@pytest.fixture(params=few(RECIPES, 2))
def recipe(request: pytest.FixtureRequest) -> dict[str, Any]:
    return RECIPES[request.param] | {"epochs": EPOCHS, "batch": 19, "precision": "float32", "settings": "own"}


@killing.needs_fork
def test_killed_at_every_step_and_resumed_it_ends_where_an_unbroken_run_ends(
    server: Trainings, recipe: dict[str, Any], tmp_path: Path
) -> None:
    assert server.train(recipe, tmp_path / "whole") == 0
    steps, expected = server.result(tmp_path / "whole")
    each = 2 * BATCHES + 5
    assert (
        steps == EPOCHS * each
    )  # two around each step of training, for a checkpoint three around its file and two names
    behind = steps - (EPOCHS - 1) * each - 1  # the first checkpoint is there
    for step in sampled(steps):
        place = tmp_path / str(step)
        assert server.train(recipe, place, step=step) == -signal.SIGKILL
        assert not Path(f"{place}.out").exists()
        found = place.exists()
        assert found == (step >= behind)
        assert server.train(recipe, place) == 0
        rest, result = server.result(place)
        assert result == expected
        assert (rest < steps) if found else (rest >= steps)  # one more where it removes what the killed one left


@killing.needs_fork
@pytest.mark.parametrize("recipe", few(RECIPES, 1), indirect=True)
def test_killed_again_and_again_at_any_moment_it_ends_where_an_unbroken_run_ends(
    server: Trainings, recipe: dict[str, Any], tmp_path: Path
) -> None:
    seconds = []
    for _ in range(3):
        assert server.train(recipe, tmp_path / "whole") == 0
        seconds.append(server.seconds)
        (tmp_path / "whole").unlink()
    expected = server.result(tmp_path / "whole")[1]
    moments = random.Random(0)
    killed = 0
    for number in range(20):
        place = tmp_path / str(number)
        while status := server.train(recipe, place, after=moments.uniform(0, 1.2) * min(seconds)):
            assert status == -signal.SIGKILL
            killed += 1
        assert server.result(place)[1] == expected
        if killed >= (6 if SOAK else 3):
            return
    pytest.fail("the moments do not lie within the run")


# --- interrupted


class Stop(Exception):
    pass


def interrupted(monkeypatch: pytest.MonkeyPatch, epochs: int, steps: int, **arguments: Any) -> Any:
    """A run that is stopped in the middle of the epoch behind ``epochs``; its checkpoint stays."""
    with monkeypatch.context() as patch:
        train, done = Trainer.step, [0]

        def stopping(self: Any, *rest: Any) -> Any:
            done[0] += 1
            if done[0] > epochs * steps + 1:
                raise Stop
            return train(self, *rest)

        patch.setattr(Trainer, "step", stopping)
        with pytest.raises(Stop):
            finetune.finetune(**arguments)


@pytest.mark.parametrize(
    ("train", "with_val"),
    few(
        [
            (train, val)
            for val in (False, True)
            for train in (("visual",), ("text",), ("keys", "values", "visual", "text"))
        ],
        2,
    ),
)
def test_interrupted_encoders_go_on_as_if_nothing_had_happened(
    train: tuple[str, ...], with_val: bool, model: Any, pictures: Path, image_index: CacheModel,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    arguments: dict[str, Any] = {
        "cache": image_index,
        "shots": open_source(pictures / "train"),
        "encoder": Encoder(model),
        "recipe": Recipe(train=train, views=None, batch=5, epochs=3, lr=0.3, precision="float32"),
        "val": open_source(pictures / "val") if with_val else None,
        "checkpoint_seconds": 0,
    }
    whole = finetune.finetune(**arguments)
    arguments |= {"checkpoint": tmp_path / "x", "resume": True}
    interrupted(monkeypatch, 1, 3, **arguments)
    interrupted(monkeypatch, 1, 3, **arguments)
    again = finetune.finetune(**arguments)
    assert told(again.curve) == told(whole.curve)
    assert np.array_equal(again.cache.keys, whole.cache.keys)
    assert torch.equal(again.cache.text_weights, whole.cache.text_weights)
    assert "values" not in train or torch.equal(again.cache.values, whole.cache.values)
    assert again.backbone.identity == whole.backbone.identity != model.identity
    assert (again.epoch, again.cache.settings.alpha, again.cache.settings.beta) == (
        whole.epoch,
        whole.cache.settings.alpha,
        whole.cache.settings.beta,
    )
    other = tiny(tmp_path / "other", seed=3)
    arguments["encoder"] = Encoder(load_backbone(f"local-dir:{other}", device="cpu"))
    with pytest.raises(UsageError, match=r"x: of a run with another .*; start anew without --resume"):
        finetune.finetune(**arguments)


def test_settings_that_were_tried_are_not_tried_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: dict[str, Any] = {
        "cache": index(beta=300.0),
        "shots": open_source(folder / "shots.parquet"),
        "encoder": Encoder(),
        "recipe": Recipe(batch=13, epochs=4),
        "val": open_source(folder / "val.parquet"),
        "checkpoint_seconds": 0,
        "checkpoint": tmp_path / "x",
    }
    whole = finetune.finetune(**arguments)
    (tmp_path / "x").unlink()
    interrupted(monkeypatch, 4 + 1, 3, **arguments)
    monkeypatch.setattr(finetune, "_settings", lambda *_: pytest.fail("tried again"))
    again = finetune.finetune(**arguments, resume=True)
    assert np.array_equal(again.cache.keys, whole.cache.keys)
    record, expected = (tuned.cache.provenance["finetune"] for tuned in (again, whole))
    assert record | {"seconds": 0} == expected | {"seconds": 0}
    assert record["beta"] < 300


def test_a_collapse_is_remembered(folder: Path, tmp_path: Path) -> None:
    arguments = {"cache": index(), "shots": open_source(folder / "shots.parquet"), "encoder": Encoder()}
    options = {"recipe": Recipe(batch=13, epochs=4, lr=1e4), "checkpoint": tmp_path / "x", "checkpoint_seconds": 0}
    first = finetune.finetune(**arguments, **options)
    again = finetune.finetune(**arguments, **options, resume=True)
    assert first.collapsed == again.collapsed is not None
    assert np.array_equal(first.cache.keys, again.cache.keys)
    assert told(first.curve) == told(again.curve)


# --- what is in the file


def arguments_of(folder: Path, place: Path) -> dict[str, Any]:
    return {
        "cache": index(),
        "shots": open_source(folder / "shots.parquet"),
        "encoder": Encoder(),
        "recipe": Recipe(batch=13, epochs=2, settings="own"),
        "val": open_source(folder / "val.parquet"),
        "checkpoint": place,
        "checkpoint_seconds": 0,
    }


@pytest.fixture(scope="module")
def left(folder: Path) -> Path:
    """The checkpoint that a run has left."""
    finetune.finetune(**arguments_of(folder, folder / "left.checkpoint"))
    return folder / "left.checkpoint"


@pytest.fixture
def run(folder: Path, left: Path, tmp_path: Path) -> dict[str, Any]:
    """The arguments of a run that has left a checkpoint."""
    return arguments_of(folder, Path(shutil.copy(left, tmp_path / "run.checkpoint")))


def test_an_existing_checkpoint_is_left_aside_unless_resuming(
    run: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    run["checkpoint"].write_bytes(b"garbage")
    tuned = finetune.finetune(**run)
    assert f"{run['checkpoint']}: an interrupted run is there; starting anew (--resume" in caplog.text
    assert len(tuned.curve) == 3
    assert checkpoint.read(run["checkpoint"])[1]["epoch"] == 2  # a new one took its place
    caplog.clear()
    finetune.finetune(**run, resume=True)
    assert "starting anew" not in caplog.text


def test_resuming_without_a_checkpoint_begins(run: dict[str, Any]) -> None:
    run["checkpoint"].unlink()
    assert len(finetune.finetune(**run, resume=True).curve) == 3
    assert run["checkpoint"].exists()


def test_checkpoints_are_written_as_often_as_was_asked(run: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    monkeypatch.setattr(checkpoint, "write", lambda path, tensors, facts: written.append(facts["epoch"]))
    finetune.finetune(**run)
    assert written == [1, 2]
    finetune.finetune(**run | {"checkpoint_seconds": 1e9})
    assert written == [1, 2]


def damages(raw: bytes) -> Iterator[bytes]:
    header = 8 + int.from_bytes(raw[:8], "little")
    yield from (raw[:size] for size in (0, 1, 8, header // 2, header, header + 1, len(raw) // 2, len(raw) - 1))
    yield raw + b"x"
    for place in (0, 3, 7, 9, header // 2, header - 1, header, (header + len(raw)) // 2, len(raw) - 1):
        yield raw[:place] + bytes([raw[place] ^ 0x21]) + raw[place + 1 :]
    yield bytes(len(raw))
    yield raw[:header] + bytes(len(raw) - header)
    yield b"garbage"


def test_a_damaged_checkpoint_is_named(run: dict[str, Any]) -> None:
    raw = run["checkpoint"].read_bytes()
    for data in damages(raw):
        run["checkpoint"].write_bytes(data)
        with pytest.raises(InputError) as error:
            finetune.finetune(**run, resume=True)
        assert str(error.value).startswith(f"{run['checkpoint']}: not a checkpoint of finetune")
        assert str(error.value).endswith("start again without --resume")
        assert "\n" not in str(error.value)
        assert run["checkpoint"].read_bytes() == data
    run["checkpoint"].write_bytes(raw)
    finetune.finetune(**run, resume=True)


NESTED = "[" * 100_000 + "]" * 100_000
ODD_FACTS: dict[str, list[object]] = {
    "epoch": ["1", -1, 1.0, True, None, 3, 10**400, {}],
    "kept_epoch": [-1, 3, "1", None, 0.5],
    "seconds": [math.nan, math.inf, -1.0, "1", None, 10**400],
    "curve": [None, {}, [], [1], [{}], "x"],
    "collapsed": [3, [], {}],
    "settings": [
        None,
        [],
        [1.0],
        [1.0, math.nan],
        [1.0, math.inf],
        [-1.0, 1.0],
        ["1", 1.0],
        [10**400, 1],
        [1, 2, 3],
        "12",
    ],
    "precision": [None, "float64", ["float32"], 3],
    "told": [None, [], "x", 3],
}
ODD_ROWS: dict[str, list[object]] = {
    "epoch": [2, 0.5, "1", None],
    "loss": ["1", None, [1], 10**400, -1.0],
    "accuracy": [2.0, -1.0, {}],
    "val_accuracy": [1.5, "x", -math.inf],
    "seconds": [10**400, None],
}


def strange_facts(facts: dict[str, Any]) -> Iterator[Any]:
    """Facts that no run writes."""
    yield from ([], None, 3, "x", {}, [facts])
    for name, values in ODD_FACTS.items():
        yield {key: value for key, value in facts.items() if key != name}
        yield from (facts | {name: value} for value in values)
    first, second, third = facts["curve"]
    for name, values in ODD_ROWS.items():
        yield from (facts | {"curve": [first, second | {name: value}, third]} for value in values)
        yield facts | {"curve": [first, {key: value for key, value in second.items() if key != name}, third]}
    yield facts | {"curve": [first, second | {"more": 1}, third]}
    yield facts | {"curve": [first, third, second]}


def strange_tensors(tensors: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """Tensors that no such run writes."""
    for name, tensor in tensors.items():
        rest = {other: held for other, held in tensors.items() if other != name}
        yield rest
        yield rest | {name: torch.zeros(tensor.shape or (2, 3))[:1]}
        yield rest | {name: torch.zeros(*tensor.shape, 2)}
        yield rest | {f"{name}x": tensor}
        yield rest | {name.replace("/", "."): tensor}
    yield tensors | {"now/keys": tensors["now/keys"].double()}
    yield tensors | {"more/keys": tensors["now/keys"]}
    yield tensors | {"moments/keys.x.exp_avg": tensors["moments/keys.0.exp_avg"]}
    yield tensors | {"moments/keys.99.exp_avg": tensors["moments/keys.0.exp_avg"]}
    yield tensors | {"kept/keys": tensors["kept/keys"] * math.nan}
    yield {}


@pytest.mark.parametrize("kind", ["facts", "tensors", "nested"])
def test_a_whole_file_that_no_run_has_written_is_named(run: dict[str, Any], kind: str) -> None:
    place = run["checkpoint"]
    tensors, facts = checkpoint.read(place)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}  # the file will be another
    odd: list[tuple[Any, Any]] = [(tensors, each) for each in strange_facts(facts)]
    if kind == "tensors":
        odd = [(each, facts) for each in strange_tensors(tensors)]
    for held, told in [(tensors, NESTED)] if kind == "nested" else odd:
        with pytest.MonkeyPatch.context() as patch:
            if kind == "nested":  # Python writes none either
                patch.setattr(checkpoint.json, "dumps", lambda text: text)
            checkpoint.write(place, {name: tensor.clone() for name, tensor in held.items()}, told)
        before = place.read_bytes()
        with pytest.raises(InputError, match=r"run\.checkpoint: not a checkpoint of finetune") as error:
            print(told, {name: tensor.shape for name, tensor in held.items()}, finetune.finetune(**run, resume=True))
        assert "\n" not in str(error.value)
        assert place.read_bytes() == before
    checkpoint.write(place, tensors, facts)
    assert finetune.finetune(**run, resume=True).epoch == facts["kept_epoch"]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda place: place.symlink_to("/dev/zero")])
@pytest.mark.parametrize("resume", [True, False])
def test_a_checkpoint_that_is_no_file_is_named_and_not_waited_for(
    run: dict[str, Any], make: Callable[[Path], None], resume: bool
) -> None:
    run["checkpoint"].unlink()
    make(run["checkpoint"])
    with pytest.raises(InputError) as error:
        finetune.finetune(**run, resume=resume)
    assert str(error.value).startswith(f"{run['checkpoint']}: ")
    assert not run["checkpoint"].is_file()
    assert os.path.lexists(run["checkpoint"])


def test_something_else_is_no_checkpoint(run: dict[str, Any], folder: Path) -> None:
    place = run["checkpoint"]
    tensors = load_file(place)
    table = (folder / "shots.parquet").read_bytes()
    strange: list[Any] = [None, {}, {"facts": "{}"}, {"facts": "[]"}, {"facts": "nonsense"}, {"facts": "3"}]
    for metadata in strange:
        save_file(tensors, place, metadata)
        with pytest.raises(InputError, match=r"run\.checkpoint: not a checkpoint of finetune"):
            finetune.finetune(**run, resume=True)
    place.write_bytes(table)
    with pytest.raises(InputError, match=r"run\.checkpoint: not a checkpoint of finetune"):
        finetune.finetune(**run, resume=True)
    place.unlink()
    place.mkdir()
    with pytest.raises(InputError, match=r"run\.checkpoint: not a checkpoint of finetune"):
        finetune.finetune(**run, resume=True)


def test_a_checkpoint_that_cannot_be_written_is_named(run: dict[str, Any], tmp_path: Path) -> None:
    for place in (tmp_path / "missing" / "x", tmp_path):
        with pytest.raises(InputError, match=rf"^{place}: cannot be written") as error:
            finetune.finetune(**run | {"checkpoint": place})
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 2}, "seed"),
        ({"epochs": 3}, "epochs"),
        ({"batch": 12}, "batch"),
        ({"lr": 2e-3}, "lr"),
        ({"eps": 1e-5}, "eps"),
        ({"weight_decay": 0.0}, "weight_decay"),
        ({"train": ("values",)}, "train"),
        ({"train_k": 5}, "train_k"),
        ({"settings": "tried"}, "settings"),
        ({"precision": "bfloat16"}, "precision"),
        ({"seed": 2, "lr": 2e-3}, "lr, seed"),
    ],
)
def test_a_checkpoint_of_another_recipe_is_refused(run: dict[str, Any], changes: dict[str, Any], words: str) -> None:
    run["recipe"] = replace(run["recipe"], **changes)
    raw = run["checkpoint"].read_bytes()
    with pytest.raises(UsageError) as error:
        finetune.finetune(**run, resume=True)
    assert str(error.value) == f"{run['checkpoint']}: of a run with another {words}; start anew without --resume"
    assert run["checkpoint"].read_bytes() == raw


def test_a_checkpoint_of_other_material_is_refused(run: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    cache = run["cache"]
    flipped = np.array(cache.keys)
    flipped[0] = -flipped[0]
    rows, ids = clusters(60, C, D, 2)
    relabelled = open_source(write_table(tmp_path / "v.parquet", rows, [f"class {(i + 1) % C}" for i in ids]))
    others: list[dict[str, Any]] = [
        {"shots": run["shots"].take(np.arange(len(run["shots"]))[::-1])},
        {"shots": run["shots"].take(np.arange(len(run["shots"]) - 1))},
        {"val": None},
        {"val": relabelled},
        {"val": run["val"].take(np.arange(59))},
        {"cache": replace(cache, keys=flipped)},
        {"cache": replace(cache, text_weights=torch.from_numpy(unit_rows(C, D, 6)))},
        {"cache": replace(cache, values=torch.ones(cache.n, C))},
        {"cache": replace(cache, settings=cache.settings.override(alpha=2.0))},
        {"cache": replace(cache, settings=cache.settings.override(beta=2.0))},
        {"cache": replace(cache, settings=cache.settings.override(logit_scale=2.0))},
    ]
    for other in others:
        with pytest.raises(UsageError, match=r"run\.checkpoint: of a run with another .*; start anew") as error:
            finetune.finetune(**run | other, resume=True)
        assert "\n" not in str(error.value)
    finetune.finetune(**run, resume=True)


def test_a_checkpoint_of_other_images_is_refused(
    model: Any, pictures: Path, image_index: CacheModel, tmp_path: Path
) -> None:
    """Fresh views are made as they are met: nothing but their names tells the images apart."""
    shots = open_source(pictures / "train")
    arguments: dict[str, Any] = {
        "cache": image_index,
        "encoder": Encoder(model),
        "recipe": Recipe(views=None, batch=5, epochs=1, settings="own"),
        "checkpoint": tmp_path / "x",
        "checkpoint_seconds": 0,
    }
    finetune.finetune(shots=shots, **arguments)
    finetune.finetune(shots=shots, **arguments, resume=True)
    with pytest.raises(UsageError, match="of a run with another index, shots or validation images"):
        finetune.finetune(shots=shots.take([1, 0, *range(2, 12)]), **arguments, resume=True)
