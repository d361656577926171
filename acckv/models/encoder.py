"""The encoder of a model family: clips and questions into model inputs, most often by a chat template."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jinja2 import TemplateError
from torch import Tensor

from acckv.errors import InputError
from acckv.models.clips import Media


class Encoder(ABC):
    """Makes model inputs with one kind of processor; see the functions of :mod:`acckv.data.encoding`.

    The context comes first and the question after it, so that the tokens of a clip without a question are exactly the
    first ones of the same clip with any question, and the rest is `question_suffix`.

    Attributes:
        processor_types: classes of transformers' processors that it works with.
        clip_type: of the clips that it takes.
    """

    processor_types: ClassVar[tuple[type, ...]]
    clip_type: ClassVar[type] = Media

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    @abstractmethod
    def encode(
        self, clips: Sequence[Any], questions: Sequence[str] | None, system_prompts: Sequence[str | None]
    ) -> dict[str, Any]:
        """Clips with their questions, or up to the end of their media where there are none, after system prompts."""

    @abstractmethod
    def encode_media(self, clip: Any) -> dict[str, Any]:
        """The media of one clip alone."""

    @abstractmethod
    def question_suffix(self, question: str) -> Tensor:
        """Token ids from the question to the start of the answer."""


class ChatEncoder(Encoder):
    """The prompt is the processor's own chat template: one user message with the media, then the question.

    A system prompt is a message before it.
    """

    @abstractmethod
    def content(self, clip: Media | None) -> list[dict[str, str]]:
        """The media parts of the message (of a clip without sound, where it is None)."""

    @abstractmethod
    def markers(self, clip: Media | None) -> list[str]:
        """Tokens that the template writes for these parts, in order: media reach from the first to the last."""

    @abstractmethod
    def process(self, clips: Sequence[Media], texts: list[str]) -> dict[str, Any]:
        """Run the processor over clips that were checked and prompts that were written."""

    def check(self, clip: Media) -> None:
        """Refuse what the processor would cut or misread.

        Raises:
            InputError: it names the file.
        """
        wanted = self.processor.feature_extractor.sampling_rate
        if clip.audio is not None and clip.sampling_rate != wanted:
            message = f"sound was read at {clip.sampling_rate} Hz, the processor needs {wanted}"
            raise InputError(message, source=clip.path)

    def encode(
        self, clips: Sequence[Media], questions: Sequence[str] | None, system_prompts: Sequence[str | None]
    ) -> dict[str, Any]:
        for clip in clips:
            if clip.kind != clips[0].kind:
                missing = "pictures" if "audio" in (clip.kind, clips[0].kind) else "a sound track"
                raise InputError(f"clips with and without {missing} cannot share a batch", source=clip.path)
            self.check(clip)
        texts = []
        endings = [""] * len(clips) if questions is None else questions
        for question, clip, system in zip(endings, clips, system_prompts, strict=True):
            text, _, stop = self._prompt(question, clip, system)
            texts.append(text[:stop] if questions is None else text)
        return self.process(clips, texts)

    def encode_media(self, clip: Media) -> dict[str, Any]:
        self.check(clip)
        text, start, stop = self._prompt("", clip)
        return self.process([clip], [text[start:stop]])

    def question_suffix(self, question: str) -> Tensor:
        text, _, stop = self._prompt(question, None)
        ids = self.processor.tokenizer(text[stop:], add_special_tokens=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.long)

    def _prompt(self, question: str, clip: Media | None, system: str | None = None) -> tuple[str, int, int]:
        """A prompt, and the indices of the characters where its media start and stop.

        Raises:
            InputError: the template has no place for the media, or none before them for the system prompt.
        """
        messages = [{"role": "user", "content": [*self.content(clip), {"type": "text", "text": question}]}]
        if system is None:
            text = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            return text, *self._media_span(text, clip)
        marker = next((marker for marker in self.markers(clip) if marker in system), None)
        if marker is not None:
            raise InputError(f"holds {marker}, which stands for media", field="system_prompt")
        plain, _, plain_stop = self._prompt(question, clip)
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
        try:
            text = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except (TemplateError, ValueError, TypeError) as error:
            message = f"the model's chat template takes none ({error}); leave it out"
            raise InputError(message, field="system_prompt") from error
        start, stop = self._media_span(text, clip)
        if system.strip() not in text[:start] or text[stop:] != plain[plain_stop:]:
            message = "the model's chat template does not write it before the media; leave it out"
            raise InputError(message, field="system_prompt")
        return text, start, stop

    def _media_span(self, text: str, clip: Media | None) -> tuple[int, int]:
        """Indices of the characters where the media of a prompt start and stop."""
        starts, stop = [], 0
        for marker in self.markers(clip):
            starts.append(text.find(marker, stop))
            if starts[-1] < 0:
                raise InputError(f"the chat template has no {marker} for a clip", field="chat_template")
            stop = starts[-1] + len(marker)
        return starts[0], stop
