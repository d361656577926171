"""MVBench, the ten subtasks whose videos have sound: `json/<subtask>.json` and `video/<folder>/<name>`.

A question file is a list of records like

    {"video": "ZS9XR.mp4", "question": "What happened after the person took the food?",
     "candidates": ["Ate the medicine.", "Tidied up the blanket."], "answer": "Ate the medicine.",
     "start": 11.3, "end": 17.1}

with seconds that count in the four subtasks whose videos are not cut to the question.
"""

from __future__ import annotations

from pathlib import Path

from acckv.benchmarks.base import Benchmark, Mode, Verdict
from acckv.benchmarks.letters import LETTERS, first_word_matches, robust_letter
from acckv.benchmarks.options import choice_record, lettered
from acckv.data.records import Record
from acckv.io.fields import Fields, read_objects

CHARADES = ("star/Charades_v1_480", "data0613/star/Charades_v1_480", "star/Charades_segment")
PERCEPTION = ("perception/videos",)
FOLDERS: dict[str, tuple[str, ...]] = {
    "action_sequence": CHARADES,
    "action_prediction": CHARADES,
    "unexpected_action": ("FunQA_test/test",),
    "object_interaction": CHARADES,
    "object_shuffle": PERCEPTION,
    "action_localization": ("sta/sta_video", "sta/sta_video_segment"),
    "scene_transition": ("scene_qa/video",),
    "action_count": PERCEPTION,
    "state_change": PERCEPTION,
    "character_order": PERCEPTION,
}
"""Subtask -> folders that its videos may be in. Those in `..._segment` are cut to the seconds of the question."""
UNCUT = ("action_sequence", "action_prediction", "object_interaction", "action_localization")
"""Subtasks whose records have seconds."""

SYSTEM = (
    "Carefully watch the video and pay attention to the cause and sequence of events, the detail and movement of "
    "objects, and the action and pose of persons. Based on your observations, select the best option that accurately "
    "addresses the question.\n"
)


def load(root: Path, split: str | None, subset: str | None) -> list[Record]:
    """The questions of a subtask, or of all ten."""
    return [
        _record(root, subtask, index, fields)
        for subtask in ([subset] if subset else FOLDERS)
        for index, fields in enumerate(read_objects(root / "json" / f"{subtask}.json"))
    ]


def _record(root: Path, subtask: str, index: int, fields: Fields) -> Record:
    video, cut = _video(root, subtask, fields.string("video"))
    start, end = (None, None) if cut else _seconds(fields)
    id, names = f"{subtask}/{index}", ("question", "candidates", "answer")
    return choice_record(fields, id, video, (f"subtask/{subtask}",), names, _right, start=start, end=end)


def _right(fields: Fields) -> str:
    """As in the original, the last of equal candidates."""
    answer, candidates = fields.string("answer"), fields.strings("candidates")
    if answer not in candidates:
        raise fields.error("answer", f"{answer!r} is not one of the candidates")
    return LETTERS[len(candidates) - 1 - candidates[::-1].index(answer)]


def _seconds(fields: Fields) -> tuple[float, float]:
    start, end = fields.seconds("start"), fields.seconds("end")
    if start is None or end is None:
        raise fields.error("start" if start is None else "end", "missing")
    if end <= start:
        raise fields.error("end", f"{end} s is not after the start, {start} s")
    return start, end


def _video(root: Path, subtask: str, name: str) -> tuple[Path, bool]:
    """The file of a video, and whether it is just what the question is about; where it should be if it is nowhere."""
    files = [
        (base / folder / name, subtask not in UNCUT or folder.endswith("_segment"))
        for folder in FOLDERS[subtask]
        for base in (root / "video", root)
    ]
    return next((file for file in files if file[0].is_file()), files[0])


def prompt(record: Record) -> str:
    """The official text; its start of the answer, "Best option:(", is left to the model."""
    options = "\n".join(lettered(record.options, "({}) {}"))
    return f"{SYSTEM}Question: {record.question}\nOptions:\n{options}\nOnly give the best option."


def judge(record: Record, answer: str, mode: Mode) -> Verdict:
    """Official: by the first word, so that an empty answer is right; it is parsed if it fits one option alone."""
    letters = LETTERS[: len(record.options or ())]
    if mode == "official":
        matches = [letter for letter in letters if first_word_matches(answer, letter)]
        return Verdict(float(record.answer in matches), len(matches) == 1)
    found = robust_letter(answer, record.options or ())
    return Verdict(float(found == record.answer), found is not None)


BENCHMARK = Benchmark(
    name="mvbench",
    title="MVBench",
    source="Li et al., CVPR 2024, https://huggingface.co/datasets/OpenGVLab/MVBench",
    load=load,
    judge=judge,
    prompt=prompt,
    subsets=tuple(FOLDERS),
)
