"""Commands under ``index``."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import click

from retrieval_tip.cli import options
from retrieval_tip.cli.group import Group
from retrieval_tip.cli.messages import about, command_line, finish, print_facts, say, say_fit, warn
from retrieval_tip.cli.opening import Origin, backbone_for, backbone_of, checked, encoder_for, encoder_of, source_of
from retrieval_tip.cli.options import BackboneOptions, EncodingOptions, OutputOptions, ReadingOptions, ViewOptions
from retrieval_tip.cli.parameters import (
    FILE,
    FOLDER,
    INDEX,
    NUMBER,
    POSITIVE,
    SEED,
    SOURCE,
    VIEWS_COUNT,
    K,
    Number,
    count,
)
from retrieval_tip.cli.recipe import recipe
from retrieval_tip.errors import UsageError, counted, few, json_line, show
from retrieval_tip.index.addresses import FORMS, KIND
from retrieval_tip.settings import BuildOptions, Dtype, KeysMet, Normalize, Precision

if TYPE_CHECKING:
    from retrieval_tip.index.changes import Added, Changed
    from retrieval_tip.index.places import Place
    from retrieval_tip.model import Index

OUT = click.option("--out", "--store", type=INDEX, required=True,
                   help=f"Index folder, or {KIND} ({FORMS}). If the index already exists, it gets a new "
                        "version.")  # fmt: skip


@click.group("index", cls=Group)
def index() -> None:
    """Build, inspect, query and change indexes."""


@index.command("build")
@click.argument("source", type=SOURCE)
@OUT
@click.option("--recipe", type=FILE, is_eager=True, expose_value=False, callback=recipe,
              help="TOML file that sets any of these options. Options on the command line override it.")  # fmt: skip
@options.BACKBONE
@options.building()
@options.VIEWS
@options.READING
@options.ENCODING
@click.pass_context
def build(
    ctx: click.Context,
    /,
    source: Path | str,
    out: Place,
    views: ViewOptions,
    reading: ReadingOptions,
    encoding: EncodingOptions,
    **build: Unpack[BuildOptions],
) -> None:
    """Build an index from labelled images or features.

    SOURCE can be a folder of class folders; a .csv, .tsv, .jsonl or .parquet table with the columns path and label; a
    feature table (.parquet with the columns id, label and feature); a split .json, whose train part is used; a
    .json in COCO's format or from Label Studio; or webdataset tars ("shards/{000..099}.tar"). Folders, tables and tars
    can also be on s3://, gs:// or az://. With --dataset, SOURCE is the folder that contains the datasets, and the
    prompts of the dataset are used.
    """
    from retrieval_tip.data.datasets import facts
    from retrieval_tip.index.build import build_index

    items = source_of(source, reading, "train")
    backbone = backbone_of(items, encoding, needed=build["text"] is None)
    if items.dataset and backbone is not None and backbone.has_text and not (build["text"] or build["templates"]):
        build["templates"] = facts(items.dataset).templates
    with encoder_of(ctx, backbone, encoding, views) as encoder:
        cache = build_index(items, out, encoder, device=encoding.device, **build)
    version = cache.version or 1
    _say_version(out, version, _held(cache))
    if not ctx.obj:
        if build["drop_suspicious"]:
            dropped = cache.provenance["dropped"]
            named = f": {few(dropped['sources'], dropped['shots'])}" if dropped["shots"] else ""
            say(f"Left out {dropped['shots']:,} of {counted(dropped['of'], 'shot')} with suspicious labels{named}")
        if "fit" in cache.provenance:
            say_fit(cache.provenance["fit"])
        if version > 1:
            say(f"Version {version - 1} is kept. To restore it, run: {command_line('index', 'rollback', out)}")
        say(f"Next: {_next_step(out, cache)}")
    finish(ctx, encoder.skipped)


LEAST_RIGHT = 0.9
"""If the estimated accuracy of a class is lower than this, a build suggests adding photos to the class."""


def _next_step(out: Place, cache: Index) -> str:
    from retrieval_tip.evaluation.audit import CHEAP, gain

    add, audit = (command_line("index", command, out) for command in ("add", "audit"))
    if cache.n <= CHEAP and "dropped" not in cache.provenance and (gained := gain(cache.in_memory())) is not None:
        return (
            f"leave out {counted(gained.shots, 'shot')} with suspicious labels (--drop-suspicious), which increases "
            f"the accuracy on the other photos from {100 * gained.before:.1f} % to {100 * gained.after:.1f} %, or "
            f"check these labels ({audit})"
        )
    name, right, held = (cache.provenance.get("fit", {}).get("weakest") or [("", 1, 1)])[0]
    if right < LEAST_RIGHT * held:
        return f"add photos of {name} ({add} FOLDER), or check labels ({audit})"
    return f"{command_line('serve', out)} opens it in the browser"


@index.command("info")
@options.INDEX_ARGUMENT
@options.JSON
def info(folder: Place, as_json: bool) -> None:
    """Show the version, encoder, classes and settings of an index."""
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

    FOLDER defaults to indexes. For each index, shows its name, version, encoder and creation time, and the number of
    its keys and classes.
    """
    import pyarrow as pa

    from retrieval_tip.cli.output import write_rows
    from retrieval_tip.index.places import listed

    types = {"index": pa.string(), "version": pa.int64(), "keys": pa.int64(), "classes": pa.int64()}
    types |= {"backbone": pa.string(), "made": pa.string()}
    rows = (
        (name, one.version, one.n, len(one.class_names), (one.backbone or {}).get("model"), one.created_at)
        for name, one in listed(folder)
    )
    write_rows([dict(zip(types, row, strict=True)) for row in rows], types, printing.style, printing.output)


