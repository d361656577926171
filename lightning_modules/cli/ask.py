"""One question about one clip, answered from the full cache and from a compressed one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from acckv import KVCompressor
from acckv.config import HeadBudgets
from acckv.data.encoding import encode_context
from acckv.data.media import read_media
from acckv.data.media_options import MediaOptions
from acckv.errors import InputError
from acckv.evaluation.answering import answer_questions
from acckv.evaluation.results import CALIBRATED, with_heads
from acckv.evaluation.sizes import Sizes
from acckv.io.registry import load_plugins
from acckv.models import load_model
from acckv.plugins.answerer import build_compressor, named_policy
from acckv.runtime.session import Prefill, Session

_Made = TypeVar("_Made")


@dataclass(frozen=True)
class AskOptions(MediaOptions):
    """Answer one question about one clip, from the full cache and from a compressed one.

    The clip is compressed before the question is seen.

    Args:
        video: a video, a picture or a sound.
        question: what to ask about it.
        audio: file with the sound, in place of the sound of the video.
        start: seconds of the file at which the clip begins; none is its beginning.
        end: seconds of the file at which the clip ends; none is its end.
        model: the AV-LLM: tiny (packaged), a folder or a hub id.
        compressor: export of a calibration, a folder or a hub id; none takes a training-free policy.
        policy: a training-free policy: its name, or with other options than its defaults
            `{class_path: snapkv, init_args: {window_size: 64}}`. None is acckv-calibrated with a compressor, keydiff
            without.
        ratio: kept share of the audio and video entries, 0 to 1.
        head_budgets: entries of a layer's KV heads: equal, joint (one ranking over all heads) or learned (an export's);
            None is equal, or what the export was calibrated with.
        max_new_tokens: longest answer, in tokens.
        seed: of random eviction.
        dtype: of the model: float32, bfloat16, float16, or auto (what the checkpoint is stored in).
        load_options: of transformers' from_pretrained, such as {revision: main}.
        accelerator: auto, cpu or gpu.
        system_prompt: what the model is told before the clip; none leaves that to its chat template.
        plugins: your own modules or .py files that register policies, families or benchmarks, separated by commas.
    """

    video: str
    question: str
    audio: str | None = None
    start: float | None = None
    end: float | None = None
    model: str = "tiny"
    compressor: str | None = None
    policy: str | dict[str, Any] | None = None
    ratio: float = 0.1
    head_budgets: HeadBudgets | None = None
    max_new_tokens: int = 40
    seed: int = 0
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    load_options: dict[str, Any] | None = None
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    system_prompt: str | None = None
    plugins: list[str] | str = field(default_factory=list)

    def __post_init__(self) -> None:
        load_plugins(self.plugins)
        super().__post_init__()
        if self.system_prompt is not None and not self.system_prompt.strip():
            raise InputError("is blank; leave it out", field="system_prompt")
        if not self.question.strip():
            raise InputError("is empty", field="question")
        if not 0 <= self.ratio <= 1:
            raise InputError(f"{self.ratio:g} is not a number from 0 to 1", field="ratio")
        if self.max_new_tokens < 1:
            raise InputError(f"{self.max_new_tokens} is less than 1", field="max_new_tokens")
        if self.seed < 0:
            raise InputError(f"{self.seed} is less than 0", field="seed")
        if self.policy == CALIBRATED and self.compressor is None:
            raise InputError(f"is missing: the export for {CALIBRATED}", field="compressor")
        if self.policy not in (None, CALIBRATED):
            named_policy(self.policy or "")
            if self.compressor is not None:
                raise InputError(f"is of use only with the policy {CALIBRATED}", field="compressor")


@dataclass(frozen=True)
class Asked:
    """An answer and what it took.

    Attributes:
        text: the answer; cut: whether `max_new_tokens` ended it.
        entries: audio and video entries held, mean over layers; kv_bytes: of all keys and values held.
        compress_seconds, answer_seconds: after the prefill, which both answers share.
    """

    text: str
    cut: bool
    entries: float
    kv_bytes: int
    compress_seconds: float
    answer_seconds: float


def run_ask(options: AskOptions, console: Console | None = None) -> tuple[Asked, Asked]:
    """Print the answer beside that of the full cache, with entries, bytes and times; gives (full, compressed).

    Raises:
        InputError: the clip, the model or the compressor is not usable.
    """
    console = console or Console()
    media = read_media(options.video, audio=options.audio, start=options.start, end=options.end, **options.limits())
    compressor = _compressor(options)
    placed = options.accelerator == "auto" and "device_map" in (options.load_options or {})
    device = None if placed else _device(options.accelerator)
    model, processor = load_model(options.model, options.dtype, device, load_options=options.load_options)
    inputs = encode_context(processor, media, options.system_prompt)

    def asked(session: Session, prefill: Prefill, ratio: float) -> Asked:
        cache, compressing = _timed(lambda: session.compress(prefill, ratio=ratio))
        (((answer,),), answering) = _timed(
            lambda: answer_questions(session, processor, cache, [[options.question]], options.max_new_tokens)
        )
        sizes = Sizes.of(cache)
        return Asked(answer.text, answer.cut, sizes.entries, sizes.kv_bytes, compressing, answering)

    with KVCompressor("full")(model, processor) as session:
        prefill, prefilling = _timed(lambda: session.prefill(**inputs))
        full = asked(session, prefill, 1.0)
    with compressor(model, processor) as session:
        own = session.prefill(**inputs) if session.adapts_prompt else prefill
        compressed = asked(session, own, options.ratio)
    policy = CALIBRATED if options.compressor else compressor.policy.label
    name = with_heads(policy, compressor.planners.default.head_budgets)
    named = {"full cache": full, f"{name} at {options.ratio:g}": compressed}
    for name, one in named.items():
        cut = f" ... (cut: --max_new_tokens {options.max_new_tokens})" if one.cut else ""
        console.print(f"{name}: {one.text}{cut}", markup=False, highlight=False, soft_wrap=True)
    warning = compressor.asked.coverage([options.question]).warning if compressor.asked is not None else None
    if warning is not None:
        console.print(warning, style="bold red", markup=False, highlight=False, soft_wrap=True)
    console.print(_table(named))
    console.print(
        f"saved {1 - compressed.entries / max(full.entries, 1):.1%} of the audio and video entries and "
        f"{1 - compressed.kv_bytes / full.kv_bytes:.1%} of the bytes; prefill of the clip {prefilling:.2f} s",
        highlight=False,
        soft_wrap=True,
    )
    return full, compressed


def _compressor(options: AskOptions) -> KVCompressor:
    name = options.compressor
    if name is not None and not Path(name).exists() and name.count("/") != 1:
        raise InputError("no such folder", source=name, field="compressor")
    policy = (options.policy or "keydiff") if name is None else None
    return build_compressor(name, policy, seed=options.seed, when="context", head_budgets=options.head_budgets)


def _device(accelerator: str) -> str:
    if accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if not torch.cuda.is_available():
        raise InputError("there is no GPU", field="accelerator")
    return "cuda"


def _timed(make: Callable[[], _Made]) -> tuple[_Made, float]:
    """The result of a function, and the seconds that it took."""
    start = time.perf_counter()
    made = make()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return made, time.perf_counter() - start


def _table(named: dict[str, Asked]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("cache", no_wrap=True)
    for name in ("entries", "KV bytes", "compressing", "answering"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, asked in named.items():
        seconds = (f"{asked.compress_seconds:.2f} s", f"{asked.answer_seconds:.2f} s")
        table.add_row(name, f"{asked.entries:.1f}", f"{asked.kv_bytes:,}", *seconds)
    return table
