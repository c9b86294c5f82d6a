"""STAMP (arXiv:2506.12031): certified gradient matching over tasks and clients, and prototypes without a network."""

from .dual import Dual, solve_dual
from .gramian import Gramian
from .match import Match, gramian, match, match_

__all__ = ["Dual", "Gramian", "Match", "gramian", "match", "match_", "solve_dual"]
