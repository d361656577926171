"""Every option of a compression, validated once."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from acckv.errors import InputError

When = Literal["context", "prompt"]
PolicyName = Literal[
    "full",
    "random",
    "streaming_llm",
    "h2o",
    "snapkv",
    "pyramidkv",
    "look_m",
    "fastv",
    "madakv",
    "knorm",
    "keydiff",
    "expected_attention",
    "kvzip",
    "acckv",
]
Signal = Literal["attention", "key_diversity"]
LoraScope = Literal["after", "all"]


@dataclass(frozen=True)
class CompressionConfig:
    """How the audio and video entries of a KV cache are compressed. Text entries are always kept.

    The defaults are the paper's AccKV (preset ``paper``); docs/method.md writes the steps out.

    Raises:
        InputError: an option is out of its range; the message names it.
    """

    policy: PolicyName = field(default="acckv", metadata={"help": "Which method scores the entries."})
    when: When = field(
        default="context",
        metadata={"help": "'context': after the media, before any question is seen. 'prompt': after the whole prompt."},
    )
    ratio: float = field(
        default=0.2, metadata={"help": "Kept share of the audio and video entries, averaged over layers; 0 to 1."}
    )
    budget: int | None = field(
        default=None, metadata={"help": "Kept audio and video entries a layer on average; replaces `ratio`."}
    )
    signal: Signal = field(
        default="attention",
        metadata={"help": "AccKV's heavy-hitter signal: 'attention' of the observed rows or 'key_diversity'."},
    )
    redistribution: bool = field(
        default=True, metadata={"help": "AccKV step 1: undo the bias of causal attention to early columns."}
    )
    focusing: bool = field(
        default=True, metadata={"help": "AccKV step 2: split a layer's budget by the attention each modality gets."}
    )
    integration: bool = field(
        default=True, metadata={"help": "AccKV step 3: average what a modality loses into one merged entry."}
    )
    cross_calibration: bool = field(
        default=True, metadata={"help": "AccKV step 4: drop low-priority entries that match no kept key."}
    )
    alignment_threshold: float = field(
        default=0.6, metadata={"help": "AccKV step 4: least mean cosine similarity (paper: 0.9 or 0.6)."}
    )
    share_heads: bool = field(default=False, metadata={"help": "Keep the same tokens in all KV heads of a layer."})
    window: int = field(
        default=32, metadata={"help": "SnapKV, PyramidKV, MadaKV: observed rows at the end of what was prefilled."}
    )
    kernel: int = field(
        default=5, metadata={"help": "SnapKV, PyramidKV: width of the max-pooling over scores; odd, in entries."}
    )
    sinks: int = field(
        default=4, metadata={"help": "StreamingLLM: first audio and video entries that are always kept."}
    )
    steepness: float = field(
        default=20.0, metadata={"help": "PyramidKV: the average layer's budget over the last layer's; 1 to 1000."}
    )
    dense_layers: int = field(
        default=2, metadata={"help": "FastV: first layers that are not pruned; the last of them ranks the entries."}
    )
    coverage: float = field(
        default=0.9, metadata={"help": "MadaKV: share of a modality's attention that a layer asks for; 0 to 1."}
    )
    horizon: int = field(
        default=512, metadata={"help": "Expected attention: positions to come that the queries are averaged over."}
    )
    layer_floor: float = field(
        default=0.1, metadata={"help": "Least share of the uniform budget that a learned layer budget leaves; 0 to 1."}
    )
    probe_queries: int = field(
        default=4, metadata={"help": "Learned probe queries a query head (calibrated compressors only); 0 to 16."}
    )
    neighbours: int = field(
        default=8,
        metadata={
            "help": "Entries on either side that a learned score competes with (calibrated compressors only); 0 to 64."
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of the random policy."})

    def __post_init__(self) -> None:
        for name, choices in (("policy", PolicyName), ("when", When), ("signal", Signal)):
            value = getattr(self, name)
            if value not in get_args(choices):
                raise InputError(f"{value!r} is not one of {', '.join(get_args(choices))}", field=name)
        for name, low, high in (
            ("ratio", 0.0, 1.0),
            ("alignment_threshold", -1.0, 1.0),
            ("steepness", 1.0, 1000.0),
            ("coverage", 0.0, 1.0),
            ("layer_floor", 0.0, 1.0),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise InputError(f"{value!r} is not a number from {low:g} to {high:g}", field=name)
        for name, least, most in (
            ("window", 1, None),
            ("kernel", 1, None),
            ("sinks", 0, None),
            ("dense_layers", 1, None),
            ("horizon", 1, None),
            ("probe_queries", 0, 16),
            ("neighbours", 0, 64),
            ("seed", 0, None),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least or (most and value > most):
                bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
                raise InputError(f"{value!r} is not an integer {bounds}", field=name)
        if self.kernel % 2 == 0:
            raise InputError(f"{self.kernel} is even; the pooling window needs a middle", field="kernel")
        if self.budget is not None and (not isinstance(self.budget, int) or self.budget < 0):
            raise InputError(f"{self.budget!r} is not a number of entries", field="budget")
        for item in fields(self):
            if isinstance(item.default, bool) and not isinstance(getattr(self, item.name), bool):
                raise InputError(f"{getattr(self, item.name)!r} is not true or false", field=item.name)

    @classmethod
    def preset(cls, name: str, **options: Any) -> CompressionConfig:
        """The options of a named preset; keyword arguments override it.

        ``paper`` is AccKV as published. ``context`` is its variant for compression before the question: key
        diversity as heavy-hitter signal, since no question row exists yet, no split by attention and no merging.
        """
        presets: dict[str, dict[str, Any]] = {
            "paper": {},
            "context": {
                "signal": "key_diversity",
                "focusing": False,
                "integration": False,
                "cross_calibration": False,
            },
        }
        if name not in presets:
            raise InputError(f"{name!r} is not one of {', '.join(presets)}", field="preset")
        return cls(**{**presets[name], **options})

    @property
    def observes_attention(self) -> bool:
        """Whether AccKV needs the attention of observed rows (a probe prompt in `when: context`)."""
        return self.policy == "acckv" and (self.signal == "attention" or self.focusing)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str | Path | None = None) -> CompressionConfig:
        """The config of a parsed JSON object; unknown and ill-valued fields are an InputError naming `source`."""
        known = {item.name for item in fields(cls)}
        for name in values:
            if name not in known:
                raise InputError("is no option of a compression", source=source, field=name)
        try:
            return cls(**values)
        except InputError as error:
            raise InputError(str(error), source=source) from error


def check_ratio(ratio: float | None) -> None:
    """Refuse a ratio that is given in place of the config's, and is no number from 0 to 1."""
    if ratio is not None and not 0 <= ratio <= 1:
        raise InputError(f"{ratio!r} is not a number from 0 to 1", field="ratio")