@index.command("verify")
@options.INDEX_ARGUMENT
def verify(folder: Place) -> None:
    """Check that an index is undamaged.

    Checks every byte of the index, and that its parts match. For an index in a bucket, checks every row of the current
    version and the small objects of earlier versions.
    """
    from retrieval_tip.index.places import at

    cache = at(folder).verify()
    about(folder, f"version {cache.version} is intact ({_held(cache)})")


@index.command("query")
@options.INDEX_ARGUMENT
@click.argument("sql")
@options.FORMAT
@click.option("--predictions", type=FILE,
              help="Output of classify (.parquet, .csv or .json), to be used as the table predictions.")  # fmt: skip
@click.option("--timeout", type=click.IntRange(1, 86_400), default=60, show_default=True,
              help="Time limit for the query, in seconds.")  # fmt: skip
def query(folder: Place, sql: str, predictions: Path | None, timeout: int, printing: OutputOptions) -> None:
    """Query the label store with SQL.

    SQL is a single SELECT statement. It is read-only and cannot access other files. You can query these tables:

    The table labels has the columns key_id, class_id, label, source, shot, views, digest and added_at, and any further
    columns of the table that the index was built from. The view class_counts has the columns class_id, label and keys.
    The table versions contains the output of index history. If the index is fine-tuned, the table curve contains its
    loss curve. If you give --predictions, the table predictions contains the rows of that file.
    """
    from retrieval_tip.cli.output import write_table
    from retrieval_tip.index.places import at

    write_table(at(folder).query(sql, predictions, timeout), printing.style, printing.output)


@index.command("tune")
@options.FOLDER_ARGUMENT
@click.option("--val", "source", type=SOURCE, required=True,
              help="Images or features to tune on. Do not use the shots. The val part of a split .json is "
                   "used.")  # fmt: skip
@click.option("--agreement", type=Number(0, 1, above=True), default=0.999, show_default=True,
              help="Minimum share of answers that must equal those of an exact search over all keys.")  # fmt: skip
