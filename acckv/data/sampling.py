"""Decoded pictures and sound into what is asked for: sampled frames and one mono track, in bounded memory."""

from __future__ import annotations

from collections import deque
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from torch import Tensor

from acckv.data.decoding import RESTART, Clock
from acckv.errors import InputError

TEMPORAL_PATCH = 2
"""Pictures that the model joins into one temporal patch."""
LONGEST_LAST_PICTURE = 10.0
"""Seconds for which the stated length of the last picture is believed without sound that goes on as long."""
GAP = 0.1
"""Seconds between two blocks of sound from which on it counts as a gap (or an overlap)."""
LOUDEST = 8.0
"""Largest sample (full scale is 1). Damaged float sound may hold any number."""


class FrameSampler:
    """Picks the picture that is on screen at each multiple of 1 / fps seconds.

    Args:
        source: the file, for errors.
        fps: pictures a second.
        max_pixels: larger pictures are scaled down to about so many.
        max_seconds: of pictures; more are an error.
        origin: presentation time of the first sample; None takes that of the first picture.
        length: seconds after which nothing more is wanted.
        step: seconds for which a picture is shown where neither it nor its neighbours say so.
    """

    def __init__(
        self,
        source: Path,
        fps: float,
        max_pixels: int | None,
        max_seconds: float,
        origin: float | None = None,
        length: float | None = None,
        step: float | None = None,
    ) -> None:
        self.source, self.fps, self.max_pixels, self.max_seconds = source, fps, max_pixels, max_seconds
        self.origin, self.length = origin, length
        self.first: float | None = None
        self.count = 0
        self.done = False
        self._clock = Clock()
        self._time = 0.0
        self._usual = self._stated = step or 1 / fps
        self._shown: av.VideoFrame | None = None
        self._shown_pixels: Tensor | None = None
        self._picked: list[Tensor] = []
        self._scaler = VideoReformatter()

    def add(self, frame: av.VideoFrame) -> None:
        time = self._clock(frame.time)
        if self.first is None:
            self.first = time
            self.origin = time if self.origin is None else self.origin
        elif time <= self._time:
            return
        else:
            self._usual = time - self._time
        self._emit_until(time)
        if self.length is not None and time >= self.origin + self.length:
            self.done = True
            return
        self._stated = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else self._usual
        self._time = time
        self._clock.next = time + min(self._stated, RESTART)
        self._shown, self._shown_pixels = frame, None
        self.count += 1

    def finish(self, sound_end: float = 0.0) -> tuple[Tensor, float]:
        """Sampled frames uint8 [count, 3, height, width] and the seconds of video that they stand for.

        Args:
            sound_end: presentation time at which the sound ends.

        Raises:
            InputError: no picture, or too many.
        """
        if self._shown is None or self.origin is None:
            where = "" if self.length is None else " between start and end"
            raise InputError(f"no picture could be decoded{where}", source=self.source)
        last = self._stated
        if last > LONGEST_LAST_PICTURE:
            last = max(min(last, sound_end - self._time), self._usual)
        duration = self._time + last - self.origin
        if duration <= 0:
            message = f"{-duration + 1e-3:.2f} s after the last picture; nothing is there"
            raise InputError(message, source=self.source, field="start")
        if self.done or (self.length is not None and duration > self.length):
            duration = self.length
        self._check_length(duration)
        count = TEMPORAL_PATCH * max(1, round(duration * self.fps / TEMPORAL_PATCH))
        while len(self._picked) < count:
            self._pick()
        return torch.stack(self._picked[:count]), duration

    def _emit_until(self, time: float) -> None:
        tolerance = 1e-3
        if self.length is not None:
            time = min(time, self.origin + self.length)
        self._check_length(time - self.origin)
        while self._shown is not None and self.origin + len(self._picked) / self.fps < time - tolerance:
            self._pick()

    def _check_length(self, seconds: float) -> None:
        if seconds > self.max_seconds:
            message = f"pictures go on for more than max_seconds={self.max_seconds:g}; give start and end, or raise it"
            raise InputError(message, source=self.source, field="max_seconds")

    def _pick(self) -> None:
        if self._shown_pixels is None:
            self._shown_pixels = self._pixels(self._shown)
        self._picked.append(self._shown_pixels)

    def _pixels(self, frame: av.VideoFrame) -> Tensor:
        width, height = frame.width, frame.height
        if self.max_pixels is not None and width * height > self.max_pixels:
            scale = (self.max_pixels / (width * height)) ** 0.5
            width, height = max(2, round(width * scale)), max(2, round(height * scale))
        pixels = self._scaled(frame, width, height)
        turns = round(frame.rotation / 90) % 4
        pixels = np.rot90(pixels, turns) if turns else pixels
        if self._picked and pixels.shape[:2] != tuple(self._picked[0].shape[1:]):
            height, width = self._picked[0].shape[1:]
            pixels = self._scaled(frame, width, height)
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))

    def _scaled(self, frame: av.VideoFrame, width: int, height: int) -> np.ndarray:
        try:
            return self._scaler.reformat(frame, width=width, height=height, format="rgb24").to_ndarray()
        except (av.FFmpegError, ValueError) as error:
            raise InputError(f"a picture cannot be converted ({error})", source=self.source) from error


