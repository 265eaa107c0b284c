"""The state of an interrupted run in one file: tensors and facts, as safetensors, replaced by one rename."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from retrieval_tip.errors import InputError, first_line, show
from retrieval_tip.files import open_regular, replacing


def write(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors and JSON facts. Raises InputError where that fails; the file that was there stays."""
    with replacing(path) as temporary:
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            told = json.dumps(facts)
            save_file(kept, temporary, {"facts": told, "checksum": _checksum(kept, told)})
        except SafetensorError as error:  # it says so of a full disk too
            raise InputError(f"{show(path)}: cannot be written: {error}") from None


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The inverse of :func:`write`. Raises InputError naming the file where it is damaged or something else.

    Whether tensors and facts fit a run is for that to say; what does not is :func:`unfit`.
    """
    try:
        open_regular(path).close()
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        told = metadata["facts"]
        if metadata["checksum"] != _checksum(tensors, told):
            raise ValueError("its checksum does not fit")
        facts: dict[str, Any] = json.loads(told)
        if not isinstance(facts, dict):
            raise ValueError("its facts are no object")
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError, TypeError, RecursionError) as error:
        raise unfit(path, error) from None
    return tensors, facts


def unfit(path: Path, error: Exception) -> InputError:
    """What is wrong with a checkpoint, and what to do."""
    return InputError(
        f"{show(path)}: not a checkpoint of finetune, or damaged ({first_line(error)}); start again without --resume"
    )


def _checksum(tensors: Mapping[str, Tensor], told: str) -> str:
    """Of every byte that matters: safetensors itself notices a wrong size only."""
    checksum = zlib.crc32(told.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        checksum = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), checksum)
        checksum = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, checksum)
    return f"{checksum:08x}"
