"""Answers from caches that kvpress has compressed, for benchmarks.pretrained, which runs this in kvpress's environment.

    python kvpress_answers.py DECODER TOKENS --press kvzip --ratios 0.2,0.1

Reads a clip a line (token ids, how many of them are text, the ids of each question, the longest answer), compresses
each clip before any question is known, and answers each question greedily from what is left. As many entries are held
as acckv holds: all of the text and `ratio` of the others; kvpress chooses among all of them. Prints a line a ratio: the
answers of each clip, and the entries held, mean over layers, heads and clips.
"""

import argparse
import json
import time
from typing import Any

import kvpress
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging

#: By how the heads of a layer share its entries: each as many, or one ranking over all of them. KVzip's joint ranking
#: goes over the layers too.
PRESSES = {
    "kvzip": lambda share: kvpress.KVzipPress(share),
    "kvzip_layerwise": lambda share: kvpress.KVzipPress(share, layerwise=True),
    "keydiff": lambda share: kvpress.KeyDiffPress(share),
    "adakv_keydiff": lambda share: kvpress.AdaKVPress(kvpress.KeyDiffPress(share)),
    "snapkv": lambda share: kvpress.SnapKVPress(share),
    "adakv_snapkv": lambda share: kvpress.AdaKVPress(kvpress.SnapKVPress(share)),
    "expected_attention": lambda share: kvpress.ExpectedAttentionPress(share),
    "adakv_expected_attention": lambda share: kvpress.AdaKVPress(kvpress.ExpectedAttentionPress(share)),
}


def compress(model: Any, ids: list[int], press: Any) -> Any:
    """The cache of a context after compression."""
    cache = DynamicCache()
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None
    with press(model):
        model.model(input_ids=torch.tensor([ids]), past_key_values=cache)
    return cache


def held(model: Any, cache: Any) -> float:
    """Entries held, mean over layers and heads; presses with budgets a head hide entries instead of evicting them."""
    found = 0.0
    for layer, kept in zip(model.model.layers, cache.layers, strict=True):
        hidden = layer.self_attn.masked_key_indices
        found += kept.keys.shape[2] - (0 if hidden is None else len(hidden[0]) / kept.keys.shape[1])
    return found / len(cache.layers)


def answer(model: Any, cache: Any, context: int, stem: list[int], limit: int, ends: list[int]) -> list[int]:
    """The tokens that a question is continued with; the cache is left as it was."""
    lengths = [layer.keys.shape[2] for layer in cache.layers]
    new: list[int] = []
    tokens, position = stem, context
    while len(new) < limit and not (new and new[-1] in ends):
        # Positions go on behind the whole context; the mask follows from what the cache holds.
        places = torch.arange(position, position + len(tokens))[None]
        logits = model(input_ids=torch.tensor([tokens]), past_key_values=cache, position_ids=places).logits
        position += len(tokens)
        new.append(int(logits[0, -1].argmax()))
        tokens = new[-1:]
    for layer, length in zip(cache.layers, lengths, strict=True):
        layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
    return new


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("decoder", help="folder")
    parser.add_argument("tokens", help="file of clips")
    parser.add_argument("--press", choices=PRESSES, required=True)
    parser.add_argument("--ratios", required=True, help="kept shares, separated by commas")
    given = parser.parse_args()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(given.decoder)
    model = AutoModelForCausalLM.from_pretrained(given.decoder, dtype=torch.float32, attn_implementation="sdpa").eval()
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else ends
    with open(given.tokens, encoding="utf-8") as lines:
        clips = [json.loads(line) for line in lines]
    for ratio in map(float, given.ratios.split(",")):
        started, kept, answers, cut = time.monotonic(), 0.0, [], 0
        for clip in clips:
            total = len(clip["ids"])
            stay = clip["text"] + int(ratio * (total - clip["text"]))
            # Presses round down what stays, or what goes, of `total`: half an entry more is safe either way.
            cache = compress(model, clip["ids"], PRESSES[given.press](1 - (stay + 0.5) / total))
            kept += held(model, cache) / len(clips)
            new = [answer(model, cache, total, stem, clip["limit"], ends) for stem in clip["stems"]]
            cut += sum(len(one) == clip["limit"] and one[-1] not in ends for one in new)
            answers.append(tokenizer.batch_decode(new, skip_special_tokens=True))
        minutes = (time.monotonic() - started) / 60
        print(
            json.dumps({"ratio": ratio, "kept": kept, "cut": cut, "minutes": minutes, "answers": answers}), flush=True
        )


if __name__ == "__main__":
    main()
