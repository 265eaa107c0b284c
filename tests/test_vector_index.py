"""The FAISS index against matrix products in NumPy."""

import itertools
import random

import faiss
import numpy as np
import pytest
from conftest import SOAK
from numpy.random import default_rng
from numpy.testing import assert_allclose, assert_array_equal

from retrieval_tip.errors import StoreError, UsageError
from retrieval_tip.retrieval import vector_index
from retrieval_tip.retrieval.vector_index import GPU_MAX_K, VectorIndex

D = 64

# factory string: search is exact, affinities are exact, tolerance of affinities
TYPES = {
    "Flat": (True, True, 1e-5),
    "IVF16,Flat": (False, True, 1e-5),
    "HNSW32": (False, True, 1e-5),
    "HNSW32,Flat": (False, True, 1e-5),
    "SQfp16": (False, False, 2e-3),
    "SQ8": (False, False, 3e-2),
    "IVF16,SQfp16": (False, False, 2e-3),
    "PQ8": (False, False, 1.0),
    "PCA32,Flat": (False, False, 1.0),
    "Classes": (False, True, 1e-5),
}
every_type = pytest.mark.parametrize("factory", TYPES)


def clustered_vectors(seed, n, d=D, spread=0.7):
    """Return vectors in 12 clusters, with norms from 0.5 to 1.5 like those of fine-tuned keys."""
    centres = default_rng(99).standard_normal((12, d))
    rng = default_rng(seed)
    x = centres[rng.integers(12, size=n)] + spread * rng.standard_normal((n, d))
    x *= rng.uniform(0.5, 1.5, size=(n, 1)) / np.linalg.norm(x, axis=1, keepdims=True)
    return x.astype(np.float32)


KEYS = clustered_vectors(1, 640)
QUERIES = clustered_vectors(2, 9)
EXACT = QUERIES.astype(np.float64) @ KEYS.T.astype(np.float64)
NEAREST = np.argsort(-EXACT, axis=1)

_built = {}


def built(factory):
    if factory not in _built:
        _built[factory] = VectorIndex.build(KEYS, factory, "cpu")
    return _built[factory]


@every_type
def test_search_returns_near_keys_with_their_affinities(factory, tmp_path):
    """A file of the index gives the same answers and the same bytes."""
    exact_search, exact_affinity, tolerance = TYPES[factory]
    index = built(factory)
    index.save(tmp_path / "index.faiss")
    loaded = VectorIndex.load(tmp_path / "index.faiss", factory, "cpu")
    for one in (index, loaded):
        assert (one.by_class, one.exact_affinity) == (factory == "Classes", exact_affinity)
        assert (one.n, one.d, one.device, one.factory) == (640, D, "cpu", factory)
    loaded.save(tmp_path / "again.faiss")
    assert (tmp_path / "again.faiss").read_bytes() == (tmp_path / "index.faiss").read_bytes()
    affinity, rows = index.search(QUERIES, np.int64(10))
    assert affinity.shape == rows.shape == (9, 10)
    assert (affinity.dtype, rows.dtype) == (np.float32, np.int64)
    assert (np.diff(affinity, axis=1) <= 0).all()
    assert all(len(set(row)) == 10 for row in rows.tolist())
    if exact_search:
        assert (rows == NEAREST[:, :10]).all()
    recall = np.mean(
        [
            len(set(a) & set(b)) / 10
            for a, b in zip(rows.tolist(), NEAREST[:, :10].tolist(), strict=True)
        ]
    )
    assert recall > (0.3 if factory in ("PQ8", "PCA32,Flat") else 0.85)
    assert_allclose(affinity, np.take_along_axis(EXACT, rows, axis=1), atol=tolerance)
    affinity, rows = index.search(QUERIES, 10_000)
    for found, expected in zip(loaded.search(QUERIES, 10_000), (affinity, rows), strict=True):
        assert_array_equal(found, expected)
    assert affinity.shape == rows.shape == (9, 640)
    for row in rows:
        found = row[row >= 0]
        assert len(set(found.tolist())) == len(found) <= 640
        assert (row[len(found) :] == -1).all()  # empty slots come last
    filled = rows >= 0
    assert filled.all() or not exact_search
    assert not filled.all() or factory != "IVF16,Flat"  # probes 8 lists of 16
    if exact_affinity:
        own = np.take_along_axis(EXACT, np.maximum(rows, 0), axis=1)
        assert_allclose(affinity[filled], own[filled], atol=tolerance)


BAD = [
    "nonsense",
    "",
    "flat",
    "IVF16",
    "IVF16,nonsense",
    "IMI2x4,Flat",
    "LSH",
    "IDMap,Flat",
    "Flat\n",
    "HNSW３２",
    "L2norm,Flat",
    "L2Norm,IVF16,Flat",
    "PCA32,L2norm,Flat",  # would normalise
    "PQ7",
    "PCA128,Flat",
    "IVF1000,Flat",
    "IVF641,Flat",
    "HNSW1025",
    "OPQ8_65,PQ8",
    "PQ65x4",
    "IVF0,Flat",
    "HNSW0",
    "HNSW1",
    "IVF16_HNSW1,Flat",
    "PQ8x0",
    "PCA0,Flat",
    "Classes,Nope",
    "ClassesX",
    "Classes,Classes",
    "Classes,HNSW8",
    "Classes,,",
]
DANGEROUS = [
    "Flat,Refine(IVF4,Flat)",
    "Flat,Refine(NSG16)",
    "Flat,Refine(PQ4x4fs)",
    "PQ4x4,Refine(PQ4x4,RFlat)",  # an abort
    "PCA7,OPQ60_300,Flat",
    "IVF2(" * 2000 + "Flat" + "),Flat" * 2000,
    "Flat" * 10_000,
    "9" * 100_000,  # memory, stack
    "NSG2",
    "NSG16",
    "NSG128",
    "PRQ2x100000x4",
    "LSQ64x6",
    "RR10000,Flat",
    "Pad1024,OPQ1024,PQ8",  # hours or forever
    "RQ2x24",
    "RQ100000000x4",
    "IVF1000000000,Flat",
    "HNSW100000000",
    "PQ1x24",
    "PQ4000x99",  # gigabytes
    "PQ8x1",
    "PQ8x2",
    "Flat" + ",RFlat" * 2000,  # fail at the first search
    "SQ8_direct",
    "IVF4,SQ8_direct",
    "IVF4,ITQ,SH",  # return random keys
    "x" * 100_000,
    "{}" * 20_000,
    "\udcff",
    "Flat\xa0",
    "HNSW99999999",
    "NSG99999999",
    "IVF99999999,Flat",
    "LSH5000",
    "IMI2x16,Flat",
    "IVF" + "9" * 250,
    "Pad99999999,Flat",
    "PQ8x99999",  # crash or use up the memory
]
"""Index types that FAISS accepts, with the consequence."""


