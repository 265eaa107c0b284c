"""The commands under ``index``: each parses, makes one library call, and prints."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from retrieval_tip.cli import options
from retrieval_tip.cli.group import Group
from retrieval_tip.cli.messages import about, finish, print_facts, say, say_fit, warn
from retrieval_tip.cli.opening import (
    Origin,
    backbone_for,
    backbone_of,
    checked,
    encoder_for,
    encoder_of,
    source_of,
)
from retrieval_tip.cli.options import BackboneOptions, EncodingOptions, OutputOptions, ReadingOptions, ViewOptions
from retrieval_tip.cli.parameters import (
    FILE,
    FOLDER,
    INDEX,
    NUMBER,
    POSITIVE,
    SEED,
    SHOTS,
    SOURCE,
    VIEWS_COUNT,
    K,
    Number,
    count,
)
from retrieval_tip.cli.recipe import recipe
from retrieval_tip.errors import UsageError, counted, few, json_line, show
from retrieval_tip.index.addresses import FORMS, KIND
from retrieval_tip.settings import Dtype, FitName, KeysMet, MetricName, Normalize, Norms, ValuesName

if TYPE_CHECKING:
    from retrieval_tip.answering import AnsweringIndex
    from retrieval_tip.index.changes import Added
    from retrieval_tip.index.places import Place


OUT = click.option("--out", "--store", type=INDEX, required=True,
                   help=f"Index folder, or {KIND} ({FORMS}); an index that is there gets a new version.")  # fmt: skip
_KEYS = options.several(
    click.option("--dtype", type=options.choice(Dtype), default="float32", show_default=True,
                 help="Type of the stored keys."),
    click.option("--alpha", type=NUMBER, help="Weight of the cache beside the text.  [default: from the shots]"),
    click.option("--beta", type=NUMBER, help="Sharpness of the affinity.  [default: from the shots]"),
)  # fmt: skip


_INDEXING = options.several(
    click.option("--index", "factory",
                  help="FAISS factory string; Classes: likely classes are met whole; auto: by the numbers. At an "
                       "address: Flat, Classes, IvfFlat, IvfSq, HnswSq, auto.  [default: Flat; there auto]"),
    click.option("--fit", type=options.choice(FitName),
                  help="auto: metric, values, alpha, beta and temperature that the shots speak for; none: Tip-Adapter."
                       "  [default: auto; none where alpha, beta or normalize is given]"),
    options.LETTERS,
    _KEYS,
    click.option("--normalize", type=options.choice(Normalize),
                  help="Units of alpha and beta; none: the paper's formula and its 1 and 5.5.  "
                       "[default: both; none where alpha or beta is given]"),
    click.option("-k", "k", type=K(),
                  help="Nearest keys that a query uses.  [default: all; with --index auto its choice]"),
    click.option("--logit-scale", type=POSITIVE,
                  help="Factor of the text logits.  [default: the backbone's, else 100]"),
)  # fmt: skip


@click.group("index", cls=Group)
def index() -> None:
    """Build, describe, check, query and change indexes."""


@index.command("build")
@click.argument("source", type=SOURCE)
@OUT
@click.option("--recipe", type=FILE, is_eager=True, expose_value=False, callback=recipe,
              help="TOML file with any of these settings; the command line goes before it.")  # fmt: skip
@options.BACKBONE
@click.option("--text", type=FILE, help="Feature table of text features, labelled by class, instead of prompts.")
@click.option("--template", "template", multiple=True, help="Prompt with {} for the class; repeat for an ensemble.")
@click.option("--shots", type=SHOTS, help="Draw so many a class, as published.  [default: all]")
@options.VIEWS
@_INDEXING
@options.READING
@options.ENCODING
@click.pass_context
def build(
    ctx: click.Context,
    source: Path | str,
    out: Place,
    text: Path | None,
    template: tuple[str, ...],
    shots: int | None,
    views: ViewOptions,
    factory: str | None,
    dtype: Dtype,
    fit: FitName | None,
    metric: MetricName | None,
    values: ValuesName | None,
    alpha: float | None,
    beta: float | None,
    normalize: Normalize | None,
    k: KeysMet,
    logit_scale: float | None,
    reading: ReadingOptions,
    encoding: EncodingOptions,
) -> None:
    """Build an index from labelled images or features.

    SOURCE is a folder of class folders, a .csv, .tsv, .jsonl or .parquet with path and label, a feature table
    (.parquet with id, label and feature), a split .json (its train part), or webdataset tars
    ("shards/{000..099}.tar"); folders, tables and tars may lie on s3://, gs:// or az://. With --dataset, it is the
    folder that holds the datasets, and the prompts are the dataset's own.
    """
    from retrieval_tip.data.datasets import facts
    from retrieval_tip.index.build import build_index

    items = source_of(source, reading, "train")
    backbone = backbone_of(items, encoding, needed=text is None)
    words = backbone is not None and backbone.has_text and not text
    templates = template or (facts(items.dataset).templates if items.dataset and words else ())
    with encoder_of(ctx, backbone, encoding, views) as encoder:
        cache = build_index(
            items,
            out,
            encoder,
            shots=shots,
            templates=templates,
            text=text,
            index=factory,
            dtype=dtype,
            alpha=alpha,
            beta=beta,
            normalize=normalize,
            fit=fit,
            metric=metric,
            values=values,
            k=k,
            logit_scale=logit_scale,
            device=encoding.device,
        )
    version = cache.version or 1
    _say_version(out, version, _held(cache))
    if not ctx.obj:
        if "fit" in cache.provenance:
            say_fit(cache.provenance["fit"])
        if version > 1:
            restore = shlex.join(["retrieval-tip", "index", "rollback", str(out)])
            say(f"Version {version - 1} is kept; to restore it: {restore}")
        say(f"Next: {_next_step(out, cache)}")
    finish(ctx, encoder.skipped)


LEAST_RIGHT = 0.9
"""Estimated accuracy of a class below which a build suggests more photos of it."""


def _next_step(out: Place, cache: AnsweringIndex) -> str:
    """Return the command that helps most after a build: more photos of a weak class, else a look at the answers."""
    name, right, held = (cache.provenance.get("fit", {}).get("weakest") or [("", 1, 1)])[0]
    if right < LEAST_RIGHT * held:
        add, audit = (shlex.join(["retrieval-tip", "index", command, str(out)]) for command in ("add", "audit"))
        return f"add photos of {name} ({add} FOLDER), or check labels ({audit})"
    return shlex.join(["retrieval-tip", "serve", str(out)]) + " opens it in the browser"


@index.command("info")
@click.argument("folder", type=INDEX)
@options.JSON
def info(folder: Place, as_json: bool) -> None:
    """Describe an index: version, encoder, classes, settings."""
    from retrieval_tip.index.places import at

    facts = at(folder).describe()
    if as_json:
        click.echo(json_line(facts))
    else:
        print_facts(facts)


@index.command("list")
@click.argument("folder", type=FOLDER, default="indexes")
@options.FORMAT
def list_command(folder: Path, printing: OutputOptions) -> None:
    """List the indexes in a folder.

    Each has a name, version, keys, classes and encoder. The folder is indexes/ by default.
    """
    import pyarrow as pa

    from retrieval_tip.cli.output import write_rows
    from retrieval_tip.index.places import listed

    types = {"index": pa.string(), "version": pa.int64(), "keys": pa.int64(), "classes": pa.int64()}
    types |= {"backbone": pa.string(), "made": pa.string()}
    rows = [
        {
            "index": name,
            "version": one.version,
            "keys": one.n,
            "classes": len(one.class_names),
            "backbone": one.backbone["model"] if one.backbone else None,
            "made": one.created_at,
        }
        for name, one in listed(folder)
    ]
    write_rows(rows, types, printing.style, printing.output)


@index.command("verify")
@click.argument("folder", type=INDEX)
def verify(folder: Place) -> None:
    """Check every byte of an index and that its parts fit.

    In a bucket, check every row of the current version, and the small objects of earlier ones.
    """
    from retrieval_tip.index.places import at

    cache = at(folder).verify()
    about(folder, f"version {cache.version} is whole ({cache.n} keys, {len(cache.class_names)} classes)")


@index.command("query")
@click.argument("folder", type=INDEX)
@click.argument("sql")
@options.FORMAT
@click.option("--predictions", type=FILE, help="What classify wrote (.parquet, .csv, .json), as table predictions.")
@click.option("--timeout", type=click.IntRange(1, 86_400), default=60, show_default=True,
              help="Seconds that the answer may take.")  # fmt: skip
def query(folder: Place, sql: str, predictions: Path | None, timeout: int, printing: OutputOptions) -> None:
    """Query the label store with SQL.

    SQL is one SELECT, read-only, without access to other files. The table labels has key_id, class_id, label, source,
    shot, views, digest, added_at and the further columns of the table that the index was built from; the view
    class_counts has class_id, label and keys; the table versions is what index history prints. A fine-tuned index has
    its loss curve as table curve. With --predictions, what classify wrote is table predictions, to be joined.
    """
    from retrieval_tip.cli.output import write_table
    from retrieval_tip.index.places import at

    write_table(at(folder).query(sql, predictions, timeout), printing.style, printing.output)


@index.command("tune")
@click.argument("folder", type=FOLDER)
@click.option("--val", "source", type=SOURCE, required=True,
              help="Images or features to tune on, not the shots; of a split .json its val part.")  # fmt: skip
@click.option("--agreement", type=Number(0, 1, above=True), default=0.999, show_default=True,
              help="Share of the answers that have to be those over all keys.")  # fmt: skip
@click.option("--index", "factories", multiple=True,
              help="FAISS factory to try, repeat for more.  [default: Classes and an inverted file]")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Print, change nothing.")
@click.option("--plot", type=FILE, help="PNG or SVG file for cost and agreement (needs matplotlib).")
@options.ROOT
@options.FORMAT
@options.BACKBONE
@options.ENCODING
@click.pass_context
def tune_command(
    ctx: click.Context,
    folder: Path,
    source: Path | str,
    agreement: float,
    factories: tuple[str, ...],
    dry_run: bool,
    plot: Path | None,
    root: Path | None,
    printing: OutputOptions,
    encoding: EncodingOptions,
) -> None:
    """Find the cheapest index and k with the same answers.

    The answers have to be those over all keys; the choice makes a new version. Prints the settings that no cheaper one
    equals, and what a query costs with each here, in one batch. Labels are not needed. The answers over all keys stay
    what they are: -k all gives them.
    """
    import pyarrow as pa

    from retrieval_tip.cli.output import write_rows
    from retrieval_tip.index.tune import tune_on
    from retrieval_tip.report import plots

    if plot:
        plots.needs_matplotlib()
    cache = checked(folder, encoding.device, encoding.precision)
    val = source_of(source, ReadingOptions(root=root), "val", labelled=False)
    with encoder_for(ctx, cache, [val], encoding) as encoder:
        tuning = tune_on(cache, val, encoder, agreement=agreement, factories=factories)
    if plot:
        plots.write(lambda: plots.draw_frontier(tuning), plot, show(folder.name))
    types = {"index": pa.string(), "effort": pa.int64(), "k": pa.string(), "agreement": pa.float64()}
    types |= {"microseconds": pa.float64(), "chosen": pa.bool_()}
    rows = [vars(t) | {"k": str(t.k or "all"), "chosen": t is tuning.chosen} for t in tuning.trials if t.best]
    write_rows(rows, types, printing.style, printing.output)
    if not dry_run:
        tuning.apply(cache, folder)
        say(f"{folder}: version {cache.version}, {cache.index.factory}, k {cache.settings.k or 'all'}")
    finish(ctx, encoder.skipped)


def _ids(ctx: click.Context, _: click.Parameter, texts: tuple[str, ...]) -> list[int] | None:
    """Key ids, however many in each option; ``None`` where there is no option."""
    parts = [part.strip() for text in texts for part in text.split(",")]
    if wrong := [part for part in parts if not re.fullmatch(r"-?[0-9]{1,40}", part)]:
        raise click.BadParameter(f"{wrong[0]!r} is no key id, a whole number", ctx)
    return [int(part) for part in parts] if texts else None


_WHICH = options.several(
    click.option("--where", metavar="SQL", help="The keys that this condition over the label store holds for."),
    click.option("--key-ids", multiple=True, metavar="ID,...", callback=_ids,
                 help="The keys with these ids; repeat for more."),
)  # fmt: skip


@index.command("add")
@click.argument("folder", type=INDEX)
@click.argument("source", type=SOURCE)
@click.option("--text", type=FILE, help="Feature table of text features of the new classes, instead of prompts.")
@click.option("--shots", type=SHOTS, help="Draw so many a class, as published.  [default: all]")
@click.option("--views", type=VIEWS_COUNT, help="Views that a key is the mean of.  [default: as the index's]")
@click.option("--seed", type=SEED, help="Draws shots and views.  [default: the index's, else 1]")
@click.option("--skip-known", is_flag=True, help="Leave out images that the index has under the same label.")
@options.BACKBONE
@options.READING
@options.ENCODING
@click.pass_context
def add_command(
    ctx: click.Context,
    folder: Place,
    source: Path | str,
    text: Path | None,
    shots: int | None,
    views: int | None,
    seed: int | None,
    skip_known: bool,
    reading: ReadingOptions,
    encoding: EncodingOptions,
) -> None:
    """Add labelled images or features to an index.

    SOURCE is as for index build. Classes that are new come after those there are, with text weights from the index's
    templates or --text. It costs by what is added; index compact makes one of what was added since.
    """
    from retrieval_tip.index import changes

    origin, items = Origin.of(folder), source_of(source, reading, "train")
    manifest = origin.manifest
    new = not set(items.class_names) <= set(manifest.class_names)
    needed = new and text is None and bool(manifest.templates)
    built = manifest.built
    drawn = ViewOptions(built.views if views is None else views, built.seed if seed is None else seed)
    with encoder_for(ctx, origin, [items], encoding, drawn, needed=needed) as encoder:
        added = changes.add(folder, items, encoder, text=text, shots=shots, skip_known=skip_known, manifest=manifest)
    _say_added(folder, added, skip_known)
    finish(ctx, encoder.skipped)


@index.command("merge")
@click.argument("folder", type=INDEX)
@click.argument("others", nargs=-1, required=True, type=INDEX)
def merge_command(folder: Place, others: tuple[Place, ...]) -> None:
    """Add the keys of OTHERS to an index.

    They are indexes of the same encoder. Each makes a version.
    """
    from retrieval_tip.index import changes

    for other in others:
        _say_added(folder, changes.merge(folder, other))


@index.command("remove")
@click.argument("folder", type=INDEX)
@_WHICH
def remove_command(folder: Place, where: str | None, key_ids: list[int] | None) -> None:
    """Remove keys; their classes stay. Older versions have them until index gc."""
    from retrieval_tip.index import changes

    removed = changes.remove(folder, where=where, key_ids=key_ids)
    _say_version(folder, removed.version, f"{counted(len(removed.key_ids), 'key')} removed")


@index.command("relabel")
@click.argument("folder", type=INDEX)
@click.argument("label")
@_WHICH
def relabel_command(folder: Place, label: str, where: str | None, key_ids: list[int] | None) -> None:
    """Give keys to the class LABEL, one of the index's."""
    from retrieval_tip.index import changes

    changed = changes.relabel(folder, label, where=where, key_ids=key_ids)
    _say_version(folder, changed.version, f"{counted(len(changed.key_ids), 'key')} given to {label}")


