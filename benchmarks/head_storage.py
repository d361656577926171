"""Bytes and decode time of layers whose heads keep unequal numbers of entries, against a cache born with their mean.

    python -m benchmarks.head_storage --output benchmarks/results/head_storage.json

Every head of a decoder with random weights keeps another number of entries: as measured on a pretrained decoder, most
keep a few and some keep many. The limit is a plain cache whose heads all hold the mean of these numbers. Both are
decoded by turns in one process; a ratio is the median over the steps. Beside it: what padding each layer to its longest
head would hold.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from acckv import KVCompressor
from acckv.cache.cache import CompressedCache, compressed_layers, fresh_cache
from acckv.io.files import whole_file
from acckv.method.modality import Modality, ModalityMap
from acckv.method.plan import LayerPlan
from acckv.models import find_adapter
from acckv.runtime.session import Session

#: Standard deviation of the logarithm of what a head keeps: one in three keeps more than the mean.
KV_HEADS = 4
SPREAD = 1.0


@dataclass(frozen=True)
class Row:
    """One size.

    Attributes:
        batch, entries: rows, and media entries of each before compression; ratio: kept share of them.
        held: bytes of all keys and values over those of the limit, after the steps; padded: the same if each layer were
            padded to its longest head.
        decode: time of a step over the limit's; limit: seconds of a step of it.
    """

    batch: int
    entries: int
    ratio: float
    held: float
    padded: float
    decode: float
    limit: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--sizes", default="1x8000,1x32000,8x8000", help="rows x media entries, separated by commas")
    parser.add_argument("--ratios", default="0.05,0.2", help="kept shares, separated by commas")
    parser.add_argument("--steps", type=int, default=40, help="tokens that are decoded")
    options = parser.parse_args()
    model = decoder()
    rows = []
    for size in options.sizes.split(","):
        batch, entries = map(int, size.split("x"))
        for ratio in map(float, options.ratios.split(",")):
            rows.append(measure(model, batch, entries, ratio, options.steps))
            print(
                "{batch} x {entries} at {ratio:g}: {held:.3f} x the limit's bytes ({padded:.2f} if padded), "
                "{decode:.2f} x its time of {limit:.4f} s".format(**asdict(rows[-1])),
                flush=True,
            )
    with whole_file(options.output) as file:
        file.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def decoder() -> LlamaForCausalLM:
    """Eight layers of four KV heads, with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=65536,
    )
    return LlamaForCausalLM(config).eval()


@torch.inference_mode()
def measure(model: LlamaForCausalLM, batch: int, entries: int, ratio: float, steps: int) -> Row:
    """Decode `steps` tokens behind both caches, by turns."""
    with KVCompressor("keydiff", ratio=ratio, head_budgets="joint")(model) as session:
        cache = compressed(session, head_counts(model.config, batch, entries, ratio), entries)
        layers = compressed_layers(cache)
        mean = sum(layer.tensors[0].shape[0] for layer in layers) // (len(layers) * batch * KV_HEADS)
        widest = sum(layer.physical for layer in layers) / len(layers)
        times: list[tuple[float, float]] = []
        limit = plain(model, batch, mean)
        for step in range(steps):
            ours = timed(model, cache, batch, entries + step)
            times.append((ours, timed(model, limit, batch, entries + step)))
        limits: list[Any] = limit.layers
        bytes_of_limit = sum(layer.keys.nbytes + layer.values.nbytes for layer in limits)
        held = cache.kv_bytes() / bytes_of_limit
    warm = times[steps // 4 :]
    decode, seconds = (statistics.median(part) for part in zip(*((a / b, b) for a, b in warm), strict=True))
    return Row(batch, entries, ratio, held, (widest + steps) / (mean + steps), decode, seconds)


def head_counts(config: LlamaConfig, batch: int, entries: int, ratio: float) -> Tensor:
    """int64 ``[layers, batch, heads]``: entries that each head keeps, the mean of all about `ratio` of `entries`."""
    draw = torch.Generator().manual_seed(0)
    shares = (SPREAD * torch.randn(config.num_hidden_layers, 1, KV_HEADS, generator=draw)).exp()
    clips = 1 + 0.07 * torch.randn(config.num_hidden_layers, batch, KV_HEADS, generator=draw)
    counts = shares / shares.mean() * clips * ratio * entries
    return counts.long().clamp(1, entries)


def compressed(session: Session, counts: Tensor, entries: int) -> CompressedCache:
    """A cache of random entries of which every head keeps so many."""
    batch, heads = counts.shape[1:]
    size = session.adapter.decoder.config.head_dim
    cache = fresh_cache(session.adapter)
    labels = ModalityMap(torch.full((batch, entries), int(Modality.VIDEO)))
    none = torch.zeros(batch, heads, 0, size)
    for index, layer in enumerate(compressed_layers(cache)):
        layer.update(torch.randn(batch, heads, entries, size), torch.randn(batch, heads, entries, size))
        kept = torch.arange(entries) < counts[index][..., None]
        plan = LayerPlan(torch.where(kept, 0.0, -torch.inf), none, none, none[..., 0])
        layer.commit(plan, labels.labels[:, None])
    return CompressedCache(cache.layers, labels, torch.full((batch, 1), entries))


def plain(model: LlamaForCausalLM, batch: int, entries: int) -> DynamicCache:
    """A cache that all heads hold as many random entries in."""
    cache = DynamicCache(config=model.config)
    shape = batch, KV_HEADS, entries, find_adapter(model).dimensions["head_size"]
    for index in range(model.config.num_hidden_layers):
        cache.update(torch.randn(shape), torch.randn(shape), index)
    return cache


def timed(model: LlamaForCausalLM, cache: DynamicCache, batch: int, position: int) -> float:
    """Seconds of one step."""
    start = time.perf_counter()
    model(
        input_ids=torch.full((batch, 1), 7),
        position_ids=torch.full((batch, 1), position),
        past_key_values=cache,
        use_cache=True,
    )
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
