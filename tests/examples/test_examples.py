"""The examples do what they say: a policy, a family and a benchmark of one's own, in Python and on the command line."""

from __future__ import annotations

import csv
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from acckv import InputError, KVCompressor
from acckv.benchmarks import BENCHMARKS, load_benchmark, score
from acckv.data.encoding import encode, encode_context, question_suffix
from acckv.data.media import read_record_media
from acckv.evaluation.results import read_predictions, read_results
from acckv.io.registry import load_plugins
from acckv.method.modality import ModalityMap
from acckv.method.scoring import Observation
from acckv.models import FAMILIES, load_model
from acckv.policies import POLICIES, make_policy
from tests.cli.test_configs import run_script
from tests.paths import ROOT
from tests.repository.pages import blocks

EXAMPLES = ("my_policy", "my_family", "my_benchmark")
PAGE = ROOT / "docs" / "extending.md"
FILES = [str(ROOT / "examples" / f"{name}.py") for name in EXAMPLES]


@pytest.fixture(scope="module", autouse=True)
def examples() -> Iterator[dict[str, Any]]:
    """The examples' modules; other tests find the registries as they were."""
    registries: list[Any] = [POLICIES, FAMILIES, BENCHMARKS]
    path, kept = [*sys.path], [(one, dict(one), dict(one._origins)) for one in registries]
    load_plugins(FILES)
    yield {name: importlib.import_module(name) for name in EXAMPLES}
    sys.path[:] = path
    for registry, items, origins in kept:
        registry._items, registry._origins = items, origins
    for name in EXAMPLES:
        del sys.modules[name]


@pytest.fixture(scope="module")
def questions(examples: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("questions")
    examples["my_benchmark"].write_folder(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(examples: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    examples["my_family"].write_checkpoint(str(folder))
    return folder


def test_the_policy_scores_by_attention_times_the_size_of_the_value() -> None:
    torch.manual_seed(0)
    entries, queries = 6, 2
    observation = Observation(
        queries=torch.randn(1, 1, queries, 4),
        keys=torch.randn(1, 1, entries, 4),
        values=torch.randn(1, 1, entries, 4),
        query_positions=torch.tensor([[4, 5]]),
        query_valid=torch.ones(1, queries, dtype=torch.bool),
        real=torch.ones(1, entries, dtype=torch.bool),
        scaling=0.5,
    )
    labels = ModalityMap(torch.tensor([[1, 1, 1, 2, 2, 0]]))
    found = make_policy({"class_path": "value_aware", "init_args": {"power": 2.0}}).score(0, observation, labels).score
    expected = torch.zeros(entries)
    for query, position in zip(observation.queries[0, 0], (4, 5), strict=True):
        logits = 0.5 * observation.keys[0, 0, : position + 1] @ query
        expected[: position + 1] += logits.exp() / logits.exp().sum()
    expected *= observation.values[0, 0].abs().sum(-1) ** 2
    torch.testing.assert_close(found[0, 0] / found.sum(), expected / expected.sum())
    with pytest.raises(InputError, match="power: 5"):
        make_policy({"class_path": "value_aware", "init_args": {"power": 5.0}})


def test_the_family_answers_from_the_whole_cache_as_its_model_does(checkpoint: Path, questions: Path) -> None:
    model: Any
    model, processor = load_model(checkpoint)
    record = load_benchmark("my_questions", questions)[0]
    with pytest.warns(UserWarning, match="the sound of clips is left out"):
        clip = read_record_media(record)
        inputs = encode(processor, [clip], [record.question])
        context = encode_context(processor, clip)
    suffix = question_suffix(processor, record.question)
    assert torch.equal(torch.cat([context["input_ids"][0], suffix]), inputs["input_ids"][0])
    limit: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with KVCompressor("value_aware")(model, processor) as session:
        prefill = session.prefill(**context)
        whole = session.answer(session.compress(prefill, ratio=1.0), suffix[None], **limit)
        small = session.compress(prefill, ratio=0.25)
    expected = model.generate(**inputs, **limit)[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(whole, expected)
    media = int((context["input_ids"] == model.config.video_token_id).sum())
    assert small.kept_entries().sum(-1).float().mean() == pytest.approx(round(0.25 * media), abs=1)


def test_the_benchmark_reads_its_table_and_scores_by_its_rule(questions: Path, tmp_path: Path) -> None:
    with (questions / "test.csv").open() as table:
        rows = list(csv.DictReader(table))
    records = load_benchmark("My questions", questions, "test")
    assert [(record.id, record.question, record.answer) for record in records] == [
        (row["id"], row["question"], row["answer"]) for row in rows
    ]
    assert all(record.video.is_file() for record in records)
    one, kind = records[0], records[0].groups[0]
    assert {record.groups for record in load_benchmark("my_questions", questions, subset=kind)} == {(kind,)}
    said = {one.answer.upper(): (1.0, 1.0), f"It is {one.answer}": (0.0, 1.0), "": (0.0, 0.0)}
    for answer, expected in said.items():
        assert tuple(score("my_questions", one, answer, mode) for mode in ("official", "robust")) == expected
    (tmp_path / "train.csv").write_text("id,clip,kind,question,answer\n1,a.mp4,shape,Which?,\n")
    with pytest.raises(InputError, match=r"train\.csv: row 1, answer: missing"):
        load_benchmark("my_questions", tmp_path, "train")


def test_all_three_on_the_command_line(
    checkpoint: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--plugins", ",".join(FILES), "--model", checkpoint, "--data.benchmark", "my_questions"]
    arguments += ["--data.root", questions, "--policies", "value_aware", "--ratios", "0.25", "--accelerator", "cpu"]
    arguments += ["--batch_size", "1", "--timelines", "0", "--limit", "1", "--output", tmp_path]
    with pytest.warns(UserWarning, match="the sound of clips is left out"):
        assert run_script(monkeypatch, "evaluate.py", *arguments) == 0
    results = read_results(tmp_path / "results.json")
    row, full = results.row("value_aware", 0.25), results.full
    assert results.benchmark == "My questions/test" and row is not None and full is not None
    assert row.kept_entries == pytest.approx(0.25 * full.kept_entries, abs=1)
    answers = list(read_predictions(tmp_path / "predictions.jsonl"))
    right = {record.id: record.answer for record in load_benchmark("my_questions", questions)}
    for answer in answers:
        assert answer.official == float(answer.prediction.lower().split()[:1] == [right[answer.id]])


def test_the_page_shows_the_examples_as_they_are() -> None:
    shown = {
        block.title.partition(" ")[0]: block.code for block in blocks(PAGE, "python") if " of its own)" in block.title
    }
    assert set(shown) == {f"{name}.py" for name in EXAMPLES}
    for name, code in shown.items():
        assert code in (ROOT / "examples" / name).read_text(encoding="utf-8"), name
