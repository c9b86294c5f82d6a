"""A streamed aggregation: its identity, its journal, its results."""
