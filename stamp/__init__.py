"""STAMP (arXiv:2506.12031): certified gradient matching over tasks and clients, and prototypes without a network."""
