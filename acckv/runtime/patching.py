"""Methods put in place of a model's own and taken off again, and a mark that it is in use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, NoReturn

from acckv.errors import InputError

#: name of the mark among a decoder's instance attributes
MARK = "_acckv_session"


class _Mark:
    """Makes what carries it refuse to be copied: a copy would call the methods of the model that it was made from."""

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise InputError(
            "is in an open session and cannot be copied or pickled; do that before the session or after it",
            field="model",
        )


@contextmanager
def in_use(decoder: Any) -> Iterator[None]:
    """Mark a decoder while the context is open.

    Raises:
        InputError: it is marked already, by another session or by the same one.
    """
    mark = _Mark()
    if vars(decoder).setdefault(MARK, mark) is not mark:  # in one step: sessions may open in several threads
        raise InputError("is in an open session already; close that first, or go on with it", field="model")
    try:
        yield
    finally:
        delattr(decoder, MARK)


@contextmanager
def patch_method(owner: Any, name: str, replacement: Callable[..., Any]) -> Iterator[None]:
    """Hide a method behind ``replacement(original, ...)`` by an instance attribute while the context is open.

    What others put over it in the meantime stays; it may go on calling the replacement after the context.
    """
    own = vars(owner).get(name)
    original = getattr(owner, name)

    @wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return replacement(original, *args, **kwargs)

    setattr(owner, name, call)
    try:
        yield
    finally:
        if vars(owner).get(name) is not call:
            pass
        elif own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)