@click.option("--index", "factories", multiple=True,
              help="FAISS factory string to try. Can be repeated.  "
                   "[default: Classes and an inverted file]")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Print the results, but do not change the index.")
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
    root: Path | str | None,
    printing: OutputOptions,
    encoding: EncodingOptions,
) -> None:
    """Find the cheapest index and k that give the same answers.

    Compares the answers of each candidate with the answers of a search over all keys, and measures the cost per query
    on this machine in one batch. Prints every candidate that has no cheaper alternative with the same agreement, and
    saves the cheapest one that reaches --agreement as a new version. The images do not have to be labelled. You can
    still search all keys of a tuned index with -k all.
    """
    import pyarrow as pa

    from retrieval_tip.cli.output import write_rows
    from retrieval_tip.index.tune import tune_on

    cache = checked(folder, encoding.device, encoding.precision)
    val = source_of(source, ReadingOptions(root=root), "val", labelled=False)
    with encoder_for(ctx, cache, [val], encoding) as encoder:
        tuning = tune_on(cache, val, encoder, agreement=agreement, factories=factories)
    types = {"index": pa.string(), "effort": pa.int64(), "k": pa.string(), "agreement": pa.float64()}
    types |= {"microseconds": pa.float64(), "chosen": pa.bool_()}
    rows = [vars(t) | {"k": str(t.k or "all"), "chosen": t is tuning.chosen} for t in tuning.trials if t.best]
    write_rows(rows, types, printing.style, printing.output)
    if not dry_run:
        tuning.apply(cache, folder)
        say(f"{folder}: version {cache.version}, {cache.index_type}, k {cache.settings.k or 'all'}")
    finish(ctx, encoder.skipped)


def _ids(ctx: click.Context, _: click.Parameter, texts: tuple[str, ...]) -> list[int] | None:
    parts = [part.strip() for text in texts for part in text.split(",")]
    if wrong := [part for part in parts if not re.fullmatch(r"-?[0-9]{1,40}", part)]:
        raise click.BadParameter(f"{wrong[0]!r} is not a key id; give whole numbers", ctx)
    return [int(part) for part in parts] if texts else None


_WHICH = options.several(
    click.option("--where", metavar="SQL", help="SQL condition on the label store that selects the shots."),
    click.option("--key-ids", multiple=True, metavar="ID,...", callback=_ids,
                 help="Key ids of the shots. Can be repeated."),
)  # fmt: skip


@index.command("add")
@options.INDEX_ARGUMENT
@click.argument("source", type=SOURCE)
@click.option("--text", type=FILE,
              help="Feature table of text features for new classes, which are used instead of prompts.")  # fmt: skip
@options.building("shots")
@click.option("--views", type=VIEWS_COUNT,
              help="Number of views to average per key.  [default: the same as in the index]")  # fmt: skip
@click.option("--seed", type=SEED,
              help="Seed for drawing shots and views.  [default: the seed of the index, or 1]")  # fmt: skip
@click.option("--skip-known", is_flag=True, help="Skip images that are already in the index under the same label.")
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

    SOURCE can be anything that index build accepts. New classes are appended to the index, and their text weights come
    from the templates of the index or from --text.
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
@options.INDEX_ARGUMENT
@click.argument("others", nargs=-1, required=True, type=INDEX)
def merge_command(folder: Place, others: tuple[Place, ...]) -> None:
    """Add the shots of other indexes to an index.

    OTHERS are indexes built with the same encoder. A new version is made for each index.
    """
    from retrieval_tip.index import changes

    for other in others:
        _say_added(folder, changes.merge(folder, other))


@index.command("remove")
@options.INDEX_ARGUMENT
@_WHICH
def remove_command(folder: Place, where: str | None, key_ids: list[int] | None) -> None:
    """Remove shots from an index.

    The classes of these shots stay in the index. Earlier versions still contain the shots until you delete those
    versions with index gc.
    """
    from retrieval_tip.index import changes

    removed = changes.remove(folder, where=where, key_ids=key_ids)
    _say_version(folder, removed.version, f"removed {counted(len(removed.key_ids), 'shot')}")
    _say_fitted(folder, removed)


