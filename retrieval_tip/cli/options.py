"""What the commands share: their options, and how these become sources, backbones, encoders and indexes."""

from __future__ import annotations

import functools
import logging
import math
import os
import tomllib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import click

from retrieval_tip.bounds import MANY, MOST
from retrieval_tip.data.remote import is_remote
from retrieval_tip.errors import InputError, Skipped, UsageError, message, one_line
from retrieval_tip.files import read_regular
from retrieval_tip.lance.address import Address

if TYPE_CHECKING:
    from retrieval_tip.backbones.open_clip import Backbone, Identity
    from retrieval_tip.cache_model import CacheModel
    from retrieval_tip.classifier import Classifier
    from retrieval_tip.data.encoder import Encoder
    from retrieval_tip.data.sources import Source
    from retrieval_tip.distributed.engine import BackboneName, Encoding, Ray
    from retrieval_tip.distributed.shards import Shard
    from retrieval_tip.distributed.tasks import Asked
    from retrieval_tip.index.places import Model
    from retrieval_tip.store.manifest import Manifest

FAILED, WRONG_USAGE, SOME_SKIPPED = 1, 2, 3
SHOWN = 20
"""Classes that a line names."""
LARGEST = 1e30
"""The largest number that is taken: what is computed with it, in float32, reaches to 3e38."""
RECIPE_BYTES, RECIPE_DOTS = 1 << 20, 1000
"""The largest recipe, and the most dots in it: a dotted key takes the parser time by the square of its parts."""


class Folder(click.Path):
    """A path, and no address of a LanceDB store."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path."""
        if Address.parse(str(value)) is not None:
            self.fail(
                f"{value}: is the address of a LanceDB store, and this takes a folder; copy it: retrieval-tip index "
                f"clone {value} DIR",
                param,
                ctx,
            )
        return super().convert(value, param, ctx)


class Index(click.ParamType[Any]):
    """An index: a folder, or the address of a LanceDB store."""

    name = "DIR|lance://PATH|s3://..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path | Address:
        """The folder's path, or the address."""
        return Address.parse(str(value)) or Path(value)


FOLDER, INDEX = Folder(path_type=Path), Index()
FILE = click.Path(path_type=Path, dir_okay=False)


class Place(click.Path):
    """A path; with ``--engine ray`` also the URL of an object, and a folder where else a file is written."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A path, or the URL as it is."""
        engine = ctx.params.get("engine") if ctx is not None else None
        if engine == "ray":
            return value if is_remote(value) else Path(value)
        if engine is not None and is_remote(value):
            self.fail(f"{value}: object stores are read and written with --engine ray", param, ctx)
        return super().convert(value, param, ctx)


PLACE = Place(path_type=Path)
PLACE_OUT = Place(path_type=Path, dir_okay=False)

Command = Callable[..., Any]


class K(click.ParamType[Any]):
    """A number of keys, or ``all``."""

    name = "N|all"

    def __init__(self, kind: str = "") -> None:
        self.most = MOST.get(kind, MANY)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | Literal["all"]:
        """The number, 1 or more, or ``all``."""
        if value == "all":
            return "all"
        try:
            number = int(value)
        except ValueError:
            number = 0
        if not 1 <= number <= self.most:
            self.fail(f"{value!r} is neither a number from 1 to {self.most} nor 'all'", param, ctx)
        return number


def count(kind: str = "", least: int = 1) -> click.IntRange:
    """A whole number from ``least`` to the most of its kind."""
    return click.IntRange(least, MOST.get(kind, MANY))


SHOTS, VIEWS_COUNT, SEEDS, SEED = count("shots"), count("views"), count("seeds"), count("seed", 0)


