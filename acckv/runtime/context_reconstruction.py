"""KVzip's second pass (arXiv 2505.23416): the context is fed in again behind a repeat prompt, watched, and forgotten.

What stands for the context are the tokens from the first audio or video entry to the last, as the embeddings that went
into the decoder the first time: a media token has no text that could be repeated. They keep their spacing in time,
height and width and move as a block to the positions after the prompt. As in the paper they come in chunks, each right
behind the cache and the repeat prompt and led in by the end of the chunk before it, and every chunk is forgotten before
the next, so that the cache never grows by more than a chunk. The softmax runs over everything a row sees, which is the
paper's definition; its approximation, to look at the keys of the repeated chunk only, is not needed where attention is
worked off in rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from acckv.cache.cache import CompressedCache, branch_layers
from acckv.errors import InputError
from acckv.method.modality import ModalityMap
from acckv.method.scoring import Observation, peak_attention
from acckv.models.batching import DecoderInputs, column_window, gather_columns, rope_positions

#: The paper's request.
REPEAT_PROMPT = "Repeat the previous context exactly."
#: Tokens repeated at once, and tokens of the chunk before that lead in (the official code's numbers).
CHUNK, LEAD_IN = 2000, 8

#: Stands for the context where a chat template writes a request behind it.
_CONTEXT = "(context)"

#: (compressed layer, query, key, value, scaling)
Record = Callable[[int, Tensor, Tensor, Tensor, float], None]
#: (cache, tokens behind it, mask of all tokens so far, record)
Feed = Callable[[CompressedCache, DecoderInputs, Tensor, Record], None]


def repeat_prompt(processor: Any, in_chat: bool) -> str:
    """The text between a context and its repetition: the request, as a user's in the model's chat format or bare.

    Args:
        processor: or tokenizer, with the chat template.

    Raises:
        InputError: there is no chat template.
    """
    if not in_chat or processor is None:
        return REPEAT_PROMPT
    asked = f"{_CONTEXT}\n\n{REPEAT_PROMPT}"
    content: Any = asked if getattr(processor, "tokenizer", None) is None else [{"type": "text", "text": asked}]
    if getattr(processor, "chat_template", None) is None:
        raise InputError("has no chat template; leave repeat_in_chat out", field="processor")
    messages = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return text.partition(_CONTEXT)[2]


def reconstruction_attention(
    embedded: DecoderInputs,
    layers: list[Any],
    prompt: DecoderInputs,
    feed: Feed,
    chunk: int = CHUNK,
) -> list[Tensor]:
    """The most attention that each entry of a context receives from its repetition.

    Args:
        embedded: the context as it went into the decoder; layers: its full cache, which stays as it is.
        prompt: the repeat prompt, at the positions after the context.
        feed: runs the decoder.

    Returns:
        by layer ``[B, K, N]``: the maximum over the rows of the prompt and the repetition and over the query heads.
    """
    labels = embedded.labels
    entries = labels.labels.shape[1]
    peaks: dict[int, Tensor] = {}

    def run(layers: list[Any], tokens: DecoderInputs, real: Tensor) -> list[Any]:
        cache = CompressedCache(branch_layers(layers), labels, embedded.next_position)
        rows = torch.arange(real.shape[1] - tokens.embeds.shape[1], real.shape[1])
        known = real.cpu()

        def record(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
            seen = Observation(query, key, value, rows.expand(len(real), -1), known[:, rows], known, scaling)
            peak = peak_attention(seen)[..., :entries]
            peaks[layer] = torch.maximum(peaks[layer], peak) if layer in peaks else peak

        feed(cache, tokens, real, record)
        return cache.layers

    real = torch.cat([labels.real, prompt.labels.real], dim=1)
    layers = run(layers, prompt, real)
    for columns in chunks(labels, chunk):
        positions = moved_positions(embedded.position_ids, columns, prompt.next_position)
        run(layers, embedded.gather(columns, positions), torch.cat([real, (columns >= 0).to(real.device)], dim=1))
    return [peaks[layer] for layer in sorted(peaks)]


def chunks(labels: ModalityMap, chunk: int = CHUNK) -> Iterator[Tensor]:
    """Windows (see :mod:`acckv.models.batching`) over what is repeated; where they begin depends on no other row."""
    starts, stops = _repeated(labels)
    for offset in range(0, int((stops - starts).max()), chunk):
        first = torch.minimum(starts + offset, stops)
        last = torch.minimum(first + chunk, stops)
        lead = torch.maximum(first - LEAD_IN, starts)
        # Sliding windows count columns, so what is missing of a shorter row comes after it.
        yield column_window(torch.where(last > first, lead, first), last, align="left")


def drawn_window(labels: ModalityMap, places: Sequence[float], tokens: int) -> Tensor:
    """One window of at most `tokens` in each row of what is repeated.

    Args:
        places: by row, 0 to 1, where the window lies: drawn uniformly, every token is in it equally often.
    """
    starts, stops = _repeated(labels)
    step = torch.tensor(places, dtype=torch.double) * (stops - starts + tokens - 1)
    first = starts - tokens + 1 + step.long()
    return column_window(torch.maximum(first, starts), torch.minimum(first + tokens, stops), align="left")


def _repeated(labels: ModalityMap) -> tuple[Tensor, Tensor]:
    """int64 ``[batch]`` each, on the CPU: the first column that is repeated, and the one after the last."""
    stops = labels.media_end()
    return torch.where(stops > 0, labels.host.media.long().argmax(dim=1), stops), stops


def moved_positions(position_ids: Tensor, columns: Tensor, start: Tensor) -> Tensor:
    """Position ids of a window, moved as a block so that the lowest is `start` ``[B, 1]``."""
    taken = gather_columns(rope_positions(position_ids), columns, -1)
    missing = (columns < 0).to(taken.device)
    beyond = taken.amax() + 1  # positions of some models are no whole numbers
    lowest = torch.where(missing, beyond, taken).amin(-1, keepdim=True)
    lowest = lowest.amin(0) if lowest.ndim == 3 else lowest
    return (taken + (start - lowest)).masked_fill(missing, 0)
