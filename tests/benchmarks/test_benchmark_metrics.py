"""Metrics of benchmarks against hand-worked numbers, slow loops, COCO's own code, and two processes."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.spawn import start_processes

from acckv.errors import InputError
from acckv.metrics.captions import CaptionScores, caption_tokens, rouge_l
from acckv.metrics.grouped import GroupedAccuracy
from acckv.metrics.intervals import bootstrap_mean, clustered_standard_error
from acckv.metrics.yes_no import YesNoScores

AVHBENCH_ANSWERS = ["Yes, he snores.", "The answer is no.", "no", "Nobody", "YES", "yes", "a man sleeps in there"]
TEXTS = [
    ("a man sits on a bed", ["a man is sitting on the bed", "a man sits on his bed"]),
    ("the dog barks at the red car", ["a dog barks at a red car"]),
    ("no , i hear no music at all", ["no , there is no music at all", "i hear no music", "no music"]),
    ("yes", ["yes , it does ."]),
]


@given(
    items=st.lists(st.tuples(st.floats(0, 1, width=32), st.integers(-3, 3)), min_size=2, max_size=25).filter(
        lambda items: len({clip for _, clip in items}) > 1
    )
)
@settings(deadline=None, max_examples=50)
def test_clustered_standard_error_equals_the_sum_over_pairs(items: list[tuple[float, int]]) -> None:
    """The usual double sum over pairs of questions about the same video."""
    mean = sum(score for score, _ in items) / len(items)
    pairs = sum((a - mean) * (b - mean) for a, first in items for b, second in items if first == second)
    clips = len({clip for _, clip in items})
    expected = math.sqrt(max(pairs, 0) * clips / (clips - 1)) / len(items)
    scores, labels = torch.tensor([a for a, _ in items]), torch.tensor([clip for _, clip in items])
    assert clustered_standard_error(scores, labels) == pytest.approx(expected, abs=1e-6)


def test_clustered_standard_error_of_single_questions_is_the_usual_one() -> None:
    scores = torch.rand(40, generator=torch.Generator().manual_seed(0))
    assert clustered_standard_error(scores, torch.arange(40)) == pytest.approx(scores.std().item() / math.sqrt(40))
    assert math.isnan(clustered_standard_error(scores, torch.zeros(40)))


def test_clustered_standard_error_agrees_with_the_bootstrap() -> None:
    generator = np.random.default_rng(0)
    clips = torch.from_numpy(np.repeat(np.arange(300), generator.integers(1, 9, 300)))
    ease = torch.from_numpy(generator.beta(1, 1, 300))[clips]
    scores = (torch.from_numpy(generator.random(len(clips))) < ease).float()
    low, high = bootstrap_mean(scores, clips)
    error = clustered_standard_error(scores, clips)
    assert (high - low) / (2 * 1.96) == pytest.approx(error, rel=0.07)
    assert error > 1.3 * scores.std().item() / math.sqrt(len(clips))


def test_yes_no_by_hand() -> None:
    metric = YesNoScores(["matching"])
    inside = torch.tensor([[1], [1], [0], [0], [1], [0]])
    metric.update(["yes", "yes", "no"], ["yes", "no", "no"], inside[:3])
    metric.update(["no", None, None], ["yes", "yes", "no"], inside[3:])
    result = {name: value.item() for name, value in metric.compute().items()}
    assert result["accuracy"] == pytest.approx(2 / 6) and result["n"] == 6
    assert result["precision"] == pytest.approx(1 / 2) and result["recall"] == pytest.approx(1 / 3)
    assert result["f1"] == pytest.approx(2 / 5)
    assert result["yes_rate"] == pytest.approx(2 / 6) and result["unparsed"] == pytest.approx(2 / 6)
    assert result["matching/n"] == 3 and result["matching/accuracy"] == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="members"):
        metric.update(["yes"], ["yes"])
    with pytest.raises(ValueError, match="maybe"):
        YesNoScores().update(["maybe"], ["yes"])  # type: ignore[list-item]


def test_without_a_yes_the_precision_is_not_defined() -> None:
    metric = YesNoScores()
    metric.update(["no"], ["no"])
    result = metric.compute()
    assert torch.isnan(result["precision"]) and torch.isnan(result["recall"]) and result["accuracy"] == 1


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("He doesn't  wear a t-shirt, I can't see.", "he does n't wear a t-shirt i ca n't see"),
        ("it\u2019s the man's; cannot tell (yet)...", "it 's the man 's can not tell -lrb- yet -rrb-"),
        ("face,while 1,000 / 3.5 of # 7 !", "face while 1,000 / 3.5 of # 7"),
        ("i can 't tell , they 're gone .", "i can t tell they 're gone"),
        ("I'd say \"he'll go\" -- they've left - really", "i 'd say he 'll go they 've left really"),
        ("he talks\u2014then isn't here", "he talks then is n't here"),
        ("", ""),
    ],
)
def test_words_are_those_of_cocos_tokeniser(text: str, tokens: str) -> None:
    """As `pycocoevalcap.tokenizer.ptbtokenizer` gives them, which needs Java."""
    assert " ".join(caption_tokens(text)) == tokens


def test_captions_equal_cocos_own_code() -> None:
    coco = pytest.importorskip("pycocoevalcap.rouge.rouge")
    bleu = pytest.importorskip("pycocoevalcap.bleu.bleu")
    cider = pytest.importorskip("pycocoevalcap.cider.cider")
    metric = CaptionScores()
    for prediction, references in TEXTS:
        metric.update([prediction], [references])
    given = {place: [" ".join(caption_tokens(text))] for place, (text, _) in enumerate(TEXTS)}
    right = {place: [" ".join(caption_tokens(text)) for text in texts] for place, (_, texts) in enumerate(TEXTS)}
    result = metric.compute()
    assert result["rouge_l"].item() == pytest.approx(coco.Rouge().compute_score(right, given)[0], abs=1e-6)
    assert result["bleu_4"].item() == pytest.approx(bleu.Bleu(4).compute_score(right, given, verbose=0)[0][3], abs=1e-5)
    assert result["cider"].item() == pytest.approx(cider.Cider().compute_score(right, given)[0], abs=1e-5)
    assert 0.2 < result["bleu_4"].item() < 0.9 and result["cider"].item() > 0.5


def test_rouge_by_hand() -> None:
    # "a b d" is common: P = 3/4, R = 3/3 by another reference than the one with the best precision
    assert rouge_l("a b c d", ["a b d", "x y"]) == pytest.approx(2.44 * 0.75 / (1 + 1.44 * 0.75))
    assert rouge_l("", ["a"]) == 0 and rouge_l("b", ["a", "..."]) == 0 and rouge_l("A!", ["a"]) == pytest.approx(1)
    with pytest.raises(ValueError, match="reference"):
        rouge_l("a", [])


def test_cider_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    monkeypatch.setattr("acckv.metrics.captions.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'acckv\[captions\]'"):
        CaptionScores()
    metric = CaptionScores(cider=False)
    metric.update(["a"], [["a"]])
    assert set(metric.compute()) == {"rouge_l", "bleu_4"}


def all_scores(part: slice) -> dict[str, float]:
    """Every metric on part of the items, computed over all processes there are."""
    accuracy, words, yes_no = GroupedAccuracy(["g"]), CaptionScores(), YesNoScores()
    if count := len(range(7)[part]):
        accuracy.update(torch.arange(7)[part] / 7, torch.ones(count, 1))
    if TEXTS[part]:
        words.update([text for text, _ in TEXTS[part]], [right for _, right in TEXTS[part]])
        yes_no.update(["yes"] * len(TEXTS[part]), ["yes"] * len(TEXTS[part]))
    results = {"accuracy": accuracy, "words": words, "yes_no": yes_no}
    return {f"{name} {key}": v.item() for name, metric in results.items() for key, v in metric.compute().items()}


def work(rank: int, folder: str, cut: int) -> None:
    """One of two processes; the first takes the first `cut` items."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet{cut}", rank=rank, world_size=2)
    result = all_scores(slice(0, cut) if rank == 0 else slice(cut, None))
    (Path(folder) / f"{cut}-{rank}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


def both(rank: int, folder: str) -> None:
    """An uneven share each, then all items for one process and none for the other."""
    for cut in (3, 7):
        work(rank, folder, cut)


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    start_processes(both, (str(tmp_path),), nprocs=2, start_method="fork")
    alone = all_scores(slice(None))
    for cut in (3, 7):
        for rank in (0, 1):
            result = json.loads((tmp_path / f"{cut}-{rank}.json").read_text())
            assert result == pytest.approx(alone, abs=1e-6, nan_ok=True), (cut, rank)
