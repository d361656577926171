"""Model families, and the one way to load a checkpoint of any of them."""

from acckv.models.base import AttentionLayer, ModelAdapter
from acckv.models.generic import GenericAdapter
from acckv.models.loading import load_model, load_processor
from acckv.models.processors import TextProcessor
from acckv.models.registry import ADAPTERS, find_adapter

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
