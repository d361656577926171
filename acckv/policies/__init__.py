"""The training-free methods: one file, one idea, all on the same pipeline and at the same exact budget."""

from __future__ import annotations

from acckv.config import CompressionConfig
from acckv.errors import InputError
from acckv.method.weights import CalibratedWeights
from acckv.policies.acckv import AccKV
from acckv.policies.base import Policy
from acckv.policies.expected_attention import ExpectedAttention
from acckv.policies.fastv import FastV
from acckv.policies.full import Full
from acckv.policies.h2o import H2O
from acckv.policies.keydiff import KeyDiff
from acckv.policies.knorm import KNorm
from acckv.policies.kvzip import KVzip
from acckv.policies.look_m import LookM
from acckv.policies.madakv import MadaKV
from acckv.policies.pyramidkv import PyramidKV
from acckv.policies.random import Random
from acckv.policies.snapkv import SnapKV
from acckv.policies.streaming_llm import StreamingLLM

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (
        Full,
        Random,
        StreamingLLM,
        H2O,
        SnapKV,
        PyramidKV,
        LookM,
        FastV,
        MadaKV,
        KNorm,
        KeyDiff,
        ExpectedAttention,
        KVzip,
        AccKV,
    )
}

__all__ = ["POLICIES", "AccKV", "Policy", "build_policy"]


def build_policy(config: CompressionConfig, weights: CalibratedWeights | None = None) -> Policy:
    """The policy that a config names; only AccKV has learned weights.

    Raises:
        InputError: there are weights, and the policy is another one that would score.
    """
    if weights is not None and config.policy not in ("acckv", "full"):
        message = f"is {config.policy!r}, and learned weights go with 'acckv' alone; leave it out"
        raise InputError(message, field="policy")
    if weights is not None:
        return AccKV(config, weights)
    return POLICIES[config.policy](config)
