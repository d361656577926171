"""A model run plainly, and what a session could leave on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from acckv.cache.cache import CompressedCache
from acckv.runtime.session import Session


def plain_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs as transformers takes them."""
    return {name: value for name, value in inputs.items() if name != "modality_ids"}


def generate(model: Any, inputs: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor]:
    """New tokens ``[rows, new]`` and the logits of each step ``[steps, rows, vocabulary]``."""
    torch.manual_seed(0)
    out = model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
    return out.sequences[:, -len(out.logits) :], torch.stack(out.logits).float()


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """To rounding: `tolerance` is a share of the largest expected value; 1e-5 is for float32."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < tolerance * expected.abs().max()


def continued(model: Any, session: Session, cache: CompressedCache, tokens: tuple[int, ...]) -> Tensor:
    """Logits of text after a cache ``[tokens, vocabulary]``, by a plain forward."""
    branch, ids = cache.branch(), torch.tensor([tokens])
    positions = session.adapter.text_positions(branch.next_position + torch.arange(len(tokens)))
    mask = torch.ones(1, branch.get_seq_length() + len(tokens), dtype=torch.long)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, position_ids=positions, cache=branch).logits[0]


def fingerprint(model: Any) -> dict[str, Any]:
    """Everything that could be left behind on a model or on transformers."""
    state: dict[str, Any] = {"": dict(ALL_ATTENTION_FUNCTIONS._local_mapping)}
    for name, module in model.named_modules():
        hooks = [len(value) for key, value in vars(module).items() if key.endswith("_hooks") and value is not None]
        state[name] = (type(module), sorted(vars(module)), hooks)
    state["grad"] = [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]
    return state
