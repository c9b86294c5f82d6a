"""Names of the layers in an adapter file: a module's path, and in brackets how the factors lie in its weight.

=============================================  ======================================================================
``model.layers.0.self_attn.q_proj``            a linear map; the path alone
``model.embed_tokens [embedding]``             ``B @ A`` is the update of the transposed embedding matrix
``model.embed_tokens [embedding tied lm_head]``  the same, and ``lm_head`` (also a list with commas) has the same update
``features.3 [conv 3x3]``                      a convolution; A is (r, c_in * 3 * 3), flattened
``mlp.experts [expert 2 of 8]``                one expert of a parameter named by ``target_parameters``
``mlp.router [parameter]``                     a two-dimensional parameter named by ``target_parameters``
=============================================  ======================================================================

Everything needed to write the layer back is in its name, so it survives every way an adapter may travel.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from .config import PREFIX

RESERVED = " ["
"""Opens the bracket; a module whose own path holds it is refused."""
_OUT_PROJ = ".base_layer.out_proj"
_BRACKET = re.compile(
    r"(?P<path>.+?) \[(?:"
    r"(?P<embedding>embedding)(?: tied (?P<tied>[^\[\]]+))?"
    r"|conv (?P<kernel>\d{1,9}(?:x\d{1,9}){0,2})"
    r"|expert (?P<expert>\d{1,9}) of (?P<experts>\d{1,9})"
    r"|(?P<parameter>parameter)"
    r")\]"
)


@dataclass(frozen=True, slots=True)
class LayerName:
    """Where a layer lies.

    Attributes:
        path: of the module in the file, without PEFT's prefix (nested wrappers included, as PEFT writes them).
        kind: ``linear``, ``embedding``, ``conv`` or ``expert`` (also a two-dimensional parameter, as one of one).
        kernel: of a convolution.
        expert, experts: which, of how many.
        tied: paths of linear maps that hold the transposed factors of this embedding.
    """

    path: str
    kind: str = "linear"
    kernel: tuple[int, ...] = ()
    expert: int = 0
    experts: int = 0
    tied: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The name under which ``Adapter.modules`` holds the layer."""
        if self.kind == "embedding":
            return f"{self.path} [embedding{' tied ' + ','.join(self.tied) if self.tied else ''}]"
        if self.kind == "conv":
            return f"{self.path} [conv {'x'.join(map(str, self.kernel))}]"
        if self.kind == "expert":
            return f"{self.path} [{f'expert {self.expert} of {self.experts}' if self.experts > 1 else 'parameter'}]"
        return self.path

    @staticmethod
    def parse(name: str) -> LayerName:
        """The inverse of ``str``.

        Raises:
            ValueError: a bracket that is none of these.
        """
        if RESERVED not in name:
            return LayerName(name)
        found = _BRACKET.fullmatch(name)
        if found is None or RESERVED in found["path"]:
            raise ValueError(f"{name}: {RESERVED!r} opens the kind of a layer, and this is not one")
        if found["embedding"]:
            return LayerName(
                found["path"], "embedding", tied=tuple((found["tied"] or "").split(",")) if found["tied"] else ()
            )
        if found["kernel"]:
            return LayerName(found["path"], "conv", tuple(map(int, found["kernel"].split("x"))))
        expert, experts = int(found["expert"] or 0), int(found["experts"] or 1)
        if expert >= experts:
            raise ValueError(f"{name}: there is no expert {expert}: they are counted from 0")
        return LayerName(found["path"], "expert", expert=expert, experts=experts)

    @property
    def owner(self) -> str:
        """The name that PEFT selects the module by, and matches with ``rank_pattern`` (but see ``parameters``)."""
        return owner_of(self.path)

    def key(self, side: str) -> str:
        """The name of the tensor of one side (``A`` or ``B``)."""
        return factor_key(self.path, side, embedding=self.kind == "embedding")


def factor_key(path: str, side: str, *, embedding: bool = False) -> str:
    """The name of a factor in an adapter file."""
    return f"{PREFIX}{path}.lora_{f'embedding_{side}' if embedding else f'{side}.weight'}"


def owner_of(path: str) -> str:
    """The module that PEFT was asked to adapt: of nested wrappers the innermost, of ``out_proj`` its attention."""
    path = path.removesuffix(_OUT_PROJ)
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    return path


def ends_of(path: str) -> Iterator[str]:
    """The names by which PEFT selects a module: its own, and what follows each of its dots."""
    yield path
    while "." in path:
        path = path.partition(".")[2]
        yield path
