"""HTTP routes that change nothing. Those of ``reads`` require the token of a private server."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal
from urllib.parse import quote

import orjson
import pyarrow as pa
from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from retrieval_tip import __version__, settings
from retrieval_tip.data.sources import read_item
from retrieval_tip.errors import InputError, StoreError
from retrieval_tip.evaluation.audit import AUDITED
from retrieval_tip.evaluation.audit import audit as audited
from retrieval_tip.evaluation.projection import Method, methods, projected
from retrieval_tip.evaluation.projection import exemplars as typical_keys
from retrieval_tip.fit.closed_form import estimate
from retrieval_tip.labelling.groups import group, group_similarity
from retrieval_tip.labelling.review import Review
from retrieval_tip.predictions import Predictions
from retrieval_tip.server import schemas
from retrieval_tip.server.access import READS, Named, Now, TheLabelling, TheService, cookie
from retrieval_tip.server.guard import FLOATS
from retrieval_tip.server.problems import Problem
from retrieval_tip.server.schemas import Row
from retrieval_tip.server.served import OpenVersion, Served
from retrieval_tip.server.service import Service, read_image
from retrieval_tip.server.uploads import read
from retrieval_tip.settings import Ask
from retrieval_tip.store.labels import edits_between, in_words, rows_with
from retrieval_tip.wording import command_line

SUSPICIOUS = 1000
"""Maximum number of suspicious shots to keep."""
COMPARED, LISTED = 50_000, 24
"""Maximum number of keys of two versions that are compared, and of photos of each kind to list then."""
PICTURE: dict[int | str, dict[str, object]] = {200: {"content": {"image/jpeg": {}}}}
PICTURE_OR_BYTES: dict[int | str, dict[str, object]] = {
    200: {"content": {"image/jpeg": {}, FLOATS: {}}}
}

Norms = Annotated[settings.Norms, Query(description=schemas.NORMS)]
Size = Annotated[int, Query(ge=16, le=1024, description="Length of the longer side, in pixels.")]

about = APIRouter()
reads = APIRouter(prefix="/v1", dependencies=READS)


# Routes are matched in order, so the most frequent one comes first.
@reads.post("/classify", response_model=schemas.Classified, openapi_extra=schemas.CLASSIFY)
async def classify(
    request: Request, service: TheService, question: Annotated[schemas.ClassifyOptions, Query()]
) -> Response:
    """Classify images or features.

    A video gets one answer from its frames. The response lists unreadable inputs as `skipped`. If all inputs are
    unreadable, the response is an error.
    """
    version = service.index(question.index).now
    sent = await read(request, service.limits, question.norms, version.index.d)
    ask = Ask(**question.model_dump(exclude={"index", "features", "norms"}))
    looks = not (question.features or question.without)
    return json_of(
        await service.classify(version, ask, sent, features=question.features, looks=looks)
    )


@reads.post("/indexes/{name}/groups", openapi_extra=schemas.GROUP)
async def groups(
    request: Request, service: TheService, version: Now, norms: Norms = "check"
) -> list[list[int]]:
    """Group similar features, for example of images without a match, so that each group can be named at once.

    Each group lists the positions of its features in the request. The largest group comes first.
    """
    index = version.index
    limits = service.limits
    features = (await read(request, replace(limits, rows=limits.grouped), norms, index.d)).features
    if features is None:
        raise InputError(
            "images: are not accepted here; send features, as /v1/classify?features=true returns them"
        )
    found = await service.find(lambda: group(features, group_similarity(index), index.metric))
    return [rows.tolist() for rows in found]


@about.get("/healthz")
async def health(service: TheService) -> dict[str, str | int]:
    """Check that the server is running, and return its version and its number of indexes."""
    return {"status": "ok", "version": __version__, "indexes": len(service.served)}


@about.get(
    "/metrics",
    dependencies=READS,
    response_class=Response,
    responses={200: {"content": {"text/plain": {}}}},
)
async def prometheus() -> Response:
    """Return metrics in the Prometheus text format."""
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


@reads.get("/indexes")
async def indexes(request: Request, response: Response, service: TheService) -> schemas.Indexes:
    """List the served indexes. A private server also sets a cookie that the page needs for images."""
    changes = request.app.state.token is not None
    if token := request.app.state.private:
        secure = request.url.scheme == "https"
        response.set_cookie(
            *cookie(token), path="/v1", secure=secure, httponly=True, samesite="strict"
        )
    makes = changes and (
        service.maker is not None or any(one.now.backbone for one in service.served.values())
    )
    labels = request.app.state.labelling is not None
    return schemas.Indexes(
        indexes=list(service.served), changes=changes, makes=makes, labels=labels
    )


@reads.get("/indexes/{name}", response_model=Row)
async def index(request: Request, version: Now) -> Response:
    """Describe an index as `index info` does. ``counts`` are the numbers of keys of the classes."""
    index = version.index
    fitted = version.index.fitted
    own = "one-hot" if index.values is None else "trained"
    more = {
        "name": version.name,
        "counts": list(index.counts),
        "changes": request.app.state.token is not None,
        "backbone": str(index.backbone) if index.backbone else None,
        "images": version.backbone is not None,
        "text": index.has_text,
        "values": fitted.values if fitted else own,
        "levels": list(index.groups.levels) if index.groups else [],
    }
    return json_of(version.manifest.described() | more)


@reads.get("/indexes/{name}/keys", response_model=schemas.KeyPage)
async def keys(
    service: TheService,
    version: Now,
    label: Annotated[
        list[str], Query(default_factory=list, description="Class to list. Can be repeated.")
    ],
    key_id: Annotated[
        list[schemas.KeyId],
        Query(default_factory=list, description="Key to list. Can be repeated."),
    ],
    source: Annotated[
        str | None, Query(description="Text in the sources to list, in any case.")
    ] = None,
    offset: Annotated[int, Query(ge=0, le=10**9)] = 0,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 50,
) -> Response:
    """List one page of the keys, with their labels and sources."""
    found = await service.find(version.index.find, label, source, key_id)
    page = await service.find(lambda: list(_pictured(service, version, found.slice(offset, limit))))
    return json_of({"total": len(found), "keys": page})


def _pictured(
    service: Service, one: OpenVersion | Served, keys: pa.Table, past: str = ""
) -> Iterator[dict[str, Any]]:
    address = f"/v1/indexes/{quote(one.name, safe='')}/keys"
    for row in keys.to_pylist():
        has_image = service.image_of(row["source"]) is not None
        yield row | {"image": f"{address}/{row['key_id']}/image{past}" if has_image else None}


@reads.get("/indexes/{name}/keys/{key_id}/image", response_class=Response, responses=PICTURE)
async def image(
    service: TheService,
    one: Named,
    key_id: schemas.KeyId,
    size: Size = 160,
    version: Annotated[
        schemas.VersionNumber | None, Query(description="Version that has the key.")
    ] = None,
) -> Response:
    """Return a thumbnail of a shot as a JPEG image."""
    if version is None:
        found = await service.find(one.now.index.find, (), None, [key_id])
    else:
        found = await service.find(lambda: rows_with(_labels_at(one, version), key_ids=[key_id]))
    if not len(found):
        raise Problem(404, f"index {one.name!r} has no key {key_id}")
    row = found.to_pylist()[0]
    photo = service.image_of(row["source"])
    if photo is None:
        raise Problem(404, f"key {key_id}: its source is not an image on this machine")
    name = (photo, row["digest"])
    return jpeg(
        await service.thumbnail(name, partial(read_image, photo[0], row["digest"]), size),
        seconds=60,
    )


@reads.get("/indexes/{name}/map", response_model=Row)
async def map_of(
    service: TheService,
    version: Now,
    method: Annotated[
        Method, Query(description="pca, or tsne if the server has scikit-learn.")
    ] = "pca",
    limit: Annotated[int, Query(ge=1, le=100_000, description="Maximum number of keys.")] = 5000,
) -> Response:
    """Project the keys to two dimensions, by one of the ``methods``. ``total`` is the number of all keys.

    If features are long, fewer keys than the limit are returned. ``places`` are their positions (see
    :class:`.Projection`).
    """
    index = version.index
    limit = min(limit, index.n, max(1, service.limits.mapped // index.d))

    found = await service.once(
        version, ("map", method, limit), lambda: projected(index, method, limit)
    )
    return json_of({"methods": methods(), "total": index.n} | vars(found))


@reads.get("/indexes/{name}/audit", response_model=list[Row])
async def audit(
    service: TheService,
    version: Now,
    limit: Annotated[int, Query(ge=1, le=SUSPICIOUS)] = 100,
    borderline: Annotated[bool, Query(description="Whether to include borderline cases.")] = False,
) -> Response:
    """List shots that look mislabelled, as `index audit` does, starting with the most suspicious ones."""
    index = version.index
    if index.n > AUDITED:
        many = f"the index has {index.n:,} keys, but at most {AUDITED:,} can be audited here"
        raise InputError(f"{many}; run {command_line('index', 'audit', index.place)}")

    call = partial(audited, index.in_memory(), borderline=borderline)
    return json_of(
        (await service.once(version, ("audit", borderline), call)).slice(0, limit).to_pylist()
    )


@reads.get("/indexes/{name}/accuracy")
async def accuracy(service: TheService, version: Now) -> schemas.Accuracy:
    """Estimate the accuracy on the examples, by cross-validation on the shots.

    Each fold of the shots is classified with the shots of the other folds. If the index is too large, the result is
    null.
    """
    if version.index.n > service.limits.estimated:
        return schemas.Accuracy(version=version.manifest.version)
    found = await service.once(version, "accuracy", lambda: estimate(version.index.in_memory()))
    return schemas.Accuracy(version=version.manifest.version, words=found.text, **vars(found))


@reads.get("/indexes/{name}/history", response_model=list[schemas.PastVersion])
async def history(service: TheService, one: Named) -> Response:
    """List all versions that are kept, starting with the oldest."""
    return json_of((await service.find(one.place.history)).select(schemas.HISTORY).to_pylist())


@reads.get("/indexes/{name}/history/{version}")
async def past(
    service: TheService,
    one: Named,
    version: schemas.VersionNumber,
    since: Annotated[
        schemas.VersionNumber | None, Query(description="Version to compare with.")
    ] = None,
) -> list[Row]:
    """Tell how the photos of a version differ from those of the version ``since``, or else from no photos.

    ``what`` tells whether the first ``photos`` were added, moved to another class or removed, and ``change`` describes
    this in words.
    """

    def call() -> list[Row]:
        after = _labels_at(one, version)
        before = after.slice(0, 0) if since is None else _labels_at(one, since)
        kinds: dict[str, dict[int, tuple[str | None, str | None]]] = {
            "added": {},
            "moved": {},
            "removed": {},
        }
        for key_id, (old, new) in edits_between(before, after).items():
            kinds["added" if old is None else "moved" if new else "removed"][key_id] = (
                (old, new) if new else (new, old)
            )
        found: list[Row] = []
        for what, edits in kinds.items():
            if edits:
                table, number = (before, since) if what == "removed" else (after, version)
                some = rows_with(table, key_ids=[*edits][:LISTED])
                photos = list(_pictured(service, one, some, f"?version={number}"))
                words = in_words(edits.values(), one.now.index.backbone)
                found.append({"what": what, "change": words, "photos": photos})
        return found

    return await service.find(call)


def _labels_at(one: Served, version: int) -> pa.Table:
    """Return the label store of a version. Raises Problem 404 if it is not kept, and InputError if it is large."""
    try:
        manifest = one.place.manifest(version)
        if manifest.n > COMPARED:
            raise InputError(
                f"version {version} has {manifest.n:,} photos, but at most {COMPARED:,} can be compared"
            )
        return one.place.read_labels(manifest)
    except StoreError as error:
        raise Problem(404, str(error)) from None


@reads.get("/indexes/{name}/exemplars", response_model=list[schemas.Key])
async def exemplars(service: TheService, version: Now) -> Response:
    """Return a typical shot of each class, which is the one that is closest to the mean of its class."""

    def call() -> list[Row]:
        return list(
            _pictured(service, version, version.index.find(key_ids=typical_keys(version.index)))
        )

    return json_of(await service.once(version, "exemplars", call))


@reads.get("/label")
async def label_status(labelling: TheLabelling) -> Row:
    """Return the next photos to label, and the progress.

    ``version`` is null until the first label is saved. ``photos`` is the number of readable photos. ``encoded``,
    ``labelled`` and ``unsaved`` count the encoded photos, the labelled photos, and the labels that are not saved yet.
    ``classes`` are the classes with their numbers of labelled photos. ``queue`` lists the next photos, how and why they
    were ``picked``, their guesses, the number of their ``visit``, if there are several photos of it, and the others of
    the visit, or else near-identical photos (``similar``). ``steps`` lists the last 100 steps, which can be undone,
    oldest first, with the numbers of their ``photos`` and, unless they were skipped, their ``labels``.
    ``guessed`` tells whether the guesses for the photos of the last 20 of these steps were right. ``refused`` lists the
    unsaved labels that the index did not accept, and why. ``progress`` has the ``estimate`` of the answers to the
    unlabelled photos, the expected ``gain`` from ``more`` labels, and whether it takes less work to ``review`` the
    least certain answers. It is null while few photos are labelled, or if the index is large. ``others`` says the
    estimate in words. ``busy`` tells whether the state will change soon. ``problem`` is an error in the background.
    ``encoder`` is another encoder on this machine that would help, by its ``name``: of the ``tried`` labelled photos,
    each classified by the others, ``before`` are right now, and ``after`` with both encoders. ``encoded`` is null, or
    counts the photos that it has encoded, and all photos, while it is being joined. ``problem`` is why that failed.
    """
    return labelling.status()


@reads.get("/label/answers", response_model=Row)
async def label_answers(service: TheService, labelling: TheLabelling) -> Response:
    """Return the labels and answers of all ``photos`` that have been read.

    Without labels, there are no answers. ``version`` is the version of the index that has answered, and ``read`` is the
    number of answered photos. Both may be lower than those of the session if answers were already being computed; then
    ask again for the newest. ``groups`` lists the numbers of similar photos without a match. Photos of the same
    ``visit``, which is a number or null, are in the same folder and were taken seconds apart.
    """
    version = labelling.version()
    answers = Review(None, [], Predictions(), [])
    if version is None:
        return json_of(answers.listed(labelling.photos, {}, {}))
    if labelling.photos.encoded:
        answers = await labelling.answers(version)
    visits = await labelling.visits()
    labels = labelling.session.labels()  # those that were given in the meantime, too
    return await service.find(lambda: json_of(answers.listed(labelling.photos, labels, visits)))


@reads.get("/label/photos/{photo}/{what}", response_class=Response, responses=PICTURE_OR_BYTES)
async def label_photo(
    service: TheService,
    labelling: TheLabelling,
    photo: schemas.PhotoNumber,
    what: Literal["image", "feature", "file", "similar"],
    size: Size = 160,
) -> Response:
    """Return a photo of the labelling session: a reduced JPEG image, its feature in float32, or its unchanged file.

    ``similar`` lists what the photo itself and then similar photos give to the probability of its first guess.
    """
    path = labelling.path(photo)
    if what == "image":
        return jpeg(await service.thumbnail(path, partial(read_item, path), size), seconds=3600)
    if what == "file":
        data = await service.find(read_item, path)
    elif (feature := labelling.photos.feature(photo, labelling.session.index)) is None:
        raise Problem(404, f"photo {photo}: has not been read yet; try again later")
    elif what == "similar":
        version = labelling.version()
        return json_of([] if version is None else (await labelling.answers(version)).similar(photo))
    else:
        data = feature.astype("<f4").tobytes()
    return Response(data, media_type=FLOATS)


def jpeg(data: bytes, seconds: int) -> Response:
    """Return an image, which the browser may keep for some seconds."""
    return Response(
        data, headers={"cache-control": f"private, max-age={seconds}"}, media_type="image/jpeg"
    )


def json_of(answer: object) -> Response:
    """Return an answer as JSON. This is much faster than FastAPI's own conversion."""
    data = orjson.dumps(answer, default=dict, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(data, media_type="application/json")
