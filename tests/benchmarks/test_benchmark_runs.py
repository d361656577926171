"""Every benchmark from its folder to the report on the embedded model: real media, real processor, no download."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
from rich.console import Console

from acckv.benchmarks import BENCHMARKS, load_benchmark, score
from acckv.benchmarks.base import Mode
from acckv.benchmarks.corpus import corpus_scores
from acckv.benchmarks.judging import ALL_OFFICIAL, ALL_ROBUST
from acckv.data.precomputed import read_clip
from acckv.data.records import ClipKey, Record
from acckv.evaluation.journal import judged_by, read_batches, read_config
from acckv.evaluation.results import Row, read_results
from acckv.evaluation.scores import score_batches
from acckv.metrics.captions import rouge_l
from acckv.models import load_model
from lightning_modules.cli.ask import AskOptions, run_ask
from lightning_modules.evaluation.datamodule import EvaluationData
from lightning_modules.evaluation.options import EvaluationOptions
from tests.benchmarks.scored_by_hand import BY_HAND
from tests.evaluation import runs
from tests.paths import FIXTURES

CELLS = 5  # the full cache, three controls, and keydiff


class Expected(NamedTuple):
    """What the fixture of a benchmark holds, counted by hand.

    Attributes:
        clips: seconds of each clip that is there, in the order of the questions.
        group: one of the question groups, with the number of its questions; None where there are no groups.
        failed: file and questions of the clip that is not there.
    """

    clips: list[float]
    group: tuple[str, int] | None
    failed: tuple[str, int] | None = None


EXPECTED = {
    "music_avqa": Expected([1.5, 1.5], ("Audio-Visual/Temporal", 1)),
    "avqa": Expected([1.5, 1.5], ("Happening", 1), failed=("0_missing_000010.mp4", 1)),
    "avhbench": Expected([1.5, 1.5], ("AV Matching", 2)),
    "avsd": Expected([1.5, 1.5], None),
    "mvbench": Expected([2, 1, 2, 2, 2, 2, 2], ("subtask/action_count", 1)),  # one video is asked about twice, cut
    "worldsense": Expected([2, 2], ("duration/<1min", 3)),
    "daily_omni": Expected([2, 2], ("duration/60s", 3)),
    "omnibench": Expected([1, 1], ("audio/sound event", 2)),  # a picture is a second
    "av_odyssey": Expected([2, 1.3, 2, 2.3, 0.6], ("data type/video", 2)),
    "video_mme": Expected([2, 2, 2], ("duration/long", 2)),
    "custom": Expected([1.5, 0.75, 1.5, 1.5, 4], ("audio", 1)),
}
Run = Callable[[str], Path]


@cache
def loaded(*name: Any, **options: Any) -> tuple[Any, Any]:
    """The embedded model, loaded once for all runs."""
    return load_model(*name, **options)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def run(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Evaluates a benchmark, each once; gives the output folder."""
    monkeypatch.setenv("ACCKV_CACHE", str(outputs / "cache"))
    monkeypatch.setattr("lightning_modules.evaluation.run.load_model", loaded)

    def evaluate(name: str) -> Path:
        output = outputs / name
        if not output.exists():
            data = EvaluationData(benchmark=name, root=str(FIXTURES / name))
            settings: dict[str, Any] = {"policies": "keydiff", "ratios": [0.5], "timelines": 1, "accelerator": "cpu"}
            _, printed = runs.run(EvaluationOptions(output=str(output), data=data, **settings))
            (output / "console.txt").write_text(printed)
        return output

    return evaluate


def answered(name: str) -> dict[str, Record]:
    """The questions whose media are there."""
    return {record.id: record for record in load_benchmark(name, FIXTURES / name) if record.video.is_file()}


