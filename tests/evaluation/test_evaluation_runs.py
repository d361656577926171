"""Whole evaluations: benchmarks by name, cut off and resumed, shared out, with broken clips."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, get_args

import pytest
from rich.console import Console

from acckv.benchmarks import Mode, judge, load_benchmark
from acckv.benchmarks.judging import ALL_OFFICIAL, ALL_ROBUST
from acckv.data.synthetic.clips import video_folder, write_clips
from acckv.errors import InputError
from acckv.evaluation.results import CONTROLS, read_results
from lightning_modules.evaluation.datamodule import EvaluationData, Shard
from lightning_modules.evaluation.options import EvaluationOptions
from lightning_modules.evaluation.run import merge_evaluations
from tests.evaluation.runs import CLIPS, QUESTIONS, predictions, run
from tests.paths import ROOT

FILES = ("results.json", "predictions.jsonl", "failures.json")


def options(benchmark: Path, output: Path, **changes: Any) -> EvaluationOptions:
    given: dict[str, Any] = {
        "policies": "random,keydiff",
        "ratios": [0.2],
        "output": str(output),
        "batch_size": 2,
        "timelines": 0,
        "accelerator": "cpu",
        "data": EvaluationData(benchmark="custom", root=str(benchmark)),
    }
    return EvaluationOptions(**{**given, **changes})


def arguments(benchmark: Path, output: Path) -> list[str]:
    """The command line of `options`."""
    script = [sys.executable, str(ROOT / "evaluate.py"), "--policies", "random,keydiff", "--ratios", "0.2"]
    data = ["--data.benchmark", "custom", "--data.root", str(benchmark)]
    return [*script, *data, "--output", str(output), "--batch_size", "2", "--accelerator", "cpu"]


def assert_same(one: Path, other: Path) -> None:
    for name in FILES:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.fixture(scope="module")
def whole(benchmark: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of an evaluation that nothing disturbed."""
    output = tmp_path_factory.mktemp("whole")
    run(options(benchmark, output))
    return output