@index.command("rename")
@click.argument("folder", type=INDEX)
@click.argument("old")
@click.argument("new")
@click.option("--encode", is_flag=True, help="Encode the new name in place of the old one's words.")
@options.grouped("backbone", BackboneOptions, options.BACKBONE, options.DEVICE)
def rename_command(folder: Place, old: str, new: str, encode: bool, backbone: BackboneOptions) -> None:
    """Rename the class OLD to NEW.

    If NEW is a class already, OLD is merged into it. Its words stay as they are encoded, unless --encode or a --model
    is given.
    """
    from retrieval_tip.index import changes

    encode = encode or backbone.model is not None
    loaded = backbone_for(Origin.of(folder), [], backbone, needed=True) if encode else None
    renamed = changes.rename(folder, old, new, loaded)
    what = f"merged {old} into {new}" if renamed.merged else f"renamed {old} to {new}"
    _say_version(folder, renamed.version, f"{what} ({counted(len(renamed.key_ids), 'key')})")


@index.command("set")
@click.argument("folder", type=INDEX)
@click.option("--alpha", type=NUMBER, help="Weight of the cache beside the text.")
@click.option("--beta", type=NUMBER, help="Sharpness of the affinity.")
@click.option("-k", "k", type=K(), help="Nearest keys that a query uses.")
@click.option("--tail/--no-tail", default=None, help="Estimate the keys that were not retrieved.")
@click.option("--temperature", type=POSITIVE, help="Divides the logits where they become probabilities.")
@click.option("--normalize", type=options.choice(Normalize),
              help="Alpha and beta in units of the shots there are now; both: as a new build has them.")  # fmt: skip
