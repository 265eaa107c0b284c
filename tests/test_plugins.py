"""Other packages: they work wherever our own parts do, fail in one line, and are named when they are gone."""

import configparser
import json
import os
import pickle
import sys
import tomllib
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import timm
import torch
from conftest import ROOT, command_line, failed, json_rows, ok
from fake import IDENTITY, Fake
from fastapi.testclient import TestClient
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from serving import app_of, caltech_photos, random_index
from tables import tiny, unit_rows, write_table
from timm.data import create_transform, resolve_model_data_config

from retrieval_tip import Classifier, Index, Reader, hooks, load_backbone
from retrieval_tip.backbones.base import Backbone, Identity, completed, encoders_of
from retrieval_tip.backbones.joined import Joined
from retrieval_tip.data.encoding_cache import EncodingCache
from retrieval_tip.data.sources import of_images
from retrieval_tip.distributed.ray_data import Work, Worker
from retrieval_tip.errors import BackboneError, UsageError

PACKAGE = Path(__file__).parent / "plugin"


def on_path(folder, patch):
    """Install the packages of a folder for this process and for those that it starts."""
    patch.syspath_prepend(str(folder))
    patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))


@pytest.fixture
def plugin(monkeypatch):
    """The package of ``tests/plugin``, installed. ``undo`` removes it."""
    with pytest.MonkeyPatch.context() as patch:
        on_path(PACKAGE, patch)
        yield patch


def test_the_package_in_the_docs_is_the_one_that_is_tested():
    page = (ROOT / "docs/plugins.md").read_text()
    assert f"```python\n{(PACKAGE / 'tip_plugin.py').read_text()}```" in page
    assert len(page.splitlines()) <= 120
    built = (PACKAGE / "pyproject.toml").read_text()
    assert page.split("```toml\n")[1].split("```")[0] in built
    by_pip = tomllib.loads(built)["project"]["entry-points"]
    by_hand = configparser.ConfigParser()
    by_hand.read(PACKAGE / "tip_plugin-0.1.dist-info" / "entry_points.txt")
    assert by_pip == {group: dict(by_hand[group]) for group in by_hand.sections()}


# Formats


@pytest.fixture
def asked(tmp_path):
    """An index and two rows to classify with it."""
    rows = write_table(tmp_path / "rows.parquet", unit_rows(2, 16, 2), ["class 0", "class 1"])
    return random_index(tmp_path / "index", 6, 16, 2), rows


def test_a_format_of_another_package_writes_answers_and_shows_its_options(plugin, asked, tmp_path):
    out = tmp_path / "answers.txt"
    ok("classify", *asked, "--format", "lines", "--between", " is ", "--out", out)
    answers = json_rows(ok("classify", *asked, "--format", "json"))
    expected = [f"{answer['input']} is {answer['label']}" for answer in answers]
    assert out.read_text().splitlines() == expected
    assert "--between TEXT" in ok("classify --format lines --help").stdout
    assert "--between" not in ok("classify --help").stdout
    refused = command_line("classify", *asked, "--format", "lines", "--between", "a\nb")
    failed(refused, 2, "--between: contains a new line")
    assert "tip-plugin 0.1, writers" in command_line("doctor").output
    plugin.undo()
    failed(
        command_line("classify", *asked, "--format", "lines"), 2, "'lines' is not one of 'table'"
    )


def test_a_format_that_cannot_be_used_is_one_line_and_harms_no_other_command(
    asked, monkeypatch, tmp_path
):
    for name, code, expected in (
        ("broken", "import no_such_module", "writer lines (of broken 0.1): cannot be imported (No"),
        (
            "taking",
            PACKAGE.joinpath("tip_plugin.py").read_text().replace("between", "top"),
            "its option --top has another meaning here",
        ),
    ):
        with monkeypatch.context() as patch:
            info = tmp_path / name / f"{name}-0.1.dist-info"
            info.mkdir(parents=True)
            (tmp_path / name / f"{name}.py").write_text(code)
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
            (info / "entry_points.txt").write_text(
                f"[retrieval_tip.writers]\nlines = {name}:Lines\n"
            )
            on_path(tmp_path / name, patch)
            failed(command_line("classify", *asked, "--format", "lines"), 2, expected)
            ok("classify", *asked)
            ok("--help")
            if name == "broken":
                assert expected in command_line("doctor").output
            sys.modules.pop(name, None)


def test_two_packages_with_the_same_format_are_named(asked, plugin, tmp_path):
    twin = tmp_path / "twin-0.2.dist-info"
    twin.mkdir()
    (twin / "METADATA").write_text("Metadata-Version: 2.1\nName: twin\nVersion: 0.2\n")
    (twin / "entry_points.txt").write_text("[retrieval_tip.writers]\nlines = tip_plugin:Lines\n")
    on_path(tmp_path, plugin)
    failed(
        command_line("classify", *asked, "--format", "lines"),
        2,
        "writer lines: is in",
        "tip-plugin 0.1",
        "twin 0.2",
    )


