"""The pieces by themselves: parcels, who does what, and a watch over a store that this process holds."""

import time
from dataclasses import dataclass

import pytest
import torch
from torch import distributed as dist

from fedgram.bindings._distributed.parcels import ALIGNMENT, pack, unpack
from fedgram.bindings._distributed.plan import Unit, owner_of, plan
from fedgram.bindings.distributed import RankError, Watch

CPU = torch.device("cpu")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)


@dataclass(frozen=True)
class Thing:
    name: str
    tensor: torch.Tensor


@pytest.mark.parametrize("dtype", DTYPES)
def test_parcels_keep_every_bit_shape_and_dtype(dtype):
    g = torch.Generator().manual_seed(0)
    given = {
        "odd": torch.randint(0, 200, (3, 5), generator=g).to(dtype),
        "strided": torch.randint(0, 200, (6, 7), generator=g).to(dtype).T[1:, ::2],
        "scalar": torch.tensor(1).to(dtype),
        "empty": torch.empty((4, 0), dtype=dtype),
        "grad": [torch.nn.Parameter(torch.ones(3))],
        "thing": Thing("ü\n", torch.arange(17)),
        "none": None,
    }
    parcel = pack(given, CPU)
    assert parcel.dtype == torch.uint8
    assert parcel.numel() % ALIGNMENT == 0
    # as it arrives: somewhere within a larger buffer
    found = unpack(torch.cat([torch.zeros(ALIGNMENT, dtype=torch.uint8), parcel])[ALIGNMENT:])
    for name in ("odd", "strided", "scalar", "empty"):
        assert found[name].dtype == dtype
        assert found[name].shape == given[name].shape
        assert torch.equal(found[name], given[name])
    assert torch.equal(found["grad"][0], torch.ones(3))
    assert not found["grad"][0].requires_grad
    assert found["thing"].name == "ü\n"
    assert torch.equal(found["thing"].tensor, torch.arange(17))
    assert found["none"] is None


def test_nan_and_negative_zero_travel_as_they_are():
    bits = torch.tensor([0x7FC00001, -0x80000000, 0x7F800000], dtype=torch.int64).to(torch.int32)
    [found] = unpack(pack([bits.view(torch.float32)], CPU))
    assert torch.equal(found.view(torch.int32), bits)


def test_costly_modules_are_apart_and_full_tensors_go_with_their_module():
    modules = {"a.q": 1.0, "a.q.k": 4.0, "b": 4.0, "c": 1.0}
    extras = {"pre.a.q.k.bias": 0.5, "head.weight": 9.0, "other": 0.1}
    work = plan(modules, extras, 2)
    units = [unit for mine in work for unit in mine]
    assert sorted(unit.module for unit in units) == sorted(modules)
    assert sorted(name for unit in units for name in unit.extras) == sorted(extras)
    rank = {unit.module: k for k, mine in enumerate(work) for unit in mine}
    assert rank["a.q.k"] != rank["b"]
    assert next(unit for unit in units if unit.module == "a.q.k").extras[0] == "pre.a.q.k.bias"
    head = next(k for k, mine in enumerate(work) for unit in mine if "head.weight" in unit.extras)
    assert "other" not in [name for unit in work[head] for name in unit.extras]  # that rank is the busier one


def test_ranks_beyond_the_modules_are_idle_and_take_no_full_tensors():
    work = plan({"a": 1.0, "b": 2.0}, {"x": 5.0, "y": 5.0, "z": 5.0}, 4)
    assert [len(mine) for mine in work] == [1, 1, 0, 0]
    assert work[0][0].module == "b"
    assert sorted(name for mine in work for unit in mine for name in unit.extras) == ["x", "y", "z"]
    assert plan({"a": 1.0}, {}, 1) == [[Unit("a")]]


def test_a_full_tensor_belongs_to_the_longest_module_that_its_name_holds_whole():
    modules = {"layers.1", "layers.1.proj", "layers.11"}
    assert owner_of("base_model.model.layers.1.proj.bias", modules) == "layers.1.proj"
    assert owner_of("layers.1.norm", modules) == "layers.1"
    assert owner_of("layers.11.norm", modules) == "layers.11"
    assert owner_of("layers.111.norm", modules) is None


@pytest.fixture
def store():
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def client(store):
    return dist.TCPStore("127.0.0.1", store.port, is_master=False)


def test_the_first_failure_is_the_one_that_is_told_and_by_one_rank_only(store):
    watches = [Watch(client(store), k, 3) for k in range(3)]
    assert watches[1].claim("it rains") == "it rains"
    assert [watches[k].claim("it snows") for k in (0, 2)] == [None, None]
    assert watches[1].claim("it snows") == "it rains"
    for watch in watches:
        with pytest.raises(RankError, match="it rains"):
            watch.check()
        with pytest.raises(RankError, match="it rains"):
            watch.ready()


def test_a_silent_rank_is_given_up_and_one_that_has_left_is_not(store):
    ended = []
    with Watch(client(store), 1, 2, patience=0.5, last_resort=ended.append, grace=0.2) as one:
        with Watch(client(store), 0, 2, patience=0.5) as zero:
            zero._tells = False  # it need not wait for the other to leave
            time.sleep(1.0)
            assert one.failure is None
        time.sleep(1.0)  # rank 0 has left in order: silence is no failure
        one.check()
        store.delete_key("left/0")
        deadline = time.monotonic() + 20
        while not ended and time.monotonic() < deadline:
            time.sleep(0.05)
        with pytest.raises(RankError, match="rank 0"):
            one.check()
    assert ended == ["rank 0 of 2 has not been heard of for 0.5 s"]


def test_a_signal_that_comes_while_the_store_is_asked_is_no_lost_store(store):
    watch = Watch(client(store), 1, 2)

    def signalled():
        raise RankError("rank 1 received SIGTERM")

    with pytest.raises(RankError, match="SIGTERM"):
        watch._ask(signalled)
    assert watch.claim("it rains") == "it rains"  # which another rank will read


class Lost:
    """A store whose holder has ended."""

    def __init__(self):
        self.asked = 0

    def set_timeout(self, _):
        pass

    def compare_set(self, *_):
        self.asked += 1
        raise dist.DistNetworkError("connection reset")


def test_a_lost_store_is_asked_once_and_told_of_once_on_every_host(monkeypatch):
    watch = Watch(Lost(), 3, 4)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert watch.claim("gone") == "gone"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert watch.claim("gone") is None
    with pytest.raises(RankError, match="the store of the job cannot be reached"):
        watch.ready()
    assert watch._store.asked == 1


def test_patience_is_a_time(store):
    with pytest.raises(ValueError, match="patience: expected seconds above 0, got 0"):
        Watch(client(store), 0, 1, patience=0)