@click.option("--template", "template", multiple=True, help="Prompt with {} for the class; repeat for an ensemble.")
@options.grouped("backbone", BackboneOptions, options.BACKBONE, options.DEVICE)
def set_command(
    folder: Place,
    alpha: float | None,
    beta: float | None,
    k: KeysMet,
    tail: bool | None,
    temperature: float | None,
    normalize: Normalize | None,
    template: tuple[str, ...],
    backbone: BackboneOptions,
) -> None:
    """Change settings of an index. Templates replace its text weights.

    Another beta of a fitted index also fits its values, alpha and temperature again.
    """
    from retrieval_tip.index import changes

    changed = changes.configure(
        folder,
        alpha=alpha,
        beta=beta,
        k=k,
        tail=tail,
        temperature=temperature,
        normalize=normalize,
        templates=template,
        backbone=backbone_for(Origin.of(folder), [], backbone, needed=True) if template else None,
    )
    if changed.summary is not None:
        say(changed.summary)
    _say_version(folder, changed.version, "settings changed")


@index.command("compact")
@click.argument("folder", type=INDEX)
def compact_command(folder: Place) -> None:
    """Merge added segments into one, as a new build would."""
    from retrieval_tip.index import changes

    _say_version(folder, changes.compact(folder).version, "one segment")


