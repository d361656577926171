"""acckv: learned KV-cache compression for audio-video LLMs."""

from acckv.compressor import KVCompressor
from acckv.errors import InputError

__all__ = ["InputError", "KVCompressor"]
__version__ = "0.1.0"
