"""What the commands share: their options, and how these become sources, backbones, encoders and indexes."""

from __future__ import annotations

import functools
import logging
import os
import tomllib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from retrieval_tip.errors import Skipped, UsageError, one_line

if TYPE_CHECKING:
    from retrieval_tip.backbone import Backbone, Identity
    from retrieval_tip.cache_model import CacheModel
    from retrieval_tip.features import Encoder
    from retrieval_tip.sources import Source

FAILED, WRONG_USAGE, SOME_SKIPPED = 1, 2, 3
SHOWN = 20
"""Classes that a line names."""

FOLDER = click.Path(path_type=Path)
FILE = click.Path(path_type=Path, dir_okay=False)

Command = Callable[..., Any]


class K(click.ParamType[int]):
    """A number of keys, or ``all``: 0 stands for all, since click takes None as not given."""

    name = "N|all"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number, 0 for all."""
        if value == "all" or (isinstance(value, int) and value >= 0):
            return 0 if value == "all" else int(value)
        try:
            number = int(value)
        except ValueError:
            number = 0
        if number < 1:
            self.fail(f"{value!r} is neither a number of keys, 1 or more, nor 'all'", param, ctx)
        return number


def options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options as one decorator, in the order that help shows them."""
    return lambda command: functools.reduce(lambda inner, option: option(inner), reversed(options), command)


def recipe(ctx: click.Context, _: click.Parameter, path: Path | None) -> Path | None:
    """Options from a TOML file: defaults that the command line overrides."""
    if path is not None:
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise click.BadParameter(f"{path}: {error}", ctx) from None
        known = {parameter.name: parameter for parameter in ctx.command.params}
        for name, value in values.items():
            if name not in known:
                raise click.BadParameter(f"{path}: unknown setting {name!r}", ctx)
            if isinstance(value, list | dict) and not getattr(known[name], "multiple", False):
                raise click.BadParameter(f"{path}: {name} takes one value, not {value!r}", ctx)
        ctx.default_map = values
    return path


MODEL = options(
    click.option("--model", help="open_clip architecture, local-dir:PATH or hf-hub:ORG/REPO.  [default: RN50, openai]"),
    click.option("--pretrained", help="Tag, checkpoint file, or TAG=FILE for a local copy of a tag's weights."),
)
BACKBONE = options(
    MODEL,
    click.option("--precision", type=click.Choice(["auto", "float32", "float16", "bfloat16"]), default="auto",
                 show_default=True, help="Arithmetic of the backbone (auto: float32, on a GPU float16 autocast) and of "
                                         "the products with all keys (auto: the fastest that is accurate, measured)."),
)  # fmt: skip
DEVICE = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
READING = options(
    click.option("--dataset", metavar="NAME",
                 help="SOURCE is the folder that holds this dataset's folder (names: datasets list)."),
    click.option("--split", help="Part of a split .json or dataset: train, val or test."),
    click.option("--root", type=FOLDER, help="Folder that the paths of a table or split .json are relative to."),
)  # fmt: skip
ENCODING = options(
    click.option("--norms", type=click.Choice(["check", "unit", "keep"]), default="check", show_default=True,
                 help="Rows of feature tables: must have norm 1, are scaled to it, or are kept as they are."),
    click.option("--batch-size", type=click.IntRange(1),
                 help="Images encoded at a time.  [default: the backbone's best, 4 on a CPU, 64 on a GPU]"),
    click.option("--workers", type=click.IntRange(1), default=min(16, os.cpu_count() or 1), show_default="cores",
                 help="Threads that read and decode images."),
    click.option("--cache", type=FOLDER,
                 help="Folder of the encoding cache.  [default: $RETRIEVAL_TIP_CACHE or ~/.cache/retrieval-tip]"),
    click.option("--no-cache", is_flag=True, help="Encode without a cache."),
    click.option("--reduce/--no-reduce", default=True, show_default=True,
                 help="Decode large JPEGs at a reduced size for the centre view: faster, nearly the same features."),
    click.option("--strict", is_flag=True, help="Fail on the first image that cannot be read instead of skipping it."),
    DEVICE,
)  # fmt: skip
VIEWS = options(
    click.option("--views", type=click.IntRange(1), default=1, show_default=True,
                 help="1: the centre view; V > 1: mean of V augmented views, as in the paper."),
    click.option("--seed", type=int, default=1, show_default=True, help="Draws shots and views."),
)  # fmt: skip
ANSWER = options(
    click.option("-k", "k", type=K(), help="Nearest keys that a query uses.  [default: the index's]"),
    click.option("--tail/--no-tail", default=None, help="Estimate the keys that were not retrieved.  [default: tail]"),
    click.option("--alpha", type=float, help="Weight of the cache beside the text.  [default: the index's]"),
    click.option("--beta", type=float, help="Sharpness of the affinity.  [default: the index's]"),
    click.option(
        "--where", metavar="SQL", help="Use only the keys that this condition over the label store holds for."
    ),
    click.option(
        "--verify",
        type=click.Choice(["full", "fast"]),
        default="full",
        show_default=True,
        help="Check every byte of the index first, or of large files only the size.",
    ),
)
ABSTAIN = click.option("--abstain", type=click.FloatRange(0, 1), metavar="P",
                        help="Withhold answers of a probability below P.")  # fmt: skip