@index.command("rebuild")
@click.argument("folder", type=INDEX)
@click.option("--index", "factory", help="FAISS factory string, Classes or auto.  [default: as it is]")
@click.option("--dtype", type=options.choice(Dtype), help="Type of the stored keys.  [default: theirs]")
def rebuild_command(folder: Place, factory: str | None, dtype: Dtype | None) -> None:
    """Rebuild the FAISS index from the keys.

    The index may be of another type, or the keys of another precision.
    """
    from retrieval_tip.index import changes

    _say_version(folder, changes.rebuild(folder, index=factory, dtype=dtype).version, "rebuilt")


@index.command("history")
@click.argument("folder", type=INDEX)
@options.FORMAT
def history_command(folder: Place, printing: OutputOptions) -> None:
    """List the kept versions of an index, oldest first."""
    from retrieval_tip.cli.output import write_table
    from retrieval_tip.index.places import at

    write_table(at(folder).history(), printing.style, printing.output)


@index.command("rollback")
@click.argument("folder", type=INDEX)
@click.option("--version", type=count(), help="Version to go back to.  [default: the one before]")
def rollback_command(folder: Place, version: int | None) -> None:
    """Make an earlier version the content of a new one."""
    from retrieval_tip.index import changes

    _say_version(folder, changes.rollback(folder, version).version, "rolled back")


