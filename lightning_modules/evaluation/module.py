"""The same questions answered from every compressed cache, on Lightning's test loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, groupby
from typing import Any

from lightning import LightningModule

from acckv import KVCompressor
from acckv.benchmarks.judging import Judge
from acckv.data.encoding import encode
from acckv.data.records import Record
from acckv.errors import InputError
from acckv.evaluation.answering import Generated, PaddedQuestions, answer_prompts, answer_questions
from acckv.evaluation.journal import Batch
from acckv.evaluation.results import FULL, Answer, Setting
from acckv.evaluation.sizes import Sizes
from acckv.models.clips import KINDS
from acckv.runtime.session import Prefill, Session
from lightning_modules.evaluation.datamodule import Clip, ClipBatch

Asked = list[tuple[Clip, Record]]
Answered = Iterator[tuple[Asked, Setting, list[Generated], Sizes]]
"""Of each prefill and setting: the questions, the answers to them, and the sizes of the cache."""


@dataclass(frozen=True)
class Asking:
    """The text that a model reads for a question, and its longest answer by protocol, in tokens."""

    prompt: Callable[[Record], str]
    max_new_tokens: dict[str, int]


class EvaluationModule(LightningModule):
    """Every policy at every ratio on the same questions; one prefill serves them all.

    With `when: context` a batch of clips is prefilled once, and each setting answers all questions of the batch from
    its own compressed copy. With `when: prompt` a prompt holds its question, so there is a prefill a question.

    Args:
        model: the AV-LLM, its own full cache being the reference.
        processor: of the model.
        compressors: of each setting; the first is the full cache, which the others are compared with.
        asking: the way the model is asked; judge: of its answers.
        strict: a clip that cannot be read is an error; otherwise its questions are not asked.
        on_answers: called with a setting, its answers to the questions of a prefill, and the sizes of its cache.
        on_batch: called with each finished batch.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        compressors: Mapping[Setting, KVCompressor],
        asking: Asking,
        judge: Judge,
        *,
        strict: bool = False,
        on_answers: Callable[[Setting, list[Answer], Sizes], None] = lambda setting, answers, sizes: None,
        on_batch: Callable[[Batch], None] = lambda batch: None,
    ) -> None:
        super().__init__()
        first = next(iter(compressors))
        if first.policy != FULL:
            raise ValueError("the first of the settings must be the full cache")
        self.model, self.processor, self.compressors = model, processor, dict(compressors)
        self.full = compressors[first]
        self.asking, self.judge, self.strict = asking, judge, strict
        self.on_answers, self.on_batch = on_answers, on_batch
        self.allow_zero_length_dataloader_with_multiple_devices = True

    @property
    def when(self) -> str:
        """The moment of compression: "context" or "prompt"."""
        return self.full.config.when

    def test_step(self, batch: ClipBatch, batch_idx: int) -> None:
        """Answer all questions about a batch of clips from every setting's cache.

        Raises:
            InputError: a clip cannot be read, if `strict`.
        """
        failed = {clip.number: clip.media for clip in batch.clips if isinstance(clip.media, InputError)}
        answers: list[Answer] = []
        sizes: dict[Setting, Sizes] = {}
        for kind in KINDS:
            clips, inputs = self._encoded(
                [clip for clip in batch.clips if getattr(clip.media, "kind", None) == kind], failed
            )
            if failed and self.strict:
                raise failed[min(failed)]
            if not clips:
                continue
            answered = self._after_context(clips, inputs) if self.when == "context" else self._after_prompt(clips)
            for asked, setting, generated, size in answered:
                given = [
                    self._answer(setting, *question, text) for question, text in zip(asked, generated, strict=True)
                ]
                self.on_answers(setting, given, size)
                answers += given
                sizes[setting] = sizes.get(setting, Sizes()) + size
        broken = [(clip, str(failed[clip])) for clip in sorted(failed)]
        self.on_batch(Batch(batch.number, batch.files, broken, answers, list(sizes.values())))

    # ---------------------------------------------------------------- the two moments

    def _encoded(self, clips: list[Clip], failed: dict[int, InputError]) -> tuple[list[Clip], dict[str, Any]]:
        """The clips that the processor takes, and model inputs up to the end of their media; others join `failed`."""
        while clips:
            try:
                return clips, self.inputs(clips)
            except InputError as error:
                paths = {clip.number: str(getattr(clip.media, "path", "")) for clip in clips}
                refused = {number: error for number, path in paths.items() if path == error.source}
                if not refused:
                    raise
                failed.update(refused)
                clips = [clip for clip in clips if clip.number not in refused]
        return clips, {}

    def inputs(self, clips: Sequence[Clip], records: Sequence[Record] | None = None) -> dict[str, Any]:
        """Model inputs of clips up to the end of their media, or with a question each."""
        questions = None if records is None else [self.asking.prompt(record) for record in records]
        system_prompts = [clip.records[0].system_prompt for clip in clips]
        return encode(self.processor, [clip.media for clip in clips], questions, system_prompts)

    def _after_context(self, clips: list[Clip], inputs: dict[str, Any]) -> Answered:
        asked = [(clip, record) for clip in clips for record in clip.records]
        packed = []
        for limit, records in self._by_limit(clips):
            texts = [[self.asking.prompt(record) for record in own] for own in records]
            packed.append((limit, list(chain.from_iterable(records)), PaddedQuestions.pack(self.processor, texts)))
        shared = self._prefill(inputs)
        full: tuple[list[Generated], Sizes] | None = None
        for setting, session in self._sessions():
            if full is not None and self._is_full(setting):
                yield asked, setting, *full
                continue
            cache = session.compress(self._own(session, inputs, shared), ratio=setting.ratio)
            answers: dict[str, Generated] = {}
            for limit, every, questions in packed:
                given = answer_questions(session, self.processor, cache, questions, limit)
                answers |= {record.id: text for record, text in zip(every, chain.from_iterable(given), strict=True)}
            found = [answers[record.id] for _, record in asked], Sizes.of(cache)
            full = full or found
            yield asked, setting, *found

    def _after_prompt(self, clips: list[Clip]) -> Answered:
        for limit, records in self._by_limit(clips):
            pairs = [(clip, record) for clip, own in zip(clips, records, strict=True) for record in own]
            for start in range(0, len(pairs), len(clips)):
                asked = pairs[start : start + len(clips)]
                inputs = self.inputs([clip for clip, _ in asked], [record for _, record in asked])
                shared = self._prefill(inputs)
                for setting, session in self._sessions():
                    own = self._own(session, inputs, shared)
                    cache = session.compress(own, ratio=setting.ratio)
                    texts = answer_prompts(session, self.processor, own, cache, limit)
                    yield asked, setting, texts, Sizes.of(cache)

    def _by_limit(self, clips: list[Clip]) -> Iterator[tuple[int, list[list[Record]]]]:
        """By longest answer of a protocol, each clip's questions of it; protocols without any are left out."""
        for protocol, limit in self.asking.max_new_tokens.items():
            records = [[record for record in clip.records if record.protocol == protocol] for clip in clips]
            if any(records):
                yield limit, records

    def _is_full(self, setting: Setting) -> bool:
        """Whether a setting evicts nothing and adapts nothing: it is the full cache, which has answered already."""
        compressor = self.compressors[setting]
        return compressor.lora is None and compressor.planners.keeps_all(setting.ratio)

    def _prefill(self, inputs: dict[str, Any]) -> Prefill:
        """The base model's prefill, which serves every setting whose LoRA does not act on the prompt."""
        with self.full(self.model, self.processor) as session:
            return session.prefill(**inputs)

    @staticmethod
    def _own(session: Session, inputs: dict[str, Any], shared: Prefill) -> Prefill:
        return session.prefill(**inputs) if session.adapts_prompt else shared

    def _sessions(self) -> Iterator[tuple[Setting, Session]]:
        """Each setting with an open session, which serves all ratios of its policy."""
        for _, same in groupby(self.compressors.items(), key=lambda pair: id(pair[1])):
            members = list(same)
            with members[0][1](self.model, self.processor) as session:
                for setting, _ in members:
                    yield setting, session

    def _answer(self, setting: Setting, clip: Clip, record: Record, generated: Generated) -> Answer:
        """An answer, judged."""
        return Answer(
            *setting,
            id=record.id,
            clip=clip.number,
            video=record.video.name,
            protocol=record.protocol,
            groups=list(self.judge.groups(record)),
            question=record.question,
            answer=record.answer,
            prediction=generated.text,
            cut=generated.cut,
            **asdict(self.judge(record, generated.text)),
        )
