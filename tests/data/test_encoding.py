"""Clips and questions become the model inputs that the chat template says, for the tiny and for full-size settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Qwen2_5OmniProcessor,
    Qwen2VLVideoProcessor,
    Qwen3OmniMoeProcessor,
    WhisperFeatureExtractor,
)

from acckv.data.encoding import encode, encode_context, encode_media, question_suffix
from acckv.errors import InputError
from acckv.models.clips import Media
from acckv.models.qwen_omni import timing
from acckv.tiny.build import build_model, build_processor
from tests.data.media_files import sound_of

QUESTIONS = ("What colour was the circle?", "Which sound came after the beep?", "Describe the clip.")


def clip(seconds: int, seed: int = 0, sound: bool = True, side: int = 84) -> Media:
    rng = torch.Generator().manual_seed(seed)
    frames = torch.randint(0, 256, (2 * seconds, 3, side, side), generator=rng, dtype=torch.uint8)
    audio = torch.randn(16_000 * seconds, generator=rng) * 0.1 if sound else None
    return Media(frames, audio, float(seconds), Path(f"clip{seed}.mp4"))


@pytest.fixture(scope="module")
def processor() -> Qwen2_5OmniProcessor:
    return build_processor()


@pytest.fixture(scope="module")
def full_size(processor: Qwen2_5OmniProcessor) -> Qwen2_5OmniProcessor:
    """A processor with the settings of the 7B model (but the small tokenizer)."""
    return Qwen2_5OmniProcessor(
        image_processor=processor.image_processor,
        video_processor=Qwen2VLVideoProcessor(cap_pixels_per_frame=False),
        feature_extractor=WhisperFeatureExtractor(feature_size=128, chunk_length=300),
        tokenizer=processor.tokenizer,
        chat_template=processor.chat_template,
    )


def with_template(processor: Qwen2_5OmniProcessor, template: str) -> Qwen2_5OmniProcessor:
    parts = (processor.image_processor, processor.video_processor, processor.feature_extractor, processor.tokenizer)
    return Qwen2_5OmniProcessor(*parts, template)


def test_the_prompt_token_by_token(processor: Qwen2_5OmniProcessor) -> None:
    inputs = encode(processor, [clip(2)], ["What colour was the circle?"])
    media = "<|audio_bos|>" + ("<|VIDEO|>" * 9 + "<|AUDIO|>" * 8) * 2 + "<|audio_eos|>"
    text = "<|im_start|>user<|vision_bos|>" + media + "<|vision_eos|>what colour was the circle?<|im_end|>"
    text += "<|im_start|>assistant"
    assert inputs["input_ids"].tolist() == [processor.tokenizer(text)["input_ids"]]
    assert processor.tokenizer.unk_token_id not in inputs["input_ids"]
    assert inputs["use_audio_in_video"] is True
    assert inputs["video_grid_thw"].tolist() == [[2, 6, 6]]
    assert inputs["input_features"].shape == (1, 32, 64)
    assert inputs["feature_attention_mask"].tolist() == [[1] * 64]


def test_a_clip_without_sound(processor: Qwen2_5OmniProcessor) -> None:
    inputs = encode(processor, [clip(2, sound=False)], ["Describe the clip."])
    text = "<|im_start|>user<|vision_bos|>" + "<|VIDEO|>" * 18 + "<|vision_eos|>describe the clip.<|im_end|>"
    assert inputs["input_ids"].tolist() == [processor.tokenizer(text + "<|im_start|>assistant")["input_ids"]]
    assert inputs["use_audio_in_video"] is False and "input_features" not in inputs


def test_sound_alone(processor: Qwen2_5OmniProcessor) -> None:
    heard = replace(clip(2), frames=None)
    whole, context = encode(processor, [heard], [QUESTIONS[0]]), encode_context(processor, heard)
    media = "<|audio_bos|>" + "<|AUDIO|>" * 16 + "<|audio_eos|>"
    text = "<|im_start|>user" + media + "what colour was the circle?<|im_end|><|im_start|>assistant"
    assert whole["input_ids"].tolist() == [processor.tokenizer(text)["input_ids"]]
    assert encode_media(processor, heard)["input_ids"].tolist() == [processor.tokenizer(media)["input_ids"]]
    suffix = question_suffix(processor, QUESTIONS[0])
    assert torch.equal(torch.cat([context["input_ids"][0], suffix]), whole["input_ids"][0])
    assert whole["use_audio_in_video"] is False and "pixel_values_videos" not in whole
    both = encode(processor, [clip(2)], [QUESTIONS[0]])
    assert torch.equal(whole["input_features"], both["input_features"])
    model = build_model().eval()
    with torch.no_grad():
        assert bool(model(**whole).logits.isfinite().all())
    with pytest.raises(InputError, match="with and without pictures cannot share a batch"):
        encode(processor, [clip(2), heard], QUESTIONS[:2])


def test_a_picture_with_longer_sound(processor: Qwen2_5OmniProcessor) -> None:
    """As `join_media` makes it: all of the sound follows the only temporal patch."""
    inputs = encode(processor, [replace(clip(1), audio=clip(3).audio)], [QUESTIONS[0]])
    text = "<|audio_bos|>" + "<|VIDEO|>" * 9 + "<|AUDIO|>" * 24 + "<|audio_eos|>"
    ids = processor.tokenizer(text)["input_ids"]
    assert inputs["input_ids"][0, 3 : 3 + len(ids)].tolist() == ids
    with torch.no_grad():
        assert bool(build_model().eval()(**inputs).logits.isfinite().all())


def test_timing_is_saved_with_the_processor(
    processor: Qwen2_5OmniProcessor, full_size: Qwen2_5OmniProcessor, tmp_path: Path
) -> None:
    assert timing(processor) == (8, 1.0)
    assert timing(full_size) == (25, 2.0)
    processor.save_pretrained(tmp_path)
    again = Qwen2_5OmniProcessor.from_pretrained(tmp_path)
    assert timing(again) == (8, 1.0)
    first, second = (encode(p, [clip(3)], [QUESTIONS[0]]) for p in (processor, again))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(second[name])), name


def test_full_size_settings_interleave_two_second_chunks(
    processor: Qwen2_5OmniProcessor, full_size: Qwen2_5OmniProcessor
) -> None:
    media = clip(4, side=112)
    ids = encode(full_size, [media], ["Describe the clip."])["input_ids"][0]
    kinds = {processor.video_token_id: "v", processor.audio_token_id: "a"}
    word = "".join(kinds[i] for i in ids.tolist() if i in kinds)
    tokens = word.count("v") // 4
    assert word == ("v" * 2 * tokens + "a" * 50) * 2


@pytest.mark.parametrize("sound", [True, False])
@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("name", ["processor", "full_size"])
def test_context_and_suffix_make_the_prompt(
    request: pytest.FixtureRequest, name: str, question: str, sound: bool
) -> None:
    chosen = request.getfixturevalue(name)
    media = clip(2, sound=sound)
    whole, context = encode(chosen, [media], [question]), encode_context(chosen, media)
    ids = torch.cat([context["input_ids"][0], question_suffix(chosen, question)])
    assert torch.equal(ids, whole["input_ids"][0])
    assert context["input_ids"][0, -1] == chosen.tokenizer.convert_tokens_to_ids("<|vision_eos|>")
    for key in whole.keys() - {"input_ids", "attention_mask"}:
        assert torch.equal(torch.as_tensor(whole[key]), torch.as_tensor(context[key])), key


def check_left_padded(model: Any, processor: Any, clips: list[Media]) -> None:
    """A batch of clips of different length gives the logits of its rows."""
    batch = encode(processor, clips, QUESTIONS)
    assert batch["attention_mask"][0, 0] == 0 and bool(batch["attention_mask"][:, -1].all())
    with torch.no_grad():
        together = model(**batch).logits[:, -1]
        alone = [model(**encode(processor, [c], [q])).logits[0, -1] for c, q in zip(clips, QUESTIONS, strict=True)]
    torch.testing.assert_close(together, torch.stack(alone), atol=2e-5, rtol=0)


def test_a_left_padded_batch_equals_its_rows(processor: Qwen2_5OmniProcessor) -> None:
    torch.manual_seed(0)
    check_left_padded(build_model().eval(), processor, [clip(2, 1), clip(4, 2), clip(3, 3)])


@pytest.mark.parametrize("name", ["processor", "full_size"])
def test_mel_features_are_those_of_full_padding(request: pytest.FixtureRequest, name: str) -> None:
    """Sound is padded to little more than its length, for speed; the extractor alone pads it to its maximum."""
    chosen = request.getfixturevalue(name)
    clips = [clip(2, 1), clip(4, 2)]
    inputs = encode(chosen, clips, QUESTIONS[:2])
    audio = [sound_of(c).numpy() for c in clips]
    options = {"sampling_rate": 16_000, "return_attention_mask": True, "padding": "max_length", "return_tensors": "pt"}
    full = chosen.feature_extractor(audio, **options)
    frames = inputs["input_features"].shape[-1]
    assert frames == int(full["attention_mask"].sum(-1).max()) < full["attention_mask"].shape[-1]
    assert torch.equal(inputs["feature_attention_mask"], full["attention_mask"][:, :frames].long())
    valid = inputs["feature_attention_mask"].bool()[:, None].expand_as(inputs["input_features"])
    torch.testing.assert_close(
        inputs["input_features"][valid], full["input_features"][..., :frames][valid], atol=1e-5, rtol=0
    )


def test_errors(processor: Qwen2_5OmniProcessor) -> None:
    with pytest.raises(InputError, match=r"clip2\.mp4.*cannot share a batch"):
        encode(processor, [clip(2, 1), clip(2, 2, sound=False)], QUESTIONS[:2])
    with pytest.raises(ValueError, match="2 clips need 2 questions"):
        encode(processor, [clip(2), clip(2)], QUESTIONS[:1])
    with pytest.raises(ValueError, match="at least one clip"):
        encode(processor, [], [])
    long = Media(torch.zeros(2, 3, 84, 84, dtype=torch.uint8), torch.zeros(16_000 * 65), 65.0, Path("long.mp4"))
    with pytest.raises(InputError, match=r"long\.mp4: max_seconds: 65 s of sound, .* takes 64 s; .*cut_long"):
        encode(processor, [long], QUESTIONS[:1])
    slow = Media(torch.zeros(2, 3, 84, 84, dtype=torch.uint8), torch.zeros(8_000), 1.0, Path("slow.mp4"), 2.0, 8_000)
    with pytest.raises(InputError, match="8000 Hz"):
        encode(processor, [slow], QUESTIONS[:1])


def test_sound_that_the_processor_takes_whole_is_taken(processor: Qwen2_5OmniProcessor) -> None:
    """Qwen3-Omni's extractor has Whisper's window of 30 s, beyond which its processor does not cut."""
    own = Qwen3OmniMoeProcessor(
        processor.image_processor,
        processor.video_processor,
        WhisperFeatureExtractor(feature_size=64, chunk_length=1),
        processor.tokenizer,
        processor.chat_template,
    )
    sound = torch.randn(16_000 * 3, generator=torch.Generator().manual_seed(0)) * 0.1
    inputs = encode(own, [Media(None, sound, 3.0, Path("a.wav"))], QUESTIONS[:1])
    text = f"{own.audio_bos_token}{own.audio_token}{own.audio_eos_token}"
    expected = own(text=[text], audio=[sound.numpy()], return_tensors="pt")
    count = int((expected["input_ids"] == own.audio_token_id).sum())
    assert int((inputs["input_ids"] == own.audio_token_id).sum()) == count == 39
    torch.testing.assert_close(inputs["input_features"], expected["input_features"], atol=1e-5, rtol=0)


def test_a_batch_of_clips_at_several_rates_equals_its_rows(processor: Qwen2_5OmniProcessor) -> None:
    """Long clips are sampled at fewer pictures a second; the processor itself takes one rate a batch."""
    model = build_model().eval()
    for sound in (True, False):
        clips = [clip(2, 1, sound), replace(clip(4, 2, sound), fps=1.0), replace(clip(3, 3, sound), fps=0.5)]
        clips = [c if c.audio is None else replace(c, audio=c.audio.repeat(round(2 / c.fps))) for c in clips]
        batch = encode(processor, clips, QUESTIONS)
        rows = [encode(processor, [c], [q]) for c, q in zip(clips, QUESTIONS, strict=True)]
        assert batch.keys() == rows[0].keys()
        assert batch["video_second_per_grid"].tolist() == [1.0, 2.0, 4.0]
        with torch.no_grad():
            together = model(**batch).logits[:, -1]
            alone = torch.stack([model(**row).logits[0, -1] for row in rows])
        torch.testing.assert_close(together, alone, atol=2e-5, rtol=0)


SYSTEM = "What colour was the circle?"
"""Words of the small vocabulary; here they are a system prompt."""


@pytest.mark.parametrize("default", ["", "Describe the clip."])
def test_a_system_prompt_is_the_template_s_own_first_message(processor: Qwen2_5OmniProcessor, default: str) -> None:
    """In place of the default message that a template writes by itself (Qwen2.5-Omni's does), before the media."""
    own = "{% if messages[0]['role'] != 'system' %}<|im_start|> system " + default + " <|im_end|> {% endif %}"
    other = with_template(processor, (own if default else "") + str(processor.chat_template))
    two = [clip(2), clip(2, 1)]
    plain, told = encode(other, two[:1], QUESTIONS[:1]), encode(other, two[:1], QUESTIONS[:1], SYSTEM)
    before = processor.tokenizer(f"<|im_start|> system {SYSTEM} <|im_end|>")["input_ids"]
    unsaid = processor.tokenizer(f"<|im_start|> system {default} <|im_end|>")["input_ids"] if default else []
    ids = told["input_ids"][0].tolist()
    assert ids[: len(before)] == before and ids[len(before) :] == plain["input_ids"][0].tolist()[len(unsaid) :]
    context, suffix = encode_context(other, two[0], SYSTEM), question_suffix(other, QUESTIONS[0])
    assert torch.equal(torch.cat([context["input_ids"][0], suffix]), told["input_ids"][0])
    mixed = encode(other, two, QUESTIONS[:2], [None, SYSTEM])
    for row, (one, question, system) in enumerate(zip(two, QUESTIONS, (None, SYSTEM), strict=False)):
        alone = encode(other, [one], [question], system)["input_ids"][0]
        assert torch.equal(mixed["input_ids"][row][-len(alone) :], alone)


@pytest.mark.parametrize(
    "template",
    [
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}TEMPLATE",
        "{% set messages = messages[-1:] %}TEMPLATE",
        "{% set rest = messages[-1:] %}REST{% if messages[1:] %}{{ messages[0]['content'][0]['text'] }}{% endif %}",
    ],
)
def test_a_template_without_a_place_for_it_refuses_a_system_prompt(
    processor: Qwen2_5OmniProcessor, template: str
) -> None:
    whole = str(processor.chat_template)
    text = template.replace("TEMPLATE", whole).replace("REST", whole.replace("in messages", "in rest"))
    other = with_template(processor, text)
    assert torch.equal(
        encode(other, [clip(2)], QUESTIONS[:1])["input_ids"], encode(processor, [clip(2)], QUESTIONS[:1])["input_ids"]
    )
    with pytest.raises(InputError, match=r"^system_prompt: .*leave it out"):
        encode(other, [clip(2)], QUESTIONS[:1], SYSTEM)
    with pytest.raises(InputError, match=r"^system_prompt: holds <\|vision_bos\|>"):
        encode(processor, [clip(2)], QUESTIONS[:1], "<|vision_bos|>")
    with pytest.raises(ValueError, match="2 clips need 2 system prompts"):
        encode(processor, [clip(2)] * 2, QUESTIONS[:2], [SYSTEM])
