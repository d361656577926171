"""Kinds of files that are easily read wrong without a word: each is right, or a warning says what was left out."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from acckv.data.media import read_media, read_record_media
from acckv.data.records import Record
from acckv.errors import InputError
from acckv.models.clips import Media
from tests.data.media_files import (
    GREYS,
    burst,
    frames_of,
    greys_of,
    mux_sound,
    onset,
    sound_of,
    turned,
    write_picture,
    write_sound,
    write_tracks,
    write_video,
)

pytestmark = pytest.mark.filterwarnings("error")


def grey(value: int, size: tuple[int, int] = (32, 48)) -> np.ndarray:
    return np.full((*size, 3), value, np.uint8)


def corners() -> np.ndarray:
    """A picture whose quarters have four greys: 40 and 90 above, 140 and 190 below."""
    picture = np.zeros((32, 48, 3), np.uint8)
    for place, value in enumerate(GREYS):
        picture[16 * (place // 2) :][:16, 24 * (place % 2) :][:, :24] = value
    return picture


def quarters(media: Media) -> list[float]:
    """The greys of the quarters of the first frame, from the upper left to the lower right."""
    frames = frames_of(media)
    height, width = frames.shape[2] // 2, frames.shape[3] // 2
    parts = [frames[0, :, top:, left:][:, :height, :width] for top in (0, height) for left in (0, width)]
    return [float(part.float().mean()) for part in parts]


@pytest.mark.parametrize("name", ["song.mp4", "song.mkv", "song.ts"])
def test_one_picture_with_long_sound_keeps_all_of_it(tmp_path: Path, name: str) -> None:
    media = read_media(write_video(tmp_path / name, [0.0], [77], burst(20, 17.5)[None]))
    assert greys_of(media) == pytest.approx([77, 77], abs=3)
    assert len(sound_of(media)) == pytest.approx(320_000, abs=2_100) and onset(media) == pytest.approx(17.5, abs=0.02)
    assert media.duration == pytest.approx(20, abs=0.15)
    part = read_media(tmp_path / name, start=15.0, end=19.0)
    assert greys_of(part) == pytest.approx([77, 77], abs=3), "it is still on screen"
    assert sound_of(part).shape == (64_000,) and onset(part) == pytest.approx(2.5, abs=0.07)


def test_the_last_slide_is_held_to_the_end_of_the_sound(tmp_path: Path) -> None:
    path = write_video(tmp_path / "slides.mp4", [0.0, 5.0, 7.5], [40, 90, 140], burst(12, 11.5)[None])
    with pytest.warns(UserWarning, match=r"slides\.mp4: the sound goes on for .* s after the pictures"):
        media = read_media(path)
    assert greys_of(media) == pytest.approx([40] * 10 + [90] * 5 + [140] * 9, abs=3)
    assert sound_of(media).shape == (192_000,) and onset(media) == pytest.approx(11.5, abs=0.01)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
@pytest.mark.parametrize("default", [None, 0, 1])
def test_the_default_sound_track_is_read_and_the_others_are_named(
    tmp_path: Path, name: str, default: int | None
) -> None:
    marks = (0.5, 1.25)
    sounds = [burst(2, at) for at in marks]
    path = write_tracks(tmp_path / name, [grey(90)] * 4, sounds, None if default is None else (0, default))
    taken = default or 0
    named = rf"{name}: has 2 sound tracks; stream {taken + 1} \(aac\) is read, not stream {2 - taken} \(aac\)"
    with pytest.warns(UserWarning, match=named):
        media = read_media(path)
    assert onset(media) == pytest.approx(marks[taken], abs=0.02)


def test_the_default_video_track_is_read(tmp_path: Path) -> None:
    path = write_tracks(tmp_path / "a.mkv", [grey(40)] * 4, [], (1, 0), more_pictures=(grey(190),) * 4)
    with pytest.warns(UserWarning, match=r"has 2 video tracks; stream 1 \(h264\) is read, not stream 0"):
        media = read_media(path)
    assert greys_of(media) == pytest.approx([190] * 4, abs=3)


def test_a_cover_is_named(tmp_path: Path) -> None:
    cover = write_picture(tmp_path / "cover.png", 100)
    path = tmp_path / "song.m4a"
    with av.open(str(path), "w", format="mp4") as container, av.open(str(cover)) as picture:
        sound = container.add_stream("aac", rate=16_000, layout="mono")
        shown: Any = container.add_stream_from_template(picture.streams.video[0])
        shown.disposition = av.stream.Disposition.attached_pic.value
        for packet in picture.demux(video=0):
            if packet.dts is not None:
                packet.stream = shown
                container.mux(packet)
        mux_sound(container, sound, burst(2, 1.0))
    with pytest.warns(UserWarning, match=r"song\.m4a: its cover is left out"):
        media = read_media(path)
    assert media.kind == "audio" and onset(media) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize(("aspect", "width"), [(Fraction(4, 3), 64), (Fraction(2, 3), 32), (Fraction(1), 48)])
def test_pixels_that_are_not_square(tmp_path: Path, aspect: Fraction, width: int) -> None:
    path = write_tracks(tmp_path / "a.mp4", [corners()] * 2, [], aspect=aspect)
    media = read_media(path)
    assert frames_of(media).shape == (2, 3, 32, width) and quarters(media) == pytest.approx(GREYS, abs=4)
    small = frames_of(read_media(path, max_pixels=16 * 16))
    assert small.shape[3] / small.shape[2] == pytest.approx(width / 32, rel=0.1)
    assert small.shape[2] * small.shape[3] == pytest.approx(256, rel=0.1)


TURNED = {
    (1, 0, 0, 1): (0, 1, 2, 3),
    (0, 1, -1, 0): (2, 0, 3, 1),  # clockwise
    (-1, 0, 0, -1): (3, 2, 1, 0),
    (0, -1, 1, 0): (1, 3, 0, 2),
    (-1, 0, 0, 1): (1, 0, 3, 2),  # left and right change places
    (1, 0, 0, -1): (2, 3, 0, 1),
    (0, 1, 1, 0): (0, 2, 1, 3),
    (0, -1, -1, 0): (3, 1, 2, 0),
}
"""Display matrix -> which stored quarter is seen in each quarter."""
EXIF = {1: 0, 6: 1, 3: 2, 8: 3, 2: 4, 4: 5, 5: 6, 7: 7}
"""EXIF's orientation -> the same by its place in TURNED."""


