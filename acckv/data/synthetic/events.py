"""The script of a generated clip, its events slot by slot, and the questions that can be asked about it.

A clip is a row of slots of one second. A slot holds a coloured shape or nothing, and a sound (a timbre at a pitch) or
silence. Within one clip no shape and no timbre appears twice, so every question has one answer.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field

import numpy as np

from acckv.errors import InputError

COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
SHAPES = ("circle", "square", "triangle", "cross", "ring", "bar")
TIMBRES = ("beep", "buzz", "hiss", "chirp", "siren", "knock")
PITCHES = ("low", "mid", "high", "ultra")
CELLS = 4
"""Places of an object: it spans 2x2 of the 3x3 cells of a picture."""

SPLITS = ("train", "validation", "test")
TEMPLATES = {
    ("Visual", "Colour"): "What colour was the <Shape>?",
    ("Visual", "After"): "Which shape came after the <Shape>?",
    ("Audio", "Pitch"): "What pitch was the <Sound>?",
    ("Audio", "After"): "Which sound came after the <Sound>?",
    ("Audio-Visual", "Shape during sound"): "Which shape was shown during the <Sound>?",
    ("Audio-Visual", "Sound during shape"): "Which sound played during the <Shape>?",
    ("Audio-Visual", "Pitch during shape"): "What pitch played during the <Shape>?",
    ("Audio-Visual", "Colour during sound"): "What colour was shown during the <Sound>?",
    ("Visual", "Description"): "List the shapes in order.",
    ("Audio", "Description"): "List the sounds in order.",
    ("Audio-Visual", "Description"): "Describe the clip.",
}
DESCRIPTION_TYPES = tuple(kind for kind in TEMPLATES if kind[1] == "Description")
SINGLE_TYPES = tuple(kind for kind in TEMPLATES if kind not in DESCRIPTION_TYPES)


@dataclass(frozen=True)
class Question:
    """One question in the parts of a MUSIC-AVQA record: `template` holds `<..>` where `values` go."""

    type: tuple[str, str]
    template: str
    values: tuple[str, ...]
    answer: str

    @property
    def text(self) -> str:
        """The template with its values filled in."""
        filled = self.template
        for value in self.values:
            start, end = filled.index("<"), filled.index(">")
            filled = filled[:start] + value + filled[end + 1 :]
        return filled


@dataclass(frozen=True)
class ClipScript:
    """The events of one clip.

    Attributes:
        slots: length in seconds.
        shapes: slot -> (index in SHAPES, index in COLOURS).
        sounds: slot -> (index in TIMBRES, index in PITCHES).
        cells: slot of a shape -> its quarter of the picture, 0..3 (upper left, upper right, lower left, lower right).
    """

    slots: int
    shapes: dict[int, tuple[int, int]]
    sounds: dict[int, tuple[int, int]]
    cells: dict[int, int] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """sha256 over which events happen when; not over quarters or renderings."""
        events = [self.slots, sorted(self.shapes.items()), sorted(self.sounds.items())]
        return hashlib.sha256(json.dumps(events).encode()).hexdigest()

    @property
    def split(self) -> str:
        """The only split that this script may appear in: a tenth of all scripts each for validation and test."""
        tenth = int(self.digest[:8], 16) % 10
        return {0: "test", 1: "validation"}.get(tenth, "train")

    def shape(self, slot: int) -> str:
        return SHAPES[self.shapes[slot][0]]

    def colour(self, slot: int) -> str:
        return COLOURS[self.shapes[slot][1]]

    def timbre(self, slot: int) -> str:
        return TIMBRES[self.sounds[slot][0]]

    def pitch(self, slot: int) -> str:
        return PITCHES[self.sounds[slot][1]]


def draw_script(
    rng: np.random.Generator, split: str, slots: int = 16, both: int = 3, video_only: int = 2, audio_only: int = 2
) -> ClipScript:
    """Draw a script that belongs to `split` (see `ClipScript.split`: no script belongs to two splits).

    Args:
        rng: equal generators give equal scripts.
        slots: seconds of the clip; both: slots with a shape and a sound; video_only, audio_only: with one of them.

    Raises:
        InputError: an unknown split, or more events than slots, shapes or timbres.
    """
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}, expected one of {', '.join(SPLITS)}", field="split")
    events = both + video_only + audio_only
    if min(both, video_only, audio_only) < 0 or events > slots:
        raise InputError(f"{events} events do not fit into {slots} slots", field="slots")
    if both + video_only > len(SHAPES) or both + audio_only > len(TIMBRES):
        raise InputError(f"a clip has at most {len(SHAPES)} shapes and {len(TIMBRES)} sounds", field="both")
    while True:
        order = rng.permutation(slots)[:events].tolist()
        shape_slots = sorted(order[: both + video_only])
        sound_slots = sorted(order[:both] + order[both + video_only :])
        shapes = rng.permutation(len(SHAPES))[: len(shape_slots)].tolist()
        colours = rng.integers(0, len(COLOURS), len(shape_slots)).tolist()
        timbres = rng.permutation(len(TIMBRES))[: len(sound_slots)].tolist()
        pitches = rng.integers(0, len(PITCHES), len(sound_slots)).tolist()
        cells = rng.integers(0, CELLS, len(shape_slots)).tolist()
        script = ClipScript(
            slots=slots,
            shapes=dict(zip(shape_slots, zip(shapes, colours, strict=True), strict=True)),
            sounds=dict(zip(sound_slots, zip(timbres, pitches, strict=True), strict=True)),
            cells=dict(zip(shape_slots, cells, strict=True)),
        )
        if script.split == split:
            return script


def ask(script: ClipScript, kind: tuple[str, str], rng: np.random.Generator) -> Question | None:
    """Ask one question of type `kind` about a clip, None when the clip has no event to ask about.

    Raises:
        KeyError: `kind` is in neither SINGLE_TYPES nor DESCRIPTION_TYPES.
    """
    template, (medium, name) = TEMPLATES[kind], kind
    if kind in DESCRIPTION_TYPES:
        return Question(kind, template, (), _describe(script, medium))
    if medium == "Audio-Visual":
        slots = sorted(script.shapes.keys() & script.sounds.keys())
    else:
        slots = sorted(script.shapes if medium == "Visual" else script.sounds)
    count = len(slots) - (name == "After")  # the last has none after it
    if count < 1:
        return None
    index = int(rng.integers(0, count))
    subject = script.shape if "<Shape>" in template else script.timbre
    if name == "After":
        answer = subject(slots[index + 1])
    else:
        words = {"Colour": script.colour, "Pitch": script.pitch, "Shape": script.shape, "Sound": script.timbre}
        answer = words[name.split()[0]](slots[index])
    return Question(kind, template, (subject(slots[index]),), answer)


def _describe(script: ClipScript, medium: str) -> str:
    seen = {slot: f"{script.colour(slot)} {script.shape(slot)}" for slot in sorted(script.shapes)}
    heard = {slot: f"{script.pitch(slot)} {script.timbre(slot)}" for slot in sorted(script.sounds)}
    if medium == "Visual":
        return " ".join(seen.values())
    if medium == "Audio":
        return " ".join(heard.values())
    moments = sorted(seen.keys() | heard.keys())
    return " ".join(f"{seen.get(slot, 'none')} {heard.get(slot, 'silent')} ;" for slot in moments)
