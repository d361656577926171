"""MUSIC-AVQA (Li et al., CVPR 2022): questions about clips with music, answered with one of 42 words.

A question file is a list of records like

    {"video_id": "00000272", "question_id": 50, "type": "[\\"Audio-Visual\\", \\"Temporal\\"]",
     "question_content": "Where is the <FL> sounding instrument?", "templ_values": "[\\"first\\"]",
     "question_deleted": 0, "anser": "left"}

beside a flat folder of `<video_id>.mp4`. `acckv.data.synthetic.clips` writes the same format.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from acckv.data.records import Record
from acckv.io.fields import Fields, read_objects

VOCABULARY: tuple[str, ...] = (
    *("yes", "no", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("more than ten", "left", "middle", "right", "indoor", "outdoor", "simultaneously"),
    *("accordion", "acoustic_guitar", "bagpipe", "banjo", "bassoon", "cello", "clarinet", "congas", "drum"),
    *("electric_bass", "erhu", "flute", "guzheng", "piano", "pipa", "saxophone", "suona", "trumpet", "tuba"),
    *("ukulele", "violin", "xylophone"),
)
"""The 42 answers of the data set."""

DESCRIPTION = "Description"
"""Second part of the type of free-text tasks; MUSIC-AVQA itself has none, generated clips have."""


def load_music_avqa(question_file: str | Path, video_root: str | Path) -> list[Record]:
    """Read a question file in the format of MUSIC-AVQA; questions marked as deleted are left out.

    Args:
        question_file: e.g. `avqa-test.json`.
        video_root: folder that holds `<video_id>.mp4`.

    Raises:
        InputError: naming file, record and field, for a missing or cut-off file, a malformed record, templates and
            values that do not match, a repeated question id, or a video that is not there.
    """
    records: list[Record] = []
    seen: set[str] = set()
    for fields, record in read_questions(Path(question_file), Path(video_root)):
        if not record.video.is_file():
            raise fields.error("video_id", f"no such video {record.video}")
        if record.id in seen:
            raise fields.error("question_id", f"{record.id} appears twice")
        seen.add(record.id)
        records.append(record)
    return records


def read_questions(question_file: Path, video_root: Path) -> Iterator[tuple[Fields, Record]]:
    """Each question with the fields it was read from; videos are not looked for.

    Raises:
        InputError: as `load_music_avqa`, but for missing videos and repeated ids.
    """
    for fields in read_objects(question_file):
        if not fields.integer("question_deleted", default=0):
            yield fields, _record(fields, video_root)


def _record(fields: Fields, video_root: Path) -> Record:
    modality, kind = fields.string_list("type", length=2)
    template = fields.string("question_content")
    values = fields.string_list("templ_values")
    try:
        question = fill_template(template, values)
    except ValueError as error:
        raise fields.error("templ_values", str(error)) from error
    return Record(
        id=str(fields.integer("question_id")),
        video=video_root / f"{fields.string('video_id')}.mp4",
        audio=None,
        question=question,
        options=None,
        answer=fields.string("anser"),
        groups=(modality, f"{modality}/{kind}"),
        protocol="description" if kind == DESCRIPTION else "word",
    )


def fill_template(template: str, values: Sequence[str]) -> str:
    """Replace each space-separated token that contains `<` by the next value; a final `?` stays.

    Raises:
        ValueError: the number of tokens and of values differ.
    """
    end = "?" if template.rstrip().endswith("?") else ""
    tokens = template.rstrip().removesuffix("?").split(" ")
    holes = [index for index, token in enumerate(tokens) if "<" in token]
    if len(holes) != len(values):
        raise ValueError(f"{len(holes)} holes to fill in {template!r}, but {len(values)} values")
    for index, value in zip(holes, values, strict=True):
        tokens[index] = value
    return " ".join(tokens) + end


def official_match(prediction: str, answer: str) -> bool:
    """The data set's own rule: equal up to case and trailing blanks and full stops."""
    return prediction.rstrip(" .").upper() == answer.upper()


def robust_answer(prediction: str, vocabulary: Iterable[str] = VOCABULARY) -> str | None:
    """The word of `vocabulary` that occurs first in a prediction, as a whole word; None when none does.

    Underscores count as blanks and case is ignored; of two words that start together the longer one wins, so "more
    than ten" is not "ten" and "acoustic guitar" is found in "an Acoustic Guitar.".
    """
    text = prediction.replace("_", " ").lower()
    best: tuple[int, int, str] | None = None
    for word in vocabulary:
        pattern = rf"(?<!\w){re.escape(word.replace('_', ' ').lower())}(?!\w)"
        found = re.search(pattern, text)
        if found and (best is None or (found.start(), -len(word)) < best[:2]):
            best = (found.start(), -len(word), word)
    return best[2] if best else None


def robust_match(prediction: str, answer: str, vocabulary: Iterable[str] = VOCABULARY) -> bool:
    """Whether the first vocabulary word of a prediction is the answer (an answer outside it is looked for too)."""
    found = robust_answer(prediction, {*vocabulary, answer})
    return found is not None and found.replace("_", " ").lower() == answer.replace("_", " ").lower()
