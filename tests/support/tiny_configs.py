"""Tiny configurations of any model class of transformers: its defaults, made small field by field.

Decoders become narrow and short, with every kind of layer that they have. Towers keep their widths, which hang together
in ways of their own, and lose layers: no tower runs here, it only has to be built.
"""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PreTrainedConfig

HIDDEN, HEADS, KV_HEADS, HEAD_SIZE, LAYERS, VOCABULARY, EXPERTS, WINDOW = 64, 4, 2, 16, 4, 128, 4, 8
DEPTHS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "encoder_layers"),
    *("decoder_layers", "depth", "layers", "num_blocks", "decoder_num_layers", "num_encoder_layers"),
)
HEAD_COUNTS = (
    *("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"),
    *("attention_heads", "swa_num_attention_heads", "linear_num_value_heads", "linear_num_heads", "index_n_heads"),
    *("num_encoder_attention_heads", "num_decoder_attention_heads"),
)
KV_COUNTS = (
    *("num_key_value_heads", "swa_num_key_value_heads", "linear_num_key_heads", "num_query_groups", "kv_n_heads"),
    *("num_kv_heads", "num_global_key_value_heads"),
)
WIDTHS = (
    *("hidden_size", "d_model", "n_embd", "embedding_size", "word_embed_proj_dim", "intermediate_size", "ffn_dim"),
    *("encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "ffn_hidden_size", "n_inner", "dim_ff", "moe_intermediate_size"),
    *("shared_expert_intermediate_size", "intermediate_size_mlp", "dense_intermediate_size", "ple_embed_dim"),
    *("shared_intermediate_size", "moe_shared_expert_intermediate_size", "attention_hidden_size"),
    *("expert_ffn_hidden_size", "shared_experts_intermediate_size", "block_ff_dim"),
)
HEAD_SIZES = (
    *("head_dim", "attention_head_dim", "kv_channels", "d_kv", "swa_head_dim", "linear_head_dim", "dim_head"),
    *("linear_key_head_dim", "linear_value_head_dim", "v_head_dim", "swa_v_head_dim", "index_head_dim"),
    *("qk_rope_head_dim", "qk_nope_head_dim", "global_head_dim"),
)
EXPERT_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "num_moe_experts")
TOP_K = ("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token", "moe_top_k", "top_k_experts")
SIZES: dict[str, Any] = {
    **dict.fromkeys(DEPTHS, LAYERS),
    **dict.fromkeys(HEAD_COUNTS, HEADS),
    **dict.fromkeys(KV_COUNTS, KV_HEADS),
    **dict.fromkeys(WIDTHS, HIDDEN),
    **dict.fromkeys(HEAD_SIZES, HEAD_SIZE),
    **dict.fromkeys(EXPERT_COUNTS, EXPERTS),
    **dict.fromkeys(TOP_K, 2),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_chunk_size"), WINDOW),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 512),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "num_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("initializer_range", "init_std", "initializer_factor"), 0.1),
    # Sparse attention must be sparse within a prompt of twenty tokens, too.
    **{"index_topk": 8, "index_block_size": 4, "index_topk_blocks": 2, "index_local_blocks": 1, "keep_window_size": 8},
    **{"vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8},
    **{"kv_lora_rank": 16, "q_lora_rank": 16, "qk_head_dim": 2 * HEAD_SIZE, "rotary_dim": 8, "max_window_layers": 2},
    **{"encoder_hash_byte_group_vocab": 64, "ngram_vocab_size_base": 64, "rel_extent": 16, "rel_window": 16},
}
#: Set where a class's default is None, too.
REQUIRED = ("head_dim", "num_key_value_heads", "num_experts_per_tok")


def shrink(config: PreTrainedConfig) -> PreTrainedConfig:
    """Make a configuration small, in place."""
    text = config.get_text_config(decoder=True)
    _walk(config, text, getattr(text, "hidden_size", None))
    return config


def put(config: Any, name: str, value: Any) -> None:
    """Set a field; some have a property that refuses."""
    try:
        setattr(config, name, value)
    except (AttributeError, NotImplementedError):
        return


