"""Every decoder of transformers, tiny: compressed and right, or refused in one line, and nothing else.

Right means: at ratio 1 equal to the plain model, at ratio 0.3 equal to an eager copy of it whose later tokens do not
see what was evicted. Neither layer map nor hook of the package is used for that: what is gone is read off the keys that
the compressed cache still holds, and a mask a layer and head is handed to the copy's own attention modules.
"""

from __future__ import annotations

import copy
import multiprocessing
import resource
import signal
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from torch import Tensor

from acckv import InputError, KVCompressor
from acckv.cache.layer import CompressedLayer
from acckv.config import When
from tests.reference import Evictions, NotReached, Reference, cache_of, missing
from tests.support.tiny_configs import tiny_config
from tests.support.tiny_overrides import MORE_INPUTS

Kind = Literal["right", "refused", "neither", "not built"]
NEW = 4
MEDIA = [1] * 8 + [2] * 6
LABELS = [0] * 3 + MEDIA + [0] * 3
END_OF_MEDIA = 3 + len(MEDIA)
RATIO, TOLERANCE = 0.3, 1e-5


@dataclass(frozen=True)
class Outcome:
    """What became of one class, and the line that refuses it or says what is wrong."""

    name: str
    kind: Kind
    detail: str


class Wrong(Exception):
    """Neither right nor refused."""


class NotBuilt(Exception):
    """The tiny instance does not generate by itself: a fault of the sweep."""


def class_names() -> list[str]:
    """The decoders and composite models that the installed transformers has; neither Auto classes nor bases."""
    ends = ("ForCausalLM", "ForConditionalGeneration")
    names = [name for name in dir(transformers) if name.endswith(ends) and "PreTrainedModelFor" not in name]
    return [name for name in names if not name.startswith("Auto")]


def examine(name: str) -> Outcome:
    """Build a class and see what a session makes of it."""
    try:
        model = build(name)
    except Exception as error:
        return Outcome(name, "not built", _line(error))
    try:
        return Outcome(name, "right", compare(model))
    except InputError as error:
        return Outcome(name, "refused", str(error)) if "\n" not in str(error) else Outcome(name, "neither", str(error))
    except (NotBuilt, NotReached) as error:
        return Outcome(name, "not built", str(error))
    except Exception as error:
        return Outcome(name, "neither", _line(error))


def examine_apart(name: str, seconds: int = 180, gigabytes: int = 12) -> Outcome:
    """The same in a process of its own, within limits of time and memory."""
    receive, send = multiprocessing.get_context("fork").Pipe(duplex=False)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (gigabytes << 30, gigabytes << 30))
        signal.alarm(seconds)
        send.send(examine(name))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    send.close()
    try:
        return receive.recv()
    except EOFError:
        return Outcome(name, "not built", f"takes more than {seconds} s or {gigabytes} GB")
    finally:
        process.join()


def build(name: str) -> Any:
    """A tiny random instance."""
    model_class = getattr(transformers, name)
    config = tiny_config(name)
    torch.manual_seed(0)
    try:
        model = model_class._from_config(copy.deepcopy(config), attn_implementation="sdpa")
    except ValueError as error:
        if "scaled_dot_product" not in str(error):
            raise
        model = model_class._from_config(config, attn_implementation="eager")
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
    return model.eval()


