"""Several encoders in one index: their features are side by side, and the shots choose how much each counts."""

import itertools
import json
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import failed, json_of, ok
from dense import scatter
from fake import IDENTITY, Fake
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from numpy.random import default_rng
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from serving import app_of
from tables import tiny, unit, unit_rows, write_table

from retrieval_tip import Index, Reader, build_index, load_backbone, open_source, tip
from retrieval_tip.backbones.base import Identity, Part, side_by_side
from retrieval_tip.backbones.joined import Joined
from retrieval_tip.backbones.loading import split_names, split_weights
from retrieval_tip.data.encoding_cache import EncodingCache
from retrieval_tip.data.sources import read_item
from retrieval_tip.errors import BackboneError, InputError, UsageError
from retrieval_tip.estimator import TipAdapterClassifier
from retrieval_tip.evaluation.held_out import classify_sources
from retrieval_tip.fit import closed_form, folds
from retrieval_tip.fit.shares import agree
from retrieval_tip.index import changes, places
from retrieval_tip.predictions import Predictions
from retrieval_tip.retrieval.inputs import scale_of

NAMES = ["crab", "newt", "owl", "yak"]
WIDTHS = (6, 10)
OTHER = replace(IDENTITY, model="other", weights="sha256:02", preprocess={"size": 4})


def of_class(ids, d, noise, seed):
    """Return unit features around a mean of each class."""
    draw = default_rng(seed)
    means = default_rng(d).normal(size=(len(NAMES), d))
    return unit((means[ids] + noise * draw.normal(size=(len(ids), d))).astype(np.float32))


def two(each, noises=(0.6, 0.6), seed=0):
    ids = np.repeat(np.arange(len(NAMES)), each)
    return ids, [of_class(ids, d, noise, seed + d) for d, noise in zip(WIDTHS, noises, strict=True)]


def fitted(features, ids, text=None):
    index = Index.from_features(features, ids, NAMES, text)
    index, _ = closed_form.fit(index)
    return index


@dataclass
class Other(Fake):
    """Another encoder, whose features are the square roots of those of :class:`Fake`."""

    identity: Identity = OTHER
    has_text = False

    def encode_images(self, pixels):
        return np.sqrt(super().encode_images(pixels))


@given(st.integers(1, 5), st.lists(st.integers(1, 5), min_size=2, max_size=3), st.integers(0, 99))
def test_joined_features_have_unit_norm_and_the_mean_affinity_weighted_by_shares(n, widths, seed):
    parts = [unit_rows(n, d, seed) for seed, d in enumerate(widths)]
    joined = side_by_side(parts)
    shares = default_rng(seed).dirichlet(np.ones(len(widths)))
    scaled = joined * scale_of([Part(d, "feature") for d in widths], tuple(shares)).numpy()
    expected = sum(share * part @ part.T for share, part in zip(shares, parts, strict=True))
    assert_allclose(scaled @ scaled.T, expected, atol=1e-5)
    assert_allclose(np.linalg.norm(joined, axis=1), 1, rtol=1e-5)
    assert_allclose(
        joined @ joined.T, np.mean([part @ part.T for part in parts], axis=0), atol=1e-5
    )


def test_without_a_fit_all_encoders_count_equally():
    ids, features = two(3)
    text = [unit_rows(len(NAMES), d, d) for d in WIDTHS]
    index = Index.from_features(features, ids, NAMES, text)
    queries = [unit_rows(5, d, 100 + d) for d in WIDTHS]
    assert index.shares == (0.5, 0.5)
    K, W, f = (
        torch.from_numpy(np.concatenate(parts, 1) / 2**0.5) for parts in (features, text, queries)
    )
    expected = tip.answer(f, K, torch.eye(len(NAMES))[torch.from_numpy(ids)], W)
    torch.testing.assert_close(index.logits(queries), expected, rtol=1e-4, atol=1e-4)
    blocks = Index.from_features(np.concatenate(features, 1), ids, NAMES, blocks=WIDTHS)
    assert_array_equal(blocks.keys, index.keys)


