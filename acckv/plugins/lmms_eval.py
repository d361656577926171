"""The model `acckv` of lmms-eval: an AV-LLM that hears its clips and answers from compressed caches.

    lmms-eval --model acckv --model_args pretrained=tiny,compressor=runs/calib/export,ratio=0.1 --tasks worldsense

`pip install "acckv[lmms]"` brings lmms-eval and registers the model. lmms-eval needs `av<16`, which acckv works with
too; nothing else conflicts.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from loguru import logger
from tqdm import tqdm

from acckv.data.media_options import MediaOptions
from acckv.errors import InputError
from acckv.models import load_model
from acckv.plugins.answerer import Answerer, build_compressor
from acckv.plugins.media_store import MediaStore
from acckv.plugins.requests import Generation, Prompt, read_prompt


class Acckv(lmms):  # type: ignore[misc]
    """The model of `--model acckv`: tasks that generate, given as chat messages.

    Args:
        pretrained: the AV-LLM: tiny (packaged), a folder or a hub id.
        compressor: export of a calibration, a folder or a hub id. Without it and `policy` the full cache answers.
        policy: a training-free policy instead: its name, or with other options than its defaults
            `{class_path: snapkv, init_args: {window_size: 64}}`.
        ratio: kept share of the audio and video entries; budget: kept entries a layer instead.
        when: context (compress before any question is seen) or prompt (after the whole prompt).
        head_budgets: entries of a layer's KV heads: equal, joint (one ranking over all heads) or learned (an export's).
        seed: of the random policy.
        dtype: float32, bfloat16 or float16; attn_implementation: sdpa or eager.
        system_prompt: what the model is told before the media, where a task says nothing itself.
        sound: False leaves out the sound of the videos, not sounds of their own.
        device: None is this process's GPU where there is one, else the CPU.
        batch_size: questions about one clip that are answered together.
        max_batch_size: of lmms-eval; not used.
        media: fps, max_pixels: frames a second, and pixels a frame at most, that are read; max_frames: of a file,
            evenly; max_seconds: longest clip; cut_long: a longer one is cut, not refused.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "tiny",
        compressor: str | None = None,
        policy: str | dict[str, Any] | None = None,
        ratio: float | None = None,
        budget: int | None = None,
        when: str | None = None,
        head_budgets: str | None = None,
        seed: int = 0,
        dtype: str = "float32",
        attn_implementation: str = "sdpa",
        system_prompt: str | None = None,
        sound: bool = True,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **media: Any,
    ) -> None:
        super().__init__()
        for name in media.keys() - MediaOptions().limits().keys():
            raise InputError("is no argument of the model acckv", source="--model_args", field=name)
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise InputError(f"{batch_size!r} is not a whole number of at least 1", field="batch_size")
        self._rank, self._world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.batch_size = int(batch_size)
        self.device = torch.device(device or _own_device())
        shared = {"ratio": ratio, "budget": budget, "when": when, "head_budgets": head_budgets}
        kept = build_compressor(compressor, policy, seed=seed, **shared)
        model, processor = load_model(pretrained, dtype, str(self.device), attn_implementation)
        self._warned: set[str] = set()
        self._folder = tempfile.TemporaryDirectory(prefix="acckv-")
        self.store = MediaStore(Path(self._folder.name))
        self.answerer = Answerer(model, processor, kept, media=MediaOptions(**media), sound=sound)
        self.system_prompt = system_prompt

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """One answer a request, in their order."""
        asked = ((self._prompt(request), self._generation(request)) for request in requests)
        answers: list[str] = []
        with self._progress(requests) as bar:
            for (clip, system, generation), group in groupby(
                asked, key=lambda pair: (pair[0].media, self._system(pair[0]), pair[1])
            ):
                while batch := [prompt.text for prompt, _ in islice(group, self.batch_size)]:
                    answers += self.answerer.answer(clip, batch, generation, system)
                    bar.update(len(batch))
        self._log_sizes()
        return answers

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """The answers of all rounds of each request; the task says what is asked next, and when it is over."""
        answers = []
        for request in self._progress(requests):
            _, doc_to_messages, _, _, task, _ = request.args
            generation, document = self._generation(request), self._document(request)
            rounds: list[str] = []
            messages, information = doc_to_messages(document), None
            while messages is not None:
                prompt = read_prompt(messages, task, self.store)
                rounds += self.answerer.answer(prompt.media, [prompt.text], generation, self._system(prompt))
                following = doc_to_messages(
                    document, round_idx=len(rounds), previous_output=list(rounds), previous_round_info=information
                )
                if not isinstance(following, tuple) or len(following) != 4:
                    message = "must return (messages, over, outputs, information) for a round"
                    raise InputError(message, source=task, field="doc_to_messages")
                messages, over, _, information = following
                messages = None if over else messages
            answers.append(rounds)
        self._log_sizes()
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """lmms-eval asks simple models alone for likelihoods."""
        raise NotImplementedError("likelihoods are asked of simple models: run lmms-eval with --force_simple")

    # ------------------------------------------------------------------ inside

    def _system(self, prompt: Prompt) -> str | None:
        return self.system_prompt if prompt.system is None else prompt.system

    def _document(self, request: Instance) -> Any:
        *_, number, task, split = request.args
        return self.task_dict[task][split][number]

    def _prompt(self, request: Instance) -> Prompt:
        _, doc_to_messages, _, _, task, _ = request.args
        return read_prompt(doc_to_messages(self._document(request)), task, self.store)

    def _generation(self, request: Instance) -> Generation:
        generation, unused = Generation.read(request.args[1 if self.is_simple else 2])
        for name in sorted(unused - self._warned):
            logger.warning(f"acckv makes no use of the generation option {name}")
        self._warned |= unused
        return generation

    def _progress(self, requests: Iterable[Instance]) -> tqdm:
        return tqdm(requests, disable=self.rank != 0, desc="acckv")

    def _log_sizes(self) -> None:
        sizes = self.answerer.sizes
        logger.info(f"acckv kept {sizes.ratio:.2%} of the audio and video entries of {sizes.prompts} caches")
        if self.answerer.cut:
            logger.warning(f"{self.answerer.cut} answers were ended by the task's max_new_tokens, not by the model")


