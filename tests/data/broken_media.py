"""Broken and odd media files, made the same way each time, and what the reader makes of them.

    python -m tests.data.broken_media [FOLDER]

prints a table (file, outcome, seconds, MB by which peak memory grew). Files are read in processes of their own with a
limit on time and on memory.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.data.media_files import GREYS, burst, write_picture, write_sound, write_video
from tests.paths import ROOT

SECONDS_PER_FILE = 20
MEGABYTES = 1024
"""Address space that one process may take for reading, beyond what it has after its imports."""
CODECS = {
    "mp4": ("libx264", "aac"),
    "mkv": ("libx264", "flac"),
    "webm": ("libvpx", "libopus"),
    "avi": ("mpeg4", "libmp3lame"),
    "mov": ("mpeg4", "pcm_s16le"),
    "ts": ("libx264", "aac"),
    "flv": ("flv", "libmp3lame"),
    "wmv": ("wmv2", "libmp3lame"),
}


@dataclass(frozen=True)
class Case:
    """One file and what the reader must say of it.

    Attributes:
        name: of the file.
        must: "clip", "error", or "either" where both are right.
        seconds: length of a right clip, None where any is right.
        shows: whether what could be read has to show the pictures of the whole file from its beginning.
        kind: of a right clip.
    """

    name: str
    must: str = "either"
    seconds: float | None = None
    shows: bool = False
    kind: str = "audio-video"


# ------------------------------------------------------------------ how files are made


def make(folder: Path) -> list[Case]:
    """Write all files into a folder. Whole ones have four greys, a second each, and a tone at 1.5 seconds."""
    times = [k / 10 for k in range(40)]
    greys = [GREYS[k // 10] for k in range(40)]
    cases, whole = [], {}

    def put(name: str, content: bytes, *case: Any, **more: Any) -> None:
        (folder / name).write_bytes(content)
        cases.append(Case(name, *case, **more))

    for suffix, codecs in CODECS.items():
        rate = {"flv": 44_100, "wmv": 44_100, "webm": 48_000}.get(suffix, 16_000)
        sound = burst(4, 1.5, rate)[None]
        file = write_video(folder / f"whole.{suffix}", times, greys, sound, rate, codecs=codecs, noise=8)
        whole[suffix] = file.read_bytes()
        cases.append(Case(file.name, "clip", 4.0, shows=True))
    file = write_video(
        folder / "front.mp4", times, greys, burst(4, 1.5)[None], options={"movflags": "faststart"}, noise=8
    )
    whole["front"] = file.read_bytes()
    cases.append(Case(file.name, "clip", 4.0, shows=True))
    file = write_video(folder / "whole.gif", times, greys, codecs=("gif", ""))
    whole["gif"] = file.read_bytes()
    cases.append(Case(file.name, "clip", 4.0, shows=True, kind="video"))
    for suffix, codec in {"wav": "pcm_s16le", "mp3": "libmp3lame", "ogg": "libopus", "flac": "flac"}.items():
        rate = 48_000 if suffix == "ogg" else 16_000
        file = write_sound(folder / f"whole.{suffix}", burst(4, 1.5, rate)[None], rate, codec)
        whole[suffix] = file.read_bytes()
        cases.append(Case(file.name, "clip", None, kind="audio"))
    for suffix in ("png", "jpg"):
        file = write_picture(folder / f"whole.{suffix}", 40)
        whole[suffix] = file.read_bytes()
        cases.append(Case(file.name, "clip", 1.0, kind="video"))

    for suffix, shares in {
        "mp4": (0.1, 0.5, 0.9, 0.98),
        "front": (0.1, 0.3, 0.5, 0.8, 0.99),
        "mkv": (0.02, 0.2, 0.5, 0.8, 0.99),
        "webm": (0.1, 0.6),
        "ts": (0.05, 0.35, 0.7),
        "avi": (0.1, 0.6),
        "flv": (0.4,),
        "wmv": (0.5,),
    }.items():
        for share in shares:
            content = whole[suffix][: int(len(whole[suffix]) * share)]
            put(f"cut-{round(100 * share):02d}.{'front.mp4' if suffix == 'front' else suffix}", content, shows=True)
    for suffix in ("wav", "mp3", "ogg", "flac"):
        put(f"cut-40.{suffix}", whole[suffix][: int(len(whole[suffix]) * 0.4)], kind="audio")
    for suffix in ("png", "jpg", "gif"):
        put(f"cut-60.{suffix}", whole[suffix][: int(len(whole[suffix]) * 0.6)], kind="video")

    for number, suffix in enumerate([*(["mp4", "front", "mkv", "ts"] * 3), "webm", "avi", "flv", "mov", "wmv"]):
        flips = (3, 30, 300)[number % 3]
        put(f"flips-{number}-{flips}.{suffix.replace('front', 'mp4')}", flipped(whole[suffix], number, flips))
    for number, suffix in enumerate(("png", "gif", "mp3", "wav", "ogg")):
        put(f"flips-{number}.{suffix}", flipped(whole[suffix], number, 10))

    noise = np.random.default_rng(0).bytes(20_000)
    put("empty.mp4", b"", "error")
    put("empty.wav", b"", "error")
    put("empty.png", b"", "error")
    put("one-byte.mkv", b"\x1a", "error")
    put("noise.mp4", noise, "error")
    put("zeros.mp4", bytes(20_000), "error")
    put("text.mp4", b"these are words\n" * 40, "error")
    put("text.txt", b"these are words\n" * 40, "error")
    put("archive.mp4", b"PK\x03\x04" + noise, "error")
    put("playlist.mp4", b"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\nwhole.ts\n#EXT-X-ENDLIST\n", "error")
    put("list.mp4", b"ffconcat version 1.0\nfile whole.ts\n" * 20, "error")
    put("film.txt", whole["mp4"], "clip", 4.0, shows=True)
    put("film.png", whole["mkv"], "clip", 4.0, shows=True)
    put("film.wav", whole["avi"], "clip", 4.0, shows=True)
    put("picture.mp4", whole["png"], "clip", 1.0, kind="video")
    put("sound.mp4", whole["wav"], "clip", None, kind="audio")
    put("frame%03d.png", whole["png"], "clip", 1.0, kind="video")
    put("http:film.mp4", whole["mp4"], "clip", 4.0, shows=True)
    put("junk-after.mp4", whole["front"] + noise, "clip", 4.0, shows=True)
    put("junk-before.ts", noise[:2000] + whole["ts"], "either")
    put("twice.ts", whole["ts"] * 2, "clip", 8.0)

    hours = 3 * 3600
    front = whole["front"]
    put("3-hours.mp4", header_says(front, b"mvhd", b"tkhd", b"mdhd", seconds=hours), "clip", 4.0, shows=True)
    put("3-hours-front-cut.mp4", header_says(front, b"mvhd", seconds=hours)[: len(front) // 2], "either", shows=True)
    put("3-hours-last-picture.mp4", last_picture_lasts(front, hours), "clip", 4.0, shows=True)
    put("3-hours-each-picture.mp4", each_picture_lasts(front, hours), "either")
    put("3-hours.wav", wav_says(whole["wav"], hours), "clip", None, kind="audio")
    put("3-hours.gif", slow_gif(whole["gif"]), "either", kind="video")
    put("wide.mp4", wide(front), "either")
    put("wide.png", wide_png(whole["png"]), "error")
    put("jump.mkv", jumping(folder, [0.0, 0.5, 1.0, 1.5, 20_000.0]), "error")
    put("many-entries.mp4", entries(front, b"stts", 2**31 - 1), "either")
    put("many-chunks.mp4", entries(front, b"stco", 2**31 - 1), "either")
    put("many-sizes.mp4", entries(front, b"stsz", 2**31 - 1, at=8), "either")
    put("no-times.264", elementary(folder, times, greys), "clip", 2.0, kind="video")
    return cases


def flipped(content: bytes, seed: int, count: int) -> bytes:
    """With so many bits turned over, never in the first 16 bytes."""
    rng = np.random.default_rng(seed)
    changed = bytearray(content)
    for place in rng.integers(16, len(content), count):
        changed[place] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def header_says(content: bytes, *boxes: bytes, seconds: int) -> bytes:
    """An mp4 whose movie, track and media headers state a duration."""
    changed = bytearray(content)
    for box in boxes:
        place = content.find(box)
        while place >= 0:
            scale_at, length_at = (place + 16, place + 20) if box != b"tkhd" else (None, place + 24)
            scale = struct.unpack_from(">I", content, scale_at)[0] if scale_at else 1000
            struct.pack_into(">I", changed, length_at, scale * seconds % 2**32)
            place = content.find(box, place + 4)
    return bytes(changed)


def last_picture_lasts(content: bytes, seconds: int) -> bytes:
    """An mp4 whose last picture is said to be shown for so long."""
    return _time_table(content, -1, seconds)


def each_picture_lasts(content: bytes, seconds: int) -> bytes:
    """An mp4 that says so of all pictures but the last."""
    return _time_table(content, 0, seconds)


def _time_table(content: bytes, entry: int, seconds: int) -> bytes:
    """The video track's stts holds one entry per run of equal durations; change the duration of one of them."""
    changed = bytearray(content)
    place = content.index(b"stts")
    scale = struct.unpack_from(">I", content, content.index(b"mdhd") + 16)[0]
    count = struct.unpack_from(">I", content, place + 8)[0]
    struct.pack_into(">I", changed, place + 12 + 8 * (entry % count) + 4, scale * seconds)
    return bytes(changed)


