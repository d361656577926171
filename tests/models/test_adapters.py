"""Which models are served: checkpoints of every family by path, and errors that name what is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from acckv import InputError, KVCompressor
from acckv.method.modality import ModalityMap
from acckv.models import Family, GenericAdapter, ModelAdapter, find_adapter, load_model, loading
from tests.families import FAMILIES, TEXT

SERVED = ["qwen2_5_omni", "qwen3_omni_moe", "gemma4", "gemma4_unified"]


class NoProcessor:
    """Stands for AutoProcessor: these checkpoints have no tokenizer."""

    @staticmethod
    def from_pretrained(name: Any) -> str:
        return "processor"


@pytest.mark.parametrize("name", SERVED)
def test_load_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "AutoProcessor", NoProcessor)
    family = FAMILIES[name]
    model = family.build()
    model.save_pretrained(tmp_path)
    loaded, processor = load_model(tmp_path, dtype="bfloat16", attn_implementation="eager")
    assert find_adapter(loaded).attention_implementation == "eager"
    loaded, processor = load_model(tmp_path, dtype="bfloat16")
    assert find_adapter(loaded).attention_implementation == "sdpa"
    assert type(loaded) is type(model) and processor == "processor"
    assert loaded.dtype == torch.bfloat16 and not loaded.training
    assert find_adapter(loaded).dimensions == find_adapter(model).dimensions
    for one, other in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other.bfloat16())


def test_load_the_thinker_of_a_full_omni_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hub checkpoints hold a talker too; what generates text is taken out of them."""
    monkeypatch.setattr(loading, "AutoProcessor", NoProcessor)
    thinker = FAMILIES["qwen2_5_omni"].build()
    config = transformers.Qwen2_5OmniConfig(thinker_config=thinker.config.to_dict(), enable_audio_output=False)
    whole = transformers.Qwen2_5OmniForConditionalGeneration._from_config(config)
    whole.thinker.load_state_dict(thinker.state_dict())
    whole.save_pretrained(tmp_path)
    loaded, _ = load_model(tmp_path)
    assert type(loaded) is type(thinker)
    for (name, one), other in zip(loaded.named_parameters(), thinker.parameters(), strict=True):
        assert torch.equal(one, other), name


def tiny(kind: str, **options: Any) -> Any:
    """A model that acckv does not serve, or not in this state."""
    small = {key: value for key, value in TEXT.items() if key != "num_key_value_heads"}
    builders: dict[str, Callable[..., Any]] = {
        "base": lambda: transformers.Qwen2Model(transformers.Qwen2Config(**TEXT)),
        "encoder_decoder": lambda: transformers.BartForConditionalGeneration(
            transformers.BartConfig(
                vocab_size=64,
                d_model=16,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=16,
                decoder_ffn_dim=16,
            )
        ),
        "state_space": lambda: transformers.MambaForCausalLM(
            transformers.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)
        ),
        "other_layers": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2)
        ),
        "windows_only": lambda: transformers.MistralForCausalLM(
            transformers.MistralConfig(**small, num_key_value_heads=2, sliding_window=8)
        ),
    }
    return builders[kind](**options)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("base", "is no causal language model; pass the class that generates text"),
        ("encoder_decoder", "is no causal language model"),
        ("state_space", "it has layers of type linear_attention; only attention caches can be compressed"),
        ("other_layers", "its decoder has no `layers`; write an acckv.models.ModelAdapter"),
        ("windows_only", "no full-attention layer with a cache of its own"),
    ],
)
def test_unserved_models_are_told_what_is_missing(kind: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        KVCompressor()(tiny(kind))


def test_the_generic_adapter_serves_sliding_windows_too() -> None:
    """A decoder of transformers that mixes windows and full layers, such as Gemma 3's or Qwen2's."""
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    config = transformers.Qwen2Config(**TEXT, use_sliding_window=True, sliding_window=8, layer_types=layers)
    adapter = find_adapter(transformers.Qwen2ForCausalLM(config))
    assert isinstance(adapter, GenericAdapter)
    assert [layer.slot for layer in adapter.attention_layers] == [None, 0, None] and adapter.has_windows


@pytest.mark.parametrize(
    ("modality_ids", "message"),
    [
        (None, "must be given with the inputs"),
        (torch.zeros(1, 3, dtype=torch.long), r"needs integers of shape \[1, 20\], one a token, not \(1, 3\)"),
        (torch.zeros(1, 20), "needs integers of shape"),
        (torch.full((1, 20), 7), "other values than 0 text, 1 video, 2 audio, 3 padding"),
    ],
)
def test_modality_ids_are_checked(modality_ids: Any, message: str) -> None:
    family = FAMILIES["avicuna"]
    model = family.build()
    inputs = {**family.clip(model), "modality_ids": modality_ids}
    with KVCompressor("keydiff")(model), pytest.raises(InputError, match=message):
        model.generate(**inputs, max_new_tokens=2)


def test_a_family_of_ones_own_takes_the_place_of_the_generic_one() -> None:
    class Own(ModelAdapter):
        @property
        def decoder(self) -> Any:
            return self.model.model

    model = FAMILIES["avicuna"].build()
    family = Family(title="Own", model_types=("llama",), model_adapter=Own)
    with KVCompressor()(model, family=family) as session:
        assert isinstance(session.adapter, Own)
    assert session.adapter.dimensions == find_adapter(model).dimensions


def test_placeholders_are_labelled_by_the_ids_of_the_configuration() -> None:
    ids = torch.tensor([[0, 0, 5, 8, 8, 9, 7, 5], [5, 8, 9, 9, 7, 5, 5, 5]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8])
    model: Any = SimpleNamespace(config=SimpleNamespace(image_token_id=7, video_token_index=8, audio_token_id=9))
    longer = torch.cat([torch.zeros_like(mask), mask], dim=1)
    for given in (mask, longer):
        labels = ModelAdapter(model).label(ids, given)
        assert labels.labels.tolist() == [[3, 3, 0, 1, 1, 2, 1, 0], [0, 1, 2, 2, 1, 0, 0, 0]]
    assert labels.counts().tolist() == [[3, 1], [2, 2]]
    assert labels.media_end().tolist() == [7, 5]
    assert ModalityMap(torch.zeros(1, 3, dtype=torch.long)).media_end().tolist() == [0]