@index.command("relabel")
@options.INDEX_ARGUMENT
@click.argument("label")
@_WHICH
def relabel_command(folder: Place, label: str, where: str | None, key_ids: list[int] | None) -> None:
    """Move shots to another class.

    LABEL must be a class of the index. To add a class, use index add. To rename a class, use index rename.
    """
    from retrieval_tip.index import changes

    changed = changes.relabel(folder, label, where=where, key_ids=key_ids)
    _say_version(folder, changed.version, f"relabelled {counted(len(changed.key_ids), 'shot')} as {label}")
    _say_fitted(folder, changed)


@index.command("rename")
@options.INDEX_ARGUMENT
@click.argument("old")
@click.argument("new")
@click.option("--encode", is_flag=True, help="Encode the new name, and replace the text weights with the result.")
@options.grouped("backbone", BackboneOptions, options.BACKBONE, options.DEVICE)
def rename_command(folder: Place, old: str, new: str, encode: bool, backbone: BackboneOptions) -> None:
    """Rename the class OLD to NEW.

    If the class NEW already exists, OLD is merged into it. The text weights stay unchanged unless you give --encode or
    --model.
    """
    from retrieval_tip.index import changes

    encode = encode or backbone.model is not None
    loaded = backbone_for(Origin.of(folder), [], backbone, needed=True) if encode else None
    renamed = changes.rename(folder, old, new, loaded)
    what = f"merged {old} into {new}" if renamed.merged else f"renamed {old} to {new}"
    _say_version(folder, renamed.version, f"{what} ({counted(len(renamed.key_ids), 'shot')})")
    _say_fitted(folder, renamed)


@index.command("set")
@options.INDEX_ARGUMENT
@click.option("--alpha", type=NUMBER, help="Weight of the cache relative to the text.")
@click.option("--beta", type=NUMBER, help="Sharpness of the affinity.")
@click.option("-k", "k", type=K(), help="Number of nearest keys to use per query.")
@click.option("--tail/--no-tail", default=None,
              help="Whether to estimate the contribution of keys that are not retrieved.")  # fmt: skip
@click.option("--temperature", type=POSITIVE, help="Temperature T of the probabilities, softmax(logits / T).")
@click.option("--normalize", type=options.choice(Normalize),
              help="Units of alpha and beta, measured on the current shots. index build uses both.")  # fmt: skip
@options.building("templates")
@options.grouped("backbone", BackboneOptions, options.BACKBONE, options.DEVICE)
def set_command(
    folder: Place,
    alpha: float | None,
    beta: float | None,
    k: KeysMet,
    tail: bool | None,
    temperature: float | None,
    normalize: Normalize | None,
    templates: tuple[str, ...],
    backbone: BackboneOptions,
) -> None:
    """Change the settings of an index.

    If you give templates, new text weights are encoded from them. If you change the beta of a fitted index, its values
    and all other fitted settings are also fitted again.
    """
    from retrieval_tip.index import changes

    loaded = backbone_for(Origin.of(folder), [], backbone, needed=True) if templates else None
    changed = changes.configure(
        folder, alpha=alpha, beta=beta, k=k, tail=tail, temperature=temperature, normalize=normalize,
        templates=templates, backbone=loaded,
    )  # fmt: skip
    if changed.summary is not None:
        say(changed.summary)
    _say_version(folder, changed.version, "settings changed")


