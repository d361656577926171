"""The compression methods: one file, one idea, all on the same pipeline and at the same exact budget."""

# ruff: noqa: I001  The order of the imports is that of every list of policies.
from __future__ import annotations

from acckv.policies.base import Policy
from acckv.policies.registry import POLICIES, make_policy, register_policy
from acckv.policies.full import Full
from acckv.policies.random import Random
from acckv.policies.streaming_llm import StreamingLLM
from acckv.policies.h2o import H2O
from acckv.policies.snapkv import SnapKV
from acckv.policies.pyramidkv import PyramidKV
from acckv.policies.look_m import LookM
from acckv.policies.fastv import FastV
from acckv.policies.madakv import MadaKV
from acckv.policies.tgv_kv import TGVKV
from acckv.policies.knorm import KNorm
from acckv.policies.keydiff import KeyDiff
from acckv.policies.expected_attention import ExpectedAttention
from acckv.policies.infinipot_v import InfiniPotV
from acckv.policies.kvzip import KVzip
from acckv.policies.acckv import AccKV

__all__ = [
    "H2O",
    "POLICIES",
    "TGVKV",
    "AccKV",
    "ExpectedAttention",
    "FastV",
    "Full",
    "InfiniPotV",
    "KNorm",
    "KVzip",
    "KeyDiff",
    "LookM",
    "MadaKV",
    "Policy",
    "PyramidKV",
    "Random",
    "SnapKV",
    "StreamingLLM",
    "make_policy",
    "register_policy",
]
