"""Clips as token ids, as precomputed embeddings for `data.source: precomputed`, and as a file for other systems."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from acckv.data.precomputed import QUESTIONS, write_precomputed_clip
from acckv.io.files import whole_file, whole_folder
from acckv.method.modality import Modality
from benchmarks.pretrained.kinds import Clip, Size, make_clip


@dataclass(frozen=True)
class Tokens:
    """The token ids of a text, and of each which modality it stands for."""

    ids: list[int]
    modality_ids: list[int]

    @property
    def text(self) -> int:
        """Tokens that stand for text: the prompt before the halves."""
        return self.modality_ids.count(Modality.TEXT)


def tokenize(clip: Clip, tokenizer: Any) -> Tokens:
    """The tokens of a clip; its three parts are tokenised each by itself, the first with what opens a text."""
    ids: list[int] = []
    kinds: list[int] = []
    parts = {Modality.TEXT: clip.start, Modality.VIDEO: clip.video, Modality.AUDIO: clip.audio}
    for modality, text in parts.items():
        part = tokenizer(text, add_special_tokens=modality == Modality.TEXT).input_ids
        ids += part
        kinds += [int(modality)] * len(part)
    return Tokens(ids, kinds)


def write_clips(
    folder: Path, kinds: Sequence[str], counts: Mapping[str, int], size: Size, model: Any, tokenizer: Any
) -> None:
    """Write a folder of precomputed clips, whole or not at all, unless it is there.

    Args:
        counts: clips of each split, dealt out to the kinds in turn.
    """
    if folder.exists():
        return
    embed = model.get_input_embeddings()
    with whole_folder(folder) as staging, (staging / QUESTIONS).open("w", encoding="utf-8") as lines, torch.no_grad():
        for split, count in counts.items():
            for place in range(count):
                kind, number = kinds[place % len(kinds)], place // len(kinds)
                clip, name = make_clip(kind, split, number, size), f"{kind}-{split}{number:04}"
                tokens = tokenize(clip, tokenizer)
                write_precomputed_clip(
                    staging, name, embed(torch.tensor(tokens.ids)), torch.tensor(tokens.modality_ids)
                )
                for question in clip.questions:
                    line = {
                        "clip": name,
                        "question": question.stem,
                        "answer": question.answer.strip(),
                        "groups": [question.half, kind],  # the last one is what a card counts
                        "split": split,
                    }
                    lines.write(json.dumps(line) + "\n")


def write_tokens(file: Path, kind: str, count: int, size: Size, limit: int, tokenizer: Any) -> list[Clip]:
    """Write the test clips as token ids, a clip a line, for a system that reads nothing else of ours.

    Args:
        limit: longest answer in tokens.
    """
    clips = [make_clip(kind, "test", number, size) for number in range(count)]
    with whole_file(file) as temporary, temporary.open("w", encoding="utf-8") as lines:
        for clip in clips:
            tokens = tokenize(clip, tokenizer)
            stems = [tokenizer(question.stem, add_special_tokens=False).input_ids for question in clip.questions]
            lines.write(json.dumps({"ids": tokens.ids, "text": tokens.text, "stems": stems, "limit": limit}) + "\n")
    return clips


def longest_answer(kind: str, count: int, size: Size, tokenizer: Any) -> int:
    """Tokens of the longest right answer about the test clips, and one that shows that it ended."""
    clips = (make_clip(kind, "test", number, size) for number in range(count))
    answers = [question.answer for clip in clips for question in clip.questions]
    return 1 + max(len(ids) for ids in tokenizer(answers, add_special_tokens=False).input_ids)
