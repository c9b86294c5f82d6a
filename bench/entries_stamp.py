"""STAMP's entries on big tensors: Gram matrices of gradients, matching, ghost Grams, prototypes."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedgram import kernels, stamp

from .ceilings import Cost, rate_of
from .peers import herding, jacobian_descent, operations, softmax_sgd
from .peers.optional import compiled, compiled_name
from .reference import GRAM, dual_objective, gram_of, list_error, matching_excess, relative_error
from .registry import Case, Contender, Size, Target, entry, with_peers
from .workloads import clustered_samples, even_offsets, gradients, layer_rows

C = 0.25
GRADIENTS = {"full": (20, 5_000_000), "quick": (20, 500_000), "tiny": (4, 300)}


def gradient_cost(
    K: int, d: int, dtype: torch.dtype, device: torch.device, *, flops: float, written: float = 0
) -> Cost:
    """One read of the gradients."""
    data = K * d * dtype.itemsize
    return Cost(flops, data + written * d * dtype.itemsize, data, rate_of(dtype, device))


def centred(G: Tensor) -> Tensor:
    """The Gram matrix of the differences from the mean."""
    return G - G.mean(0) - G.mean(1, keepdim=True) + G.mean()


def combined(lists: operations.Lists, v: Tensor) -> list[Tensor]:
    """``sum_k v_k g_k`` in float64, tensor by tensor."""
    values = v.double().tolist()
    return [operations.weighted_sum(values, (t.double() for t in part)) for part in zip(*lists, strict=True)]


@entry("grad_gram", "stamp", gpu=True)
def grad_gram(size: Size, device: torch.device) -> Case:
    """The centred Gram of K lists of tensors."""
    K, d = GRADIENTS[size]
    lists = gradients(K, d, device)
    truth = centred(gram_of(lists))
    centring, plain = operations.stack_centred_gram, "stack, centre, mm"

    def by_compiler() -> Contender:
        name = compiled_name(plain)
        return Contender(name, compiled(name, centring, device, lists), "torch", 1e-5, slow=True)

    contenders, missing = with_peers(
        [
            Contender("grad_gram", partial(kernels.grad_gram, lists), "ours", GRAM, lambda g: g.H, memory=True),
            Contender(plain, partial(centring, lists), "torch", 1e-5, memory=True),
            Contender("stack, mm (not centred)", partial(operations.stack_gram, lists), "torch", 1e-5, centred),
        ],
        *([by_compiler] if size == "full" else []),
    )
    cost = gradient_cost(K, d, torch.float32, device, flops=d * K * K)
    workload = f"K={K}, d={d:.0e}, fp32 lists"
    return Case(
        workload,
        contenders,
        lambda H: relative_error(H, truth),
        "relative error of H",
        cost,
        (Target("reads", 2.5),),
        missing,
    )


@entry("grad_gram-close", "stamp")
def grad_gram_close(size: Size, device: torch.device) -> Case:
    """Gradients that differ by a relative 1e-4: where a plain float32 Gram has lost the differences."""
    K, d = (8, 200_000) if size != "tiny" else (4, 300)
    lists = gradients(K, d, device, spread=1e-4)
    truth = centred(gram_of(lists))
    plain = operations.stack_gram
    contenders = [
        Contender("grad_gram", partial(kernels.grad_gram, lists), "ours", GRAM, lambda g: g.H),
        Contender("stack, mm", partial(plain, lists), "torch", 1e-5, lambda G: centred(G.double())),
        Contender("stack, centre, mm", partial(operations.stack_centred_gram, lists), "torch", 1e-3),
    ]
    cost = gradient_cost(K, d, torch.float32, device, flops=d * K * K)
    return Case(
        f"K={K}, d={d:.0e}, spread 1e-4", contenders, lambda H: relative_error(H, truth), "relative error of H", cost
    )


@entry("grad_combine", "stamp", gpu=True)
def grad_combine(size: Size, device: torch.device) -> Case:
    """The weighted sum of K lists; every contender makes new tensors."""
    K, d = GRADIENTS[size]
    lists = gradients(K, d, device)
    v = torch.linspace(0.5, 1.5, K, dtype=torch.float64, device=device) / K
    truth = combined(lists, v)
    narrow = v.float()
    contenders = [
        Contender("grad_combine", partial(kernels.grad_combine, lists, v), "ours", 1e-7),
        Contender("loop over gradients", partial(operations.loop_combine, lists, v.tolist()), "torch", 1e-5),
        Contender("stack + tensordot", partial(operations.stack_combine, lists, narrow), "torch", 1e-5),
    ]
    cost = gradient_cost(K, d, torch.float32, device, flops=2 * K * d, written=1)
    return Case(f"K={K}, d={d:.0e}, fp32 lists", contenders, lambda r: list_error(r, truth), "relative error", cost)


@entry("match", "stamp", gpu=True)
def match(size: Size, device: torch.device) -> Case:
    """The whole match against the authors' way: stack, Gram, 100 steps of SGD on softmax weights."""
    K, d = GRADIENTS[size]
    lists = gradients(K, d, device)
    G = gram_of(lists).cpu()
    upper = dual_objective(stamp.solve_dual(G, C).weights, G, C)

    def excess(result: Any) -> float:
        v, direction = (result.coefficients, result.direction) if isinstance(result, stamp.Match) else result
        away = list_error(direction, combined(lists, v))
        return matching_excess(v, G, upper, C) if away < 1e-5 else away

    loop, authors = "stack, Gram, 100 softmax-SGD steps", "the same, Gram kept in the graph"
    contenders = [
        # the Gram's promise bounds what the coefficients can lose; G's entries are of the size of the scale
        Contender("match", partial(stamp.match, lists, c=C), "ours", 1e-5, memory=True),
        Contender(loop, partial(softmax_sgd.match_stacked, lists, C), "peer", float("inf"), memory=True),
        Contender(authors, partial(softmax_sgd.match_stacked, lists, C, graph=True), "peer", float("inf"), slow=True),
    ]
    # the authors' code keeps the graph; without it most of the loop's time goes
    targets = (Target("speed-up", 20, authors), Target("reads", 5), Target("memory_mb", 120))
    cost = gradient_cost(K, d, torch.float32, device, flops=d * K * (K + 2), written=1)
    return Case(f"K={K}, d={d:.0e}, fp32 lists", contenders, excess, "below the optimum", cost, targets)


