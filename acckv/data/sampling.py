"""Sampled frames and one mono track out of decoded pictures and sound, in bounded memory."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

from acckv.data.decoding import RESTART, Clock
from acckv.errors import InputError
from acckv.models.clips import TEMPORAL_PATCH

LONGEST_LAST_PICTURE = 10.0
"""Seconds for which the stated length of the last picture is believed without sound that goes on as long."""
LATE_SOUND = 0.5
"""Seconds that sound may go on after the pictures before the last picture is held: codecs pad it by less."""
GAP = 0.1
"""Seconds between two blocks of sound from which on it counts as a gap (or an overlap)."""
LONGER = "raise it, give start and end, or set cut_long to take the beginning"
"""Remedy for a clip that is too long."""
LOUDEST = 8.0
"""Largest sample (full scale is 1). Damaged float sound may hold any number."""


class FrameSampler:
    """Picks the picture that is on screen at each multiple of 1 / fps seconds.

    Args:
        source: the file, for errors.
        fps: pictures a second.
        max_seconds: of pictures; more are an error.
        convert: makes a tensor of a picture.
        origin: presentation time of the first sample; None takes that of the first picture.
        length: seconds after which nothing more is wanted.
        step: seconds for which a picture is shown where neither it nor its neighbours say so.
    """

    def __init__(
        self,
        source: Path,
        fps: float,
        max_seconds: float,
        convert: Callable[[av.VideoFrame], Tensor],
        origin: float | None = None,
        length: float | None = None,
        step: float | None = None,
    ) -> None:
        self.source, self.fps, self.max_seconds, self.convert = source, fps, max_seconds, convert
        self.origin, self.length = origin, length
        self.first: float | None = None
        self.still = True
        self.done = False
        self._clock = Clock()
        self._time = 0.0
        self._usual = self._stated = step or 1 / fps
        self._shown: av.VideoFrame | None = None
        self._shown_pixels: Tensor | None = None
        self._picked: list[Tensor] = []

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
        self.still = self.still and self._shown_pixels is None
        self._shown, self._shown_pixels = frame, None

    def finish(self, sound_end: float = -math.inf) -> tuple[Tensor, float]:
        """Sampled frames uint8 [count, 3, height, width] and the seconds of video that they stand for.

        The last picture is shown to the end of the sound, as a player shows it. A clip of one picture (`still`) beside
        sound is one temporal patch, however long the sound is.

        Args:
            sound_end: presentation time at which the sound ends.

        Raises:
            InputError: no picture, or too many.
        """
        if self._shown is None or self.origin is None:
            where = "" if self.length is None else " between start and end"
            raise InputError(f"no picture could be decoded{where}", source=self.source)
        duration = self._end(sound_end) - self.origin
        if duration <= 0:
            message = f"{-duration + 1e-3:.2f} s after the last picture; nothing is there"
            raise InputError(message, source=self.source, field="start")
        if self.done or (self.length is not None and duration > self.length):
            duration = self.length
        self._check_length(duration)
        if self.still and sound_end > self.origin:
            duration = TEMPORAL_PATCH / self.fps
        count = TEMPORAL_PATCH * max(1, round(duration * self.fps / TEMPORAL_PATCH))
        while len(self._picked) < count:
            self._pick()
        return torch.stack(self._picked[:count]), duration

    def _end(self, sound_end: float) -> float:
        """Presentation time at which the last picture leaves the screen."""
        last = self._stated
        if last > LONGEST_LAST_PICTURE:
            last = max(min(last, sound_end - self._time), self._usual)
        end = self._time + last
        if sound_end <= end + LATE_SOUND:
            return end
        if not self.still and not self.done:
            seconds = sound_end - end
            message = f"the sound goes on for {seconds:.1f} s after the pictures; the last one is shown to its end"
            warnings.warn(f"{self.source}: {message}", stacklevel=2)
        return sound_end

    def _emit_until(self, time: float) -> None:
        tolerance = 1e-3
        if self.length is not None:
            time = min(time, self.origin + self.length)
        self._check_length(time - self.origin)
        while self._shown is not None and self.origin + len(self._picked) / self.fps < time - tolerance:
            self._pick()

    def _check_length(self, seconds: float) -> None:
        if seconds > self.max_seconds:
            message = f"is longer than max_seconds={self.max_seconds:g}; {LONGER}"
            raise InputError(message, source=self.source, field="max_seconds")

    def _pick(self) -> None:
        if self._shown_pixels is None:
            self._shown_pixels = self.convert(self._shown)
        self._picked.append(self._shown_pixels)


class SoundTrack:
    """Collects a sound track as mono float32 samples, each block at its presentation time.

    Args:
        source: the file, for warnings.
        sampling_rate: samples a second.
        max_seconds: of sound that is held.
        origin: presentation time of the first sample wanted; may be set later, and until then the latest is held.
        length: seconds after which nothing more is wanted.
    """

    def __init__(
        self,
        source: Path,
        sampling_rate: int,
        max_seconds: float,
        origin: float | None = None,
        length: float | None = None,
    ) -> None:
        self.source, self.sampling_rate, self.origin = source, sampling_rate, origin
        self.wanted = max_seconds if length is None else min(length, max_seconds)
        self.first: float | None = None
        self.end = 0.0
        self._most = round(max_seconds * sampling_rate)
        self._clock = Clock()
        self._resampler: av.AudioResampler | None = None
        self._format: tuple[object, ...] | None = None
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
            end = max((position + len(block) for position, block in self._blocks), default=origin)
            samples = max(min(end - origin, round(self.wanted * self.sampling_rate)), 0)
        track = np.zeros(samples, np.float32)
        for position, block in self._blocks:
            start = position - origin
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
        except (av.FFmpegError, ValueError) as error:
            self._resampler = self._format = None
            warnings.warn(
                f"{self.source}: a block of sound cannot be converted ({error}) and is left out", stacklevel=2
            )
            return
        for block in blocks:
            position, self._position = self._position, self._position + len(block)
            if self.origin is not None:
                origin = round(self.origin * self.sampling_rate)
                if self._position <= origin or position > origin + self.wanted * self.sampling_rate:
                    continue
            self._blocks.append((position, block))
            self._held += len(block)
            while self._held > self._most + len(block):
                self._held -= len(self._blocks.popleft()[1])