@index.command("rebuild")
@options.INDEX_ARGUMENT
@click.option("--index", "factory", help="FAISS factory string, Classes or auto.  [default: unchanged]")
@click.option("--dtype", type=options.choice(Dtype), help="Data type of the stored keys.  [default: unchanged]")
def rebuild_command(folder: Place, factory: str | None, dtype: Dtype | None) -> None:
    """Rebuild the FAISS index from the keys.

    Use --index to change the index type, and --dtype to change the precision of the keys.
    """
    from retrieval_tip.index import changes

    _say_version(folder, changes.rebuild(folder, index=factory, dtype=dtype).version, "rebuilt")


@index.command("history")
@options.INDEX_ARGUMENT
@options.FORMAT
def history_command(folder: Place, printing: OutputOptions) -> None:
    """List the versions of an index, starting with the oldest."""
    from retrieval_tip.cli.output import write_table
    from retrieval_tip.index.places import at

    write_table(at(folder).history(), printing.style, printing.output)


@index.command("rollback")
@options.INDEX_ARGUMENT
@click.option("--version", type=count(), help="Version to restore.  [default: the previous one]")
def rollback_command(folder: Place, version: int | None) -> None:
    """Restore an earlier version of an index.

    The restored version is saved as a new version, so the current version is kept.
    """
    from retrieval_tip.index import changes

    _say_version(folder, changes.rollback(folder, version).version, "rolled back")


@index.command("gc")
@options.INDEX_ARGUMENT
@click.option("--keep", type=count(), default=1, show_default=True, help="Number of latest versions to keep.")
def gc_command(folder: Place, keep: int) -> None:
    """Delete earlier versions and the files that only they use.

    Photos that were added over HTTP (in INDEX-shots) are also deleted if no remaining version uses them.
    """
    from retrieval_tip.index import changes

    done = changes.gc(folder, keep)
    photos = f" and {counted(done.photos, 'photo')}" if done.photos else ""
    about(folder, f"deleted {counted(len(done.versions), 'version')}{photos}, freed {done.freed:,} bytes")


@index.command("clone")
@options.INDEX_ARGUMENT
@click.argument("out", type=INDEX)
@click.option("--version", type=count(), help="Version to copy.  [default: the current one]")
def clone_command(folder: Place, out: Place, version: int | None) -> None:
    """Copy an index to OUT and verify the copied files."""
    from retrieval_tip.index import changes

    _say_version(out, changes.clone(folder, out, version).version, f"copied from {folder}")


@index.command("export")
@options.FOLDER_ARGUMENT
@click.option("--out", type=FILE, help="Feature table to write (.parquet).")
@click.option("--text", type=FILE,
              help="Feature table to write for the text weights. You can pass it to index build --text.")  # fmt: skip
@click.option("--onnx", type=FILE,
              help="ONNX file to write. Its graph computes logits from pixels (requires onnx).")  # fmt: skip
@click.option("--features", is_flag=True,
              help="With --onnx, compute logits from features, and leave out the image encoder.")  # fmt: skip
@click.option("--k", type=K(),
              help="With --onnx, give all if the index uses the k nearest keys, because a graph can only use all "
                   "keys.")  # fmt: skip
@click.option("--precision", type=click.Choice(["float32", "int8"]), default="float32", show_default=True,
              help="With --onnx, precision of the image encoder. With int8, the file is smaller. It then contains the "
                   "encoder that models --int8 stored.")  # fmt: skip
