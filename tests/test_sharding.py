"""Which GPU gets what, decided against a stand-in for FAISS: the copies themselves are tested where there is a GPU."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from retrieval_tip.retrieval import vector_index
from retrieval_tip.retrieval.vector_index import VectorIndex

KEYS = np.eye(8, dtype=np.float32)


class Faiss:
    """FAISS with so many GPUs; remembers what was copied where."""

    def __init__(self, gpus: int) -> None:
        self.gpus = gpus
        self.copies: list[tuple[str, int | None, SimpleNamespace]] = []

    def get_num_gpus(self) -> int:
        return self.gpus

    def get_compile_options(self) -> str:
        return "OPTIMIZE GPU NVIDIA_CUVS "

    def StandardGpuResources(self) -> object:
        return object()

    def GpuMultipleClonerOptions(self) -> SimpleNamespace:
        return SimpleNamespace(useFloat16=False, use_cuvs=False, shard=False)

    def index_cpu_to_gpu(self, _resources: object, number: int, index: object, options: SimpleNamespace) -> object:
        self.copies.append(("one", number, options))
        return index

    def index_cpu_to_all_gpus(self, index: object, options: SimpleNamespace) -> object:
        self.copies.append(("all", None, options))
        return index


@pytest.fixture
def on(monkeypatch):
    def copied(gpus: int, device: str, free: int, dtype: type = np.float32):
        index = VectorIndex.build(KEYS.astype(dtype), "Flat", "cpu")._cpu
        fake = Faiss(gpus)
        monkeypatch.setattr(vector_index, "faiss", lambda: fake)
        monkeypatch.setattr(vector_index, "_gpu_resources", fake.StandardGpuResources)
        monkeypatch.setattr(vector_index, "_free_on_gpu", lambda: free)
        vector_index._on_gpu(index, device, dtype == np.float16)
        monkeypatch.undo()
        return fake.copies

    return copied


def test_one_gpu_holds_what_fits(on) -> None:
    [(where, number, options)] = on(2, "auto", free=1 << 30)
    assert (where, number, options.shard, options.useFloat16) == ("one", 0, False, False)
    assert options.use_cuvs  # where FAISS was built with it


def test_all_gpus_share_what_does_not_fit_one(on) -> None:
    [(where, _, options)] = on(2, "cuda", free=100)
    assert (where, options.shard) == ("all", True)


def test_half_precision_keys_take_half_the_room(on) -> None:
    room = 8 * (8 * 2 + 8)  # 8 keys of 8 values, and an id each
    assert on(2, "auto", free=room)[0][0] == "all"
    [(where, _, options)] = on(2, "auto", free=room, dtype=np.float16)
    assert (where, options.useFloat16) == ("one", True)


def test_a_named_gpu_is_the_one(on) -> None:
    assert on(4, "cuda:3", free=0)[0][:2] == ("one", 3)
    assert on(1, "cuda", free=0)[0][:2] == ("one", 0)
    assert on(0, "auto", free=0) == on(2, "cpu", free=0) == []


def test_tensors_are_searched_where_they_are() -> None:
    index = VectorIndex.build(KEYS, "Flat", "cpu")
    affinity, rows = index.search_tensor(torch.from_numpy(KEYS[3:5]), 20)
    assert rows.shape == affinity.shape == (2, 8)
    assert rows[:, 0].tolist() == [3, 4]
    assert affinity[:, 0].tolist() == [1.0, 1.0]


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch finds no CUDA GPU, so none is searched with its tensors"
)
@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_tensors_on_a_gpu_stay_there(factory: str, dtype: type) -> None:
    keys = np.random.default_rng(0).standard_normal((500, 32)).astype(dtype)
    index = VectorIndex.build(keys, factory, "cuda")
    queries = torch.from_numpy(keys[:9].astype(np.float32)).cuda()
    affinity, rows = index.search_tensor(queries, 5)
    assert affinity.device.type == rows.device.type == "cuda"
    expected, expected_rows = VectorIndex.build(keys, factory, "cpu").search(queries.cpu().numpy(), 5)
    np.testing.assert_allclose(affinity.cpu().numpy(), expected, rtol=1e-2)
    assert (rows.cpu().numpy()[:, 0] == expected_rows[:, 0]).all()
