"""Aggregation and matching over the ranks of torch.distributed: any backend, any number of hosts.

``aggregate_sharded`` gives every module of the adapters to one rank. ``match_sharded`` leaves every gradient where it
lies, in shards, and exchanges K x K numbers. Nothing dense is formed or reduced in either. Both are collective: every
rank of the group calls them with the same options.
"""

from __future__ import annotations

from ._distributed.aggregate import ShardedAggregation, aggregate_sharded
from ._distributed.match import match_sharded
from ._distributed.watch import RankError, Watch

__all__ = ["RankError", "ShardedAggregation", "Watch", "aggregate_sharded", "match_sharded"]
