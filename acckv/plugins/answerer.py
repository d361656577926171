"""Answers to prompts from compressed caches; questions about one clip that follow one another share its cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import yaml
from jinja2 import TemplateError
from torch import Tensor

from acckv import KVCompressor
from acckv.cache.cache import CompressedCache
from acckv.data.encoding import encode, encode_context, question_suffix
from acckv.data.media import join_media, read_media
from acckv.data.media_options import MediaOptions
from acckv.errors import InputError
from acckv.evaluation.answering import Generated, answer_questions, decode
from acckv.evaluation.sizes import Sizes
from acckv.models.batching import pad_left
from acckv.models.clips import Media
from acckv.plugins.requests import ClipRef, Generation
from acckv.policies import Policy, make_policy
from acckv.runtime.logits import chosen_logits
from acckv.runtime.session import Session

Clip = tuple[ClipRef, ...]
"""The media of a question, read as one clip."""


def named_policy(given: str | Mapping[str, Any]) -> Policy:
    """The policy that a command line names: `snapkv`, or `{class_path: snapkv, init_args: {window_size: 64}}`.

    Raises:
        InputError: an unknown policy or option, or a text that is no YAML.
    """
    if isinstance(given, str) and given.lstrip().startswith("{"):
        try:
            return make_policy(yaml.safe_load(given))
        except yaml.YAMLError as error:
            raise InputError(f"{given!r} is no YAML", field="policy") from error
    return make_policy(given)


def build_compressor(
    export: str | None = None, policy: str | Mapping[str, Any] | None = None, *, seed: int = 0, **options: Any
) -> KVCompressor:
    """The compressor that a command line names: an export, a training-free policy, or none (the full cache).

    Args:
        export: folder or hub id of an export of `train.py`.
        policy: a training-free policy instead, as for `named_policy`.
        seed: of the random policy.
        options: of :class:`KVCompressor`, such as `ratio`, `budget` and `when`; None is not given.

    Raises:
        InputError: both, a ratio of neither, or a bad option.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if export is not None and policy is not None:
        raise InputError("leave it out: the compressor's export has a policy of its own", field="policy")
    if export is not None:
        return KVCompressor.from_pretrained(export, **given)
    if policy is None and given.keys() - {"when"}:
        name = next(name for name in given if name != "when")
        raise InputError("needs a compressor=FOLDER or a policy=NAME to go with", field=name)
    return KVCompressor(named_policy(policy or "full").seeded(seed), **given)


