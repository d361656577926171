"""The teacher's targets: its distributions, whole or by their likeliest tokens, and its features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from acckv.data.batching import PackedQuestions
from lightning_modules.calibration.config import Divergence
from lightning_modules.calibration.losses import divergence

#: Logits that are sorted at once.
SORTED = 1 << 24
#: Vocabularies up to this size are kept whole: the ids of the likeliest tokens would take as much.
WHOLE = 1024


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
        :func:`lightning_modules.calibration.losses.divergence`.

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
