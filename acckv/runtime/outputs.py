"""The decoder's output for a prompt that was run in windows, put together as if it had been run at once."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from acckv.errors import InputError
from acckv.models.batching import is_full_window, scatter_columns

#: outputs that come by layer, with one row a token
RECORDS = ("hidden_states", "router_logits")
#: names of the cache among the outputs: the same object after every window
CACHES = ("cache", "past_key_values")


def wants_records(arguments: dict[str, Any], config: Any) -> bool:
    """Whether a forward with these arguments gives out what every layer makes of every token."""
    flags = [f"output_{name}" for name in RECORDS]
    return any(bool(arguments.get(flag, getattr(config, flag, False))) for flag in flags)


def join_outputs(runs: list[tuple[Tensor, Any]], last: Any, length: int) -> Any:
    """The output of the last window, with the tokens of all windows in their columns.

    Args:
        runs: (window, the decoder's output, which may go on with tokens of a probe prompt).
        last: the last window's output, whether or not it is among them.
        length: of the prompt.

    Returns:
        `last`: last_hidden_state ``[batch, length, hidden]``, and of each layer, where they were asked for,
        hidden_states of that shape and router_logits ``[batch * length, experts]``; zero where no window reaches.

    Raises:
        InputError: there are attentions, whose columns are other entries in every layer.
    """
    columns, only = runs[0]
    is_whole = only is last and last.last_hidden_state.shape[-2] == length
    if len(runs) == 1 and is_whole and is_full_window(columns, length):
        return last
    for name in list(last):
        value = last[name]
        if name in CACHES or value is None or (isinstance(value, tuple) and not value):
            continue
        if name == "last_hidden_state":
            last[name] = _joined([(window, output[name]) for window, output in runs], length)
        elif name in RECORDS:
            layers = zip(*(output[name] for _, output in runs), strict=True)
            windows = [window for window, _ in runs]
            last[name] = tuple(_joined(list(zip(windows, parts, strict=True)), length) for parts in layers)
        else:
            raise InputError(
                "cannot be given for a prompt that is compressed in between: each of its layers holds other entries; "
                "leave it off, or compress when='prompt'",
                field=f"output_{name}",
            )
    return last


def _joined(parts: list[tuple[Tensor, Tensor | None]], length: int) -> Tensor | None:
    """Rows of one layer in their columns; None for a layer that was not asked for."""
    found: list[tuple[Tensor, Tensor]] = []
    flat = False
    for window, states in parts:
        if states is None:
            return None
        flat = states.ndim == 2  # batch and tokens are one dimension
        rows = states.unflatten(0, (window.shape[0], -1)) if flat else states
        found.append((window, rows[..., : window.shape[1], :]))
    joined = scatter_columns(found, length)
    return joined.flatten(0, 1) if flat else joined
