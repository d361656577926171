"""Read media files into sampled pictures and a mono sound track, aligned in time."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from acckv.data.media_options import MediaOptions
from acckv.data.records import Record
from acckv.data.sampling import LONGER, FrameSampler, SoundTrack
from acckv.data.tracks import Wanted, read_tracks, sparse_rate, stated_seconds
from acckv.errors import InputError
from acckv.models.clips import Media

SHORTEST_SOUND = 0.1
"""Seconds to which shorter sound without pictures is padded: less makes no audio token."""


def read_media(
    path: str | Path,
    *,
    audio: str | Path | None = None,
    start: float | None = None,
    end: float | None = None,
    sampling_rate: int = 16_000,
    **options: Any,
) -> Media:
    """Read a video, a sound or a picture. What becomes of each kind of file is told in docs/media.md.

    Frames are sampled at `fps` by presentation time (the picture that is on screen at k / fps), so variable frame
    rates are fine; they are upright and have square pixels. The clip is rounded to whole temporal patches (two frames);
    its last picture is shown to the end of its sound. A file that is cut off or damaged is read as far as it goes, with
    a warning. No length that a header states is believed without the media for it.

    A picture alone becomes one temporal patch, and so does the one picture of a video; its sound is kept whole. Sound
    alone keeps its length and has no frames.

    Args:
        path: the file.
        audio: a file with the sound, in place of the sound of `path`; its first sample belongs to the first picture.
        start, end: seconds of the file; none is its beginning and its end. What lies before is skipped undecoded where
            the file allows it. An end after the end of the file is the end of the file.
        sampling_rate: samples a second of the sound.
        options: of `MediaOptions`: fps, max_seconds, max_frames, max_pixels and cut_long.

    Raises:
        InputError: an option is out of range, no such file, not a media file, nothing in it that can be decoded,
            nothing after `start`, or more than `max_seconds`.
    """
    path = Path(path)
    wanted = Wanted(start, end, sampling_rate, MediaOptions(**options))
    if wanted.options.max_frames is None:
        return _read(path, wanted, audio)
    clip = _read(path, wanted.at(sparse_rate(wanted, stated_seconds(path, wanted))), audio)
    exact = sparse_rate(wanted, clip.duration)  # the header may be wrong
    if clip.frames is None or (len(clip.frames) <= wanted.options.max_frames and exact < 1.02 * clip.fps):
        return clip
    return _read(path, wanted.at(exact), audio)


def _read(path: Path, wanted: Wanted, audio: str | Path | None) -> Media:
    sampler, track = read_tracks(path, wanted, pictures=True, sound=audio is None)
    if sampler is None and audio is not None:
        raise InputError("no video stream (or the file is cut off), to which sound could be added", source=path)
    if sampler is None:
        return _sound_alone(path, wanted, track)
    if audio is not None:
        _, track = read_tracks(Path(audio), wanted, pictures=False, sound=True)
    frames, duration = sampler.finish(_sound_end(sampler, track, separate=audio is not None))
    clip = Media(frames, None, duration, path, wanted.options.fps, wanted.sampling_rate)
    if track is None or track.first is None:
        return clip if track is None else replace(clip, audio=track.finish(clip.samples))
    if sampler.still:
        return join_media([clip, _sound_alone(path if audio is None else Path(audio), wanted, track)])
    if wanted.is_cut and sampler.done:
        _warn_of_cut(path, wanted)
    return replace(clip, audio=track.finish(clip.samples))


def _sound_end(sampler: FrameSampler, track: SoundTrack | None, separate: bool) -> float:
    """When the sound ends, by the clock of the pictures."""
    if track is None or track.first is None or sampler.origin is None:
        return -math.inf
    if not separate:
        return track.end
    return sampler.origin + track.end - (track.origin or 0.0)


def _warn_of_cut(path: Path, wanted: Wanted) -> None:
    seconds = f"{wanted.options.max_seconds:g} s"
    warnings.warn(
        f"{path}: is longer than max_seconds; its first {seconds} are read, the rest is left out", stacklevel=2
    )


def read_record_media(record: Record, **options: Any) -> Media:
    """All that one question is about, as one clip: `video` with `audio`, from `start` to `end`, then `attachments`.

    With `max_frames`, which holds for each file, all are read at the lowest rate that one of them needs.

    Args:
        record: the question.
        options: of `read_media`.

    Raises:
        InputError: a file cannot be read; it names the file.
    """

    def read(**options: Any) -> list[Media]:
        clip = read_media(record.video, audio=record.audio, start=record.start, end=record.end, **options)
        return [clip, *(read_media(file, **options) for file in record.attachments)]

    parts = read(**options)
    rate = min(part.fps for part in parts)
    return join_media(parts if rate == max(part.fps for part in parts) else read(**{**options, "fps": rate}))


def join_media(parts: Sequence[Media]) -> Media:
    """Several pictures, sounds and clips of one question as one clip.

    Pictures follow one another, each a whole temporal patch, and so do sounds, independently of the pictures: a
    picture and a sound both begin at 0, and a second picture follows at once, however long the sound is. Clips with
    pictures and sound come first, so that both stay together. At the end sound is padded with silence to the end of
    the pictures; it may go on after them.

    The clip is as large as its largest picture; others are scaled to fit into it and stand in its middle, on black.

    Raises:
        ValueError: no part, or parts that were read at different rates.
    """
    if len({(part.fps, part.sampling_rate) for part in parts}) != 1:
        raise ValueError("join_media needs parts that were read at the same fps and sampling_rate")
    if len(parts) == 1:
        return parts[0]
    parts = sorted(parts, key=lambda part: part.kind != "audio-video")
    pictures = [part.frames for part in parts if part.frames is not None]
    sounds = [part.audio for part in parts if part.audio is not None]
    largest = max((tuple(picture.shape[2:]) for picture in pictures), key=math.prod, default=(0, 0))
    frames = torch.cat([_fitted(picture, *largest) for picture in pictures]) if pictures else None
    audio = torch.cat(sounds) if sounds else None
    clip = replace(parts[0], frames=frames, audio=audio)
    seconds = 0.0 if frames is None else len(frames) / clip.fps
    if audio is not None:
        missing = round(seconds * clip.sampling_rate) - len(audio)
        clip = replace(clip, audio=pad(audio, (0, max(missing, 0))))
        seconds = max(seconds, len(audio) / clip.sampling_rate)
    return replace(clip, duration=seconds)


def _fitted(frames: Tensor, height: int, width: int) -> Tensor:
    """Frames scaled to fit into height x width, black around them."""
    if tuple(frames.shape[2:]) == (height, width):
        return frames
    scale = min(height / frames.shape[2], width / frames.shape[3])
    size = [max(round(side * scale), 1) for side in frames.shape[2:]]
    scaled = interpolate(frames.float(), size, mode="bilinear", antialias=True).round().clamp(0, 255).to(torch.uint8)
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    return pad(scaled, (left, width - size[1] - left, top, height - size[0] - top))


def _sound_alone(path: Path, wanted: Wanted, track: SoundTrack) -> Media:
    """Sound without pictures, as long as it is.

    Raises:
        InputError: none could be decoded, or too much.
    """
    limit = wanted.options.max_seconds
    if track.done and wanted.is_cut:
        _warn_of_cut(path, wanted)
    elif track.done and (wanted.length is None or wanted.length > limit):
        raise InputError(f"is longer than max_seconds={limit:g}; {LONGER}", source=path, field="max_seconds")
    audio = track.finish()
    if not len(audio):
        where = "" if wanted.start is None else f" after start={wanted.start:g}"
        raise InputError(f"no sound could be decoded{where}", source=path)
    duration = len(audio) / wanted.sampling_rate
    missing = round(SHORTEST_SOUND * wanted.sampling_rate) - len(audio)
    return Media(None, pad(audio, (0, max(missing, 0))), duration, path, wanted.options.fps, wanted.sampling_rate)
