"""Batches for calibration: several clips, each with several questions that do not see one another.

All questions about a clip, with their answers, stand in one batch row behind its context, so a prefill is paid once;
the mask hides them from each other and their positions start anew, so that each equals a conversation of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from acckv.method.modality import ModalityMap
from acckv.models.batching import DecoderInputs


@dataclass(frozen=True)
class Question:
    """Tokens of one question and its answer.

    Args:
        ids: tokens after the prefilled part: question, answer and end token.
        first: index of the first token whose prediction counts: the one before the answer.
    """

    ids: tuple[int, ...]
    first: int


@dataclass(frozen=True)
class PackedQuestions:
    """The questions of a batch, padded on the right.

    Attributes:
        ids: ``[B, T]`` token ids.
        question: ``[B, T]`` number of a token's question in its batch row, -1 for padding.
        offset: ``[B, T]`` position of a token in its question.
        weight: float ``[B, T]`` weight of the prediction made at this token.
        counted: int64 ``[predictions]`` positions in B x T of the tokens that weigh.
        embedded: the tokens as they enter the decoder, in place of ids and offsets, where they are no text.
    """

    ids: Tensor
    question: Tensor
    offset: Tensor
    weight: Tensor
    counted: Tensor
    embedded: DecoderInputs | None = None

    def to(self, device: torch.device) -> PackedQuestions:
        parts = (self.ids, self.question, self.offset, self.weight, self.counted)
        ids, question, offset, weight, counted = (tensor.to(device) for tensor in parts)
        embedded = None if self.embedded is None else self.embedded.to(device)
        return PackedQuestions(ids, question, offset, weight, counted, embedded)

    def mask(self, labels: ModalityMap, dtype: torch.dtype) -> Tensor:
        """Additive attention mask ``[B, 1, T, N + T]``: the whole context and the earlier tokens of the question."""
        batch, length = self.ids.shape
        same = self.question[:, :, None] == self.question[:, None, :]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.ids.device).tril()
        context = labels.real[:, None, :].expand(-1, length, -1)
        visible = torch.cat([context, same & causal], dim=-1)
        mask = torch.zeros(batch, 1, length, visible.shape[-1], dtype=dtype, device=self.ids.device)
        return mask.masked_fill(~visible[:, None], torch.finfo(dtype).min)


def pack_embedded(embedded: DecoderInputs, first: int) -> PackedQuestions:
    """One question a row that is made of embeddings; all its tokens from index `first` on weigh alike."""
    labels = embedded.labels
    question = labels.real.long() - 1
    offset = torch.arange(question.shape[1], device=question.device).expand_as(question)
    weight = (labels.real & (offset >= first)).float()
    counted = weight.flatten().nonzero()[:, 0]
    return PackedQuestions(torch.zeros_like(question), question, offset, weight, counted, embedded)


def pack_questions(clips: Sequence[Sequence[Question]]) -> PackedQuestions:
    """Lay the questions about each clip behind one another.

    An answer of n tokens weighs ``sqrt(n)`` in all: a description counts more than a word, but not n times as much.
    """
    length = max(sum(len(question.ids) for question in questions) for questions in clips)
    shape = (len(clips), length)
    ids, question_of = torch.zeros(shape, dtype=torch.long), torch.full(shape, -1)
    offset, weight = torch.zeros_like(ids), torch.zeros(shape)
    for row, questions in enumerate(clips):
        start = 0
        for number, question in enumerate(questions):
            stop = start + len(question.ids)
            ids[row, start:stop] = torch.tensor(question.ids)
            question_of[row, start:stop] = number
            offset[row, start:stop] = torch.arange(len(question.ids))
            answer = len(question.ids) - 1 - question.first
            weight[row, start + question.first : stop - 1] = max(answer, 1) ** -0.5
            start = stop
    return PackedQuestions(ids, question_of, offset, weight, weight.flatten().nonzero()[:, 0])
