"""The limit of an answer comes from the right answers, and answers that it ended are told apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from acckv.data.records import Protocol, Record
from acckv.evaluation.answer_limits import answer_limits, longest_references
from acckv.evaluation.results import read_results
from acckv.models import load_processor
from lightning_modules.cli.ask import AskOptions, run_ask
from lightning_modules.evaluation.datamodule import EvaluationData
from lightning_modules.evaluation.options import EvaluationOptions
from tests.data.media_files import burst, write_video
from tests.evaluation.runs import predictions, recorder, run

LEAST = {"word": 4, "description": 40}


def record(answer: str, protocol: Protocol = "word", references: tuple[str, ...] = ()) -> Record:
    return Record(answer, Path("a.mp4"), None, "?", None, answer, (), protocol, references)


def digits() -> PreTrainedTokenizerFast:
    """A tokenizer that writes a number digit by digit, as Llama's does, and a blank before a word on its own."""
    words = {word: place for place, word in enumerate(["<unk>", " ", *"0123456789", "red"])}
    tokenizer = Tokenizer(models.WordLevel(words, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(r" ", "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [tokenizer.pre_tokenizer, pre_tokenizers.Digits(individual_digits=True)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def test_the_longest_right_answer_fits() -> None:
    """A four-digit number is four tokens, one more after a blank, and one ends it: six, where four were allowed."""
    records = [record("red"), record("1984"), record("red 7 7", "text", ("red 7 7", "red red red 12"))]
    longest = longest_references(records, digits())
    assert longest == {"word": 6, "text": 10}
    assert answer_limits(longest, {**LEAST, "text": 64}, None, None) == {"word": 6, "text": 64}
    assert answer_limits(longest, {**LEAST, "text": 8}, None, None) == {"word": 6, "text": 10}
    assert answer_limits(longest, {**LEAST, "text": 8}, 2, 5) == {"word": 2, "text": 5}
    assert answer_limits(longest_references([record("red")], digits()), LEAST, None, None) == {"word": 4}


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    write_video(folder / "a.mp4", [k / 2 for k in range(8)], [90] * 8, burst(4, 1.5)[None])
    lines = [
        {"video": "a.mp4", "question": "What colour was the ring?", "answer": "red " * 70, "protocol": "description"},
        {"video": "a.mp4", "question": "What colour was the circle?", "answer": "red"},
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def evaluate(questions: Path, output: Path, **changes: Any) -> tuple[list[dict[str, Any]], str]:
    data = EvaluationData(benchmark="custom", root=str(questions))
    options: dict[str, Any] = {"policies": "full", "ratios": 0.5, "timelines": 0, "accelerator": "cpu"}
    _, printed = run(EvaluationOptions(data=data, output=str(output), **{**options, **changes}))
    return predictions(output), printed


@pytest.mark.parametrize("when", ["context", "prompt"])
def test_cut_answers_are_counted_and_named(questions: Path, tmp_path: Path, when: str) -> None:
    whole, _ = evaluate(questions, tmp_path / "whole", when=when)
    options = json.loads((tmp_path / "whole" / "run.json").read_text())["options"]
    assert options["max_new_tokens"] == {"description": 71, "word": 64}, "70 words and the end; the benchmark's own"
    few, text = evaluate(questions, tmp_path / "few", when=when, word_tokens=1, description_tokens=2)
    tokenizer = load_processor("tiny").tokenizer
    for one, other in zip(whole, few, strict=True):
        limit = 1 if one["protocol"] == "word" else 2
        tokens = tokenizer(one["prediction"], add_special_tokens=False)["input_ids"]
        assert not one["cut"] or len(tokens) >= 64
        assert other["cut"] == (len(tokens) + 1 > limit)
    rows = read_results(tmp_path / "few" / "results.json").rows
    for row in rows:
        mine = [line for line in few if (line["policy"], line["ratio"]) == (row.policy, row.ratio)]
        assert row.cut == sum(line["cut"] for line in mine)
    assert any(row.cut for row in rows)
    assert "answers are cut at 2 tokens (description_tokens); the longest right one has 71" in text
    assert "answers that the limit of tokens ended" in text


def test_ask_says_that_an_answer_is_cut(questions: Path) -> None:
    for limit, cut in ((1, True), (40, False)):
        console = recorder()
        question = "What colour was the ring?"
        options = AskOptions(str(questions / "a.mp4"), question, max_new_tokens=limit, accelerator="cpu")
        assert run_ask(options, console)[0].cut is cut
        assert ("(cut: --max_new_tokens 1)" in console.export_text()) is cut
