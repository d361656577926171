"""A model inside another: wrapped by peft, or the thinker of a full Omni model with its talker."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from acckv import InputError, KVCompressor
from acckv.cache.cache import compressed_layers
from acckv.models import find_adapter
from acckv.runtime.lora import LoraWeights, lora_config
from tests.families import FAMILIES
from tests.reference import Reference
from tests.support import not_none
from tests.support.running import assert_close, generate

GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
KEYDIFF: dict[str, Any] = {"policy": "keydiff", "ratio": 0.3}


def test_the_adapter_of_a_wrapped_model_goes_on_acting() -> None:
    family = FAMILIES["qwen2_5_omni"]
    plain = family.build()
    inputs = family.clip(plain)
    wrapped = get_peft_model(plain, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    reference = Reference(wrapped)
    with KVCompressor(**KEYDIFF)(wrapped) as session:
        tokens, logits = generate(wrapped, inputs, **GREEDY)
        reference.read(inputs, session.last_cache)
        again, _ = generate(session.model, inputs, **GREEDY)
    assert session.model is wrapped.get_base_model() and torch.equal(tokens, again)
    with reference.hiding() as full:
        expected_tokens, expected = generate(full, inputs, **GREEDY)
    assert torch.equal(tokens, expected_tokens)
    assert_close(logits, expected)
    with reference.hiding() as full, full.disable_adapter():
        _, base = generate(full, inputs, **GREEDY)
    assert (logits - base).abs().max() > 1e-2 * expected.abs().max()


def test_lora_of_ones_own_beside_that_of_an_export_is_refused() -> None:
    """Both would act at once, and the export was calibrated without; merged into the weights it is part of the base."""
    model = FAMILIES["videollama2"].build()
    config = lora_config(find_adapter(model), 2, 4, ("q_proj",), "base")
    compressor = KVCompressor(**KEYDIFF, lora=LoraWeights(config, {}))
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(InputError, match="already carries a peft adapter; merge or unload it first"):
        compressor(wrapped).__enter__()
    with compressor(wrapped.merge_and_unload()) as session:
        assert session.attached is not None


def test_prompt_learning_is_refused() -> None:
    """Its entries are in the cache, and no token of the prompt stands for them."""
    model = FAMILIES["videollama2"].build()
    wrapped = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(InputError, match="PROMPT_TUNING adds entries to the cache that no modality names"):
        KVCompressor(**KEYDIFF)(wrapped)


def full_omni(name: str, thinker: Any) -> Any:
    """The class that the hub's checkpoints are loaded with, without the weights of a talker."""
    generation = "2_5" if name == "qwen2_5_omni" else "3"
    prefix = f"Qwen{generation}Omni" + ("Moe" if generation == "3" else "")
    config = getattr(transformers, f"{prefix}Config")(
        thinker_config=thinker.config.to_dict(), enable_audio_output=False
    )
    full = getattr(transformers, f"{prefix}ForConditionalGeneration")._from_config(config).eval()
    full.thinker.load_state_dict(thinker.state_dict())
    codes = ("codec_pad_token", "codec_bos_token", "codec_eos_token", "codec_mask_token")
    full.talker = types.SimpleNamespace(**dict.fromkeys(codes, 0))  # generate reads them even where nothing speaks
    full.speaker_map, full.has_talker = {"Chelsie": None}, False
    return full


@pytest.mark.parametrize("name", ["qwen2_5_omni", "qwen3_omni_moe"])
def test_the_thinker_of_a_full_model_is_compressed(name: str) -> None:
    family = FAMILIES[name]
    thinker = family.build()
    inputs = family.clip(thinker)
    full = full_omni(name, thinker)
    only_text = {"generation_mode": "text"} if name == "qwen2_5_omni" else {"return_audio": False}
    with KVCompressor(**KEYDIFF)(thinker) as session:
        expected = thinker.generate(**inputs, **GREEDY)
        held = [layer.physical for layer in compressed_layers(not_none(session.last_cache))]
    with KVCompressor(**KEYDIFF)(full) as session:
        answer = full.generate(
            **inputs, **only_text, thinker_max_new_tokens=5, thinker_do_sample=False, thinker_eos_token_id=None
        )
        assert session.model is full.thinker
        assert [layer.physical for layer in compressed_layers(not_none(session.last_cache))] == held
    found = answer[0] if isinstance(answer, tuple) else answer
    assert torch.equal(found if isinstance(found, torch.Tensor) else found.sequences, expected)
    assert "generate" not in vars(full.thinker) and "forward" not in vars(full.thinker.model)