def export_command(
    folder: Path,
    out: Path | None,
    text: Path | None,
    onnx: Path | None,
    features: bool,
    k: KeysMet,
    precision: Precision,
) -> None:
    """Export the keys as a feature table, or the index as ONNX.

    The ONNX graph contains the whole index and runs in any ONNX runtime.
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
            backbone = load_backbone(named.model, named.pretrained, device="cpu", precision=precision, lazy=True)
        asked = cache.with_settings(cache.settings.override(k=k))
        facts = export_onnx(asked, onnx, backbone)
        given = "features" if backbone is None else "pixels"
        size, classes = f"{facts['bytes'] / 1e6:.1f} MB", counted(len(facts["labels"]), "class")
        about(onnx, f"{given} to logits of {classes}, {size}, opset {facts['opset']}")
        if (agreement := facts["agreement"]) is None:
            warn([f"{show(onnx)}: not compared with the package, because no photo of the index could be read"])
        else:
            of = counted(agreement["n"], "photo" if backbone is not None else "key")
            most = max(1e-4, math.ceil(1e4 * agreement["difference"]) / 1e4)
            same = f"{agreement['equal']} of {of} classified as by the package"
            about(onnx, f"{same}, with probabilities within {most:.4f}")
    if out is not None:
        about(out, f"{export_table(cache, out)} rows")
    if text is not None:
        about(text, f"{export_text(cache, text)} rows")


@index.command("audit")
@options.INDEX_ARGUMENT
@click.option("-k", "k", type=K(),
              help="Number of nearest keys used to check each shot, or all.  "
                   "[default: all in small indexes]")  # fmt: skip
@click.option("--all", "borderline", is_flag=True, help="Also list borderline cases.")
@click.option("--apply", "file", type=FILE,
              help="Table written by audit --output, whose suggestions are applied in one new version.")  # fmt: skip
@options.FORMAT
@click.pass_context
def audit_command(
    ctx: click.Context, folder: Place, k: KeysMet, borderline: bool, file: Path | None, printing: OutputOptions
) -> None:
    """List shots that look mislabelled, or relabel them.

    Each shot is classified with all other shots, excluding those of the same image. The most suspicious shots are
    listed first. Images that appear in two classes are also listed.

    To correct labels, save the list with --output suspects.csv (you can also use .json or .parquet). Delete rows or
    edit the suggestions, and then pass the file to --apply. Only the columns key_id, label and suggested are read. The
    column suggested contains the new label of a shot, and label must still be its current label.
    """
    if file is not None:
        from retrieval_tip.index.changes import apply_audit

        if k is not None or borderline or printing != OutputOptions(None, None):
            raise UsageError("--apply: cannot be combined with other options")
        changed = apply_audit(folder, file)
        _say_version(folder, changed.version, f"relabelled {counted(len(changed.key_ids), 'shot')}")
        _say_fitted(folder, changed)
        return
    from retrieval_tip.cli.output import write_table
    from retrieval_tip.evaluation.audit import audit

    FOLDER.convert(folder, None, ctx)  # rejects an address
    cache = checked(Path(folder), "auto")
    write_table(audit(cache, k=k, borderline=borderline), printing.style, printing.output)


def _say_version(folder: Place, version: int, what: str) -> None:
    about(folder, f"version {version}, {what}")


def _held(cache: Index) -> str:
    return f"{counted(cache.n, 'shot')}, {counted(len(cache.class_names), 'class')}"


def _say_added(folder: Place, added: Added, skipped: bool = False) -> None:
    from retrieval_tip.index.items import warn_of

    what = f"added {counted(len(added.key_ids), 'shot')}"
    if added.classes:
        what += f", {counted(len(added.classes), 'new class')}: {few(added.classes)}"
    if added.known and skipped:
        what += f", skipped {counted(added.known, 'known image')}"
    _say_version(folder, added.version, what)
    if added.known and not skipped:
        known = counted(added.known, "image", "was", "were")
        warn([f"{known} already in the index under the same label; use --skip-known to skip such images"])
    if added.duplicates is not None:
        warn_of(added.duplicates)
        if added.duplicates.compared == "digests":
            warn(["the index is too large to search for near-identical images now; use index audit"])
    _say_fitted(folder, added)


def _say_fitted(folder: Place, changed: Changed) -> None:
    if changed.fit is not None:
        warn(changed.fit.warnings)
        say("Fitted again, because the index has changed a lot.")
        say_fit(changed.fit.provenance())
    elif changed.fit_due:
        warn([f"the index has changed a lot since it was fitted; fit it again: {command_line('fit', folder)}"])
