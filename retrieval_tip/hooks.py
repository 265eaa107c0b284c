"""Find formats, encoders, sources, exports and stores by name, and openers of files by suffix.

Our own are in :data:`TABLE`, so that nothing is imported before it is named. Other names are entry points of installed
packages (``retrieval_tip.writers``, ``encoders``, ``sources`` and ``openers``), which run with the user's rights.
docs/plugins.md describes how to write one.
"""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import field
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

from retrieval_tip import __version__
from retrieval_tip.errors import UsageError
from retrieval_tip.wording import first_line

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

VIDEOS = (
    *(".mp4", ".mov", ".m4v", ".3gp", ".mkv", ".webm"),
    *(".avi", ".mts", ".m2ts", ".mpg", ".mpeg", ".wmv"),
)
"""The suffixes of videos."""
TABLE: Mapping[str, Mapping[str, str]] = {
    "writers": {
        "coco": "retrieval_tip.plugins.exchange:Coco",
        "fiftyone": "retrieval_tip.plugins.exchange:FiftyOne",
        "label-studio": "retrieval_tip.plugins.exchange:LabelStudio",
        "megadetector": "retrieval_tip.plugins.camera_traps:MegaDetector",
        "camtrap-dp": "retrieval_tip.plugins.camera_traps:CamtrapDP",
        "xmp": "retrieval_tip.plugins.xmp:XMP",
    },
    "encoders": {},  # ours are opened on first use by backbones/loading.py, which needs more than one function
    "sources": {"hf-dataset": "retrieval_tip.plugins.hf_datasets:HFDatasets"},
    "openers": dict.fromkeys(VIDEOS, "retrieval_tip.plugins.video:Videos"),
    "exports": {"addaxai": "retrieval_tip.plugins.addaxai:AddaxAI"},
    "commands": {"immich": "retrieval_tip.plugins.immich.commands:COMMANDS"},
    "stores": dict.fromkeys(
        ("lance", "s3", "gs"), "retrieval_tip.plugins.lance.lance_store:LanceStore"
    ),
}
"""The module and the object behind each of our own names, by kind."""
HELP: Mapping[str, str] = {
    "addaxai": "Folder of a model of AddaxAI to write. With --help, its options are explained.",
    "immich": "Suggest tags for the photos of an Immich server.",
}
"""The help of exports and commands, which are not imported to show it."""
OPEN = ("writers", "encoders", "sources", "openers")
"""The kinds that other packages may add to."""
EXTRAS: Mapping[str, tuple[str, Sequence[str]]] = {
    "heic": ("pillow_heif", (".heic", ".heif", ".hif")),
    "video": ("av", VIDEOS),
}
"""The module that an extra installs, and the suffixes of the files that it reads."""
OURS = frozenset({"", ".csv", ".tsv", ".parquet", ".json"})
"""The suffixes of folders and tables, which have no openers."""
SETTINGS: dict[type, dict[str, Any]] = {}
"""The options of our openers on the command line, by the class of the opener."""


class Stranger(NamedTuple):
    """A plugin, usually of another package: its kind, its name, and the name and version of the package."""

    kind: str
    name: str
    package: str
    version: str

    def __str__(self) -> str:
        return f"{self.kind.removesuffix('s')} {self.name} (of {self.package} {self.version})"


def find(kind: str, name: str) -> Any:
    """Return the object with a name, or ``None`` if there is none.

    Raises UsageError if its package cannot be imported, or if two packages have the name.
    """
    if (place := TABLE[kind].get(name)) is not None:
        return pkgutil.resolve_name(place)
    points = [point for point in _entry_points(kind) if point.name == name]
    if not points:
        return None
    strangers = [_stranger(kind, point) for point in points]
    if len(points) > 1:
        packages = " and ".join(f"{one.package} {one.version}" for one in strangers)
        raise UsageError(
            f"{kind.removesuffix('s')} {name}: is in {packages}; uninstall one of them"
        )
    try:
        return points[0].load()
    except Exception as error:  # a package can raise anything
        reason = first_line(error) or type(error).__name__
        raise UsageError(
            f"{strangers[0]}: cannot be imported ({reason}); update or uninstall its package"
        ) from error


def exists(kind: str, name: str) -> bool:
    """Return whether a name is known. Nothing is imported, and packages are searched once at most."""
    return name in TABLE[kind] or name in names(kind)


def opens(suffix: str) -> bool:
    """Return whether files with a suffix have an opener, and the extra is installed if it needs one."""
    if suffix in OURS or not exists("openers", suffix):
        return False
    modules = (module for module, suffixes in EXTRAS.values() if suffix in suffixes)
    return all(find_spec(module) is not None for module in modules)


def openers() -> list[type]:
    """Return the classes of our openers whose extras are installed. Their fields are options."""
    one_suffix = {place: suffix for suffix, place in TABLE["openers"].items()}
    return [pkgutil.resolve_name(place) for place, suffix in one_suffix.items() if opens(suffix)]


def names(kind: str) -> list[str]:
    """Return all names of a kind, ours first."""
    return [*TABLE[kind], *(point.name for point in _entry_points(kind))]


def strangers() -> list[Stranger]:
    """Return the plugins of other packages, without importing them."""
    return [_stranger(kind, point) for kind in OPEN for point in _entry_points(kind)]


def stranger(kind: str, name: str) -> Stranger:
    """Return the plugin that :func:`find` has found."""
    if name in TABLE[kind]:
        return Stranger(kind, name, "retrieval-tip", __version__)
    return next(own for own in strangers() if (own.kind, own.name) == (kind, name))


def _entry_points(kind: str) -> Sequence[EntryPoint]:
    return _installed(tuple(sys.path)).get(kind, ())


@cache
def _installed(_: tuple[str, ...]) -> Mapping[str, Sequence[EntryPoint]]:
    """Return the entry points of the packages on ``sys.path``, by kind."""
    from importlib.metadata import entry_points  # slow

    every = entry_points()
    return {
        kind: sorted(every.select(group=f"retrieval_tip.{kind}"), key=lambda point: point.name)
        for kind in OPEN
    }


def _stranger(kind: str, point: EntryPoint) -> Stranger:
    package = point.dist
    assert package is not None  # entry_points() sets it
    return Stranger(kind, point.name, package.name, package.version)


def argument(kind: object = None, **more: Any) -> Any:
    """Declare an argument, as the default of a parameter of a command."""
    return field(metadata={"is_argument": True, "type": kind, **more})


def option(kind: object = None, *names: str, **more: Any) -> Any:
    """Declare an option, as the default of a parameter of a command or of a field of a group or a writer.

    The option has the name of the parameter, unless ``names`` are given, and the click type ``kind``. Its help is
    ``help``, or the text after the name of the parameter in the docstring of the command, the group or the writer.
    Other arguments are those of ``click.Option``.
    """
    default = more.get("default")
    shown = {"show_default": default is not None and default is not False}
    return field(default=default, metadata={"names": names, "type": kind, **shown, **more})


def flag(*names: str, **more: Any) -> Any:
    """Declare an option without a value (see :func:`option`)."""
    return option(None, *names, default=False, is_flag=True, **more)
