"""One function answers: uneven questions, prompts with their question, and inputs that come from another device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from acckv import KVCompressor
from acckv.data.encoding import encode, encode_context
from acckv.data.media import read_media
from acckv.evaluation.answering import answer_prompts, answer_questions
from acckv.evaluation.sizes import Sizes
from acckv.models import load_model
from acckv.models.clips import Media
from acckv.plugins.answerer import Answerer
from acckv.plugins.requests import ClipRef, Generation
from tests.data.media_files import burst, write_video
from tests.support.simulated_accelerator import SimulatedAccelerator, place

pytestmark = pytest.mark.usefixtures("matrix_attention")

QUESTIONS = ["What colour was the ring?", "Which shape was seen first?", "How many sounds were there?"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("clips")
    for number, grey in enumerate((40, 160)):
        write_video(folder / f"{number}.mp4", [k / 2 for k in range(8)], [grey] * 8, burst(4, 1.0 + number)[None])
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def clips(files: list[Path]) -> list[Media]:
    return [read_media(file) for file in files]


def compressor(when: Any = "context") -> KVCompressor:
    return KVCompressor("keydiff", ratio=0.2, when=when)


def test_uneven_questions_about_two_clips_are_answered_as_alone(clips: list[Media]) -> None:
    model, processor = load_model("tiny")
    asked = [QUESTIONS[:1], QUESTIONS]
    with compressor()(model, processor) as session:
        both = session.compress(**encode(processor, clips))
        found = answer_questions(session, processor, both, asked, 5)
        alone = [session.compress(**encode_context(processor, clip)) for clip in clips]
        single = [
            [answer_questions(session, processor, cache, [[question]], 5)[0][0] for question in questions]
            for cache, questions in zip(alone, asked, strict=True)
        ]
    assert found == single and [len(own) for own in found] == [1, 3]
    assert Sizes.of(both) == Sizes.of(alone[0]) + Sizes.of(alone[1])
    assert Sizes.of(both).ratio == pytest.approx(0.2, abs=0.01) and Sizes().ratio == 1.0


def test_another_device_answers_as_the_cpu(clips: list[Media], files: list[Path]) -> None:
    """Inputs come from the CPU; what stays there by mistake would mix devices, which is refused."""
    model, processor = load_model("tiny")
    generation = Generation(max_new_tokens=3)

    def answers() -> list[Any]:
        with compressor()(model, processor) as session:
            cache = session.compress(**encode(processor, clips))
            found: list[Any] = [answer_questions(session, processor, cache, [QUESTIONS[:1], QUESTIONS[:2]], 3)]
        with compressor("prompt")(model, processor) as session:
            prefill = session.prefill(**encode(processor, clips, QUESTIONS[:2]))
            found.append(answer_prompts(session, processor, prefill, session.compress(prefill), 3))
        for when in ("context", "prompt"):
            answerer = Answerer(model, processor, compressor(when))
            found.append(answerer.answer((ClipRef(files[0]),), QUESTIONS[:1], generation))
            found += answerer.losses((ClipRef(files[0]),), QUESTIONS[0], ["red"])
        return [*found, answerer.answer((), QUESTIONS[:1], generation)]

    expected = answers()
    with SimulatedAccelerator() as accelerator:
        place(model)
        found = answers()
    assert accelerator.launches > 100
    for one, other in zip(found, expected, strict=True):
        assert one == (pytest.approx(other, abs=1e-3) if isinstance(other, tuple) else other)
