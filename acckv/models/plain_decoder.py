"""A plain decoder, fed with embeddings: its tokenizer stands for a processor, its clips are precomputed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from acckv.errors import InputError
from acckv.method.modality import Modality
from acckv.models.clips import PrecomputedClip
from acckv.models.encoder import Encoder

EMBEDS, MODALITY_IDS = "inputs_embeds", "modality_ids"
"""Model inputs, and tensors of a file of precomputed embeddings."""


@dataclass(frozen=True)
class TextProcessor:
    """The tokenizer of a plain decoder, and what its embeddings are like.

    Attributes:
        tokenizer: of the decoder.
        width: numbers of an embedding.
        dtype: that the decoder runs in.
        embed: int64 ``[tokens]`` to ``[tokens, width]``; None where the decoder itself was not loaded.
    """

    tokenizer: Any
    width: int
    dtype: torch.dtype = torch.float32
    embed: Callable[[Tensor], Tensor] | None = None

    def batch_decode(self, tokens: Any, **options: Any) -> list[str]:
        """As of every processor of transformers."""
        return self.tokenizer.batch_decode(tokens, **options)


class EmbeddingsEncoder(Encoder):
    """Gives `inputs_embeds` [batch, tokens, width], `modality_ids` and `attention_mask` [batch, tokens]."""

    processor_types = (TextProcessor,)
    clip_type = PrecomputedClip

    def encode(
        self, clips: Sequence[PrecomputedClip], questions: Sequence[str] | None, system_prompts: Sequence[str | None]
    ) -> dict[str, Any]:
        if any(system is not None for system in system_prompts):
            message = "precomputed clips hold their own; compute them with it, and leave it out here"
            raise InputError(message, field="system_prompt")
        for clip in clips:
            if clip.embeds.shape[1] != self.processor.width:
                message = f"has a width of {clip.embeds.shape[1]}, the decoder's is {self.processor.width}"
                raise InputError(message, source=clip.path, field=EMBEDS)
        clips = [replace(clip, embeds=clip.embeds.to(self.processor.dtype)) for clip in clips]
        if questions is not None:
            clips = [self._with_question(*pair) for pair in zip(clips, questions, strict=True)]
        padding = int(Modality.PADDING)
        embeds = pad_sequence([clip.embeds for clip in clips], batch_first=True, padding_side="left")
        kinds = [clip.modality_ids for clip in clips]
        labels = pad_sequence(kinds, batch_first=True, padding_value=padding, padding_side="left")
        return {EMBEDS: embeds, MODALITY_IDS: labels, "attention_mask": (labels != padding).long()}

    def encode_media(self, clip: PrecomputedClip) -> dict[str, Any]:
        media = (clip.modality_ids != Modality.TEXT).nonzero()[:, 0]
        span = slice(int(media[0]), int(media[-1]) + 1)
        return self.encode(
            [replace(clip, embeds=clip.embeds[span], modality_ids=clip.modality_ids[span])], None, [None]
        )

    def question_suffix(self, question: str) -> Tensor:
        ids = self.processor.tokenizer(question, add_special_tokens=False)["input_ids"]
        if not ids:
            raise InputError(f"{question!r} has no token in the decoder's vocabulary", field="question")
        return torch.tensor(ids, dtype=torch.long)

    def _with_question(self, clip: PrecomputedClip, question: str) -> PrecomputedClip:
        if self.processor.embed is None:
            raise InputError(
                "a question is embedded by the decoder, which was not loaded; compress the context alone", field="when"
            )
        ids = self.question_suffix(question)
        with torch.no_grad():
            text = self.processor.embed(ids.to(self.processor.embed.weight.device)).to(clip.embeds)
        kinds = torch.full_like(ids, int(Modality.TEXT))
        return replace(clip, embeds=torch.cat([clip.embeds, text]), modality_ids=torch.cat([clip.modality_ids, kinds]))