# Encoders


def installed(folder, code, patch, *, name="bad", encoder="bad"):
    """Install a package whose module has this code, with a function ``open`` that opens an encoder."""
    info = folder / f"{name}_package-0.1.dist-info"
    info.mkdir(parents=True)
    (folder / f"{name}_package.py").write_text(code)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-package\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(
        f"[retrieval_tip.encoders]\n{encoder} = {name}_package:open\n"
    )
    patch.delitem(sys.modules, f"{name}_package", raising=False)
    on_path(folder, patch)


def last_line(done):
    """Return the error of a command. If it was used wrongly, its usage precedes the error."""
    return done.stderr.rstrip("\n").split("\nError: ")[-1]


# Encoders


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Two files of weights of a small timm model."""
    folder = tmp_path_factory.mktemp("weights")
    files = []
    for seed in range(2):
        torch.manual_seed(seed)
        files.append(folder / f"{seed}.pth")
        torch.save(timm.create_model("test_resnet").state_dict(), files[-1])
    return files


@pytest.fixture
def model(plugin, weights):
    """The name of the encoder of the package."""
    return f"stages:test_resnet@{weights[0]}"


@pytest.fixture
def photos(shared):
    return [str(path) for path, _ in caltech_photos(shared, "train", 2, 4)]


@pytest.fixture
def folder(photos, tmp_path):
    """The photos in a folder of their class."""
    for number, path in enumerate(photos):
        place = tmp_path / "photos" / Path(path).parent.name / f"{number}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(Path(path).read_bytes())
    return tmp_path / "photos"


def test_the_example_joins_pooled_stages_each_of_unit_norm(model, weights, photos):
    tower = timm.create_model("test_resnet")
    tower.load_state_dict(torch.load(weights[0]))
    view = create_transform(**resolve_model_data_config(tower))(Image.open(photos[0]))[None]
    with torch.no_grad():
        stages = tower.eval().forward_intermediates(view, intermediates_only=True)
    expected = []
    for stage in stages[-3:]:
        pooled = stage.mean((2, 3))[0]
        expected.append((pooled / pooled.norm()).numpy())
    backbone = load_backbone(model, device="cpu")
    raw = backbone.encode_images(backbone.preprocess(Image.open(photos[0]))[None])[0]
    assert_allclose(raw, np.concatenate(expected), atol=1e-4)
    assert (backbone.dim, backbone.has_text, backbone.logit_scale) == (len(raw), False, 100)
    with pytest.raises(UsageError, match="stages:test_resnet: it has no text encoder"):
        backbone.encode_texts(["a cat"])


def test_an_encoder_of_another_package_works_wherever_a_model_is_named(
    plugin, model, folder, photos, tmp_path
):
    index = tmp_path / "index"
    ok("index build", folder, "--model", model, "--out", index)
    identity = Index.load(index).backbone
    assert (str(identity.model), identity.package) == ("stages:test_resnet", "tip-plugin")
    (folder / "other").mkdir()
    Image.new("RGB", (90, 90), "olive").save(folder / "other" / "new.png")
    ok("index add", index, folder)
    answer = json_rows(ok("classify", index, photos[0], "--format", "json"))[0]
    loaded = Classifier.load(index, device="cpu")
    assert loaded.predict(photos[0]).label == answer["label"]
    again = pickle.loads(pickle.dumps(loaded))
    assert again.predict(photos[0]).probability == pytest.approx(answer["probability"], abs=1e-5)
    with TestClient(app_of(index)) as client:
        response = client.post("/v1/classify", files={"images": Path(photos[0]).read_bytes()})
        assert response.json()["results"][0]["label"] == answer["label"], response.text
    assert "tip-plugin 0.1, encoders" in command_line("doctor").stdout


@pytest.mark.parametrize("first", [True, False])
def test_it_is_joined_with_another_encoder_on_either_side(model, first, folder, tmp_path):
    ours = f"local-dir:{tiny(tmp_path / 'model')}"
    names = [model, ours] if first else [ours, model]
    ok("index build", folder, "--model", "+".join(names), "--out", tmp_path / "index")
    stored = json.loads(next((tmp_path / "index").glob("manifests/*")).read_text())
    named = ["package" in part["identity"] for part in stored["parts"]]
    assert named == [first, not first]
    assert stored["parts"][named.index(True)]["identity"]["package"] == "tip-plugin"
    ok("classify", tmp_path / "index", folder)
    parts = encoders_of(Classifier.load(tmp_path / "index").reader.backbone)
    assert [part.has_text for part, _ in parts] == [name == ours for name in names]


def test_the_cache_keeps_its_features_and_those_of_other_weights_apart(
    model, weights, photos, tmp_path
):
    cache = EncodingCache(tmp_path)
    source = of_images(photos)
    features = []
    for name, fresh in ((model, len(photos)), (model, 0), (f"stages:test_resnet@{weights[1]}", 8)):
        reader = Reader(load_backbone(name, device="cpu"), cache=cache)
        features.append(reader.encode(source).features)
        assert reader.done["fresh"] == fresh
    cache.close()
    assert_array_equal(features[0], features[1])
    assert not np.allclose(features[0], features[2], atol=0.01)


def test_an_actor_of_ray_opens_it_by_name(model, photos, tmp_path):
    work = Work(Reader(), partial(load_backbone, model))
    worker = Worker(pickle.loads(pickle.dumps(work)), f"{tmp_path}/out", "cpu", Path.cwd())
    piece = pickle.dumps(of_images(photos))
    rows = worker(pa.table({"part": ["000000"], "piece": [piece]}))
    expected = Reader(load_backbone(model, device="cpu")).encode(of_images(photos)).features
    assert_allclose(np.stack(rows["feature"].to_numpy()), expected, atol=1e-5)


def test_an_index_names_the_package_that_is_missing(plugin, model, folder, tmp_path, capsys):
    index, joined = tmp_path / "index", tmp_path / "joined"
    ours = f"local-dir:{tiny(tmp_path / 'model')}"
    ok("index build", folder, "--model", model, "--out", index)
    ok("index build", folder, "--model", f"{ours}+{model}", "--out", joined)
    plugin.undo()
    for place in (index, joined):
        done = ok("classify", index, write_table(tmp_path / "t.parquet", Index.load(index).keys))
        assert "tip-plugin" not in done.output
        done = command_line("classify", place, folder)
        failed(done, 2, "stages:test_resnet", "needs the package tip-plugin", "install tip-plugin")
        assert "\n" not in last_line(done)
        with pytest.raises(UsageError, match="needs the package tip-plugin"):
            Classifier.load(place)
    with TestClient(app_of(index)) as client:
        assert "needs the package tip-plugin" in capsys.readouterr().err
        response = client.post(
            "/v1/classify", files={"images": next(folder.rglob("*.jpg")).read_bytes()}
        )
        assert response.status_code in range(400, 500)
    failed(command_line("classify", index, folder, "--model", model), 2, "stages:test_resnet")


def test_an_unknown_encoder_is_answered_with_those_of_other_packages(plugin, folder, tmp_path):
    build = ("index build", folder, "--out", tmp_path / "index", "--model")
    failed(command_line(*build, "stagez:resnet18"), 2, "hf:ORG/REPO, stages:...; search with")


@pytest.mark.parametrize(
    "package", ["-r evil", "--index-url=x", "a b", "a;b", "", 3, ["a"], "a" * 101]
)
def test_an_index_cannot_advise_to_install_anything_but_a_package(package):
    with pytest.raises(BackboneError, match="package"):
        Identity.from_dict(IDENTITY.to_dict() | {"package": package})


def test_the_package_is_stored_only_where_it_is_known_and_is_no_part_of_the_fingerprint():
    theirs = Identity("x:y", None, "1", "2", {"size": 4}, package="tip-plugin")
    ours = Identity("x:y", None, "1", "2", {"size": 4})
    assert theirs.fingerprint == ours.fingerprint
    assert Identity.from_dict(json.loads(json.dumps(theirs.to_dict()))) == theirs
    assert "package" not in json.dumps(Identity.joined([ours, IDENTITY]).to_dict())
    assert "tip-plugin" in json.dumps(Identity.joined([theirs, IDENTITY]).to_dict())


FLAT = """
import numpy as np
import torch
from retrieval_tip.backbones.base import Identity

