"""The evaluation from clips to files, against plain generate and against its own predictions."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from acckv import InputError, KVCompressor
from acckv.benchmarks.judging import Judge, answer_vocabulary
from acckv.benchmarks.music_avqa_questions import load_music_avqa
from acckv.data.asked_questions import AskedQuestions, Coverage
from acckv.data.synthetic.clips import video_folder, write_clips
from acckv.evaluation.results import Results, Setting, read_results, with_heads
from acckv.evaluation.timeline import load_timelines
from acckv.models import find_adapter, load_model
from acckv.report.run_record import read_run
from lightning_modules.evaluation.datamodule import EvaluationData
from lightning_modules.evaluation.options import EvaluationOptions, build_compressors
from tests.evaluation.runs import generated, predictions, run
from tests.learned import calibrated

CLIPS = 3
RATIOS = [1.0, 0.2, 0.05, 0.0]
LIMITS = {"word": 4, "description": 8}
Tiny = tuple[Any, Any]
"""The model and its processor."""
Evaluated = tuple[Path, Results, str]
"""The output folder, the results, and what was printed."""


@pytest.fixture(scope="module")
def question_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three generated clips; the last has lost its sound track, the second two of its questions."""
    root = tmp_path_factory.mktemp("clips")
    file = write_clips(root / "sound", "test", CLIPS, questions_per_clip=4, workers=1, progress=False)
    mute = write_clips(root / "mute", "test", CLIPS, questions_per_clip=4, sound="none", workers=1, progress=False)
    last = sorted(video_folder(file).iterdir())[-1]
    shutil.copy(video_folder(mute) / last.name, last)
    rows = json.loads(file.read_text())
    second = sorted({row["video_id"] for row in rows})[1]
    for row in [row for row in rows if row["video_id"] == second][:2]:
        row["question_deleted"] = 1
    changed = file.with_name("changed.json")
    changed.write_text(json.dumps(rows))
    return changed


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    return load_model("tiny")


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny) -> Path:
    """A calibrated compressor with weights that are not those it starts from, which was asked about pitches alone."""
    folder = tmp_path_factory.mktemp("calib") / "export"
    compressor = calibrated(tiny[0], noise=0.3)
    compressor.asked = AskedQuestions(
        {"pitch": [f"What pitch was the {sound}?" for sound in ("beep", "hiss", "knock")]}
    )
    compressor.save_pretrained(folder)
    return folder


def _options(question_file: Path, export: Path, output: Path, **changes: Any) -> EvaluationOptions:
    options: dict[str, Any] = {
        "compressor": str(export),
        "policies": "random,snapkv,acckv-calibrated",
        "ratios": RATIOS,
        "output": str(output),
        "batch_size": 2,
        "description_tokens": 8,
        "accelerator": "cpu",
        "data": EvaluationData(question_file=str(question_file), video_root=str(question_file.parent / "videos")),
    }
    return EvaluationOptions(**{**options, **changes})


