"""Model families, and the one way to load a checkpoint of any of them."""

from acckv.adapters.base import AttentionLayer, ModelAdapter
from acckv.adapters.generic import GenericAdapter
from acckv.adapters.loading import load_model, load_processor
from acckv.adapters.processors import TextProcessor
from acckv.adapters.registry import ADAPTERS, find_adapter

__all__ = [
    "ADAPTERS",
    "AttentionLayer",
    "GenericAdapter",
    "ModelAdapter",
    "TextProcessor",
    "find_adapter",
    "load_model",
    "load_processor",
]