class SoundTrack:
    """Collects a sound track as mono float32 samples, each block at its presentation time.

    Args:
        sampling_rate: samples a second.
        max_seconds: of sound that is held.
        origin: presentation time of the first sample wanted; may be set later, and until then the latest is held.
        length: seconds after which nothing more is wanted.
    """

    def __init__(
        self, sampling_rate: int, max_seconds: float, origin: float | None = None, length: float | None = None
    ) -> None:
        self.sampling_rate, self.origin = sampling_rate, origin
        self.wanted = max_seconds if length is None else min(length, max_seconds)
        self.first: float | None = None
        self.end = 0.0
        self._most = round(max_seconds * sampling_rate)
        self._clock = Clock()
        self._resampler: av.AudioResampler | None = None
        self._format: tuple | None = None
        self._blocks: deque[tuple[int, np.ndarray]] = deque()
        self._position = self._held = 0

    @property
    def done(self) -> bool:
        """Whether there is sound after all that is wanted."""
        return self.origin is not None and self.end > self.origin + self.wanted

    def add(self, frame: av.AudioFrame) -> None:
        if not frame.samples or not frame.sample_rate:
            return
        time = self._clock(frame.time)
        sound_format = (frame.format.name, frame.layout.name, frame.sample_rate)
        if self.first is None:
            self.first = time
        if sound_format != self._format or abs(time - self._clock.next) > GAP:
            self._flush()
            self._resampler = av.AudioResampler(format="flt", layout="mono", rate=self.sampling_rate)
            self._format, self._position = sound_format, round(time * self.sampling_rate)
            self._clock.next = time
        self._clock.next += frame.samples / frame.sample_rate
        self.end = max(self.end, self._clock.next)
        frame.pts = None
        self._resample(frame)

    def finish(self, samples: int | None = None) -> Tensor:
        """Sound from `origin` on: float32 [samples], silence where the track has none.

        Args:
            samples: how many; None takes all there are.
        """
        self._flush()
        origin = round((self.origin or 0.0) * self.sampling_rate)
        if samples is None:
            end = max((place + len(block) for place, block in self._blocks), default=origin)
            samples = max(min(end - origin, round(self.wanted * self.sampling_rate)), 0)
        track = np.zeros(samples, np.float32)
        for place, block in self._blocks:
            start = place - origin
            piece = block[max(-start, 0) : max(samples - start, 0)]
            start = max(start, 0)
            track[start : start + len(piece)] = piece
        return torch.from_numpy(track).nan_to_num_(0.0, 0.0, 0.0).clamp_(-LOUDEST, LOUDEST)

    def _flush(self) -> None:
        if self._resampler is not None:
            self._resample(None)
        self._resampler = None

    def _resample(self, frame: av.AudioFrame | None) -> None:
        try:
            blocks = [block.to_ndarray().reshape(-1) for block in self._resampler.resample(frame)]
        except (av.FFmpegError, ValueError):
            self._resampler = self._format = None
            return
        for block in blocks:
            self._keep(block)

    def _keep(self, block: np.ndarray) -> None:
        place = self._position
        self._position += len(block)
        if self.origin is not None:
            origin = round(self.origin * self.sampling_rate)
            if self._position <= origin or place > origin + self.wanted * self.sampling_rate:
                return
        self._blocks.append((place, block))
        self._held += len(block)
        while self._held > self._most + len(block):
            self._held -= len(self._blocks.popleft()[1])