class AcckvSimple(Acckv):
    """The model of `--model acckv --force_simple`: multiple choice by likelihood, and tasks without chat messages."""

    is_simple = True

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """Rounds need chat messages."""
        raise NotImplementedError("rounds are asked of chat models: run lmms-eval without --force_simple")

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Mean negative log-likelihood a token of each continuation, and whether greedy search would give it.

        lmms-eval takes the choice with the smallest number, so its models return losses. A plain pair would be made
        a text on its way to the task (0.7.3), hence the wrapping. Its `--use_cache` cannot store these.
        """
        results: list[GenerationResult] = []
        with self._progress(requests) as bar:
            asked = ((self._prompt(request), self._continuation(request)) for request in requests)
            for prompt, group in groupby(asked, key=lambda pair: pair[0]):
                while batch := [continuation for _, continuation in islice(group, self.batch_size)]:
                    results += map(
                        GenerationResult, self.answerer.losses(prompt.media, prompt.text, batch, self._system(prompt))
                    )
                    bar.update(len(batch))
        self._log_sizes()
        return results

    def _prompt(self, request: Instance) -> Prompt:
        context, _, doc_to_visual, _, task, _ = request.args
        visuals: Sequence[Any] = doc_to_visual(self._document(request)) or []
        parts = [*({"type": "video", "url": visual} for visual in visuals), {"type": "text", "text": context}]
        return read_prompt([{"role": "user", "content": parts}], task, self.store)

    def _continuation(self, request: Instance) -> str:
        target = request.args[1]
        return target(self._document(request)) if callable(target) else target


def _own_device() -> str:
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
