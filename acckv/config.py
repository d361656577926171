"""The options that all policies share, and the one check of every option."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal, TypeVar, get_args

from acckv.errors import InputError

T = TypeVar("T")

When = Literal["context", "prompt"]
HeadBudgets = Literal["equal", "joint", "learned"]
LoraScope = Literal["after", "all"]


def option_fields(owner: type) -> dict[str, Field[Any]]:
    """The options of a dataclass by name: its fields that have a default."""
    return {item.name: item for item in fields(owner) if item.init and item.default is not MISSING}


def from_options(owner: type[T], values: Mapping[str, Any], noun: str) -> T:
    """A dataclass of options with values that a user named; one that it does not have is refused.

    Args:
        noun: the owner, in the message.

    Raises:
        InputError: naming the option and the ones that there are.
    """
    known = option_fields(owner)
    for name in values:
        if name not in known:
            raise InputError(f"is no option of {noun}; it has {', '.join(known)}", field=name)
    return owner(**values)


def check_options(owner: Any) -> None:
    """Refuse an option of another type than its default, or out of its bounds.

    A field's metadata may hold `low` and `high`, the bounds of a number, both allowed, and `choices`, the values of a
    string. A default of None stands for an integer that may be left out.

    Raises:
        InputError: naming the option and what it may be.
    """
    for name, item in option_fields(type(owner)).items():
        value = getattr(owner, name)
        expected = _expected(value, item)
        if expected is not None:
            raise InputError(f"{value!r} is not {expected}", field=name)


def _expected(value: Any, item: Field[Any]) -> str | None:
    """The values that an option may have, in words; None where `value` is one of them."""
    default, low, high = item.default, item.metadata.get("low"), item.metadata.get("high")
    if value is None and default is None:
        return None
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "true or false"
    if isinstance(default, str):
        choices = item.metadata.get("choices") or (value,)
        return None if isinstance(value, str) and value in choices else f"one of {', '.join(map(str, choices))}"
    if default is not None and not isinstance(default, (int, float)):
        return None  # of a type that its owner checks
    kinds, noun = ((int, float), "a number") if isinstance(default, float) else ((int,), "an integer")
    is_inside = isinstance(value, kinds) and not isinstance(value, bool)
    is_inside = is_inside and (low is None or value >= low) and (high is None or value <= high)
    if is_inside:
        return None
    if low is not None and high is not None:
        return f"{noun} from {low:g} to {high:g}"
    return noun if low is None else f"{noun} of at least {low:g}"


@dataclass(frozen=True)
class CompressionConfig:
    """When audio and video entries are compressed and how many stay. Text entries always do.

    Raises:
        InputError: an option is out of its range; the message names it.
    """

    ratio: float = field(
        default=0.2,
        metadata={
            "help": "Kept share of the audio and video entries, averaged over layers; 0 to 1.",
            "low": 0,
            "high": 1,
        },
    )
    budget: int | None = field(
        default=None, metadata={"help": "Kept audio and video entries a layer on average; replaces `ratio`.", "low": 0}
    )
    when: When = field(
        default="context",
        metadata={
            "help": "'context': after the media, before any question is seen. 'prompt': after the whole prompt.",
            "choices": get_args(When),
        },
    )
    head_budgets: HeadBudgets = field(
        default="equal",
        metadata={
            "help": "Entries of a layer's KV heads. 'equal': each keeps as many. 'joint': one ranking over all heads. "
            "'learned': as calibrated.",
            "choices": get_args(HeadBudgets),
        },
    )

    def __post_init__(self) -> None:
        check_options(self)


def check_ratio(ratio: float | None) -> None:
    """Refuse a ratio that is given in place of the config's, and is no number from 0 to 1."""
    if ratio is not None and not 0 <= ratio <= 1:
        raise InputError(f"{ratio!r} is not a number from 0 to 1", field="ratio")
