"""Pixels and samples of a generated clip, and the .mp4 file that holds them."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from acckv.data.synthetic.events import PITCHES, TIMBRES, ClipScript
from acckv.io.files import whole_file

SIDE = 84
"""Width and height of a picture in pixels: 3x3 cells of 28."""
CELL = 28
FPS = 2
SAMPLING_RATE = 16_000
PITCH_HZ = {"low": 250.0, "mid": 600.0, "high": 1300.0, "ultra": 2600.0}
RGB = np.array([[0.9, 0.1, 0.1], [0.1, 0.8, 0.15], [0.15, 0.2, 0.95], [0.95, 0.9, 0.1], [0.65, 0.1, 0.75], [1, 1, 1]])


def render_frames(script: ClipScript, rng: np.random.Generator, blank: bool = False, noise: float = 1.0) -> np.ndarray:
    """Pictures of a clip, two a slot: uint8 [2 * slots, 84, 84, 3].

    Args:
        blank: noise without the shapes; noise: factor on its deviation.
    """
    grey = rng.uniform(0.3, 0.5, (script.slots, 1, 1, 1)) + rng.normal(0, 0.03, (script.slots, 1, 1, 3))
    pictures = np.broadcast_to(grey, (script.slots, SIDE, SIDE, 3)).astype(np.float32)
    for slot, (shape, colour) in script.shapes.items():
        size = 2 * CELL
        radius = size * rng.uniform(0.32, 0.42)
        centre = size / 2 - 0.5 + rng.uniform(-0.09, 0.09, 2) * size
        tint = np.clip(RGB[colour] + rng.normal(0, 0.05, 3), 0, 1)
        row, column = divmod(script.cells.get(slot, 0), 2)
        top, left = row * CELL, column * CELL
        if not blank:
            inside = _silhouette(shape, centre, radius, size)
            pictures[slot, top : top + size, left : left + size][inside] = tint
    frames = np.repeat(pictures, 2, axis=0)
    frames += 0.06 * noise * rng.standard_normal((2 * script.slots, SIDE, SIDE, 1), dtype=np.float32)
    return (np.clip(frames, 0, 1) * 255).astype(np.uint8)


def _silhouette(shape: int, centre: np.ndarray, radius: float, size: int) -> np.ndarray:
    """Pixels of a shape (index in SHAPES): bool [size, size]."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    dx, dy = x - centre[0], y - centre[1]
    distance = np.hypot(dx, dy)
    if shape == 0:
        return distance < radius
    if shape == 1:
        return (abs(dx) < 0.85 * radius) & (abs(dy) < 0.85 * radius)
    if shape == 2:
        return (dy < 0.8 * radius) & (dy > -radius) & (abs(dx) < (dy + radius) * 0.55)
    if shape == 3:
        upright = (abs(dx) < 0.3 * radius) & (abs(dy) < radius)
        return upright | ((abs(dy) < 0.3 * radius) & (abs(dx) < radius))
    if shape == 4:
        return (distance < radius) & (distance > 0.6 * radius)
    return (abs(dy) < 0.35 * radius) & (abs(dx) < radius)


def render_audio(script: ClipScript, rng: np.random.Generator, silent: bool = False, noise: float = 1.0) -> np.ndarray:
    """Sound of a clip, mono at 16 kHz: float32 [16000 * slots] within -1..1.

    Args:
        silent: digital silence; noise: factor on the deviation of the background.
    """
    loudness = noise * rng.uniform(0.003, 0.009, (script.slots, 1))
    track = loudness.astype(np.float32) * rng.standard_normal((script.slots, SAMPLING_RATE), dtype=np.float32)
    for slot, (timbre, pitch) in script.sounds.items():
        track[slot] += _tone(timbre, pitch, rng)
    return np.zeros(track.size, np.float32) if silent else np.clip(track.reshape(-1), -1, 1)


def _tone(timbre: int, pitch: int, rng: np.random.Generator) -> np.ndarray:
    """One second with one sound event that starts and ends inside it: float32 [16000]."""
    count = SAMPLING_RATE
    time = np.arange(count, dtype=np.float32) / SAMPLING_RATE
    hertz = PITCH_HZ[PITCHES[pitch]] * float(np.exp(rng.normal(0, 0.04)))
    length = rng.uniform(0.5, 0.9)
    start = rng.uniform(0.02, 0.98 - length)
    phase = rng.uniform(0, 2 * np.pi)
    name = TIMBRES[timbre]
    if name == "beep":
        wave = np.sin(2 * np.pi * hertz * time + phase)
    elif name == "buzz":
        wave = 0.7 * np.sign(np.sin(np.pi * hertz * time + phase)) + 0.5 * np.sin(2 * np.pi * hertz * time)
    elif name == "hiss":
        spectrum = np.fft.rfft(rng.standard_normal(count))
        spectrum *= np.exp(-0.5 * ((np.fft.rfftfreq(count, 1 / SAMPLING_RATE) - hertz) / (0.28 * hertz)) ** 2)
        wave = np.fft.irfft(spectrum, count)
        wave *= 0.7 / (wave.std() + 1e-9)
    elif name == "chirp":
        sweep = hertz * (0.7 + 0.75 * (time - start) / length)
        wave = np.sin(2 * np.pi * np.cumsum(sweep) / SAMPLING_RATE + phase)
    elif name == "siren":
        wobble = hertz * (1 + 0.28 * np.sin(2 * np.pi * 5 * time + phase))
        wave = np.sin(2 * np.pi * np.cumsum(wobble) / SAMPLING_RATE)
    else:
        gate = ((time * 8 + rng.uniform(0, 1)) % 1.0) < 0.3
        wave = 1.3 * np.sin(2 * np.pi * hertz * time + phase) * gate
    ramp = 0.01
    envelope = np.clip(np.minimum(time - start, start + length - time) / ramp, 0, 1)
    loudness = 0.3 * 10 ** (rng.uniform(-3, 3) / 20)
    return (wave * envelope * loudness).astype(np.float32)


def write_mp4(path: Path, frames: np.ndarray, audio: np.ndarray | None, fps: int = FPS) -> None:
    """Write H.264 video and, unless `audio` is None, AAC sound (16 kHz mono) to `path`, replacing it at once.

    Args:
        frames: uint8 [count, height, width, 3], even height and width.
        audio: float32 [samples] within -1..1.
        fps: frames a second.
    """
    with whole_file(path) as partial, av.open(str(partial), "w", format="mp4") as container:
        options = {"preset": "ultrafast", "crf": "20", "threads": "1"}
        video = container.add_stream("libx264", rate=fps, options=options)
        video.width, video.height, video.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        sound = None
        if audio is not None:
            sound = container.add_stream("aac", rate=SAMPLING_RATE, layout="mono", options={"aac_coder": "fast"})
            sound.bit_rate = 48_000
        for picture in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode(None))
        if sound is not None:
            block = av.AudioFrame.from_ndarray(audio[None].astype(np.float32), format="fltp", layout="mono")
            block.sample_rate, block.pts, block.time_base = SAMPLING_RATE, 0, Fraction(1, SAMPLING_RATE)
            container.mux(sound.encode(block))
            container.mux(sound.encode(None))
