"""Measuring: peers side by side, demos on real data, the console script."""
