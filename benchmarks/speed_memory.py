"""Speed and memory of a compressed cache, every figure a ratio measured inside one run.

    python -m benchmarks.speed_memory --output runs/speed_memory.json

A decoder with the layer sizes of Qwen2.5-Omni-3B, cut to a few layers and to a small vocabulary, with random weights:
time does not depend on them. What is compared runs by turns, on one thread and by the processor time of the process, so
that other work on the machine counts for none of it; each figure is the median over the repeats.

  decode_vs_limit   a decode step of the compressed cache over one of a plain DynamicCache that was born with the same
                    number of entries in every layer: the limit (target: at most 1.05)
  decode_vs_full    the same step over one of the full cache
  prefill_overhead  share of the decoder's own time that compression adds to a prefill: all that a session does before,
                    between and after its layers (target: at most 0.02 at 8192 tokens). Timed inside the compressed
                    prefill, since the difference of two long prefills is no measure of 1 %
  prefill_ratio     a whole prefill with compression over a plain one, where that is measured (--plain-up-to)
  kv_bytes          keys and values held for the whole batch, and kv_bytes_full of the full cache
  peak_bytes        the most that keys and values of one clip took while it was prefilled, and peak_bytes_full

The calibrated compressor has its LoRA, of rank 16 on all seven projections, as a calibration makes it by default;
further rows run LoRA beside the weights instead of merged, on all or on fewer projections.

Skipped: prefills of a whole batch, since a batch multiplies both sides: a prefill is of one clip, and the batch decodes
from as many copies of its cache. Prefills longer than --prefill-up-to tokens (minutes each): there the cache is filled
at random and the figures of the prefill are null. Cells whose full cache and the copy of it that DynamicCache makes at
every step would take more than --memory. --quick is a small grid on a decoder an eighth as wide.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

from acckv import KVCompressor
from acckv.cache.cache import CompressedCache, compressed_layers, fresh_cache
from acckv.io.files import whole_file
from acckv.method.modality import ModalityMap
from acckv.method.plan import LayerPlan
from acckv.models import find_adapter
from acckv.policies import AccKV
from acckv.runtime.lora import AttachedLora, LoraWeights, lora_config
from benchmarks.prefill_watch import PrefillWatch
from benchmarks.speed_report import MARKS, markdown, plot, table
from benchmarks.study_tables import write_section

FORMAT = 1
#: Text before and after the media of a clip; all the rest is two thirds video and one third audio.
TEXT = 16
#: What an export is: weights and LoRA of all seven projections, which a session merges. They are random here, since
#: their values do not change the time.
CALIBRATED = "acckv-calibrated"
#: The same with LoRA beside the weights, as where memory for the merged copies is short: of all projections, or fewer.
SEPARATE = {
    f"{CALIBRATED}, LoRA separate": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    f"{CALIBRATED}, LoRA separate, attention only": ("q_proj", "k_proj", "v_proj", "o_proj"),
    f"{CALIBRATED}, LoRA separate, q and v only": ("q_proj", "v_proj"),
}
RANK = 16
KV_HEADS, HEAD_SIZE = 2, 128


class Words:
    """Stands for a tokenizer where a policy runs a probe prompt."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [30 + len(word) for word in text.split()]}


