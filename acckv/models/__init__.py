"""Model families, one file each, and the one way to load a checkpoint of any of them."""

from acckv.models import gemma4, qwen_omni, qwen_vl
from acckv.models.base import AttentionLayer, ModelAdapter
from acckv.models.clips import Media, PrecomputedClip
from acckv.models.encoder import ChatEncoder, Encoder
from acckv.models.family import FAMILIES, Family, find_adapter, find_encoder, register_family
from acckv.models.generic import GenericAdapter
from acckv.models.loading import load_model, load_processor
from acckv.models.plain_decoder import TextProcessor

__all__ = [
    "FAMILIES",
    "AttentionLayer",
    "ChatEncoder",
    "Encoder",
    "Family",
    "GenericAdapter",
    "Media",
    "ModelAdapter",
    "PrecomputedClip",
    "TextProcessor",
    "find_adapter",
    "find_encoder",
    "gemma4",
    "load_model",
    "load_processor",
    "qwen_omni",
    "qwen_vl",
    "register_family",
]