@pytest.mark.parametrize("matrix", TURNED)
def test_turned_and_mirrored_videos_are_upright(tmp_path: Path, matrix: tuple[int, int, int, int]) -> None:
    path = turned(write_tracks(tmp_path / "a.mp4", [corners()] * 2, []), matrix, 48)
    media = read_media(path)
    assert frames_of(media).shape[2:] == ((32, 48) if matrix[0] else (48, 32))
    assert quarters(media) == pytest.approx([GREYS[place] for place in TURNED[matrix]], abs=4)


def test_a_turned_video_with_wide_pixels(tmp_path: Path) -> None:
    """Pixels are as wide as stored; the turn comes after."""
    path = turned(write_tracks(tmp_path / "a.mp4", [corners()] * 2, [], aspect=Fraction(4, 3)), (0, 1, -1, 0), 48)
    assert frames_of(read_media(path)).shape == (2, 3, 64, 32)


def test_a_slanted_video_is_named(tmp_path: Path) -> None:
    path = turned(write_tracks(tmp_path / "a.mp4", [corners()] * 2, []), (0.94, 0.34, -0.34, 0.94), 48)
    with pytest.warns(UserWarning, match=r"turned by .* degrees; the nearest right angle is taken"):
        assert quarters(read_media(path)) == pytest.approx(GREYS, abs=4)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("orientation", EXIF)
def test_photos_are_upright(tmp_path: Path, orientation: int, suffix: str) -> None:
    photo = Image.fromarray(corners())
    tags = photo.getexif()
    tags[274] = orientation
    path = tmp_path / f"photo.{suffix}"
    options: dict[str, Any] = {"quality": 95} if suffix == "jpg" else {}
    photo.save(path, exif=tags, **options)
    places = list(TURNED.values())[EXIF[orientation]]
    assert quarters(read_media(path)) == pytest.approx([GREYS[place] for place in places], abs=4)


