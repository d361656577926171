"""The teacher: the frozen model with its full cache, whose prefills and answers the clip cache may hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from acckv.data.batching import PackedQuestions, pack_embedded, pack_questions
from acckv.method.plan import LayerPlan
from acckv.models.batching import DecoderInputs
from acckv.runtime.prefill import Prefill
from acckv.runtime.session import Session
from lightning_modules.calibration.clip_cache import HOST, ClipCache
from lightning_modules.calibration.config import Features
from lightning_modules.calibration.dataset import CalibrationBatch
from lightning_modules.calibration.losses import TeacherTargets, features_at, outputs_of


class Teacher:
    """Asks the base model about the clips of a batch, each question of a clip once where its answers are kept.

    Args:
        session: on the model; its policy says what a prefill observes.
        cache: read and written here alone.
        features: of which layers' outputs are part of the targets, or None.
    """

    def __init__(self, session: Session, cache: ClipCache, features: Features | None) -> None:
        self.session, self.cache = session, cache
        adapter = session.adapter
        self.layers: list[nn.Module] = []
        """Modules whose outputs the feature loss compares."""
        if features is not None:
            self.layers = list(adapter.decoder.layers) if features == "hidden" else adapter.decoder_attention

    def targets(self, batch: CalibrationBatch, repeated: int = 0) -> tuple[Prefill, PackedQuestions, TeacherTargets]:
        """The prefill of the base model, what is asked of it, and its targets at the tokens that count.

        Args:
            repeated: tokens of each context that are fed in again in place of the batch's questions; 0 asks those.
        """
        cache = self.cache
        with self.session.base_projections():
            prefill = self.prefill(batch)
            if repeated:
                questions = pack_embedded(*self.session.repetition(prefill, batch.places, repeated))
                return prefill, questions, self._ask(prefill, questions)
            if cache.keep != "prefill":
                return prefill, batch.questions, self._ask(prefill, batch.questions)
            if not cache.has("targets", batch.clips):
                every = pack_questions(batch.every).to(batch.device)
                parts = self._ask(prefill, every).likeliest(cache.top_p).by_question(every)
                cache.put("targets", batch.clips, [[part.to(HOST) for part in clip] for clip in parts])
        kept = zip(cache.get("targets", batch.clips), batch.drawn, strict=True)
        targets = TeacherTargets.join([parts[index] for parts, drawn in kept for index in drawn])
        return prefill, batch.questions, targets.to(batch.device)

    def prefill_in(self, session: Session, batch: CalibrationBatch) -> Prefill:
        """A prefill of the batch's contexts in any session: the one that is kept, unless LoRA adapts the prompt."""
        kept, observed = self._kept(batch), session.planners.policy.queries
        if isinstance(kept, Prefill):
            return session.prefill(kept.embedded, observed) if session.adapts_prompt else kept
        return session.prefill(kept, observed, **batch.inputs)

    def _kept(self, batch: CalibrationBatch) -> Prefill | DecoderInputs | None:
        if self.cache.has("prefills", batch.clips):
            return Prefill.stack(self.cache.get("prefills", batch.clips)).to(batch.device)
        if self.cache.has("embeddings", batch.clips):
            return DecoderInputs.stack(self.cache.get("embeddings", batch.clips)).to(batch.device)
        return None

    def prefill(self, batch: CalibrationBatch) -> Prefill:
        """That of the base model, LoRA off, which is kept if it is new."""
        kept, cache = self._kept(batch), self.cache
        if isinstance(kept, Prefill):
            return kept
        prefill = self.session.prefill(kept, self.session.planners.policy.queries, **batch.inputs)
        if cache.keep == "prefill":
            cache.put("prefills", batch.clips, [row.to(HOST) for row in prefill.unstack()])
        elif kept is None and cache.keep == "embeddings":
            cache.put("embeddings", batch.clips, [row.to(HOST) for row in prefill.embedded.unstack()])
        return prefill

    def _ask(self, prefill: Prefill, questions: PackedQuestions) -> TeacherTargets:
        with torch.no_grad(), outputs_of(self.layers) as outputs:
            logits = answer_logits(self.session, prefill, None, questions)
        return TeacherTargets(logits, features_at(questions.counted, outputs, logits))


def answer_logits(
    session: Session, prefill: Prefill, plans: list[LayerPlan] | None, questions: PackedQuestions
) -> Tensor:
    """Logits of the tokens that count, ``[tokens, vocabulary]``: most of a long vocabulary is never made.

    Args:
        plans: of the student; None reads the full cache.
    """
    mask = questions.mask(prefill.labels, session.model.dtype)
    tokens: dict[str, Any] = {"embedded": questions.embedded}
    if questions.embedded is None:
        positions = session.adapter.text_positions(prefill.next_position + questions.offset)
        tokens = {"input_ids": questions.ids, "position_ids": positions}
    return session.simulate(prefill, plans, logits_at=questions.counted, attention_mask=mask, **tokens)
