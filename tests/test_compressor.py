"""KVCompressor: the calibrated one starts as the preset; saved and loaded it is the same; bad files are refused."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from acckv import InputError, KVCompressor
from acckv.cache.cache import compressed_layers
from acckv.config import HeadBudgets
from acckv.data.calibration_record import CalibrationRecord
from acckv.policies import AccKV
from tests import tiny_omni
from tests.learned import calibrated, with_low_ratio
from tests.support.running import generate

CONTEXT = AccKV.preset("context")
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_omni.build()


def test_an_export_holds_budgets_of_heads_only_where_they_were_learned(model: Any, tmp_path: Path) -> None:
    compressor = calibrated(model, CONTEXT, noise=1.0, ratio=0.3, head_budgets="learned")
    compressor.save_pretrained(tmp_path / "learned")
    loaded = KVCompressor.from_pretrained(tmp_path / "learned")
    assert loaded.config == compressor.config and answers(loaded, model) == answers(compressor, model)
    assert compressor.weights is not None
    torch.nn.init.zeros_(compressor.weights.head_budget)
    compressor.save_pretrained(tmp_path / "equal")
    assert "head_budget" not in load_file(tmp_path / "equal" / "model.safetensors")
    assert KVCompressor.from_pretrained(tmp_path / "equal", head_budgets="equal").config.head_budgets == "equal"
    config = json.loads((tmp_path / "equal" / "config.json").read_text())
    del config["compression"]["head_budgets"]  # as older ones are
    (tmp_path / "equal" / "config.json").write_text(json.dumps(config))
    assert KVCompressor.from_pretrained(tmp_path / "equal").config.head_budgets == "equal"


@pytest.mark.parametrize("preset", ["paper", "context"])
@pytest.mark.parametrize("when", ["context", "prompt"])
@pytest.mark.parametrize("ratio", [0.5, 0.3, 0.1])
def test_untrained_weights_select_what_the_preset_selects(model: Any, preset: str, when: Any, ratio: float) -> None:
    options: dict[str, Any] = {"policy": AccKV.preset(preset), "when": when, "ratio": ratio}
    inputs = tiny_omni.context() if when == "context" else tiny_omni.prompt()
    plans = []
    for compressor in (KVCompressor(**options), calibrated(model, **options)):
        with compressor(model, tiny_omni.Tokenizer()) as session:
            plans.append(session.plan(session.prefill(**inputs)))
    for preset_plan, learned_plan in zip(*plans, strict=True):
        assert torch.equal(preset_plan.log_gates, learned_plan.log_gates)
        assert torch.equal(preset_plan.merged_keys, learned_plan.merged_keys)
        assert torch.equal(preset_plan.merged_bias, learned_plan.merged_bias)
    moved = calibrated(model, **options, noise=1.0)
    with moved(model, tiny_omni.Tokenizer()) as session:
        other = session.plan(session.prefill(**inputs))
    assert any(not torch.equal(a.log_gates, b.log_gates) for a, b in zip(plans[0], other, strict=True))


@pytest.mark.parametrize("options", [{"ratio": 0.3}, {"budget": 5}])
def test_the_lowest_ratios_have_a_calibration_of_their_own(model: Any, options: dict[str, Any]) -> None:
    """Evicted during the prefill or planned afterwards, read by generate or a session; 0.3 or 5 of 18 entries."""
    wide, low = (calibrated(model, CONTEXT, noise, 2, **options) for noise in (1.0, 0.3))
    question = torch.tensor([[20, 21, 22]])

    def outcome(compressor: KVCompressor) -> list[torch.Tensor]:
        with compressor(model, tiny_omni.Tokenizer()) as session:
            streamed = session.compress(**tiny_omni.context())
            planned = session.compress(session.prefill(**tiny_omni.context()))
            tokens = [session.answer(cache, question, **GREEDY) for cache in (streamed, planned)]
            _, found = generate(model, tiny_omni.prompt(), **GREEDY)
        keys = [layer.keys for cache in (streamed, planned) for layer in compressed_layers(cache)]
        return [*keys, *tokens, *found]

    def alike(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
        return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))

    by_wide, by_low = outcome(wide), outcome(low)
    assert not alike(by_wide, by_low) and not torch.equal(by_wide[-1], by_low[-1])
    assert alike(outcome(with_low_ratio(wide, low, 0.27)), by_wide)
    assert alike(outcome(with_low_ratio(wide, low, 0.31)), by_low)
    assert alike(outcome(with_low_ratio(wide, low, 0.31).with_ratio(0.31)), outcome(wide.with_ratio(0.31)))


def test_a_cache_is_read_with_the_adapter_of_its_ratio(model: Any) -> None:
    """Whatever was compressed or asked in between."""
    wide, low = calibrated(model, CONTEXT, noise=1.0, rank=2), calibrated(model, CONTEXT, noise=0.3, rank=2)
    question = torch.tensor([[20, 21, 22]])

    def answers(compressor: KVCompressor, *ratios: float) -> list[list[int]]:
        with compressor(model, tiny_omni.Tokenizer()) as session:
            prefill = session.prefill(**tiny_omni.context())
            caches = [session.compress(prefill, ratio) for ratio in ratios]
            return [session.answer(cache, question, **GREEDY)[0].tolist() for cache in (*caches, *caches)]

    both = answers(with_low_ratio(wide, low, 0.3), 0.2, 0.5, 1.0)
    assert both == [*answers(low, 0.2)[:1], *answers(wide, 0.5, 1.0)[:2]] * 2
    assert both[0] != answers(wide, 0.2)[0] and both[1] != answers(low, 0.5)[0]


def test_an_export_holds_the_calibration_of_the_lowest_ratios(model: Any, tmp_path: Path) -> None:
    wide, low = calibrated(model, CONTEXT, noise=1.0, rank=2), calibrated(model, CONTEXT, noise=0.3, rank=2)
    wide_and_low = with_low_ratio(wide, low, 0.3)
    wide_and_low.save_pretrained(tmp_path / "export")
    loaded = KVCompressor.from_pretrained(tmp_path / "export")
    assert loaded.low_ratio is not None and loaded.low_ratio.below == 0.3
    for found, saved in ((loaded, wide), (loaded.low_ratio, low), (loaded.with_ratio(0.1).low_ratio, low)):
        assert found.lora.tensors.keys() == saved.lora.tensors.keys()
        assert all(torch.equal(found.lora.tensors[name], saved.lora.tensors[name]) for name in saved.lora.tensors)
        assert torch.equal(found.weights.saliency, saved.weights.saliency)
    assert "Ratios below 0.3" in (tmp_path / "export" / "README.md").read_text()
    edit(tmp_path / "export" / "config.json", lora_scope="all")
    with pytest.raises(InputError, match=r"config\.json: lora_scope: is 'all', which does not go with low_ratio_below"):
        KVCompressor.from_pretrained(tmp_path / "export")
    with pytest.raises(InputError, match="lora_scope: is 'all', and the lowest ratios"):
        parts = {"weights": wide.weights, "lora": wide.lora, "low_ratio": wide_and_low.low_ratio}
        KVCompressor(CONTEXT, **parts, lora_scope="all")


@pytest.mark.parametrize("head_budgets", ["equal", "joint", "learned"])
def test_budgets_of_learned_weights_are_exact(model: Any, head_budgets: HeadBudgets) -> None:
    heads = 1 if head_budgets == "equal" else 2
    for ratio in (0.9, 0.5, 0.2, 0.05):
        compressor = calibrated(model, AccKV(), noise=2.0, ratio=ratio, head_budgets=head_budgets)
        with compressor(model, tiny_omni.Tokenizer()) as session:
            cache = session.compress(**tiny_omni.context())
        assert cache.kept_entries().sum() * heads == int(ratio * 3 * heads * 18 + 1e-9)


def test_every_weight_gets_a_gradient(model: Any) -> None:
    """With all steps on, each learned weight of docs/method.md is reached by the soft selection's gradient."""
    compressor = calibrated(model, AccKV(), noise=0.1, head_budgets="learned")
    with compressor(model, tiny_omni.Tokenizer()) as session:
        prefill = session.prefill(**tiny_omni.context())
        loss = torch.zeros(())
        for ratio in (0.3, 0.5, 0.7):
            plans = session.plan(prefill, ratio, temperature=0.5)
            ids = torch.tensor([[20, 21, 22]])
            positions = session.adapter.text_positions(prefill.next_position + torch.arange(3))
            mask = torch.ones(1, prefill.labels.labels.shape[1] + 3, dtype=torch.long)
            logits = session.simulate(prefill, plans, input_ids=ids, attention_mask=mask, position_ids=positions)
            loss = loss + logits.square().mean()
        loss.backward()
    for name, parameter in compressor.named_parameters():
        assert parameter.grad is not None and float(parameter.grad.abs().max()) > 0, name


