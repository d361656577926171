"""A media file into its decoded pictures and blocks of sound, whatever state the file is in (PyAV)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
    """The stream of pictures: the default one of several; a cover of a sound file is none.

    Raises:
        InputError: it cannot be decoded, or its pictures are too large.
    """
    cover = av.stream.Disposition.attached_pic
    streams = [s for s in container.streams.video if not s.disposition & cover]
    if not streams and len(container.streams.video):
        message = "its cover is left out, the clip is sound alone; give the cover as a picture of its own to show it"
        warnings.warn(f"{source}: {message}", stacklevel=2)
    stream = _chosen(streams, "video", source)
    if stream is not None and stream.codec_context.width * stream.codec_context.height > LARGEST_PICTURE:
        size = f"{stream.codec_context.width} x {stream.codec_context.height}"
        raise InputError(f"pictures of {size} pixels are larger than 8192 x 8192", source=source)
    if stream is not None:
        stream.codec_context.options = {"max_pixels": str(LARGEST_PICTURE)}
    return stream


def sound_stream(container: av.container.InputContainer, source: Path) -> av.AudioStream | None:
    """The sound track: the default one of several, or the first that can be decoded; None if there is no track.

    Raises:
        InputError: there are tracks, but none can be decoded.
    """
    return _chosen(list(container.streams.audio), "sound", source)


def _chosen(streams: list[Any], kind: str, source: Path) -> Any:
    """The default one of several streams that can be decoded, or the first; the others are named in a warning."""
    usable = [stream for stream in streams if stream.codec_context is not None]
    if streams and not usable:
        raise InputError(f"its {kind} is of a codec that cannot be decoded", source=source)
    default = [stream for stream in usable if stream.disposition & av.stream.Disposition.default]
    chosen = next(iter([*default, *usable]), None)
    if len(streams) > 1:
        others = ", ".join(_named(stream) for stream in streams if stream is not chosen)
        warnings.warn(
            f"{source}: has {len(streams)} {kind} tracks; {_named(chosen)} is read, not {others}", stacklevel=2
        )
    return chosen


def _named(stream: Any) -> str:
    """A stream as a warning names it, such as `stream 2 (deu, Commentary, aac)`."""
    codec = "unknown codec" if stream.codec_context is None else stream.codec_context.name
    about = [stream.language, stream.metadata.get("title"), codec]
    return f"stream {stream.index} ({', '.join(part for part in about if part and part != 'und')})"


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
    container: av.container.InputContainer,
    streams: list[Any],
    wanted: Callable[[av.stream.Stream], bool],
    source: Path,
) -> Iterator[Frame]:
    """Every frame that can be decoded: damaged packets are skipped, and a cut-off file ends the loop, with a warning.

    Args:
        container: the open file.
        streams: those to read.
        wanted: asked before a packet of a stream is decoded; the loop ends when no stream is wanted any more.
        source: the file, for the warning.
    """
    packets, skipped = container.demux(streams), Skipped()
    while any(wanted(stream) for stream in streams):
        try:
            packet = next(packets)
        except StopIteration:
            skipped.warn(source)
            return
        except av.FFmpegError:
            skipped.ended = True
            break
        if wanted(packet.stream):
            yield from _frames(container, packet.decode, skipped)
    for stream in streams:
        if wanted(stream):
            yield from _frames(container, stream.codec_context.decode, skipped)
    skipped.warn(source)


@dataclass
class Skipped:
    """Damage of a file: the parts that could not be decoded.

    Attributes:
        packets: skipped after the first that could be; before it, decoders refuse what lies before a key frame.
        ended: whether the file breaks off.
    """

    packets: int = 0
    ended: bool = False
    started: bool = False

    def warn(self, source: Path) -> None:
        """Say so, if it was anything."""
        told = [f"{self.packets} packets cannot be decoded and are left out"] if self.packets else []
        told += ["it breaks off"] if self.ended else []
        if told:
            warnings.warn(f"{source}: is damaged: {', and '.join(told)}", stacklevel=2)


def _frames(container: av.container.InputContainer, decode: Callable[[], list[Frame]], skipped: Skipped) -> list[Frame]:
    try:
        frames = decode()
    except av.EOFError:
        return []  # of a decoder that was flushed before
    except (av.FFmpegError, ValueError):
        skipped.packets += skipped.started
        return []
    skipped.started = skipped.started or bool(frames)
    for frame in frames:
        if frame.pts is not None and frame.time_base:
            frame.pts -= _turn(container, frame.pts, frame.time_base)
    return frames


def _turn(container: av.container.InputContainer, pts: int, time_base: Fraction) -> int:
    """The wrap of a time of an MPEG stream, which counts to 2^33 / 90,000 s: one just below that is negative."""
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
