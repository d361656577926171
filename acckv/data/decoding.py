"""A media file into its decoded pictures and blocks of sound, whatever state the file is in (PyAV)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

from acckv.errors import InputError

LARGEST_PICTURE = 2**26
"""Pixels of the largest picture that is decoded: 8192 x 8192. A damaged header may claim any size."""
RESTART = 1.0
"""Seconds by which presentation times go back where a recording begins anew in the same file."""
UNWANTED = {"tty", "bin", "xbin", "adf", "idf", "sbg", "lrc", "hls", "concat", "rawvideo", "data"}
"""Formats that FFmpeg makes of text, of play lists, and of anything with the right extension."""

MPEG = {"mpegts", "mpeg"}
"""Formats whose clock has 33 bits."""

Frame = av.VideoFrame | av.AudioFrame


def open_media(path: Path) -> av.container.InputContainer:
    """The opened file. Only this file is read, whatever it refers to.

    Raises:
        InputError: no such file, or not a media file.
    """
    if not path.is_file():
        raise InputError("no such file", source=path)
    options = {"protocol_whitelist": "file", "pattern_type": "none"}
    try:
        container = av.open(f"file:{path}", options=options, metadata_errors="replace")
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = "it is empty" if path.stat().st_size == 0 else str(getattr(error, "strerror", None) or error)
        raise InputError(f"not a readable media file ({reason})", source=path) from error
    if container.format.name in UNWANTED:
        container.close()
        raise InputError(f"not a readable media file ({container.format.name})", source=path)
    return container


def picture_stream(container: av.container.InputContainer, source: Path) -> av.VideoStream | None:
    """The first stream of pictures; a cover of a sound file is none.

    Raises:
        InputError: it cannot be decoded, or its pictures are too large.
    """
    streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    stream = _decodable(streams, "pictures", source)
    if stream is not None and stream.codec_context.width * stream.codec_context.height > LARGEST_PICTURE:
        size = f"{stream.codec_context.width} x {stream.codec_context.height}"
        raise InputError(f"pictures of {size} pixels are larger than 8192 x 8192", source=source)
    if stream is not None:
        stream.codec_context.options = {"max_pixels": str(LARGEST_PICTURE)}
    return stream


def sound_stream(container: av.container.InputContainer, source: Path) -> av.AudioStream | None:
    """The first sound track that can be decoded; None if there is no track.

    Raises:
        InputError: there are tracks, but none can be decoded.
    """
    return _decodable(list(container.streams.audio), "sound", source)


def _decodable(streams: list, kind: str, source: Path) -> Any:
    for stream in streams:
        if stream.codec_context is not None:
            return stream
    if streams:
        raise InputError(f"its {kind} are of a codec that cannot be decoded", source=source)
    return None


def first_time(stream: av.VideoStream | av.AudioStream) -> float:
    """Presentation time in seconds at which a stream says that it starts."""
    if not stream.start_time or not stream.time_base:
        return 0.0
    return float((stream.start_time - _turn(stream.container, stream.start_time, stream.time_base)) * stream.time_base)


def seek_to(container: av.container.InputContainer, stream: av.VideoStream | av.AudioStream, time: float) -> bool:
    """Go on from the last key frame before a presentation time in seconds; False if the file does not allow it."""
    try:
        container.seek(math.floor(time / stream.time_base), stream=stream)
    except (av.FFmpegError, OverflowError, TypeError):
        return False
    return True


def decoded(
    container: av.container.InputContainer, streams: list, wanted: Callable[[av.stream.Stream], bool]
) -> Iterator[Frame]:
    """Every frame that can be decoded: damaged packets are skipped, and a cut-off file ends the loop.

    Args:
        container: the open file.
        streams: those to read.
        wanted: asked before a packet of a stream is decoded; the loop ends when no stream is wanted any more.
    """
    packets = container.demux(streams)
    while any(wanted(stream) for stream in streams):
        try:
            packet = next(packets)
        except StopIteration:
            return
        except av.FFmpegError:
            break
        if wanted(packet.stream):
            yield from _frames(container, packet.decode)
    for stream in streams:
        if wanted(stream):
            yield from _frames(container, stream.codec_context.decode)


def _frames(container: av.container.InputContainer, decode: Callable[[], list[Frame]]) -> list[Frame]:
    try:
        frames = decode()
    except (av.FFmpegError, ValueError):
        return []
    for frame in frames:
        if frame.pts is not None and frame.time_base:
            frame.pts -= _turn(container, frame.pts, frame.time_base)
    return frames


def _turn(container: av.container.InputContainer, pts: int, time_base: Fraction) -> int:
    """What to take from a time of an MPEG stream, which counts to 2^33 / 90,000 s: one just below that is negative."""
    whole = Fraction(2**33, 90_000)
    return round(whole / time_base) if container.format.name in MPEG and pts * time_base > whole / 2 else 0


class Clock:
    """Presentation times of a stream that never go back by much: a recording that begins anew follows the one before.

    A frame without a time follows the one before it.
    """

    def __init__(self) -> None:
        self.next = 0.0
        self._last: float | None = None
        self._shift = 0.0

    def __call__(self, time: float | None) -> float:
        if time is None:
            now = self.next
        else:
            now = time + self._shift
            if self._last is not None and now < self._last - RESTART:
                self._shift += self.next - now
                now = self.next
        self._last = now if self._last is None else max(now, self._last)
        return now
