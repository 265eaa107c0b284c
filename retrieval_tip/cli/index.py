"""Commands under ``index``."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from retrieval_tip import hooks
from retrieval_tip.cli import kinds, options
from retrieval_tip.cli.group import Group, Option, PluginCommand, grouped
from retrieval_tip.cli.kinds import Place
from retrieval_tip.cli.messages import about, finish, note, print_result, quiet, say, say_fit, warn
from retrieval_tip.cli.opening import backbone_for, reader_for, source_of, store_of
from retrieval_tip.cli.options import BackboneOptions, OutputOptions, SourceOptions, ViewOptions
from retrieval_tip.errors import UsageError
from retrieval_tip.hooks import argument, flag, option
from retrieval_tip.settings import Ask, BuildOptions, Dtype, Precision
from retrieval_tip.store.address import FORMS, KIND
from retrieval_tip.wording import command_line, counted, few, show

if TYPE_CHECKING:
    from retrieval_tip.index.places import Changed
    from retrieval_tip.model import Index


@click.group("index", cls=Group)
def index() -> None:
    """Build, inspect, query and change indexes."""


@index.command()
def build(
    source: Place = argument(kinds.SOURCE),
    out: Place = option(
        kinds.INDEX,
        "--out",
        "-o",
        required=True,
        help=f"Index folder, or {KIND} ({FORMS}). If the index already exists, it gets a new version.",
    ),
    build: BuildOptions = options.building(),
    encoding: ViewOptions = options.VIEWS,
) -> None:
    """Build an index from labelled images or features.

    SOURCE can be a folder of class folders; a .csv, .tsv or .parquet table with the columns path and label; a
    feature table (.parquet with the columns id, label and feature); a split .json, whose train part is used; a
    .json in COCO's format or from Label Studio; a Hugging Face dataset (hf-dataset:ORG/NAME). Folders and tables can
    also be on s3://, gs:// or az://.

    Examples:
        index build photos --out indexes/things
        index build photos --model dinov2 --out indexes/things
    """
    from retrieval_tip.index.build import build_index
    from retrieval_tip.index.items import planned

    items = source_of(source, encoding, "train")
    planned(build)  # raises an error before an encoder is loaded
    with reader_for(None, [items], encoding, needed=build["text"] is None) as reader:
        loaded = build_index(items, out, reader, device=encoding.device, **build)
    version = loaded.version or 1
    about(out, f"version {version}, {_held(loaded)}")
    if not quiet():
        if "fit" in loaded.provenance:
            say_fit(loaded.provenance["fit"])
        if version > 1:
            say(
                f"Version {version - 1} is kept. To restore it, run: {command_line('index', 'rollback', out)}"
            )
        is_list = items.table is not None or encoding.root or encoding.split
        say(f"Next: {_next_step(out, loaded, 'PHOTOS' if is_list else source)}")
    finish(reader.skipped)


LEAST_RIGHT, LEAST_BOTH = 0.9, 0.8
"""If the estimated accuracy of a class is lower than this, a build suggests adding photos to the class.