SCALES = click.option("--scales", type=(float, float), default=(7.0, 3.0), show_default=True,
                       help="Largest beta and alpha of the published grid.")  # fmt: skip
FORMAT = options(
    click.option("--format", "style", type=click.Choice(["table", "json", "csv", "parquet"]), default="table",
                 show_default=True, help="json: one object a line."),
    click.option("--output", type=FILE, help="File to write instead of standard output."),
)  # fmt: skip


def source_of(path: Path, given: dict[str, Any], split: str, *, labelled: bool = True) -> Source:
    """The source of a command, with ``split`` as the part where none is given; or the dataset that it names."""
    from retrieval_tip.sources import open_items, open_source

    part = given["split"] or split
    if given["dataset"] is None:
        return (open_source if labelled else open_items)(path, split=part, root=given["root"])
    from retrieval_tip.datasets import open_dataset

    if given["root"] is not None:
        raise UsageError("--root does not go with --dataset: SOURCE is the folder that holds the dataset's folder")
    return open_dataset(given["dataset"], path, part)


def validation(cache: CacheModel, path: Path, given: dict[str, Any], *, every: bool = False) -> Source:
    """Validation images: ``--val-shots`` a class, as published, or every one."""
    from retrieval_tip.search_hp import validation_shots
    from retrieval_tip.sources import open_source

    val = open_source(path, split="val", root=given["root"])
    every = every or given["val_shots"] == 0
    return val if every else val.take(validation_shots(cache, val, path, given["val_shots"]))


def warn(warnings: Iterable[str]) -> None:
    """Say these on standard error, unless --quiet."""
    for warning in warnings:
        logging.getLogger("retrieval_tip").warning("%s", warning)


def checked(folder: Path, device: str, precision: str = "float32", verify: str = "full") -> CacheModel:
    """The index. Its files are hashed while torch is imported."""
    from retrieval_tip.store import Check

    check = Check(folder, verify=verify)
    from retrieval_tip.cache_model import CacheModel

    return CacheModel.load(folder, device=device, precision=precision, check=check)


def opened(folder: Path, given: dict[str, Any]) -> CacheModel:
    """The index, with the alpha and beta of the command line where they are given."""
    cache = checked(folder, given["device"], given["precision"], given.get("verify", "full"))
    from retrieval_tip.inputs import check_settings

    cache.alpha = cache.alpha if given["alpha"] is None else given["alpha"]
    cache.beta = cache.beta if given["beta"] is None else given["beta"]
    check_settings(cache.alpha, cache.beta, cache.k, cache.logit_scale)
    return cache


def index_with(folder: Path, given: dict[str, Any]) -> tuple[CacheModel, int | None, bool]:
    """The index with the settings of the command line, or its own."""
    cache = opened(folder, given)
    if given["where"] is not None:
        cache = _restricted(cache, given["where"])
    k = cache.k if given["k"] is None else given["k"] or None
    return cache, k, cache.tail if given["tail"] is None else given["tail"]


def _restricted(cache: CacheModel, where: str) -> CacheModel:
    """The index over the keys that a condition holds for; what remains of each class is said."""
    from retrieval_tip.labels import rows_where

    rows = rows_where(cache.labels, where)
    if not len(rows):
        raise UsageError(f"where: holds for none of the {cache.n} keys")
    rest = cache.take(rows)
    before, after = (
        ids.bincount(minlength=len(cache.class_names)).tolist() for ids in (cache.class_ids, rest.class_ids)
    )
    parts = [f"{name} {a}/{b}" for name, a, b in zip(cache.class_names, after, before, strict=True) if a < b]
    left = f", and {len(parts) - SHOWN} more classes" if len(parts) > SHOWN else ""
    click.echo(one_line(f"where: {rest.n} of {cache.n} keys remain ({', '.join(parts[:SHOWN])}{left})"), err=True)
    return rest


