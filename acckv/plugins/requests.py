"""Requests of an evaluation framework, read from chat messages and generation options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from PIL.Image import Image

from acckv.errors import InputError
from acckv.plugins.media_store import MediaStore


@dataclass(frozen=True)
class ClipRef:
    """A video, sound or picture as a request names it.

    Attributes:
        path: the media file.
        start, end: seconds of it that are meant; None for its own start and end.
    """

    path: Path
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True)
class Prompt:
    """One user turn.

    Attributes:
        media: what it is about, in order: videos, sounds and pictures, read as one clip; empty for text alone.
        text: what follows.
        system: what the model is told before both; None leaves that to its chat template.
    """

    media: tuple[ClipRef, ...]
    text: str
    system: str | None = None


@dataclass(frozen=True)
class Generation:
    """The options that an answer is generated with.

    Attributes:
        max_new_tokens: longest answer.
        do_sample, temperature, top_p, top_k, num_beams: as for `generate`; None is the model's own.
        until: texts that end an answer; they are not part of it.
    """

    max_new_tokens: int = 1024
    do_sample: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    num_beams: int = 1
    until: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_beams"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{value!r} is not a whole number of at least 1", field=f"gen_kwargs: {name}")

    @classmethod
    def read(cls, options: Mapping[str, Any]) -> tuple[Generation, set[str]]:
        """The options of a task, and the names of those that mean nothing here.

        A temperature of 0 is greedy search. A temperature above 0 samples, unless `do_sample` says no.
        """
        known = {item.name for item in fields(cls)}
        given = {name: value for name, value in options.items() if name in known and value is not None}
        temperature = given.get("temperature")
        given["do_sample"] = bool(given.get("do_sample", temperature is not None)) and temperature != 0
        until = given.get("until", ())
        until = (until,) if isinstance(until, str) else tuple(until)
        given["until"] = tuple(text for text in until if text)
        return cls(**given), set(options) - known

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `generate`."""
        named = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        if self.do_sample:
            named = {name: value for name, value in named.items() if value is not None}
        else:  # greedy and beam search warn of every option of sampling that is set
            named = dict.fromkeys(named)
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": self.do_sample,
            "num_beams": self.num_beams,
            **named,
        }

    def cut(self, text: str) -> str:
        """An answer up to the first of the texts that end it, without blanks around."""
        text = text.strip()
        return text[: min((text.index(stop) for stop in self.until if stop in text), default=None)].rstrip()


def read_prompt(messages: Sequence[Mapping[str, Any]], source: str, store: MediaStore) -> Prompt:
    """The prompt of a conversation of chat messages.

    Args:
        messages: `{"role": "user", "content": [{"type": "video", "url": ...}, {"type": "text", "text": ...}]}`; parts
            of type image and audio are taken too.
        source: of the messages, for error messages: a task's name.
        store: takes what is no file.

    Raises:
        InputError: anything but one user turn of media and then text, after a system message of text or none.
    """
    roles = [str(message["role"]) for message in messages]
    if roles not in (["user"], ["system", "user"]):
        message = f"one user turn is served, after a system message or none, not the turns {', '.join(roles)}"
        raise InputError(message, source=source, field="messages")
    system = None
    if len(messages) == 2:
        told = _parts(messages[0])
        if any(part["type"] != "text" for part in told):
            raise InputError("has media in the system message", source=source, field="messages")
        system = "".join(part["text"] for part in told)
    parts = _parts(messages[-1])
    media: list[ClipRef] = []
    texts: list[str] = []
    for part in parts:
        kind = part["type"]
        if kind == "text":
            texts.append(part["text"])
        elif kind not in ("video", "image", "audio"):
            raise InputError(f"a part of type {kind!r} is not served", source=source, field="messages")
        elif any(texts):
            message = f"has text before a part of type {kind!r}; media must come first"
            raise InputError(message, source=source, field="messages")
        else:
            media.append(_clip_ref(part, source, store))
    return Prompt(tuple(media), "".join(texts), system)


def _parts(message: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _clip_ref(part: Mapping[str, Any], source: str, store: MediaStore) -> ClipRef:
    """A part with media: a path, or a mapping with one and `video_start`, `video_end`, or what a data set decoded."""
    given = part["url"]
    inner = given if isinstance(given, Mapping) else {}
    path: Any = next((inner[name] for name in ("url", "path", "video") if inner.get(name) is not None), given)
    if isinstance(given, Image):
        path = store.picture(given)
    elif "array" in inner:
        path = store.sound(inner["array"], int(inner["sampling_rate"]))
    elif hasattr(given, "get_all_samples"):  # a sound of `datasets`, not decoded yet
        samples = given.get_all_samples()
        path = store.sound(samples.data, int(samples.sample_rate))
    if not isinstance(path, (str, Path)):
        message = f"a part of type {part['type']!r} is given as {type(path).__name__}, not as a path"
        raise InputError(message, source=source, field="messages")
    start, end = part.get("start_time", inner.get("video_start")), part.get("end_time", inner.get("video_end"))
    return ClipRef(
        Path(str(path).removeprefix("file://")),
        None if start is None else float(start),
        None if end is None else float(end),
    )
