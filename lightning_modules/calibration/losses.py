"""How far a student's answers are from its teacher's: over words, and over what its layers compute on the way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.calibration.config import Divergence
from lightning_modules.calibration.distributed import over_processes


def divergence(teacher: Tensor, student: Tensor, weight: Tensor, kind: Divergence = "forward") -> Tensor:
    """Weighted mean KL in nats: KL(teacher || student) where `kind` is 'forward', else KL(student || teacher).

    Args:
        teacher, student: logits ``[tokens, vocabulary]``; weight: ``[tokens]``.
    """
    expected, found = (logits.float().log_softmax(-1) for logits in (teacher, student))
    pair = (found, expected) if kind == "forward" else (expected, found)
    kl = F.kl_div(*pair, log_target=True, reduction="none").sum(-1)
    return (kl * weight).sum() / weight.sum()


def feature_loss(teacher: Tensor, student: Tensor, weight: Tensor) -> Tensor:
    """Mean square difference as a share of the teacher's mean square over all processes, mean over layers.

    Args:
        teacher, student: ``[layers, tokens, size]``; weight: scalar, of these tokens in the mean over processes.
    """
    expected, found = teacher.float(), student.float()
    missed, whole = (found - expected).square().sum((1, 2)), expected.square().sum((1, 2))
    # What each process adds to its weighted mean is its part of one share, that of all tokens together.
    scale = over_processes(whole) / over_processes(weight)
    return (missed / weight / scale.clamp_min(1e-12)).mean()


@contextmanager
def outputs_of(modules: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """The outputs of modules while the context is open, in order of their calls; of a tuple the first."""
    seen: list[Tensor] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        seen.append(output if isinstance(output, Tensor) else output[0])

    handles = [module.register_forward_hook(note) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def features_at(counted: Tensor, outputs: Sequence[Tensor], logits: Tensor) -> Tensor:
    """Features at the tokens that count, ``[layers, tokens, size]``.

    Args:
        counted: int64 ``[tokens]`` positions in B x T; outputs: by layer ``[B, T, size]``; logits: of these tokens.
    """
    chosen = [layer.flatten(0, 1).index_select(0, counted) for layer in outputs]
    return torch.stack(chosen) if chosen else logits.new_zeros(0, len(logits), 0)