def wav_says(content: bytes, seconds: int) -> bytes:
    place = content.index(b"data")
    return content[: place + 4] + struct.pack("<I", seconds * 32_000) + content[place + 8 :]


def slow_gif(content: bytes) -> bytes:
    """Every picture is shown for 655 seconds."""
    changed, place = bytearray(content), content.find(b"\x21\xf9\x04")
    while place >= 0:
        changed[place + 4 : place + 6] = b"\xff\xff"
        place = content.find(b"\x21\xf9\x04", place + 1)
    return bytes(changed)


def wide(content: bytes) -> bytes:
    """The sample description says 65,535 x 65,535 pixels."""
    place = content.index(b"avc1", content.index(b"stsd"))
    return content[: place + 28] + b"\xff\xff\xff\xff" + content[place + 32 :]


def wide_png(content: bytes) -> bytes:
    """60,000 x 60,000 pixels, with a right checksum."""
    head = b"IHDR" + struct.pack(">II", 60_000, 60_000) + content[24:29]
    return content[:12] + head + struct.pack(">I", zlib.crc32(head)) + content[33:]


def entries(content: bytes, box: bytes, count: int, at: int = 4) -> bytes:
    """A table of an mp4 that claims so many entries."""
    place = content.index(box) + 4 + at
    return content[:place] + struct.pack(">I", count) + content[place + 4 :]


