"""KVCompressor: the options, the learned weights and LoRA of a compression, saved and loaded as one small folder."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import nn

from acckv import export
from acckv.config import CompressionConfig, HeadBudgets, LoraScope, When
from acckv.data.asked_questions import AskedQuestions
from acckv.data.calibration_record import CalibrationRecord
from acckv.errors import InputError
from acckv.export import Export, LowRatio
from acckv.method.weights import CalibratedWeights
from acckv.planner import Planner, Planners
from acckv.policies import Policy, make_policy
from acckv.runtime.lora import LoraSets, LoraWeights
from acckv.runtime.session import Session


class KVCompressor(nn.Module):
    """Compress the audio and video entries of an AV-LLM's KV cache.

    ``with compressor(model): model.generate(...)`` is all that inference needs; the model is untouched on exit.

    Args:
        policy: a policy, or the name of one with its default options.
        ratio: kept share of the audio and video entries, averaged over layers; 0 to 1.
        budget: kept audio and video entries a layer on average; replaces `ratio`.
        when: 'context' compresses after the media, before any question is seen; 'prompt' after the whole prompt.
        head_budgets: 'equal': each KV head of a layer keeps as many entries. 'joint': what one ranking over all heads
            keeps.
        weights: what calibration learned, or None for the training-free policy.
        lora: the adapter that goes with the weights, or None.
        lora_scope: 'after' adapts only tokens after compression, 'all' the prompt too.
        base: where the weights belong: ``{"name", "layers", "query_heads", "kv_heads", "head_size"}``.
        source: the export it was loaded from, for messages.
        low_ratio: weights and an adapter of the lowest ratios, where those have their own, or None.
        calibration: what the weights were calibrated on, for the export; None where that is not known.
        asked: the questions that calibration asked, which tells which others lie outside of them
            (``compressor.asked.outside([...])``); None where it asked none, or that is not known.

    Raises:
        InputError: an unknown policy, an option out of its range, weights for a policy that learns none, or a
            `low_ratio` where the adapters act on the prompt, which is run before its ratio is known.
    """

    def __init__(
        self,
        policy: Policy | str = "acckv",
        *,
        ratio: float = CompressionConfig.ratio,
        budget: int | None = CompressionConfig.budget,
        when: When = CompressionConfig.when,
        head_budgets: HeadBudgets = CompressionConfig.head_budgets,
        weights: CalibratedWeights | None = None,
        lora: LoraWeights | None = None,
        lora_scope: LoraScope = "after",
        base: dict[str, Any] | None = None,
        source: str | None = None,
        low_ratio: LowRatio | None = None,
        calibration: CalibrationRecord | None = None,
        asked: AskedQuestions | None = None,
    ) -> None:
        super().__init__()
        if low_ratio is not None and lora_scope == "all":
            raise InputError("is 'all', and the lowest ratios have an adapter of their own", field="lora_scope")
        self.policy = make_policy(policy)
        self.config = CompressionConfig(ratio, budget, when, head_budgets)
        self.weights, self.lora = weights, lora
        self.lora_scope: LoraScope = lora_scope
        self.base, self.source, self.calibration, self.asked = base, source, calibration, asked
        self.planners = Planners(self._planner(weights))
        self.low_ratio: LowRatio | None = None
        if low_ratio is not None:
            self._set_low_ratio(low_ratio)

    def __call__(self, model: Any, processor: Any = None, **options: Any) -> Session:
        """A session that compresses `model`'s cache while its context is open.

        Args:
            model: a loaded AV-LLM of a supported family.
            processor: needed only where a probe prompt must be tokenised (`when: context` with observed attention).
            options: of :class:`Session`.

        Raises:
            InputError: the model is of no supported family, or not the one that the weights were calibrated for.
        """
        lora = None
        if self.lora is not None:
            lora = LoraSets(self.lora, None if self.low_ratio is None else self.low_ratio.lora, self.lora_scope)
        session = Session(self.planners, model, processor, lora, **options)
        if self.base is not None:
            self._check_base(self.base, session.adapter.dimensions)
        return session

    @property
    def name(self) -> str:
        """The name of the policy, calibrated or not."""
        return self.planners.policy.name

    def with_ratio(self, ratio: float) -> KVCompressor:
        """The same weights at another ratio."""
        config = {**vars(self.config), "ratio": ratio, "budget": None}
        return KVCompressor(**self._parts(), **config, source=self.source)

    def keep_low_ratio(self, below: float) -> None:
        """Keep a copy of the weights as they are now for ratios below `below`, whatever becomes of these."""
        weights = copy.deepcopy(self.weights)
        self._set_low_ratio(LowRatio(below, None if weights is None else weights.requires_grad_(False)))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, model.safetensors, adapter/ and the model card; see :mod:`acckv.export`."""
        export.save(Export(**self._parts(), config=self.config), Path(folder))

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> KVCompressor:
        """Load an export from a folder or hub id; keyword arguments override its options (such as `ratio`).

        Raises:
            InputError: a file is missing, truncated or of an unknown format version.
        """
        parts = vars(export.load(name, options))
        config = parts.pop("config")
        return cls(**parts, **vars(config), source=str(name)).requires_grad_(False).eval()

    def _parts(self) -> dict[str, Any]:
        """The arguments that make this compressor, but for the options shared by all policies and the source."""
        names = ("policy", "weights", "lora", "lora_scope", "base", "low_ratio", "calibration", "asked")
        return {name: getattr(self, name) for name in names}

    def _planner(self, weights: CalibratedWeights | None) -> Planner:
        return Planner(self.config, self.policy if weights is None else self.policy.calibrated(weights))

    def _set_low_ratio(self, low_ratio: LowRatio) -> None:
        self.low_ratio = low_ratio
        self.low_ratio_weights = low_ratio.weights  # a submodule: saved in a training checkpoint
        self.planners.low_ratio = self._planner(low_ratio.weights)
        self.planners.below = low_ratio.below

    def _check_base(self, base: dict[str, Any], dimensions: dict[str, int]) -> None:
        """A calibrated compressor fits one architecture."""
        for name, size in dimensions.items():
            if base.get(name) != size:
                raise InputError(
                    f"was calibrated for {base.get('name')} with {name} {base.get(name)}; this model has {size}",
                    source=self.source,
                    field=name,
                )