def sampled(kinds: list[Any], count: int) -> list[Any]:
    """`count` of the entries that still have every kind among them, as often as there is room, in their order."""
    chosen: list[int] = []
    while len(chosen) < count:
        kinds_left = list(dict.fromkeys(str(kind) for index, kind in enumerate(kinds) if index not in chosen))
        for kind in kinds_left[-count:]:
            if len(chosen) < count:
                chosen.append(next(i for i, k in enumerate(kinds) if i not in chosen and str(k) == kind))
    return [kinds[index] for index in sorted(chosen)]


def _walk(config: Any, text: Any, width: int | None) -> None:
    parts = {name: part for name, part in vars(config).items() if isinstance(part, PreTrainedConfig)}
    for name, part in parts.items():
        is_decoder = any(word in name for word in ("text", "decoder", "thinker", "talker", "predictor", "llm", "lang"))
        if part is text or is_decoder:
            _walk(part, text, width)
        else:
            _shorten(part, width)
    if config is text or (hasattr(config, "vocab_size") and not parts):
        _narrow(config)
    _tokens(config)


def _value(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except (AttributeError, NotImplementedError, ValueError):  # varies over layers
        return vars(config).get(name)


def _per_layer(config: Any, depth: int, layers: int) -> dict[str, list[Any]]:
    """One entry a layer, cut to fewer layers."""
    return {
        name: sampled(value, layers)
        for name, value in vars(config).items()
        if isinstance(value, list) and len(value) == depth > layers
    }


def _narrow(config: Any) -> None:
    """A decoder."""
    lists = _per_layer(config, _value(config, "num_hidden_layers") or LAYERS, LAYERS)
    heads, kv = _value(config, "num_attention_heads"), _value(config, "num_key_value_heads")
    for name, size in SIZES.items():
        value = _value(config, name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number or (value is None and name in REQUIRED and hasattr(config, name)):
            put(config, name, size)
    for name, value in lists.items():
        put(config, name, value)
    if isinstance(kv, int):
        put(config, "num_key_value_heads", HEADS if kv == heads else 1 if kv == 1 else KV_HEADS)
    rope = _value(config, "rope_parameters")
    if isinstance(rope, dict):
        for part in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
            if "rope_theta" in part:
                size = int(HEAD_SIZE * part.get("partial_rotary_factor", 1)) // 2
                part["mrope_section"] = [size - 2 * (3 * size // 8), 3 * size // 8, 3 * size // 8]


def _shorten(config: Any, width: int | None) -> None:
    """A tower: fewer layers; where it meets the decoder, of the decoder's width."""
    for part in list(vars(config).values()):
        if isinstance(part, PreTrainedConfig):
            _shorten(part, width)
    for name in DEPTHS:
        before = _value(config, name)
        if isinstance(before, int) and before > 2:
            for key, value in _per_layer(config, before, 2).items():
                put(config, key, value)
            put(config, name, 2)
    for name in ("fullatt_block_indexes", "deepstack_visual_indexes"):
        if _value(config, name):
            put(config, name, [0, 1])
    for name in ("out_hidden_size", "output_dim", "text_hidden_size", "projection_dim", "output_proj_dims"):
        if width and _value(config, name) == width:
            put(config, name, HIDDEN)


def _tokens(config: Any) -> None:
    """Special tokens inside the vocabulary, and no two placeholders alike."""
    place = 100
    for name, value in list(vars(config).items()):
        if not isinstance(value, int) or not name.endswith(("_token_id", "_token_index")):
            continue
        if value >= VOCABULARY - 2 or name.startswith(("image", "video", "audio")):
            put(config, name, place)
            place += 1
    if isinstance(_value(config, "eos_token_id"), list):
        config.eos_token_id = 1


def tiny_config(name: str) -> PreTrainedConfig:
    """The small configuration of a class, by its name."""
    from tests.support.tiny_overrides import OVERRIDES

    config_class = getattr(transformers, name).config_class
    given = OVERRIDES.get(name, OVERRIDES.get(config_class.__name__, {}))
    if callable(given):
        return given()
    config = shrink(config_class(**{key: value for key, value in given.items() if "." not in key}))
    for key, value in given.items():
        if "." not in key:
            continue
        *path, field = [step for step in key.split(".") if step]
        part: Any = config
        for step in path:
            part = getattr(part, step)
        setattr(part, field, value)
    return config
