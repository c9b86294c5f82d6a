"""The Gramian of task gradients, and the matched direction, without storing a gradient."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedgram.kernels import grad_gram

from ._buffers import buffers_kept, put_back, remembered
from ._ghost_trace import Trace
from ._loss import LossFn
from .dual import Dual, solve_dual
from .gramian import Gramian, WeightsLike, distant, normalised_weights, one_hot, plain, recentred, triple
from .structure import finite

Tasks = Sequence[Any | Callable[[], Any]]


@dataclass(frozen=True, eq=False)
class GhostMatch:
    """A matched direction that lies in the parameters' ``.grad``.

    Attributes:
        dual: the solution of the dual, with its certificate ``gap``.
        gramian: the Gramian of the tasks' gradients that it was solved on.
        losses: the tasks' losses, shape (K,), detached.
    """

    dual: Dual
    gramian: Gramian
    losses: Tensor


def ghost_gramian(
    model: nn.Module,
    loss_fn: LossFn,
    tasks: Tasks,
    weights: WeightsLike | None = None,
    *,
    backend: str = "auto",
) -> Gramian:
    """The Gramian of the tasks' gradients at the model's current parameters, the large ones never formed.

    With inputs ``a_i`` and output gradients ``d_i`` of a layer over samples and positions, a task's gradient is
    ``sum_i d_i a_i^T``, hence ``<g_k, g_l> = sum over i in k, j in l of (a_i . a_j)(d_i . d_j)``. Linear, Conv1d,
    Conv2d (one group) and Embedding weights are computed so wherever ``N^2 (p + q) < (N + K^2) p q``, N being the rows
    of all tasks, (q, p) the weight's shape and K the number of tasks; the other way round they are materialised, one
    gradient per task. Biases and normalisation layers are small and always materialised. Several uses of a layer and
    tied weights stack as rows. Everything else is materialised, and a warning names it: other layers, layers whose
    ``forward`` was replaced, weights used otherwise than by their layers, and gradients under hooks.

    Each task runs forward and back once by itself, so batch normalisation couples the samples of one task only (as it
    does in training). Buffers (running statistics), modes, hooks and ``.grad`` are as before afterwards, also after an
    error. It is valid for first-order gradients at one point, not for the deltas of several local steps.

    Precision: the rows are what the model's own arithmetic makes them (in float32 each carries a few relative 6e-8, as
    in any backward pass). From there on products and sums are float64: G is off by at most about 1e-16 times
    ``sum |a_i||a_j||d_i||d_j|``, so that gradients differing by a relative 1e-4 keep about eight digits of their
    differences' products where rows do not cancel. Materialised parts are centred first (``grad_gram``): at the mean,
    or at the shortest gradient where one is shorter than 2^-9 of the mean. Where a gradient is nearer the mean than
    2^-15 of that part of it which is never materialised, a plain matrix is known, and returned (its centre is zero).

    Args:
        model: any module with trainable parameters.
        loss_fn: ``loss_fn(model, batch)`` -> one number, usually the mean loss over the task's batch.
        tasks: one entry per task: the batch itself (whatever ``loss_fn`` takes), or a callable that returns it.
        weights: the weights of the mean ``g0``, shape (K,), default uniform; divided by their sum.
        backend: "auto", "triton" or "torch".

    Returns:
        The same object that ``stamp.gramian`` returns.

    Raises:
        ValueError: no tasks, bad weights, a loss that is not one number or depends on no trainable parameter, a model
            without trainable parameters, a block under reentrant activation checkpointing, or a task whose gradient is
            not finite (named).
        RuntimeError: a layer's input was modified in place after its use.
    """
    u = torch.from_numpy(normalised_weights(weights, len(tasks)))
    with buffers_kept(model):
        trace = Trace(model, loss_fn, len(tasks))
        for k, task in enumerate(tasks):
            trace.add(_batch(task), k)
    _warn_of_materialised(trace)
    return _checked(_gramian(trace, u, backend), trace)


def ghost_match(
    model: nn.Module,
    loss_fn: LossFn,
    tasks: Tasks,
    weights: WeightsLike | None = None,
    *,
    c: float = 0.25,
    rescale: bool | str = False,
    backend: str = "auto",
) -> GhostMatch:
    """Write the matched direction of the tasks' gradients into ``.grad``: two passes, no gradient stored.

    The first pass makes the ghost Gramian, the dual is solved on it, and the second backpropagates
    ``sum_k v_k loss_k``, whose gradient is the direction ``d = sum_k v_k g_k`` (gradient matching of STAMP,
    arXiv:2506.12031, as in ``match``), one task's graph at a time. Both passes draw the same random numbers from the
    generators of torch (dropout), so that they see the same gradients: ``loss_fn`` must not draw from others, such as
    those of Python or numpy. The second is an ordinary training pass, which updates running statistics.

    ``.grad`` is overwritten, not added to, and None where no task reaches a parameter. If anything raises, it is as
    before, and so are buffers and modes. Arguments, shapes and errors as in ``ghost_gramian``, and ValueError where the
    direction is not finite; a callable task is called once.

    Args:
        model, loss_fn, tasks, weights, backend: as in ``ghost_gramian``.
        c: strength of the matching, in [0, 1); 0 gives the weighted mean gradient.
        rescale: as in ``match``; "mean" makes the step of agreeing gradients exactly their mean.
    """
    batches = [_batch(task) for task in tasks]
    with torch.random.fork_rng(devices={p.device for p in model.parameters() if p.device.type == "cuda"}):
        gramian = ghost_gramian(model, loss_fn, batches, weights, backend=backend)
    dual = solve_dual(gramian, c, rescale=rescale)
    with _restored_on_error(model):
        losses = [_backward(loss_fn(model, batch), v) for batch, v in zip(batches, dual.coefficients, strict=True)]
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        if not finite(grad.coalesce().values() if grad.is_sparse else grad for grad in grads):
            raise ValueError("tasks: the direction, or a loss times its coefficient, exceeds the range of its dtype")
    return GhostMatch(dual, gramian, torch.stack(losses))


def _batch(task: Any) -> Any:
    return task() if callable(task) else task


def _backward(loss: Tensor, v: Tensor) -> Tensor:
    (loss.reshape(()) * v.to(loss)).backward()
    return loss.detach().reshape(())


def _gramian(trace: Trace, u: Tensor, backend: str) -> Gramian:
    """The sum over parameters, to which the dense Gram matrices of all ghosts and the gradients of the rest add."""
    grams = [ghost.gram(backend) for ghost in trace.ghosts.values() if ghost.is_ghost]
    dense = sum(grams[1:], start=grams[0]) if grams else None
    columns = [_column(trace.parameters[name], grads) for name, grads in trace.materialised().items()]
    rows = [list(row) for row in zip(*columns, strict=True)]

    def around(centre: Tensor | None) -> Gramian:
        v = u if centre is None else centre
        parts = [] if dense is None else [triple(dense, v.to(dense.device))]
        if rows:
            parts.append(grad_gram(rows, v, precise=True, backend=backend))
        n0, h, H = (sum(same[1:], start=same[0]) for same in zip(*parts, strict=True))
        return Gramian(n0, h, H, *(None if x is None else x.to(h.device) for x in (u, centre)))

    found = around(None)
    known = recentred(found.cpu(), lambda k: around(one_hot(k, trace.tasks)).cpu())
    if dense is not None and known.centre is None:
        n0, _, _ = triple(
            dense, u.to(dense.device)
        )  # of the ghosts alone: the rest was centred before it was multiplied
        known = known if bool(distant(n0.cpu(), known.H)) else plain(known.dense(), u)
    return known.to(found.H.device)


def _column(parameter: Tensor, grads: list[Tensor | None]) -> list[Tensor]:
    """One parameter's gradients in one dtype, None as zero: factors turn to float32, autograd keeps 16 bits."""
    wider = functools.reduce(torch.promote_types, (g.dtype for g in grads if g is not None), parameter.dtype)
    missing = any(g is None for g in grads)
    zero = torch.zeros_like(parameter, dtype=wider) if missing else parameter.new_empty(0)
    return [zero if g is None else g.to(wider) for g in grads]


def _checked(gramian: Gramian, trace: Trace) -> Gramian:
    if not bool(torch.isfinite(gramian.H).all()):  # every entry of H depends on every task
        raise ValueError(f"tasks: the gradient of task {trace.first_not_finite()} is not finite")
    return gramian


def _warn_of_materialised(trace: Trace) -> None:
    reasons = []
    if names := trace.unsupported():
        reasons.append(f"no ghost form for {', '.join(names)}")
    if trace.outside:
        reasons.append(f"used outside of their layers' calls: {', '.join(trace.outside)}")
    if trace.hooked:
        reasons.append(f"under hooks that may change them: {', '.join(trace.hooked)}")
    if reasons:
        warnings.warn(f"ghost_gramian: gradients are materialised: {'; '.join(reasons)}", stacklevel=3)


@contextmanager
def _restored_on_error(model: nn.Module) -> Iterator[None]:
    """Clear ``.grad`` for the block; if it raises, bring the former ones back, and buffers and modes."""
    former, kept = [(p, p.grad) for p in model.parameters()], remembered(model)
    for p, _ in former:
        p.grad = None
    try:
        yield
    except BaseException:
        for p, grad in former:
            p.grad = grad
        put_back(kept)
        raise