@pytest.fixture
def cut(whole: Path, tmp_path: Path) -> Path:
    """The output folder as a kill leaves it: one batch of three is done, of the next there is half a line."""
    output = tmp_path / "cut"
    output.mkdir()
    shutil.copy(whole / "run.json", output)
    first, second, _ = (whole / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (output / "journal.jsonl").write_bytes(first + second[: len(second) // 2])
    return output


# ------------------------------------------------------------------ benchmarks


def test_a_benchmark_is_scored_by_both_parsers(benchmark: Path, whole: Path) -> None:
    records = {record.id: record for record in load_benchmark("custom", benchmark)}
    results = read_results(whole / "results.json")
    assert results.benchmark == "custom/test"
    assert (results.score, results.clips, results.failed_clips) == ("official", CLIPS, 0)
    for row in results.rows:
        own = [line for line in predictions(whole) if (line["policy"], line["ratio"]) == (row.policy, row.ratio)]
        assert {line["id"] for line in own} == set(records) and row.n == len(own) == CLIPS * QUESTIONS
        for name, mode in zip((ALL_OFFICIAL, ALL_ROBUST), get_args(Mode), strict=True):
            verdicts = [judge("custom", records[line["id"]], line["prediction"], mode) for line in own]
            assert [line[mode] for line in own] == [verdict.score for verdict in verdicts]
            assert row.groups[name].accuracy == pytest.approx(sum(v.score for v in verdicts) / len(verdicts))
        assert row.accuracy == pytest.approx(row.groups[ALL_OFFICIAL].accuracy)
        assert row.groups["unparsed"].n == sum(not line["parsed"] for line in own)
        assert row.groups["Audio-Visual"].n == sum("Audio-Visual" in line["groups"] for line in own)
    assert results.rows[0].accuracy > 0.9


def test_finished_answers_are_scored_anew_by_the_other_parser(benchmark: Path, whole: Path, tmp_path: Path) -> None:
    """Answers in sentences are right for the robust parser alone; nothing is answered again for it."""
    for name in ("run.json", "journal.jsonl"):
        shutil.copy(whole / name, tmp_path)
    batches = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    for answer in (answer for batch in batches for answer in batch["answers"]):
        answer["prediction"] = f"it is {answer['prediction']}"
    (tmp_path / "journal.jsonl").write_text("".join(json.dumps(batch) + "\n" for batch in batches))
    robust, _ = run(options(benchmark, tmp_path, score="robust"))
    official, _ = run(options(benchmark, tmp_path))
    assert official.rows[0].accuracy == 0 and robust.rows[0].accuracy > 0.9
    assert official.rows[0].groups[ALL_ROBUST] == robust.rows[0].groups[ALL_ROBUST]
    assert robust.rows[0].groups[ALL_OFFICIAL].accuracy == 0 and robust.score == "robust"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"benchmark": "music_avqa"}, "data.root: is missing"),
        ({"benchmark": "nothing", "root": "."}, "benchmark: 'nothing' is not one of"),
        ({"root": "."}, "data.root: is of use only together with data.benchmark"),
        ({"benchmark": "music_avqa", "root": ".", "question_file": "x.json"}, "question_file: cannot be combined"),
        ({"split": "tset"}, "data.split: 'tset' is not one of train, validation, test"),
    ],
)
def test_data_options_that_do_not_fit(data: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        EvaluationData(**data).records()


# ------------------------------------------------------------------ cut off, and shared out


def test_what_was_finished_before_a_kill_is_not_answered_again(benchmark: Path, whole: Path, cut: Path) -> None:
    run(options(benchmark, cut))
    assert_same(whole, cut)
    assert (cut / "journal.jsonl").read_bytes() == (whole / "journal.jsonl").read_bytes()


def test_the_journal_is_what_results_are_made_of(benchmark: Path, whole: Path, cut: Path) -> None:
    """A mark in the finished batch comes through: it was not answered again."""
    marked = (cut / "journal.jsonl").read_bytes().replace(b'"prediction": "', b'"prediction": "MARK ', 1)
    (cut / "journal.jsonl").write_bytes(marked)
    run(options(benchmark, cut))
    before, after = predictions(whole), predictions(cut)
    changed = [one["id"] for one, other in zip(before, after, strict=True) if one["prediction"] != other["prediction"]]
    assert len(changed) == 1 and after[0]["prediction"].startswith("MARK ")


def test_decoded_clips_are_kept_between_evaluations(
    benchmark: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = EvaluationData(benchmark="custom", root=str(benchmark), media_cache=str(tmp_path / "media"))
    given: dict[str, Any] = {"data": data, "policies": "full", "limit": 2}
    run(options(benchmark, tmp_path / "first", **given))
    assert len(list((tmp_path / "media").iterdir())) == 2

    def decode(*_: object, **__: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr("acckv.data.media_cache.read_record_media", decode)
    run(options(benchmark, tmp_path / "second", **given))
    assert_same(tmp_path / "first", tmp_path / "second")


def test_a_changed_clip_has_its_batch_answered_again(benchmark: Path, whole: Path, tmp_path: Path) -> None:
    for name in ("run.json", "journal.jsonl"):
        shutil.copy(whole / name, tmp_path)
    marked = (tmp_path / "journal.jsonl").read_bytes().replace(b'"prediction": "', b'"prediction": "MARK ')
    (tmp_path / "journal.jsonl").write_bytes(marked)
    os.utime(sorted((benchmark / "videos").iterdir())[0])
    run(options(benchmark, tmp_path))
    kept = {line["clip"] for line in predictions(tmp_path) if line["prediction"].startswith("MARK ")}
    assert kept == {2, 3, 4}


def test_a_folder_with_other_settings_is_not_mixed_with(benchmark: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "eval"
    shutil.copytree(whole, output)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"seed": 1}, "seed: 0 instead of 1, compressor weights"),
        ({"ratios": [0.1]}, "policies and ratios"),
        ({"limit": 1}, "clips: 5 instead of 1, questions"),
        ({"batch_size": 3}, "batch_size: 2 instead of 3"),
    ]
    for changes, named in cases:
        with pytest.raises(InputError) as caught:
            run(options(benchmark, output, **changes))
        assert str(output) in str(caught.value) and f"({named})" in str(caught.value)
        assert "--overwrite true" in str(caught.value)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    results, _ = run(options(benchmark, output, limit=1, overwrite=True))
    assert results.rows[0].n == QUESTIONS and len((output / "journal.jsonl").read_text().splitlines()) == 1


def test_a_damaged_journal_is_named(benchmark: Path, cut: Path) -> None:
    whole_line = (cut / "journal.jsonl").read_bytes().splitlines(keepends=True)[0]
    for broken in (b"\0" * 20 + b"\n", whole_line.replace(b'"number": 0', b'"number": 2')):
        (cut / "journal.jsonl").write_bytes(whole_line + broken)
        with pytest.raises(InputError, match=r"journal.jsonl: line 2 is damaged"):
            run(options(benchmark, cut))


def test_shards_joined_give_what_one_machine_gives(benchmark: Path, whole: Path, tmp_path: Path) -> None:
    parts = [str(tmp_path / str(part)) for part in (1, 2)]
    _, text = run(options(benchmark, Path(parts[0]), shard="1/2"))
    assert "part 1/2 is answered, 2 of 3 batches" in text
    assert not (Path(parts[0]) / "results.json").exists()
    with pytest.raises(InputError, match=r"1 of 3 batches are in no folder \(1\)"):
        merge_evaluations(parts[:1], str(tmp_path / "joint"))
    run(options(benchmark, Path(parts[1]), shard="2/2"))
    quiet = Console(quiet=True)
    merge_evaluations(parts, str(tmp_path / "joint"), console=quiet)
    assert_same(whole, tmp_path / "joint")
    run(options(benchmark, Path(parts[1]), seed=3, shard="2/2", overwrite=True))
    with pytest.raises(InputError, match=r"other settings than .* \(seed: 3 instead of 0"):
        merge_evaluations(parts, str(tmp_path / "joint"), console=quiet)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_every_batch_is_answered_once(count: int, world_size: int) -> None:
    shares = [
        Shard(index, count).share(range(7), rank, world_size) for index in range(count) for rank in range(world_size)
    ]
    assert sorted(number for share in shares for number in share) == list(range(7))


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "-1/2"])
def test_a_shard_is_a_part_of_a_whole(text: str) -> None:
    with pytest.raises(InputError, match="shard"):
        EvaluationOptions(shard=text)