class Number(click.FloatRange):
    """A number between bounds: neither NaN, which lies in every range, nor infinite."""

    def __init__(self, least: float = 0.0, most: float = LARGEST, *, above: bool = False) -> None:
        super().__init__(least, most, min_open=above)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number."""
        number = float(super().convert(value, param, ctx))
        if math.isnan(number):
            self.fail(f"{value!r} is not a number", param, ctx)
        return number


NUMBER, POSITIVE, SHARE = Number(), Number(above=True), Number(0, 1)


def options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options as one decorator, in the order that help shows them."""
    return lambda command: functools.reduce(lambda inner, option: option(inner), reversed(options), command)


def recipe(ctx: click.Context, _: click.Parameter, path: Path | None) -> Path | None:
    """Options from a TOML file: defaults that the command line overrides, each of the type that its option has."""
    if path is not None:
        values = _toml(path)
        known = {parameter.name: parameter for parameter in ctx.command.params if parameter.expose_value}
        for name, value in values.items():
            if name not in known:
                raise click.BadParameter(f"{path}: unknown setting {name!r}", ctx)
            expected, fits = _kind(known[name])
            if not fits(value):
                raise click.BadParameter(f"{path}: {name}: expected {expected}, not {_shown_toml(value)}", ctx)
        ctx.default_map = values
    return path


