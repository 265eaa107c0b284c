"""Download an index from the Hugging Face hub, or upload an index with a model card."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from retrieval_tip.errors import InputError
from retrieval_tip.index import changes
from retrieval_tip.model import Index

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
