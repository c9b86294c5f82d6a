"""Adapter directories of PEFT: their configuration, keys, kinds of layers, and how they are written."""
