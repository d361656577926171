"""Read media files into sampled pictures and a mono sound track, aligned in time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import av
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from acckv.data.decoding import decoded, first_time, open_media, picture_stream, seek_to, sound_stream
from acckv.data.records import Record
from acckv.data.sampling import TEMPORAL_PATCH, FrameSampler, SoundTrack
from acckv.errors import InputError

Kind = Literal["audio-video", "video", "audio"]
KINDS: tuple[Kind, ...] = get_args(Kind)
MAX_PIXELS = 768 * 32 * 32
"""Pixels of a frame: the most that a supported processor makes use of (768 tokens of 32 x 32 pixels)."""
MAX_SECONDS = 600.0
"""Seconds of one clip: 16 kHz sound of 38 MB, and at 2 frames a second at most 2.8 GB of frames."""
SEEK_MARGIN = 0.5
"""Seconds before the asked start at which decoding begins, so that the sound decoder has warmed up."""
SHORTEST_SOUND = 0.1
"""Seconds to which shorter sound without pictures is padded: less makes no audio token."""


@dataclass(frozen=True)
class Media:
    """One clip, as a processor wants it: pictures, sound or both.

    Attributes:
        frames: uint8 [count, 3, height, width]; `count` is even and at least 2. None for sound alone.
        audio: float32 [samples] mono. Beside frames exactly as long as they are (count / fps seconds), or longer where
            `join_media` made it so. None without a sound track.
        duration: seconds of media in the file (before rounding to whole temporal patches).
        path: the file.
        fps: frames a second of `frames`.
        sampling_rate: samples a second of `audio`.
    """

    frames: Tensor | None
    audio: Tensor | None
    duration: float
    path: Path
    fps: float = 2.0
    sampling_rate: int = 16_000

    @property
    def kind(self) -> Kind:
        """What the clip has. A batch holds clips of one kind."""
        if self.frames is None:
            return "audio"
        return "video" if self.audio is None else "audio-video"

    def parts(self, seconds: float) -> Iterator[Media]:
        """The clip in pieces of about so many seconds, each of whole temporal patches, as a stream would bring it.

        Sound that goes on after the last picture belongs to the last piece.
        """
        patches = max(round(seconds * self.fps / TEMPORAL_PATCH), 1) * TEMPORAL_PATCH
        samples = self.sampling_rate / self.fps
        count = len(self.frames) if self.frames is not None else math.ceil(len(self.audio) / samples)
        for start in range(0, count, patches):
            stop = min(start + patches, count)
            frames = None if self.frames is None else self.frames[start:stop]
            last = None if stop == count else round(stop * samples)
            audio = None if self.audio is None else self.audio[round(start * samples) : last]
            yield replace(self, frames=frames, audio=audio, duration=(stop - start) / self.fps)


def read_media(
    path: str | Path,
    *,
    audio: str | Path | None = None,
    start: float | None = None,
    end: float | None = None,
    fps: float = 2.0,
    sampling_rate: int = 16_000,
    max_pixels: int | None = MAX_PIXELS,
    max_seconds: float = MAX_SECONDS,
) -> Media:
    """Read a video, a sound or a picture.

    Frames are sampled at `fps` by presentation time (the picture that is on screen at k / fps), so variable frame
    rates are fine. The clip is rounded to whole temporal patches (two frames); its last picture is repeated, and its
    sound cut or padded with silence, to that length. A file that is cut off or damaged is read as far as it goes. No
    length that a header states is believed without the media for it.

    A picture alone becomes one temporal patch. Sound alone keeps its length and has no frames.

    Args:
        path: the file.
        audio: a file with the sound, in place of the sound of `path`; its first sample belongs to the first picture.
            Beside a single picture it is read as a whole.
        start, end: seconds of the file; none is its beginning and its end. What lies before is skipped undecoded where
            the file allows it. An end after the end of the file is the end of the file.
        fps: frames a second to sample.
        sampling_rate: samples a second of the sound.
        max_pixels: scale larger pictures down to about this many pixels while reading (saves memory); None keeps them.
        max_seconds: of the clip; a longer one is an error, so that memory is bounded.

    Raises:
        InputError: an option is out of range, no such file, not a media file, nothing in it that can be decoded,
            nothing after `start`, or more than `max_seconds`.
    """
    path = Path(path)
    wanted = _Wanted(start, end, fps, sampling_rate, max_pixels, max_seconds)
    sampler, track = _decode(path, wanted, pictures=True, sound=audio is None)
    if sampler is None and audio is not None:
        raise InputError("no video stream (or the file is cut off), to which sound could be added", source=path)
    if sampler is None:
        return _sound_alone(path, wanted, track)
    if audio is not None:
        _, track = _decode(Path(audio), wanted, pictures=False, sound=True)
    frames, duration = sampler.finish(track.end if track is not None and audio is None else 0.0)
    clip = Media(frames, None, duration, path, fps, sampling_rate)
    if audio is not None and sampler.count == 1:
        return join_media([clip, _sound_alone(Path(audio), wanted, track)])
    if track is None:
        return clip
    return replace(clip, audio=track.finish(round(len(frames) / fps * sampling_rate)))


def read_record_media(record: Record, **options: Any) -> Media:
    """All that one question is about, as one clip: `video` with `audio`, from `start` to `end`, then `attachments`.

    Args:
        record: the question.
        options: of `read_media`.

    Raises:
        InputError: a file cannot be read; it names the file.
    """
    clip = read_media(record.video, audio=record.audio, start=record.start, end=record.end, **options)
    return join_media([clip, *(read_media(file, **options) for file in record.attachments)])


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


@dataclass(frozen=True)
class _Wanted:
    """The options of `read_media`, checked."""

    start: float | None
    end: float | None
    fps: float
    sampling_rate: int
    max_pixels: int | None
    max_seconds: float

    def __post_init__(self) -> None:
        for name in ("fps", "sampling_rate", "max_pixels", "max_seconds"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{value} is not a number above 0", field=name)
        if self.start is not None and not 0 <= self.start < math.inf:
            raise InputError(f"{self.start} is not a number of seconds from 0 on", field="start")
        if self.end is not None and not self.begin < self.end < math.inf:
            raise InputError(f"{self.end} is not after start ({self.begin:g})", field="end")

    @property
    def begin(self) -> float:
        """Seconds of the file at which the clip begins."""
        return self.start or 0.0

    @property
    def length(self) -> float | None:
        """Seconds of the clip at most; None to the end of the file."""
        return None if self.end is None else self.end - self.begin


def _decode(
    path: Path, wanted: _Wanted, *, pictures: bool, sound: bool, seek: bool = True
) -> tuple[FrameSampler | None, SoundTrack | None]:
    """The pictures and the sound of a file, where it has them and they are asked for.

    Raises:
        InputError: see `read_media`.
    """
    with open_media(path) as container:
        video = picture_stream(container, path) if pictures else None
        audio = sound_stream(container, path) if sound else None
        streams = [stream for stream in (video, audio) if stream is not None]
        if not streams:
            kind = "no sound track" if not pictures else "no video stream and no sound"
            raise InputError(f"{kind} (or the file is cut off)", source=path)
        first = first_time(streams[0])
        seek = seek and wanted.begin > SEEK_MARGIN
        if seek and not seek_to(container, streams[0], first + wanted.begin - SEEK_MARGIN):
            return _decode(path, wanted, pictures=pictures, sound=sound, seek=False)
        origin = None if wanted.start is None else first + wanted.begin
        sampler = track = None
        if video is not None:
            step = float(1 / video.average_rate) if video.average_rate else None
            limits = (wanted.fps, wanted.max_pixels, wanted.max_seconds)
            sampler = FrameSampler(path, *limits, origin, wanted.length, step)
        if audio is not None:
            track = SoundTrack(wanted.sampling_rate, wanted.max_seconds, origin, wanted.length)
        lead = sampler or track
        for frame in decoded(container, streams, lambda stream: not (sampler if stream is video else track).done):
            (sampler if isinstance(frame, av.VideoFrame) else track).add(frame)
            if track is not None and track.origin is None:
                track.origin = lead.first
    if seek and (lead.first is None or lead.first > origin):
        return _decode(path, wanted, pictures=pictures, sound=sound, seek=False)
    return sampler, track


def _sound_alone(path: Path, wanted: _Wanted, track: SoundTrack) -> Media:
    """Sound without pictures, as long as it is.

    Raises:
        InputError: none could be decoded, or too much.
    """
    if track.done and (wanted.length is None or wanted.length > wanted.max_seconds):
        message = f"sound goes on for more than max_seconds={wanted.max_seconds:g}; give start and end, or raise it"
        raise InputError(message, source=path, field="max_seconds")
    audio = track.finish()
    if not len(audio):
        where = "" if wanted.start is None else f" after start={wanted.start:g}"
        raise InputError(f"no sound could be decoded{where}", source=path)
    duration = len(audio) / wanted.sampling_rate
    missing = round(SHORTEST_SOUND * wanted.sampling_rate) - len(audio)
    return Media(None, pad(audio, (0, max(missing, 0))), duration, path, wanted.fps, wanted.sampling_rate)
