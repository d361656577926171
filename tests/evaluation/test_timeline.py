"""The entries of a timeline are those that the cache holds; a control evicts one modality and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from acckv import InputError, KVCompressor
from acckv.cache.cache import compressed_layers
from acckv.data.encoding import encode_context, question_suffix
from acckv.data.media import read_media
from acckv.evaluation.timeline import envelope, measure_kept, picture_grid, thumbnails
from acckv.method.modality import Modality
from acckv.models import load_model
from acckv.models.clips import Media
from acckv.policies.single_modality import EvictedModality
from tests.data.media_files import write_video

Tiny = tuple[Any, Any]
"""The model and its processor."""


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    return load_model("tiny")


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Media:
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    sound = np.sin(np.arange(6 * 16_000) / 20).astype(np.float32)[None]
    write_video(path, [0.0, 1.0, 2.5, 4.0, 5.9], [40, 90, 140, 190, 40], sound, size=(84, 84))
    return read_media(path)


@pytest.mark.parametrize("policy", ["keydiff", "snapkv", "acckv"])
def test_recorded_entries_are_those_of_the_cache(policy: str, tiny: Tiny, media: Media) -> None:
    model, processor = tiny
    compressor, everything = KVCompressor(policy), KVCompressor("full")
    inputs = encode_context(processor, media)
    ((video, audio, heads),) = measure_kept(
        inputs, lambda: everything(model, processor), [(lambda: compressor(model, processor), 0.2)]
    )
    with compressor(model, processor) as session:
        prefill = session.prefill(**inputs)
        cache = session.compress(prefill, 0.2)
    labels = prefill.labels.labels[0]
    for number, (full, held) in enumerate(zip(compressed_layers(prefill.cache), compressed_layers(cache), strict=True)):
        for modality, counts in ((Modality.VIDEO, video), (Modality.AUDIO, audio)):
            found = torch.zeros(counts.shape[1], dtype=torch.long)
            for head in range(full.keys.shape[1]):
                offered, there = full.keys[0, head, labels == modality], held.keys[0, head]
                found += (offered[:, None] == there[None]).all(-1).any(-1)
            per_choice = full.keys.shape[1] // heads
            assert found.tolist() == (per_choice * counts[number]).tolist(), (number, modality)
    assert picture_grid(processor, inputs["video_grid_thw"], video.shape[1]) == (3, 3)
    assert picture_grid(processor, inputs["video_grid_thw"], video.shape[1] + 1) is None
    assert media.frames is not None and video.shape[1] == 9 * len(media.frames) // 2


@pytest.mark.parametrize("modality", [Modality.VIDEO, Modality.AUDIO])
def test_control_evicts_one_modality_and_nothing_else(modality: Modality, tiny: Tiny, media: Media) -> None:
    model, processor = tiny
    inputs = encode_context(processor, media)
    control = KVCompressor(EvictedModality(modality))
    with control(model, processor) as session:
        prefill = session.prefill(**inputs)
        caches = [session.compress(prefill, 0.0), session.compress(**inputs)]
        answers = [
            session.answer(cache, question_suffix(processor, "what ?")[None], max_new_tokens=3) for cache in caches
        ]
    stays = prefill.labels.labels[0] != modality
    for cache in caches:
        for full, held in zip(compressed_layers(prefill.cache), compressed_layers(cache), strict=True):
            torch.testing.assert_close(held.keys, full.keys[:, :, stays], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(held.values, full.values[:, :, stays], atol=1e-4, rtol=1e-4)
    assert torch.equal(*answers)


def test_no_control_evicts_text() -> None:
    with pytest.raises(InputError, match="modality: text is neither video nor audio"):
        EvictedModality(Modality.TEXT)


def test_thumbnails_and_envelope(media: Media) -> None:
    assert media.frames is not None and media.audio is not None
    pictures = thumbnails(media.frames)
    assert pictures.shape == (6, 3, 72, 72)
    assert pictures.dtype == torch.uint8
    assert pictures[0].float().mean() == pytest.approx(media.frames[0].float().mean().item(), abs=2)
    low, high = envelope(media.audio)
    assert 400 <= len(low) <= 401
    assert (high - low > 1.8).sum() > 350
    assert envelope(None).shape == (2, 0)
    assert envelope(torch.tensor([0.5, -2.0])).tolist() == [[0.5, -1.0], [0.5, -1.0]]
