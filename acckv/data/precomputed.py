"""Clips as embeddings, for a decoder whose towers are not in transformers (VideoLLaMA2, AVicuna).

A folder holds

    clips/<id>.safetensors   inputs_embeds [tokens, width] and modality_ids [tokens]: 0 text, 1 video, 2 audio
    questions.jsonl          a line a question: {"clip": "<id>", "question": "...", "answer": "...",
                             "groups": ["Audio"], "split": "train"}, the last two optional

A clip is a prompt up to the end of its media, as it enters the decoder. A question is the text after it, up to the
start of the answer, with the decoder's own turn markers; it is tokenised as it stands.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from acckv.data.media import read_record_media
from acckv.data.records import Record
from acckv.data.video_folder import hold_out
from acckv.errors import InputError
from acckv.io.fields import Fields, read_objects
from acckv.io.files import whole_file
from acckv.method.modality import Modality
from acckv.models.clips import Media, PrecomputedClip
from acckv.models.plain_decoder import EMBEDS, MODALITY_IDS

CLIPS, QUESTIONS = "clips", "questions.jsonl"
SUFFIX = ".safetensors"


def read_clip(record: Record, read_media: Callable[[Record], Media] = read_record_media) -> Media | PrecomputedClip:
    """The clip that a question is about: a file of embeddings, or its media.

    Args:
        read_media: reads media, such as :meth:`acckv.data.media_cache.MediaCache.read_record_media`.

    Raises:
        InputError: it cannot be read, or is malformed.
    """
    return read_precomputed_clip(record.video) if record.video.suffix == SUFFIX else read_media(record)


def write_precomputed_clip(folder: str | Path, clip: str, inputs_embeds: Tensor, modality_ids: Tensor) -> Path:
    """Write one clip into a folder of precomputed clips; an older one of that name is replaced as a whole.

    Args:
        clip: its id, which becomes the name of the file.
        inputs_embeds: floating ``[tokens, width]``, the prompt up to the end of the media.
        modality_ids: integers ``[tokens]``: 0 text, 1 video, 2 audio.

    Raises:
        InputError: an id that is no plain file name, or tensors of other shapes or values.
    """
    if not clip or clip.startswith(".") or any(letter in clip for letter in "/\\\0"):
        raise InputError(f"{clip!r} is no plain file name", field="clip")
    path = Path(folder) / CLIPS / (clip + SUFFIX)
    checked = _checked({EMBEDS: inputs_embeds, MODALITY_IDS: modality_ids}, path)
    tensors = {EMBEDS: checked.embeds, MODALITY_IDS: checked.modality_ids}
    with whole_file(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
    return path


def read_precomputed_clip(path: str | Path) -> PrecomputedClip:
    """Read what :func:`write_precomputed_clip` wrote.

    Raises:
        InputError: no such file, a file that is cut off, or tensors that are missing or malformed.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError("no such file", source=path)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"is cut off or no safetensors file: {error}", source=path) from error
    return _checked(tensors, path)


def load_precomputed(folder: str | Path, split: str, held_out: float | None = None) -> list[Record]:
    """The questions of one split, in the order of the file.

    An answer of one word is scored as one, a longer one word by word.

    Args:
        split: 'train', 'validation' or 'test', as the lines have it. Where no line names a split, it is all of them.
        held_out: where no line names a split, the share of the clips that is for validation, the others for training.

    Raises:
        InputError: naming file, line and field, for a missing or malformed file, a clip that is not there, lines of
            which some name a split and others none, or a split without a question.
    """
    folder = Path(folder)
    file = folder / QUESTIONS
    objects = list(read_objects(file))
    if not objects:
        raise InputError("holds no question", source=file)
    records = [_record(folder, number, fields) for number, fields in enumerate(objects, start=1)]
    splits = [None if fields.values.get("split") is None else fields.string("split") for fields in objects]
    if None not in splits:
        chosen = [record for record, name in zip(records, splits, strict=True) if name == split]
        if not chosen:
            found = ", ".join(sorted({str(name) for name in splits}))
            raise InputError(f"holds no question of the split {split!r}, only of {found}", source=file, field="split")
        return chosen
    if any(name is not None for name in splits):
        raise objects[splits.index(None)].error("split", "is missing, and other lines have it")
    if held_out is None:
        return records
    clips = sorted({record.video for record in records})
    if len(clips) < 2:
        raise InputError("asks about one clip, of which none can be held out; give each line a split", source=file)
    sides = hold_out(folder, clips, held_out, f"give each line of {QUESTIONS} a split")
    parts = dict(zip(("train", "validation"), sides, strict=True))
    return [record for record in records if record.video in parts[split]]


def _record(folder: Path, number: int, fields: Fields) -> Record:
    name, answer = fields.string("clip"), fields.string("answer")
    clip = folder / CLIPS / (name + SUFFIX)
    if not clip.is_file():
        raise fields.error("clip", f"no such clip {clip}")
    groups = tuple(fields.strings("groups", default=()))
    protocol: Literal["word", "description"] = "word" if len(answer.split()) == 1 else "description"
    return Record(f"{name}#{number}", clip, None, fields.string("question"), None, answer, groups, protocol)


def _checked(tensors: dict[str, Tensor], path: Path) -> PrecomputedClip:
    def error(field: str, message: str) -> InputError:
        return InputError(message, source=path, field=field)

    for name in (EMBEDS, MODALITY_IDS):
        if name not in tensors:
            raise error(name, "is missing")
    embeds, kinds = tensors[EMBEDS], tensors[MODALITY_IDS]
    if embeds.ndim != 2 or not embeds.is_floating_point() or embeds.shape[1] == 0:
        raise error(EMBEDS, f"needs floats of shape [tokens, width], not {embeds.dtype} {list(embeds.shape)}")
    if kinds.shape != embeds.shape[:1] or kinds.is_floating_point() or kinds.dtype == torch.bool:
        raise error(MODALITY_IDS, f"needs integers of shape [{len(embeds)}], not {kinds.dtype} {list(kinds.shape)}")
    if not bool(torch.isfinite(embeds).all()):
        raise error(EMBEDS, "holds values that are not finite")
    if bool((kinds < 0).any() or (kinds > Modality.AUDIO).any()):
        raise error(MODALITY_IDS, "holds other values than 0 text, 1 video, 2 audio")
    if not bool((kinds != Modality.TEXT).any()):
        raise error(MODALITY_IDS, "has neither video nor audio")
    return PrecomputedClip(embeds, kinds.long(), path)
