"""Datasets by name: the table of facts, layouts on disk, missing files, and the command line."""

import json
import logging
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import needs_real
from PIL import Image
from tables import tiny, unit_rows, write_table

from retrieval_tip.backbones.prompts import clean_class_name
from retrieval_tip.data.datasets import DATASETS, facts, names, open_dataset
from retrieval_tip.data.sources import open_source
from retrieval_tip.errors import InputError, UsageError
from retrieval_tip.model import Index

PUBLISHED = {  # name: templates
    "dtd": ("{} texture.",),
    "eurosat": ("a centered satellite photo of {}.",),
    "fgvc": ("a photo of a {}, a type of aircraft.",),
    "food101": ("a photo of {}, a type of food.",),
    "flowers": ("a photo of a {}, a type of flower.",),
    "pets": ("a photo of a {}, a type of pet.",),
    "ucf101": ("a photo of a person doing {}.",),
    **dict.fromkeys(("caltech101", "cars", "sun397"), ("a photo of a {}.",)),
    "imagenet": ("itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}.",
                 "a {} in a video game.", "art of the {}.", "a photo of the small {}."),
}  # fmt: skip
SPLIT_FILES = [row.name for row in DATASETS if row.listing.endswith(".json")]
VARIANTS = ["ImageNet-V2", "ImageNet-Sketch", "ImageNet-A", "ImageNet-R"]
WNIDS = [f"n{number:08d}" for number in range(1000)]


def tiny_image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (2, 2)).save(path)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """One small image; the synthetic datasets contain links to it."""
    path = tmp_path_factory.mktemp("picture") / "one.png"
    tiny_image(path)
    return path