def with_answers(output: Path, answers: dict[str, str], mode: Mode = "official") -> Row:
    """The full cache's row, had the model given these answers: by id of the question."""
    config = replace(read_config(output), score=mode)
    batches = []
    for batch in read_batches(output):
        said = [replace(answer, prediction=answers[answer.id]) for answer in batch.answers]
        batches.append(judged_by(config, replace(batch, answers=said)))
    return score_batches(config, batches).results.rows[0]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_from_its_folder_to_the_report(name: str, run: Run) -> None:
    output, records, expected = run(name), answered(name), EXPECTED[name]
    lines = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    results = read_results(output / "results.json")
    assert len(results.rows) == CELLS and len(lines) == CELLS * len(records)
    failures = json.loads((output / "failures.json").read_text())
    failed, questions = expected.failed or ("", 0)
    assert (results.clips, results.failed_clips, results.failed_questions) == (
        len(expected.clips),
        len(failures),
        questions,
    )
    assert [Path(entry["clip"]).name for entry in failures] == [failed] * (failed != "")
    assert len(records) + questions == len(BY_HAND[name]) == len(load_benchmark(name, FIXTURES / name))
    for row in results.rows:
        own = [line for line in lines if (line["policy"], line["ratio"]) == (row.policy, row.ratio)]
        assert sorted(line["id"] for line in own) == sorted(records) and row.n == len(records)
        for mode, group in zip(get_args(Mode), (ALL_OFFICIAL, ALL_ROBUST), strict=True):
            scores = [score(name, records[line["id"]], line["prediction"], mode) for line in own]
            counted = [one for one, line in zip(scores, own, strict=True) if line[mode] is not None]
            assert [line[mode] for line in own if line[mode] is not None] == pytest.approx(counted)
            assert not counted or row.groups[group].accuracy == pytest.approx(sum(counted) / len(counted))
            if mode == "official":
                assert row.accuracy == pytest.approx(sum(scores) / len(scores))
        assert expected.group is None or row.groups[expected.group[0]].n == expected.group[1]
    html = (output / "report.html").read_text()
    assert results.benchmark in html and (failed in html)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_medium_of_a_question_reaches_the_model(name: str, run: Run) -> None:
    """Entries are what the seconds of pictures and sound make; half of them is kept, a modality by its control."""
    output = run(name)
    clips: dict[ClipKey, Any] = {record.clip: read_clip(record) for record in answered(name).values()}
    assert [clip.duration for clip in clips.values()] == pytest.approx(EXPECTED[name].clips, abs=0.01)
    # 9 video entries a second of pictures (two frames), 8 audio entries a second of sound.
    video = [9 * len(clip.frames) / 2 if clip.frames is not None else 0 for clip in clips.values()]
    audio = [8 * len(clip.audio) / clip.sampling_rate if clip.audio is not None else 0 for clip in clips.values()]
    full, control, without_audio, without_video, keydiff = read_results(output / "results.json").rows
    assert without_audio.kept_entries == pytest.approx(sum(video) / len(clips), abs=1e-3)
    assert without_video.kept_entries == pytest.approx(sum(audio) / len(clips), abs=0.5)  # parts of an entry
    both = without_audio.kept_entries + without_video.kept_entries
    assert full.kept_entries == full.full_entries == pytest.approx(both, abs=1e-3)
    assert control.kept_entries == 0 and keydiff.kept_entries == pytest.approx(full.kept_entries / 2, abs=0.51)
    assert keydiff.kv_bytes < full.kv_bytes


@pytest.mark.parametrize("mode", get_args(Mode))
@pytest.mark.parametrize("name", BENCHMARKS)
def test_answers_that_were_scored_by_hand_come_out_so(name: str, mode: Mode, run: Run) -> None:
    """What the model said is replaced by the answers of the hand-scored table; no number of it comes from the code."""
    records = answered(name)
    table = [line for line in BY_HAND[name] if line.id in records]
    row = with_answers(run(name), {line.id: line.said for line in table}, mode)
    official, robust = [line.official for line in table], [line.robust for line in table]
    chosen = official if mode == "official" else robust
    assert row.accuracy == pytest.approx(sum(chosen) / len(chosen), abs=1e-6)
    assert row.groups[ALL_ROBUST].accuracy == pytest.approx(sum(robust) / len(robust), abs=1e-6)
    # Video-MME's authors leave out answers that they cannot read: here one, which is wrong for everybody else.
    counted = len(official) - (name == "video_mme")
    assert row.groups[ALL_OFFICIAL].n == counted
    assert row.groups[ALL_OFFICIAL].accuracy == pytest.approx(sum(official) / counted, abs=1e-6)
    by_video: dict[Path, list[float]] = {}
    for line, one in zip(table, chosen, strict=True):
        by_video.setdefault(records[line.id].video, []).append(one - sum(chosen) / len(chosen))
    spread = sum(sum(group) ** 2 for group in by_video.values()) * len(by_video) / (len(by_video) - 1)
    assert row.standard_error == pytest.approx(math.sqrt(spread) / len(table), abs=1e-6)