def decoder(layers: int, shrink: int = 1) -> Qwen2ForCausalLM:
    """Layers of Qwen2.5-Omni-3B's decoder; `shrink` divides hidden and intermediate size, not the attention's."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=1024,
        hidden_size=2048 // shrink,
        intermediate_size=11008 // shrink,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_SIZE,  # type: ignore[call-arg]  # a config takes what its model reads
        max_position_embeddings=1 << 17,
    )
    return Qwen2ForCausalLM(config).eval()


def compressor(policy: str, ratio: float, model: Qwen2ForCausalLM) -> KVCompressor:
    """Of a policy's name; 'acckv-context' is AccKV's preset for `when: context`, which calibration starts from."""
    if policy not in ("acckv-context", CALIBRATED, *SEPARATE):
        return KVCompressor(policy, ratio=ratio)
    preset = AccKV.preset("context")
    if policy == "acckv-context":
        return KVCompressor(preset, ratio=ratio)
    weights = preset.new_weights(**find_adapter(model).dimensions)
    for parameter in weights.requires_grad_(False).parameters():
        parameter.normal_(0, 0.05)
    return KVCompressor(
        preset, ratio=ratio, weights=weights, lora=lora(model, SEPARATE.get(policy, next(iter(SEPARATE.values()))))
    )


def lora(model: Qwen2ForCausalLM, targets: tuple[str, ...]) -> LoraWeights:
    adapter = find_adapter(model)
    config = lora_config(adapter, RANK, 2.0 * RANK, targets, "random")
    attached = AttachedLora(adapter, config)
    tensors = {name: 0.01 * torch.randn_like(tensor) for name, tensor in attached.tensors().items()}
    attached.remove()
    return LoraWeights(config, tensors)


def clip(model: Qwen2ForCausalLM, context: int) -> dict[str, Tensor]:
    """Embeddings ``[1, context, hidden]`` of a clip, and what they are."""
    generator = torch.Generator().manual_seed(context)
    kinds = torch.zeros(1, context, dtype=torch.long)
    kinds[:, TEXT:-TEXT] = 1
    kinds[:, TEXT:-TEXT:3] = 2
    embeds = torch.randn(1, context, model.config.hidden_size, generator=generator)
    return {"inputs_embeds": embeds, "modality_ids": kinds}


def seconds(step: Callable[[], Any]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def kv_bytes(cache: Any) -> int:
    return sum(part.numel() * part.element_size() for layer in cache.layers for part in (layer.keys, layer.values))


@torch.no_grad()
def plain_prefill(model: Qwen2ForCausalLM, inputs: dict[str, Tensor]) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    model.model(inputs_embeds=inputs["inputs_embeds"], cache=cache, use_cache=True)
    return cache


def born_with(cache: CompressedCache) -> DynamicCache:
    """A plain cache that never held more than a compressed one holds."""
    plain = DynamicCache()
    for index, layer in enumerate(compressed_layers(cache)):
        plain.update(torch.randn_like(layer.keys), torch.randn_like(layer.values), index)
    return plain


def batched(cache: Any, batch: int) -> Any:
    """A cache of `batch` equal rows."""
    if isinstance(cache, CompressedCache):
        return cache.branch(batch)
    copy = DynamicCache()
    for index, layer in enumerate(cache.layers):
        copy.update(layer.keys.repeat_interleave(batch, dim=0), layer.values.repeat_interleave(batch, dim=0), index)
    return copy


@torch.no_grad()
def decode(model: Qwen2ForCausalLM, cache: Any, batch: int, steps: int) -> float:
    """Median seconds of a decode step; the entries that it adds are taken back."""
    seen, times = cache.get_seq_length(), []
    for step in range(steps):
        token = torch.full((batch, 1), 20)
        mask = torch.ones(batch, seen + step + 1, dtype=torch.long)
        position = torch.full((batch, 1), seen + step)
        arguments = {"attention_mask": mask, "position_ids": position, "cache": cache, "use_cache": True}
        times.append(seconds(lambda token=token, arguments=arguments: model(input_ids=token, **arguments)))  # type: ignore[misc]
    cache.crop(-steps)
    return statistics.median(times)


def measure(options: argparse.Namespace, progress: Progress) -> list[dict[str, Any]]:
    """A row a policy, context, batch and ratio."""
    model = decoder(options.layers, 8 if options.quick else 1)
    cells = len(options.contexts) * len(options.policies) * len(options.ratios)
    task = progress.add_task("cells", total=cells)
    plain_prefill(model, clip(model, 256))
    rows = []
    for context in options.contexts:
        inputs = clip(model, context)
        full = filled(model, context)
        for ratio in options.ratios:
            for policy in options.policies:
                progress.update(task, description=f"{policy} at {context} tokens")
                mode = "separate" if policy in SEPARATE else "auto"
                with compressor(policy, ratio, model)(model, Words(), lora_mode=mode) as session:
                    cache, prefill = compressed(model, session, inputs, full, options)
                    for batch in options.batches:
                        if 2 * batch * kv_bytes(full) > options.memory * 2**30:
                            continue
                        cell = {"policy": policy, "context": context, "batch": batch, "ratio": ratio}
                        cell |= decode_ratios(model, session, cache, full, batch, options) | prefill
                        sizes = {"kv_bytes": batch * cache.kv_bytes(), "kv_bytes_full": batch * kv_bytes(full)}
                        rows.append(cell | sizes | {"peak_bytes_full": kv_bytes(full)})
                progress.advance(task)
    return rows


def filled(model: Qwen2ForCausalLM, entries: int) -> DynamicCache:
    """A cache of random entries of one clip."""
    shape, cache = (1, KV_HEADS, entries, HEAD_SIZE), DynamicCache()
    for layer in range(model.config.num_hidden_layers):
        cache.update(torch.randn(shape), torch.randn(shape), layer)
    return cache


def compressed(
    model: Qwen2ForCausalLM, session: Any, inputs: dict[str, Tensor], full: DynamicCache, options: argparse.Namespace
) -> tuple[CompressedCache, dict[str, float | None]]:
    """The compressed cache of a clip, and the figures of its prefill."""
    context = inputs["modality_ids"].shape[1]
    if context > options.prefill_up_to or session.attached is not None:  # LoRA separate: a prefill is as without it
        blank = fresh_cache(session.adapter)
        labels = ModalityMap(inputs["modality_ids"])
        places = labels.media[0].nonzero()[:, 0]
        total, layers = int(session.planners.config.ratio * len(full.layers) * len(places) + 1e-9), len(full.layers)
        sources: list[Any] = full.layers
        for index, (layer, source) in enumerate(zip(compressed_layers(blank), sources, strict=True)):
            layer.update(source.keys, source.values)
            keep = labels.text.clone()
            keep[0, places[: total // layers + (index < total % layers)]] = True
            nothing = source.keys[:, :, :0]
            gates = torch.zeros(keep.shape).masked_fill(~keep, -torch.inf)[:, None]
            layer.commit(
                LayerPlan(gates, nothing, nothing, torch.zeros(1, nothing.shape[1], 0)), labels.labels[:, None]
            )
        held = CompressedCache(blank.layers, labels, torch.tensor([[context]]))
        return held, dict.fromkeys(("prefill_overhead", "prefill_ratio", "peak_bytes"))
    ours, ratios, peak = [], [], 0
    for _ in range(options.repeats):
        watch = PrefillWatch()
        with watch.watching(session):
            cache = session.extend(inputs)
        ours.append(watch.ours / watch.own)
        peak = max(peak, watch.peak)
        if context <= options.plain_up_to:
            session.__exit__()
            ratios.append((watch.ours + watch.own) / seconds(lambda: plain_prefill(model, inputs)))
            session.__enter__()
    ratio = statistics.median(ratios) if ratios else None
    return cache, {"prefill_overhead": statistics.median(ours), "prefill_ratio": ratio, "peak_bytes": peak}


def decode_ratios(
    model: Qwen2ForCausalLM, session: Any, cache: CompressedCache, full: Any, batch: int, options: argparse.Namespace
) -> dict[str, float]:
    """A compressed cache's step over that of its limit and of the full cache; the session is closed for those."""
    caches = {"ours": batched(cache, batch), "limit": batched(born_with(cache), batch), "full": batched(full, batch)}
    times: dict[str, list[float]] = {name: [] for name in caches}
    for repeat in range(options.decode_repeats + 1):
        for name in ("limit", "ours", "full"):
            if name == "ours":
                took = decode(model, caches[name], batch, options.steps)
            else:
                session.__exit__()
                took = decode(model, caches[name], batch, options.steps if name != "full" else 1)
                session.__enter__()
            if repeat:  # the first round warms up
                times[name].append(took)
    return {
        f"decode_vs_{other}": statistics.median(a / b for a, b in zip(times["ours"], times[other], strict=True))
        for other in ("limit", "full")
    }


