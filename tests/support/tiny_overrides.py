"""Fields that a class's tiny configuration needs beside the general ones: class or config name -> field -> value.

Fields with a dot are set in a part, after everything has been made small.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import SiglipVisionConfig, TimmWrapperConfig

from tests.families import FAMILIES, TEXT

SIGLIP: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
MIXED = ["sliding_attention", "full_attention"] * 2
GEMMA4: dict[str, Any] = {
    **TEXT,
    "num_hidden_layers": 4,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 8,
    "layer_types": MIXED,
    "vocab_size_per_layer_input": 128,
}


ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
YARN = {"original_max_position_embeddings": 512, "llama_4_scaling_beta": 0.1, "partial_rotary_factor": 1.0}
PERCEPTION = TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args={"embed_dim": 192})
ASSISTANT = {**GEMMA4, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 4}
INDEXER: dict[str, Any] = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}
GEMMA3N: dict[str, Any] = {
    **{"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": MIXED, "laurel_rank": 8, "head_dim": 16},
    **{"activation_sparsity_pattern": [0.0] * 4, "intermediate_size": [64] * 4, "sliding_window": 8},
}


def _gemma4(name: str) -> Callable[[], Any]:
    return lambda: FAMILIES[name].config()


def _gemma4_text(name: str, **more: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, name)(**{**GEMMA4, **more})


def _full_omni(name: str, family: str) -> Any:
    thinker = FAMILIES[family].config().to_dict()
    return getattr(transformers, name)(thinker_config=thinker, enable_audio_output=False)


def _dots3_note() -> Any:
    sizes = {"head_dim": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
    ranks = {"q_lora_rank": 16, "kv_lora_rank": 16, "num_attention_heads": 4, "num_key_value_heads": 4}
    sliding = {f"swa_{name}": value for name, value in {**sizes, **ranks}.items()}
    return transformers.Dots3NoteTextConfig(**{**TEXT, **sizes, **ranks, **sliding, "num_hidden_layers": 4})


OVERRIDES: dict[str, Any] = {
    "Gemma4ForCausalLM": _gemma4_text("Gemma4TextConfig", num_kv_shared_layers=0, hidden_size_per_layer_input=8),
    "Gemma4ForConditionalGeneration": _gemma4("gemma4"),
    "Gemma4UnifiedForConditionalGeneration": _gemma4("gemma4_unified"),
    "Gemma4UnifiedForCausalLM": _gemma4_text("Gemma4UnifiedTextConfig", num_kv_shared_layers=0),
    "AyaVisionConfig": {"vision_config": SiglipVisionConfig(**SIGLIP)},
    "FastVlmConfig": {"vision_config": SiglipVisionConfig(**SIGLIP)},
    "ChameleonConfig": {"vocabulary_map": {"<image>": 100}},
    "Emu3Config": {"vocabulary_map": {"<image>": 100}},
    "Lfm2Config": {"layer_types": ["conv", "full_attention"] * 8, "num_hidden_layers": 16},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4, "num_dense_layers": 1},
    "Dots1Config": {"num_local_experts": 4, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "DbrxConfig": {
        "attn_config.rope_theta": 1e4,
        "attn_config.kv_n_heads": 2,
        "ffn_config.ffn_hidden_size": 64,
        "ffn_config.moe_num_experts": 4,
        "ffn_config.moe_top_k": 2,
    },
    "CohereCompassConfig": {
        "text_config.rope_parameters": {kind: dict(ROPE) for kind in MIXED},
        "text_config.layer_types": MIXED,
    },
    "CohereCompassTextConfig": {
        "rope_parameters": {kind: dict(ROPE) for kind in MIXED},
        "layer_types": MIXED,
        "num_hidden_layers": 4,
    },
    "DeepseekOcr2Config": {"text_config.mlp_layer_types": ["dense", *["sparse"] * 3]},
    "DoryConfig": {".sliding_window": 64},
    "Ernie4_5_VLMoeConfig": {"text_config.rope_parameters": {**ROPE, "mrope_section": [3, 3, 2]}},
    "Gemma3nTextConfig": GEMMA3N,
    "Gemma3nConfig": {f"text_config.{name}": value for name, value in GEMMA3N.items()},
    "Granite4VisionConfig": {"deepstack_layer_map": [], "spatial_target_layers": [], "downsample_rate": "4/8"},
    "Mistral4Config": {"rope_parameters": {**ROPE, **YARN}},
    "MoonshineStreamingConfig": {"num_key_value_heads": 4},
    "MoshiConfig": {"audio_vocab_size": 64},
    "Qwen3OmniMoeConfig": lambda: _full_omni("Qwen3OmniMoeConfig", "qwen3_omni_moe"),
    "Qwen2_5OmniConfig": lambda: _full_omni("Qwen2_5OmniConfig", "qwen2_5_omni"),
    "Qwen3OmniMoeTalkerConfig": {"spatial_merge_size": 2, "text_config.shared_expert_intermediate_size": 64},
    "Qwen4ExpTextConfig": {f".{name}": value for name, value in INDEXER.items()},
    "Qwen4ExpConfig": {f"text_config.{name}": value for name, value in INDEXER.items()},
    "PerceptionLMConfig": {"vision_config": PERCEPTION},
    "GlmImageConfig": {"text_config.vision_vocab_size": 128},
    "Dots3NoteTextConfig": lambda: _dots3_note(),
    "Dots3NoteConfig": lambda: transformers.Dots3NoteConfig(
        text_config=_dots3_note(),
        vision_config={
            **{
                "adapter_in_dim": 64,
                "adapter_out_dim": 64,
                "pyramid_num_routed": [-1, 4],
                "num_hidden_layers": 2,
                "intermediate_size": 64,
            },
            **{"hidden_size": 64, "num_attention_heads": 4, "moe_intermediate_size": 64},
        },
        audio_config={"adapter_out_dim": 64, "num_hidden_layers": 1},
    ),
    "Gemma4AssistantConfig": lambda: transformers.Gemma4AssistantConfig(text_config=ASSISTANT),
    "Gemma4UnifiedAssistantConfig": lambda: transformers.Gemma4UnifiedAssistantConfig(text_config=ASSISTANT),
    "Step3p7Config": {"text_config.sliding_window": 8},
}

#: What a class's forward needs besides a prompt.
MORE_INPUTS: dict[str, dict[str, Any]] = {
    "CsmDepthDecoderForCausalLM": {"backbone_last_hidden_state": torch.zeros(1, 2048)}
}
