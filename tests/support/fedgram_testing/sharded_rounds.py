"""A round of clients and gradients that every process makes alike, and what each rank does with them in the tests."""

import os
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import torch
from torch import distributed as dist
from torch import nn

from fedgram.bindings._distributed import ranks
from fedgram.bindings.distributed import Watch, aggregate_sharded, match_sharded
from fedgram.flora_na import METHODS, Adapter, LoraLayer
from fedgram_testing.recorded import Counted

SIZES = {f"layers.{i}.proj": (40 + 8 * i, 30) for i in range(7)}
WEIGHTS = [1.0, 2.0, 3.0, 0.0, 5.0]
NAMES = [f"site {u}" for u in range(5)]
OWN = {4: [0, 2, 3, 3, 5], 2: [0, 2, 5]}
"""Where each rank's own clients begin and end: on four ranks one has none."""
SHAPES = ((5, 7), (64,), (9, 3), ())


def adapters():
    """Five clients of ranks 3 and 4, a bias of one module, a head of its own, and an integer table."""
    g = torch.Generator().manual_seed(0)

    def client(u):
        r = 3 + u % 2
        layers = {
            name: LoraLayer(A=torch.randn(r, n, generator=g), B=torch.randn(m, r, generator=g), scaling=1.0 + u)
            for name, (m, n) in SIZES.items()
        }
        extras = {"layers.3.proj.bias": torch.randn(11, generator=g), "head.weight": torch.randn(6, 5, generator=g)}
        return Adapter(layers, extras, {"client": u})

    return [client(u) for u in range(5)]


def wide():
    """Five clients whose factors outweigh their names by far."""
    g = torch.Generator().manual_seed(2)
    shapes = {name: (10 * m, 100 * n) for name, (m, n) in SIZES.items()}

    def layer(m, n):
        return LoraLayer(A=torch.randn(3, n, generator=g), B=torch.randn(m, 3, generator=g))

    return [{name: layer(*shape) for name, shape in shapes.items()} for _ in range(5)]


def without(clients, module, u):
    """The same clients, but client u lacks a module."""
    lacking = {name: layer for name, layer in clients[u].modules.items() if name != module}
    return [Adapter(lacking, c.extras, c.config) if i == u else c for i, c in enumerate(clients)]


def gradients():
    """Six gradients that share a large part."""
    g = torch.Generator().manual_seed(1)
    common = [10 * torch.randn(s, generator=g) for s in SHAPES]
    return [[c + torch.randn(c.shape, generator=g) for c in common] for _ in range(6)]


def uneven_gradients():
    """Four gradients of which two are much shorter than the mean, one of them than the other, too."""
    g = torch.Generator().manual_seed(4)
    return [[length * torch.randn(s, generator=g) for s in SHAPES] for length in (1.0, 1e-4, 1.0, 1e-9)]


