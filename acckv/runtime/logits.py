"""Logits of some positions: a vocabulary is long, and what nobody reads of it is not made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

#: Hidden states ``[batch, tokens, hidden]`` -> those whose logits are wanted, ``[rows, wanted, hidden]``
Choose = Callable[[Tensor], Tensor]


def chosen_logits(model: Any, choose: Choose, call: Callable[[], Any]) -> Tensor:
    """Logits of chosen positions, ``[rows, wanted, vocabulary]``.

    Not every family takes `logits_to_keep`, and none takes positions by row; but each has a head that is applied to
    hidden states, and what it does to logits afterwards it does to each by itself.

    Args:
        model: whose head it is; call: runs the model's forward and gives its output.
    """
    head: Any = model.get_output_embeddings()
    applied = False

    def before(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        nonlocal applied
        if not args:
            return None
        applied = True
        return choose(args[0]), *args[1:]

    handle = None if head is None else head.register_forward_pre_hook(before)
    try:
        logits = call().logits
    finally:
        if handle is not None:
            handle.remove()
    return logits if applied else choose(logits)


def last_position(hidden: Tensor) -> Tensor:
    """The last position of each row."""
    return hidden[:, -1:]


def at_index(index: Tensor) -> Choose:
    """Chooses by index into the positions of all rows behind one another (int64 ``[wanted]``), as one row."""
    return lambda hidden: hidden.flatten(0, 1).index_select(0, index.to(hidden.device))[None]
