"""STAMP (arXiv:2506.12031): certified gradient matching over tasks and clients, and prototypes without a network."""

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
