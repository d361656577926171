"""Folders as a hub would hold them: tiny random-weight models of the real classes with their real processors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from acckv.tiny.build import vocabulary
from tests.families import AUDIO, AUDIO_BOS, AUDIO_EOS, FAMILIES, IMAGE, VIDEO, VISION_BOS, VISION_EOS

SIZE = 160
"""Words of Gemma's vocabulary."""
DECODER_SIZE = 264
QWEN_TURNS = ("<|im_start|>", "<|im_end|>")
MARKERS = {
    "<pad>": 0,
    "<eos>": 1,
    "<bos>": 2,
    "<|turn>": 3,
    "<turn|>": 4,
    "<|audio|>": AUDIO,
    "<|image|>": IMAGE,
    "<|video|>": VIDEO,
    "<|audio>": AUDIO_BOS,
    "<audio|>": AUDIO_EOS,
    "<|image>": VISION_BOS,
    "<image|>": VISION_EOS,
    "<unk>": 7,
}
# As Gemma's own template writes a turn: placeholders without anything around them, text without outer blanks.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|turn>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<|video|>{% elif part['type'] == 'audio' %}<|audio|>"
    "{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}<turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn>model\n{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Words of the generated clips' questions, digits of time stamps, and Gemma's special tokens at the tests' ids."""
    words = [word for word in vocabulary() if not word.startswith("<")]
    words += ["model", ":", *(f"{number:02d}" for number in range(60))]
    free = (number for number in range(SIZE) if number not in MARKERS.values())
    ids = {**MARKERS, **dict(zip(words[: SIZE - len(MARKERS)], free, strict=False))}
    ids |= {f"<unused{number}>": number for number in free}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<turn|>",
        bos_token="<bos>",
        unk_token="<unk>",
        extra_special_tokens={
            "image_token": "<|image|>",
            "audio_token": "<|audio|>",
            "boi_token": "<|image>",
            "eoi_token": "<image|>",
            "boa_token": "<|audio>",
            "eoa_token": "<audio|>",
            "sot_token": "<|turn>",
        },
        padding_side="left",
        model_max_length=8192,
    )


def gemma4(folder: Path, kind: str = "gemma4") -> Path:
    """Gemma 4 or Gemma 4 Unified: 4 tokens a picture of 84 x 84, 25 a second of sound."""
    config = FAMILIES[kind].config()
    config.text_config.vocab_size = SIZE
    patch, pooled = (21, 2) if kind == "gemma4" else (14, 3)
    config.vision_config.patch_size, config.vision_config.pooling_kernel_size = patch, pooled
    sizes = {"patch_size": patch, "pooling_kernel_size": pooled, "do_resize": False}
    extractor: Any
    if kind == "gemma4":
        config.text_config.vocab_size_per_layer_input = SIZE
        extractor = transformers.Gemma4AudioFeatureExtractor(feature_size=8)
        names = ("Gemma4Processor", "Gemma4ImageProcessor", "Gemma4VideoProcessor")
    else:
        config.audio_config.audio_embed_dim = 640
        extractor = transformers.Gemma4UnifiedAudioFeatureExtractor()
        names = ("Gemma4UnifiedProcessor", "Gemma4UnifiedImageProcessor", "Gemma4UnifiedVideoProcessor")
    processor, image, video = (getattr(transformers, name) for name in names)
    torch.manual_seed(0)
    model = FAMILIES[kind].model_class._from_config(config)
    for layer in model.model.language_model.layers:
        layer.self_attn.q_norm.weight.data.fill_(0.25)  # with 1, attention saturates and multiplies rounding errors
    model.generation_config = transformers.GenerationConfig(eos_token_id=4, pad_token_id=0, do_sample=False)
    model.save_pretrained(folder)
    processor(extractor, image(**sizes), tokenizer(), video(**sizes), chat_template=TEMPLATE).save_pretrained(folder)
    return folder


def decoder(folder: Path, kind: str = "videollama2") -> Path:
    """A plain decoder with its family's own tokenizer: the Qwen2 of VideoLLaMA2 or the Llama of AVicuna.

    A token is a byte; Llama's tokenizer has no padding token, as Vicuna's may have none.
    """
    config = FAMILIES[kind].config()
    config.vocab_size = DECODER_SIZE
    words: PreTrainedTokenizerBase
    if kind == "videollama2":
        vocabulary = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *QWEN_TURNS]
        words = transformers.Qwen2Tokenizer(dict(zip(vocabulary, range(DECODER_SIZE), strict=False)))
        words.add_special_tokens({"additional_special_tokens": list(QWEN_TURNS)})
    else:
        vocabulary = ["<unk>", "<s>", "</s>", "\u2581", *(f"<0x{byte:02X}>" for byte in range(256))]
        words = transformers.LlamaTokenizer(dict(zip(vocabulary, range(DECODER_SIZE), strict=False)))
    torch.manual_seed(0)
    model = FAMILIES[kind].model_class._from_config(config)
    model.generation_config = transformers.GenerationConfig(eos_token_id=words.eos_token_id, do_sample=False)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
