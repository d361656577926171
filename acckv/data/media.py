"""Read a media file into sampled pictures and a mono sound track, aligned in time (PyAV)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from torch import Tensor

from acckv.errors import InputError

TEMPORAL_PATCH = 2
"""Pictures that the model joins into one temporal patch."""


@dataclass(frozen=True)
class Media:
    """One clip, as a processor wants it.

    Attributes:
        frames: uint8 [count, 3, height, width]; `count` is even and at least 2.
        audio: float32 [samples] mono, exactly as long as the frames (count / fps seconds); None without a sound track.
        duration: seconds of video in the file (before rounding to whole temporal patches).
        path: the file.
        fps: frames a second of `frames`.
        sampling_rate: samples a second of `audio`.
    """

    frames: Tensor
    audio: Tensor | None
    duration: float
    path: Path
    fps: float = 2.0
    sampling_rate: int = 16_000

    def parts(self, seconds: float) -> Iterator[Media]:
        """The clip in pieces of about so many seconds, each of whole temporal patches, as a stream would bring it."""
        step = max(round(seconds * self.fps / TEMPORAL_PATCH), 1) * TEMPORAL_PATCH
        samples = self.sampling_rate / self.fps
        for start in range(0, len(self.frames), step):
            frames = self.frames[start : start + step]
            stop = start + len(frames)
            audio = None if self.audio is None else self.audio[round(start * samples) : round(stop * samples)]
            yield replace(self, frames=frames, audio=audio, duration=len(frames) / self.fps)


def read_media(
    path: str | Path, *, fps: float = 2.0, sampling_rate: int = 16_000, max_pixels: int | None = None
) -> Media:
    """Read a video file.

    Frames are sampled at `fps` by presentation time (the picture that is on screen at k / fps), so variable frame
    rates are fine. The clip is rounded to whole temporal patches (two frames); its last picture is repeated, and its
    sound cut or padded with silence, to that length. A file that is cut off is read as far as it goes.

    Args:
        path: the file.
        fps: frames a second to sample.
        sampling_rate: samples a second of the sound.
        max_pixels: scale larger pictures down to about this many pixels while reading (saves memory).

    Raises:
        InputError: no such file, not a media file, no video stream, or not one readable picture.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError("no such file", source=path)
    try:
        container = av.open(str(path))
    except (av.FFmpegError, OSError, ValueError) as error:
        raise InputError(f"not a readable media file ({error})", source=path) from error
    with container:
        pictures = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not pictures:
            raise InputError("no video stream (or the file is cut off)", source=path)
        sampler = _FrameSampler(fps, max_pixels)
        sound = container.streams.audio[0] if container.streams.audio else None
        track = _AudioTrack(sampling_rate) if sound is not None else None
        streams = [pictures[0]] if sound is None else [pictures[0], sound]
        for frame in _decode(container, streams):
            if isinstance(frame, av.VideoFrame):
                sampler.add(frame)
            elif track is not None:
                track.add(frame)
    if not sampler.started:
        raise InputError("no picture could be decoded", source=path)
    frames, duration = sampler.finish()
    samples = round(len(frames) / fps * sampling_rate)
    audio = track.finish(sampler.start, samples) if track is not None else None
    return Media(frames, audio, duration, path, fps, sampling_rate)


def _decode(container: av.container.InputContainer, streams: list) -> Iterator[av.VideoFrame | av.AudioFrame]:
    """Every frame that can be decoded: damaged packets are skipped, and a cut-off file ends the loop."""
    packets = container.demux(streams)
    while True:
        try:
            packet = next(packets)
        except (StopIteration, av.FFmpegError):
            return
        try:
            yield from packet.decode()
        except av.FFmpegError:
            continue


class _FrameSampler:
    """Picks the picture that is on screen at each multiple of 1 / fps seconds."""

    def __init__(self, fps: float, max_pixels: int | None) -> None:
        self.fps, self.max_pixels = fps, max_pixels
        self.start = self.end = self._time = 0.0
        self.started = False
        self._shown: av.VideoFrame | None = None
        self._shown_pixels: np.ndarray | None = None
        self._picked: list[np.ndarray] = []
        self._step = 1 / fps
        self._scaler = VideoReformatter()

    def add(self, frame: av.VideoFrame) -> None:
        time = frame.time if frame.time is not None else self.end
        if not self.started:
            self.started, self.start = True, time
        elif time <= self._time:
            return
        self._time = time
        self._emit_until(time)
        self._shown, self._shown_pixels = frame, None
        length = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else 0.0
        self._step = length or self._step
        self.end = time + self._step

    def finish(self) -> tuple[Tensor, float]:
        """Sampled frames uint8 [count, 3, height, width] and the video's duration in seconds."""
        duration = self.end - self.start
        count = TEMPORAL_PATCH * max(1, round(duration * self.fps / TEMPORAL_PATCH))
        while len(self._picked) < count:
            self._pick()
        frames = torch.from_numpy(np.stack(self._picked[:count]))
        return frames.permute(0, 3, 1, 2).contiguous(), duration

    def _emit_until(self, time: float) -> None:
        tolerance = 1e-3
        while self._shown is not None and self.start + len(self._picked) / self.fps < time - tolerance:
            self._pick()

    def _pick(self) -> None:
        if self._shown_pixels is None:
            self._shown_pixels = self._pixels(self._shown)
        self._picked.append(self._shown_pixels)

    def _pixels(self, frame: av.VideoFrame) -> np.ndarray:
        width, height = frame.width, frame.height
        if self.max_pixels is not None and width * height > self.max_pixels:
            scale = (self.max_pixels / (width * height)) ** 0.5
            width, height = max(2, round(width * scale)), max(2, round(height * scale))
        pixels = self._scaled(frame, width, height)
        turns = round(frame.rotation / 90) % 4
        pixels = np.rot90(pixels, turns) if turns else pixels
        if self._picked and pixels.shape != self._picked[0].shape:
            height, width = self._picked[0].shape[:2]
            pixels = self._scaled(frame, width, height)
        return np.ascontiguousarray(pixels)

    def _scaled(self, frame: av.VideoFrame, width: int, height: int) -> np.ndarray:
        return self._scaler.reformat(frame, width=width, height=height, format="rgb24").to_ndarray()


class _AudioTrack:
    """Collects a sound track as mono float32 samples and remembers when it starts."""

    def __init__(self, sampling_rate: int) -> None:
        self.sampling_rate = sampling_rate
        self._resampler = av.AudioResampler(format="flt", layout="mono", rate=sampling_rate)
        self._blocks: list[np.ndarray] = []
        self._start: float | None = None

    def add(self, frame: av.AudioFrame) -> None:
        if self._start is None:
            self._start = frame.time if frame.time is not None else 0.0
        frame.pts = None
        self._collect(frame)

    def finish(self, video_start: float, samples: int) -> Tensor:
        """Sound from `video_start` seconds on: float32 [samples], silence where the track has none."""
        self._collect(None)
        track = np.concatenate(self._blocks) if self._blocks else np.zeros(0, np.float32)
        offset = round(((self._start or 0.0) - video_start) * self.sampling_rate)
        track = np.concatenate([np.zeros(offset, np.float32), track]) if offset > 0 else track[-offset:]
        aligned = np.zeros(samples, np.float32)
        aligned[: min(samples, len(track))] = track[:samples]
        return torch.from_numpy(aligned)

    def _collect(self, frame: av.AudioFrame | None) -> None:
        if frame is None and self._start is None:
            return
        self._blocks += [block.to_ndarray().reshape(-1) for block in self._resampler.resample(frame)]
