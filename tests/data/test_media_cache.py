"""Decoded clips on disk: the same clip again, and never one that is damaged or of a file that has changed."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from acckv.data.media import read_media
from acckv.data.media_cache import MediaCache
from acckv.data.records import Record
from acckv.errors import InputError
from acckv.models.clips import Media
from tests.data.media_files import burst, frames_of, write_picture, write_sound, write_video


@pytest.fixture
def video(tmp_path: Path) -> Path:
    return write_video(tmp_path / "a.mp4", [0.0, 0.5, 1.0, 1.9], [40, 90, 140, 190], burst(2, 0.5)[None])


@pytest.fixture
def cache(tmp_path: Path) -> MediaCache:
    return MediaCache(tmp_path / "cache")


def same(first: Media, second: Media) -> bool:
    tensors = ((first.frames, second.frames), (first.audio, second.audio))
    equal = all(a is b if a is None or b is None else torch.equal(a, b) for a, b in tensors)
    return equal and replace(first, frames=None, audio=None) == replace(second, frames=None, audio=None)


def files(cache: MediaCache) -> list[Path]:
    return sorted(cache.folder.iterdir())


def replaced(path: Path, content: bytes) -> Path:
    """Other content of the same size and time: what only a look into the file could tell."""
    status = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    return path


def test_the_same_clip_comes_back_undecoded(cache: MediaCache, video: Path) -> None:
    first = cache.read_media(video)
    assert same(first, read_media(video))
    replaced(video, b"x" * video.stat().st_size)
    assert same(cache.read_media(video), first) and len(files(cache)) == 1


def test_every_kind(cache: MediaCache, tmp_path: Path) -> None:
    for path in (write_sound(tmp_path / "a.wav", burst(2, 1.0)[None]), write_picture(tmp_path / "a.png", 80)):
        assert same(cache.read_media(path), read_media(path))
        assert same(cache.read_media(path), read_media(path))


def test_options_and_changes_make_another_clip(cache: MediaCache, video: Path, tmp_path: Path) -> None:
    sound = write_sound(tmp_path / "a.wav", burst(2, 1.0)[None])
    cache.read_media(video)
    for options in ({"fps": 4.0}, {"start": 1.0}, {"end": 1.0}, {"audio": sound}, {"sampling_rate": 8_000}):
        assert same(cache.read_media(video, **options), read_media(video, **options))
    assert len(files(cache)) == 6
    write_video(video, [0.0, 1.0], [10, 20])
    assert same(cache.read_media(video), read_media(video)) and len(files(cache)) == 7
    write_sound(sound, burst(3, 0.5)[None])
    assert same(cache.read_media(video, audio=sound), read_media(video, audio=sound))


def test_records(cache: MediaCache, video: Path, tmp_path: Path) -> None:
    picture = write_picture(tmp_path / "a.png", 80)
    record = Record("0", video, None, "?", None, "left", (), "word", attachments=(picture,))
    first = cache.read_record_media(record)
    assert len(frames_of(first)) == 6
    replaced(video, b"x" * video.stat().st_size)
    assert same(cache.read_record_media(replace(record, id="1", question="!")), first), "another question, same clip"
    with pytest.raises(InputError, match=r"a\.mp4: not a readable media file"):
        cache.read_record_media(replace(record, start=1.0))


@pytest.mark.parametrize("damage", ["half", "empty", "header", "sample", "metadata", "another clip"])
def test_a_damaged_file_is_never_used(
    cache: MediaCache, video: Path, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = cache.read_media(video)
    (place,) = files(cache)
    content = bytearray(place.read_bytes())
    if damage == "half":
        content = content[: len(content) // 2]
    elif damage == "empty":
        content = bytearray()
    elif damage == "header":
        content[3] ^= 0x80
    elif damage == "sample":
        content[-1000] ^= 1
    elif damage == "metadata":
        content[content.index(b"duration") + 13] ^= 1
    else:
        other = MediaCache(tmp_path / "other")
        other.read_media(write_video(tmp_path / "b.mp4", [0.0, 1.0], [10, 20]))
        content = bytearray(files(other)[0].read_bytes())
    place.write_bytes(content)
    assert same(cache.read_media(video), first)
    assert "damaged" in caplog.text and str(place) in caplog.text
    caplog.clear()
    replaced(video, b"x" * video.stat().st_size)
    assert same(cache.read_media(video), first) and not caplog.text, "the damaged file was replaced"


def test_a_killed_writer_leaves_nothing_that_is_used(cache: MediaCache, video: Path) -> None:
    """The process dies between writing and renaming."""
    process = os.fork()
    if process == 0:
        os.replace = lambda *_: os._exit(9)
        cache.read_media(video)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
    assert len(files(cache)) == 1 and files(cache)[0].name.startswith("."), "half-written"
    assert same(cache.read_media(video), read_media(video))


def test_errors_are_not_kept(cache: MediaCache, video: Path, tmp_path: Path) -> None:
    content = video.read_bytes()
    replaced(video, b"x" * len(content))
    for path in (video, tmp_path / "none.mp4"):
        with pytest.raises(InputError, match=path.name):
            cache.read_media(path)
    assert not cache.folder.exists()
    replaced(video, content)
    assert len(frames_of(cache.read_media(video))) == 4


def test_warnings_come_again_with_the_clip(cache: MediaCache, video: Path) -> None:
    """What was cut off of a clip is said each time that it is read."""
    clips = []
    for _ in range(2):
        with pytest.warns(UserWarning, match="is longer than max_seconds; its first 1 s are read"):
            clips.append(cache.read_media(video, max_seconds=1, cut_long=True))
    assert same(*clips) and len(files(cache)) == 1
