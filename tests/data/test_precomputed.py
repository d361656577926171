"""Clips as embeddings: written and read, malformed in every way, and as inputs of a plain decoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from acckv import KVCompressor
from acckv.cache.cache import compressed_layers
from acckv.data.encoding import encode, encode_context, encode_media, question_suffix
from acckv.data.precomputed import load_precomputed, read_precomputed_clip, write_precomputed_clip
from acckv.errors import InputError
from acckv.models import TextProcessor, load_model, load_processor
from tests import checkpoints

KINDS = torch.tensor([0, 0, 1, 1, 1, 2, 2, 0])
QUESTION = "\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, TextProcessor]:
    return load_model(checkpoints.decoder(tmp_path_factory.mktemp("decoder")))


def embeddings(tokens: int = 8, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(tokens, 64, generator=torch.Generator().manual_seed(seed))


def folder_of(folder: Path, rows: list[dict[str, Any]]) -> Path:
    for name in ("one", "two", "three"):
        write_precomputed_clip(folder, name, embeddings(), KINDS)
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def row(clip: object = "one", **options: Any) -> dict[str, Any]:
    return {"clip": clip, "question": "what ?", "answer": "ring", **options}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_was_written_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    embeds = embeddings().to(dtype)
    path = write_precomputed_clip(tmp_path, "a clip", embeds, KINDS.int())
    assert path == tmp_path / "clips" / "a clip.safetensors" and list(path.parent.iterdir()) == [path]
    clip = read_precomputed_clip(path)
    assert clip.embeds.dtype == dtype and torch.equal(clip.embeds, embeds)
    assert torch.equal(clip.modality_ids, KINDS) and clip.modality_ids.dtype == torch.long
    assert clip.kind == "audio-video"
    write_precomputed_clip(tmp_path, "a clip", embeds, KINDS.clamp(max=1))
    assert read_precomputed_clip(path).kind == "video"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"inputs_embeds": embeddings()}, "modality_ids: is missing"),
        ({"modality_ids": KINDS}, "inputs_embeds: is missing"),
        ({"inputs_embeds": embeddings()[None], "modality_ids": KINDS}, r"inputs_embeds: needs floats .*\[1, 8, 64\]"),
        ({"inputs_embeds": embeddings().long(), "modality_ids": KINDS}, "inputs_embeds: needs floats"),
        ({"inputs_embeds": embeddings(), "modality_ids": KINDS[:7]}, r"modality_ids: needs integers of shape \[8\]"),
        ({"inputs_embeds": embeddings(), "modality_ids": KINDS.float()}, "modality_ids: needs integers"),
        ({"inputs_embeds": embeddings() / 0, "modality_ids": KINDS}, "inputs_embeds: holds values that are not finite"),
        ({"inputs_embeds": embeddings(), "modality_ids": KINDS + 1}, "modality_ids: holds other values than 0 text"),
        ({"inputs_embeds": embeddings(), "modality_ids": KINDS * 0}, "modality_ids: has neither video nor audio"),
    ],
)
def test_malformed_clips(tmp_path: Path, tensors: dict[str, torch.Tensor], message: str) -> None:
    path = tmp_path / "bad.safetensors"
    save_file(tensors, path)
    with pytest.raises(InputError, match=rf"bad\.safetensors: {message}"):
        read_precomputed_clip(path)
    if len(tensors) == 2:
        with pytest.raises(InputError, match=rf"one\.safetensors: {message}"):
            write_precomputed_clip(tmp_path, "one", **tensors)
        assert not (tmp_path / "clips").exists()


def test_files_that_are_no_clips(tmp_path: Path) -> None:
    path = write_precomputed_clip(tmp_path, "one", embeddings(), KINDS)
    whole = path.read_bytes()
    for length in (0, 7, 40, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"one\.safetensors: is cut off or no safetensors file"):
            read_precomputed_clip(path)
    with pytest.raises(InputError, match=r"two\.safetensors: no such file"):
        read_precomputed_clip(path.with_name("two.safetensors"))
    for name in ("", "..", "a/b", ".hidden", "a\\b"):
        with pytest.raises(InputError, match=r"clip: .* is no plain file name"):
            write_precomputed_clip(tmp_path, name, embeddings(), KINDS)


def test_questions(tmp_path: Path) -> None:
    rows = [row(groups=["Audio", "Audio/Counting"]), row("two", answer="a red ring"), row("two")]
    records = load_precomputed(folder_of(tmp_path, rows), "test")
    assert [record.id for record in records] == ["one#1", "two#2", "two#3"]
    assert [record.protocol for record in records] == ["word", "description", "word"]
    assert records[0].groups == ("Audio", "Audio/Counting") and records[1].groups == ()
    assert records[1].video == tmp_path / "clips" / "two.safetensors" and records[1].question == "what ?"
    parts = [load_precomputed(tmp_path, split, held_out=0.5) for split in ("train", "validation")]
    assert {record.video for record in parts[0]}.isdisjoint(record.video for record in parts[1])
    assert sorted(record.id for part in parts for record in part) == ["one#1", "two#2", "two#3"]
    with pytest.raises(InputError, match=r"held out at 0\.0001 .*, or give each line of questions\.jsonl a split"):
        load_precomputed(tmp_path, "train", held_out=0.0001)
    folder_of(tmp_path, [row(split="train"), row("two", split="validation"), row("three", split="train")])
    assert [record.id for record in load_precomputed(tmp_path, "train", 0.5)] == ["one#1", "three#3"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no question"),
        ('{"clip": "one", ', "line 1: not valid JSON"),
        ("[1]", "line 1: expected an object, got list"),
        (json.dumps({"clip": "one", "question": "what ?"}), "line 1, answer: missing"),
        (json.dumps(row()) + "\n\n" + json.dumps(row(question=" ")), "line 3, question: expected a text, got ' '"),
        (json.dumps(row(clip=7)), "line 1, clip: expected a text, got 7"),
        (json.dumps(row(split="")), "line 1, split: expected a text, got ''"),
        (json.dumps(row(groups="Audio")), "line 1, groups: expected a list of texts, got 'Audio'"),
        (json.dumps(row("four")), r"line 1, clip: no such clip .*four\.safetensors"),
        (json.dumps(row(split="test")) + "\n" + json.dumps(row()), "line 2, split: is missing, and other lines"),
        (json.dumps(row(split="test")), "split: holds no question of the split 'train', only of test"),
        (json.dumps(row()), "asks about one clip, of which none can be held out"),
    ],
)
def test_malformed_questions(tmp_path: Path, text: str, message: str) -> None:
    folder_of(tmp_path, [])
    (tmp_path / "questions.jsonl").write_text(text)
    with pytest.raises(InputError, match=rf"questions\.jsonl: {message}"):
        load_precomputed(tmp_path, "train", held_out=0.5)
    with pytest.raises(InputError, match=r"questions\.jsonl: no such file"):
        load_precomputed(tmp_path / "elsewhere", "train")


def test_inputs_of_a_batch(loaded: tuple[Any, TextProcessor], tmp_path: Path) -> None:
    """Rows are padded on the left; with their questions they are embeddings of what the parts are."""
    model, processor = loaded
    short = read_precomputed_clip(write_precomputed_clip(tmp_path, "one", embeddings(), KINDS))
    long = read_precomputed_clip(
        write_precomputed_clip(tmp_path, "two", embeddings(11, 1), torch.cat([KINDS, KINDS[1:4]]))
    )
    inputs = encode(processor, [short, long])
    assert inputs["inputs_embeds"].shape == (2, 11, 64)
    assert torch.equal(inputs["inputs_embeds"][0, 3:], short.embeds) and not bool(inputs["inputs_embeds"][0, :3].any())
    assert inputs["modality_ids"][0].tolist() == [3, 3, 3, *KINDS.tolist()]
    assert inputs["attention_mask"].tolist() == [[0] * 3 + [1] * 8, [1] * 11]
    suffix = question_suffix(processor, QUESTION)
    assert processor.tokenizer.decode(suffix) == QUESTION
    whole = encode(processor, [short], [QUESTION])
    embedded = model.get_input_embeddings()(suffix)
    assert torch.equal(whole["inputs_embeds"][0], torch.cat([short.embeds, embedded]))
    assert whole["modality_ids"][0].tolist() == [*KINDS.tolist(), *[0] * len(suffix)]
    wide = read_precomputed_clip(write_precomputed_clip(tmp_path, "wide", torch.ones(8, 32), KINDS))
    for questions in (None, [QUESTION]):
        with pytest.raises(
            InputError, match=r"wide\.safetensors: inputs_embeds: has a width of 32, the decoder's is 64"
        ):
            encode(processor, [wide], questions)
    media = encode_media(processor, long)
    assert torch.equal(media["inputs_embeds"][0], long.embeds[2:11])


def test_a_session_answers_as_the_plain_decoder(loaded: tuple[Any, TextProcessor], tmp_path: Path) -> None:
    model, processor = loaded
    clip = read_precomputed_clip(write_precomputed_clip(tmp_path, "one", embeddings(), KINDS))
    options: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    whole = encode(processor, [clip], [QUESTION])
    plain = model.generate(inputs_embeds=whole["inputs_embeds"], attention_mask=whole["attention_mask"], **options)
    with KVCompressor("snapkv", ratio=1.0)(model, processor) as session:
        cache = session.compress(**encode_context(processor, clip))
        assert torch.equal(session.answer(cache, question_suffix(processor, QUESTION)[None], **options), plain)
        cache = session.compress(**encode_context(processor, clip), ratio=0.4)
        assert [layer.physical for layer in compressed_layers(cache)] == [3 + 2] * 3


def test_loading_a_decoder(loaded: tuple[Any, TextProcessor], tmp_path: Path) -> None:
    model, processor = loaded
    assert type(model).__name__ == "Qwen2ForCausalLM" and processor.width == 64
    folder = checkpoints.decoder(tmp_path / "llama", "avicuna")
    alone = load_processor(folder, "bfloat16")
    assert alone.tokenizer.pad_token == alone.tokenizer.eos_token == "</s>"
    assert alone.dtype == torch.bfloat16 and alone.embed is None
    clip = read_precomputed_clip(write_precomputed_clip(tmp_path, "one", embeddings(), KINDS))
    assert encode(alone, [clip])["inputs_embeds"].dtype == torch.bfloat16
    with pytest.raises(InputError, match="when: a question is embedded by the decoder, which was not loaded"):
        encode(alone, [clip], [QUESTION])
    with pytest.raises(InputError, match="question: '' has no token"):
        question_suffix(processor, "")
    config = json.loads((folder / "config.json").read_text())
    for kind, message in (("bert_like_nothing", "cannot be loaded"), ("vit", "and no causal language model")):
        (folder / "config.json").write_text(json.dumps({**config, "model_type": kind}))
        with pytest.raises(InputError, match=message):
            load_model(folder)


def test_the_decoder_of_a_checkpoint_with_towers(loaded: tuple[Any, TextProcessor], tmp_path: Path) -> None:
    """As the README takes VideoLLaMA2's out: a model type of its own, towers beside the decoder."""
    whole = checkpoints.decoder(tmp_path / "whole")
    config = json.loads((whole / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps({**config, "model_type": "videollama2_qwen2"}))
    tensors = load_file(whole / "model.safetensors")
    save_file({**tensors, "model.mm_projector.weight": torch.ones(2)}, whole / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="whole: cannot be loaded"):
        load_model(whole)
    for part in (transformers.Qwen2ForCausalLM, transformers.AutoTokenizer):
        part.from_pretrained(whole).save_pretrained(tmp_path / "decoder")
    model, processor = load_model(tmp_path / "decoder")
    for (name, one), other in zip(model.named_parameters(), loaded[0].parameters(), strict=True):
        assert torch.equal(one, other), name
    assert torch.equal(question_suffix(processor, QUESTION), question_suffix(loaded[1], QUESTION))