def test_the_table_of_fixtures_is_right() -> None:
    lines = (FIXTURES / "README.md").read_text().splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| `")]
    table = {name.strip("`"): (int(count.split(",")[0]), float(a), float(b)) for name, count, a, b, _ in cells}
    by_hand = {
        name: (len(lines), round(sum(line.official for line in lines), 3), round(sum(line.robust for line in lines), 3))
        for name, lines in BY_HAND.items()
    }
    assert table == by_hand and set(table) == set(BENCHMARKS)


def test_scores_of_all_answers_together_by_hand(run: Run) -> None:
    """AVHBench: of six questions two of three yes are found, one yes is wrong, and two answers say neither."""
    output = run("avhbench")
    said = {line.id: line.said for line in BY_HAND["avhbench"]}
    metrics = with_answers(output, said).metrics
    assert metrics["yes/no: accuracy"] == pytest.approx(2 / 6)
    assert metrics["yes/no: precision"] == metrics["yes/no: recall"] == metrics["yes/no: F1"] == pytest.approx(2 / 3)
    assert metrics["yes/no: share of yes"] == pytest.approx(3 / 6)
    assert metrics["AV Matching: precision"] == pytest.approx(1 / 2) and metrics["AV Matching: recall"] == 1
    assert metrics["ROUGE-L"] == pytest.approx(0.3773196) and metrics["BLEU-4"] == 0
    robust = with_answers(output, said, "robust").metrics
    assert robust["yes/no: accuracy"] == pytest.approx(3 / 6)  # "The answer is no." is one
    written = {row.policy: row.metrics for row in read_results(output / "results.json").rows}
    assert set(written) == {"full", "control", "control_audio_evicted", "control_video_evicted", "keydiff"}
    assert all(list(one) == list(metrics) for one in written.values())
    assert written["full"]["yes/no: precision"] is None  # the embedded model never says yes
    for text in ((output / "console.txt").read_text(), (output / "report.html").read_text()):
        assert all(name in text for name in ("BLEU-4", "ROUGE-L", "CIDEr", "yes/no: F1", "AV Matching: recall"))


def test_scores_of_captions_are_those_of_coco() -> None:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    records = list(answered("avsd").values())
    texts = ["i hear no audio in there", "he sits on the sofa"]
    right = {place: list(record.references) for place, record in enumerate(records)}
    given = {place: [text] for place, text in enumerate(texts)}
    # These references and answers are of words and blanks alone but for full stops and commas.
    right = {place: [" ".join(t.replace(",", "").replace(".", "").split()) for t in ts] for place, ts in right.items()}
    scores = corpus_scores(records, texts, "official")
    bleu = Bleu(4).compute_score(right, given, verbose=0)[0][3]
    assert bleu > 0.1 and scores["BLEU-4"] == pytest.approx(bleu, abs=1e-5)
    assert scores["CIDEr"] == pytest.approx(Cider().compute_score(right, given)[0], abs=1e-5)
    assert scores["ROUGE-L"] == pytest.approx(sum(rouge_l(texts[i], right[i]) for i in (0, 1)) / 2)


@pytest.mark.parametrize(
    ("options", "entries"),
    [
        ({"video": "omnibench/mm_data/image/1_24.png"}, 9),
        ({"video": "daily_omni/Videos/Ec_lQgZ9wlg/Ec_lQgZ9wlg_audio.wav"}, 2),  # 0.3 s
        ({"video": "omnibench/mm_data/image/1_24.png", "audio": "omnibench/mm_data/audio/1_24.mp3"}, 17),
        ({"video": "avhbench/videos/01162.mp4", "audio": "custom/clips/dog.mp4"}, 34),  # it has no sound of its own
        ({"video": "mvbench/video/star/Charades_v1_480/ZS9XR.mp4", "start": 0.5, "end": 1.5}, 17),
    ],
)
def test_ask_takes_pictures_sounds_and_seconds(
    options: dict[str, Any], entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """9 entries a second of pictures, 8 a second of sound."""
    monkeypatch.setattr("lightning_modules.cli.ask.load_model", loaded)
    files: dict[str, Any] = {
        name: str(FIXTURES / value) if isinstance(value, str) else value for name, value in options.items()
    }
    asked = AskOptions(question="What is it?", ratio=0.5, max_new_tokens=3, accelerator="cpu", **files)
    full, compressed = run_ask(asked, Console(file=io.StringIO(), width=120))
    assert full.entries == entries and compressed.entries == pytest.approx(entries / 2, abs=0.51)
