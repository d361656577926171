"""Policies by name: their options and lists, those of other packages, and what is refused."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from acckv import InputError, KVCompressor
from acckv.config import option_fields
from acckv.method.modality import ModalityMap
from acckv.method.plan import LayerScore
from acckv.method.scoring import Observation
from acckv.policies import POLICIES, AccKV, KeyDiff, Policy, Random, SnapKV, make_policy, register_policy
from tests import tiny_omni
from tests.support import not_none


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> type[Policy]:
    """A policy of another package: it keeps the entries that stand last, of every `stride` the first."""
    monkeypatch.setattr(POLICIES, "_items", dict(POLICIES))
    monkeypatch.setattr(POLICIES, "_origins", dict(POLICIES._origins))

    @register_policy("every_other")
    @dataclass(frozen=True)
    class EveryOther(Policy):
        stride: int = field(default=2, metadata={"help": "Entries of which one comes first.", "low": 1})

        def score(self, layer: int, observation: Observation, labels: ModalityMap) -> LayerScore:
            order = labels.media.long().cumsum(-1)
            return LayerScore(((order % self.stride == 1) * 1000 + order).float()[:, None], None)

    return EveryOther


def test_a_policy_of_another_package_compresses(outside: type[Policy]) -> None:
    model = tiny_omni.build()
    inputs = tiny_omni.context()
    media = tiny_omni.VIDEO_TOKENS + tiny_omni.AUDIO_TOKENS
    kept = []
    for policy in ("every_other", outside(), make_policy({"class_path": "every_other", "init_args": {"stride": 2}})):
        with KVCompressor(policy, ratio=0.5)(model) as session, torch.no_grad():
            plan = session.plan(session.prefill(**inputs))[0]
            labels = session.prefill(**inputs).labels
        kept.append(torch.isfinite(plan.log_gates)[0, 0] & labels.media[0])
    first = int(labels.media[0].nonzero()[0])
    places = (kept[0].nonzero().flatten() - first).tolist()
    assert len(places) == media // 2
    assert sorted({place % 2 for place in places if place < tiny_omni.VIDEO_TOKENS}) == [0]
    assert all(torch.equal(kept[0], other) for other in kept[1:])


def test_a_class_path_may_be_an_import_path() -> None:
    assert make_policy({"class_path": "acckv.policies.snapkv.SnapKV", "init_args": {"window_size": 8}}) == SnapKV(8)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("h3o", "policy: 'h3o' is not one of full, random, "),
        ({"class_path": "h3o"}, "policy: 'h3o' is not one of full, random, "),
        ({"class_path": "acckv.policies.h3o.H3O"}, "policy: 'acckv.policies.h3o.H3O' cannot be imported"),
        ({"class_path": "acckv.errors.InputError"}, "policy: 'acckv.errors.InputError' is no policy"),
        ({"name": "snapkv"}, "policy: .* is neither a name nor a mapping of class_path and init_args"),
        (
            {"class_path": "snapkv", "init_args": {"window": 8}},
            "window: is no option of snapkv; it has share_heads, window_size, kernel_size",
        ),
        ({"class_path": "snapkv", "init_args": {"kernel_size": 4}}, "kernel_size: 4 is even"),
        ({"class_path": "snapkv", "init_args": {"window_size": 0}}, "window_size: 0 is not an integer of at least 1"),
        ({"class_path": "snapkv", "init_args": {"share_heads": 1}}, "share_heads: 1 is not true or false"),
        ({"class_path": "random", "init_args": {"seed": True}}, "seed: True is not an integer of at least 0"),
        ({"class_path": "pyramidkv", "init_args": {"beta": 0.5}}, "beta: 0.5 is not a number from 1 to 1000"),
        ({"class_path": "acckv", "init_args": {"signal": "norm"}}, "signal: 'norm' is not one of attention, key_div"),
        ({"class_path": "acckv", "init_args": {"focusing": 1}}, "focusing: 1 is not true or false"),
        ({"class_path": "acckv", "init_args": {"n_probe_queries": 17}}, "17 is not an integer from 0 to 16"),
    ],
)
def test_refused(given: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        make_policy(given)
    assert "\n" not in str(caught.value)


def test_labels_and_options() -> None:
    assert SnapKV().label == "snapkv"
    changed = SnapKV(window_size=64, share_heads=True)
    assert changed.label == "snapkv(share_heads=True, window_size=64)"
    assert make_policy({"class_path": changed.name, "init_args": changed.options}) == changed
    assert AccKV.preset("paper") == AccKV()
    assert AccKV.preset("context", integration=True) == AccKV("key_diversity", focusing=False, cross_calibration=False)
    assert (Random().seeded(3).seed, Random(seed=0).seeded(3).seed, KeyDiff().seeded(3)) == (3, 0, KeyDiff())


def test_a_name_is_taken_once() -> None:
    with pytest.raises(InputError, match=r"policy: 'snapkv' of .* is the name of one of acckv.policies.snapkv"):
        register_policy("snapkv")(type("Mine", (SnapKV,), {}))


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_documents_itself(name: str) -> None:
    """One file each; the option's help is there, and the docstring or the module's names the paper."""
    policy = POLICIES[name]
    assert Path(inspect.getfile(policy)).stem == name
    assert policy().name == name
    for item in option_fields(policy).values():
        assert item.metadata["help"].endswith("."), item.name
    text = ast.get_docstring(ast.parse(inspect.getsource(not_none(inspect.getmodule(policy))))) or ""
    assert name in ("full", "random") or re.search(r"arXiv \d{4}\.\d{5}", text)
