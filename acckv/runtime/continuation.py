"""A compressed cache read on: the positions of what follows, which the cache knows, and the inputs of a question."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from acckv.cache.cache import CompressedCache
from acckv.errors import InputError
from acckv.models.base import ModelAdapter


def following_positions(
    adapter: ModelAdapter, cache: CompressedCache, inputs: dict[str, Any], tokens: Tensor
) -> Tensor:
    """Position ids, as the decoder takes them, of new tokens that read a cache.

    Args:
        inputs: of the model, features of new media among them; the last columns of a 2-D attention_mask are of the
            new tokens, and 0 where they are padding.
        tokens: the new ones ``[batch, tokens]``, or their embeddings ``[batch, tokens, hidden]``; a batch that generate
            has still to repeat for its beams has fewer rows than the cache.

    Raises:
        InputError: the cache is of another batch, or of media that the family's adapter has no positions for.
    """
    batch, length = tokens.shape[:2]
    start = cache.next_position.to(tokens.device)
    copies = start.shape[0] // max(batch, 1)
    cache.check_rows(max(copies, 1) * batch)
    start = start[::copies]
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        real = mask[:, -length:].to(tokens.device) > 0
    else:
        real = torch.ones(batch, length, dtype=torch.bool, device=tokens.device)
    if adapter.brings_media(inputs) and not tokens.is_floating_point():
        return adapter.prompt_positions({**inputs, "input_ids": tokens}, real, start)
    return adapter.text_positions(start + (real.long().cumsum(-1) - 1).clamp_min(0))


def generated_positions(
    adapter: ModelAdapter, cache: CompressedCache, inputs: dict[str, Any], tokens: Tensor
) -> Tensor:
    """The same for a call of generate, which may bring what the cache has seen again: zeros stand for its positions.

    Args:
        inputs: of generate; tokens: of its call, all of them or the new ones alone.
    """
    ids = inputs.get("input_ids")
    tokens = ids if isinstance(ids, Tensor) and ids.shape[1] else tokens
    mask, given, seen = inputs.get("attention_mask"), tokens.shape[1], cache.get_seq_length()
    whole = mask.shape[1] if isinstance(mask, Tensor) else given
    new = given if whole > given else max(given - seen, 0)
    positions = following_positions(adapter, cache, inputs, tokens[:, given - new :])
    return F.pad(positions, (whole - new, 0))


def question_inputs(
    cache: CompressedCache, input_ids: Tensor, attention_mask: Tensor | None, copies: int, device: torch.device
) -> tuple[Tensor, Tensor, CompressedCache]:
    """Ids, mask and cache that ``model.generate`` takes to answer questions about a compressed context.

    Args:
        input_ids, attention_mask: of the questions ``[questions, tokens]``, as of :meth:`Session.answer`.
        copies: rows that generate makes of each; it does not copy the cache, which comes with all of them.

    Raises:
        InputError: there is no token, padding is not on the left, or the questions do not divide over the clips.
    """
    batch = cache.labels.labels.shape[0]
    if input_ids.ndim != 2 or not input_ids.numel():
        raise InputError(f"needs ids [rows, tokens] of a question, not {list(input_ids.shape)}", field="input_ids")
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if not bool((attention_mask[:, -1] > 0).all()):
        raise InputError("ends with padding in some row; pad questions on the left", field="attention_mask")
    if input_ids.shape[0] % batch:
        raise InputError(f"{input_ids.shape[0]} rows do not divide over {batch} clips", field="input_ids")
    branch = cache.branch(input_ids.shape[0] // batch * copies)
    input_ids, attention_mask = input_ids.to(device), attention_mask.to(device)
    # generate slices what the cache has seen off the front; what stands there does not matter.
    context = input_ids.new_zeros(input_ids.shape[0], branch.get_seq_length())
    mask = torch.cat([branch.labels.real[::copies].to(attention_mask.dtype), attention_mask], dim=1)
    return torch.cat([context, input_ids], dim=1), mask, branch


def generated_copies(options: dict[str, Any], default: Any) -> int:
    """Rows that generate makes of one: its beams, or the sequences that it returns where those are more."""
    config = options.get("generation_config") or default
    counts = (options.get(name, getattr(config, name, None)) for name in ("num_beams", "num_return_sequences"))
    return max(count or 1 for count in counts)