@pytest.mark.slow
def test_two_processes_give_what_one_gives(benchmark: Path, whole: Path, tmp_path: Path) -> None:
    """Three batches over two processes; neither fills up its share."""
    command = [*arguments(benchmark, tmp_path), "--devices", "2"]
    done = subprocess.run(command, env=_one_thread(), cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert_same(whole, tmp_path)
    numbers = [[json.loads(line)["number"] for line in (tmp_path / f"journal{n}.jsonl").open()] for n in ("", "-1")]
    assert numbers == [[0, 2], [1]]


@pytest.mark.slow
def test_a_killed_evaluation_goes_on(benchmark: Path, whole: Path, tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    process = subprocess.Popen(arguments(benchmark, tmp_path), env=_one_thread(), cwd=ROOT)
    while not (journal.exists() and journal.read_bytes()):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 1 <= journal.read_bytes().count(b"\n") < 3 and not (tmp_path / "results.json").exists()
    run(options(benchmark, tmp_path))
    assert_same(whole, tmp_path)


def _one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


# ------------------------------------------------------------------ broken clips


def test_a_broken_clip_is_counted_and_listed_and_asked_once_it_is_mended(
    benchmark: Path, whole: Path, tmp_path: Path
) -> None:
    root, output = tmp_path / "benchmark", tmp_path / "eval"
    shutil.copytree(benchmark, root)
    broken = root / "videos" / sorted(path.name for path in (root / "videos").iterdir())[1]
    content = broken.read_bytes()
    broken.write_bytes(b"not a clip")
    with pytest.raises(InputError, match=str(broken)):
        run(options(root, output, strict=True))
    results, text = run(options(root, output))
    assert [row.n for row in results.rows] == [(CLIPS - 1) * QUESTIONS] * (len(CONTROLS) + 3)
    assert (results.clips, results.failed_clips, results.failed_questions) == (CLIPS - 1, 1, QUESTIONS)
    assert f"1 of {CLIPS} clips could not be read; their {QUESTIONS} questions are in no accuracy" in text
    failure = json.loads((output / "failures.json").read_text())
    assert [set(entry) for entry in failure] == [{"clip", "error"}]
    assert failure[0]["clip"] == str(broken) and str(broken) in failure[0]["error"] and str(broken) in text
    assert {line["clip"] for line in predictions(output)} == {0, 2, 3, 4}
    broken.write_bytes(content)
    run(options(root, output))
    assert_same(whole, output)


def test_a_clip_that_the_processor_refuses_is_listed_too(tmp_path: Path) -> None:
    """Its sound is longer than the feature extractor takes; the other clip of its batch is answered all the same."""
    file = write_clips(tmp_path / "short", "test", 2, questions_per_clip=1, workers=1, progress=False)
    long = write_clips(tmp_path / "long", "test", 1, slots=66, questions_per_clip=1, workers=1, progress=False)
    first, second = sorted(video_folder(file).iterdir())
    shutil.copy(next(video_folder(long).iterdir()), first)
    data = EvaluationData(question_file=str(file), video_root=str(video_folder(file)))
    for when in ("context", "prompt"):
        results, text = run(options(tmp_path, tmp_path / when, policies="full", data=data, when=when, word_tokens=2))
        assert results.failed_clips == 1 and {line["video"] for line in predictions(tmp_path / when)} == {second.name}
        assert "with cut_long to take the beginning" in text


def test_no_readable_clip_is_an_error(benchmark: Path, tmp_path: Path) -> None:
    shutil.copytree(benchmark, tmp_path / "benchmark")
    for video in (tmp_path / "benchmark" / "videos").iterdir():
        video.write_bytes(b"")
    with pytest.raises(InputError, match="not one of 5 clips could be read"):
        run(options(tmp_path / "benchmark", tmp_path / "eval"))
    assert not (tmp_path / "eval" / "results.json").exists()
