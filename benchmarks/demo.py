"""The main job from end to end on photographs: build an index, classify, explain, evaluate.

With the shared data beside the repository: 16 photographs of each of eight Caltech101 classes and lit-mini, a small
real dual encoder.
Without it (a bare clone, no network needed): crops of eight public-domain photographs that come with
scikit-image, and an encoder with random weights, made here. Random convolutions tell textures and colours apart, but
know no words, so there the cache alone decides; --model and --pretrained take a real CLIP instead.
"""

from __future__ import annotations

import json
import random
import shlex
import sys
from pathlib import Path

import click

CLASSES = ("butterfly", "camera", "dalmatian", "grand_piano", "panda", "pizza", "saxophone", "sunflower")
PHOTOGRAPHS = {  # class name: file in scikit-image, all in the public domain (CC0, or NASA's)
    "astronaut": "astronaut.png",
    "brick wall": "brick.png",
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "galaxies": "hubble_deep_field.jpg",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "rocket": "rocket.jpg",
}


@click.command(help=__doc__)
@click.option("--work", type=click.Path(path_type=Path), default=Path("indexes/demo"), show_default=True)
@click.option("--shared", type=click.Path(path_type=Path), default=Path("../shared"), show_default=True)
@click.option("--model", help="Another backbone, as for retrieval-tip index build.")
@click.option("--pretrained", help="Its tag or weights.")
def main(work: Path, shared: Path, model: str | None, pretrained: str | None) -> None:
    """Choose the photographs and the backbone, then run the commands that a user would."""
    work.mkdir(parents=True, exist_ok=True)
    if (shared / "models" / "lit-mini").is_dir():
        click.echo(f"Photographs: {len(CLASSES)} classes of Caltech101 (CC BY 4.0). Backbone: lit-mini.")
        root = caltech(shared / "data" / "caltech101", work)
        backbone = f"local-dir:{shared / 'models' / 'lit-mini'}"
    else:
        click.echo(f"Photographs: crops of {len(PHOTOGRAPHS)} from scikit-image (public domain).")
        click.echo("Backbone: random weights, which know no words; for the real thing give --model RN50.")
        root = crops(work)
        backbone = f"local-dir:{random_encoder(work)}"
    chosen = ["--model", model or backbone, *(["--pretrained", pretrained] if pretrained else [])]
    index = str(work / "index")
    tip("index", "build", str(work / "train.csv"), *chosen, "--root", str(root), "--out", index)
    tests = [str(root / line.split(",")[0]) for line in (work / "test.csv").read_text().splitlines()[1:]]
    tip("classify", index, *tests[:: max(1, len(tests) // 8)][:8], "--explain", "--neighbours", "3")
    tip("evaluate", index, str(work / "test.csv"), "--root", str(root))


def tip(*arguments: str) -> None:
    """Show a command, and run it."""
    from retrieval_tip.cli import main as command

    click.echo(f"\n$ retrieval-tip {shlex.join(arguments)}")
    try:
        command(list(arguments))
    except SystemExit as end:
        if end.code:
            sys.exit(end.code)


def table(path: Path, rows: list[tuple[str, str]]) -> None:
    """Write a path,label table."""
    path.write_text("path,label\n" + "".join(f"{file},{label}\n" for file, label in rows), encoding="utf-8")


def caltech(folder: Path, work: Path) -> Path:
    """Tables of the demo's classes, out of the split file; the folder of the photographs."""
    split = json.loads((folder / "split_zhou_Caltech101.json").read_text(encoding="utf-8"))
    for part in ("train", "test"):
        table(work / f"{part}.csv", [(file, name) for file, _, name in split[part] if name in CLASSES])
    return folder / "101_ObjectCategories"


def crops(work: Path) -> Path:
    """Eight shots from the left 60 % of each photograph, and four tests from the rest; the folder of the crops."""
    import skimage
    from PIL import Image

    root = work / "photographs"
    generator = random.Random(1)
    rows: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
    for name, file in PHOTOGRAPHS.items():
        picture = Image.open(Path(skimage.__file__).parent / "data" / file).convert("RGB")
        border = int(picture.width * 0.6)
        for part, low, high, number in (("train", 0, border, 8), ("test", border, picture.width, 4)):
            side = int(0.7 * min(high - low, picture.height))
            (root / part / name).mkdir(parents=True, exist_ok=True)
            for i in range(number):
                left, top = generator.randint(low, high - side), generator.randint(0, picture.height - side)
                picture.crop((left, top, left + side, top + side)).save(root / part / name / f"{i}.png")
                rows[part].append((f"{part}/{name}/{i}.png", name))
    for part, listed in rows.items():
        table(work / f"{part}.csv", listed)
    return root


def random_encoder(work: Path) -> Path:
    """A dual encoder in open_clip's folder format: seeded random weights, centred on the shots.

    Features of random convolutions all but coincide; without their mean (a bias, so part of the weights) they differ.
    """
    import open_clip
    import torch
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from PIL import Image
    from safetensors.torch import save_file

    vision = {"image_size": 96, "layers": [1, 1, 1, 1], "width": 32, "patch_size": None}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
    config = {"embed_dim": 256, "vision_cfg": vision, "text_cfg": text}
    torch.manual_seed(1)
    model = open_clip.CLIP(**config).eval()
    preprocess = image_transform_v2(PreprocessCfg(size=96), is_train=False)
    shots = [preprocess(Image.open(file)) for file in sorted((work / "photographs" / "train").glob("*/*.png"))]
    with torch.no_grad():
        model.visual.attnpool.c_proj.bias -= model.encode_image(torch.stack(shots)).mean(dim=0)
    folder = work / "random-encoder"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    settings = {"model_cfg": config, "preprocess_cfg": {"size": 96}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


if __name__ == "__main__":
    main()
