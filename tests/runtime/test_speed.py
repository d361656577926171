"""What keeps compression fast and small: no tensor of tokens x tokens, no mask where none is needed, no spare bytes."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from acckv import KVCompressor, policies
from acckv.models import find_adapter
from acckv.runtime import policy_inputs
from acckv.runtime.context_reconstruction import reconstruction_attention
from benchmarks import speed_memory
from benchmarks.speed_report import MARKS
from tests.families import FAMILIES, Tokenizer

POLICIES = [name for name in policies.POLICIES if name != "full"]
TEXT, RATIO = 8, 0.1


class LargestTensor(TorchDispatchMode):
    """The most elements that any operation returned."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0
        self.shape: tuple[int, ...] = ()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for made in result if isinstance(result, (tuple, list)) else [result]:
            # What was only expanded takes no memory.
            if isinstance(made, torch.Tensor) and made.untyped_storage().nbytes() >= made.numel() > self.elements:
                self.elements, self.shape = made.numel(), tuple(made.shape)
        return result


def decoder(attention: str = "sdpa") -> Any:
    """Two layers of two query heads and one KV head of 16."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1 << 15,
    )
    return Qwen2ForCausalLM._from_config(config, attn_implementation=attention).eval()


def clip(tokens: int) -> dict[str, Any]:
    kinds = torch.zeros(1, tokens, dtype=torch.long)
    kinds[:, TEXT:] = 1
    kinds[:, TEXT::3] = 2
    return {"inputs_embeds": torch.randn(1, tokens, 32), "modality_ids": kinds}


@pytest.mark.parametrize("policy", POLICIES)
def test_no_tensor_of_tokens_by_tokens(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores are worked off in rows (KVzip repeats a chunk at once); and what is held is exact to the entry."""
    monkeypatch.setattr(policy_inputs, "reconstruction_attention", partial(reconstruction_attention, chunk=128))
    tokens = 2048
    compressor = KVCompressor(policy, ratio=RATIO)
    with compressor(decoder(), Tokenizer()) as session, LargestTensor() as largest:
        cache = session.extend(clip(tokens))
    assert largest.elements < tokens * tokens / 2, largest.shape
    entry = 2 * 16 * 4  # keys and values, head size, bytes
    assert cache.kv_bytes() == entry * (2 * TEXT + int(RATIO * 2 * (tokens - TEXT)))


def test_such_a_tensor_would_be_seen() -> None:
    """Eager attention makes one."""
    compressor = KVCompressor("keydiff", ratio=RATIO)
    with compressor(decoder("eager")) as session, LargestTensor() as largest:
        session.extend(clip(1024))
    assert largest.elements >= 1024 * 1024


@pytest.mark.parametrize("policy", ["keydiff", "acckv"])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "gemma4_unified"])
def test_no_mask_where_none_is_needed(name: str, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """sdpa's fast paths need mask None: a prefill without padding, and every decode step behind it.

    Gemma 4 Unified is left out: frames see each other whole in its full layers, for which transformers makes a mask.
    """
    family = FAMILIES[name]
    model = family.build()
    compressed = {id(layer.module) for layer in find_adapter(model).attention_layers if layer.slot is not None}
    masks: list[tuple[int, bool]] = []
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def watched(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
        if id(module) in compressed:
            masks.append((query.shape[2], attention_mask is None))
        return original(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", watched)
    with KVCompressor(policy, ratio=0.4)(model, Tokenizer()) as session:
        cache = session.compress(**family.context(model))
        prefilled = len(masks)
        session.answer(cache, torch.tensor([[20]]), max_new_tokens=3, do_sample=False)
    decoded = masks[prefilled:]
    assert decoded and all(rows == 1 and free for rows, free in decoded)
    assert prefilled and all(free for _, free in masks[:prefilled])


def test_the_benchmark_writes_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "speed.json"
    options = {"contexts": "96,128", "prefill-up-to": 100, "batches": "1,2", "policies": "acckv;acckv-calibrated"}
    page = tmp_path / "notes.md"
    page.write_text("Before.\n" + "\n\n".join(MARKS) + "\nAfter.\n")
    options |= {"repeats": 1, "decode-repeats": 1, "steps": 2, "output": file, "page": page}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    monkeypatch.setattr(sys, "argv", ["speed_memory", "--quick", *arguments])
    threads = torch.get_num_threads()
    try:
        speed_memory.main()
    finally:
        torch.set_num_threads(threads)
    result = json.loads(file.read_text())
    assert result["format"] == 1 and len(result["rows"]) == 2 * 2 * 2
    assert file.with_suffix(".png").stat().st_size > 1000
    lines = page.read_text().splitlines()
    assert lines[0] == "Before." and lines[-1] == "After." and any("--page=" in line for line in lines)
    assert sum(line.startswith("| acckv-calibrated | ") for line in lines) == 4
    for row in result["rows"]:
        context, batch = row["context"], row["batch"]
        entry, media = batch * 2 * 2 * 128 * 4, context - 2 * speed_memory.TEXT
        assert row["kv_bytes_full"] == entry * 2 * context
        assert row["kv_bytes"] == entry * (2 * 2 * speed_memory.TEXT + int(0.1 * 2 * media + 1e-9))
        assert row["decode_vs_limit"] > 0 and row["decode_vs_full"] > 0
        assert (row["prefill_overhead"] is None) == (context > 100)