def answers(compressor: KVCompressor, model: Any) -> list[int]:
    with compressor(model, tiny_omni.Tokenizer()):
        return model.generate(**tiny_omni.prompt(), **GREEDY)[0].tolist()


def test_weights_that_change_after_use_are_read_anew(model: Any) -> None:
    """However they do; what a layer read is kept only as long as it holds."""
    here = torch.device("cpu")
    first = calibrated(model, AccKV(), noise=0.1).weights
    other = calibrated(model, AccKV(), noise=0.2).weights.state_dict()
    first.requires_grad_(False)
    first.load_state_dict({name: tensor + 1 for name, tensor in other.items()})
    first.layer(0, here)
    copied = copy.deepcopy(first)
    copied.load_state_dict(other)
    assert torch.equal(copied.layer(0, here).merge_bias, other["merge_bias"][0])
    first.load_state_dict(other, assign=True)
    assert torch.equal(first.layer(0, here).merge_bias, other["merge_bias"][0])
    first.merge_bias.data = other["merge_bias"] + 2
    assert torch.equal(first.layer(0, here).merge_bias, other["merge_bias"][0] + 2)


def test_a_compressor_that_was_made_in_inference_mode(model: Any) -> None:
    with torch.inference_mode():
        made = calibrated(model, CONTEXT, noise=1.0, ratio=0.3).requires_grad_(False)
        with made(model, tiny_omni.Tokenizer()):
            inside = model.generate(**tiny_omni.prompt(), **GREEDY)
    with made(model, tiny_omni.Tokenizer()):
        assert torch.equal(model.generate(**tiny_omni.prompt(), **GREEDY), inside)


