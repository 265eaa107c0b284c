"""Open Hugging Face datasets: ``hf-dataset:ORG/NAME[:SUBSET][@SPLIT]``, or a folder in place of ``ORG/NAME``.

The ``datasets`` library downloads and prepares a dataset when it is opened. A note in the cache folder then says which
Arrow files hold its images. Reading an image by name needs this note, so an index made by someone else can only show
images of datasets that the user has opened, and reading neither downloads anything nor imports the library.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from retrieval_tip.data.encoding_cache import EncodingCache
from retrieval_tip.data.source import Source, check_size, of_images
from retrieval_tip.data.sources import choose_part
from retrieval_tip.data.tables import NAMES, texts
from retrieval_tip.errors import InputError, UsageError
from retrieval_tip.files import make_folders, map_regular, output, real
from retrieval_tip.machine import install
from retrieval_tip.wording import few, show

if TYPE_CHECKING:
    from datasets import Dataset


class HFDatasets:
    """Open datasets of images, as :class:`retrieval_tip.data.source.Opener` describes.

    The path of an item is that of its file, or ``hf-dataset:NAME@SPLIT#ROW`` if the dataset contains its bytes.
    """

    @staticmethod
    def open(rest: str, *, split: str | None, labelled: bool) -> Source:
        """Open the split that the address names, or else ``split``. Labels are the names in its label column.

        Raises InputError if the split, the image column or the label column is missing or ambiguous. Raises UsageError
        if the library is not installed.
        """
        place, _, asked = (rest, "", "") if os.path.isdir(rest) else rest.partition("@")
        if os.path.isdir(place):
            place = real(place).as_posix()  # as in rows that name files
        data, name = _load(place, asked or split)
        shown = show(f"hf-dataset:{name}")
        data.data.validate(full=True)
        labels = _labels(data, shown, labelled=labelled)
        _write_note(data, name)
        images, files = _images(name)
        paths = []
        for row, file in enumerate(pc.if_else(images.is_null(), files, None).to_pylist()):
            is_file = file is not None and _is_inside(file, place)
            paths.append(file if is_file else f"hf-dataset:{name}#{row}")
        return of_images(paths, shown, labels)

    @staticmethod
    def read(path: str) -> bytes:
        """Return the image in a row of a dataset that the user has opened before, or raise InputError."""
        name, _, row = path.partition(":")[2].rpartition("#")
        data = _images(name)[0][int(row)].as_buffer()
        if data is None:
            raise InputError("the row has neither an image nor the path of a file in the dataset")
        check_size(data.size)
        return bytes(data)


def _load(place: str, split: str | None) -> tuple[Dataset, str]:
    """Load a split, whose rows stay on disk, and return it with its name."""
    if not sys.stderr.isatty():  # a program that has imported the library decides itself
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    try:
        import datasets
    except ImportError:
        raise UsageError(
            f"hf-dataset: support is not installed; run {install('hf-datasets')}"
        ) from None
    load = datasets.load_dataset
    if Path(place, "state.json").is_file() or Path(place, "dataset_dict.json").is_file():
        load = datasets.load_from_disk
    try:
        loaded = load(*re.split(r":(?![/\\])", place), keep_in_memory=False)  # unlike C:/
    except FileNotFoundError as error:  # its text says more, for example how to get access
        raise ValueError(error) from None
    if not isinstance(loaded, dict):
        return loaded, place
    chosen = choose_part(show(place), [*loaded], split)
    return loaded[chosen], f"{place}@{chosen}"


def _is_inside(file: str, place: str) -> bool:
    """Return whether a file is in the folder of a dataset or in the caches, since a row can contain any path."""
    from datasets.config import HF_DATASETS_CACHE
    from huggingface_hub.constants import HF_HUB_CACHE

    path = Path(os.path.normpath(file))
    folders = (place, HF_DATASETS_CACHE, HF_HUB_CACHE)
    return path.is_file() and any(map(path.is_relative_to, folders))


def _labels(data: Dataset, shown: str, *, labelled: bool) -> list[str] | None:
    """Return the label of each row, or ``None`` if there is no label column and the rows need not be ``labelled``."""
    from datasets import ClassLabel

    kinds = data.features
    classes = [name for name in kinds if isinstance(kinds[name], ClassLabel)]
    columns = [name for name in NAMES["label"] if name in kinds][:1] or classes
    if len(columns) != 1 and not labelled:
        return None
    column = _only(columns, "label", data)
    values = data.data.column(column)
    if column in classes:
        name_of = dict(enumerate(kinds[column].names))  # -1 means that a row has no label
        values = pa.array(map(name_of.get, values.to_pylist()), pa.string())
    return texts(pa.table({"label": values}), shown, "label", needed=labelled).to_pylist()  # type: ignore[no-any-return]


def _only(columns: list[str], what: str, data: Dataset) -> str:
    """Return the only column. The caller adds the name of the dataset to the error."""
    if len(columns) != 1:
        raise ValueError(
            f"expected one {what} column, found {len(columns)} of {few(data.column_names)}; save a copy with one"
        )
    return columns[0]


def _note(name: str) -> Path:
    """Return the path of the note on a dataset."""
    return (
        EncodingCache.default_folder() / "hf-datasets" / hashlib.sha256(name.encode()).hexdigest()
    )


def _write_note(data: Dataset, name: str) -> None:
    """Note the image column of a dataset and its Arrow files."""
    from datasets import Image

    columns = [column for column, kind in data.features.items() if isinstance(kind, Image)]
    content = [_only(columns, "image", data), *(file["filename"] for file in data.cache_files)]
    note = _note(name)
    make_folders(note.parent)
    with output(note) as file:
        file.write(json.dumps(content).encode())
    _images.cache_clear()


@lru_cache
def _images(name: str) -> list[pa.ChunkedArray]:
    """Return the bytes and the paths in the image column of a dataset that the user has opened before."""
    try:
        column, *files = json.loads(_note(name).read_bytes())
        tables = [pa.ipc.open_stream(map_regular(file)).read_all() for file in files]
    except OSError:
        raise InputError("its dataset is not on this machine; classify the dataset first") from None
    return pa.concat_tables(tables).select([column]).flatten().columns  # type: ignore[no-any-return]