def shard(tensor, rank, count):
    """A slice of the flattened tensor as FSDP cuts it: the last ranks may hold less, or nothing."""
    size = -(-tensor.numel() // count)
    return tensor.flatten()[rank * size : (rank + 1) * size]


def plain(result):
    """A sharded aggregation as tensors and numbers."""
    layers = {name: (x.A, x.B, x.scaling) for name, x in result.adapter.modules.items()}
    rest = None if result.residual is None else {n: (x.A, x.B) for n, x in result.residual.modules.items()}
    return {
        "layers": layers,
        "rest": rest,
        "extras": dict(result.adapter.extras),
        "config": result.adapter.config,
        "report": result.report.to_dict(),
        "owned": result.owned,
        "traffic": (result.sent, result.received),
    }


def own(values, rank, count):
    """The part of a list that belongs to this rank's clients."""
    return values[OWN[count][rank] : OWN[count][rank + 1]]


def everything(rank, folder):
    """What the tests of four ranks, and of two of them as a group of their own, look at."""
    pair = dist.new_group([1, 2])
    found = {"world": in_group(rank, 4, None), "watched": watched(rank), "fsdp": fully_sharded(4)}
    if rank in (1, 2):
        found["pair"] = in_group(rank - 1, 2, pair)
    return found


def in_group(rank, count, group):
    """Aggregations, matchings and refusals on one group."""
    clients = adapters()
    mine = own(clients, rank, count)
    local = {"weights": own(WEIGHTS, rank, count), "names": own(NAMES, rank, count), "clients": "own", "group": group}
    whole = {"weights": WEIGHTS, "names": NAMES, "group": group}
    found = {
        "all": {m: plain(aggregate_sharded(clients, method=m, residual=True, **whole)) for m in METHODS},
        "own": {m: plain(aggregate_sharded(mine, method=m, residual=True, **local)) for m in METHODS},
        "everyone": plain(aggregate_sharded(mine, result="all", **local)),
        "sharded": plain(aggregate_sharded(clients, result="sharded", **whole)),
        "lacking": plain(aggregate_sharded(without(clients, "layers.2.proj", 4), missing="zero", **whole)),
        "anchored": plain(aggregate_sharded(mine, method="flora-na", anchor=clients[0], **local)),
    }
    last = aggregate_sharded(clients, result="sharded", **whole).adapter
    found["next round"] = plain(aggregate_sharded(clients, method="flora-na", anchor=last, **whole))
    kept = aggregate_sharded(own(wide(), rank, count), method="fedavg", result="sharded", **local)
    found["factors"] = (kept.owned, kept.sent, kept.received)
    even = aggregate_sharded([wide()[rank]], method="fedavg", clients="own", result="sharded", group=group)
    found["even"] = (even.sent, even.received)
    ranks.PIECE, piece = 1000, ranks.PIECE  # every parcel in several collectives
    found["pieces"] = plain(aggregate_sharded(mine, result="all", **local))
    ranks.PIECE = piece
    counted = [Counted(c.modules) for c in clients]
    done = aggregate_sharded(counted, **whole)
    found["read"] = (done.owned, [c.reads for c in counted])
    found["match"] = [matched(rank, count, group, cut) for cut in ("slices", "tensors", "slices")]
    shards = [[shard(t, rank, count) for t in g] for g in uneven_gradients()]
    short = match_sharded(shards, c=0.5, group=group)
    found["short"] = {"v": short.coefficients, "status": short.status, "G": short.gramian.dense()}
    found["averaged"] = averaged(rank, count, group)
    found["refused"] = refusals(rank, mine, local, whole, clients)
    names = ["q", "v"] if rank else ["v", "q"]  # as lists made of sets are, from process to process
    clients = [replace(client, config={"r": 4, "target_modules": names}) for client in clients]
    found["after"] = plain(aggregate_sharded(clients, result="all", **whole))
    return found


def matched(rank, count, group, cut):
    """This rank's shard of the direction, and the evidence, which is of the whole."""
    weights = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    if cut == "slices":
        shards = [[shard(t, rank, count) for t in g] for g in gradients()]
    else:  # whole tensors: the first rank has none
        shards = [g[rank - 1 :: count - 1] if rank else [] for g in gradients()]
    m = match_sharded(shards, weights, c=0.4, group=group)
    return {"direction": m.direction, "v": m.coefficients, "gap": m.gap, "H": m.gramian.H, "status": m.status}


def averaged(rank, count, group):
    """State dicts of which one rank has only what is averaged, another nothing but an entry without a gradient."""
    shares = {0: lambda k: {"w": torch.tensor([1.0, k])}, 1: lambda k: {"bn.running_mean": torch.full((2,), float(k))}}
    share = shares.get(rank, lambda k: [None, None])
    return match_sharded([share(k) for k in range(3)], [1, 1, 2], c=0.4, group=group).direction


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))


def task_gradients(model, local):
    """The gradients of three tasks, parameter by parameter."""
    g = torch.Generator().manual_seed(3)
    found = []
    for _ in range(3):
        X, y = torch.randn(8, 6, generator=g), torch.randn(8, 3, generator=g)
        model.zero_grad()
        (model(X) - y).square().mean().backward()
        found.append([local(p.grad).clone() for p in model.parameters()])
    return found


def fully_sharded(count):
    """The matched direction written into the shards of a model of FSDP, and put together."""
    from torch.distributed.fsdp import fully_shard

    model = network()
    mesh = dist.init_device_mesh("cpu", (count,))
    for part in (model[0], model[2], model):
        fully_shard(part, mesh=mesh)
    match = match_sharded(task_gradients(model, lambda grad: grad.to_local()), c=0.4)
    refused = told(lambda: match_sharded([[p.grad for p in model.parameters()]]))
    for p, shard_of_d in zip(model.parameters(), match.direction, strict=True):
        p.grad.to_local().copy_(shard_of_d)
    return {"direction": [p.grad.full_tensor() for p in model.parameters()], "gap": match.gap, "refused": refused}


