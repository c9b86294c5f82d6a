"""One call of one layer, as the two factors of its weight gradient: what came in, and the gradient of what went out.

With inputs ``a_i`` (p) and output gradients ``d_i`` (q) over rows i (samples and positions), the weight's gradient is
``sum_i d_i a_i^T``, shape (q, p). An embedding is the same with ``d_i`` one-hot in the token and ``a_i`` the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding)


@dataclass(frozen=True, eq=False)
class DenseUse:
    """A call of a linear or convolutional layer. ``inputs`` gives the (n, p) rows when asked, not before."""

    inputs: Callable[[], Tensor]
    grads: Tensor  # (n, q)

    def __len__(self) -> int:
        return len(self.grads)

    def factors(self) -> tuple[Tensor, ...]:
        """The rows of both sides."""
        return self.inputs(), self.grads

    def gradient(self, shape: torch.Size) -> Tensor:
        """The weight's gradient over these rows, in the weight's shape."""
        x = self.inputs()
        wider = torch.promote_types(x.dtype, self.grads.dtype)
        return (self.grads.T.to(wider) @ x.to(wider)).reshape(shape)


@dataclass(frozen=True, eq=False)
class TokenUse:
    """A call of an embedding: ``tokens`` (n,) and the gradients of their vectors (n, p)."""

    tokens: Tensor
    grads: Tensor

    def __len__(self) -> int:
        return len(self.grads)

    def factors(self) -> tuple[Tensor, ...]:
        """The rows that can be other than finite."""
        return (self.grads,)

    def gradient(self, shape: torch.Size) -> Tensor:
        """The table's gradient over these rows, shape (vocabulary, p)."""
        return self.grads.new_zeros(shape).index_add_(0, self.tokens, self.grads)


Use: TypeAlias = DenseUse | TokenUse


def supported(module: nn.Module) -> bool:
    """Whether the module's weight gradient is the sum of outer products that ``use_of`` gives.

    Exact types only: a subclass, a parametrised or a re-parametrised layer may compute anything, and so may one whose
    ``forward`` was replaced. Backward hooks of the old kind change the gradients of the weight itself.
    """
    if type(module) not in LAYERS or "forward" in module.__dict__ or module._is_full_backward_hook is False:
        return False
    if not isinstance(module._parameters.get("weight"), nn.Parameter) or set(module._parameters) > {"weight", "bias"}:
        return False
    if isinstance(module, nn.Embedding):
        return module.max_norm is None and not module.scale_grad_by_freq
    return not isinstance(module, nn.Conv1d | nn.Conv2d) or module.groups == 1


def use_of(module: nn.Module, x: Tensor, grad: Tensor) -> Use:
    """The factors of one call: ``x`` went into ``module``, ``grad`` is the gradient of what came out."""
    if isinstance(module, nn.Embedding):
        return _embedding_use(module, x, grad)
    if isinstance(module, nn.Linear):
        return DenseUse(lambda: _real(x.reshape(-1, x.shape[-1])), _real(grad.reshape(-1, grad.shape[-1])))
    assert isinstance(module, nn.Conv1d | nn.Conv2d)
    return _conv_use(module, x, grad)


def _embedding_use(module: nn.Embedding, tokens: Tensor, grad: Tensor) -> TokenUse:
    tokens, grad = tokens.reshape(-1).to(torch.int64), _real(grad.reshape(-1, grad.shape[-1]))
    if module.padding_idx is None:
        return TokenUse(tokens, grad)
    learnt = tokens != module.padding_idx  # autograd gives the padding vector no gradient
    return TokenUse(tokens[learnt], grad[learnt])


def _conv_use(module: nn.Conv1d | nn.Conv2d, x: Tensor, grad: Tensor) -> DenseUse:
    dims = len(module.kernel_size)
    if x.ndim == dims + 1:  # one sample without its batch dimension
        x, grad = x[None], grad[None]
    rows = grad.reshape(*grad.shape[:2], -1).transpose(1, 2).reshape(-1, grad.shape[1])
    return DenseUse(lambda: _unfolded(module, x), _real(rows))


def _unfolded(module: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """The input of a convolution as rows over samples and output positions, (n, c_in * kernel)."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(_real(x), _paddings(module), mode=mode)
    kernel, dilation, stride = module.kernel_size, module.dilation, module.stride
    if isinstance(module, nn.Conv1d):
        x, kernel, dilation, stride = x[:, :, None], (1, *kernel), (1, *dilation), (1, *stride)
    columns = F.unfold(x, kernel, dilation=dilation, stride=stride)
    return columns.transpose(1, 2).reshape(-1, columns.shape[1])


def _paddings(module: nn.Conv1d | nn.Conv2d) -> list[int]:
    """What F.pad takes: before and after, last dimension first."""
    if module.padding == "valid":
        return [0] * (2 * len(module.kernel_size))
    if module.padding == "same":
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
    assert not isinstance(module.padding, str)
    return [side for pad in reversed(module.padding) for side in (pad, pad)]


def _real(t: Tensor) -> Tensor:
    """Rows in float32, or float64 where they are so: under autocast, inputs and gradients come in several dtypes."""
    return t if t.dtype in (torch.float32, torch.float64) else t.to(torch.float32)