def jumping(folder: Path, times: list[float]) -> bytes:
    file = write_video(folder / "scratch.mkv", times, [100] * len(times), burst(2, 0.5)[None])
    content = file.read_bytes()
    file.unlink()
    return content


def elementary(folder: Path, times: list[float], greys: list[int]) -> bytes:
    """A raw H.264 stream, which holds no times at all."""
    file = write_video(folder / "scratch.h264", times, greys)
    content = file.read_bytes()
    file.unlink()
    return content


# ------------------------------------------------------------------ how they are read


@dataclass(frozen=True)
class Outcome:
    """What became of one file: `clip` describes it, or `error` does; `died` says how the process ended."""

    name: str
    seconds: float
    megabytes: float
    clip: dict[str, Any] | None = None
    error: str | None = None
    died: str | None = None

    @property
    def text(self) -> str:
        if self.clip is None:
            return self.error or f"DIED: {self.died}"
        frames, sound = self.clip["frames"], self.clip["samples"]
        return f"{len(frames)} frames, {'no' if sound is None else f'{sound / 16_000:.2f} s of'} sound"


def read_all(folder: Path, names: list[str]) -> list[Outcome]:
    """Each file in turn, in as few processes as possible: a process that a file ends is followed by another."""
    outcomes: list[Outcome] = []
    while len(outcomes) < len(names):
        waiting = names[len(outcomes) :]
        command = [sys.executable, "-m", "tests.data.broken_media", "--read", str(folder), *waiting]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            timeout=60 + SECONDS_PER_FILE * len(waiting),
        )
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        outcomes += [Outcome(**line) for line in lines]
        if len(lines) < len(waiting):
            died = "hung" if done.returncode == -signal.SIGALRM else f"exit {done.returncode}: {done.stderr[-300:]}"
            outcomes.append(Outcome(waiting[len(lines)], float(SECONDS_PER_FILE), 0.0, died=died))
    return outcomes


def _read_here(folder: Path, names: list[str]) -> None:
    from acckv.data.media import read_media
    from acckv.errors import InputError

    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEGABYTES * 2**20,) * 2)
    for name in names:
        signal.alarm(SECONDS_PER_FILE)
        start, peak = time.perf_counter(), _peak()
        found: dict[str, Any] = {}
        try:
            clip = read_media(folder / name)
            found["clip"] = {
                "kind": clip.kind,
                "frames": [] if clip.frames is None else clip.frames.float().mean((1, 2, 3)).tolist(),
                "shape": None if clip.frames is None else list(clip.frames.shape),
                "samples": None if clip.audio is None else len(clip.audio),
                "onset": None if clip.audio is None else _onset(clip.audio),
                "finite": clip.audio is None or bool(clip.audio.isfinite().all()),
            }
        except InputError as error:
            found["error"] = str(error)
        seconds = time.perf_counter() - start
        print(json.dumps({"name": name, "seconds": seconds, "megabytes": _peak() - peak, **found}), flush=True)


def _onset(audio: Any) -> float | None:
    loud = (audio.abs() > 0.1).nonzero()
    return float(loud[0]) / 16_000 if len(loud) else None


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--read"]:
        return _read_here(Path(arguments[1]), arguments[2:])
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(arguments[0]) if arguments else Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        cases = make(folder)
        outcomes = read_all(folder, [case.name for case in cases])
    print(f"{'file':<28} {'seconds':>7} {'MB':>5}  outcome")
    for outcome in outcomes:
        text = outcome.text.replace(f"{folder}/", "")
        print(f"{outcome.name:<28} {outcome.seconds:>7.2f} {outcome.megabytes:>5.0f}  {text}")
    print(f"{len(outcomes)} files, {sum(outcome.died is not None for outcome in outcomes)} ended the process")


if __name__ == "__main__":
    main(sys.argv[1:])
