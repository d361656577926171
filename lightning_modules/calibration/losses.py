"""The teacher's targets (its distributions and features) and how far a student is from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acckv.data.batching import PackedQuestions
from lightning_modules.calibration.config import Divergence
from lightning_modules.calibration.distributed import over_processes

#: Logits that are sorted at once.
SORTED = 1 << 24
#: Vocabularies up to this size are kept whole: the ids of the likeliest tokens would take as much.
WHOLE = 1024


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


@dataclass(frozen=True)
class TeacherTargets:
    """Outputs of the base model with its full cache at the tokens that count, in the order of batch rows and tokens.

    Attributes:
        words: the distributions over the next token, as logits ``[tokens, vocabulary]`` or by their likeliest tokens.
        features: ``[layers, tokens, size]`` outputs of the layers for the feature loss; ``[0, tokens, 0]`` without it.
    """

    words: Tensor | TopTokens
    features: Tensor

    @classmethod
    def join(cls, parts: Sequence[TeacherTargets]) -> TeacherTargets:
        """One after the other."""
        words = [part.words for part in parts]
        features = torch.cat([part.features for part in parts], dim=1)
        if any(isinstance(part, TopTokens) for part in words):
            return cls(TopTokens.join([part for part in words if isinstance(part, TopTokens)]), features)
        return cls(torch.cat([part for part in words if isinstance(part, Tensor)]), features)

    def divergence(self, logits: Tensor, weight: Tensor, kind: Divergence) -> Tensor:
        """Weighted mean KL between these distributions and a student's, as
        :func:`divergence`.

        Of likeliest tokens it is a lower bound; see :meth:`TopTokens.divergence`.
        """
        if isinstance(self.words, Tensor):
            return divergence(self.words, logits, weight, kind)
        kl = self.words.divergence(logits, reverse=kind == "reverse")
        return (kl * weight).sum() / weight.sum()

    def likeliest(self, top_p: float) -> TeacherTargets:
        """The same by the likeliest tokens that cover `top_p` of each distribution, where that is less to hold."""
        if not isinstance(self.words, Tensor) or top_p >= 1 or self.words.shape[1] <= WHOLE:
            return self
        return TeacherTargets(TopTokens.of(self.words, top_p), self.features)

    def by_question(self, questions: PackedQuestions) -> list[list[TeacherTargets]]:
        """The part of each question of each batch row, in memory of its own."""
        counted, start = questions.weight > 0, 0
        parts: list[list[TeacherTargets]] = []
        for row in range(len(questions.question)):
            parts.append([])
            for count in questions.question[row, counted[row]].unique_consecutive(return_counts=True)[1].tolist():
                stop, words = start + count, self.words
                cut = words[start:stop].clone() if isinstance(words, Tensor) else words.cut(start, stop)
                parts[row].append(TeacherTargets(cut, self.features[:, start:stop].clone()))
                start = stop
        return parts

    def to(self, device: torch.device) -> TeacherTargets:
        return TeacherTargets(self.words.to(device), self.features.to(device))


@dataclass(frozen=True)
class TopTokens:
    """The likeliest tokens of each distribution, as many as cover a share of its probability, and what is left.

    Attributes:
        ids: int32 ``[entries]`` of the tokens, one distribution after the other.
        log_probs: float32 ``[entries]`` of these tokens.
        counts: int64 ``[distributions]``, how many tokens each has.
        rest: float32 ``[distributions]`` log probability of all other tokens together.
    """

    ids: Tensor
    log_probs: Tensor
    counts: Tensor
    rest: Tensor

    @classmethod
    def of(cls, logits: Tensor, top_p: float) -> TopTokens:
        """The fewest tokens of each distribution that cover `top_p` of it.

        Args:
            logits: ``[distributions, vocabulary]``.
        """
        count = max(SORTED // logits.shape[1], 1)
        return cls.join([cls._of(part, top_p) for part in logits.split(count)])

    @classmethod
    def _of(cls, logits: Tensor, top_p: float) -> TopTokens:
        log_probs, ids = logits.float().log_softmax(-1).sort(dim=-1, descending=True)
        before = log_probs.exp().cumsum(-1).roll(1, -1)
        before[:, 0] = 0  # the likeliest is held whatever it covers
        held = before < top_p
        rest = log_probs.masked_fill(held, -torch.inf).logsumexp(-1)
        return cls(ids[held].int(), log_probs[held], held.sum(-1), rest)

    @classmethod
    def join(cls, parts: Sequence[TopTokens]) -> TopTokens:
        """One after the other."""
        names = ("ids", "log_probs", "counts", "rest")
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in names))

    def cut(self, start: int, stop: int) -> TopTokens:
        """Some of the distributions, in memory of their own."""
        first, last = (int(self.counts[:place].sum()) for place in (start, stop))
        entries, whole = slice(first, last), slice(start, stop)
        parts = self.ids[entries], self.log_probs[entries], self.counts[whole], self.rest[whole]
        return TopTokens(*(part.clone() for part in parts))

    def to(self, device: torch.device) -> TopTokens:
        return TopTokens(*(part.to(device) for part in (self.ids, self.log_probs, self.counts, self.rest)))

    def divergence(self, logits: Tensor, reverse: bool = False) -> Tensor:
        """KL between these distributions P and others Q, with all tokens that are not held as one.

        ``sum over held tokens of p log(p / q)  +  P(rest) log(P(rest) / Q(rest))``, or the same with P and Q exchanged.
        It is a lower bound of the KL over the vocabulary (log-sum inequality), and equal to it where all is held.

        Args:
            logits: of Q, ``[distributions, vocabulary]``; reverse: KL(Q || P) and not KL(P || Q).

        Returns:
            ``[distributions]`` in nats.
        """
        found = logits.float().log_softmax(-1)
        row = torch.arange(len(found), device=found.device).repeat_interleave(self.counts)
        token = self.ids.long()
        mine, its = self.log_probs, found[row, token]
        others = found.index_put((row, token), found.new_tensor(-torch.inf))
        whole = self.counts == found.shape[1]  # nothing is left, and a sum over nothing has no gradient
        its_rest = others.masked_fill(whole[:, None], 0).logsumexp(-1)
        pairs = ((mine, its), (self.rest.masked_fill(whole, 0), its_rest))
        held, rest = ((q.exp() * (q - p)) if reverse else (p.exp() * (p - q)) for p, q in pairs)
        return rest.masked_fill(whole, 0).index_add(0, row, held)