@index.command("gc")
@click.argument("folder", type=INDEX)
@click.option("--keep", type=count(), default=1, show_default=True, help="Versions to keep, the last ones.")
def gc_command(folder: Place, keep: int) -> None:
    """Delete earlier versions, and the files that only they have.

    Photos that were added over HTTP, and that no kept version has, are deleted too: they are in FOLDER-shots.
    """
    from retrieval_tip.index import changes

    done = changes.gc(folder, keep)
    photos = f"{counted(done.photos, 'photo')} removed, " if done.photos else ""
    about(folder, f"{counted(len(done.versions), 'version')} given up, {photos}{done.freed:,} bytes freed")


@index.command("clone")
@click.argument("folder", type=INDEX)
@click.argument("out", type=INDEX)
@click.option("--version", type=count(), help="Version to copy.  [default: the current one]")
def clone_command(folder: Place, out: Place, version: int | None) -> None:
    """Copy an index into a new folder OUT, checked on the way."""
    from retrieval_tip.index import changes

    _say_version(out, changes.clone(folder, out, version).version, f"a copy of {folder}")


@index.command("export")
@click.argument("folder", type=FOLDER)
@click.option("--out", type=FILE, help="Feature table to write (.parquet).")
@click.option("--text", type=FILE, help="Feature table for the text weights, as index build --text takes it.")
@click.option("--onnx", type=FILE, help="ONNX graph to write, from pixels to logits (needs onnx).")
@click.option("--features", is_flag=True, help="With --onnx: from features to logits, without the image encoder.")
@click.option("--k", type=K(), help="With --onnx, all: as if every query met all keys, which a graph does.")
def export_command(
    folder: Path, out: Path | None, text: Path | None, onnx: Path | None, features: bool, k: KeysMet
) -> None:
    """Write keys as a feature table, or an index as ONNX.

    The ONNX graph holds the whole index, for any runtime.
    """
    from retrieval_tip.index.export import export_table, export_text

    if out is None and text is None and onnx is None:
        raise UsageError("index export: give --out, --text or --onnx FILE")
    cache = checked(folder, "cpu")
    if onnx is not None:
        from retrieval_tip.backbones.loading import load_backbone
        from retrieval_tip.index.onnx_graph import export_onnx

        named, backbone = cache.backbone, None
        if not features and named is not None:
            backbone = load_backbone(
                named.model, named.pretrained, device="cpu", precision="float32", runtime="torch", tuned=cache.tuned
            )
        facts = export_onnx(cache.with_settings(cache.settings.override(k=k)), onnx, backbone)
        given = "features" if backbone is None else "pixels"
        size, opset = facts["bytes"] / 1e6, facts["opset"]
        about(onnx, f"{given} to logits of {len(facts['labels'])} classes, {size:.1f} MB, opset {opset}")
    if out is not None:
        about(out, f"{export_table(cache, out)} rows")
    if text is not None:
        about(text, f"{export_text(cache, text)} rows")


