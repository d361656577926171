"""What the calibration study compares: the default with one thing changed at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from acckv.method.weights import WEIGHT_GROUPS

#: Groups of weights in the order in which the ablations add them; places came last and have lines of their own.
GROUPS = tuple(name for name in WEIGHT_GROUPS if name != "positions")


#: Variants that others are compared with: the default; for as many steps as most others; and by KL alone, with a scorer
#: that sees no places, which is what most short trainings change one thing of.
DEFAULT, SHORT, KL_ALONE = "default", "short", "lora"


@dataclass(frozen=True)
class Variant:
    """A calibration that differs from the default.

    Attributes:
        name: of its folder; label: in tables; options: of the module that are changed.
        steps: of training; None for those of the config.
    """

    name: str
    label: str
    options: dict[str, Any] = field(default_factory=dict)
    steps: int | None = None


def _plain(name: str, label: str, steps: int | None = None, **options: Any) -> Variant:
    """Calibrated by KL alone, with a scorer that sees no places."""
    return Variant(name, label, {"feature_loss": None, "trainable": GROUPS, **options}, steps)


def _up_to(group: str) -> dict[str, Any]:
    """Only the weights up to a group learn, and no LoRA."""
    return {"trainable": GROUPS[: GROUPS.index(group) + 1], "lora_rank": 0}


def _at(ratio: float) -> dict[str, Any]:
    """One ratio alone is drawn, besides the full cache."""
    return ONE_STAGE | {"ratio_min": ratio, "ratio_max": ratio}


def _without(group: str) -> tuple[str, ...]:
    return tuple(name for name in GROUPS if name != group)


MERGING: dict[str, Any] = {"compression": {"integration": True}}
ONE_STAGE: dict[str, Any] = {"low_ratio_share": 0.0}
EVERY_RATIO: dict[str, Any] = ONE_STAGE | {"feature_loss": "attention", "feature_loss_min_ratio": 0.0}
#: Steps of the trainings at full length that were compared before the default had two stages.
THIRD = 3200
STUDIES: dict[str, tuple[Variant, ...]] = {
    "default": (Variant("default", "the default"),),
    "ablations": (
        _plain("budgets", "budgets only", **_up_to("budgets")),
        _plain("gains", "+ gains", **_up_to("gains")),
        _plain("probes", "+ probes", **_up_to("probes")),
        _plain("scorer", "+ scorer", **_up_to("scorer")),
        _plain("redundancy", "+ competition of neighbours", **_up_to("redundancy")),
        _plain("merging", "+ merge weights (merging on)", **_up_to("merging"), **MERGING),
        _plain("alignment", "+ alignment (merging on)", **_up_to("alignment"), **MERGING),
        _plain("lora_merging", "+ LoRA (merging on)", **MERGING),
        _plain(KL_ALONE, "all, merging off"),
        Variant("positions", "all, merging off, + positions", {"feature_loss": None}),
        Variant(SHORT, "all, merging off, + positions, + attention outputs (the default)"),
        _plain("only_scorer", "scorer and probes alone", trainable=("probes", "scorer"), lora_rank=0),
        _plain("only_lora", "LoRA alone", trainable=()),
        _plain("no_budgets", "all without learned budgets (focusing)", trainable=_without("budgets")),
        _plain("no_gains", "all without gains and redistribution", trainable=_without("gains")),
        _plain("no_alignment", "all without cross-calibration", trainable=_without("alignment")),
        _plain("no_scorer", "all without the scorer", trainable=_without("scorer")),
        _plain("no_redundancy", "all without competition", trainable=_without("redundancy")),
    ),
    "scopes": (
        _plain("rank0", "weights only (rank 0)", lora_rank=0),
        _plain("attention", "LoRA on attention alone", lora_targets=("q_proj", "k_proj", "v_proj", "o_proj")),
        _plain("all", "LoRA of scope 'all'", lora_scope="all", **ONE_STAGE),
    ),
    # Where a single ratio could win: from 0.1 on the default is within a point of the full cache itself.
    "ratios": (
        Variant("one_stage", "all ratios from the start", ONE_STAGE),
        *(Variant(f"only{ratio:g}", f"trained at {ratio:g} alone", _at(ratio)) for ratio in (0.05, 0.02)),
    ),
    "length": (
        Variant("one_stage_third", f"all ratios from the start, {THIRD:,} steps", ONE_STAGE, THIRD),
        _plain("kl_long", "by KL alone, no places", **ONE_STAGE, steps=THIRD),
        _plain("attention_long", "attention outputs at every ratio, no places", **EVERY_RATIO, steps=THIRD),
        Variant("places_long", "attention outputs at every ratio, places", EVERY_RATIO, THIRD),
        *(
            Variant(f"only{ratio:g}_third", f"trained at {ratio:g} alone, {THIRD:,} steps", _at(ratio), THIRD)
            for ratio in (0.05, 0.02)
        ),
        _plain("at0.02", "trained at 0.02 alone, by KL, no places", **_at(0.02), steps=THIRD),
    ),
    "losses": (
        _plain("reverse", "reverse KL", divergence="reverse"),
        _plain("hidden", "KL and hidden states, at every ratio", feature_loss="hidden", feature_loss_min_ratio=0.0),
        _plain(
            "attention_output",
            "KL and attention outputs, at every ratio",
            feature_loss="attention",
            feature_loss_min_ratio=0.0,
        ),
        _plain("attention_from", "KL and attention outputs, from 0.05 on", feature_loss="attention"),
    ),
    "selection": (
        _plain("share_heads", "one selection for all KV heads", compression={"share_heads": True}),
        _plain("soft", "gates end at 0.04", temperature_end=0.04),
        _plain("no_probes", "no probe queries", trainable=_without("probes"), compression={"n_probe_queries": 0}),
    ),
}
TITLES: dict[str, tuple[str, tuple[str, ...]]] = {
    "ablations": ("What each part is worth", ()),
    "scopes": ("What LoRA adapts, and what that costs", (SHORT, KL_ALONE)),
    "ratios": ("One export for all ratios, or one for each", (DEFAULT,)),
    "length": ("With a third of the steps: places, attention outputs, one ratio alone", ()),
    "selection": ("Selection", (KL_ALONE,)),
    "losses": ("Loss", (KL_ALONE,)),
}
"""Study -> title of its table, and the variants that it is compared with."""
