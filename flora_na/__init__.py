"""FLoRA-NA (arXiv:2509.26399): one pair of LoRA factors nearest to the clients' weighted sum of products."""

from .layer import Adapter, LoraLayer

__all__ = ["Adapter", "LoraLayer"]