@pytest.fixture(scope="module")
def evaluated(question_file: Path, export: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    output = tmp_path_factory.mktemp("eval")
    return output, *run(_options(question_file, export, output), command="python evaluate.py")


def _by_cell(output: Path) -> dict[tuple[str, float], dict[str, dict[str, Any]]]:
    cells: dict[tuple[str, float], dict[str, dict[str, Any]]] = defaultdict(dict)
    for line in predictions(output):
        cells[line["policy"], line["ratio"]][line["id"]] = line
    return cells


def test_every_policy_at_every_ratio_on_the_same_questions(evaluated: Evaluated, question_file: Path) -> None:
    output, results, _ = evaluated
    records = load_music_avqa(question_file, question_file.parent / "videos")
    assert len(records) == 3 * (4 + 3) - 2
    expected = [("full", 1.0), ("control", 0.0), ("control_audio_evicted", 0.0), ("control_video_evicted", 0.0)]
    expected += [(policy, ratio) for policy in ("random", "snapkv") for ratio in RATIOS[:-1]]
    expected += [("acckv-calibrated", ratio) for ratio in RATIOS]
    assert [(row.policy, row.ratio) for row in results.rows] == expected
    assert all(row.n == len(records) for row in results.rows)
    cells = _by_cell(output)
    assert set(cells) == set(expected)
    assert all(set(lines) == {record.id for record in records} for lines in cells.values())
    assert read_results(output / "results.json") == results


def test_the_full_cache_answers_as_plain_generate(evaluated: Evaluated, question_file: Path, tiny: Tiny) -> None:
    lines = _by_cell(evaluated[0])["full", 1.0]
    for record in load_music_avqa(question_file, question_file.parent / "videos"):
        assert lines[record.id]["prediction"] == generated(*tiny, record, LIMITS[record.protocol])


def test_a_compressed_cache_answers_as_generate_inside_the_context(
    evaluated: Evaluated, question_file: Path, tiny: Tiny
) -> None:
    lines = _by_cell(evaluated[0])["snapkv", 0.2]
    records = load_music_avqa(question_file, question_file.parent / "videos")
    for record in [records[0], records[6], records[-1]]:
        with KVCompressor("snapkv", when="context", ratio=0.2)(*tiny):
            assert lines[record.id]["prediction"] == generated(*tiny, record, LIMITS[record.protocol])


def test_ratio_one_changes_no_answer(evaluated: Evaluated) -> None:
    cells = _by_cell(evaluated[0])
    full = {key: line["prediction"] for key, line in cells["full", 1.0].items()}
    for policy in ("random", "snapkv", "acckv-calibrated"):
        assert {key: line["prediction"] for key, line in cells[policy, 1.0].items()} == full


def test_kept_entries_are_exact(evaluated: Evaluated, tiny: Tiny) -> None:
    _, results, _ = evaluated
    layers = find_adapter(tiny[0]).dimensions["layers"]
    for row in results.rows:
        if row.policy.endswith("_evicted"):
            continue
        budget = row.ratio * row.full_entries
        assert budget - 1.0 - 1.0 / layers <= row.kept_entries <= budget + 1e-6, (row.policy, row.ratio)
    sizes = {ratio: {row.kept_entries for row in results.rows if row.ratio == ratio} for ratio in (0.2, 0.05)}
    assert all(len(kept) == 1 for kept in sizes.values()), "two methods at one ratio hold the same number of entries"
    full, control = results.full, results.control
    assert full is not None
    assert control is not None
    assert control.kept_entries == 0
    # Two of the clips hold 144 video and 128 audio entries, one has no sound.
    assert full.full_entries == pytest.approx((272 + 272 + 144) / 3)
    assert 0 < control.kv_bytes < 0.1 * full.kv_bytes
    halves = [results.row(f"control_{name}_evicted", 0.0) for name in ("audio", "video")]
    assert [row.kept_entries for row in halves if row is not None] == [144, pytest.approx(128 * 2 / 3, abs=1e-4)]


def test_accuracies_are_those_of_the_predictions(evaluated: Evaluated, question_file: Path) -> None:
    output, results, _ = evaluated
    records = {record.id: record for record in load_music_avqa(question_file, question_file.parent / "videos")}
    judge = Judge(None, answer_vocabulary(records.values()), "robust")
    cells = _by_cell(output)
    for row in results.rows:
        lines = cells[row.policy, row.ratio]
        scores = {key: judge(records[key], line["prediction"]) for key, line in lines.items()}
        assert {key: score.score for key, score in scores.items()} == {k: line["score"] for k, line in lines.items()}
        assert row.accuracy == pytest.approx(sum(s.score for s in scores.values()) / len(scores), abs=1e-6)
        assert row.ci95[0] <= row.accuracy <= row.ci95[1]
        for name, group in row.groups.items():
            inside = [scores[key].score for key in scores if name in judge.groups(records[key])]
            if inside:
                assert group.n == len(inside)
                assert group.accuracy == pytest.approx(sum(inside) / len(inside), abs=1e-6)
        official = [score.official for score in scores.values() if score.official is not None]
        assert row.groups["single questions, official parser"].n == len(official)
        assert row.groups["unparsed"].n == sum(not score.parsed for score in scores.values())


def test_batching_changes_no_answer(evaluated: Evaluated, question_file: Path, export: Path, tmp_path: Path) -> None:
    # The first two clips were answered together, the third alone.
    options = _options(
        question_file, export, tmp_path, batch_size=1, limit=2, policies="snapkv", ratios=0.2, timelines=0
    )
    run(options)
    alone, together = _by_cell(tmp_path), _by_cell(evaluated[0])
    for cell, lines in alone.items():
        assert len(lines) == 2 * 7 - 2
        assert {k: line["prediction"] for k, line in lines.items()} == {
            k: together[cell][k]["prediction"] for k in lines
        }


def test_limit_takes_whole_clips(question_file: Path, export: Path, tmp_path: Path) -> None:
    options = _options(question_file, export, tmp_path, limit=1, policies="full", update_card=False)
    results, _ = run(options)
    assert [(row.policy, row.n) for row in results.rows] == [
        *(("full", 7), ("control", 7), ("control_audio_evicted", 7), ("control_video_evicted", 7))
    ]
    assert {line["clip"] for line in predictions(tmp_path)} == {0}


def test_report_files_and_card(evaluated: Evaluated, export: Path) -> None:
    output, results, text = evaluated
    assert {path.name for path in output.iterdir()} == {
        *("results.json", "predictions.jsonl", "failures.json", "pareto.png", "budgets.png"),
        *("run.json", "journal.jsonl"),
        *("report.json", "timelines.safetensors", "report.html"),
    }
    assert (output / "pareto.png").read_bytes().startswith(b"\x89PNG")
    card = (export / "README.md").read_text()
    assert "python evaluate.py" in card
    row = results.row("acckv-calibrated", 0.05)
    assert row is not None
    assert f"| acckv-calibrated | 0.05 | {row.accuracy:.1%} |" in card
    assert "acckv-calibrated against" in text
    assert "control*" in text


def test_questions_outside_of_the_calibration_are_counted_and_warned_of(
    evaluated: Evaluated, question_file: Path, export: Path
) -> None:
    output, results, text = evaluated
    asked = [record.question for record in load_music_avqa(question_file, question_file.parent / "videos")]
    outside = [question for question in asked if not question.startswith("What pitch was the")]
    assert 0 < len(outside) < len(asked)
    assert results.coverage == Coverage(len(asked), len(outside), list(dict.fromkeys(outside))[:2])
    line = f"warning: {len(outside)} of {len(asked)} questions lie outside what the export was calibrated for, such as"
    assert line in text and line in (export / "README.md").read_text() and line in (output / "report.html").read_text()


def test_report_says_what_was_measured(evaluated: Evaluated) -> None:
    output, results, _ = evaluated
    record = read_run(output / "report.json")
    assert record.command == "python evaluate.py"
    cells = [(name, ratio) for name in ("random", "snapkv", "acckv-calibrated") for ratio in (0.2, 0.05)]
    assert [(budget.policy, budget.ratio) for budget in record.budgets] == cells
    for budget in record.budgets:
        measured = results.row(budget.policy, budget.ratio)
        assert measured is not None
        assert sum(map(sum, budget.kept)) / len(budget.kept) == pytest.approx(measured.kept_entries, abs=1e-3)
    timelines = load_timelines(output / "timelines.safetensors")
    assert len({clip.clip for clip in timelines}) == CLIPS
    answers = _by_cell(output)
    for clip in timelines:
        shown = [(entries.policy, entries.ratio) for entries in clip.kept]
        assert shown == [(name, ratio) for ratio in (0.2, 0.05) for name in ("acckv-calibrated", "snapkv")]
        for entries in clip.kept:
            lines = answers[entries.policy, entries.ratio].values()
            given = [line for line in lines if (line["video"], line["question"]) == (clip.clip, clip.question)]
            assert entries.prediction in {line["prediction"] for line in given}
    assert "python evaluate.py" in (output / "report.html").read_text(encoding="utf-8")


def test_rows_name_the_budgets_of_their_heads(question_file: Path, export: Path, tmp_path: Path) -> None:
    policies, chosen = "keydiff,fastv,acckv-calibrated", {"ratios": "0.2", "head_budgets": "equal, joint"}
    options = _options(question_file, export, tmp_path, policies=policies, **chosen)
    rows = {row.policy: one.config.head_budgets for row, one in build_compressors(options).items() if row.ratio == 0.2}
    assert rows == {
        "keydiff": "equal",
        "keydiff(head_budgets=joint)": "joint",
        "fastv": "equal",  # all heads have one score
        "acckv-calibrated": "equal",
        "acckv-calibrated(head_budgets=joint)": "joint",
    }
    KVCompressor.from_pretrained(export, head_budgets="joint").save_pretrained(tmp_path / "export")
    options = _options(question_file, tmp_path / "export", tmp_path, policies=policies, ratios="0.2")
    assert {row.policy for row in build_compressors(options) if row.ratio == 0.2} == {
        "keydiff",
        "fastv",
        "acckv-calibrated(head_budgets=joint)",  # its own
    }
    assert with_heads("snapkv(window_size=64)", "joint") == "snapkv(window_size=64, head_budgets=joint)"
    with pytest.raises(InputError, match="'all' is not one of equal, joint, learned"):
        EvaluationOptions(head_budgets="joint,all")


def test_model_is_untouched_afterwards(question_file: Path, export: Path, tmp_path: Path, tiny: Tiny) -> None:
    model, _ = tiny
    before = {name: id(module) for name, module in model.named_modules()}
    keys = set(vars(find_adapter(model).decoder))
    compressors = build_compressors(_options(question_file, export, tmp_path))
    with compressors[Setting("snapkv", 0.2)](model):
        pass
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert set(vars(find_adapter(model).decoder)) == keys


@pytest.fixture(scope="module")
def after_the_prompt(question_file: Path, export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output, policies = tmp_path_factory.mktemp("prompt"), "snapkv,keydiff,acckv"
    options = _options(question_file, export, output, when="prompt", limit=2, policies=policies, ratios="0.1")
    assert run(options)[0].when == "prompt"
    return output


@pytest.mark.parametrize("policy", ["snapkv", "keydiff", "acckv"])
def test_when_prompt_answers_as_generate_inside_the_context(
    policy: str, after_the_prompt: Path, question_file: Path, tiny: Tiny
) -> None:
    lines = _by_cell(after_the_prompt)[policy, 0.1]
    records = [r for r in load_music_avqa(question_file, question_file.parent / "videos") if r.id in lines]
    assert len(records) == 12
    for record in records[::3]:
        with KVCompressor(policy, when="prompt", ratio=0.1)(*tiny):
            assert lines[record.id]["prediction"] == generated(*tiny, record, LIMITS[record.protocol])


def test_generated_clips_are_the_default(tmp_path: Path) -> None:
    data = EvaluationData(clips=2, cache_dir=str(tmp_path))
    records = data.records()
    assert {record.video.parent.parent.name for record in records} == {"test-2-seed0"}
    assert len({record.video for record in records}) == 2
    assert data.title == "generated-clips/test (2 clips, seed 0)"


@pytest.mark.parametrize("given", ["0.5, 0.2,0.5", [0.2, 0.5], "0.2,0.5"])
def test_ratios_in_any_spelling(given: list[float] | str) -> None:
    assert EvaluationOptions(ratios=given).ratio_list() == [0.5, 0.2]
    assert EvaluationOptions(ratios=0.3).ratio_list() == [0.3]
    assert list(EvaluationOptions(policies="snapkv, full,snapkv").policy_list()) == ["snapkv", "full"]
