"""The state of an interrupted run in one file: tensors and facts, as safetensors, replaced by one rename."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from retrieval_tip.errors import InputError
from retrieval_tip.features import replacing
from retrieval_tip.sources import show


def write(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors and JSON facts. Raises InputError where that fails; the file that was there stays."""
    with replacing(path) as temporary:
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            save_file(kept, temporary, {"facts": json.dumps(facts)})
        except SafetensorError as error:  # it says so of a full disk too
            raise InputError(f"{show(path)}: cannot be written: {error}") from None


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The inverse of :func:`write`. Raises InputError naming the file where it is damaged or something else."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["facts"])
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise InputError(
            f"{show(path)}: not a checkpoint of finetune ({error}); start again without --resume"
        ) from None
