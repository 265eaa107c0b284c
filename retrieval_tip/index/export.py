"""Write the keys or the text weights of an index to a feature table, or share an index on the Hugging Face hub."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from retrieval_tip.backbones.base import Part
from retrieval_tip.data.tables import FEATURE, TABLE_ROWS, schema_of, table_of, write_table
from retrieval_tip.errors import InputError, UsageError, show
from retrieval_tip.files import real
from retrieval_tip.index import changes
from retrieval_tip.model import Index

log = logging.getLogger(__name__)

CARD = """---
library_name: retrieval-tip
pipeline_tag: image-classification
tags: [few-shot, retrieval, tip-adapter]
---
# {name}

An index of {n} photos in {c} classes ({few}) for few-shot image classification as retrieval, made with
[retrieval-tip](https://pypi.org/project/retrieval-tip/) and the backbone `{backbone}`. It holds features, labels and
the paths of the photos, but not the photos.

```python
from retrieval_tip import Classifier

clf = Classifier.from_hub("{name}")
clf.predict("photo.jpg")
```
{figures}"""


def export_table(index: Index, out: Path) -> int:
    """Write the keys of an index to a feature table, in index order, and return the number of rows.

    The table has the columns ``id``, ``label``, ``feature`` (one for each encoder), ``key_id``, ``shot``, ``views``,
    ``digest`` and ``added_at``, and the extra columns of the label store. ``id`` is the source of the key, and
    ``feature`` has the dtype of the keys. A table cannot store trained values, so a warning is logged if the index has
    them.

    Raises InputError if ``out`` cannot be written. In this case, no file is left behind.
    """
    _refuse_inside(index, out)
    if index.values is not None and index.fitted is None:  # solved values can be refitted
        log.warning(
            "%s: a table cannot hold trained values, so an index built from it will give other answers", show(out)
        )
    table, keys = index.labels, index.rows.in_memory().keys
    parts = index.parts or (Part(index.d, FEATURE, index.backbone),)
    own = {"class_id", "label", "source", "id", FEATURE, *(part.column for part in parts)}
    further = [table.schema.field(name).remove_metadata() for name in table.column_names if name not in own]
    schema = schema_of(parts, index.dtype, further)

    def blocks() -> Iterator[pa.Table]:
        for start in range(0, index.n, TABLE_ROWS):
            rows = table.slice(start, TABLE_ROWS)
            blank = pc.equal(pc.utf8_trim_whitespace(rows["source"]), "").fill_null(True)
            number = pc.binary_join_element_wise("key", rows["key_id"].cast(pa.string()), " ")
            yield table_of(
                schema,
                pc.if_else(blank, number, rows["source"]),
                rows["label"],
                keys[start : start + TABLE_ROWS],
                {field.name: rows[field.name] for field in further},
            )

    return write_table(out, schema, blocks())


def export_text(index: Index, out: Path) -> int:
    """Write the text weights of an index to a feature table with one row per class, and return the number of classes.

    You can pass the table to ``--text`` when you build another index. Raises UsageError if the index has no text
    weights. Raises InputError if a class has no text weight or if ``out`` cannot be written.
    """
    _refuse_inside(index, out)
    if not index.has_text:
        raise UsageError("text: this index has no text weights; export its keys instead")
    weights = index.text_weights.cpu().numpy()
    bare = np.flatnonzero(~weights.any(axis=1))
    if bare.size:
        raise InputError(f"text: class {index.class_names[bare[0]]!r} has no text weight; build the index with one")
    names = pa.array(index.class_names, pa.string())
    schema = schema_of([Part(index.d, FEATURE, index.backbone)], weights.dtype)
    starts = range(0, len(names), TABLE_ROWS)
    parts = ((names.slice(at, TABLE_ROWS), weights[at : at + TABLE_ROWS]) for at in starts)
    return write_table(out, schema, (table_of(schema, name, name, part) for name, part in parts))


def _refuse_inside(index: Index, out: Path) -> None:
    if index.folder is not None and real(out).is_relative_to(real(index.folder)):
        raise UsageError(f"{show(out)}: is inside the index; give a path outside it")


def download(repository: str, folder: str | os.PathLike[str] | None = None) -> Path:
    """Download the index ``ORG/NAME`` from the hub into a folder, and return the folder.

    ``folder`` defaults to ``indexes/NAME``. Raises InputError if the download fails.
    """
    from huggingface_hub import snapshot_download

    place = Path("indexes", repository.rpartition("/")[2]) if folder is None else Path(folder)
    try:
        snapshot_download(repository, local_dir=place)
    except Exception as error:  # the hub client, httpx and the disk raise many types of errors
        raise InputError(f"{repository}: download failed: {str(error).splitlines()[0]}") from error
    return place


def upload(place: str, repository: str, card: str, private: bool = False, token: str | None = None) -> str:
    """Upload the current version of an index and its ``card`` to ``ORG/NAME`` on the hub, and return the URL.

    Raises InputError if the upload fails, and the errors of :func:`changes.clone`.
    """
    from huggingface_hub import HfApi

    hub = HfApi(token=token)
    with tempfile.TemporaryDirectory(prefix="retrieval-tip-") as temporary:
        folder = Path(temporary) / "index"
        changes.clone(place, folder)
        try:
            hub.create_repo(repository, private=private, exist_ok=True)
            hub.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=repository)
            done = hub.upload_folder(repo_id=repository, folder_path=folder, ignore_patterns=["lock", ".*"])
        except Exception as error:  # the hub client and httpx raise many types of errors
            raise InputError(f"{repository}: upload refused: {str(error).splitlines()[0]}") from error
    return str(done)


def card(index: Index, name: str, figures: Mapping[str, object] | None = None) -> str:
    """Return the model card of an index in Markdown. If figures are given, the card includes an evaluation."""
    evaluation = ""
    if figures is not None:
        rows = "".join(f"| {figure} | {value:.4g} |\n" for figure, value in figures.items() if isinstance(value, float))
        which = "photos (shots without themselves)" if figures.get("held_out") else "other photos"
        evaluation = f"\n## Evaluated on {figures['n']} {which}\n\n| figure | |\n|---|---|\n{rows}"
    names = index.class_names
    few = ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")
    return CARD.format(name=name, n=index.n, c=len(names), few=few, backbone=index.backbone, figures=evaluation)
