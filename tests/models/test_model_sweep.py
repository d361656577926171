"""Every decoder that transformers has is compressed and right, or refused in one line; see docs/models-sweep.md."""

from __future__ import annotations

import re

import pytest

from tests.support.model_sweep import class_names, examine, examine_apart

#: One of each kind: plain, windows, sinks, soft caps, shared entries, mixture, composite; and what is refused.
RIGHT = {
    "LlamaForCausalLM": "4 of 4 layers",
    "GptOssForCausalLM": "2 of 4 layers",
    "Gemma2ForCausalLM": "2 of 4 layers",
    "Gemma3nForCausalLM": "1 of 4 layers",
    "Qwen3MoeForCausalLM": "4 of 4 layers",
    "LlavaForConditionalGeneration": "4 of 4 layers",
}
REFUSED = {
    "DeepseekV3ForCausalLM": "reads entries of .* where its cache holds .*latent attention",
    "DiffLlamaForCausalLM": "reads entries of .* where its cache holds",
    "DogeForCausalLM": "the attention of 4 of its layers does not go through transformers' attention interface",
    "DoryForCausalLM": "it runs a layer more than once",
    "Gemma4AssistantForCausalLM": "it has no cache of its own",
    "BloomForCausalLM": "its decoder has no `layers`",
    "WhisperForCausalLM": "its attention does not go through transformers' attention interface",
    "T5ForConditionalGeneration": "it is no causal language model",
    "Qwen3NextForCausalLM": "it has layers of type linear_attention",
    "HiggsAudioV2ForConditionalGeneration": "it does not generate tokens of text",
    "CsmDepthDecoderForCausalLM": "hands its decoder backbone_last_hidden_state",
}


@pytest.mark.parametrize("name", RIGHT)
def test_right(name: str) -> None:
    outcome = examine(name)
    assert (outcome.kind, outcome.detail) == ("right", RIGHT[name])


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    outcome = examine(name)
    assert outcome.kind == "refused" and re.search(REFUSED[name], outcome.detail), outcome


@pytest.mark.slow
@pytest.mark.parametrize("name", class_names())
def test_every_class(name: str) -> None:
    outcome = examine_apart(name)
    if outcome.kind == "not built" and "ImportError" in outcome.detail:
        pytest.skip(outcome.detail)
    assert outcome.kind in ("right", "refused"), outcome
