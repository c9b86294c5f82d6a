"""Aggregation and matching over the ranks of a torch.distributed group."""
