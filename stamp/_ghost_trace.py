"""Running tasks through a model and catching, per layer call, what the ghost Gram needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from ._ghost_uses import Use, supported, use_of
from ._ghost_weight import GhostWeight
from ._graph import check_visible, walk
from ._loss import LossFn, checked_loss

# Layers whose few parameters are materialised without a word.
SMALL = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase, nn.PReLU)


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of a ghost layer during the forward pass."""

    module: nn.Module
    x: Tensor
    version: int
    source: Node | None  # what made x, to go on from when the graph is walked
    rows: int  # samples and positions
    out: GradientEdge  # the output as the layer made it: a later in-place operation does not change this edge
    hooks: Mapping[int, Any]  # those on the gradient of the output, also what is registered after the call

    def inputs(self) -> Tensor:
        """What went into the layer. Raises RuntimeError where it was overwritten since, as autograd would."""
        if self.x._version != self.version:
            raise RuntimeError(f"the input of a {type(self.module).__name__} was modified in place after its use")
        return self.x


class Trace:
    """The tasks' gradients with respect to every trainable parameter of a model, ghost or materialised.

    Attributes:
        ghosts: the weights of layers that have a ghost form.
        gradients: parameter name -> per task its gradient or None, for all the others.
        outside: names of ghost-form weights that are also used outside of their layers' calls.
        hooked: names of those whose gradient a hook may change where the ghost form does not look.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn, tasks: int) -> None:
        self.model, self.loss_fn, self.tasks = model, loss_fn, tasks
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError("model: no parameter requires a gradient")
        names = {id(p): name for name, p in self.parameters.items()}
        weights = {m: m._parameters["weight"] for m in model.modules() if supported(m)}
        self._layers: dict[nn.Module, nn.Parameter] = {
            m: w for m, w in weights.items() if w is not None and id(w) in names
        }
        self.ghosts = {id(w): GhostWeight(names[id(w)], w, tasks) for w in self._layers.values()}
        self.gradients: dict[str, list[Tensor | None]] = {
            name: [] for name, p in self.parameters.items() if id(p) not in self.ghosts
        }
        self.outside: list[str] = []
        self.hooked: list[str] = []

    def add(self, batch: Any, task: int) -> None:
        """Run one task forward and back, and keep its factors and gradients."""
        with self._recorded_calls() as calls:
            loss = checked_loss(self.loss_fn(self.model, batch), f"task {task}")
        for ghost in self._under_hooks(calls):
            self.hooked.append(ghost.name)
            ghost.materialise()
        for ghost in self._used_outside(loss, self._of_ghosts(calls)):
            self.outside.append(ghost.name)
            ghost.materialise()
        self._choose(calls)
        calls = self._of_ghosts(calls)
        plain = {name: p for name, p in self.parameters.items() if not self._is_ghost(p)}
        wanted: list[GradientEdge | Tensor] = [*(call.out for call in calls), *plain.values()]
        grads: Sequence[Tensor | None] = ()
        if wanted:
            grads = torch.autograd.grad(loss, wanted, allow_unused=True)  # type: ignore[arg-type]  # takes both at once
        self._keep_gradients(plain, grads[len(calls) :])
        self._keep_uses(calls, grads[: len(calls)])

    def materialised(self) -> dict[str, list[Tensor | None]]:
        """Parameter name -> per task its gradient, or None, for everything that is not a ghost."""
        turned = {ghost.name: ghost.gradients for ghost in self.ghosts.values() if ghost.gradients is not None}
        return self.gradients | turned

    def first_not_finite(self) -> int | None:
        """The first task with a factor or gradient that is not finite, or None."""
        for k in range(self.tasks):
            own = [grads[k] for grads in self.materialised().values()]
            tensors = [grad for grad in own if grad is not None]
            for ghost in self.ghosts.values():
                tensors += [t for use in ghost.uses[k] for t in use.factors()] if ghost.is_ghost else []
            if not all(bool(torch.isfinite(t).all()) for t in tensors):
                return k
        return None

    def unsupported(self) -> list[str]:
        """Names of modules that own trainable parameters and have no ghost form, small layers aside."""
        return [
            name or type(module).__name__
            for name, module in self.model.named_modules()
            if any(p is not None and p.requires_grad for p in module._parameters.values())
            and not supported(module)
            and not isinstance(module, SMALL)
        ]

    def _ghost_of(self, call: _Call) -> GhostWeight:
        return self.ghosts[id(self._layers[call.module])]

    def _of_ghosts(self, calls: list[_Call]) -> list[_Call]:
        return [call for call in calls if self._ghost_of(call).is_ghost]

    def _is_ghost(self, parameter: nn.Parameter) -> bool:
        return id(parameter) in self.ghosts and self.ghosts[id(parameter)].is_ghost

    def _choose(self, calls: list[_Call]) -> None:
        """Have each weight settle, before the backward pass, whether it stays a ghost with this task's rows."""
        for ghost in self.ghosts.values():
            mine = [call for call in calls if self._ghost_of(call) is ghost]
            tokens = sum(call.rows for call in mine if isinstance(call.module, nn.Embedding))
            ghost.expect(sum(call.rows for call in mine) - tokens, tokens)

    def _keep_gradients(self, plain: dict[str, nn.Parameter], grads: Sequence[Tensor | None]) -> None:
        for (name, p), grad in zip(plain.items(), grads, strict=True):
            kept = self.ghosts[id(p)].gradients if id(p) in self.ghosts else self.gradients[name]
            assert kept is not None
            kept.append(grad.to_dense() if grad is not None and grad.is_sparse else grad)

    def _keep_uses(self, calls: list[_Call], grads: Sequence[Tensor | None]) -> None:
        uses: dict[int, list[Use]] = {key: [] for key, ghost in self.ghosts.items() if ghost.is_ghost}
        for call, grad in zip(calls, grads, strict=True):
            if grad is not None:
                uses[id(self._layers[call.module])].append(use_of(call.module, call.inputs(), grad))
        for key, kept in uses.items():
            self.ghosts[key].uses.append(kept)

    @contextmanager
    def _recorded_calls(self) -> Iterator[list[_Call]]:
        """Collect the calls of ghost layers while the block runs; no hook outlives it."""
        calls: list[_Call] = []

        @torch.compiler.disable  # a compiled model makes a break here, and looks at hooks only when it runs
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
            if out.requires_grad and self._holds_its_own(module):
                x = args[0] if args else kwargs["input"]
                rows = out.numel() // self._layers[module].shape[isinstance(module, nn.Embedding)]
                out.register_hook(_unchanged).remove()  # makes the record of hooks, which outlives the tensor
                edge, hooks = get_gradient_edge(out), out._backward_hooks
                assert hooks is not None
                calls.append(_Call(module, x.detach(), x._version, x.grad_fn, rows, edge, hooks))

        handles = []
        try:
            for module in self._layers:  # first in line: a user's own hook may return something else as the output
                handles.append(module.register_forward_hook(record, prepend=True, with_kwargs=True))
            yield calls
        finally:
            for handle in handles:
                handle.remove()

    def _holds_its_own(self, module: nn.Module) -> bool:
        """Whether a layer computes with the traced parameters, not with what ``functional_call`` put in their place."""
        return module.weight is self._layers[module] and all(
            p is None or p.is_leaf for p in module._parameters.values()
        )

    def _under_hooks(self, calls: list[_Call]) -> list[GhostWeight]:
        """Ghost weights with a hook on their gradient, on that of an output of theirs, or on every layer's output."""
        everywhere = bool(nn.modules.module._global_forward_hooks)  # they ran before the output was recorded
        hooked = {id(self._layers[call.module]) for call in calls if call.hooks}
        return [
            ghost
            for key, ghost in self.ghosts.items()
            if ghost.is_ghost and (everywhere or key in hooked or ghost.weight._backward_hooks)
        ]

    def _used_outside(self, loss: Tensor, calls: list[_Call]) -> list[GhostWeight]:
        """Ghost weights that the loss depends on other than through the recorded calls.

        Walks the graph around the layers: from the loss and from every recorded input, never through a recorded
        output. A weight that is still met was used by other code (a functional call, a regulariser, attention).
        """
        leaves = {get_gradient_edge(g.weight).node: g for g in self.ghosts.values() if g.is_ghost}
        nodes = list(walk([loss.grad_fn, *(call.source for call in calls)], {call.out.node for call in calls}))
        check_visible(nodes, self.parameters.values(), (p for call in calls for p in call.module.parameters()))
        return [leaves[node] for node in nodes if node in leaves]


def _unchanged(grad: Tensor) -> None:
    """A hook that leaves the gradient as it is."""