@entry("ghost_gram", "stamp", gpu=True)
def ghost_gram(size: Size, device: torch.device) -> Case:
    """Gram of the task gradients of one linear layer, without the gradients."""
    tasks, rows, side = {"full": (32, 512, 2048), "quick": (32, 512, 1024), "tiny": (3, 12, 20)}[size]
    a, d = layer_rows(tasks, rows, side, side, device)
    offsets = even_offsets(tasks, rows)
    g = torch.bmm(d.double().view(tasks, -1, side).transpose(1, 2), a.double().view(tasks, -1, side)).flatten(1)
    truth = g @ g.T
    materialised = "materialise every gradient"
    contenders = [
        Contender("ghost_gram", partial(kernels.ghost_gram, a, d, offsets), "ours", 1e-5, memory=True),
        Contender(materialised, partial(operations.materialised_gram, a, d, tasks), "torch", 1e-5, memory=True),
        Contender("N x N products", partial(operations.square_gram, a, d, tasks), "torch", 1e-5, memory=True),
    ]
    del g
    cost = Cost(rows**2 * 2 * side, a.nbytes + d.nbytes, a.nbytes + d.nbytes, rate_of(torch.float32, device))
    targets = (Target("speed-up", 10, materialised), Target("memory-ratio", 50, materialised))
    workload = f"{side} x {side}, K={tasks}, N={rows}"
    return Case(workload, contenders, lambda G: relative_error(G, truth), "relative error of G", cost, targets)


@entry("ghost_gramian", "stamp", gpu=True)
def ghost_gramian(size: Size, device: torch.device) -> Case:
    """Gram of a network's task gradients against TorchJD's engine and one backward pass per task."""
    tasks, width = {"full": (32, 2048), "quick": (16, 1024), "tiny": (3, 16)}[size]
    torch.manual_seed(0)
    layers = [nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)]
    model = nn.Sequential(*layers).to(device)
    x, y = torch.randn(tasks, width, device=device), torch.randint(0, 10, (tasks,), device=device)
    watched = copy.deepcopy(model)

    def losses(net: nn.Module) -> Tensor:
        return nn.functional.cross_entropy(net(x), y, reduction="none")

    def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(net(batch[0]), batch[1])

    batches = [(x[k : k + 1], y[k : k + 1]) for k in range(tasks)]

    def one_by_one(net: nn.Module = model) -> Tensor:
        parameters = list(net.parameters())
        rows = [torch.cat([g.flatten() for g in torch.autograd.grad(loss(net, b), parameters)]) for b in batches]
        stacked = torch.stack(rows)
        return stacked @ stacked.T

    wide = copy.deepcopy(model).double()
    truth = gram_of([torch.autograd.grad(loss(wide, (a.double(), b)), list(wide.parameters())) for a, b in batches])

    def engine() -> Contender:
        run = jacobian_descent.autogram(watched, lambda: losses(watched))
        return Contender(jacobian_descent.NAME, run, "peer", 1e-4)

    # float32 forward and backward passes through three layers: some 1e-6 in every row
    contenders, missing = with_peers(
        [
            Contender(
                "ghost_gramian", partial(stamp.ghost_gramian, model, loss, batches), "ours", 1e-4, lambda g: g.dense()
            ),
            Contender("one backward pass per task", one_by_one, "torch", 1e-4),
        ],
        engine,
    )
    workload = f"MLP {width}-{width}-{width}-10, K={tasks} samples"
    return Case(
        workload, contenders, lambda G: relative_error(G.detach(), truth), "relative error of G", missing=missing
    )


@entry("select_prototypes", "stamp", gpu=True)
def select_prototypes(size: Size, device: torch.device) -> Case:
    """Prototypes whose mean is nearest the mean of their class."""
    classes, per_class, p, m = {"full": (10, 500, 784, 10), "quick": (10, 200, 784, 10), "tiny": (2, 20, 5, 3)}[size]
    X, y = (t.to(device) for t in clustered_samples(classes, per_class, p))

    def error(indices: Tensor) -> float:
        """Mean over classes of the distance of the means, relative to what random subsets have."""
        ratios = []
        for label in range(classes):
            rows = X[y == label].double()
            chosen = X[indices[y[indices] == label]].double()
            random = (rows.var(0).sum() * (1 / m - 1 / len(rows))).sqrt()
            ratios.append((chosen.mean(0) - rows.mean(0)).norm() / random if len(chosen) == m else torch.inf)
        return float(sum(ratios) / classes)

    def ours() -> Tensor:
        return stamp.select_prototypes(X, y, m).indices

    contenders = [
        Contender("select_prototypes", ours, "ours", 1.0),
        Contender("herding", partial(herding.herding, X, y, m), "peer", float("inf")),
        Contender("random subset", partial(herding.random_subset, X, y, m), "torch", float("inf")),
    ]
    return Case(f"{classes} classes of {per_class} x {p}, m={m}", contenders, error, "error / that of random subsets")
