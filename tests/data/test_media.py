"""The media reader on files of many kinds, written here with PyAV so that every expected number is known."""

from __future__ import annotations

import struct
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from acckv.data.media import read_media
from acckv.errors import InputError
from tests.data.media_files import GREYS, burst, write_picture, write_sound, write_video

def onset(audio: torch.Tensor) -> float:
    """Seconds to the first sample above a tenth of full scale."""
    return int((audio.abs() > 0.1).nonzero()[0]) / 16_000


def greys_of(frames: torch.Tensor) -> list[float]:
    return frames.float().mean((1, 2, 3)).tolist()


@pytest.fixture
def steady() -> tuple[list[float], list[int]]:
    """Four seconds at 30 frames a second; the grey changes each second."""
    times = [k / 30 for k in range(120)]
    return times, [GREYS[k // 30] for k in range(120)]


def test_frames_are_sampled_by_time(tmp_path: Path, steady: tuple) -> None:
    media = read_media(write_video(tmp_path / "a.mp4", *steady))
    assert media.frames.dtype == torch.uint8 and media.frames.shape == (8, 3, 32, 48)
    assert greys_of(media.frames) == pytest.approx(np.repeat(GREYS, 2).tolist(), abs=3)
    assert media.audio is None
    assert media.duration == pytest.approx(4.0, abs=0.02)


def test_other_sampling_rates(tmp_path: Path, steady: tuple) -> None:
    path = write_video(tmp_path / "a.mp4", *steady, audio=burst(4, 1.5)[None])
    media = read_media(path, fps=4.0, sampling_rate=8_000)
    assert len(media.frames) == 16 and media.audio.shape == (32_000,)
    assert greys_of(media.frames)[::4] == pytest.approx(GREYS, abs=3)


def test_variable_frame_rate(tmp_path: Path) -> None:
    times, greys = [0.0, 0.1, 1.7, 1.8, 3.0, 3.966], [40, 60, 90, 140, 190, 190]
    media = read_media(write_video(tmp_path / "a.mp4", times, greys))
    assert greys_of(media.frames) == pytest.approx([40, 60, 60, 60, 140, 140, 190, 190], abs=4)


def test_sound_stays_in_time_with_the_picture(tmp_path: Path, steady: tuple) -> None:
    media = read_media(write_video(tmp_path / "a.mp4", *steady, audio=burst(4, 1.5)[None]))
    assert media.audio.shape == (64_000,) and media.audio.dtype == torch.float32
    assert onset(media.audio) == pytest.approx(1.5, abs=0.01)


def test_sound_that_starts_late(tmp_path: Path, steady: tuple) -> None:
    path = write_video(tmp_path / "a.mp4", *steady, audio=burst(2, 0.5)[None], audio_start=1.25)
    media = read_media(path)
    assert onset(media.audio) == pytest.approx(1.75, abs=0.01)
    assert float(media.audio[-8_000:].abs().max()) < 1e-3, "after the track's end there is silence"


def test_pictures_that_start_late(tmp_path: Path) -> None:
    times = [1.0 + k / 30 for k in range(90)]
    path = write_video(tmp_path / "a.mkv", times, [GREYS[k // 30] for k in range(90)], audio=burst(4, 2.5)[None])
    media = read_media(path)
    assert greys_of(media.frames)[::2] == pytest.approx(GREYS[:3], abs=3)
    assert onset(media.audio) == pytest.approx(1.5, abs=0.02), "time zero is the first picture"


@pytest.mark.parametrize("rate", [44_100, 48_000])
def test_stereo_is_mixed_and_resampled(tmp_path: Path, steady: tuple, rate: int) -> None:
    tone = burst(4, 2.0, rate)
    path = write_video(tmp_path / "a.mp4", *steady, audio=np.stack([tone, 0 * tone]), rate=rate, layout="stereo")
    audio = read_media(path).audio
    assert audio.shape == (64_000,) and onset(audio) == pytest.approx(2.0, abs=0.01)
    spectrum = torch.fft.rfft(audio[32_000:36_000]).abs()
    assert int(spectrum.argmax()) * 4 == pytest.approx(1000, abs=8)


def test_surround_sound(tmp_path: Path, steady: tuple) -> None:
    tone = burst(4, 1.0, 48_000)
    channels = np.stack([0 * tone, 0 * tone, tone, 0 * tone, 0 * tone, 0 * tone])
    path = write_video(tmp_path / "a.mp4", *steady, audio=channels, rate=48_000, layout="5.1")
    assert onset(read_media(path).audio) == pytest.approx(1.0, abs=0.01)


def test_silent_track_is_not_a_missing_one(tmp_path: Path, steady: tuple) -> None:
    audio = read_media(write_video(tmp_path / "a.mp4", *steady, audio=np.zeros((1, 64_000)))).audio
    assert audio.shape == (64_000,) and float(audio.abs().max()) == 0


def test_length_is_whole_temporal_patches(tmp_path: Path) -> None:
    times = [k / 10 for k in range(27)]
    media = read_media(write_video(tmp_path / "a.mp4", times, [100] * 27, audio=burst(5, 0.5)[None]))
    assert len(media.frames) == 6 and media.audio.shape == (48_000,)


def test_a_single_picture(tmp_path: Path) -> None:
    media = read_media(write_video(tmp_path / "a.mp4", [0.0], [77]))
    assert greys_of(media.frames) == pytest.approx([77, 77], abs=3)


def test_large_pictures_are_scaled_while_reading(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", [0.0, 0.5], [50, 60], size=(640, 320))
    assert read_media(path, max_pixels=80 * 40).frames.shape == (2, 3, 40, 80)
    assert read_media(path).frames.shape == (2, 3, 320, 640)


def test_a_file_cut_in_the_middle_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    greys = rng.integers(30, 220, 240).tolist()
    whole = write_video(
        tmp_path / "a.mkv", [k / 30 for k in range(240)], greys, audio=rng.uniform(-0.5, 0.5, (1, 128_000))
    )
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    media, full = read_media(cut), read_media(whole)
    assert 2 <= len(media.frames) < len(full.frames) == 16
    assert media.audio.shape == (len(media.frames) * 8_000,)
    assert greys_of(media.frames)[:-2] == greys_of(full.frames)[: len(media.frames) - 2]


def test_errors_name_the_file(tmp_path: Path, steady: tuple) -> None:
    text = tmp_path / "text.mp4"
    text.write_text("these are words\n" * 40)
    whole = write_video(tmp_path / "a.mp4", *steady)
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


def test_rotated_video_is_turned_upright(tmp_path: Path) -> None:
    """A phone's portrait video: stored landscape, with a display matrix that turns it clockwise."""
    picture = np.zeros((32, 48, 3), np.uint8)
    picture[:, 24:] = 200
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=2, options={"crf": "10", "threads": "1"})
        video.width, video.height, video.pix_fmt = 48, 32, "yuv420p"
        for _ in range(2):
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode(None))
    upright = struct.pack(">9i", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
    clockwise = struct.pack(">9i", 0, 0x10000, 0, -0x10000, 0, 0, 48 << 16, 0, 0x40000000)
    content = path.read_bytes()
    track = content.index(b"tkhd")
    place = content.index(upright, track)
    path.write_bytes(content[:place] + clockwise + content[place + 36 :])
    frames = read_media(path).frames.float()
    assert frames.shape == (2, 3, 48, 32)
    assert float(frames[:, :, :20].mean()) < 10 < 190 < float(frames[:, :, 28:].mean())


def test_parts_are_the_clip(tmp_path: Path) -> None:
    """Whole temporal patches and the sound that goes with them, nothing lost and nothing twice."""
    sound = np.linspace(-0.5, 0.5, 5 * 16_000, dtype=np.float32)[None]
    clip = read_media(write_video(tmp_path / "a.mp4", [0.0, 1.0, 2.0, 3.0, 4.9], [40, 90, 140, 190, 40], sound))
    parts = list(clip.parts(seconds=2))
    assert [len(part.frames) for part in parts] == [4, 4, 2]
    assert torch.equal(torch.cat([part.frames for part in parts]), clip.frames)
    assert clip.audio is not None
    assert torch.equal(torch.cat([part.audio for part in parts if part.audio is not None]), clip.audio)
    assert [len(part.audio) for part in parts if part.audio is not None] == [32_000, 32_000, 16_000]