@index.command("import")
@click.argument("source", type=FOLDER)
@OUT
@click.option("--classes", type=FILE, help="Text file of class names in order, one a line.  [default: class 0 ...]")
@click.option("--text", type=FILE, help="Feature table of text features, labelled by class.")
@options.NORMS
@click.option("--index", "factory", help="As for index build.")
@_KEYS
def import_command(
    source: Path,
    out: Place,
    classes: Path | None,
    text: Path | None,
    norms: Norms,
    factory: str | None,
    dtype: Dtype,
    alpha: float | None,
    beta: float | None,
) -> None:
    """Build an index from a cache of Tip-Adapter's code.

    SOURCE is its keys_16shots.pt, with values_16shots.pt beside it, or the folder of both. Keys of other programs
    become a feature table in ten lines of Python: docs/features.md.
    """
    from retrieval_tip.index.changes import import_index

    cache = import_index(
        source,
        out,
        classes=classes,
        text=text,
        norms=norms,
        index=factory,
        dtype=dtype,
        alpha=alpha,
        beta=beta,
    )
    _say_version(out, cache.version or 1, _held(cache))


@index.command("audit")
@click.argument("folder", type=INDEX)
@click.option("-k", "k", type=K(), help="Nearest keys that judge a shot, or all.  [default: all, while they are few]")
@click.option("--all", "borderline", is_flag=True, help="List borderline cases too.")
@click.option("--apply", "file", type=FILE,
              help="Relabel shots as this table suggests, in one new version; audit --output writes it.")  # fmt: skip
@options.FORMAT
@click.pass_context
def audit_command(
    ctx: click.Context, folder: Place, k: KeysMet, borderline: bool, file: Path | None, printing: OutputOptions
) -> None:
    """List shots that look mislabelled, or relabel them.

    Images that are in two classes are listed too. Each shot is judged by all others, without those of the same image;
    the most suspicious come first. Write the list with --output suspects.csv (or .json, .parquet), delete rows and
    change suggestions as you like, and give it to --apply. That reads three columns: key_id, label, which must still be
    the shot's label, and suggested, its new one.
    """
    if file is not None:
        from retrieval_tip.index.changes import apply_audit

        if k is not None or borderline or printing != OutputOptions(None, None):
            raise UsageError("--apply: takes no other option")
        changed = apply_audit(folder, file)
        _say_version(folder, changed.version, f"{counted(len(changed.key_ids), 'shot')} relabelled")
        return
    from retrieval_tip.cli.output import write_table
    from retrieval_tip.evaluation.audit import audit

    FOLDER.convert(folder, None, ctx)  # refuses an address
    cache = checked(Path(folder), "auto")
    write_table(audit(cache, k=k, borderline=borderline), printing.style, printing.output)


def _say_version(folder: Place, version: int, what: str) -> None:
    about(folder, f"version {version}, {what}")


def _held(cache: AnsweringIndex) -> str:
    return f"{counted(cache.n, 'key')} of {cache.d}, {counted(len(cache.class_names), 'class')}"


def _say_added(folder: Place, added: Added, skipped: bool = False) -> None:
    """Print how much was added, and warn of what is suspicious about it."""
    from retrieval_tip.index.items import warn_of

    what = f"{counted(len(added.key_ids), 'key')} added"
    if added.classes:
        what += f", {counted(len(added.classes), 'new class')}: {few(added.classes)}"
    if added.known and skipped:
        what += f", {counted(added.known, 'known image')} left out"
    _say_version(folder, added.version, what)
    if added.known and not skipped:
        known = counted(added.known, "image")
        warn([f"{known} of them were there already, under the same label; --skip-known would leave them out"])
    if added.duplicates is not None:
        warn_of(added.duplicates)
        if added.duplicates.compared == "digests":
            warn(["near-identical images were not looked for among so many keys: index audit does"])
