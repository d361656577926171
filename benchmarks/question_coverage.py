"""How often an evaluation's warning of questions outside of the calibration is right.

    python -m benchmarks.question_coverage
    python -m benchmarks.question_coverage --music-avqa json/avqa-test.json json/avqa-val.json

A calibration's questions decide alone what lies outside, so nothing is trained. Two tables give the share of the
questions about other clips that lie outside, in %, and mark where the warning comes. Of the embedded model, as in
`benchmarks.held_out_types`: a row for each subject that was held out, with its types beside those that were asked. Of
the pretrained decoder's clips: a row for the kinds that were asked, a column for each kind, and facts of things and
people that no clip names. With two question files of MUSIC-AVQA, a calibration on the first asks the second: with each
of its types held out by turns, and with that type alone. No video is needed.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from acckv.benchmarks.music_avqa_questions import read_questions
from acckv.data.asked_questions import AskedQuestions, Coverage
from acckv.data.calibration_record import finest_group
from acckv.data.records import Record
from benchmarks.held_out_types import SUBJECTS, QuestionsWithout
from benchmarks.pretrained.calibrate import COUNTS
from benchmarks.pretrained.kinds import KINDS, make_clip
from lightning_modules.evaluation.datamodule import EvaluationData

CALIBRATED_ON = (*(kind for kind in KINDS if kind != "summary"), "facts+quotes")
"""Kinds of the pretrained decoder's clips; of `summary` there are two questions in all."""
NAMED_NOWHERE = [
    *(f"\n\nThe code of the {thing} is" for thing in ("violin", "bridge", "carpet", "turtle", "magnet")),
    *(f"\n\n{name} lives in" for name in ("Zoltan", "Ingeborg", "Mateo", "Priya", "Kenji")),
]
OTHER_NAMES = "facts, other names"
Found = Mapping[str, Mapping[str, tuple[Coverage, bool]]]
"""By calibration and kind of the test questions, their coverage, and whether that kind was calibrated on."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-clips", type=int, default=768, help="generated clips to calibrate on")
    parser.add_argument("--clips", type=int, default=64, help="test clips, generated and of each kind")
    parser.add_argument("--seed", type=int, default=1, help="of the generated test clips")
    parser.add_argument("--cache-dir", default=None, help="of the generated clips")
    parser.add_argument("--music-avqa", type=Path, nargs=2, metavar="FILE", help="to calibrate on, and to ask")
    given = parser.parse_args(arguments)
    console = Console(width=200)
    test = EvaluationData(clips=given.clips, seed=given.seed, cache_dir=given.cache_dir)
    tables = {
        "embedded model, calibrated on all types but those of": embedded_model(given.train_clips, test),
        "pretrained decoder, calibrated on": pretrained_kinds(given.clips),
    }
    if given.music_avqa:
        tables |= music_avqa(*given.music_avqa)
    for title, found in tables.items():
        console.print(table(title, found), warned(found))


def embedded_model(train_clips: int, test: EvaluationData) -> Found:
    """By held-out subject and type of question."""
    data = QuestionsWithout((), train_clips=train_clips, cache_dir=test.cache_dir)
    return held_out_by_turns(data.records("train"), test.records(), {**SUBJECTS, "nothing": ()})


def music_avqa(train: Path, test: Path) -> dict[str, Found]:
    """By the type that is held out, or asked alone, and type of question.

    Raises:
        InputError: a file is not as MUSIC-AVQA has it.
    """
    records, asked = ([record for _, record in read_questions(file, file.parent)] for file in (train, test))
    types = sorted({finest_group(record) for record in records})
    return {
        "MUSIC-AVQA, calibrated on all but": held_out_by_turns(records, asked, {name: (name,) for name in types}),
        "MUSIC-AVQA, calibrated on": held_out_by_turns(records, asked, {name: {*types} - {name} for name in types}),
    }


def held_out_by_turns(records: Sequence[Record], test: Sequence[Record], turns: Mapping[str, Collection[str]]) -> Found:
    """By turn and kind of the test questions.

    Args:
        records: to calibrate on; turns: the kinds that each leaves out.
    """
    asked = by_kind(test)
    found: dict[str, dict[str, tuple[Coverage, bool]]] = {}
    for name, held_out in turns.items():
        calibrated = AskedQuestions.of([one for one in records if finest_group(one) not in held_out], finest_group)
        found[name] = {kind: (calibrated.coverage(asked[kind]), kind not in held_out) for kind in sorted(asked)}
    return found


def pretrained_kinds(clips: int) -> Found:
    """By kinds that were calibrated on and kind that is asked."""
    asked = {kind: questions(kind, "test", clips) for kind in KINDS} | {OTHER_NAMES: NAMED_NOWHERE}
    found: dict[str, dict[str, tuple[Coverage, bool]]] = {}
    for name in CALIBRATED_ON:
        kinds = name.split("+")
        records = [
            Record("", Path(), None, stem, None, "", (kind,), "text")
            for kind in kinds
            for stem in questions(kind, "train", COUNTS["train"] // len(kinds))
        ]
        calibrated = AskedQuestions.of(records, finest_group)
        own = {*kinds, *([OTHER_NAMES] if "facts" in kinds else [])}
        found[name] = {kind: (calibrated.coverage(stems), kind in own) for kind, stems in asked.items()}
    return found


def by_kind(records: Iterable[Record]) -> dict[str, list[str]]:
    """The questions of each kind."""
    found: dict[str, list[str]] = {}
    for record in records:
        found.setdefault(finest_group(record), []).append(record.question)
    return found


def questions(kind: str, split: str, clips: int) -> list[str]:
    """What is asked about the first clips of a kind and split."""
    return [question.stem for number in range(clips) for question in make_clip(kind, split, number).questions]


def table(title: str, found: Found) -> Table:
    """A row for each kind of questions: the share that lies outside in %, a star where that is warned of."""
    made = Table(title=f"{title} ...: questions outside in %, * where it is warned of", box=box.SIMPLE_HEAD)
    for name in ("questions", *found):
        made.add_column(name.replace("/", "/ "), justify="left" if name == "questions" else "right")
    for kind in next(iter(found.values())):
        cells = (own[kind][0] for own in found.values())
        made.add_row(kind, *(f"{100 * one.outside / one.asked:.0f}{'*' if one.warning else ''}" for one in cells))
    return made


def warned(found: Found) -> str:
    """How often there is a warning, rightly and wrongly."""
    cells = [cell for own in found.values() for cell in own.values()]
    texts = []
    for was_asked, named in ((False, "not calibrated on"), (True, "calibrated on")):
        warnings = [one.warning is not None for one, own in cells if own == was_asked]
        texts.append(f"{sum(warnings)} of {len(warnings)} kinds that were {named}")
    return f"warned of {' and of '.join(texts)}"


if __name__ == "__main__":
    main()