@pytest.mark.parametrize("with_text", [False, True])
def test_an_encoder_without_a_share_changes_no_answer(with_text):
    ids, features = two(8, (0.5, 50.0))
    text = [of_class(np.arange(len(NAMES)), d, 0.1, 7) for d in WIDTHS] if with_text else None
    alone = Index.from_features(features[0], ids, NAMES, None if text is None else text[0])
    index = Index.from_features(features, ids, NAMES, text)
    made = []
    for one in (alone, index):  # the same photos are in the same folds
        digests = pa.array([f"photo {row}" for row in range(one.n)])
        labels = one.labels.set_column(one.labels.column_names.index("digest"), "digest", digests)
        one.rows = replace(one.rows, labels=labels)
        made.append(closed_form.fit(one)[0])
    alone, index = made
    assert index.shares == (1.0, 0.0)
    own, more = two(4, seed=50)[1]
    a = index.classify([own, more])
    b = alone.classify(own)
    assert [one.label for one in a] == [one.label for one in b]
    assert_allclose([x.probability for x in a], [x.probability for x in b], atol=2e-3)
    torch.testing.assert_close(index.logits([own, more]), index.logits([own, np.roll(more, 1, 0)]))


@pytest.mark.parametrize("each", [2, 8])
def test_shares_do_not_depend_on_the_order(each):
    ids, features = two(each, (0.8, 0.5))
    queries = two(5, (0.8, 0.5), seed=9)[1]
    index = fitted(features, ids)
    mirrored = fitted(features[::-1], ids)
    assert index.shares == pytest.approx(mirrored.shares[::-1])
    assert sum(index.shares) == pytest.approx(1)
    torch.testing.assert_close(
        index.logits(queries), mirrored.logits(queries[::-1]), rtol=1e-3, atol=1e-3
    )


def test_two_encoders_that_err_independently_are_more_accurate_than_one():
    ids, features = two(12, (1.1, 1.1))
    truth, queries = two(100, (1.1, 1.1), seed=60)
    right = [
        (fitted(parts, ids).logits(asked).argmax(1).numpy() == truth).mean()
        for parts, asked in (
            (features, queries),
            ([features[0]], [queries[0]]),
            ([features[1]], [queries[1]]),
        )
    ]
    assert right[0] > max(right[1:]) + 0.02


def alike(c=12):
    """Return one photo of each class, to an encoder and to another that finds the same classes alike."""
    one = unit_rows(c, 10, 7)
    turned = one @ np.linalg.qr(default_rng(5).normal(size=(10, 10)))[0]
    return one, unit(turned + 0.1 * default_rng(6).normal(size=turned.shape))


def one_shot(*features):
    names = [f"class {number:02d}" for number in range(len(features[0]))]
    index = Index.from_features(list(features), names, names)
    return closed_form.fit(index)


def test_with_one_shot_an_encoder_to_which_all_photos_look_alike_gets_more():
    """Its affinities are squeezed into a smaller range, as those of CLIP are. The contrast is then the same."""
    flat, other = alike()
    squeezed = unit(np.concatenate([flat, np.full((len(flat), 1), 2.0, np.float32)], axis=1))
    assert one_shot(squeezed, other)[0].shares[0] > one_shot(flat, other)[0].shares[0] > 0


def test_with_one_shot_only_encoders_that_find_the_same_classes_alike_as_the_first_count():
    one, other = alike()
    useless = other[default_rng(5).permutation(len(other))]
    index, choice = one_shot(one, useless, other)
    assert [share > 0 for share in index.shares] == [True, False, True]
    assert [one_shot(*both)[0].shares for both in ((one, useless), (useless, one))] == [
        (1, 0),
        (1, 0),
    ]
    [told] = choice.warnings
    assert "shares of the encoders were not judged" in told


def test_features_of_other_photos_rarely_agree():
    draw = default_rng(0)
    found = [agree(draw.normal(size=(c, 6)), draw.normal(size=(c, 9))) for c in range(4, 204)]
    assert sum(found) <= 33  # of 200; 10 % are expected
    assert not agree(np.ones((9, 3)), draw.normal(size=(9, 4)))
    assert agree(*alike())