def _toml(path: Path) -> dict[str, Any]:
    """What a TOML file says."""
    try:
        raw = read_regular(path, RECIPE_BYTES)
        if raw.count(b".") > RECIPE_DOTS:
            raise InputError(f"{path}: more than {RECIPE_DOTS} dots; no setting is a dotted key")
        return tomllib.loads(raw.decode())
    except InputError as error:  # which names it
        raise click.BadParameter(str(error)) from None
    except OSError as error:
        raise click.BadParameter(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise click.BadParameter(f"{path}: {error}") from None
    except RecursionError:
        raise click.BadParameter(f"{path}: arrays or tables are nested too deeply") from None


def _kind(parameter: click.Parameter) -> tuple[str, Callable[[Any], bool]]:
    """What TOML has to have for an option or argument, in words and as a test."""
    if isinstance(parameter, click.Option) and parameter.is_flag:
        return "true or false", lambda value: isinstance(value, bool)
    what, fits = _single(parameter.type)
    if getattr(parameter, "multiple", False):
        return f"an array, of {what} each", lambda value: isinstance(value, list) and all(map(fits, value))
    return what, fits


def _single(kind: click.ParamType[Any]) -> tuple[str, Callable[[Any], bool]]:
    """What TOML has to have for one value of a type."""
    if isinstance(kind, K):
        return "a whole number or 'all'", lambda value: _is_whole(value) or value == "all"
    if isinstance(kind, click.types.IntParamType):
        return "a whole number", _is_whole
    if isinstance(kind, click.types.FloatParamType):
        return "a number", lambda value: _is_whole(value) or (isinstance(value, float) and math.isfinite(value))
    return "text", lambda value: isinstance(value, str) and "\0" not in value  # no path or name has that


def _is_whole(value: Any) -> bool:
    """Whether a value is a whole number such as TOML has: it fits into 64 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _shown_toml(value: Any) -> str:
    """A value of TOML as a message shows it; of what holds others, or may be without end, only the kind."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | float) or _is_whole(value):
        return repr(value)
    kinds = {int: "a larger one than 64 bits hold", list: "an array", dict: "a table"}
    return kinds.get(type(value), "a date or time")


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
    click.option("--batch-size", type=count("batch_size"),
                 help="Images encoded at a time.  [default: the backbone's best, 4 on a CPU, 64 on a GPU]"),
    click.option("--workers", type=count("workers"), default=min(16, os.cpu_count() or 1), show_default="cores",
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
    click.option("--views", type=VIEWS_COUNT, default=1, show_default=True,
                 help="1: the centre view; V > 1: mean of V augmented views, as in the paper."),
    click.option("--seed", type=SEED, default=1, show_default=True, help="Draws shots and views."),
)  # fmt: skip
ANSWER = options(
    click.option("-k", "k", type=K(), help="Nearest keys that a query uses.  [default: the index's]"),
    click.option("--tail/--no-tail", default=None, help="Estimate the keys that were not retrieved.  [default: tail]"),
    click.option("--alpha", type=NUMBER, help="Weight of the cache beside the text.  [default: the index's]"),
    click.option("--beta", type=NUMBER, help="Sharpness of the affinity.  [default: the index's]"),
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
RAY_ADDRESS = click.option(
    "--ray-address", metavar="HOST:PORT", help="Head of a Ray cluster, or auto.  [default: a Ray that is started here]"
)
ENGINE = options(
    click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True, is_eager=True,
                 help="ray: by shards on a pool of processes, here or on a cluster, into a folder of parts that a "
                      "second run completes; takes tars and s3:// too."),
    click.option("--actors", type=count("actors"), metavar="N",
                 help="With --engine ray: processes that work, at most.  [default: what there is room for]"),
    click.option("--shard-size", type=count(), metavar="N",
                 help="With --engine ray: items that are done, and done again, together.  "
                      "[default: 256 images, 16384 rows of features; a tar is one shard]"),
)  # fmt: skip
ABSTAIN = click.option("--abstain", type=SHARE, metavar="P",
                        help="Withhold answers of a probability below P.")  # fmt: skip
SCALES = click.option("--scales", type=(POSITIVE, POSITIVE), default=(7.0, 3.0), show_default=True,
                       help="Largest beta and alpha of the published grid.")  # fmt: skip
FORMAT = options(
    click.option("--format", "style", type=click.Choice(["table", "json", "csv", "parquet"]), default="table",
                 show_default=True, help="json: one object a line."),
    click.option("--output", type=PLACE_OUT, help="File to write instead of standard output."),
)  # fmt: skip


def source_of(path: Path, given: dict[str, Any], split: str, *, labelled: bool = True) -> Source:
    """The source of a command, with ``split`` as the part where none is given; or the dataset that it names."""
    from retrieval_tip.data.sources import open_items, open_source

    part = given["split"] or split
    if given["dataset"] is None:
        return (open_source if labelled else open_items)(path, split=part, root=given["root"])
    from retrieval_tip.data.datasets import open_dataset

    if given["root"] is not None:
        raise UsageError("--root does not go with --dataset: SOURCE is the folder that holds the dataset's folder")
    return open_dataset(given["dataset"], path, part)


def validation(cache: CacheModel, path: Path, given: dict[str, Any], *, every: bool = False) -> Source:
    """Validation images: ``--val-shots`` a class, as published, or every one."""
    from retrieval_tip.data.sources import open_source
    from retrieval_tip.fit.search_hp import validation_shots

    val = open_source(path, split="val", root=given["root"])
    every = every or given["val_shots"] == "all"
    return val if every else val.take(validation_shots(cache, val, path, given["val_shots"]))


def say(text: str) -> None:
    """Say this on standard error, as a message."""
    click.echo(message(text), err=True)


def warn(warnings: Iterable[str]) -> None:
    """Say these on standard error, unless --quiet."""
    for warning in warnings:
        logging.getLogger("retrieval_tip").warning("%s", warning)


def checked(folder: Path, device: str, precision: str = "float32", verify: str = "full") -> CacheModel:
    """The index. Its files are hashed while torch is imported."""
    from retrieval_tip.store.folder import Check

    check = Check(folder, verify=verify)
    from retrieval_tip.cache_model import CacheModel

    return CacheModel.load(folder, device=device, precision=precision, check=check)


@overload
def opened(folder: Path, given: dict[str, Any]) -> CacheModel: ...
@overload
def opened(folder: Path | Address, given: dict[str, Any]) -> Model: ...
def opened(folder: Path | Address, given: dict[str, Any]) -> Model:
    """The index, with the alpha and beta of the command line where they are given."""
    from retrieval_tip.index.places import at

    how = {name: given[name] for name in ("device", "precision", "verify") if name in given}
    cache = at(folder).load(**how)
    cache.settings = cache.settings.but(alpha=given["alpha"], beta=given["beta"])
    return cache


@overload
def index_with(folder: Path, given: dict[str, Any]) -> CacheModel: ...
@overload
def index_with(folder: Path | Address, given: dict[str, Any]) -> Model: ...
def index_with(folder: Path | Address, given: dict[str, Any]) -> Model:
    """The index with the settings of the command line, or its own."""
    cache = opened(folder, given)
    if given["where"] is not None:
        cache = _restricted(cache, given["where"])
    cache.settings = cache.settings.but(k=given["k"], tail=given["tail"])
    return cache


def _restricted(cache: Model, where: str) -> CacheModel:
    """The index over the keys that a condition holds for; what remains of each class is said."""
    from retrieval_tip.store.query import rows_where

    rows = rows_where(cache.labels, where)
    if not len(rows):
        raise UsageError(f"where: holds for none of the {cache.n} keys")
    rest = cache.take(rows)
    counts = zip(cache.class_names, rest.counts, cache.counts, strict=True)
    parts = [f"{name} {a}/{b}" for name, a, b in counts if a < b]
    left = f", and {len(parts) - SHOWN} more classes" if len(parts) > SHOWN else ""
    say(f"where: {rest.n} of {cache.n} keys remain ({', '.join(parts[:SHOWN])}{left})")
    return rest


def manifest_of(folder: Path | Address) -> Manifest:
    """The manifest of an index's current version, without torch."""
    from retrieval_tip.index.places import at

    return at(folder).manifest()


@dataclass(frozen=True)
class Origin:
    """What the features of an index come from, as its manifest says: enough to encode more of them."""

    backbone: Identity | None
    d: int
    tuned: Path | None

    @classmethod
    def of(cls, folder: Path | Address) -> Origin:
        """That of an index."""
        from retrieval_tip.backbones.open_clip import Identity
        from retrieval_tip.store.folder import find_weights

        manifest, tuned = manifest_of(folder), None
        if isinstance(folder, Path) and "weights" in manifest.files:
            tuned = find_weights(folder, manifest.files["weights"])
        return cls(Identity.from_dict(manifest.backbone) if manifest.backbone else None, manifest.d, tuned)


def load(
    given: dict[str, Any], model: str | None = None, pretrained: str | None = None, tuned: Path | None = None
) -> Backbone:
    """The backbone that the command line names, else this one, else the default."""
    from retrieval_tip.backbones.open_clip import DEFAULT_MODEL, load_backbone

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
    from retrieval_tip.data.feature_tables import table_identity

    if source.table is None or given["model"]:
        return load(given)
    identity = table_identity(source.table) if needed else None
    return load(given, identity.model, identity.pretrained) if identity else None


def backbone_for(
    cache: Classifier | Origin, sources: list[Source], given: dict[str, Any], *, needed: bool = False
) -> Backbone | None:
    """The index's own backbone, where there are images to encode or it is needed; refused if it is another by now."""
    from retrieval_tip.backbones.open_clip import load_when_needed
    from retrieval_tip.data.feature_tables import check_backbone

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


def ray_of(given: dict[str, Any]) -> Ray | None:
    """Where and how wide a command runs on Ray; ``None``: it runs here. What belongs to Ray is refused then."""
    if given["engine"] != "ray":
        for name in ("actors", "shard_size"):
            if given[name] is not None:
                raise UsageError(f"--{name.replace('_', '-')} needs --engine ray")
        if given["ray_address"] is not None:
            raise UsageError("--ray-address: nothing here runs on Ray; give --engine ray too")
        return None
    from retrieval_tip.distributed.cluster import needed_ray
    from retrieval_tip.distributed.engine import Ray

    needed_ray()
    return Ray(given["ray_address"], given["actors"], given["device"], given["shard_size"])


def shards_of(path: Path | str, given: dict[str, Any], split: str, *, labelled: bool = True) -> list[Shard]:
    """The input shards of a command's source, as :func:`source_of` takes it, of tars, or of a URL."""
    from retrieval_tip.distributed.shards import cut, cut_source

    if given["dataset"] is not None:
        return cut_source(source_of(Path(path), given, split, labelled=labelled), given["shard_size"])
    part = given["split"] or split
    return cut(path, labelled=labelled, split=part, root=given["root"], size=given["shard_size"])


def encoding_of(given: dict[str, Any], name: BackboneName | None) -> Encoding:
    """How the workers of a command encode."""
    from retrieval_tip.data.encoding_cache import EncodingCache
    from retrieval_tip.distributed.engine import Encoding

    cache = None if given["no_cache"] else os.fspath(given["cache"] or EncodingCache.default_folder())
    names = ("views", "seed", "norms", "batch_size", "workers", "reduce", "strict")
    return Encoding(name, {setting: given[setting] for setting in names if setting in given}, cache)


def named(
    given: dict[str, Any], model: str | None = None, pretrained: str | None = None, tuned: Path | None = None
) -> BackboneName:
    """The backbone that :func:`load` would load, by its name."""
    from retrieval_tip.backbones.open_clip import DEFAULT_MODEL
    from retrieval_tip.distributed.engine import BackboneName

    model, pretrained = (given["model"], given["pretrained"]) if given["model"] else (model, pretrained)
    weights = None if tuned is None else os.fspath(tuned)
    return BackboneName(model or DEFAULT_MODEL, given["pretrained"] or pretrained, given["precision"], weights)


def asked_of(cache: Classifier, given: dict[str, Any]) -> Asked:
    """How workers are to answer with their copy of an index, as :func:`index_with` has set this one."""
    from retrieval_tip.distributed.tasks import Asked

    return Asked(cache.settings, given["where"], "float32" if given["precision"] == "auto" else given["precision"])


def encoding_for(cache: Classifier, shards: list[Shard], given: dict[str, Any]) -> Encoding:
    """How the workers encode for an index: with its own backbone, where there are images; refused as it is here."""
    import pyarrow as pa

    from retrieval_tip.data.feature_tables import check_backbone
    from retrieval_tip.data.sources import Source

    identity, name, backbone = cache.backbone, None, None
    if not all(shard.features for shard in shards):
        if identity is None and not given["model"]:
            raise UsageError(
                "the index was built from features of an unnamed backbone; name it with --model to encode images"
            )
        model, pretrained = (identity.model, identity.pretrained) if identity else (None, None)
        name = named(given, model, pretrained, cache.tuned)
        backbone = name.looked_at()
    tables = dict.fromkeys(shard.place for shard in shards if shard.features)
    check_backbone(cache.backbone, cache.d, backbone, [Source(t, pa.table({}), table=t) for t in tables])
    return encoding_of(given, name)


@contextmanager
def encoder_of(ctx: click.Context, backbone: Backbone | None, given: dict[str, Any]) -> Iterator[Encoder]:
    """How the command's inputs become features; the encoding cache is closed at the end."""
    from retrieval_tip.data.encoder import Encoder
    from retrieval_tip.data.encoding_cache import EncodingCache

    cache = None if backbone is None or given["no_cache"] else EncodingCache.at(given["cache"])
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
        return ", ".join(f"{one_line(key)} {shown(part)}" for key, part in value.items())
    if isinstance(value, list):
        line = ", ".join(shown(part) for part in value[:8])
        return line + (f" ... ({len(value)} in all)" if len(value) > 8 else "")
    return "-" if value is None else one_line(str(value))


def finish(ctx: click.Context, skipped: list[Skipped]) -> None:
    """Each skipped input was named when it was met; the exit status says that there were some."""
    if skipped:
        say(f"{len(skipped)} inputs could not be read")
        ctx.exit(SOME_SKIPPED)