@pytest.mark.parametrize(
    "factory", [*BAD, *(pytest.param(factory, id=factory[:30]) for factory in DANGEROUS)]
)
def test_a_bad_index_type_is_refused_in_one_line(factory, monkeypatch):
    if factory in DANGEROUS:
        monkeypatch.setattr(faiss, "index_factory", lambda *_: pytest.fail("passed to FAISS"))
    with pytest.raises(UsageError) as caught:
        VectorIndex.build(KEYS, factory, "cpu")
    message = str(caught.value)
    assert message.startswith(f"index {factory[:80]!r}"[:-1])
    assert "\n" not in message
    assert len(message) < 400
    assert "/faiss/" not in message  # no path in FAISS's source


GRAMMAR = (
    ["", "PCA32,", "PCAR16,", "PCAW8,", "RR64,", "OPQ8,", "OPQ8_32,"],
    [
        "Flat",
        "SQ4",
        "SQ6",
        "SQ8",
        "SQfp16",
        "SQbf16",
        "HNSW",
        "HNSW8",
        "HNSW32,Flat",
        "HNSW32_SQ8",
        "IVF16,Flat",
        "IVF16_HNSW,SQ8",
        "IVF16_HNSW32,PQ8x4",
        "PQ8",
        "PQ8x4fs",
        "IVF16,PQ8x4fsr",
        "RaBitQ",
        "IVF8,RaBitQ4",
        "RaBitQfs",
    ],
    ["", ",RFlat", ",Refine(SQ8)", ",Refine(Flat)"],
)


def test_composed_index_types_find_near_keys_and_can_be_saved(tmp_path):
    kinds = ["".join(parts) for parts in itertools.product(*GRAMMAR)]
    for factory in kinds if SOAK else random.Random(0).sample(kinds, 24):
        index = VectorIndex.build(KEYS, factory, "cpu")
        rows = index.search(QUERIES, 10)[1]
        exact = np.take_along_axis(EXACT, rows, axis=1)
        assert exact.mean() > EXACT.mean() + 2 * EXACT.std() / 3, factory
        assert all(len(set(row)) == 10 for row in rows.tolist()), factory
        index.save(tmp_path / "index.faiss")
        for one, other in zip(
            index.search(QUERIES, 640),
            VectorIndex.load(tmp_path / "index.faiss", factory, "cpu").search(QUERIES, 640),
            strict=True,
        ):
            assert_array_equal(one, other, factory)


@pytest.mark.parametrize("factory", ["IVF16,Flat", "PQ8", "PCA32,IVF16,Flat"])
def test_too_few_keys_for_training_are_refused(factory):
    with pytest.raises(UsageError, match=r"^index '.*': .* 5 .* of 64 values\)?$"):
        VectorIndex.build(KEYS[:5], factory, "cpu")


@pytest.mark.parametrize("content", [b"", b"not an index", None, "Flat", "IVF16,Flat"])
def test_a_file_that_is_not_an_index_is_refused(content, tmp_path):
    path = tmp_path / "index.faiss"
    if isinstance(content, str):  # the first half of an index
        built(content).save(path)
        content = path.read_bytes()[: path.stat().st_size // 2]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StoreError) as caught:
        VectorIndex.load(path, "Flat")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.gpu
def test_a_gpu_index_answers_a_large_k_on_the_cpu():
    keys = clustered_vectors(3, GPU_MAX_K + 500, d=8)
    index = VectorIndex.build(keys, "Flat", "cuda")
    assert index.device == "cuda"
    for k in (GPU_MAX_K, GPU_MAX_K + 1, len(keys)):
        affinity, rows = index.search(keys[:3], k)
        expected = -np.sort(-(keys[:3].astype(np.float64) @ keys.T.astype(np.float64)), axis=1)[
            :, :k
        ]
        assert rows.shape == (3, k)
        assert_allclose(affinity, expected, atol=1e-3)


@pytest.mark.parametrize(
    ("n", "c", "expected"),
    [
        (1, 1, ("Flat", None)),
        (2048, 2, ("Flat", None)),
        (4000, 1000, ("Flat", None)),  # 4 per class
        (4001, 1000, ("Classes", 32)),
        (16000, 1000, ("Classes", 128)),  # 16 shots of ImageNet: 8 classes
        (2049, 2, ("Classes", 1024)),
        (1_281_167, 1000, ("Classes", 10249)),
        (1_000_000, 100, ("Classes", 80_000)),
        (32768 * 16, 32768, ("Classes", 128)),
    ],
)
def test_auto_chooses_by_the_number_of_keys_and_classes(n, c, expected):
    assert vector_index.auto_factory(n, c) == expected
