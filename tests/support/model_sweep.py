"""Every decoder of transformers, tiny: compressed and right, or refused in one line, and nothing else.

Right means: at ratio 1 equal to the plain model, at ratio 0.3 equal to an eager copy of it whose later tokens do not
see what was evicted. Neither layer map nor hook of the package is used for that: what is gone is read off the keys that
the compressed cache still holds, and a mask a layer and head is handed to the copy's own attention modules.
"""

from __future__ import annotations

import copy
import inspect
import multiprocessing
import resource
import signal
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from torch import Tensor

from acckv import CompressionConfig, InputError, KVCompressor
from acckv.cache.layer import CompressedLayer
from tests.support.tiny_configs import tiny_config
from tests.support.tiny_overrides import MORE_INPUTS

Kind = Literal["right", "refused", "neither", "not built"]
NEW = 4
MEDIA = [1] * 8 + [2] * 6
LABELS = [0] * 3 + MEDIA + [0] * 3
END_OF_MEDIA = 3 + len(MEDIA)
#: Attributes that tell an attention module from a decoder layer.
PROJECTIONS = ("q_proj", "k_proj", "qkv_proj", "c_attn", "query_key_value", "kv_b_proj", "att_proj")
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
    except NotBuilt as error:
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
    model = KVCompressor(CompressionConfig(policy="keydiff"))(model).model
    kinds = torch.tensor([LABELS])
    inputs, (tokens, logits, full) = plain(model)
    with KVCompressor(CompressionConfig(policy="keydiff", ratio=1.0))(model):
        same, whole, _ = generate(model, inputs, modality_ids=kinds)
    if not (torch.equal(tokens, same) and torch.equal(logits, whole)):
        raise Wrong(f"ratio 1 is off by {float((logits - whole).abs().max()):.1e}")
    for when, boundary in (("context", END_OF_MEDIA), ("prompt", len(LABELS))):
        with KVCompressor(CompressionConfig(policy="keydiff", ratio=RATIO, when=when))(model) as session:  # type: ignore[arg-type]
            new, found, _ = generate(model, inputs, modality_ids=kinds)
            cache: Any = session.last_cache
        if cache is None:
            raise Wrong("nothing was compressed")
        gone = evictions(cache, full, boundary)
        kept = sum(int((~mask[0]).sum()) - (boundary - len(MEDIA)) for mask in gone.values())
        if kept != int(RATIO * len(gone) * len(MEDIA)):
            raise Wrong(f"{when}: {kept} entries are kept")
        expected = masked_logits(model, inputs, new, gone, boundary)
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
    cache = out.get("cache", out.get("past_key_values"))
    return out.sequences[:, -NEW:], torch.stack(out.logits, 1).float(), cache


def evictions(cache: Any, full: Any, boundary: int) -> dict[int, Tensor]:
    """By cache layer bool ``[heads, boundary]`` of what is gone, read off the keys that are still there."""
    gone = {}
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, CompressedLayer):
            continue
        keys, held = full.layers[index].keys[0, :, :boundary], layer.keys[0, :, : layer.region]
        if not held.numel():
            raise Wrong(f"layer {index} holds nothing")
        nearest = torch.cdist(held.double(), keys.double()).min(dim=-1)
        if nearest.values.max() > 1e-4 * keys.abs().max():
            raise Wrong(f"layer {index} holds entries that were never there")
        gone[index] = torch.ones(keys.shape[:2], dtype=torch.bool).scatter(1, nearest.indices, False)
    return gone


def masked_logits(model: Any, inputs: dict[str, Any], new: Tensor, gone: dict[int, Tensor], boundary: int) -> Tensor:
    """Logits ``[1, new, vocabulary]`` by one forward over everything, in which later tokens do not see what is gone."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    following = new[:, :-1]
    if "input_ids" in inputs:
        whole = {"input_ids": torch.cat([inputs["input_ids"], following], dim=1)}
    else:
        whole = {"inputs_embeds": torch.cat([inputs["inputs_embeds"], model.get_input_embeddings()(following)], dim=1)}
    length = len(LABELS) + NEW - 1
    reached = set()

    def hide(module: Any, args: Any, kwargs: Any) -> Any:
        index = source_layer(module)
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        mask = bound.arguments.get("attention_mask")
        if index not in gone or not isinstance(mask, Tensor) or mask.ndim != 4:
            return None
        reached.add(index)
        hidden = torch.zeros(gone[index].shape[0], length, length, dtype=torch.bool)
        hidden[:, boundary:, :boundary] = gone[index][:, None]
        hidden = hidden.repeat_interleave(query_heads(module, model) // hidden.shape[0], 0)[None]
        low = torch.finfo(torch.float32).min
        mask = torch.where(mask, 0.0, low) if mask.dtype == torch.bool else mask
        bound.arguments["attention_mask"] = mask.expand(-1, hidden.shape[1], -1, -1).masked_fill(hidden, low)
        return bound.args, bound.kwargs

    with ExitStack() as stack, torch.no_grad():
        for module in eager.modules():
            takes_mask = "attention_mask" in inspect.signature(module.forward).parameters
            if hasattr(module, "layer_idx") and takes_mask and any(hasattr(module, name) for name in PROJECTIONS):
                stack.callback(module.register_forward_pre_hook(hide, with_kwargs=True).remove)
        mask = torch.ones(1, length, dtype=torch.long)
        logits = eager(**whole, attention_mask=mask, use_cache=False).logits
    if reached != set(gone):
        raise NotBuilt(f"the reference reached layers {sorted(reached)} of {sorted(gone)}")
    return logits[:, len(LABELS) - 1 :].float()


def source_layer(module: Any) -> int:
    """The cache layer that an attention module reads: its own, or that of the layer whose entries it shares."""
    index = int(module.layer_idx)
    if getattr(module, "kv_shared_layer_index", None) is not None:
        return int(module.kv_shared_layer_index)
    if getattr(module, "is_kv_shared_layer", False):
        modes, kinds = module.config.kv_sharing_modes, module.config.layer_types
        return max(i for i in range(index) if modes[i] != "reuse" and kinds[i] == kinds[index])
    return index


def query_heads(module: Any, model: Any) -> int:
    """Of an attention module."""
    for name in ("num_heads", "num_attention_heads", "n_heads"):
        if isinstance(getattr(module, name, None), int):
            return int(getattr(module, name))
    return int(model.config.get_text_config(decoder=True).num_attention_heads)


def _line(error: BaseException) -> str:
    frames = []
    trace = error.__traceback__
    while trace is not None:
        frames.append(f"{trace.tb_frame.f_code.co_filename.rpartition('/')[-1]}:{trace.tb_lineno}")
        trace = trace.tb_next
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first[:160]} ({' < '.join(frames[:-4:-1])})"