def place(picture, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.hardlink_to(picture)


def made_split(classes):
    """Return a split file with one image per class and part."""
    return {
        split: [[f"c_{label}/{split}.png", label, f"class_{label}"] for label in range(classes)]
        for split in ("train", "val", "test")
    }


def lay_split(root, picture, name, split_json=None):
    """Create a dataset with a split file."""
    row = facts(name)
    data = split_json or made_split(row.classes)
    folder = root / row.folder
    folder.mkdir(parents=True)
    (folder / row.listing).write_text(json.dumps(data))
    for split, entries in data.items():
        (folder / row.images[split]).mkdir(exist_ok=True)
        for path, _, _ in entries:
            place(picture, folder / row.images[split] / path)
    return folder


def lay_aircraft(root, picture):
    folder = root / "fgvc_aircraft"
    variants = [*(f"A{number}" for number in range(99)), "F/A-18 Hornet"]
    folder.mkdir()
    (folder / "variants.txt").write_text("\n".join(variants) + "\n")
    for start, split in enumerate(("train", "val", "test")):
        lines = [f"{start}{number:06d} {variant}" for number, variant in enumerate(variants)]
        (folder / f"images_variant_{split}.txt").write_text("\n".join(reversed(lines)) + "\r\n")
        for line in lines:
            place(picture, folder / "images" / f"{line.split()[0]}.jpg")
    return folder


def lay_imagenet(root, picture, name="ImageNet", class_names=None):
    row = facts(name)
    folder = root / row.folder
    folder.mkdir(parents=True)
    named = class_names or [f"thing {number}" for number in range(1000)]
    (folder / "classnames.txt").write_text("".join(f"{w} {n}\n" for w, n in zip(WNIDS, named, strict=True)))
    own = WNIDS if row.classes == 1000 else WNIDS[::5]
    own = [str(number) for number in range(1000)] if name == "ImageNet-V2" else own
    for part in row.images.values():
        for class_folder in own:
            place(picture, folder / part / class_folder / "one.png")
    return folder


def test_datasets_are_found_by_every_spelling():
    assert names() == [
        *("ImageNet", "Caltech101", "OxfordPets", "StanfordCars", "Flowers102", "Food101", "FGVCAircraft"),
        *("SUN397", "DTD", "EuroSAT", "UCF101", *VARIANTS),
    ]
    for name in names():
        row = facts(name)
        spellings = (name.lower(), name.upper(), row.folder, row.folder.replace("_", "-"), *row.aliases, f" {name}")
        assert all(facts(spelling) is row for spelling in spellings)
    assert facts("imagenet_a").name == "ImageNet-A"
    assert facts("imagenetv2").name == "ImageNet-V2"
    assert facts("fgvc").name == "FGVCAircraft"


def test_no_name_stands_for_two_datasets():
    plain = [{n.lower().replace("-", "").replace("_", "") for n in (r.name, r.folder, *r.aliases)} for r in DATASETS]
    assert sum(map(len, plain)) == len(set.union(*plain))


@pytest.mark.parametrize("name", ["", "imagenet-b", "pet", "../caltech-101"])
def test_the_error_for_an_unknown_name_lists_all_names(name):
    for ask in (lambda: facts(name), lambda: open_dataset(name, ".", "train")):
        with pytest.raises(UsageError, match=r"ImageNet, Caltech101, .*, ImageNet-R"):
            ask()


def test_templates_are_the_published_ones():
    assert {name: facts(name).templates for name in PUBLISHED} == PUBLISHED
    assert all(facts(name).templates == facts("imagenet").templates for name in VARIANTS)


@needs_real
def test_caltech101_opens_by_name_as_by_its_split_file(shared, tmp_path):
    photos = shared / "data/caltech101"
    (tmp_path / "caltech-101").symlink_to(photos)
    for split, number in (("train", 1600), ("val", 400), ("test", 999)):
        source = open_dataset("caltech101", tmp_path, split)
        assert (len(source), len(source.class_names), source.dataset) == (number, 100, "Caltech101")
        assert all(Path(path).is_file() for path in source.paths)
        plain = open_source(tmp_path / "caltech-101" / "split_zhou_Caltech101.json", split=split)
        assert (source.name, source.paths, source.labels) == (plain.name, plain.paths, plain.labels)
        direct = open_dataset("caltech101", photos, split)  # the dataset's own folder, whatever its name
        assert (direct.labels, direct.class_names) == (source.labels, source.class_names)


@needs_real
@pytest.mark.parametrize("name", sorted(set(SPLIT_FILES) - {"Food101", "SUN397", "Caltech101"}))
def test_published_split_files_are_read(shared, tmp_path, picture, name):
    row = facts(name)
    data = json.loads((shared / "data/splits" / row.listing).read_text())
    sample = {split: entries[:: max(1, len(entries) // 16)] for split, entries in data.items()}
    folder = lay_split(tmp_path, picture, name, sample)
    shutil.copy(shared / "data/splits" / row.listing, folder / row.listing)
    source = open_dataset(name, tmp_path, "test")
    assert len(source) == len(data["test"])
    assert source.labels == [entry[2] for entry in data["test"]]
    assert list(source.class_names) == [n for _, n in sorted({(entry[1], entry[2]) for entry in data["test"]})]
    assert Path(source.paths[0]).is_file()
    assert len(source.class_names) == row.classes


@pytest.mark.parametrize("name", ["Food101", "SUN397"])
def test_synthetic_split_files_are_read(tmp_path, picture, name):
    for root in (tmp_path, lay_split(tmp_path, picture, name)):
        assert open_dataset(name, root, "val").labels[:2] == ["class_0", "class_1"]


def test_aircraft_is_read_from_its_variant_lists(tmp_path, picture):
    folder = lay_aircraft(tmp_path, picture)
    assert open_dataset("FGVCAircraft", folder, "test").paths == open_dataset("fgvc", tmp_path, "test").paths
    for start, split in enumerate(("train", "val", "test")):
        source = open_dataset("fgvc", tmp_path, split)
        assert source.class_names[:2] == ("A0", "A1")  # in the order of variants.txt
        assert source.class_names[-1] == source.labels[0] == "F/A-18 Hornet"
        assert source.paths[0] == str(folder / "images" / f"{start}000099.jpg")
        assert Path(source.paths[0]).is_file()
        assert source.sources == list(source.paths)
        assert (len(source), source.dataset) == (100, "FGVCAircraft")


def test_imagenet_is_read_from_its_class_folders(tmp_path, picture, caplog):
    folder = lay_imagenet(tmp_path, picture)
    for split, part in (("train", "train"), ("test", "val")):
        source = open_dataset("imagenet", tmp_path, split)
        assert (len(source), source.class_names[7], source.labels[7]) == (1000, "thing 7", "thing 7")
        assert source.paths[7] == str(folder / "images" / part / WNIDS[7] / "one.png")
    assert not caplog.records
    with pytest.raises(UsageError, match=r"no part 'val' \(its images/val is the test part\).* train, test"):
        open_dataset("imagenet", tmp_path, "val")


@pytest.mark.parametrize("name", VARIANTS)
def test_imagenet_variants_are_read_from_their_class_folders(tmp_path, picture, name, caplog):
    folder = lay_imagenet(tmp_path, picture, name)
    source = open_dataset(name, tmp_path, "test")
    assert source.paths == open_dataset(name, folder, "test").paths
    step = 1000 // facts(name).classes
    assert source.class_names == tuple(f"thing {number}" for number in range(0, 1000, step))
    assert source.labels[1] == f"thing {step}"
    assert Path(source.paths[1]).parent.name == ("1" if name == "ImageNet-V2" else WNIDS[step])
    assert not caplog.records
    with pytest.raises(UsageError, match=f"{name}: no part 'train'.* test"):
        open_dataset(name, tmp_path, "train")


def test_two_classes_of_one_name_stay_apart_and_share_a_prompt(tmp_path, picture):
    class_names = [f"thing {number}" for number in range(1000)]
    class_names[3] = class_names[500] = class_names[501] = "missile"
    lay_imagenet(tmp_path, picture, class_names=class_names)
    lay_imagenet(tmp_path, picture, "ImageNet-A", class_names)
    source = open_dataset("imagenet", tmp_path, "test")
    assert [source.class_names[number] for number in (3, 500, 501)] == ["missile", "missile_", "missile__"]
    assert {clean_class_name(source.class_names[number]) for number in (3, 500, 501)} == {"missile"}
    part = open_dataset("imagenet-a", tmp_path, "test")  # has folder 500, but not folder 3
    assert part.class_names[100] == "missile_"
    assert set(part.class_names) < set(source.class_names)


def test_a_part_of_imagenet_opens_with_a_warning(tmp_path, picture, caplog):
    folder = lay_imagenet(tmp_path, picture)
    for wnid in WNIDS[10:]:
        shutil.rmtree(folder / "images/train" / wnid)
    (folder / "images/train" / WNIDS[4] / "one.png").unlink()
    with caplog.at_level(logging.WARNING):
        source = open_dataset("imagenet", tmp_path, "train")
    assert (len(source), len(source.class_names)) == (9, 9)
    assert "9 of the 1000 class folders of ImageNet" in caplog.text
    assert f"ignored folders without images: {WNIDS[4]}" in caplog.text


@pytest.mark.parametrize("name", names())
def test_a_missing_dataset_is_reported(tmp_path, name):
    row = facts(name)
    with pytest.raises(InputError) as caught:
        open_dataset(name, tmp_path, "test")
    assert str(caught.value).startswith(f"{tmp_path / row.folder}: no such folder; ")
    assert all(part in str(caught.value) for part in (row.listing, *row.images.values()))
    (tmp_path / row.folder).mkdir()  # an empty folder of the right name
    for root in (tmp_path, tmp_path / row.folder):
        with pytest.raises(InputError, match=f"{row.folder}/{row.listing}: no such file; "):
            open_dataset(name, root, "test")


def test_each_missing_part_is_named(tmp_path, picture):
    folder = lay_split(tmp_path, picture, "dtd")
    shutil.rmtree(folder / "images" / "c_0")
    assert len(open_dataset("dtd", tmp_path, "train")) == 47  # missing images are reported when they are read
    shutil.rmtree(folder / "images")
    with pytest.raises(InputError, match="images: no such folder; "):
        open_dataset("dtd", tmp_path, "train")
    (folder / "split_zhou_DescribableTextures.json").unlink()
    with pytest.raises(InputError, match=r"json: no such file; expected a folder with images/, split_zhou_"):
        open_dataset("dtd", tmp_path, "train")

    folder = lay_aircraft(tmp_path, picture)
    (folder / "images_variant_val.txt").unlink()
    with pytest.raises(InputError, match=r"images_variant_val\.txt: no such file; "):
        open_dataset("fgvc", tmp_path, "val")
    assert len(open_dataset("fgvc", tmp_path, "train")) == 100  # other parts are complete


LAID = {
    "dtd": lambda root, picture: lay_split(root, picture, "dtd"),
    "fgvc": lay_aircraft,
    "imagenet-r": lambda root, picture: lay_imagenet(root, picture, "ImageNet-R"),
}
DAMAGED = [
    ("dtd", facts("dtd").listing, b"", "not JSON"),
    ("dtd", facts("dtd").listing, b"[]", "no part 'test'"),
    ("dtd", facts("dtd").listing, b'{"train": [], "val": [], "test": [["a", 0]]}',
     r"\(test\): entry 0 is not \[path, label, class name\]"),
    ("fgvc", "variants.txt", b"", r"variants\.txt: empty"),
    ("fgvc", "variants.txt", b"A0\nA0\n", r"variants\.txt: duplicate class name 'A0'"),
    ("fgvc", "variants.txt", b"\xff\n", r"variants\.txt: cannot be read: .*position 0"),
    ("fgvc", "images_variant_test.txt", b"\n\n", r"images_variant_test\.txt: empty"),
    ("fgvc", "images_variant_test.txt", b"0000001 A1\n\n0000002\n", "line 3: expected an image number"),
    ("fgvc", "images_variant_test.txt", b"0000001 Zeppelin\n", r"line 1: variant 'Zeppelin' is not in variants\.txt"),
    ("fgvc", "images_variant_test.txt", b"1 " + b"a" * 5000, "line 1 is longer than 4096 characters"),
    ("imagenet-r", "classnames.txt", b"n00000000\n", r"classnames\.txt: line 1: expected a folder"),
    ("imagenet-r", "classnames.txt", b"n00000000 a\nn00000000 b\n", r"txt: line 2: duplicate folder n00000000"),
    ("imagenet-r", "classnames.txt", b"n00000000 a\nn00000005 b\n", "for n00000010, .* 193 more; .* n000"),
    ("imagenet-r", "classnames.txt", b" \n", r"classnames\.txt: empty"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "file", "content", "message"), DAMAGED)
def test_a_damaged_list_is_named(tmp_path, picture, name, file, content, message):
    folder = LAID[name](tmp_path, picture)
    (folder / file).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        open_dataset(name, tmp_path, "test")
    assert str(folder) in str(caught.value)


def test_unsorted_validation_images_are_not_class_folders(tmp_path, picture):
    folder = lay_imagenet(tmp_path, picture)
    shutil.rmtree(folder / "images/val")
    place(picture, folder / "images/val/ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(InputError, match="images/val: there are no class folders, but 1 image directly in it"):
        open_dataset("imagenet", tmp_path, "test")


@pytest.fixture
def caltech(shared, tmp_path):
    """A folder of datasets with three real classes of Caltech101."""
    row = facts("caltech101")
    whole = json.loads((shared / "data/caltech101" / row.listing).read_text())
    own = {"panda": 0, "pizza": 1, "yin_yang": 2}
    data = {
        split: [[path, own[name], name] for path, _, name in entries if name in own][:: 2 if split == "train" else 1]
        for split, entries in whole.items()
    }
    folder = tmp_path / "data" / row.folder
    folder.mkdir(parents=True)
    (folder / "101_ObjectCategories").symlink_to(shared / "data/caltech101/101_ObjectCategories")
    (folder / row.listing).write_text(json.dumps(data))
    return tmp_path / "data"


def test_build_encode_and_evaluate_take_a_dataset_name(run, caltech, tmp_path):
    model = ("--model", f"local-dir:{tiny(tmp_path / 'model')}")
    built = run("index", "build", "--fit", "none", caltech, "--dataset", "caltech", *model, "--out", tmp_path / "a")
    assert built.exit_code == 0, built.output
    cache = Index.load(tmp_path / "a")
    assert list(cache.templates) == ["a photo of a {}."]
    assert cache.class_names == ["panda", "pizza", "yin_yang"]
    assert cache.provenance["dataset"] == "Caltech101"
    assert cache.n == len(open_dataset("caltech", caltech, "train"))

    listing = caltech / "caltech-101" / "split_zhou_Caltech101.json"
    by_name = run("evaluate", tmp_path / "a", caltech, "--dataset", "caltech101", "--json")
    by_file = run("evaluate", tmp_path / "a", listing, "--json")
    assert by_name.exit_code == 0
    assert json.loads(by_name.stdout)["n"] == len(open_dataset("caltech", caltech, "test"))
    assert {k: v for k, v in json.loads(by_name.stdout).items() if "second" not in k} == {
        k: v for k, v in json.loads(by_file.stdout).items() if "second" not in k
    }
    val = run("evaluate", tmp_path / "a", caltech, "--dataset", "caltech101", "--split", "val", "--json")
    assert json.loads(val.stdout)["n"] == len(open_dataset("caltech", caltech, "val"))

    table = tmp_path / "t.parquet"
    encoded = run("encode", caltech, "--dataset", "Caltech101", "--split", "test", *model, "--out", table)
    assert encoded.exit_code == 0, encoded.output
    assert pq.read_table(table)["id"].to_pylist() == open_dataset("caltech", caltech, "test").sources


def test_given_templates_replace_those_of_the_dataset(run, caltech, tmp_path):
    model = ("--model", f"local-dir:{tiny(tmp_path / 'model')}")
    folder = caltech / "caltech-101"
    folder.rename(caltech / "dtd")
    (caltech / "dtd/101_ObjectCategories").rename(caltech / "dtd/images")
    listing = caltech / "dtd" / facts("caltech101").listing
    listing.rename(listing.with_name(facts("dtd").listing))
    build = ("index", "build", "--fit", "none", caltech / "dtd", "--dataset", "dtd", *model)  # the dataset's own folder
    assert run(*build, "--out", tmp_path / "own").exit_code == 0
    assert list(Index.load(tmp_path / "own").templates) == ["{} texture."]
    assert run(*build, "--template", "a {}", "--template", "the {}", "--out", tmp_path / "given").exit_code == 0
    assert list(Index.load(tmp_path / "given").templates) == ["a {}", "the {}"]
    text = tmp_path / "text.parquet"
    dim = Index.load(tmp_path / "own").d
    write_table(text, unit_rows(3, dim), ["panda", "pizza", "yin_yang"])
    done = run(*build, "--text", text, "--out", tmp_path / "text")
    assert done.exit_code == 0, done.output
    assert list(Index.load(tmp_path / "text").templates) == []


def test_wrong_usage_is_an_error_and_builds_nothing(run, caltech, tmp_path):
    build = ("index", "build", "--fit", "none", caltech, "--out", tmp_path / "a")
    for options, status, message in (
        (("--dataset", "kaltech"), 2, "dataset 'kaltech': unknown; choose from ImageNet, "),
        (
            ("--dataset", "pets"),
            1,
            "oxford_pets: no such folder; expected a folder with images/, split_zhou_OxfordPets.json",
        ),
        (
            ("--dataset", "caltech", "--split", "all"),
            2,
            "Caltech101: no part 'all'; choose --split from train, val, test",
        ),
        (("--dataset", "caltech", "--root", tmp_path), 2, "--root and --dataset"),
    ):
        done = run(*build, *options)
        assert done.exit_code == status
        assert message in done.stderr
    assert not (tmp_path / "a").exists()