class Answerer:
    """A model with its compressed caches.

    Args:
        model, processor: of a supported family.
        compressor: what is kept.
        media: how much of a clip is read.
        sound: False leaves the sound tracks out.

    Attributes:
        sizes: of all caches that were made.
        cut: answers that `max_new_tokens` ended.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        compressor: KVCompressor,
        *,
        media: MediaOptions | None = None,
        sound: bool = True,
    ) -> None:
        self.model, self.processor, self.compressor = model, processor, compressor
        self.media, self.sound = media or MediaOptions(), sound
        self.sizes = Sizes()
        self.cut = 0
        self._media: tuple[Clip, Media] | None = None
        self._cache: tuple[Clip, str | None, CompressedCache] | None = None

    def answer(
        self, clip: Clip, questions: Sequence[str], generation: Generation, system: str | None = None
    ) -> list[str]:
        """The answers to questions about one clip (empty: about nothing), in one batch where that can be.

        With `when: context` the clip is prefilled and compressed once. With `when: prompt` it is prefilled with each
        question.

        Raises:
            InputError: the clip cannot be read.
        """
        if not clip:
            answers = [self._generate(self._text_inputs(question, system), generation) for question in questions]
        elif self._once:
            with self._session() as session:
                cache, options = self._context(session, clip, system), generation.options()
                (answers,) = answer_questions(session, self.processor, cache, [questions], **options)
        else:
            with self._session() as session:
                answers = []
                for question in questions:
                    inputs = session.adapter.placed(self._prompt(clip, question, system))
                    answers.append(self._generate(inputs, generation))
                    if session.last_cache is not None:  # a compressor that keeps all makes none
                        self.sizes += Sizes.of(session.last_cache)
        self.cut += sum(answer.cut for answer in answers)
        return [generation.cut(answer.text) for answer in answers]

    @torch.no_grad()
    def losses(
        self, clip: Clip, question: str, answers: Sequence[str], system: str | None = None
    ) -> list[tuple[float, bool]]:
        """The fit of given answers to the compressed cache's predictions.

        Returns:
            for each answer its mean negative log-likelihood a token, and whether greedy search would give it.

        Raises:
            InputError: an answer has no token, or the clip cannot be read.
        """
        targets = [self._answer_ids(answer) for answer in answers]
        if not clip:
            inputs = self._text_inputs(question, system)
            logits = [self._text_logits(inputs["input_ids"], ids) for ids in targets]
        else:
            with self._session() as session:
                logits = self._logits(session, clip, question, targets, system)
        return [_loss(rows[-len(ids) - 1 : -1], ids) for rows, ids in zip(logits, targets, strict=True)]

    # ------------------------------------------------------------------ inside

    @property
    def _once(self) -> bool:
        """Whether one cache serves every question about a clip."""
        return self.compressor.config.when == "context"

    def _session(self) -> Session:
        return self.compressor(self.model, self.processor)

    def _logits(
        self, session: Session, clip: Clip, question: str, targets: list[Tensor], system: str | None
    ) -> list[Tensor]:
        """For each target ``[tokens, vocabulary]`` from at least the token before it to its last."""
        if self._once:
            cache, first = self._context(session, clip, system), None
            before = question_suffix(self.processor, question).to(self.model.device)
            rows = [torch.cat([before, ids]) for ids in targets]
        else:
            prefill = session.prefill(**self._prompt(clip, question, system))
            cache, first, rows = session.compress(prefill), prefill.logits, targets
            self.sizes += Sizes.of(cache)
        ids, mask = (each.to(self.model.device) for each in pad_left(rows, self.processor.tokenizer.pad_token_id))
        branch = cache.branch(len(rows))
        positions = session.adapter.text_positions(branch.next_position + (mask.cumsum(-1) - 1).clamp_min(0))
        seen = torch.cat([branch.labels.real.to(mask.dtype), mask], dim=1)
        logits = self.model(
            input_ids=ids, attention_mask=seen, position_ids=positions, cache=branch, use_cache=True
        ).logits
        own = [each[-len(row) :] for each, row in zip(logits, rows, strict=True)]
        return own if first is None else [torch.cat([first, each]) for each in own]

    def _text_logits(self, before: Tensor, ids: Tensor) -> Tensor:
        """``[tokens, vocabulary]`` from the token before `ids` to their last, without any clip."""
        run = partial(self.model, input_ids=torch.cat([before, ids[None]], dim=1))
        return chosen_logits(self.model, lambda hidden: hidden[:, -len(ids) - 1 :], run)[0]

    def _context(self, session: Session, clip: Clip, system: str | None) -> CompressedCache:
        """The compressed cache of a clip after a system prompt; the last one is kept."""
        if self._cache is None or self._cache[:2] != (clip, system):
            inputs = encode_context(self.processor, self._read(clip), system)
            self._cache = clip, system, session.compress(**inputs)
            self.sizes += Sizes.of(self._cache[2])
        return self._cache[2]

    def _prompt(self, clip: Clip, question: str, system: str | None) -> dict[str, Any]:
        if self._media is None or self._media[0] != clip:
            self._media = clip, self._read(clip)
        return encode(self.processor, [self._media[1]], [question], system)

    def _read(self, clip: Clip) -> Media:
        parts = self._parts(clip)
        rates = {part.fps for part in parts}
        if len(rates) > 1:  # `max_frames` slowed one of them down
            parts = self._parts(clip, fps=min(rates))
        if not self.sound:
            parts = [part if part.frames is None else replace(part, audio=None) for part in parts]
        return join_media(parts)

    def _parts(self, clip: Clip, **changes: Any) -> list[Media]:
        options = {**self.media.limits(), **changes}
        return [read_media(part.path, start=part.start, end=part.end, **options) for part in clip]

    def _text_inputs(self, question: str, system: str | None) -> dict[str, Any]:
        """Model inputs of a prompt without media."""
        told = [] if system is None else [{"role": "system", "content": [{"type": "text", "text": system}]}]
        conversation = [*told, {"role": "user", "content": [{"type": "text", "text": question}]}]
        try:
            text = self.processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        except (TemplateError, ValueError, TypeError) as error:
            raise InputError(f"the model's chat template takes none ({error})", field="system_prompt") from error
        if system is not None and system.strip() not in text:
            raise InputError("the model's chat template does not write it; leave it out", field="system_prompt")
        ids = self.processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        ids = ids.to(self.model.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def _generate(self, inputs: dict[str, Any], generation: Generation) -> Generated:
        """The answer to one prompt."""
        options = {**generation.options(), "pad_token_id": self.processor.tokenizer.pad_token_id}
        new = self.model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
        return decode(self.model, self.processor, new, generation.max_new_tokens)[0]

    def _answer_ids(self, answer: str) -> Tensor:
        ids = self.processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
        if not ids:
            raise InputError(f"the answer {answer!r} has no token in this vocabulary", field="continuation")
        return torch.tensor(ids, device=self.model.device)


def _loss(logits: Tensor, ids: Tensor) -> tuple[float, bool]:
    """Of logits ``[tokens, vocabulary]``, each made before its token of `ids` ``[tokens]``."""
    loss = torch.nn.functional.cross_entropy(logits.float(), ids)
    return float(loss), bool((logits.argmax(-1) == ids).all())