@pytest.mark.parametrize("each", [1, 3])
def test_the_prior_of_joined_encoders_is_scaled_by_their_shares(each):
    ids, features = two(each)
    root = default_rng(1).normal(size=(sum(WIDTHS), 40)) / 10
    prior = root @ root.T
    index = Index.from_features(features, ids, NAMES)
    index, choice = closed_form.fit(index, closed_form.FitRequest(prior=prior))
    form = choice.form
    assert form.metric is not None
    assert index.metric is not None
    scale = np.repeat(np.sqrt(2 * np.array(index.shares)), WIDTHS)
    own = len(ids) * scatter(index.keys, ids)
    whole = (own + 1000 * prior) / (len(NAMES) * (each - 1) + 1000) * np.outer(scale, scale)
    variance = sum(part.mean() for part in np.split(whole.diagonal(), [WIDTHS[0]]))
    s = form.metric.shrinkage
    inverse = np.linalg.inv((1 - s) * whole / variance + s * np.eye(len(scale))) * np.outer(
        scale, scale
    )
    transform = index.metric.transform.double().numpy()
    assert_allclose(transform @ transform.T, inverse, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("each", "shares"), [(1, (0.75, 0.25)), (1, (1.0, 0.0)), (3, (0.75, 0.25)), (3, (1.0, 0.0))]
)
def test_the_known_prior_of_one_of_the_encoders_is_used(each, shares, monkeypatch):
    """With several photos per class, it is used if no other encoder counts. Otherwise, it is used with one photo, too.

    Joining another encoder must not lose what the prior adds to the accuracy of the first one.
    """
    ids, features = two(each)
    root = default_rng(1).normal(size=(WIDTHS[0], 40)) / 10
    known = root @ root.T
    monkeypatch.setattr(
        folds, "known_prior", lambda part: known if part.identity == IDENTITY else None
    )
    monkeypatch.setattr(closed_form, "shares_of", lambda *_: shares)
    prior = np.zeros((sum(WIDTHS), sum(WIDTHS)))
    prior[: WIDTHS[0], : WIDTHS[0]], prior[WIDTHS[0] :, WIDTHS[0] :] = (
        known / 2,
        np.eye(WIDTHS[1]) / WIDTHS[1] / 2,
    )
    index, given, plain = (Index.from_features(features, ids, NAMES) for _ in "abc")
    index.parts = tuple(
        replace(part, identity=one)
        for part, one in zip(index.parts, (IDENTITY, OTHER), strict=True)
    )
    asked = (index, None), (given, closed_form.FitRequest(prior=prior)), (plain, None)
    (index, given, plain), forms = zip(*(closed_form.fit(*one) for one in asked), strict=True)
    forms = [choice.form for choice in forms]
    same = plain if each > 1 and shares[1] else given
    assert forms[0] == forms[1 if same is given else 2]
    queries = two(5, seed=9)[1]
    if same.metric is not None:
        torch.testing.assert_close(
            index.metric.transform, same.metric.transform, rtol=1e-4, atol=1e-5
        )
    torch.testing.assert_close(index.logits(queries).argmax(1), same.logits(queries).argmax(1))
    if each == 1:  # alpha does not grow with the number of values of the other encoder
        alone = Index.from_features(features[0], ids, NAMES)
        alone, _ = closed_form.fit(alone, closed_form.FitRequest(prior=known))
        assert index.settings.alpha == pytest.approx(alone.settings.alpha)


def table_of(folder, name, ids, columns):
    table = {"id": [f"{name}{i}" for i in range(len(ids))], "label": [NAMES[i] for i in ids]}
    table |= {
        column: pa.FixedSizeListArray.from_arrays(rows.ravel(), rows.shape[1])
        for column, rows in columns.items()
    }
    pq.write_table(pa.table(table), folder / f"{name}.parquet")
    return folder / f"{name}.parquet"


def test_columns_of_a_table_are_encoders(tmp_path, run):
    ids, (clip, cnn) = two(6)
    box = unit_rows(len(ids), 4, 3)
    shots = table_of(tmp_path, "shots", ids, {"clip": clip, "box": box, "cnn": cnn})
    ok("index build", shots, "--features", "clip,cnn", "--out", tmp_path / "own")
    index = places.at(tmp_path / "own").load()
    assert [(part.width, part.column) for part in index.parts] == [(6, "clip"), (10, "cnn")]
    assert "box" in index.labels.column_names
    assert "cnn" not in index.labels.column_names
    assert "encoders" in run("index info", tmp_path / "own").output
    assert json_of("index info", tmp_path / "own")["encoders"].keys() == {
        "clip",
        "cnn",
    }
    new = table_of(tmp_path, "new", ids, {"cnn": cnn, "clip": clip})
    answers = run("classify", tmp_path / "own", new, "--format", "json").output.splitlines()
    expected = index.classify([clip, cnn])
    assert [json.loads(line)["label"] for line in answers] == [one.label for one in expected]
    ok("index add", tmp_path / "own", new)
    lost = table_of(tmp_path, "lost", ids, {"clip": clip})
    failed(run("classify", tmp_path / "own", lost), 1, "'cnn'")
    assert (
        run("index build", shots, "--features", "clip,dog", "--out", tmp_path / "no").exit_code == 1
    )