def compare(model: Any) -> str:
    """Which layers are compressed; an error if they are not, or not rightly."""
    model = KVCompressor("keydiff")(model).model
    kinds = torch.tensor([LABELS])
    inputs, (tokens, logits, full) = plain(model)
    with KVCompressor("keydiff", ratio=1.0)(model):
        same, whole, _ = generate(model, inputs, modality_ids=kinds)
    if not (torch.equal(tokens, same) and torch.equal(logits, whole)):
        raise Wrong(f"ratio 1 is off by {float((logits - whole).abs().max()):.1e}")
    boundaries: dict[When, int] = {"context": END_OF_MEDIA, "prompt": len(LABELS)}
    for when, boundary in boundaries.items():
        with KVCompressor("keydiff", ratio=RATIO, when=when)(model) as session:
            new, found, _ = generate(model, inputs, modality_ids=kinds)
            cache: Any = session.last_cache
        if cache is None:
            raise Wrong("nothing was compressed")
        layers = {index: layer for index, layer in enumerate(cache.layers) if isinstance(layer, CompressedLayer)}
        gone: Evictions = {
            index: [(boundary, missing(full.layers[index].keys[0, :, :boundary], layer.keys[0, :, : layer.region]))]
            for index, layer in layers.items()
        }
        kept = sum(int((~mask[0]).sum()) - (boundary - len(MEDIA)) for [(_, mask)] in gone.values())
        if kept != int(RATIO * len(gone) * len(MEDIA)):
            raise Wrong(f"{when}: {kept} entries are kept")
        expected = masked_logits(model, inputs, new, gone)
        scale = float(expected.abs().max())
        first = found[:, :1] if when == "context" else found[:, 1:2]
        effect = float((first - logits[:, : first.shape[1]]).abs().max()) / scale
        error_ = float((found - expected).abs().max()) / scale
        if not error_ < TOLERANCE:
            raise Wrong(f"{when}: off by {error_:.1e} of the largest logit, layers {sorted(gone)}")
        if effect < 10 * TOLERANCE:
            raise Wrong(f"{when}: eviction has no effect, {effect:.1e}")
    return f"{len(gone)} of {len(cache.layers)} layers"


def plain(model: Any) -> tuple[dict[str, Any], tuple[Tensor, Tensor, Any]]:
    """A prompt and what the model generates from it: embeddings, or token ids where it takes nothing else."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(10, 60, (1, len(LABELS)), generator=draw)
    start = getattr(model.config, "audio_bos_token_id", None)
    if start is not None:  # speech begins where the prompt ends
        ids[:, -1] = start
    mask = torch.ones_like(ids)
    more = MORE_INPUTS.get(type(model).__name__, {})
    try:
        with torch.no_grad():
            embeds = model.get_input_embeddings()(ids)
        noise = torch.randn(embeds.shape, generator=draw) * embeds.std()
        embeds = torch.where(torch.tensor(LABELS)[:, None] > 0, noise, embeds)
        inputs = {"inputs_embeds": embeds, "attention_mask": mask, **more}
        return inputs, generate(model, inputs)
    except Exception:
        inputs = {"input_ids": ids, "attention_mask": mask, **more}
    try:
        return inputs, generate(model, inputs)
    except Exception as error:
        raise NotBuilt(f"the plain model does not generate: {_line(error)}") from error


def generate(model: Any, inputs: dict[str, Any], **more: Any) -> tuple[Tensor, Tensor, Any]:
    """New tokens ``[1, new]``, their logits ``[1, new, vocabulary]`` and the cache."""
    out = model.generate(
        **inputs, **more, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    return out.sequences[:, -NEW:], torch.stack(out.logits, 1).float(), cache_of(out)


def masked_logits(model: Any, inputs: dict[str, Any], new: Tensor, gone: Evictions) -> Tensor:
    """Logits ``[1, new, vocabulary]`` by one forward over everything, in which later tokens do not see what is gone."""
    following = new[:, :-1]
    if "input_ids" in inputs:
        whole = {"input_ids": torch.cat([inputs["input_ids"], following], dim=1)}
    else:
        whole = {"inputs_embeds": torch.cat([inputs["inputs_embeds"], model.get_input_embeddings()(following)], dim=1)}
    mask = torch.ones(1, len(LABELS) + NEW - 1, dtype=torch.long)
    with Reference(model, gone).hiding() as eager:
        logits = eager(**whole, attention_mask=mask, use_cache=False).logits
    return logits[:, len(LABELS) - 1 :].float()


def _line(error: BaseException) -> str:
    frames = []
    trace = error.__traceback__
    while trace is not None:
        frames.append(f"{trace.tb_frame.f_code.co_filename.rpartition('/')[-1]}:{trace.tb_lineno}")
        trace = trace.tb_next
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first[:160]} ({' < '.join(frames[:-4:-1])})"
