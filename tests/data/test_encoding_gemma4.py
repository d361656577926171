"""Clips and questions for the processors of Gemma 4 and Gemma 4 Unified, with models of random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.video_utils import VideoMetadata

from acckv import KVCompressor
from acckv.data.encoding import encode, encode_context, encode_media, question_suffix
from acckv.errors import InputError
from acckv.models import find_adapter, load_model
from acckv.models.clips import Media
from tests import checkpoints
from tests.data.media_files import sound_of
from tests.data.test_encoding import QUESTIONS, check_left_padded, clip

KINDS = ("gemma4", "gemma4_unified")


@pytest.fixture(scope="module", params=KINDS)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Model and processor, saved and loaded again."""
    return load_model(checkpoints.gemma4(tmp_path_factory.mktemp(request.param), request.param))


@pytest.fixture(scope="module")
def processor(loaded: tuple[Any, Any]) -> Any:
    return loaded[1]


def frames(*times: str) -> str:
    return " ".join(f"{time} <|image>{'<|video|>' * 4}<image|>" for time in times)


def sound(seconds: int) -> str:
    return f"<|audio>{'<|audio|>' * 25 * seconds}<audio|>"


@pytest.mark.parametrize("with_sound", [True, False])
def test_the_prompt_token_by_token(processor: Any, with_sound: bool) -> None:
    inputs = encode(processor, [clip(2, sound=with_sound)], ["What colour was the circle?"])
    media = frames("00:00", "00:00", "00:01", "00:01") + (sound(2) if with_sound else "")
    text = f"<bos><|turn>user\n{media}What colour was the circle?<turn|>\n<|turn>model\n"
    assert inputs["input_ids"].tolist() == [processor.tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert processor.tokenizer.unk_token_id not in inputs["input_ids"]
    assert inputs["num_frames_per_video"].tolist() == [4]
    assert ("input_features" in inputs) == with_sound
    kinds = {processor.video_token_id: 2, processor.audio_token_id: 3}
    assert inputs["mm_token_type_ids"][0].tolist() == [kinds.get(i, 0) for i in inputs["input_ids"][0].tolist()]


@pytest.mark.parametrize("with_sound", [True, False])
@pytest.mark.parametrize("question", QUESTIONS)
def test_context_and_suffix_make_the_prompt(loaded: tuple[Any, Any], question: str, with_sound: bool) -> None:
    model, processor = loaded
    media = clip(2, sound=with_sound)
    whole, context = encode(processor, [media], [question]), encode_context(processor, media)
    ids = torch.cat([context["input_ids"][0], question_suffix(processor, question)])
    assert torch.equal(ids, whole["input_ids"][0])
    assert processor.tokenizer.decode(ids[context["input_ids"].shape[1] - 1]) == (
        processor.eoa_token if with_sound else processor.eoi_token
    )
    for key in whole.keys() - {"input_ids", "attention_mask", "mm_token_type_ids"}:
        assert torch.equal(whole[key], context[key]), key
    adapter = find_adapter(model)
    length = adapter.context_length(adapter.label(whole["input_ids"], None), whole["input_ids"])
    assert length.tolist() == [context["input_ids"].shape[1]]


def test_media_alone_are_the_end_of_the_context(processor: Any) -> None:
    media, context = encode_media(processor, clip(2)), encode_context(processor, clip(2))
    text = frames("00:00", "00:00", "00:01", "00:01") + sound(2)
    assert media["input_ids"][0].tolist() == processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert torch.equal(media["input_ids"][0], context["input_ids"][0, -media["input_ids"].shape[1] :])


def test_a_left_padded_batch_equals_its_rows(loaded: tuple[Any, Any]) -> None:
    check_left_padded(*loaded, [clip(1, 1), clip(3, 2), clip(2, 3)])


def test_long_sound_becomes_segments(loaded: tuple[Any, Any]) -> None:
    """One segment is 30 s at most, and nothing is cut off; in a batch with a short clip too."""
    model, processor = loaded
    long = Media(clip(1).frames, torch.randn(16_000 * 62) * 0.1, 62.0, Path("long.mp4"))
    inputs = encode(processor, [clip(1), long], None)
    counts = (inputs["input_ids"] == processor.audio_token_id).sum(-1)
    per_segment = -(-16_000 * 62 // 3 // 640)
    assert counts.tolist() == [25, 3 * per_segment] and len(inputs["input_features"]) == 4
    if "Unified" in type(processor).__name__:
        segments = zip(inputs["input_features"], inputs["input_features_mask"], strict=True)
        samples = [row[mask].flatten() for row, mask in segments]
        for found, given in zip(samples[1:], sound_of(long).tensor_split(3), strict=True):
            assert torch.equal(found[: len(given)], given) and not bool(found[len(given) :].any())
    ids = encode(processor, [long], QUESTIONS[:1])["input_ids"][0]
    context = encode_context(processor, long)["input_ids"][0]
    assert torch.equal(ids, torch.cat([context, question_suffix(processor, QUESTIONS[0])]))
    with torch.no_grad():
        assert bool(torch.isfinite(model(**inputs).logits).all())


def test_many_pictures_are_chosen_as_the_processor_does(processor: Any) -> None:
    media = clip(20, sound=False)
    inputs = encode(processor, [media], ["Describe the clip."])
    assert inputs["num_frames_per_video"].tolist() == [32]
    text = f"{processor.tokenizer.bos_token}<|turn>user\n<|video|>Describe the clip.<turn|>\n<|turn>model\n"
    metadata = VideoMetadata(total_num_frames=40, fps=2.0)
    options = {"do_sample_frames": True, "add_special_tokens": False, "return_tensors": "pt"}
    own = processor(text=[text], videos=[media.frames], video_metadata=[metadata], **options)
    assert torch.equal(inputs["input_ids"], own["input_ids"])
    assert torch.equal(inputs["pixel_values_videos"], own["pixel_values_videos"])


def test_a_session_answers_as_the_plain_model(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    whole = encode(processor, [clip(2)], QUESTIONS[:1])
    plain = model.generate(**whole, **options)[:, whole["input_ids"].shape[1] :]
    with KVCompressor("keydiff", ratio=1.0)(model, processor) as session:
        cache = session.compress(**encode_context(processor, clip(2)))
        kept = session.answer(cache, question_suffix(processor, QUESTIONS[0])[None], **options)
        cache = session.extend(encode_media(processor, clip(1, 5)), cache, ratio=0.5)
        later = session.answer(cache, question_suffix(processor, QUESTIONS[1])[None], **options)
    assert torch.equal(kept, plain) and later.shape == (1, 6)


def test_errors(processor: Any) -> None:
    with pytest.raises(InputError, match=r"clip2\.mp4.*cannot share a batch"):
        encode(processor, [clip(1, 1), clip(1, 2, sound=False)], QUESTIONS[:2])
    slow = Media(torch.zeros(2, 3, 84, 84, dtype=torch.uint8), torch.zeros(8_000), 1.0, Path("slow.mp4"), 2.0, 8_000)
    with pytest.raises(InputError, match=r"slow\.mp4: sound was read at 8000 Hz, the processor needs 16000"):
        encode(processor, [slow], QUESTIONS[:1])
    with pytest.raises(
        InputError, match=r"cannot be encoded for a str, only for Gemma4Processor, .*Qwen2_5OmniProcessor"
    ):
        encode("processor", [clip(1)])
    template, processor.chat_template = processor.chat_template, "{% for message in messages %}user{% endfor %}"
    try:
        with pytest.raises(InputError, match=r"chat_template: the chat template has no <\|video\|> for a clip"):
            encode_context(processor, clip(1))
    finally:
        processor.chat_template = template
