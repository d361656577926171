"""AV-Odyssey as it is distributed: `av_odyssey*.parquet`, six parts with the media inside or one with their paths.

Columns: question_id, question_type_id (1 to 26), data_type, subfield, question, options (4), answer, and the media in
image_1 to image_4, video_1 and audio_1 to audio_4 (bytes or null), or as lists of paths beside the file in image_path,
video_path and audio_path. Question and options name them as `[img1]`, `[video1]`, `[audio1]`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from acckv.benchmarks.base import Benchmark, Mode, Verdict
from acckv.benchmarks.letters import av_odyssey_letter, robust_letter
from acckv.benchmarks.options import bare_options, choice_record, in_groups, lettered
from acckv.benchmarks.packed_media import PackedMedia
from acckv.data.records import Record
from acckv.io.fields import Fields
from acckv.io.parquet import read_parquet

COLUMNS = {"img": "image", "video": "video", "audio": "audio"}
"""Name in a question -> start of the columns."""


def load(root: Path, split: str | None, subset: str | None) -> list[Record]:
    """The questions; `subset` is a subfield such as "Timbre", a task (1 to 26) or a data type.

    Media that are inside the parquet files are written to the user's cache folder, unless they are there already.
    """
    packed = PackedMedia("av_odyssey", root)
    records = []
    for fields in read_parquet(sorted(root.glob("av_odyssey*.parquet")), root):
        groups = (
            f"subfield/{fields.string('subfield')}",
            f"task/{fields.integer('question_type_id')}",
            f"data type/{fields.string('data_type')}",
        )
        if in_groups(groups, subset):
            records.append(_record(packed, fields, groups))
    return records


def _record(packed: PackedMedia, fields: Fields, groups: tuple[str, ...]) -> Record:
    media = _media(packed, fields)
    texts = [fields.string("question"), *bare_options(fields, "options")]
    names = re.findall(r"\[(?:img|video|audio)\d+\]", " ".join(texts))
    for name in names:
        if name not in media:
            raise fields.error("question", f"names {name}, which the record does not have")
    order = list(dict.fromkeys([*names, *media]))
    sounds = [name for name in order if name.startswith("[audio")]
    sights = [name for name in order if name not in sounds]
    video, audio = sights[:1] or sounds[:1], sounds[:1] if sights else []
    if not video:
        raise fields.error("audio_1", "the record has no media")
    return choice_record(
        fields,
        fields.string("question_id"),
        media[video[0]],
        groups,
        audio=media[audio[0]] if audio else None,
        attachments=tuple(media[name] for name in order if name not in (*video, *audio)),
    )


def _media(packed: PackedMedia, fields: Fields) -> dict[str, Path]:
    """Name, such as "[img1]", -> file."""
    media = {}
    for name, column in COLUMNS.items():
        listed = fields.strings(f"{column}_path") if fields.values.get(f"{column}_path") else []
        columns = [f"{column}_path"] * len(listed) if listed else [f"{column}_{number}" for number in range(1, 5)]
        for number, field in enumerate(columns, start=1):
            value = listed[number - 1] if listed else fields.values.get(field)
            if value:
                media[f"[{name}{number}]"] = packed.file(fields, field, value, fields.string("question_id"))
    return media


def prompt(record: Record) -> str:
    """The official text; the names of the media stay in it."""
    options = lettered(record.options, "{}:{}")
    return "\n".join([record.question, *options, "Answer with the option's letter from the given choices directly."])


def judge(record: Record, answer: str, mode: Mode) -> Verdict:
    """Official: an answer in which no letter is found counts as A."""
    options: Sequence[str] = record.options or ()
    found = av_odyssey_letter(answer, options) if mode == "official" else robust_letter(answer, options)
    taken = found or "A" if mode == "official" else found
    return Verdict(float(taken == record.answer), found is not None)


BENCHMARK = Benchmark(
    name="av_odyssey",
    title="AV-Odyssey",
    source="Gong et al., 2024, https://huggingface.co/datasets/AV-Odyssey/AV_Odyssey_Bench",
    load=load,
    judge=judge,
    prompt=prompt,
)
