"""AVSD (DSTC7, DSTC8, DSTC10) in its authors' layout: `{test,valid,train}_set4DSTC7-AVSD.json` and `<image_id>.mp4`.

    {"dialogs": [{"image_id": "CGRUM", "caption": "...", "summary": "...",
                  "dialog": [{"question": "it is a man or a woman ?", "answer": "it is a man on the bed"}, ...]}]}

In a test file the last answer is `__UNDISCLOSED__`. Its references are in a file whose name has `multiref`: of the same
shape with a list of answers (DSTC10), or in the shape of COCO, `{"images": [{"id", "name": "<image_id>_<turn>"}],
"annotations": [{"image_id": <id>, "caption"}]}` with turns from 0 (what the authors' get_annotation.py writes).

Of a test file the last turn is asked, as the challenges do (`--last_only`); of the others every turn. A question holds
the dialogue before it, but neither caption nor summary: those would answer without the video.

The authors score with COCO's caption evaluation after dropping "," and "." (DSTC10's evaluate.py and stopwords.txt),
which its tokeniser drops anyway: `official` and `robust` are the same ROUGE-L, BLEU-4 and CIDEr are in
`acckv.metrics.captions`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from acckv.benchmarks.base import Benchmark
from acckv.benchmarks.layout import video_folder
from acckv.benchmarks.protocols import judge_text
from acckv.data.records import Record
from acckv.errors import InputError
from acckv.io.fields import Fields
from acckv.io.json_files import read_json

UNDISCLOSED = "__UNDISCLOSED__"
EDITIONS = ("DSTC7", "DSTC8", "DSTC10")
References = dict[str, list[str]]
"""`<image_id>_<turn>` to the right answers."""


def load(root: Path, split: str | None, subset: str | None) -> list[Record]:
    """The questions of a split; `subset` is the edition, needed where a folder holds several."""
    file, references = _files(root, str(split), subset)
    videos = video_folder(
        root, "videos", "Charades_v1_480", "Charades_vu17_test_480", "Charades_v1", "Charades_vu17_test"
    )
    known = _read_references(references) if references else {}
    records: list[Record] = []
    seen: set[str] = set()
    for dialog, turns in _dialogs(file):
        image = dialog.string("image_id")
        if image in seen:
            raise dialog.error("image_id", f"{image} appears twice")
        seen.add(image)
        first = len(turns) - 1 if split == "test" else 0
        records += [_record(image, turns, number, videos, known) for number in range(first, len(turns))]
    return records


def prompt(record: Record) -> str:
    """The dialogue so far, and what to answer with."""
    return f"{record.question}\nAnswer the last question about the video in one sentence."


def _files(root: Path, split: str, edition: str | None) -> tuple[Path, Path | None]:
    """The file of questions, and that of references."""
    found = sorted(root.glob(f"{split}_set4{edition or 'DSTC'}*AVSD*.json"))
    questions = [file for file in found if "multiref" not in file.name]
    references = [file for file in found if "multiref" in file.name]
    if not found:
        raise InputError("no such file", source=root / f"{split}_set4{edition or 'DSTC7'}-AVSD.json")
    if len(questions) > 1 or len(references) > 1:
        names = ", ".join(file.name for file in found)
        raise InputError(
            f"several editions ({names}); choose one of {', '.join(EDITIONS)}", source=root, field="subset"
        )
    reference = references[0] if references else None
    return (questions[0] if questions else references[0]), reference


def _dialogs(file: Path) -> Iterator[tuple[Fields, list[Fields]]]:
    """Each dialogue with its turns."""
    values = read_json(file)
    dialogs = values.get("dialogs") if isinstance(values, dict) else None
    if not isinstance(dialogs, list):
        raise InputError("expected a list of dialogues", source=file, field="dialogs")
    for index, value in enumerate(dialogs):
        if not isinstance(value, dict):
            raise InputError(f"expected an object, got {type(value).__name__}", source=file, field=f"dialog {index}")
        dialog = Fields(file, f"dialog {index}", value)
        turns = value.get("dialog")
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
            raise dialog.error("dialog", "expected a list of questions with answers")
        yield dialog, [Fields(file, f"dialog {index}, turn {number}", turn) for number, turn in enumerate(turns)]


def _read_references(file: Path) -> References:
    values = read_json(file)
    references: References = defaultdict(list)
    if isinstance(values, dict) and "annotations" in values:
        names = {fields.integer("id"): fields.string("name") for fields in _objects(file, values, "images")}
        for fields in _objects(file, values, "annotations"):
            image = fields.integer("image_id")
            if image not in names:
                raise fields.error("image_id", f"{image} is not among the images")
            references[names[image]].append(fields.string("caption"))
        return references
    for dialog, turns in _dialogs(file):
        references[f"{dialog.string('image_id')}_{len(turns) - 1}"] += _answers(turns[-1])
    return references


def _objects(file: Path, values: dict[str, object], field: str) -> list[Fields]:
    entries = values.get(field)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InputError("expected a list of objects", source=file, field=field)
    return [Fields(file, f"{field} {number}", entry) for number, entry in enumerate(entries)]


def _answers(turn: Fields) -> list[str]:
    """The answers of a turn, one or a list."""
    if isinstance(turn.values.get("answer"), list):
        return turn.strings("answer")
    return [turn.string("answer")]


def _record(image: str, turns: list[Fields], number: int, videos: Path, known: References) -> Record:
    name = f"{image}_{number}"
    own = _answers(turns[number])
    right = known.get(name) or ([] if own == [UNDISCLOSED] else own)
    if not right:
        raise turns[number].error("answer", "undisclosed; put the file of references (multiref) beside this one")
    history = [f"Q: {turn.string('question')}\nA: {_answers(turn)[0]}" for turn in turns[:number]]
    return Record(
        id=name,
        video=videos / f"{image}.mp4",
        audio=None,
        question="\n".join([*history, f"Q: {turns[number].string('question')}"]),
        options=None,
        answer=right[0],
        groups=(),
        protocol="text",
        references=tuple(right),
    )


BENCHMARK = Benchmark(
    name="avsd",
    title="AVSD",
    source="Alamri et al., CVPR 2019; DSTC7, DSTC8 and DSTC10, https://github.com/dialogtekgeek",
    load=load,
    judge=judge_text,
    prompt=prompt,
    splits=("test", "valid", "train"),
    subsets=EDITIONS,
    max_new_tokens=48,
)