def test_an_edit_list_is_followed(tmp_path: Path) -> None:
    """An mp4 whose edit list skips the first second: neither its pictures nor its sound are part of the clip."""
    pictures = [grey(value) for value in GREYS for _ in range(2)]
    path = write_tracks(tmp_path / "a.mp4", pictures, [burst(4, 2.5)])
    content = bytearray(path.read_bytes())
    place = content.find(b"elst")
    while place >= 0:
        media_header = content.index(b"mdhd", place)
        scale = struct.unpack_from(">I", content, media_header + 16)[0]
        length, media_time = struct.unpack_from(">Ii", content, place + 12)
        struct.pack_into(">Ii", content, place + 12, length - 1000, media_time + scale)
        place = content.find(b"elst", place + 4)
    path.write_bytes(bytes(content))
    media = read_media(path)
    assert greys_of(media)[::2] == pytest.approx(GREYS[1:], abs=3)
    assert onset(media) == pytest.approx(1.5, abs=0.02)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = write_sound(tmp_path / "a.mp3", burst(4, 3.5)[None], codec="libmp3lame")
    content = bytearray(path.read_bytes())
    start = len(content) // 2
    content[start : start + 400] = np.random.default_rng(0).bytes(400)
    path.write_bytes(bytes(content))
    with pytest.warns(UserWarning, match=r"a\.mp3: is damaged: .* cannot be decoded"):
        read_media(path)


def test_long_clips_are_cut_where_that_is_asked_for(tmp_path: Path) -> None:
    times, greys = [k / 2 for k in range(8)], [GREYS[k // 2] for k in range(8)]
    path = write_video(tmp_path / "a.mp4", times, greys, burst(4, 0.5)[None])
    song = write_video(tmp_path / "song.mkv", [0.0], [77], burst(4, 0.5)[None])
    for file in (path, write_sound(tmp_path / "a.wav", burst(4, 0.5)[None]), song):
        with pytest.raises(InputError, match=rf"{file.name}: max_seconds: .*set cut_long"):
            read_media(file, max_seconds=3)
        with pytest.warns(UserWarning, match=rf"{file.name}: is longer than max_seconds; its first 3 s are read"):
            media = read_media(file, max_seconds=3, cut_long=True)
        assert sound_of(media).shape == (48_000,) and media.duration == pytest.approx(3.0, abs=0.01)
        assert len(sound_of(read_media(file, max_seconds=5, cut_long=True))) == pytest.approx(64_000, abs=1_100)
        part = read_media(file, start=1.0, end=2.0, max_seconds=3, cut_long=True)
        assert sound_of(part).shape == (16_000,), "nothing was cut"


def test_few_frames_are_taken_evenly(tmp_path: Path) -> None:
    times, greys = [k / 4 for k in range(96)], [30 + 2 * k for k in range(96)]
    path = write_video(tmp_path / "a.mp4", times, greys, burst(24, 12.5)[None])
    media = read_media(path, max_frames=8)
    assert media.fps == pytest.approx(8 / 24, rel=0.01) and len(frames_of(media)) == 8
    assert greys_of(media) == pytest.approx([30 + 24 * k for k in range(8)], abs=3), "one each 3 s"
    assert len(sound_of(media)) == pytest.approx(24 * 16_000, rel=0.02)
    assert onset(media) == pytest.approx(12.5, abs=0.02)
    assert len(frames_of(read_media(path, max_frames=9))) == 8, "whole temporal patches"
    assert read_media(path, max_frames=64).fps == 2.0
    part = read_media(path, start=6.0, end=18.0, max_frames=4)
    assert greys_of(part) == pytest.approx([78, 102, 126, 150], abs=3)
    small = write_picture(tmp_path / "a.png", 80)
    record = Record("0", path, None, "?", None, "!", (), "word", attachments=(small,))
    joined = read_record_media(record, max_frames=8)
    assert len(frames_of(joined)) == 10 and joined.fps == media.fps
    assert read_media(path, max_frames=8, max_seconds=30).fps == media.fps


def test_few_frames_where_the_header_is_wrong(tmp_path: Path) -> None:
    """A header that says 3 hours, or nothing: the rate is that of the pictures that are there."""
    times, greys = [k / 4 for k in range(96)], [30 + 2 * k for k in range(96)]
    path = write_video(tmp_path / "a.mp4", times, greys)
    expected = read_media(path, max_frames=8)
    content = bytearray(path.read_bytes())
    for box in (b"mvhd", b"mdhd"):
        place = content.index(box)
        struct.pack_into(">I", content, place + 20, 3 * 3600 * struct.unpack_from(">I", content, place + 16)[0])
    path.write_bytes(bytes(content))
    assert torch.equal(frames_of(read_media(path, max_frames=8)), frames_of(expected))
    raw = write_video(tmp_path / "a.h264", times, greys)
    assert len(frames_of(read_media(raw, max_frames=8))) == 8
