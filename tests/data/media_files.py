"""Media files written with PyAV, so that every number that a reader should find is known."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from torch import Tensor

from acckv.models.clips import Media
from tests.support import not_none

GREYS = (40, 90, 140, 190)
#: Times and greys of four seconds at 30 pictures a second; the grey changes each second.
STEADY = ([k / 30 for k in range(120)], [GREYS[k // 30] for k in range(120)])
#: The FFmpeg of earlier wheels ends the process at a whole FLV file, and loses when Matroska pictures start.
EARLIER_FFMPEG = int(av.__version__.split(".")[0]) < 18
OPTIONS = {
    "libx264": {"preset": "ultrafast", "crf": "10", "threads": "1", "g": "15"},
    "libvpx": {"deadline": "realtime"},
}


def write_video(
    path: Path,
    times: list[float],
    greys: Sequence[int],
    audio: np.ndarray | None = None,
    rate: int = 16_000,
    layout: str = "mono",
    audio_start: float = 0.0,
    size: tuple[int, int] = (48, 32),
    options: dict[str, str] | None = None,
    codecs: tuple[str, str] = ("libx264", "aac"),
    noise: int = 0,
) -> Path:
    """Grey pictures shown from `times` on (seconds), and sound [channels, samples] that starts at `audio_start`.

    Sound alone where there are no times. Noise makes the pictures differ, and the file longer.
    """
    rng = np.random.default_rng(0)
    video: Any = None
    with av.open(str(path), "w", options=options or {}) as container:
        if times:
            video = container.add_stream(codecs[0], rate=30, options=OPTIONS.get(codecs[0], {}))
            video.width, video.height = size
            video.pix_fmt = {"gif": "rgb8", "png": "rgb24", "mjpeg": "yuvj420p"}.get(codecs[0], "yuv420p")
            video.codec_context.time_base = Fraction(1, 1000)
            if codecs[0] != "libx264":
                video.bit_rate = 2_000_000
        if audio is not None:
            sound: Any = container.add_stream(codecs[1], rate=rate, layout=layout)
        for time, grey in zip(times, greys, strict=True):
            pixels = grey + rng.integers(-noise, noise + 1, (size[1], size[0], 3))
            frame = av.VideoFrame.from_ndarray(pixels.astype(np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(time * 1000), Fraction(1, 1000)
            container.mux(video.encode(frame))
        if video is not None:
            container.mux(video.encode(None))
        if audio is not None:
            block = av.AudioFrame.from_ndarray(audio.astype(np.float32), format="fltp", layout=layout)
            block.sample_rate, block.pts, block.time_base = rate, round(audio_start * rate), Fraction(1, rate)
            resampler = av.AudioResampler(
                sound.codec_context.format, layout, rate, sound.codec_context.frame_size or 1024
            )
            for part in [*resampler.resample(block), *resampler.resample(None)]:
                container.mux(sound.encode(part))
            container.mux(sound.encode(None))
    return path


def write_tracks(
    path: Path,
    pictures: list[np.ndarray],
    sounds: list[np.ndarray],
    default: tuple[int, int] | None = None,
    more_pictures: tuple[np.ndarray, ...] = (),
    aspect: Fraction | None = None,
) -> Path:
    """Tracks side by side: pictures [height, width, 3], two a second, in one or two tracks, and sounds [samples].

    Args:
        default: the default ones of the video and of the sound tracks; None leaves it to the format.
        aspect: width of a pixel by its height.
    """
    with av.open(str(path), "w") as container:
        videos = []
        for shown in filter(len, (pictures, list(more_pictures))):
            video = container.add_stream("libx264", rate=2, options=OPTIONS["libx264"])
            video.height, video.width = shown[0].shape[:2]
            video.pix_fmt = "yuv420p"
            if aspect is not None:
                video.codec_context.sample_aspect_ratio = aspect
            videos.append((video, shown))
        tracks = [(container.add_stream("aac", rate=16_000, layout="mono"), sound) for sound in sounds]
        streams: tuple[list[Any], list[Any]] = [video for video, _ in videos], [track for track, _ in tracks]
        for group, chosen in zip(streams, default or (), strict=False):
            for number, stream in enumerate(group):
                stream.disposition = av.stream.Disposition.default.value if number == chosen else 0
        for video, shown in videos:
            for picture in shown:
                container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(video.encode(None))
        for stream, sound in tracks:
            mux_sound(container, stream, sound)
    return path


def mux_sound(container: Any, stream: Any, sound: np.ndarray) -> None:
    """Sound [samples] at 16 kHz, in blocks of 1024."""
    for start in range(0, len(sound), 1024):
        block = np.ascontiguousarray(sound[None, start : start + 1024], dtype=np.float32)
        frame = av.AudioFrame.from_ndarray(block, format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 16_000, start, Fraction(1, 16_000)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def turned(path: Path, matrix: tuple[float, float, float, float], width: int) -> Path:
    """An mp4 of pictures alone whose display matrix sends (x, y) to (ax + cy, bx + dy), for a, b, c, d."""
    a, b, c, d = (round(value * 0x10000) for value in matrix)
    upright = struct.pack(">9i", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
    content = path.read_bytes()
    place = content.index(upright, content.index(b"tkhd"))
    other = struct.pack(">9i", a, b, 0, c, d, 0, width << 16, 0, 0x40000000)
    path.write_bytes(content[:place] + other + content[place + 36 :])
    return path


def write_sound(path: Path, audio: np.ndarray, rate: int = 16_000, codec: str = "pcm_s16le") -> Path:
    """Sound [channels, samples] alone, mono or stereo."""
    layout = "mono" if len(audio) == 1 else "stereo"
    return write_video(path, [], [], audio, rate, layout, codecs=("", codec))


def write_picture(path: Path, grey: int, size: tuple[int, int] = (48, 32)) -> Path:
    """One grey picture: PNG or JPEG, whatever the file is called."""
    codec = "mjpeg" if path.suffix in (".jpg", ".jpeg") else "png"
    context: Any = av.CodecContext.create(codec, "w")
    context.width, context.height, context.time_base = *size, Fraction(1, 25)
    context.pix_fmt = "yuvj420p" if codec == "mjpeg" else "rgb24"
    frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), grey, np.uint8), format="rgb24")
    packets = [*context.encode(frame.reformat(format=context.pix_fmt)), *context.encode(None)]
    path.write_bytes(b"".join(bytes(packet) for packet in packets))
    return path


def burst(seconds: float, at: float, rate: int = 16_000, hertz: float = 1000.0) -> np.ndarray:
    """A tone of 0.25 s that starts at `at`, silence around it: float32 [samples]."""
    time = np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * hertz * time) * ((time >= at) & (time < at + 0.25))).astype(np.float32)


def frames_of(media: Media) -> Tensor:
    return not_none(media.frames)


def sound_of(media: Media) -> Tensor:
    return not_none(media.audio)


def onset(sound: Media | Tensor) -> float:
    """Seconds to the first sample above a tenth of full scale, at 16 kHz."""
    audio = sound if isinstance(sound, Tensor) else sound_of(sound)
    return int((audio.abs() > 0.1).nonzero()[0]) / 16_000


def greys_of(media: Media) -> list[float]:
    """The mean grey of each frame."""
    return frames_of(media).float().mean((1, 2, 3)).tolist()