def names(text: str) -> list[str]:
    return [part.strip() for part in text.split(";")]


def numbers(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def parse(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",")]

    parse.__name__ = "list"
    return parse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write; a PNG of its name beside it")
    parser.add_argument("--quick", action="store_true", help="a small grid within a minute")
    parser.add_argument("--policies", type=names, help="separated by ';'; default: all but other papers'")
    parser.add_argument("--page", type=Path, help="file whose section between the marks of speed is replaced")
    parser.add_argument("--contexts", type=numbers(int), help="tokens of a clip; default: 1024,4096,8192,16384,32768")
    parser.add_argument("--batches", type=numbers(int), help="rows that decode together; default: 1,4,16")
    parser.add_argument("--ratios", type=numbers(float), help="kept shares; default: 0.1")
    parser.add_argument("--repeats", type=int, default=3, help="prefills that are measured")
    parser.add_argument("--prefill-up-to", type=int, default=32768, help="longest context that is prefilled, tokens")
    parser.add_argument("--plain-up-to", type=int, default=1024, help="longest context prefilled plainly too, tokens")
    parser.add_argument("--decode-repeats", type=int, default=5, help="rounds of decode steps")
    parser.add_argument("--steps", type=int, default=8, help="decode steps of a round")
    parser.add_argument("--layers", type=int, default=2, help="of the decoder")
    parser.add_argument("--memory", type=float, default=10, help="GiB for the full cache and its copy")
    options = parser.parse_args()
    options.policies = options.policies or (
        ["acckv", CALIBRATED] if options.quick else ["acckv-context", CALIBRATED, *SEPARATE]
    )
    options.contexts = options.contexts or ([1024, 4096] if options.quick else [1024, 4096, 8192, 16384, 32768])
    options.batches = options.batches or ([1, 4] if options.quick else [1, 4, 16])
    options.ratios = options.ratios or [0.1]
    torch.set_num_threads(1)
    if min([*options.contexts, 4 * TEXT]) < 4 * TEXT:
        parser.error(f"--contexts: at least {4 * TEXT}")
    with Progress() as progress:
        rows = measure(options, progress)
    with whole_file(options.output) as file:
        file.write_text(json.dumps({"format": FORMAT, "rows": rows}, indent=1) + "\n")
    plot(rows, options.output.with_suffix(".png"))
    Console(width=120).print(table(rows))
    if options.page:
        command = f"python -m benchmarks.speed_memory {shlex.join(sys.argv[1:])}"
        write_section(options.page, markdown(rows, command), MARKS)


if __name__ == "__main__":
    main()
