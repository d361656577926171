"""Soft gates are the sigmoids that meet each row's own budget, with the gradients of that condition."""

from __future__ import annotations

import math

import pytest
import torch

from acckv.method.topk import soft_log_gates

BUDGETS = [[0.0, 1.0], [2.5, 4.0], [20.0, 0.4]]


def threshold(scores: list[float], target: float, temperature: float) -> float:
    """The theta at which the gates of these scores sum to `target`, by 200 halvings."""
    low, high = min(scores) - 60 * temperature, max(scores) + 60 * temperature
    for _ in range(200):
        middle = (low + high) / 2
        total = sum(1 / (1 + math.exp(-(score - middle) / temperature)) for score in scores)
        low, high = (middle, high) if total > target else (low, middle)
    return low


@pytest.mark.parametrize("temperature", [0.3, 2.0])
def test_soft_gates_are_sigmoids_about_the_threshold_that_meets_each_budget(temperature: float) -> None:
    """No gate sum is exactly 0 or all: a budget is met between 0.05 and 0.05 below the number of members."""
    draw = torch.Generator().manual_seed(0)
    score = torch.randn(3, 2, 9, generator=draw, dtype=torch.float64)
    members = torch.rand(3, 2, 9, generator=draw) < 0.7
    members[0, 1] = torch.arange(9) == 4  # the only one of its row: kept as far as a gate can be open
    gates = soft_log_gates(score, members, torch.tensor(BUDGETS, dtype=torch.float64), temperature).exp()
    for row, budgets in enumerate(BUDGETS):
        for head, budget in enumerate(budgets):
            mine = members[row, head]
            target = min(max(budget, 0.05), int(mine.sum()) - 0.05)
            theta = threshold(score[row, head, mine].tolist(), target, temperature)
            expected = torch.sigmoid((score[row, head] - theta) / temperature) * mine
            assert torch.allclose(gates[row, head], expected, atol=2e-6, rtol=0)


def test_equal_scores_share_their_budget() -> None:
    """The first guess of the threshold is met exactly, and stays."""
    gates = soft_log_gates(torch.full((1, 4), 0.7), torch.ones(1, 4, dtype=torch.bool), torch.tensor([2.0]), 0.5).exp()
    assert gates.tolist() == [pytest.approx([0.5] * 4)]


def test_scores_far_apart_pass_on_small_gradients_of_the_right_sign() -> None:
    """Gates that are all but open or shut hardly follow a budget: less than by an entry, and never against it."""
    budget = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    score = torch.tensor([[11.0, -11.0]], dtype=torch.float64)
    gates = soft_log_gates(score, torch.ones(1, 2, dtype=torch.bool), budget, 1.0).exp()
    (slope,) = torch.autograd.grad(gates.sum(), budget)
    assert gates[0].tolist() == pytest.approx([1, 0], abs=1e-4) and 0 < float(slope) < 1


def test_soft_gates_follow_their_budget() -> None:
    """An entry more of budget is an entry more of gates, in its own row alone; scores move gates and not their sum."""
    draw = torch.Generator().manual_seed(1)
    score = torch.randn(2, 9, generator=draw, dtype=torch.float64, requires_grad=True)
    members = torch.ones(2, 9, dtype=torch.bool)
    budget = torch.tensor([2.0, 5.5], dtype=torch.float64, requires_grad=True)
    total = soft_log_gates(score, members, budget, 0.5).exp().sum(-1)
    by_score, by_budget = torch.autograd.grad(total[0], (score, budget))
    assert by_budget.tolist() == pytest.approx([1.0, 0.0], abs=1e-3)
    assert float(by_score.abs().max()) < 1e-3
