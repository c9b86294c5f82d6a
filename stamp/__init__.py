"""STAMP (arXiv:2506.12031): certified gradient matching over tasks and clients, and prototypes without a network.

A matching reads K gradients (``structure``), makes their Gram matrix (``gramian``; without storing a gradient,
``ghost``), solves its dual (``dual``) and combines the gradients by the coefficients found (``match``). ``temporal`` is
that for a client over its tasks, ``spatial`` for the server over its clients. Clients keep what they match by in a
``memory`` of ``prototypes``; ``metrics`` says what a run came to.

The dual of one Gram matrix is solved by ``_exact``, on the CPU to rounding: pairwise Frank-Wolfe (``_frank_wolfe``)
guesses which tasks bind, closed forms (``_faces``) solve that face of the simplex and those that follow, and where the
gradients can be weighted to zero, ``_cone`` projects their mean on the cone that all agree with. Many matrices at once,
and those of a traced or captured graph, are solved by ``_batched``, the same steps in tensors; on a CPU what it leaves
above its tolerance goes to ``_exact``. ``_problem`` and ``_batch_problem`` are what the two solve.

A ghost Gramian is made of what ``_ghost_trace`` catches in a pass: per call of a layer two factors (``_ghost_uses``),
per weight their Gram matrix or gradients (``_ghost_weight``).
"""

from .dual import Dual, solve_dual
from .ghost import GhostMatch, ghost_gramian, ghost_match
from .gramian import Gramian
from .match import Match, gramian, match, match_
from .memory import PrototypeMemory
from .metrics import ContinualMetrics, average_accuracy, average_forgetting, backward_transfer, continual_metrics
from .prototypes import Prototypes, select_prototypes
from .spatial import SpatialMatcher, SpatialStep
from .temporal import TemporalMatcher, TemporalStep

__all__ = [
    "ContinualMetrics",
    "Dual",
    "GhostMatch",
    "Gramian",
    "Match",
    "PrototypeMemory",
    "Prototypes",
    "SpatialMatcher",
    "SpatialStep",
    "TemporalMatcher",
    "TemporalStep",
    "average_accuracy",
    "average_forgetting",
    "backward_transfer",
    "continual_metrics",
    "ghost_gramian",
    "ghost_match",
    "gramian",
    "match",
    "match_",
    "select_prototypes",
    "solve_dual",
]