def test_a_compressor_in_half_precision(model: Any) -> None:
    """As one whose weights were rounded so: what is computed with them is float32."""
    half, rounded = (calibrated(model, CONTEXT, noise=1.0, ratio=0.3).requires_grad_(False).half() for _ in range(2))
    found = []
    for one in (half, rounded.float()):
        with one(model, tiny_omni.Tokenizer()):
            found.append(model.generate(**tiny_omni.prompt(), **GREEDY))
    assert torch.equal(*found)


def test_save_and_load(model: Any, tmp_path: Path) -> None:
    compressor = calibrated(model, AccKV.preset("context", n_probe_queries=2), noise=1.0, rank=4, ratio=0.3)
    compressor.calibration = CalibrationRecord("generated clips of seed 0", 2, 6, {"Visual/Colour": 6}, 0.02, 0.5, 9)
    folder = tmp_path / "export"
    compressor.save_pretrained(folder)
    compressor.save_pretrained(folder)  # over itself
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export"]
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert files == [
        "README.md",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "config.json",
        "model.safetensors",
    ]
    loaded = KVCompressor.from_pretrained(folder)
    assert answers(loaded, model) == answers(compressor, model)
    assert (loaded.config, loaded.policy) == (compressor.config, compressor.policy)
    assert loaded.calibration == loaded.with_ratio(0.5).calibration == compressor.calibration
    assert "generated clips of seed 0" in (folder / "README.md").read_text()
    assert KVCompressor.from_pretrained(folder, ratio=0.7).config.ratio == 0.7
    assert KVCompressor.from_pretrained(folder, layer_floor=0.2).policy == replace(compressor.policy, layer_floor=0.2)


def test_lora_acts_and_leaves(model: Any) -> None:
    plain = model.generate(**tiny_omni.prompt(), **GREEDY)[0].tolist()
    gradients = [parameter.requires_grad for parameter in model.parameters()]
    assert answers(calibrated(model, CONTEXT, noise=1.0, rank=4, ratio=1.0), model) != plain
    assert answers(calibrated(model, CONTEXT, noise=0.0, rank=4, ratio=1.0), model) == plain
    assert not any("lora" in name for name, _ in model.named_modules())
    assert [parameter.requires_grad for parameter in model.parameters()] == gradients
    assert model.generate(**tiny_omni.prompt(), **GREEDY)[0].tolist() == plain


def test_scope_after_leaves_the_context_to_the_base_model(model: Any) -> None:
    kept = []
    for rank in (0, 4):
        with calibrated(model, CONTEXT, noise=0.0 if rank == 0 else 1.0, rank=rank, ratio=1.0)(model) as session:
            kept.append(session.prefill(**tiny_omni.context()).cache.layers[-1].keys)
    assert torch.equal(*kept)


def edit(file: Path, **changes: Any) -> None:
    values = json.loads(file.read_text())
    for key, value in changes.items():
        if value is None:
            values.pop(key)
        else:
            values[key] = value
    file.write_text(json.dumps(values))


def policy(export: Path, **changes: Any) -> None:
    file = export / "config.json"
    edit(file, policy={**json.loads(file.read_text())["policy"], **changes})


