"""Functions that create, rename, duplicate and delete served indexes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from retrieval_tip.data.sources import spelled_alike
from retrieval_tip.errors import show
from retrieval_tip.index import manage
from retrieval_tip.server import metrics, schemas, shots
from retrieval_tip.server.problems import Problem
from retrieval_tip.server.served import Backbones, Served
from retrieval_tip.server.service import Service, backbone_of, judged, nothing, of_spelling
from retrieval_tip.server.uploads import Sent


async def create(service: Service, sent: Sent, like: str | None) -> schemas.MadeIndex:
    """Create an index from images, fit it and serve it.

    The new index has the backbone of the index ``like``, and is saved next to it. Without ``like``, its backbone and
    folder come from the ``maker``, or else from the first index with a backbone. Raises Problem 409 if the name is in
    use or the server is full, and the same errors as :func:`shots.build`.
    """
    name, maker = str(sent.index), service.maker
    into: Path | None
    if maker and like is None:
        backbone, into, backbones = maker.backbone, maker.into, maker.backbones
    else:
        model = service.index(like or next((name for name, one in service.served.items() if one.now.backbone), None))
        backbone, into, backbones = backbone_of(model.now), model.beside, model.backbones
    if into is None:
        raise Problem(422, "the index is in a bucket; to create indexes, restart the server with --into FOLDER")
    assert sent.images is not None
    with _room(service, name, into):
        good, skipped = await service.decoded(sent, sent.images, backbone, nothing)
        labelled = [(sent.labels[place], sent.images[place]) for place in good]
        one = await _opened(service, lambda: shots.build(into / name, backbone, labelled, service.uploads), backbones)
    warnings = of_spelling(name, spelled_alike(one.now.cache.class_names))
    return schemas.MadeIndex(name, one.now.manifest.version, judged(one), warnings, skipped)


async def rename(service: Service, one: Served, name: str) -> schemas.NamedIndex:
    """Rename an index folder. Raises Problem 409 if the name is in use, and the errors of :func:`manage.rename`."""
    _check_free(service, name, one.beside)
    made = await _opened(service, lambda: manage.rename(one.folder, name), one.backbones, one)
    return schemas.NamedIndex(name, made.now.manifest.version)


async def duplicate(service: Service, one: Served, name: str) -> schemas.NamedIndex:
    """Copy an index into a folder next to it, and serve the copy. Raises the same errors as :func:`create`."""
    with _room(service, name, one.beside):
        made = await _opened(service, lambda: manage.duplicate(one.folder, name), one.backbones)
    return schemas.NamedIndex(name, made.now.manifest.version)


async def delete(service: Service, one: Served) -> schemas.NamedIndex:
    """Delete an index folder, and stop serving it. Raises the errors of :func:`manage.delete`."""
    await service.change(manage.delete, one.folder)
    _replace(service, one)
    return schemas.NamedIndex(one.name, one.now.manifest.version)


async def _opened(
    service: Service, make: Callable[[], Path], backbones: Backbones, instead: Served | None = None
) -> Served:
    """Make an index folder, and serve it in place of another index or after all others."""
    made = await service.change(lambda: Served(make(), backbones))
    _replace(service, instead, made)
    return made


def _replace(service: Service, old: Served | None, *new: Served) -> None:
    served = [one for each in service.served.values() for one in (new if each is old else (each,))]
    served += () if old else new
    service.served.clear()
    service.served.update((one.name, one) for one in served)
    if old is not None:
        for gauge in (metrics.VERSION, metrics.KEYS):
            gauge.remove(old.name)


@contextmanager
def _room(service: Service, name: str, into: Path | None) -> Iterator[None]:
    """Reserve a place for a new index inside the context. Raises Problem 409 if the name is in use or none is left."""
    _check_free(service, name, into)
    if len(service.served) + service.creating >= service.limits.indexes:
        raise Problem(409, f"the server already has {service.limits.indexes} indexes, which is the limit; delete some")
    service.creating += 1
    try:
        yield
    finally:
        service.creating -= 1


def _check_free(service: Service, name: str, into: Path | None) -> None:
    if name in service.served or (into is not None and (into / name).exists()):
        where = f" in {show(into)}" if into else ""
        raise Problem(409, f"index {name!r} already exists{where}; choose another name")
