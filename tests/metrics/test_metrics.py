"""Metrics against numbers worked out by hand and by slow independent code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from acckv.metrics.grouped import GroupedAccuracy
from acckv.metrics.intervals import bootstrap_difference, bootstrap_mean, bootstrap_ratio, wilson
from acckv.metrics.words import word_accuracy


def test_grouped_accuracy_by_hand() -> None:
    metric = GroupedAccuracy(["audio", "video", "never"])
    members = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 0]], dtype=torch.bool)
    metric.update(torch.tensor([1.0, 0.0, 0.5]), members)
    metric.update(torch.tensor([1.0]), torch.tensor([[False, True, False]]))
    result = metric.compute()
    assert result["accuracy"].item() == pytest.approx(2.5 / 4)
    assert result["n"].item() == 4
    assert result["audio/accuracy"].item() == pytest.approx(0.5)
    assert result["audio/n"].item() == 2
    assert result["video/accuracy"].item() == pytest.approx(0.5)
    assert result["video/n"].item() == 3
    assert result["never/n"].item() == 0
    assert torch.isnan(result["never/accuracy"])


def test_grouped_accuracy_forgets_on_reset_and_refuses_bad_shapes() -> None:
    metric = GroupedAccuracy(["all"])
    metric.update(torch.zeros(3), torch.ones(3, 1, dtype=torch.bool))
    metric.reset()
    metric.update(torch.ones(2), torch.ones(2, 1, dtype=torch.bool))
    assert metric.compute()["accuracy"].item() == 1.0
    with pytest.raises(ValueError, match="members"):
        metric.update(torch.ones(2), torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="between 0 and 1"):
        metric.update(torch.tensor([1.5]), torch.ones(1, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="differ"):
        GroupedAccuracy(["a", "a"])


@given(
    scores=st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), min_size=1, max_size=30),
    cut=st.integers(0, 30),
)
@settings(deadline=None, max_examples=50)
def test_grouped_accuracy_equals_a_plain_loop_however_it_is_batched(scores: list[tuple[float, bool]], cut: int) -> None:
    metric = GroupedAccuracy(["g"])
    for part in (scores[:cut], scores[cut:]):
        if part:
            metric.update(torch.tensor([s for s, _ in part]), torch.tensor([[g] for _, g in part]))
    result = metric.compute()
    assert result["accuracy"].item() == pytest.approx(sum(s for s, _ in scores) / len(scores), abs=1e-5)
    inside = [s for s, g in scores if g]
    if inside:
        assert result["g/accuracy"].item() == pytest.approx(sum(inside) / len(inside), abs=1e-5)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_published_values(right: int, n: int, low: float, high: float) -> None:
    """Newcombe (1998), Statistics in Medicine 17:857, table I, method 3."""
    assert wilson(right, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson(n - right, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_wilson_refuses_more_right_than_there_are() -> None:
    with pytest.raises(ValueError, match="3 of 2"):
        wilson(3, 2)


def test_bootstrap_equals_a_slow_loop() -> None:
    generator = np.random.default_rng(0)
    clips = torch.from_numpy(np.repeat(np.arange(40), generator.integers(1, 8, 40)))
    scores = torch.from_numpy((generator.random(len(clips)) < 0.7).astype("float32"))
    low, high = bootstrap_mean(scores, clips, resamples=4000, seed=1)
    means = []
    for _ in range(4000):
        drawn = generator.integers(0, 40, 40)
        items = np.concatenate([scores.numpy()[clips.numpy() == clip] for clip in drawn])
        means.append(items.mean())
    expected = np.percentile(means, [2.5, 97.5])
    assert low == pytest.approx(expected[0], abs=0.01)
    assert high == pytest.approx(expected[1], abs=0.01)


def test_bootstrap_is_seeded_and_holds_the_mean() -> None:
    scores = torch.rand(60, generator=torch.Generator().manual_seed(0))
    clips = torch.arange(60) // 3
    first = bootstrap_mean(scores, clips, seed=3)
    assert first == bootstrap_mean(scores, clips, seed=3)
    assert first != bootstrap_mean(scores, clips, seed=4)
    assert first.low < scores.mean().item() < first.high


def test_correlated_questions_widen_the_interval() -> None:
    """Ten equal questions a clip carry the information of one: the width is that of n = clips."""
    right = (torch.arange(50) % 2).float()
    alone = bootstrap_mean(right, torch.arange(50), seed=0)
    tenfold = bootstrap_mean(right.repeat_interleave(10), torch.arange(50).repeat_interleave(10), seed=0)
    independent = bootstrap_mean(right.repeat_interleave(10), torch.arange(500), seed=0)
    assert tenfold == pytest.approx(alone)
    assert tenfold.high - tenfold.low > 2.5 * (independent.high - independent.low)


@pytest.mark.parametrize(("value", "clips"), [(1.0, 20), (0.0, 20), (0.5, 5)])
def test_no_spread_between_clips_gives_wilson_over_clips(value: float, clips: int) -> None:
    interval = bootstrap_mean(torch.full((3 * clips,), value), torch.arange(3 * clips) // 3)
    assert interval == pytest.approx(wilson(value * clips, clips))
    assert interval.high - interval.low > 0.1


def test_clip_labels_may_be_any_integers() -> None:
    scores = torch.tensor([1.0, 0, 1, 1, 0, 1])
    assert bootstrap_mean(scores, torch.tensor([7, 7, 900, 900, -3, -3])) == bootstrap_mean(
        scores, torch.tensor([1, 1, 2, 2, 0, 0])
    )


def test_empty_or_uneven_input_is_refused() -> None:
    with pytest.raises(ValueError, match="not empty"):
        bootstrap_mean(torch.zeros(0), torch.zeros(0))
    with pytest.raises(ValueError, match="equally long"):
        bootstrap_mean(torch.zeros(3), torch.zeros(2))


def test_paired_ratio_is_one_without_width_against_itself() -> None:
    scores = (torch.rand(80, generator=torch.Generator().manual_seed(5)) < 0.6).float()
    clips = torch.arange(80) // 4
    assert bootstrap_ratio(scores, scores, clips) == pytest.approx((1.0, 1.0))
    assert bootstrap_difference(scores, scores, clips) == (0.0, 0.0)


def test_paired_interval_is_narrower_than_the_unpaired_width() -> None:
    generator = torch.Generator().manual_seed(0)
    full = (torch.rand(400, generator=generator) < 0.7).float()
    policy = full * (torch.rand(400, generator=generator) < 0.95).float()
    clips = torch.arange(400) // 4
    low, high = bootstrap_ratio(policy, full, clips)
    assert low < (policy.mean() / full.mean()).item() < high
    alone = bootstrap_mean(policy, clips)
    assert high - low < 0.6 * (alone.high - alone.low) / full.mean().item()


def test_intervals_of_a_share_and_a_difference_by_hand() -> None:
    """Against a reference that is right throughout, a share is a difference and one."""
    scores, reference, clips = torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.ones(4), torch.arange(4)
    share = bootstrap_ratio(scores, reference, clips)
    assert 0 <= share.low < 0.75 < share.high <= 1
    assert bootstrap_difference(scores, reference, clips) == pytest.approx((share.low - 1, share.high - 1))


def test_share_of_a_reference_that_is_always_wrong_is_not_defined() -> None:
    with pytest.raises(ValueError, match="not defined"):
        bootstrap_ratio(torch.ones(2), torch.zeros(2), torch.arange(2))


@pytest.mark.parametrize(
    ("prediction", "hits"),
    [
        ("red circle none silent", 4),
        ("Red Circle none silent extra words", 4),
        ("red circle none", 3),
        ("circle none silent", 0),
        ("red ring none silent", 3),
        ("", 0),
    ],
)
def test_words_count_by_position(prediction: str, hits: int) -> None:
    assert word_accuracy(prediction, "red circle none silent") == hits / 4


def test_word_accuracy_needs_words() -> None:
    with pytest.raises(ValueError, match="no words"):
        word_accuracy("a", " ")