@dataclass(frozen=True)
class Origin:
    """What the features of an index come from, as its manifest says: enough to encode more of them."""

    backbone: Identity | None
    d: int
    tuned: Path | None

    @classmethod
    def of(cls, folder: Path) -> Origin:
        """That of an index folder."""
        from retrieval_tip.backbone import Identity
        from retrieval_tip.store import find_weights, read_manifest

        manifest = read_manifest(folder)
        return cls(
            Identity.from_dict(manifest.backbone) if manifest.backbone else None,
            manifest.d,
            find_weights(folder, manifest.files["weights"]) if "weights" in manifest.files else None,
        )


def load(
    given: dict[str, Any], model: str | None = None, pretrained: str | None = None, tuned: Path | None = None
) -> Backbone:
    """The backbone that the command line names, else this one, else the default."""
    from retrieval_tip.backbone import DEFAULT_MODEL, load_backbone

    model, pretrained = (given["model"], given["pretrained"]) if given["model"] else (model, pretrained)
    return load_backbone(
        model or DEFAULT_MODEL,
        given["pretrained"] or pretrained,
        device=given["device"],
        precision=given["precision"],
        tuned=tuned,
    )


def backbone_of(source: Source, given: dict[str, Any], *, needed: bool = False) -> Backbone | None:
    """The backbone of a source: named, or the one that a feature table names where text weights need it."""
    from retrieval_tip.features import table_identity

    if source.table is None or given["model"]:
        return load(given)
    identity = table_identity(source.table) if needed else None
    return load(given, identity.model, identity.pretrained) if identity else None


def backbone_for(
    cache: CacheModel | Origin, sources: list[Source], given: dict[str, Any], *, needed: bool = False
) -> Backbone | None:
    """The index's own backbone, where there are images to encode or it is needed; refused if it is another by now."""
    from retrieval_tip.backbone import load_when_needed
    from retrieval_tip.features import check_backbone

    images = needed or any(source.table is None for source in sources)
    identity = cache.backbone
    if images and identity is None and not given["model"]:
        raise UsageError(
            "the index was built from features of an unnamed backbone; name it with --model to encode images"
        )
    backbone: Backbone | None = None
    if images:
        named = given["model"] or given["pretrained"]
        if identity and not (cache.tuned or named or given["no_cache"]):  # what is in the encoding cache needs no model
            backbone = load_when_needed(identity, cache.d, device=given["device"], precision=given["precision"])
        else:
            model, pretrained = (identity.model, identity.pretrained) if identity else (None, None)
            backbone = load(given, model, pretrained, cache.tuned)
    check_backbone(cache.backbone, cache.d, backbone, sources)
    return backbone


@contextmanager
def encoder_of(ctx: click.Context, backbone: Backbone | None, given: dict[str, Any]) -> Iterator[Encoder]:
    """How the command's inputs become features; the encoding cache is closed at the end."""
    from retrieval_tip.features import Encoder, EncodingCache

    use_cache = backbone is not None and not given["no_cache"]
    cache = EncodingCache(given["cache"] or EncodingCache.default_folder()) if use_cache else None
    names = ("views", "seed", "norms", "batch_size", "workers", "reduce", "strict")
    settings = {name: given[name] for name in names if name in given}
    try:
        yield Encoder(backbone=backbone, cache=cache, progress=not ctx.obj, **settings)
    finally:
        if cache is not None:
            cache.close()


def shown(value: Any) -> str:
    """A value as a table shows it."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {shown(part)}" for key, part in value.items())
    if isinstance(value, list):
        line = ", ".join(shown(part) for part in value[:8])
        return line + (f" ... ({len(value)} in all)" if len(value) > 8 else "")
    return "-" if value is None else str(value)


def finish(ctx: click.Context, skipped: list[Skipped]) -> None:
    """Each skipped input was named when it was met; the exit status says that there were some."""
    if skipped:
        click.echo(f"{len(skipped)} inputs could not be read", err=True)
        ctx.exit(SOME_SKIPPED)