def test_a_missing_feature_is_refused_with_its_row_and_column(tmp_path):
    rows = [unit_rows(4, 3).tolist(), unit_rows(4, 2).tolist()]
    rows[1][2] = None
    table = pa.table(
        {"id": list("abcd"), "label": list("xxyy"), "feature": rows[0], "cnn": rows[1]}
    )
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(InputError, match="column 'cnn': row 2 without a feature"):
        build_index(
            open_source(tmp_path / "t.parquet"),
            tmp_path / "own",
            Reader(),
            features=["feature", "cnn"],
        )


@pytest.fixture
def photos(tmp_path):
    draw = default_rng(0)
    for number, name in enumerate(("red", "green", "blue")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(5):
            pixels = draw.integers(0, 60, (40, 50, 3)) + np.eye(3, dtype=int)[number] * (
                100 + 15 * i
            )
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path / "photos"


def test_each_photo_is_read_once_and_each_encoder_has_its_own_cache(photos, tmp_path):
    first = Fake()
    second = Other()
    cache = EncodingCache(tmp_path / "cache")
    reads = []

    def read(path):
        reads.append(path)
        return read_item(path)

    source = open_source(photos)
    alone = Reader(first, cache=cache).encode(source).features
    made = first.prepared
    joined = (
        Reader(Joined([first, second]), cache=cache).encode(replace(source, load=read)).features
    )
    assert (first.prepared, len(reads)) == (made, 15)
    assert_allclose(
        joined, side_by_side([alone, Reader(second).encode(source).features]), atol=1e-6
    )


def test_an_encoder_without_a_share_is_not_run_for_queries(photos):
    first = Fake()
    second = Other()
    second.batches.clear()
    backbone = Joined([first, second])
    source = open_source(photos)
    index = Index.from_features(
        Reader(backbone).encode(source).features, source.labels, source.class_names, blocks=(6, 6)
    )
    index, _ = closed_form.fit(index)
    assert index.fitted is not None
    index = index.with_fit(index.metric, index.values, replace(index.fitted, shares=(1.0, 0.0)))
    done = len(second.batches)
    answers = Predictions.joined(classify_sources(index, [source], Reader(backbone)))
    assert (len(answers), len(second.batches)) == (15, done)


def test_the_identity_of_joined_encoders_survives_metadata():
    joined = Joined([Fake(), Other()]).identity
    again = Identity.from_dict(json.loads(json.dumps(joined.to_dict())))
    assert (again, again.fingerprint) == (joined, joined.fingerprint)
    assert joined.fingerprint != Joined([Other(), Fake()]).identity.fingerprint


def test_names_join_encoders_and_their_weights(tmp_path):
    assert split_names("ViT-B-32@openai+timm:resnet18") == ["ViT-B-32@openai", "timm:resnet18"]
    plus = tiny(tmp_path / "a+b")
    assert split_names(f"local-dir:{plus}") == [f"local-dir:{plus}"]
    tiny(tmp_path / "c", seed=1)
    backbone = load_backbone(f"local-dir:{tmp_path / 'c'}", device="cpu")
    with pytest.raises(UsageError, match="names an encoder twice"):
        Joined([backbone, backbone])
    at = tiny(tmp_path / "d@e") / "f+g.pt"
    assert (split_weights(f"local-dir:{at.parent}"), split_weights("a@b@c")) == (
        (f"local-dir:{at.parent}", None),
        ("a", "b@c"),
    )
    at.touch()
    for name in (f"timm:resnet18@{at}", f"ViT-B-32@openai={at}"):
        assert split_names(name) == [name]
        assert split_weights(name)[1] == name.partition("@")[2]
    several = [
        "ViT-B-32",
        f"local-dir:{plus}",
        f"timm:resnet18@{at}",
        f"local-dir:{at.parent}",
        f"ViT-B-32@openai={at}",
    ]
    for names in itertools.permutations([*several, f"local-dir:{plus}@{at}"]):
        assert split_names("+".join(names)) == [*names]
    with pytest.raises(UsageError, match="model '': unknown"):
        load_backbone(f"local-dir:{plus}+", device="cpu")


def test_everything_that_takes_an_encoder_takes_two(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("RETRIEVAL_TIP_CACHE", str(tmp_path / "cache"))
    a, b = (f"local-dir:{tiny(tmp_path / name, seed)}" for seed, name in enumerate("ab"))
    own = tmp_path / "own"
    table = tmp_path / "table.parquet"

    def done(*arguments):
        result = ok(*arguments)
        return str(result.output)

    done("index", "build", photos, "--out", own, "--model", f"{a}+{b}")
    answers = done("classify", own, photos, "--format", "csv")
    done("encode", photos, "--out", table, "--model", f"{a}+{b}")
    assert pq.read_schema(table).names[2:4] == ["feature", "feature_2"]
    from_table = done("classify", own, table, "--format", "csv")
    assert [line.split(",")[1:] for line in from_table.splitlines()] == [
        line.split(",")[1:] for line in answers.splitlines()
    ]
    swapped = pq.read_table(table)
    names = [
        {"feature": "two", "feature_2": "one"}.get(name, name) for name in swapped.column_names
    ]
    pq.write_table(swapped.rename_columns(names), tmp_path / "renamed.parquet")
    again = done("classify", own, tmp_path / "renamed.parquet", "--format", "csv")
    assert again == from_table  # the columns are recognised by their encoders
    done("index", "build", table, "--out", tmp_path / "of-table")
    assert places.at(tmp_path / "of-table").load().backbone == places.at(own).load().backbone
    assert "10 of 10 photos" in done("index", "export", own, "--onnx", tmp_path / "graph.onnx")
    photo = next(photos.rglob("*.png"))
    with TestClient(app_of(own)) as client:
        answer = client.post(
            "/v1/classify", files={"images": (photo.name, photo.read_bytes())}
        ).json()["results"][0]
        assert (
            f"{a}+{b}"
            in client.get(f"/v1/indexes/{client.get('/v1/indexes').json()['indexes'][0]}").json()[
                "backbone"
            ]
        )
    [line] = [line for line in answers.splitlines() if line.startswith(str(photo))]
    _, label, probability = line.split(",")[:3]
    assert (answer["label"], answer["probability"]) == (
        label,
        pytest.approx(float(probability), abs=1e-3),
    )
    address = f"lance://{tmp_path / 'store' / 'own'}"
    done("index", "clone", own, address)
    assert done("classify", address, photos, "--format", "csv") == answers


def test_features_of_another_encoder_are_refused(photos, tmp_path):
    first = Fake()
    second = Other()
    source = open_source(photos)
    own = tmp_path / "own"
    build_index(
        source, own, Reader(Joined([first, second])), text=text_of(tmp_path, source.class_names)
    )
    for backbone in (Joined([second, first]), first):
        with pytest.raises(BackboneError, match="cannot be compared"):
            changes.add(own, source, Reader(backbone))
    added = changes.add(own, source, Reader(Joined([first, second])))
    assert (added.key_ids, added.known) == ([], 15)


def text_of(folder, names):
    """Write text features of the first encoder. The other has no text."""
    return write_table(
        folder / "text.parquet", unit_rows(len(names), 6, 5), list(names), ids=list(names)
    )


def test_text_of_one_encoder_is_enough(photos, tmp_path):
    backbone = Joined([Fake(), Other()])
    source = open_source(photos)
    index = build_index(
        source,
        tmp_path / "own",
        Reader(backbone),
        text=text_of(tmp_path, source.class_names),
        fit="none",
    )
    alone = build_index(
        source,
        tmp_path / "one",
        Reader(Fake()),
        text=text_of(tmp_path, source.class_names),
        fit="none",
    )
    f = Reader(backbone).encode(source).features
    own = index.terms(f).text
    torch.testing.assert_close(
        own, alone.terms(Reader(Fake()).encode(source).features).text, rtol=1e-3, atol=1e-2
    )


def test_the_estimator_takes_blocks():
    ids, features = two(6, (0.5, 50.0))
    X = np.concatenate([10 * features[0], features[1]], axis=1)
    model = TipAdapterClassifier(blocks=WIDTHS).fit(X, ids)
    assert model.index_.shares[0] > 0.5
    assert (model.predict(X) == ids).mean() > 0.9
