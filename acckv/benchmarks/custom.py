"""Your own data: `questions.jsonl` (or `<split>.jsonl`: test, validation, train), one JSON object a line.

| field | |
|---|---|
| `video` | media file, relative to the folder of the questions; a picture or a sound will do |
| `question` | text |
| `answer` | the right answer: a text, the letter of an option or its text, yes or no |
| `audio` | sound file, where it is not in `video` |
| `options` | list of 2 to 10 texts without letters |
| `protocol` | `word`, `description`, `choice`, `yes_no` or `text`; may be left out, see below |
| `references` | list of right texts, for `text`; without it the answer alone |
| `groups` | list of names to report on |
| `start`, `end` | seconds of the video that the question is about |
| `attachments` | list of further media files |
| `system_prompt` | what the model is told before the media |
| `id` | text, unique; without it the number of the record |

The first three are needed. Without a protocol it is `choice` where there are options, `yes_no` where the answer is yes
or no, `text` where there are references, and `word` otherwise. How each is scored: `acckv.benchmarks.protocols`.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast, get_args

from acckv.benchmarks.base import Benchmark
from acckv.benchmarks.layout import first_file
from acckv.benchmarks.letters import LETTERS, exact_letter
from acckv.benchmarks.options import lettered
from acckv.benchmarks.protocols import judge_protocol
from acckv.data.records import Protocol, Record
from acckv.io.fields import Fields, read_objects

FIELDS = (
    *("video", "question", "answer", "audio", "options", "protocol", "references", "groups", "start", "end"),
    *("attachments", "system_prompt", "id"),
)


def load(root: Path, split: str | None, subset: str | None) -> list[Record]:
    """The questions in file order; `subset` is a group."""
    file = root / f"{split}.jsonl" if split != "test" else first_file(root, "questions.jsonl", "test.jsonl")
    records: dict[str, Record] = {}
    for number, fields in enumerate(read_objects(file)):
        record = _record(fields, number, root)
        if record.id in records:
            raise fields.error("id", f"{record.id} appears twice")
        records[record.id] = record
    return [record for record in records.values() if subset is None or subset in record.groups]


def prompt(record: Record) -> str:
    """The question, and for a choice the options and what to answer with."""
    if record.options is None:
        return record.question
    return "\n".join([record.question, *lettered(record.options), "Answer with the option's letter."])


def _record(fields: Fields, number: int, root: Path) -> Record:
    unknown = sorted(set(fields.values) - set(FIELDS))
    if unknown:
        raise fields.error(unknown[0], f"unknown; there is {', '.join(FIELDS)}")
    options = tuple(fields.strings("options")) if "options" in fields.values else None
    if options is not None and not 2 <= len(options) <= len(LETTERS):
        raise fields.error("options", f"expected 2 to {len(LETTERS)} options, got {len(options)}")
    protocol = _protocol(fields, options)
    start, end = fields.seconds("start"), fields.seconds("end")
    if end is not None and end <= (start or 0.0):
        raise fields.error("end", f"{end:g} s is not after the start, {start or 0.0:g} s")
    answer = _answer(fields, protocol, options)
    references = tuple(fields.strings("references", default=(answer,)))
    if not references or not all(text.strip() for text in references):
        raise fields.error("references", "expected texts")
    return Record(
        id=fields.string("id", default=str(number)),
        video=root / fields.string("video"),
        audio=root / fields.string("audio") if "audio" in fields.values else None,
        question=fields.string("question"),
        options=options,
        answer=answer,
        groups=tuple(fields.strings("groups", default=())),
        protocol=protocol,
        references=references if protocol == "text" else (),
        start=start,
        end=end,
        attachments=tuple(root / name for name in fields.strings("attachments", default=())),
        system_prompt=fields.string("system_prompt") if "system_prompt" in fields.values else None,
    )


def _protocol(fields: Fields, options: tuple[str, ...] | None) -> Protocol:
    if options:
        guess = "choice"
    elif fields.string("answer").strip().lower() in ("yes", "no"):
        guess = "yes_no"
    else:
        guess = "text" if "references" in fields.values else "word"
    protocol = fields.string("protocol", default=guess)
    if protocol not in get_args(Protocol):
        raise fields.error("protocol", f"expected one of {', '.join(get_args(Protocol))}, got {protocol!r}")
    if (protocol == "choice") != (options is not None):
        raise fields.error("options", "belong to the protocol 'choice', and it needs them")
    if "references" in fields.values and protocol != "text":
        raise fields.error("references", f"belong to the protocol 'text', this is {protocol!r}")
    return cast(Protocol, protocol)


def _answer(fields: Fields, protocol: Protocol, options: tuple[str, ...] | None) -> str:
    answer = fields.string("answer").strip()
    if protocol == "yes_no":
        answer = answer.lower()
        if answer not in ("yes", "no"):
            raise fields.error("answer", f"expected yes or no, got {fields.values['answer']!r}")
    if options is None:
        return answer
    letter = exact_letter(answer, options)
    if letter is None:
        raise fields.error("answer", f"{answer!r} is none of the options")
    return letter


BENCHMARK = Benchmark(
    name="custom",
    title="custom",
    source="your own questions.jsonl, see acckv/benchmarks/custom.py",
    load=load,
    judge=judge_protocol,
    prompt=prompt,
    splits=("test", "validation", "train"),
    max_new_tokens=64,
)
