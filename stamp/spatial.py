"""Spatial matching: the server's step from the states of the clients that answered (STAMP, arXiv:2506.12031)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedgram.kernels import grad_combine, moved

from ._inputs import checked_number
from ._look import may_look
from .dual import Dual, rescaling, solve_dual
from .gramian import Gramian, WeightsLike, normalised_weights, one_hot, plain, recentred
from .match import gramian_about, match_gramian
from .structure import Inputs, average, finite, read, unfit, wrapping_sum

State = Mapping[str, Tensor | None]


@dataclass(frozen=True, eq=False)
class SpatialStep:
    """One round of the server.

    Attributes:
        state: the new global state, name -> tensor, in the dtypes of the old one. The tensors are those the matcher
            holds: copy them before they are changed in place.
        dual: the matching over the clients that took part, with its certificate.
        gramian: the Gram matrix of their deltas.
        clients: positions, in what was given, of the clients that took part: those with a positive count.
    """

    state: dict[str, Tensor]
    dual: Dual
    gramian: Gramian
    clients: tuple[int, ...]


class SpatialMatcher:
    """The server: holds the global state and moves it along the matched direction of the clients' deltas.

    The deltas ``state_k - state`` are matched with weights by sample count, and ``state + lr * d`` is the new state.
    Entries that no gradient moves (integers, bools, statistics of normalisation layers; see ``match``) become the
    clients' weighted mean. The deltas are never formed: the Gram matrix of the states and the old state, centred at
    the clients' mean, holds their inner products to the last digit; where a client has moved by less than 2^-9 of the
    mean step, or not at all, the states are read once more, for the Gram matrix around the old state.

    With ``rescale="mean"``, the default, one client, or clients that agree, give exactly the step of federated
    averaging, ``lr`` times the weighted mean delta. So do clients that agree and others that did not move, or hardly:
    what is divided by is 1 plus what the matching has added to the mean delta, relative to it. (The authors' code
    lengthens the step by up to 2.35.)
    """

    def __init__(
        self,
        state: State,
        *,
        c: float = 0.25,
        lr: float = 1.0,
        rescale: bool | str = "mean",
        precise: bool = True,
        backend: str = "auto",
    ) -> None:
        """Start from a global state.

        Args:
            state: name -> tensor, for example ``model.state_dict()``. Copied.
            c: strength of the matching in [0, 1); 0 is federated averaging.
            lr: the server's learning rate, finite.
            rescale, precise, backend: as in ``match``.

        Raises:
            ValueError: an option out of range, or a state that is not of tensors or has no floating-point entry.
        """
        rescaling(rescale, c)
        self.c, self.lr, self.rescale = c, checked_number(lr, "lr"), rescale
        self.precise, self.backend = precise, backend
        self.state = copied(state)

    def step(
        self, states: Iterable[State], counts: WeightsLike | None = None, *, names: Sequence[str] | None = None
    ) -> SpatialStep:
        """Move the global state by the clients' new states, and keep the result as ``state``.

        Args:
            states: state dicts of the clients that answered, with the names, shapes, dtypes and device of the global
                state.
            counts: their numbers of samples, shape (K,); default equal. A client of count 0 takes no part.
            names: what they are called in messages, default "client k".

        Raises:
            ValueError: no client, none with a positive count, a state that does not fit the global one, or one that is
                not finite; the message names the client and the entry. Or a new state with entries beyond the range of
                their dtype. The global state stays as it was.
        """
        sent, clients, u = _taking_part(states, counts, "states")
        inputs = self._read(sent, clients, "states", names)
        gramian = self._gramian_of_states(inputs, u)
        means = {name: average(column[:-1], u) for name, column in inputs.averaged.items()}
        return self._advanced(inputs, gramian, u, clients, 1 - self.lr, means)

    def step_deltas(
        self, deltas: Iterable[State], counts: WeightsLike | None = None, *, names: Sequence[str] | None = None
    ) -> SpatialStep:
        """The same for clients that send ``new state - global state`` (of integers and statistics, too; not bools).

        None in place of a tensor is no change. Integers may wrap, as their subtraction does: ``global state + delta``
        is what counts.
        """
        sent, clients, u = _taking_part(deltas, counts, "deltas")
        inputs = self._read(sent, clients, "deltas", names)
        gramian = match_gramian(inputs.without_last(), u, self.precise, self.backend)
        means = {name: _mean_of_deltas(column[-1], column[:-1], u) for name, column in inputs.averaged.items()}
        return self._advanced(inputs, gramian, u, clients, 1.0, means)

    def _read(
        self, sent: Sequence[State], clients: Sequence[int], argument: str, names: Sequence[str] | None
    ) -> Inputs:
        """What the clients sent, followed by the global state, all of one structure."""
        if names is not None and len(names) != len(sent):
            raise ValueError(f"names: expected {len(sent)} (one per client), got {len(names)}")
        labels = ["the global state", *(f"client {k}" if names is None else names[k] for k in clients)]
        rows: list[State] = [self.state, *(sent[k] for k in clients)]
        for label, row in zip(labels, rows, strict=True):
            if not isinstance(row, Mapping):
                raise ValueError(f"{argument}: {label} is a {type(row).__name__}; expected a state dict")
            if argument == "states" and (absent := [name for name, tensor in row.items() if tensor is None]):
                raise ValueError(f"{argument}: {label}, {absent[0]!r} is None; expected a tensor")
        return read([self._without_none(row) for row in rows], labels, argument).with_first_last()

    def _without_none(self, row: State) -> State:
        """What a client sent, with zeros for what it says has not changed."""
        absent = [name for name, tensor in row.items() if tensor is None and name in self.state]
        return {**row, **{name: torch.zeros_like(self.state[name]) for name in absent}} if absent else row

    @torch.no_grad()
    def _gramian_of_states(self, inputs: Inputs, u: Tensor) -> Gramian:
        """Of the deltas, from the states and the old one behind them; on the CPU, where the dual is solved."""
        K, weights = len(u), torch.cat([u, u.new_zeros(1)])
        # Around the clients' mean, whose distance from the old state is g0: row K is -g0.
        H = gramian_about(inputs, weights, None, self.precise, self.backend).H
        gramian = Gramian(H[K, K], -H[K, :K], H[:K, :K], moved(u, H.device))

        def around_old(_: int) -> Gramian:
            H = gramian_about(inputs, weights, one_hot(K, K + 1), True, self.backend).H
            return plain(H[:K, :K], u)

        return recentred(gramian, around_old) if may_look(H.device) else gramian

    @torch.no_grad()
    def _advanced(
        self,
        inputs: Inputs,
        gramian: Gramian,
        u: Tensor,
        clients: tuple[int, ...],
        old: float,
        means: Mapping[str, Tensor],
    ) -> SpatialStep:
        """``state + lr * d``: the rows weighted by ``lr v``, the old state by what is left of it."""
        dual = solve_dual(gramian, self.c, rescale=self.rescale)
        v = self.lr * dual.coefficients
        # For agreeing clients v = lr u and nothing is left over: the old state counts 1 - lr to the last bit.
        rest = torch.full_like(v[:1], old) - (0.0 if old == 1.0 else (v - self.lr * u.to(v.device)).sum())
        tensors = grad_combine(inputs.tensors, torch.cat([v, rest]), backend=self.backend)
        state = inputs.assemble(tensors, means)
        if may_look(gramian.H.device) and not finite(state.values()):
            raise ValueError(unfit(inputs, state, "the new global state"))
        self.state = state
        return SpatialStep(dict(self.state), dual, gramian, clients)


def _mean_of_deltas(old: Tensor, deltas: Sequence[Tensor], u: Tensor) -> Tensor:
    """What is averaged, from the clients' deltas: of integers the states that they come from, as deltas may wrap."""
    if old.is_floating_point():
        return old + average(deltas, u)
    return average([wrapping_sum(old, delta) for delta in deltas], u)


def copied(state: State) -> dict[str, Tensor]:
    """Copy a global state. Raises ValueError where it is none: not of tensors, or without a floating-point one."""
    if not isinstance(state, Mapping):
        raise ValueError(f"state: expected a state dict, got a {type(state).__name__}")
    tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    for name, tensor in state.items():
        if name not in tensors:
            raise ValueError(f"state: {name!r} is a {type(tensor).__name__}; expected a tensor")
    read([tensors], ["the global state"], "state")
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _taking_part(
    sent: Iterable[State], counts: WeightsLike | None, argument: str
) -> tuple[list[State], tuple[int, ...], Tensor]:
    """What was sent as a list, positions of the clients with a positive count, and their weights."""
    if isinstance(sent, Mapping | Tensor | str) or not isinstance(sent, Iterable):
        raise ValueError(f"{argument}: expected one state dict per client, got one {type(sent).__name__}")
    given = list(sent)
    if not given:
        raise ValueError(f"{argument}: no client answered")
    shares = normalised_weights(counts, len(given), "counts")
    clients = np.flatnonzero(shares > 0)
    return given, tuple(clients.tolist()), torch.from_numpy(shares[clients])
