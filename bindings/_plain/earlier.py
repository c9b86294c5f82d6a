"""What a round starts from, which has no earlier factors of a module that is new in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from fedgram.flora_na import Adapter, LoraLayer

from .._peft.lazy_tensors import LazyMapping

OPTIONS = {"anchor": "anchor_previous", "align_to": "align_previous"}
"""What those call it that aggregate round after round."""


class GlobalState(dict[str, Tensor]):
    """The global state dict before a round, of which nobody said that it has every module (as of an ``align_to``).

    Attributes:
        scalings: module -> what the receivers multiply by, as far as an earlier round has told.
    """

    def __init__(self, state: Mapping[str, Tensor], scalings: Mapping[str, float]) -> None:
        super().__init__(state)
        self.scalings = scalings


def with_new_modules(
    earlier: Adapter, modules: Iterable[str], layer: Callable[[str], LoraLayer], argument: str
) -> Adapter:
    """``earlier`` with the modules of a round that it lacks: layers of rank 0, towards which nothing is rotated.

    Args:
        earlier: the global adapter before the round.
        modules: those of the round.
        layer: reads a client's layer of a module.
        argument: ``anchor`` or ``align_to``, which it is for.

    Raises:
        ValueError: ``anchor``, and a module is new: its step has no start.
    """
    new = [module for module in modules if module not in earlier.modules]
    if new and argument == "anchor":
        raise ValueError(
            f"{OPTIONS[argument]}: {new[0]}: the global adapter before this round has no such module, so that there is "
            "nothing to estimate its step from: start from an adapter that has it, or aggregate without anchor_previous"
        )
    if not new:
        return earlier
    empty = {module: _empty(layer(module)) for module in new}
    names = [*earlier.modules, *new]
    return replace(earlier, modules=LazyMapping(names, lambda m: empty[m] if m in empty else earlier.modules[m]))


def _empty(like: LoraLayer) -> LoraLayer:
    m, n = like.shape
    return LoraLayer(A=like.A.new_empty(0, n), B=like.B.new_empty(m, 0))
