"""What the calibration study compares: the default with one thing changed at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from acckv.weights import WEIGHT_GROUPS

GROUPS = tuple(WEIGHT_GROUPS)


@dataclass(frozen=True)
class Variant:
    """A calibration that differs from the default.

    Attributes:
        name: of its folder; label: in tables; options: of the module that are changed.
    """

    name: str
    label: str
    options: dict[str, Any] = field(default_factory=dict)


def _up_to(group: str, **options: Any) -> dict[str, Any]:
    """Only the weights up to a group learn, and no LoRA."""
    return {"learn": GROUPS[: GROUPS.index(group) + 1], "lora_rank": 0, **options}


def _without(group: str) -> tuple[str, ...]:
    return tuple(name for name in GROUPS if name != group)


MERGING = {"overrides": {"integration": True}}
STUDIES: dict[str, tuple[Variant, ...]] = {
    "default": (Variant("default", "the default"),),
    "ablations": (
        Variant("budgets", "budgets only", _up_to("budgets")),
        Variant("gains", "+ gains", _up_to("gains")),
        Variant("probes", "+ probes", _up_to("probes")),
        Variant("scorer", "+ scorer", _up_to("scorer")),
        Variant("redundancy", "+ competition of neighbours", _up_to("redundancy")),
        Variant("merging", "+ merge weights (merging on)", _up_to("merging", **MERGING)),
        Variant("alignment", "+ alignment (merging on)", _up_to("alignment", **MERGING)),
        Variant("lora_merging", "+ LoRA (merging on)", MERGING),
        Variant("lora", "all, merging off (the default)"),
        Variant("only_scorer", "scorer and probes alone", {"learn": ("probes", "scorer"), "lora_rank": 0}),
        Variant("only_lora", "LoRA alone", {"learn": ()}),
        Variant("no_budgets", "default without learned budgets (focusing)", {"learn": _without("budgets")}),
        Variant("no_gains", "default without gains and redistribution", {"learn": _without("gains")}),
        Variant("no_alignment", "default without cross-calibration", {"learn": _without("alignment")}),
        Variant("no_scorer", "default without the scorer", {"learn": _without("scorer")}),
        Variant("no_redundancy", "default without competition", {"learn": _without("redundancy")}),
    ),
    "scopes": (
        Variant("rank0", "weights only (rank 0)", {"lora_rank": 0}),
        Variant("attention", "LoRA on attention alone", {"lora_targets": ("q_proj", "k_proj", "v_proj", "o_proj")}),
        Variant("all", "LoRA of scope 'all'", {"lora_scope": "all"}),
    ),
    # Where a single ratio could win: from 0.1 on the default is within a point of the full cache itself.
    "ratios": tuple(
        Variant(f"at{ratio:g}", f"trained at {ratio:g} alone", {"ratio_min": ratio, "ratio_max": ratio})
        for ratio in (0.02, 0.05)
    ),
    "losses": (
        Variant("reverse", "reverse KL", {"divergence": "reverse"}),
        Variant("hidden", "KL and hidden states", {"match": "hidden"}),
        Variant("attention_output", "KL and attention outputs", {"match": "attention"}),
    ),
    "selection": (
        Variant("share_heads", "one selection for all KV heads", {"overrides": {"share_heads": True}}),
        Variant("soft", "gates end at 0.04", {"temperature_end": 0.04}),
        Variant("no_probes", "no probe queries", {"learn": _without("probes"), "probe_queries": 0}),
    ),
}
DEFAULT, SHORT = "default", "lora"
"""The default calibration, and the same for as many steps as the other variants."""
TITLES: dict[str, tuple[str, str | None]] = {
    "ablations": ("What each part is worth", None),
    "scopes": ("What LoRA adapts, and what that costs", SHORT),
    "ratios": ("One export for all ratios, or one for each", DEFAULT),
    "selection": ("Selection", SHORT),
    "losses": ("Loss", SHORT),
}
"""Study -> title of its table, and the variant that it is compared with."""
