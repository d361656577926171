"""Studies compare what they say: each variant changes what it names alone, each scorer starts as the default does."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml

from acckv.errors import InputError
from acckv.method.modality import ModalityMap
from acckv.method.weights import WEIGHT_GROUPS
from benchmarks.scorer_study import SCORERS, clip_positions
from benchmarks.study_results import Line, with_earlier
from benchmarks.study_tables import END, START, markdown, write_section
from benchmarks.study_variants import DEFAULT, SHORT, STUDIES, Variant
from lightning_modules.calibration.module import CalibrationModule
from tests.paths import ROOT
from tests.support import not_none

CONFIG = yaml.safe_load((ROOT / "configs/calib_full.yaml").read_text(encoding="utf-8"))
FILES = ("study", "calibration_step", "scorer")
VARIANTS = [variant for variants in STUDIES.values() for variant in variants]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_every_variant_can_be_built_and_changes_what_it_says(variant: Variant) -> None:
    default, module = (CalibrationModule(**CONFIG["model"] | options).hparams for options in ({}, variant.options))
    changed = {name for name in {*default, *module} if default.get(name) != module.get(name)}
    assert changed <= set(variant.options)
    assert changed or variant.steps or variant.name in (DEFAULT, SHORT)


def test_variants_have_names_of_their_own_and_take_every_group_away() -> None:
    assert len({variant.name for variant in VARIANTS}) == len(VARIANTS)
    groups = [name for name in WEIGHT_GROUPS if name != "positions"]
    steps = [set(variant.options["trainable"]) for variant in STUDIES["ablations"] if variant.name in groups]
    added = [after - before for before, after in zip([set(), *steps], steps, strict=False)]
    assert [name for names in added for name in names] == groups


def test_tables_of_the_page_are_those_of_the_measured_files(tmp_path: Path) -> None:
    results = ROOT / "benchmarks/results"
    study, costs, scorers = (json.loads((results / f"{name}.json").read_text()) for name in FILES)
    text = markdown([Line(**row) for row in study["rows"]], study["training_free"], costs["rows"], scorers)
    copy = tmp_path / "results.md"
    shutil.copy(ROOT / "docs/results.md", copy)
    write_section(copy, text)
    assert copy.read_text() == (ROOT / "docs/results.md").read_text()
    assert text.count("| + ") >= 5 and "| 0.05 | " in text


def test_lines_of_an_earlier_study_stand_for_what_was_not_run(tmp_path: Path) -> None:
    """Under the labels of today; variants that are no more are left out."""
    file = tmp_path / "study.json"
    line = Line("late", "late", 0.1, 2, 9, 60.0, [0.5], 0.5, 0.5, (0.4, 0.6), None, None, None)
    old = [asdict(replace(line, variant=name, label="old")) for name in ("gone", "late", "early")]
    file.write_text(json.dumps({"rows": old}))
    variants = [Variant("early", "Early"), Variant("late", "Late"), Variant("never", "Never")]
    found = with_earlier([line], file, variants)
    assert [(one.variant, one.label) for one in found] == [("early", "Early"), ("late", "late")]


def test_a_file_without_the_marks_stays_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "notes.md"
    for content in ("", END, f"{END} {START}"):
        file.write_text(content)
        with pytest.raises(InputError, match=r"notes.md: has no section between <!-- study"):
            write_section(file, "| table |")
        assert file.read_text() == content


@pytest.mark.parametrize("label", SCORERS)
def test_every_scorer_starts_at_nothing_and_learns_from_what_it_may_see(label: str) -> None:
    torch.manual_seed(0)
    kind, extra = SCORERS[label]
    weights = kind(layers=2, kv_heads=2, query_heads=4, head_size=3, probes=0)
    keys, values = torch.randn(2, 1, 2, 6, 3).unbind(0)
    score = weights.saliency_score(1, keys, values, ModalityMap(torch.tensor([[1, 1, 2, 0, 1, 0]])))
    assert score.shape == (1, 2, 6) and not score.any()
    (score * torch.randn(6)).sum().backward()
    learned = {name for name, weight in weights.named_parameters() if weight.grad is not None and weight.grad.any()}
    # The first layer of a perceptron has no gradient yet: its last one starts at zero.
    assert learned == {"saliency", "saliency_bias", "saliency_position", *extra} - {"saliency_first"}
    seen_keys, seen_values = not_none(weights.saliency.grad).abs().sum((0, 1, 2)).split(3)
    assert bool(seen_keys.any()) == (label != "value alone")
    assert bool(seen_values.any()) == (label != "key alone")


def test_places_in_the_clip() -> None:
    found = clip_positions(torch.ones(1, 2, 4, dtype=torch.bool))
    half = 0.5**0.5
    torch.testing.assert_close(found, torch.tensor([[half, half], [half, -half], [-half, -half], [-half, half]]))
