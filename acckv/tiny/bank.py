"""Features of single slots, made by the real pipeline: rendered, written as .mp4, read back, run through the processor.

Both encoders of the tiny model look at one second at a time, so slots can be recombined into any number of training
clips without touching a file again.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from acckv.data.encoding import encode_context
from acckv.data.media import read_media
from acckv.data.synthetic.events import CELLS, COLOURS, PITCHES, SHAPES, TIMBRES, ClipScript
from acckv.data.synthetic.render import render_audio, render_frames, write_mp4
from acckv.io.files import whole_file
from acckv.tiny.build import build_processor

NOTHING = -1
BANK_SLOTS = 16
BANK_EVENTS = 10
CLIPS_A_PART = 20


@dataclass
class SlotBank:
    """Slots and what they show and sound like.

    Attributes:
        pixels: float16 [slots, patches, patch values].
        mel: float16 [slots, mel bins, mel frames].
        labels: int64 [slots, 5]: shape, colour, cell, timbre, pitch; `NOTHING` where there is none.
    """

    pixels: Tensor
    mel: Tensor
    labels: np.ndarray

    def __post_init__(self) -> None:
        shape, colour, _, timbre, pitch = self.labels.T
        looks, tones = np.ndindex(len(SHAPES), len(COLOURS)), np.ndindex(len(TIMBRES), len(PITCHES))
        self.pictures = {(s, c): np.flatnonzero((shape == s) & (colour == c)) for s, c in looks}
        self.sounds = {(t, p): np.flatnonzero((timbre == t) & (pitch == p)) for t, p in tones}
        self.no_picture = np.flatnonzero(shape == NOTHING)
        self.no_sound = np.flatnonzero(timbre == NOTHING)

    def clip_features(self, scripts: Sequence[ClipScript], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Random renderings of clips of equal length.

        Returns:
            pixels float32 [clips * slots * patches, patch values] and mel float32 [clips, bins, slots * frames].
        """
        slots = scripts[0].slots
        pictures = rng.choice(self.no_picture, (len(scripts), slots))
        sounds = rng.choice(self.no_sound, (len(scripts), slots))
        for row, script in enumerate(scripts):
            for slot, event in script.shapes.items():
                pictures[row, slot] = rng.choice(self.pictures[event])
            for slot, event in script.sounds.items():
                sounds[row, slot] = rng.choice(self.sounds[event])
        pixels = self.pixels[torch.from_numpy(pictures.reshape(-1))].float().flatten(0, 1)
        mel = self.mel[torch.from_numpy(sounds)].float()
        return pixels, mel.permute(0, 2, 1, 3).flatten(2)


def load_bank(folder: Path, clips: int, seed: int, workers: int = 2) -> SlotBank:
    """The bank of so many clips, 16 slots each, kept in `folder`; parts that are missing are rendered.

    Args:
        seed: of the renderings; parts of another seed are other files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = [folder / f"slots-{seed}-{index}.npz" for index in range(-(-clips // CLIPS_A_PART))]
    missing = [(path, seed, index) for index, path in enumerate(parts) if not path.is_file()]
    if missing:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            for _ in track(pool.map(_render_part, *zip(*missing, strict=True)), "rendering slots", len(missing)):
                pass
    loaded = [np.load(path) for path in parts]
    return SlotBank(
        torch.from_numpy(np.concatenate([part["pixels"] for part in loaded])),
        torch.from_numpy(np.concatenate([part["mel"] for part in loaded])),
        np.concatenate([part["labels"] for part in loaded]),
    )


def _render_part(path: Path, seed: int, index: int) -> None:
    torch.set_num_threads(1)
    rng = np.random.default_rng([seed, index])
    processor = build_processor()
    pixels, mel, labels = [], [], []
    with tempfile.TemporaryDirectory() as scratch:
        for _ in range(CLIPS_A_PART):
            script = _dense_script(rng)
            file = Path(scratch) / "clip.mp4"
            write_mp4(file, render_frames(script, rng), render_audio(script, rng))
            inputs = encode_context(processor, read_media(file))
            pixels.append(inputs["pixel_values_videos"].view(BANK_SLOTS, -1, inputs["pixel_values_videos"].shape[-1]))
            bins = inputs["input_features"].shape[1]
            mel.append(inputs["input_features"][0].view(bins, BANK_SLOTS, -1).permute(1, 0, 2))
            for slot in range(BANK_SLOTS):
                shape, sound = (events.get(slot, (NOTHING, NOTHING)) for events in (script.shapes, script.sounds))
                labels.append((*shape, script.cells.get(slot, NOTHING), *sound))
    features = {"pixels": torch.cat(pixels).half().numpy(), "mel": torch.cat(mel).half().numpy()}
    with whole_file(path) as partial:
        np.savez(partial, labels=np.array(labels), **features)


def _dense_script(rng: np.random.Generator) -> ClipScript:
    """A script with more events than a real clip, repeats allowed: it serves as material only."""
    shape_slots = rng.permutation(BANK_SLOTS)[:BANK_EVENTS].tolist()
    sound_slots = rng.permutation(BANK_SLOTS)[:BANK_EVENTS].tolist()
    return ClipScript(
        BANK_SLOTS,
        {s: (int(rng.integers(len(SHAPES))), int(rng.integers(len(COLOURS)))) for s in shape_slots},
        {s: (int(rng.integers(len(TIMBRES))), int(rng.integers(len(PITCHES)))) for s in sound_slots},
        {s: int(rng.integers(CELLS)) for s in shape_slots},
    )