@pytest.fixture
def export(model: Any, tmp_path: Path) -> Path:
    calibrated(model, CONTEXT, noise=0.1, rank=2).save_pretrained(tmp_path / "export")
    return tmp_path / "export"


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def wrong_shape(file: Path) -> None:
    tensors = load_file(file)
    tensors["redistribution"] = torch.zeros(9)
    save_file(tensors, file)


def no_number(file: Path) -> None:
    save_file({name: tensor / 0 for name, tensor in load_file(file).items()}, file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda e: (e / "model.safetensors").unlink(), r"model\.safetensors: is missing"),
        (lambda e: truncate(e / "model.safetensors"), r"model\.safetensors: is truncated"),
        (lambda e: wrong_shape(e / "model.safetensors"), r"model\.safetensors: redistribution: has shape \[9\]"),
        (lambda e: (e / "config.json").unlink(), r"config\.json: is missing"),
        (lambda e: (e / "config.json").write_text("{"), r"config\.json: not valid JSON"),
        (lambda e: edit(e / "config.json", format=7), r"config\.json: format: version 7 is unknown"),
        (lambda e: edit(e / "config.json", lora_scope="never"), r"lora_scope: 'never' is not"),
        (
            lambda e: edit(e / "config.json", low_ratio_below="low"),
            r"config\.json: low_ratio_below: 'low' is not 0 to 1",
        ),
        (lambda e: edit(e / "config.json", low_ratio_below=0.1), r"low_ratio/model\.safetensors: is missing"),
        (lambda e: edit(e / "config.json", calibration=[1]), r"config\.json: calibration: expected an object"),
        (lambda e: edit(e / "config.json", base=None), r"config\.json: base: is missing"),
        (lambda e: edit(e / "config.json", compression={"ratio": 1.5}), r"config\.json: ratio: 1\.5 is not a number"),
        (
            lambda e: edit(e / "config.json", compression={"rate": 1}),
            r"config\.json: rate: is no option of a compression; it has ratio, budget, when",
        ),
        (
            lambda e: edit(e / "config.json", format=3),
            r"config\.json: format: version 3 is unknown; this acckv reads 4",
        ),
        (lambda e: policy(e, name="h3o"), r"config\.json: policy: 'h3o' is not one of full, random"),
        (lambda e: policy(e, options={"window": 3}), r"config\.json: window: is no option of acckv; it has share_"),
        (lambda e: policy(e, name="snapkv", options={}), r"config\.json: policy: is 'snapkv', which has no learned"),
        (lambda e: edit(e / "config.json", policy={"name": 3}), r"config\.json: policy: must hold a name and options"),
        (lambda e: (e / "adapter" / "adapter_config.json").unlink(), r"adapter_config\.json: is missing"),
        (lambda e: (e / "adapter" / "adapter_model.safetensors").unlink(), r"adapter_model\.safetensors: is missing"),
        (lambda e: truncate(e / "adapter" / "adapter_model.safetensors"), r"adapter: cannot be read"),
        (
            lambda e: no_number(e / "adapter" / "adapter_model.safetensors"),
            r"lora_A\.weight: holds values that are not",
        ),
    ],
)
def test_damaged_exports(export: Path, damage: Any, message: str) -> None:
    damage(export)
    with pytest.raises(InputError, match=message) as caught:
        KVCompressor.from_pretrained(export)
    assert "\n" not in str(caught.value)


def test_wrong_base_model(export: Path) -> None:
    other = tiny_omni.build(layers=2)
    with pytest.raises(InputError, match="layers: was calibrated for tiny with layers 3; this model has 2"):
        KVCompressor.from_pretrained(export)(other)


def test_learned_weights_serve_their_own_policy_alone(export: Path) -> None:
    with pytest.raises(InputError, match="policy: is 'snapkv', which has no learned weights"):
        KVCompressor("snapkv", weights=KVCompressor.from_pretrained(export).weights)


def test_no_such_export(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no export folder"):
        KVCompressor.from_pretrained(tmp_path / "nothing")


def test_foreign_folders_are_not_overwritten(model: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="is no export"):
        calibrated(model, CONTEXT).save_pretrained(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.5}, "ratio: 1.5 is not a number from 0 to 1"),
        ({"ratio": "a"}, "ratio: 'a' is not a number"),
        ({"policy": "h3o"}, "policy: 'h3o' is not one of full, random"),
        ({"when": "later"}, "when: 'later' is not one of context, prompt"),
        ({"budget": -1}, "budget: -1 is not an integer of at least 0"),
        ({"budget": True}, "budget: True is not an integer of at least 0"),
    ],
)
def test_option_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        KVCompressor(**options)