class Flat:
    has_text = False
    logit_scale = 100.0
    precision = "float32"
    batch_size = 4
    dim = 6

    def __init__(self, rest, weights):
        self.scale = 1 + len(rest)
        self.identity = Identity("flat", None, "constant", "constant", {"size": 4})

    def preprocess(self, image):
        pixels = np.asarray(image.resize((4, 4))).astype(np.float32)
        return torch.from_numpy(pixels).permute(2, 0, 1) + 1

    def view(self, image, seed):
        return self.preprocess(image)

    def encode_images(self, pixels):
        means = pixels.mean(dim=(2, 3)).numpy()
        return np.concatenate([means, means ** self.scale], axis=1)

    def encode_texts(self, texts):
        raise NotImplementedError

def open(rest, weights, *, device, precision):
    return Flat(rest, weights)
"""


def test_a_backbone_without_the_optional_members_works_and_shares_no_encodings(
    photos, folder, tmp_path, monkeypatch
):
    """Its digest of the weights is the same for every name."""
    installed(tmp_path / "site", FLAT, monkeypatch, name="flat", encoder="flat")
    cache = EncodingCache(tmp_path)
    short, long = (load_backbone(f"flat:{rest}", device="cpu") for rest in ("a", "aaa"))
    made = [Reader(part, cache=cache).encode(of_images(photos)).features for part in (short, long)]
    cache.close()
    assert not np.allclose(*made, atol=0.01)
    ok("index build", folder, "--model", "flat:a+flat:aaa", "--out", tmp_path / "index")
    failed(
        command_line(
            "index build", folder, "--model", "flat:a@x+flat:a@y", "--out", tmp_path / "no"
        ),
        2,
        "names an encoder twice; or flat-package gives two models one digest",
    )
    failed(
        command_line("index export", tmp_path / "index", "--onnx", tmp_path / "x.onnx"),
        2,
        "flat:a",
        "--features",
    )


USELESS = {
    "dim = 7": "shape (2, 6); expected (2, 7)",
    "encode_images = lambda self, pixels: [[1.0] * 6] * 2": "'list' object",
    "encode_images = lambda self, pixels: np.ones((1, 6), np.float32)": "shape (1, 6)",
    "encode_images = lambda self, pixels: np.ones((2, 6, 1), np.float32)": "shape (2, 6, 1)",
    "encode_images = lambda self, pixels: np.full((2, 6), np.nan)": "zero or not finite",
    "encode_images = lambda self, pixels: np.zeros((2, 6), np.float32)": "zero or not finite",
    "encode_images = lambda self, pixels: 1 / 0": "division by zero",
    "encode_images = None": "not callable",
    "preprocess = lambda self, image: image": "expected Tensor",
}


@pytest.mark.parametrize("line", USELESS)
def test_a_useless_encoder_is_one_line_that_names_its_package(line, folder, tmp_path, monkeypatch):
    code = FLAT.replace("\ndef open", f"    {line}\n\ndef open")
    installed(tmp_path / "site", code, monkeypatch)
    done = command_line("index build", folder, "--model", "bad:a", "--out", tmp_path / "index")
    failed(done, 1, "encoder bad (of bad-package 0.1): bad:a cannot be used (", USELESS[line])
    assert "\n" not in last_line(done)
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize(
    ("code", "status", "words"),
    [
        ("raise RuntimeError('no licence\\nmore')", 2, "cannot be imported (no licence)"),
        ("open = 3", 1, "'int' object is not callable"),
        ("def open(rest, weights, **_):\n    return None", 1, "'NoneType'"),
        ("def open(rest, weights, **_):\n    return 1, 2", 1, "cannot be used"),
        ("def open(rest, weights, **_):\n    raise SystemError", 1, "SystemError"),
    ],
)
def test_a_package_that_fails_is_named(code, status, words, folder, tmp_path, monkeypatch):
    installed(tmp_path / "site", code, monkeypatch)
    done = command_line("index build", folder, "--model", "bad:a", "--out", tmp_path / "index")
    failed(done, status, "bad (of bad-package 0.1)", words)
    assert "\n" not in last_line(done)


def test_optional_members_have_defaults_for_plain_objects_and_subclasses():
    class Subclass(Fake, Backbone):
        """Declares that it is a backbone."""

        batch_size = 4

    for backbone in (Fake(), Subclass()):
        whole = completed(backbone)
        assert (whole.scope, whole.text_key, whole.only([0.0])) == ("float32", None, whole)
        assert whole.encoders() == [(whole, True)]
    assert completed(Joined([Fake()])).encoders()[0][0].identity == IDENTITY


def test_a_row_in_the_table_is_all_that_our_own_encoder_needs(plugin, weights, monkeypatch):
    monkeypatch.setitem(hooks.TABLE["encoders"], "ours", "tip_plugin:stages")
    identity = load_backbone(f"ours:test_resnet@{weights[0]}", device="cpu").identity
    assert (identity.model, identity.package) == ("ours:test_resnet", "retrieval-tip")
    with pytest.raises(BackboneError, match=r"ours \(of retrieval-tip .*cannot be used"):
        load_backbone("ours:no_such_model", device="cpu")
    monkeypatch.setitem(hooks.TABLE["sources"], "module", "tip_plugin")
    assert hooks.find("sources", "module").Lines


def test_our_own_names_cannot_be_replaced(tmp_path, monkeypatch):
    installed(tmp_path / "site", "raise SystemExit(9)", monkeypatch, name="timm", encoder="timm")
    with pytest.raises(UsageError, match="timm has no such model"):
        load_backbone("timm:nonsense")
