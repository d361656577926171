"""What a session adds to a prefill, told apart from the decoder's own work."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from acckv.cache.layer import CompressedLayer


class PrefillWatch:
    """Time inside the decoder's own work and the most bytes that keys and values took, in one compressed prefill."""

    def __init__(self) -> None:
        self.ours, self.own, self.peak = 0.0, 0.0, 0

    @contextmanager
    def watching(self, session: Any) -> Iterator[None]:
        """The decoder's own work is its plain forward without the listener that is called in it."""
        dispatcher, update = session.dispatcher, CompressedLayer.update
        decode, evicting = dispatcher.hooks.decode, dispatcher._eviction
        own = 0.0

        def forward(original: Callable[..., Any], *rest: Any) -> Any:
            def timed(**inner: Any) -> Any:
                nonlocal own
                start = time.process_time()
                try:
                    return original(**inner)
                finally:
                    own += time.process_time() - start

            return decode(timed, *rest)

        def eviction(*arguments: Any) -> Any:
            listener, probe = evicting(*arguments)
            if listener is None:
                return listener, probe

            def listen(*seen: Any) -> None:
                nonlocal own
                start = time.process_time()
                listener(*seen)
                own -= time.process_time() - start

            listen.finish = listener.finish  # type: ignore[attr-defined]
            return listen, probe

        def updated(layer: CompressedLayer, *arguments: Any, **options: Any) -> Any:
            held = update(layer, *arguments, **options)
            # A layer's entries all have the size of the one that was just written.
            per_entry = 2 * layer.keys[:, :, :1].numel() * layer.keys.element_size()
            self.peak = max(self.peak, per_entry * sum(layer.lengths))
            return held

        dispatcher.hooks.decode, dispatcher._eviction = forward, eviction
        CompressedLayer.update = updated  # type: ignore[method-assign, assignment]
        start = time.process_time()
        try:
            yield
        finally:
            self.ours = time.process_time() - start - own
            self.own = own
            dispatcher.hooks.decode, dispatcher._eviction = decode, evicting
            CompressedLayer.update = update  # type: ignore[method-assign]
