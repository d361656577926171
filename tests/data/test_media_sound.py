"""The sound that the media reader finds: in time with the pictures, alone, or in a file of its own."""

from __future__ import annotations

import struct
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from acckv.data.media import read_media
from acckv.errors import InputError
from tests.data.media_files import (
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


def test_sound_stays_in_time_with_the_picture(tmp_path: Path) -> None:
    media = read_media(write_video(tmp_path / "a.mp4", *STEADY, audio=burst(4, 1.5)[None]))
    assert sound_of(media).shape == (64_000,) and sound_of(media).dtype == torch.float32
    assert onset(media) == pytest.approx(1.5, abs=0.01)


def test_sound_that_starts_late(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", *STEADY, audio=burst(2, 0.5)[None], audio_start=1.25)
    media = read_media(path)
    assert onset(media) == pytest.approx(1.75, abs=0.01)
    assert float(sound_of(media)[-8_000:].abs().max()) < 1e-3, "after the track's end there is silence"


@pytest.mark.parametrize("rate", [44_100, 48_000])
def test_stereo_is_mixed_and_resampled(tmp_path: Path, rate: int) -> None:
    tone = burst(4, 2.0, rate)
    path = write_video(tmp_path / "a.mp4", *STEADY, audio=np.stack([tone, 0 * tone]), rate=rate, layout="stereo")
    audio = sound_of(read_media(path))
    assert audio.shape == (64_000,) and onset(audio) == pytest.approx(2.0, abs=0.01)
    spectrum = torch.fft.rfft(audio[32_000:36_000]).abs()
    assert int(spectrum.argmax()) * 4 == pytest.approx(1000, abs=8)


def test_surround_sound(tmp_path: Path) -> None:
    tone = burst(4, 1.0, 48_000)
    channels = np.stack([0 * tone, 0 * tone, tone, 0 * tone, 0 * tone, 0 * tone])
    path = write_video(tmp_path / "a.mp4", *STEADY, audio=channels, rate=48_000, layout="5.1")
    assert onset(read_media(path)) == pytest.approx(1.0, abs=0.01)


def test_silent_track_is_not_a_missing_one(tmp_path: Path) -> None:
    audio = sound_of(read_media(write_video(tmp_path / "a.mp4", *STEADY, audio=np.zeros((1, 64_000)))))
    assert audio.shape == (64_000,) and float(audio.abs().max()) == 0


def test_a_part_of_sound_alone(tmp_path: Path) -> None:
    for name, codec in {"a.wav": "pcm_s16le", "a.mp3": "libmp3lame", "a.flac": "flac", "a.m4a": "aac"}.items():
        path = write_sound(tmp_path / name, burst(20, 12.0)[None], codec=codec)
        whole, part = read_media(path), read_media(path, start=10.0, end=15.0)
        assert whole.frames is None and whole.kind == "audio"
        assert len(sound_of(whole)) == pytest.approx(320_000, abs=2_500)
        assert sound_of(part).shape == (80_000,) and onset(part) == pytest.approx(2.0, abs=0.03), name
        torch.testing.assert_close(sound_of(part), sound_of(whole)[160_000:240_000], atol=2e-3, rtol=0)
        with pytest.raises(InputError, match="no sound could be decoded after start=30"):
            read_media(path, start=30.0)


def test_sound_alone_in_stereo_at_another_rate(tmp_path: Path) -> None:
    tone = burst(3, 1.0, 44_100)
    audio = sound_of(read_media(write_sound(tmp_path / "a.wav", np.stack([tone, tone]), 44_100)))
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
    assert song.kind == "audio" and onset(song) == pytest.approx(1.0, abs=0.1)


def test_very_short_sound_is_padded(tmp_path: Path) -> None:
    path = write_sound(tmp_path / "a.wav", np.full((1, 16), 0.5))
    assert sound_of(read_media(path)).shape == (1_600,)


def test_a_separate_sound_file(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", *STEADY, audio=burst(4, 0.5)[None])
    sound = write_sound(tmp_path / "a.wav", burst(9, 2.5, 44_100)[None], 44_100)
    media = read_media(path, audio=sound)
    assert sound_of(media).shape == (144_000,) and onset(media) == pytest.approx(2.5, abs=0.01)
    assert greys_of(media) == pytest.approx([*np.repeat(GREYS, 2), *[GREYS[-1]] * 10], abs=3), "the last is held"
    part = read_media(path, audio=sound, start=1.0, end=3.0)
    assert sound_of(part).shape == (32_000,) and onset(part) == pytest.approx(1.5, abs=0.01)
    assert torch.equal(frames_of(part), frames_of(media)[2:6])
    other = write_video(tmp_path / "b.mp4", *STEADY, audio=burst(4, 3.25)[None])
    assert onset(read_media(path, audio=other)) == pytest.approx(3.25, abs=0.01), "the sound of another video"
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
    assert greys_of(media) == pytest.approx([120, 120], abs=3)
    assert sound_of(media).shape == (80_000,) and onset(media) == pytest.approx(3.0, abs=0.01)


def test_a_gap_in_the_sound_stays_a_gap(tmp_path: Path) -> None:
    """Lost packets of sound do not pull what follows forward."""
    sound = burst(4, 0.5) + burst(4, 3.0)
    whole = write_video(tmp_path / "a.mkv", *STEADY, audio=sound[None])
    path = tmp_path / "gap.mkv"
    with av.open(str(whole)) as source, av.open(str(path), "w") as target:
        copies = {stream: target.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            lost = packet.stream.type == "audio" and 1.0 < (packet.pts or 0) * packet.time_base < 2.5
            if packet.dts is not None and not lost:
                packet.stream = copies[packet.stream]
                target.mux(packet)
    audio = sound_of(read_media(path))
    assert onset(audio) == pytest.approx(0.5, abs=0.01)
    assert onset(audio[32_000:]) == pytest.approx(1.0, abs=0.01)


def test_damaged_float_sound_is_finite(tmp_path: Path) -> None:
    path = write_sound(tmp_path / "a.wav", burst(1, 0.5)[None], codec="pcm_f32le")
    content = bytearray(path.read_bytes())
    struct.pack_into("<3f", content, len(content) - 4_000, float("nan"), float("inf"), 1e30)
    path.write_bytes(content)
    audio = sound_of(read_media(path))
    assert bool(torch.isfinite(audio).all()) and float(audio.abs().max()) <= 8
