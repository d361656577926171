"""The pictures and the sound of one file, decoded side by side."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import av

from acckv.data.decoding import decoded, first_time, open_media, picture_stream, seek_to, sound_stream
from acckv.data.media_options import MediaOptions
from acckv.data.pictures import PictureConverter, exif_orientation, pixel_aspect
from acckv.data.sampling import GAP, FrameSampler, SoundTrack
from acckv.errors import InputError
from acckv.models.clips import TEMPORAL_PATCH

SEEK_MARGIN = 0.5
"""Seconds before the asked start at which decoding begins, so that the sound decoder has warmed up."""


@dataclass(frozen=True)
class Wanted:
    """The part of a file that is read.

    Args:
        start, end: seconds of the file; None is its beginning and its end.
        sampling_rate: samples a second of the sound.
        options: how much of it.

    Raises:
        InputError: an option is out of range.
    """

    start: float | None
    end: float | None
    sampling_rate: int
    options: MediaOptions

    def __post_init__(self) -> None:
        if not 0 < self.sampling_rate < math.inf:
            raise InputError(f"{self.sampling_rate} is not a number above 0", field="sampling_rate")
        if self.start is not None and not 0 <= self.start < math.inf:
            raise InputError(f"{self.start} is not a number of seconds from 0 on", field="start")
        if self.end is not None and not self.begin < self.end < math.inf:
            raise InputError(f"{self.end} is not after start ({self.begin:g})", field="end")

    @property
    def begin(self) -> float:
        """Seconds of the file at which the clip begins."""
        return self.start or 0.0

    @property
    def asked(self) -> float:
        """Seconds of the clip that were asked for, infinity to the end of the file."""
        return math.inf if self.end is None else self.end - self.begin

    @property
    def is_cut(self) -> bool:
        """Whether `max_seconds` and not `end` says where the clip may end."""
        return self.options.cut_long and self.asked > self.options.max_seconds

    @property
    def length(self) -> float | None:
        """Seconds of the clip at most; None to the end of the file."""
        if self.is_cut:
            return self.options.max_seconds
        return None if self.end is None else self.asked

    def at(self, fps: float) -> Wanted:
        """The same at another number of pictures a second."""
        return replace(self, options=replace(self.options, fps=fps))


def sparse_rate(wanted: Wanted, seconds: float | None) -> float:
    """Pictures a second of a clip of so many seconds, by `fps` and `max_frames`."""
    options = wanted.options
    if options.max_frames is None or not seconds:
        return options.fps
    return min(options.fps, (options.max_frames - options.max_frames % TEMPORAL_PATCH) / seconds)


def stated_seconds(path: Path, wanted: Wanted) -> float | None:
    """Length of the clip as the file's header has it; None where it does not say."""
    with open_media(path) as container:
        if not container.duration or container.duration < 0:
            return None
        left = container.duration / av.time_base - wanted.begin
    return min(left, wanted.length or math.inf) if left > 0 else None


def read_tracks(
    path: Path, wanted: Wanted, *, pictures: bool, sound: bool, seek: bool = True, lead: bool = True
) -> tuple[FrameSampler | None, SoundTrack | None]:
    """The pictures and the sound of a file, where it has them and they are asked for.

    The clip begins with its first picture, or with its sound where that begins well before.

    Args:
        seek: whether what lies before the start may be skipped undecoded.
        lead: whether the header is believed that the sound begins first.

    Raises:
        InputError: see `acckv.data.media.read_media`.
    """
    options, rate = wanted.options, wanted.sampling_rate
    with open_media(path) as container:
        video = picture_stream(container, path) if pictures else None
        audio = sound_stream(container, path) if sound else None
        streams = [stream for stream in (video, audio) if stream is not None]
        if not streams:
            kind = "no sound track" if not pictures else "no video stream and no sound"
            raise InputError(f"{kind} (or the file is cut off)", source=path)
        first = first_time(streams[0])
        lead = lead and video is not None and audio is not None and first_time(audio) < first - GAP
        if lead:
            first = first_time(audio)
        seek = seek and wanted.begin > SEEK_MARGIN
        if seek and not seek_to(container, streams[0], first + wanted.begin - SEEK_MARGIN):
            return read_tracks(path, wanted, pictures=pictures, sound=sound, seek=False, lead=lead)
        origin = None if wanted.start is None and not lead else first + wanted.begin
        sampler = track = None
        if video is not None:
            step = float(1 / video.average_rate) if video.average_rate else None
            orientation = exif_orientation(container, path)
            convert = PictureConverter(path, options.max_pixels, pixel_aspect(video), orientation)
            sampler = FrameSampler(path, options.fps, options.max_seconds, convert, origin, wanted.length, step)
        if audio is not None:
            track = SoundTrack(path, rate, options.max_seconds, origin, wanted.length)
        ahead = sampler or track
        for frame in decoded(container, streams, lambda stream: not (sampler if stream is video else track).done, path):
            (sampler if isinstance(frame, av.VideoFrame) else track).add(frame)
            if track is not None and track.origin is None:
                track.origin = ahead.first
    if seek and (ahead.first is None or (ahead.first > origin and not lead)):
        return read_tracks(path, wanted, pictures=pictures, sound=sound, seek=False, lead=lead)
    if lead and not seek and (track.first is None or abs(track.first - first) > GAP):
        return read_tracks(path, wanted, pictures=pictures, sound=sound, lead=False)
    return sampler, track