def refusals(rank, mine, local, whole, clients):
    """Type and message of what each rank is told when one of them has bad input."""
    group = whole["group"]
    broken = [replace(c, modules=c.modules | {"layers.4.proj": spoilt(c.modules["layers.4.proj"])}) for c in clients]
    calls = {
        "not a number": lambda: aggregate_sharded(broken, **whole),
        "own not a number": lambda: aggregate_sharded(own(broken, rank, dist.get_world_size(group)), **local),
        "no clients": lambda: aggregate_sharded([] if rank == 1 else clients, group=group),
        "method": lambda: aggregate_sharded(clients, method="svd" if rank == 1 else "als", **whole),
        "anchor": lambda: aggregate_sharded(clients, anchor=clients[rank == 1], **whole),
        "alignment": lambda: aggregate_sharded(mine, align_to=clients[rank == 1], **local),
        "watch": lambda: aggregate_sharded(clients, watch=SimpleNamespace(rank=rank, count=9), **whole),
        "watch of gradients": lambda: match_sharded([[torch.ones(3)]], watch=SimpleNamespace(count=9), group=group),
        "no weights": lambda: aggregate_sharded(clients, ["many"] * 5, group=group),
        "weights": lambda: aggregate_sharded(clients, [9.0, *WEIGHTS[1:]] if rank else WEIGHTS, group=group),
        "settings": lambda: aggregate_sharded(
            [replace(c, config={"r": 4, "lora_alpha": 8 + rank}) for c in clients], group=group
        ),
        "some weights": lambda: aggregate_sharded(
            mine, [1.0] * len(mine) if rank else None, clients="own", group=group
        ),
        "shared": lambda: aggregate_sharded(clients, method="flora-na", shared=True, group=group),
        "clip": lambda: aggregate_sharded(clients, clip="2x", group=group),
        "cosine": lambda: aggregate_sharded(clients, min_cosine=0.0, group=group),
        "result": lambda: aggregate_sharded(clients, result="nowhere", group=group),
        "module": lambda: aggregate_sharded(without(clients, "layers.2.proj", 4), **whole),
        "gradient": lambda: match_sharded([[torch.full((3,), torch.inf if rank == 1 else 1.0)]], group=group),
        "statistics": lambda: match_sharded(
            [{"w": torch.ones(3), "running_mean": torch.full((2,), torch.nan if rank == 1 else 0.0)}] * 2, group=group
        ),
        "range": lambda: match_sharded(
            [[torch.full((3,), 60000.0 if rank == 1 else 1.0).half()]] * 2, c=0.9, group=group
        ),
        "strength": lambda: match_sharded([[torch.ones(3)]], c=0.5 if rank == 1 else 0.1, group=group),
        "number": lambda: match_sharded([[torch.ones(3)]] * (2 if rank == 1 else 1), group=group),
        "no strength": lambda: match_sharded([[torch.ones(3)]], c=float("nan"), group=group),
        "nothing": lambda: match_sharded([{"n": torch.ones(1, dtype=torch.int64)} if rank else []] * 2, group=group),
        "no room for all": lambda: cramped(rank, lambda: aggregate_sharded(clients, result="all", **whole)),
        "no room for one": lambda: cramped(rank, lambda: aggregate_sharded(mine, result="sharded", **local)),
        "no room at the root": lambda: cramped(rank + 1, lambda: aggregate_sharded(clients, **whole)),
        "no parcel": lambda: cramped(rank, lambda: aggregate_sharded(clients, result="all", **whole), "pack"),
        "no parcel for one": lambda: cramped(rank, lambda: aggregate_sharded(mine, **local), "pack"),
    }
    return {name: told(call) for name, call in calls.items()}


def cramped(rank, call, what="_empty"):
    """A call on ranks of which the second has no room for what arrives, or for the parcels that it is to send."""
    owner = ranks if what == "pack" else ranks.Ranks
    make = getattr(owner, what)

    def limited(*args):
        made = make(*args)
        if made.numel() > 2000:
            raise RuntimeError("no room")
        return made

    with mock.patch.object(ranks, "PIECE", 1000), mock.patch.object(owner, what, limited if rank == 1 else make):
        return call()


def spoilt(layer):
    """A layer with a NaN."""
    B = layer.B.clone()
    B[2, 1] = torch.nan
    return LoraLayer(A=layer.A, B=B, scaling=layer.scaling)


def told(call):
    """How a call is refused."""
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def watched(rank):
    """With a watch: the same bits; then the rank that fails speaks, and all others hear it while they work."""
    store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=False)
    clients = adapters()
    with Watch(dist.PrefixStore("one", store), rank, 4, patience=30) as watch:
        result = plain(aggregate_sharded(clients, WEIGHTS, names=NAMES, watch=watch))
        match = match_sharded([[torch.ones(2)], [-torch.ones(2)]], watch=watch)
    heard = told(lambda: failing(rank, dist.PrefixStore("two", store)))
    dist.barrier()  # the collectives of a job that failed under watch were left by all alike
    return {"result": result, "match": match.status, "heard": heard}


def failing(rank, store):
    """Rank 2 fails at once; the others, who would wait for its collectives, end as well."""
    with Watch(store, rank, 4, patience=30) as watch:
        if rank == 2:
            raise ValueError("a bad file")
        aggregate_sharded(adapters(), WEIGHTS, watch=watch)
