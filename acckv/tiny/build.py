"""The tiny AV-LLM: a small Qwen2.5-Omni thinker with its own processor, built from nothing.

The model class and the processor class are the real ones of transformers, only smaller; saved with `save_pretrained`
they load like any checkpoint.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    WhisperFeatureExtractor,
)

from acckv.data.synthetic.events import COLOURS, PITCHES, SHAPES, TEMPLATES, TIMBRES
from acckv.data.synthetic.render import SIDE

MEDIA_TOKENS = {
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
    "image_token": "<|IMAGE|>",
    "video_token": "<|VIDEO|>",
    "audio_token": "<|AUDIO|>",
}
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *MEDIA_TOKENS.values(), "<|unk|>")
ROLES = ("system", "user", "assistant")
POSITION_IDS_PER_SECOND = 8
"""Audio tokens (and positions) a second; mel frames a second are four times as many."""
SECONDS_PER_CHUNK = 1
MEL_BINS = 32
HOP_LENGTH = 500
MAX_SECONDS = 64
PATCH = 14
VOCABULARY_SIZE = 96

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }} "
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<|vision_bos|><|VIDEO|><|vision_eos|>"
    "{% elif part['type'] == 'image' %}<|vision_bos|><|IMAGE|><|vision_eos|>"
    "{% elif part['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


def vocabulary() -> dict[str, int]:
    """Every word of the questions and answers, and the special tokens: word -> id."""
    words: list[str] = [*ROLES, *COLOURS, *SHAPES, *TIMBRES, *PITCHES, "none", "silent", ";", "?", ".", ","]
    for template in TEMPLATES.values():
        pieces = template.replace("?", " ").replace(".", " ").lower().split()
        words += [piece for piece in pieces if "<" not in piece]
    unique = list(dict.fromkeys([*SPECIAL_TOKENS, *words]))
    if len(unique) > VOCABULARY_SIZE:
        raise RuntimeError(f"{len(unique)} words do not fit into a vocabulary of {VOCABULARY_SIZE}")
    return {word: index for index, word in enumerate(unique)}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer with the special tokens of Qwen2.5-Omni; text is lower-cased, punctuation split off."""
    core = Tokenizer(models.WordLevel(vocabulary(), unk_token="<|unk|>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        unk_token="<|unk|>",
        extra_special_tokens={**MEDIA_TOKENS, "im_start_token": "<|im_start|>"},
        padding_side="left",
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )


def build_processor() -> Qwen2_5OmniProcessor:
    """Processor of the tiny model: 9 video tokens a picture pair of 84x84, 8 audio tokens a second.

    `acckv.data.encoding` scales pictures of another size to about as many pixels: Qwen2_5OmniProcessor puts bounds of
    its own in place of those of its parts.
    """
    extractor = WhisperFeatureExtractor(
        feature_size=MEL_BINS,
        sampling_rate=16_000,
        hop_length=HOP_LENGTH,
        n_fft=512,
        chunk_length=MAX_SECONDS,
        return_attention_mask=True,
        position_id_per_seconds=POSITION_IDS_PER_SECOND,
        seconds_per_chunk=SECONDS_PER_CHUNK,
    )
    pixels = {"shortest_edge": SIDE**2, "longest_edge": SIDE**2}  # least and most of a picture, so the names
    video = Qwen2VLVideoProcessor(
        patch_size=PATCH, temporal_patch_size=2, merge_size=2, do_resize=False, size=pixels, cap_pixels_per_frame=False
    )
    image = Qwen2VLImageProcessor(patch_size=PATCH, temporal_patch_size=2, merge_size=2, do_resize=False, size=pixels)
    processor = Qwen2_5OmniProcessor(
        image_processor=image,
        video_processor=video,
        feature_extractor=extractor,
        tokenizer=build_tokenizer(),
        chat_template=CHAT_TEMPLATE,
    )
    return processor


def build_config() -> Qwen2_5OmniThinkerConfig:
    """Configuration of the tiny thinker: 1.6 million parameters."""
    ids = vocabulary()
    init = {"initializer_range": 0.06}
    return Qwen2_5OmniThinkerConfig(
        text_config={
            "vocab_size": VOCABULARY_SIZE,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [8, 4, 4]},
            "pad_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "bos_token_id": ids["<|endoftext|>"],
            "tie_word_embeddings": False,
            **init,
        },
        audio_config={
            "num_mel_bins": MEL_BINS,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 192,
            "d_model": 64,
            "max_source_positions": 1500,
            "n_window": 2 * POSITION_IDS_PER_SECOND * SECONDS_PER_CHUNK,
            "output_dim": 128,
            **init,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_heads": 4,
            "in_channels": 3,
            "patch_size": PATCH,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 8 * PATCH,
            "out_hidden_size": 128,
            "fullatt_block_indexes": [1],
            **init,
        },
        audio_token_index=ids["<|AUDIO|>"],
        image_token_index=ids["<|IMAGE|>"],
        video_token_index=ids["<|VIDEO|>"],
        vision_start_token_id=ids["<|vision_bos|>"],
        vision_end_token_id=ids["<|vision_eos|>"],
        audio_start_token_id=ids["<|audio_bos|>"],
        audio_end_token_id=ids["<|audio_eos|>"],
        user_token_id=ids["user"],
        position_id_per_seconds=POSITION_IDS_PER_SECOND,
        seconds_per_chunk=SECONDS_PER_CHUNK,
        **init,
    )


def build_model() -> Qwen2_5OmniThinkerForConditionalGeneration:
    """The tiny thinker with random weights, on the CPU in float32."""
    model = Qwen2_5OmniThinkerForConditionalGeneration(build_config())
    ids = vocabulary()
    model.generation_config = GenerationConfig(
        eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"], do_sample=False
    )
    return model


def save(model: Qwen2_5OmniThinkerForConditionalGeneration, folder: str | Path) -> None:
    """Save model and processor to `folder`, each file replaced by a finished one."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    build_processor().save_pretrained(folder)