If the accuracy on all classes is lower than the last constant, it suggests trying other encoders.
"""


def _next_step(out: Place, index: Index, photos: Place) -> str:
    from retrieval_tip.backbones.base import spelled

    fit = index.provenance.get("fit", {})
    name, right, held = (fit.get("weakest") or [("", 1, 1)])[0]
    both = fit.get("both")
    if both is not None and both < LEAST_BOTH and not index.parts and index.backbone is not None:
        encoder = spelled(index.backbone.model, index.backbone.pretrained)
        return f"another encoder may help ({command_line('models', '--try', photos, '--model', encoder)})"
    if right < LEAST_RIGHT * held:
        add = command_line("index", "add", out, "FOLDER")
        audit = command_line("index", "audit", out)
        return f"add photos of {name} ({add}), or check labels ({audit})"
    return f"open it in the browser ({command_line('serve', out)})"


@index.command()
def info(folder: Place = options.INDEX_ARGUMENT, as_json: bool = options.JSON) -> None:
    """Show the version, encoder, classes and settings of an index.

    Examples:
        index info indexes/things
        index info indexes/things --json
    """
    print_result(store_of(folder).describe(), as_json)


@index.command()
def list_command(
    folder: Path = argument(kinds.FOLDER, default="indexes"),
    printing: OutputOptions = options.FORMAT,
) -> None:
    """List the indexes in a folder.

    FOLDER defaults to indexes. For each index, shows its name, version, encoder and creation time, and the number of
    its keys and classes.

    Examples:
        index list
        index list /data/indexes --format json
    """
    from retrieval_tip.index.places import listed

    types = {
        "index": str,
        "version": int,
        "keys": int,
        "classes": int,
        "backbone": str,
        "made": str,
    }
    rows = (
        (
            name,
            manifest.version,
            manifest.n,
            len(manifest.class_names),
            manifest.identity and manifest.identity.model,
            manifest.created_at,
        )
        for name, manifest in listed(folder)
    )
    printing.write_rows(rows, types)


@index.command()
def verify(folder: Place = options.INDEX_ARGUMENT) -> None:
    """Check that an index is undamaged.

    Checks every byte of the index, and that its parts match. For an index in a bucket, checks every row of the current
    version and the small objects of earlier versions.

    Examples:
        index verify indexes/things
        index verify s3://bucket/things
    """
    loaded = store_of(folder).verify()
    about(folder, f"version {loaded.version} is intact ({_held(loaded)})")


@index.command()
def query(
    folder: Place = options.INDEX_ARGUMENT,
    sql: str = argument(),
    printing: OutputOptions = options.FORMAT,
    timeout: int = option(click.IntRange(1, 86_400), default=60),
) -> None:
    """Query the label store with SQL.

    SQL is a single SELECT statement. It is read-only and cannot access other files. You can query these tables:

    The table labels has the columns key_id, class_id, label, source, shot, views, digest and added_at, and any further
    columns of the table that the index was built from. The view class_counts has the columns class_id, label and keys.
    The table versions contains the output of index history. If the index is fine-tuned, the table curve contains its
    loss curve.

    Options:
        timeout: Time limit for the query, in seconds.

    Examples:
        index query indexes/things "SELECT * FROM class_counts"
        index query indexes/things "SELECT source FROM labels WHERE label = 'cat'" --out cats.csv
    """
    printing.write_table(store_of(folder).query(sql, timeout))


def _ids(ctx: click.Context, _: click.Parameter, texts: tuple[str, ...]) -> list[int] | None:
    numbers = [number.strip() for list_text in texts for number in list_text.split(",")]
    if wrong := [number for number in numbers if not re.fullmatch(r"-?[0-9]{1,40}", number)]:
        raise click.BadParameter(f"{wrong[0]!r} is not a key id; give whole numbers", ctx)
    return [int(number) for number in numbers] if texts else None


@dataclass(frozen=True)
class ShotOptions:
    """Options that select shots of an index.

    Options:
        where: SQL condition on the label store that selects the shots.
        key_ids: Key ids of the shots.
    """

    where: str | None = option(metavar="SQL")
    key_ids: list[int] | None = option(multiple=True, metavar="ID,...", callback=_ids)


@index.command()
def add_command(
    folder: Place = options.INDEX_ARGUMENT,
    source: Place = argument(kinds.SOURCE),
    text: Path | None = option(kinds.FILE),
    drawn: dict[str, Any] = options.building("shots"),
    encoding: SourceOptions = options.SOURCES,
) -> None:
    """Add labelled images or features to an index.

    SOURCE can be anything that index build accepts. Images that the index already has under the same label are skipped.
    New classes are appended to the index, and their text weights come from the templates of the index or from --text.

    Options:
        text: Feature table of text features for new classes, which are used instead of prompts.

    Examples:
        index add indexes/things more
        index add indexes/things more --shots 16
    """
    from retrieval_tip.data.sources import check_exists
    from retrieval_tip.index import changes

    manifest = store_of(folder).manifest()
    items = source_of(source, encoding, "train")
    check_exists(text)
    new = not set(items.class_names) <= set(manifest.class_names)
    needed = new and text is None and bool(manifest.templates)
    encoding = replace(encoding, views=manifest.built.views, seed=manifest.built.seed)
    with reader_for(manifest, [items], encoding, needed=needed) as reader:
        added = changes.add(folder, items, reader, text=text, **drawn)
    _say_added(folder, added)
    finish(reader.skipped)


@index.command()
def merge_command(
    folder: Place = options.INDEX_ARGUMENT,
    others: tuple[Place, ...] = argument(kinds.INDEX, nargs=-1, required=True),
) -> None:
    """Add the shots of other indexes to an index.

    OTHERS are indexes built with the same encoder. A new version is made for each index.

    Examples:
        index merge indexes/things indexes/others
        index merge indexes/all indexes/a indexes/b
    """
    from retrieval_tip.index import changes

    for other in others:
        _say_added(folder, changes.merge(folder, other))


@index.command()
def remove_command(
    folder: Place = options.INDEX_ARGUMENT, which: ShotOptions = grouped(ShotOptions)
) -> None:
    """Remove shots from an index.

    The classes of these shots stay in the index. Earlier versions still contain the shots until you delete those
    versions with index gc --keep 1.

    Examples:
        index remove indexes/things --key-ids 3,17
        index remove indexes/things --where "label = 'cat'"
    """
    from retrieval_tip.index import changes

    removed = changes.remove(folder, where=which.where, key_ids=which.key_ids)
    _say_changed(folder, removed, f"removed {counted(len(removed.key_ids), 'shot')}")


@index.command()
def relabel_command(
    folder: Place = options.INDEX_ARGUMENT,
    label: str = argument(),
    which: ShotOptions = grouped(ShotOptions),
) -> None:
    """Move shots to another class.

    LABEL must be a class of the index. To add a class, use index add. To rename a class, use index rename.

    Examples:
        index relabel indexes/things cat --key-ids 3
        index relabel indexes/things cat --where "source LIKE '%tabby%'"
    """
    from retrieval_tip.index import changes

    changed = changes.relabel(folder, label, where=which.where, key_ids=which.key_ids)
    _say_relabelled(folder, changed, f" as {label}")


@index.command()
def rename_command(
    folder: Place = options.INDEX_ARGUMENT,
    old: str = argument(),
    new: str = argument(),
    encode: bool = flag(),
    backbone: BackboneOptions = options.BACKBONE,
) -> None:
    """Rename the class OLD to NEW.

    If the class NEW already exists, OLD is merged into it. The text weights stay unchanged unless you give --encode or
    --model.

    Options:
        encode: Encode the new name, and replace the text weights with the result.

    Examples:
        index rename indexes/things cat tabby
        index rename indexes/things cat 'tabby cat' --encode
    """
    from retrieval_tip.index import changes

    encode = encode or backbone.model is not None
    loaded = (
        backbone_for(store_of(folder).manifest(), [], backbone, needed=True) if encode else None
    )
    renamed = changes.rename(folder, old, new, loaded)
    what = f"merged {old} into {new}" if renamed.merged else f"renamed {old} to {new}"
    _say_changed(folder, renamed, f"{what} ({counted(len(renamed.key_ids), 'shot')})")


@index.command()
def set_command(
    folder: Place = options.INDEX_ARGUMENT,
    ask: Ask = grouped(Ask, options.ASKING),
    temperature: float | None = option(kinds.POSITIVE),
    more: dict[str, Any] = options.building("templates", "groups"),
    factory: str | None = option(None, "--index"),
    dtype: Dtype | None = option(options.choice(Dtype)),
    backbone: BackboneOptions = options.BACKBONE,
) -> None:
    """Change the settings of an index.

    If you give templates, new text weights are encoded from them. If you change the beta of a fitted index, its values
    and all other fitted settings are also fitted again. With --index or --dtype, the index is rebuilt from its keys.

    Options:
        temperature: Temperature T of the probabilities, softmax(logits / T).
        factory: Index type to rebuild the index with: a FAISS factory string, Classes or auto.
        dtype: Data type of the stored keys.

    Examples:
        index set indexes/things --alpha 2 --beta 5.5
        index set indexes/things --dtype float16
    """
    from retrieval_tip.data.sources import check_exists
    from retrieval_tip.index import changes

    check_exists(more["groups"])
    loaded = (
        backbone_for(store_of(folder).manifest(), [], backbone, needed=True)
        if more["templates"]
        else None
    )
    new: dict[str, Any] = {"index": factory, "dtype": dtype}
    settings: dict[str, Any] = {name: getattr(ask, name) for name in options.ASKING}
    others = (*settings.values(), *more.values(), temperature)
    if any(new.values()):
        if any(value not in (None, ()) for value in others):
            raise UsageError(
                "index set: change the index type and other settings one after the other"
            )
        _say_changed(folder, changes.rebuild(folder, **new), "rebuilt")
        return
    changed = changes.configure(
        folder, **settings, **more, temperature=temperature, backbone=loaded
    )
    if changed.fit is not None:
        say(str(changed.fit))
    about(folder, f"version {changed.version}, settings changed")


@index.command()
def history_command(
    folder: Place = options.INDEX_ARGUMENT, printing: OutputOptions = options.FORMAT
) -> None:
    """List the versions of an index, starting with the oldest.

    Examples:
        index history indexes/things
        index history indexes/things --format json
    """
    printing.write_table(store_of(folder).history())


@index.command()
def rollback_command(
    folder: Place = options.INDEX_ARGUMENT,
    version: int | None = argument(kinds.count(), required=False),
) -> None:
    """Restore an earlier version of an index.

    Without VERSION, the previous version is restored. It is saved as a new version, so the current version is kept.

    Examples:
        index rollback indexes/things
        index rollback indexes/things 2
    """
    from retrieval_tip.index import changes

    done = changes.rollback(folder, version)
    if done.version == version:  # a version that is restored gets a new number
        about(folder, f"version {version} is current already; nothing changed")
    else:
        _say_changed(folder, done, "rolled back")


@index.command()
def gc_command(
    folder: Place = options.INDEX_ARGUMENT, keep: int = option(kinds.count(), default=10)
) -> None:
    """Delete earlier versions and the files that only they use.

    Photos that were added over HTTP (in INDEX-shots) are also deleted if no remaining version uses them.

    Options:
        keep: Number of latest versions to keep.

    Examples:
        index gc indexes/things
        index gc indexes/things --keep 5
    """
    from retrieval_tip.index import changes

    done = changes.gc(folder, keep)
    photos = f" and {counted(done.photos, 'photo')}" if done.photos else ""
    about(
        folder,
        f"deleted {counted(len(done.versions), 'version')}{photos}, freed {done.freed:,} bytes",
    )


@index.command()
def clone_command(
    folder: Place = options.INDEX_ARGUMENT,
    out: Place = argument(kinds.INDEX),
    version: int | None = option(kinds.count()),
) -> None:
    """Copy an index to OUT and verify the copied files.

    Options:
        version: Version to copy. [default: the current one]

    Examples:
        index clone indexes/things indexes/copy
        index clone indexes/things lance://indexes/things.lance
    """
    from retrieval_tip.index import changes

    _say_changed(out, changes.clone(folder, out, version), f"copied from {folder}")


class Export(PluginCommand):
    """The command, with an option for each program and the options of the one that its arguments name."""

    kind = "exports"

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        for name in hooks.TABLE["exports"]:
            kind = click.Path(path_type=Path)
            text = hooks.HELP[name]
            self.params.append(Option([self.spelled(name)], type=kind, metavar="FOLDER", help=text))

    def plugin_in(self, args: Sequence[str]) -> str | None:
        """Return the program whose option is in arguments."""
        given = {arg.partition("=")[0] for arg in args}
        return next((name for name in hooks.TABLE["exports"] if self.spelled(name) in given), None)

    def spelled(self, name: str) -> str:
        """Return the option of a program."""
        return f"--{name}"

    def use(self, ctx: click.Context, plugin: Any, options: dict[str, Any]) -> None:
        """Set the program and its folder."""
        folders = [ctx.params.pop(name) for name in hooks.TABLE["exports"]]
        ctx.params["program"] = plugin and plugin(**options)
        ctx.params["program_folder"] = next(filter(None, folders), None)


@index.command(cls=Export)
def export_command(
    folder: Place = options.INDEX_ARGUMENT,
    out: Path | None = option(kinds.FILE, "--out", "-o"),
    text: Path | None = option(kinds.FILE),
    onnx: Path | None = option(kinds.FILE),
    features: bool = flag(),
    precision: Precision = option(click.Choice(["float32", "int8"]), default="float32"),
    *,
    program: Any,
    program_folder: Path | None,
) -> None:
    """Export keys as a table, or an index for other programs.

    The ONNX graph contains the whole index and runs in any ONNX runtime.

    Options:
        out: Feature table to write (.parquet), or ONNX file (.onnx).
        text: Feature table to write for the text weights. You can pass it to index build --text.
        onnx: ONNX file to write. Its graph computes logits from pixels (requires onnx).
        features: With --onnx, compute logits from features, and leave out the image encoder.
        precision: With --onnx, precision of the image encoder. With int8, the file is smaller. It then contains the
            encoder that models --int8 stored.

    Examples:
        index export indexes/things --out keys.parquet
        index export indexes/things --out keys.parquet --text text.parquet
    """
    from retrieval_tip.export.feature_tables import export_table, export_text

    if not (out or text or onnx or program_folder):
        raise UsageError("index export: give --out, --text or --onnx FILE, or --addaxai FOLDER")
    if onnx is None and out and out.suffix.lower() == ".onnx":
        out, onnx = None, out
    loaded = store_of(folder).load(device="cpu").in_memory()
    if out is not None:
        about(out, f"{export_table(loaded, out)} rows")
    if text is not None:
        about(text, f"{export_text(loaded, text)} rows")
    if program_folder is not None:
        if precision != "float32":
            raise UsageError(f"--precision {precision}: only applies to --onnx; leave it out")
        about(program_folder, program.write(loaded, program_folder))
    if onnx is not None:
        from retrieval_tip.backbones.loading import load_again
        from retrieval_tip.export.onnx_graph import export_onnx

        named = loaded.backbone
        backbone = None
        if not features and named is not None:
            backbone = load_again(named, device="cpu", precision=precision)
        facts = export_onnx(loaded, onnx, backbone)
        inputs = "features" if backbone is None else "pixels"
        size = f"{facts['bytes'] / 1e6:.1f} MB"
        classes = counted(len(facts["labels"]), "class")
        about(onnx, f"{inputs} to logits of {classes}, {size}, opset {facts['opset']}")
        if (agreement := facts["agreement"]) is None:
            warn(
                [
                    f"{show(onnx)}: not compared with the package, because no photo of the index could be read"
                ]
            )
        else:
            of = counted(agreement["n"], "photo" if backbone is not None else "key")
            most = max(1e-4, math.ceil(1e4 * agreement["difference"]) / 1e4)
            same = f"{agreement['equal']} of {of} classified as by the package"
            about(onnx, f"{same}, with probabilities within {most:.4f}")


@index.command()
def audit_command(
    folder: Place = options.INDEX_ARGUMENT,
    borderline: bool = flag("--all"),
    file: Path | None = option(kinds.FILE, "--apply"),
    printing: OutputOptions = options.FORMAT,
) -> None:
    """List shots that look mislabelled, or relabel them.

    Each shot is classified with all other shots, excluding shots of the same image. The most suspicious shots are
    listed first. Images that appear in two classes are also listed.

    To correct labels, save the list with --out suspects.csv (you can also use .json or .parquet). Delete rows or
    edit the suggestions, and then pass the file to --apply. Only the columns key_id, label and suggested are read. The
    column suggested contains the new label of a shot, and label must still be its current label.

    Options:
        borderline: Also list borderline cases.
        file: CSV or Parquet table written by audit --out, whose suggestions are applied in one new version.

    Examples:
        index audit indexes/things --out suspects.csv
        index audit indexes/things --apply suspects.csv
    """
    if file is not None:
        from retrieval_tip.index.changes import apply_audit

        if borderline or printing != OutputOptions(None, None):
            raise UsageError("--apply: cannot be combined with other options")
        changed = apply_audit(folder, file)
        _say_relabelled(folder, changed)
        return
    from retrieval_tip.evaluation.audit import audit

    loaded = store_of(folder).load(device="auto").in_memory()
    printing.write_table(audit(loaded, borderline=borderline))


def _held(index: Index) -> str:
    return f"{counted(index.n, 'shot')}, {counted(len(index.class_names), 'class')}"


def _say_added(folder: Place, added: Changed) -> None:
    from retrieval_tip.index.items import warn_of

    what = f"added {counted(len(added.key_ids), 'shot')}"
    if added.classes:
        what += f", {counted(len(added.classes), 'new class')}: {few(added.classes)}"
    if added.known:
        what += f", skipped {counted(added.known, 'known image')}"
    _say_changed(folder, added, what)
    if added.duplicates is not None:
        warn_of(added.duplicates)
        if added.duplicates.compared == "digests":
            warn(
                ["the index is too large to search for near-identical images now; use index audit"]
            )


def _say_changed(folder: Place, changed: Changed, what: str) -> None:
    """Print the result of a change. If the index was fitted again, also print its estimated accuracy."""
    about(folder, f"version {changed.version}, {what}")
    if changed.fit is not None:
        warn(changed.fit.warnings)
        say("Fitted again, because the index has changed a lot.")
        say_fit(changed.fit.provenance())
    elif changed.fit_due:
        warn(
            [
                f"the index has changed a lot since it was fitted; fit it again: {command_line('fit', folder)}"
            ]
        )


def _say_relabelled(folder: Place, changed: Changed, to: str = "") -> None:
    from retrieval_tip.index.added_photos import LISTED, command

    _say_changed(folder, changed, f"relabelled {counted(len(changed.key_ids), 'shot')}{to}")
    index = changed.index
    if changed.key_ids and index.backbone is not None:  # else the photos need --model
        into = "FOLDER" if Path("fixed").exists() else "fixed"
        copy = command_line("sort", folder, "PHOTOS", "--into", into)
        if index.n <= LISTED:
            sources = index.rows.columns("source")["source"].fill_null("").to_pylist()
            copy = command("sort", folder, sources, "--into", into) or copy
        note(f"Next: copy the photos into corrected folders ({copy})")
