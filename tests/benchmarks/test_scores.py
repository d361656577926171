"""Every benchmark's fixture is read whole, and its answers get the scores that were worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import av
import pytest
from hypothesis import given
from hypothesis import strategies as st

from acckv.benchmarks import judge, load_benchmark, score
from acckv.benchmarks.base import Mode
from acckv.data.media import read_media
from acckv.data.records import Record
from tests.benchmarks.scored_by_hand import BY_HAND, CHOICE, OPEN

# Official and robust accuracy over the choices, and the answers that each parser cannot read.
TOTALS = {
    "mvbench": (4 / 10, 7 / 10, {2, 4, 5, 7, 8, 1}, {2}),
    "worldsense": (3 / 5, 4 / 5, {3}, set()),
    "daily_omni": (2 / 5, 4 / 5, {1, 2, 4}, {3}),
    "omnibench": (2 / 5, 5 / 5, {2}, set()),
    "av_odyssey": (3 / 5, 2 / 5, {2}, {2}),
    "video_mme": (4 / 5, 3 / 6, {3}, {3}),  # official: of five answered
}


@pytest.mark.parametrize("name", BY_HAND)
def test_scores_are_those_worked_out_by_hand(name: str, copied: Callable[[str], Path]) -> None:
    records, lines = load_benchmark(name, copied(name)), BY_HAND[name]
    assert [(record.id, record.answer) for record in records] == [(line.id, line.right) for line in lines]
    for record, line in zip(records, lines, strict=True):
        assert score(name, record, line.said) == pytest.approx(line.official), line
        assert score(name, record, line.said, "robust") == pytest.approx(line.robust), line


@pytest.mark.parametrize("name", CHOICE)
def test_totals_are_those_worked_out_by_hand(name: str, copied: Callable[[str], Path]) -> None:
    pairs = list(zip(load_benchmark(name, copied(name)), CHOICE[name], strict=True))
    accuracies, unread = TOTALS[name][:2], TOTALS[name][2:]
    for mode, accuracy, missing in zip(get_args(Mode), accuracies, unread, strict=True):
        verdicts = [judge(name, record, line.said, mode) for record, line in pairs]
        counted = [verdict.score for verdict in verdicts if verdict.counted]
        assert sum(counted) / len(counted) == accuracy
        assert {place for place, verdict in enumerate(verdicts) if not verdict.parsed} == missing


@pytest.mark.parametrize("mode", get_args(Mode))
@pytest.mark.parametrize("name", OPEN)
def test_the_right_answer_is_right_by_both_parsers(name: str, mode: Mode, copied: Callable[[str], Path]) -> None:
    for record in load_benchmark(name, copied(name)):
        verdict = judge(name, record, record.answer, mode)
        assert verdict.score == pytest.approx(1) and verdict.parsed
        assert judge(name, record, "", mode).score == 0


@given(st.one_of(st.text(), st.text("ABCDabcd(). \n")), st.sampled_from("ABCD"))
def test_every_choice_has_a_score_of_zero_or_one(answer: str, right: str) -> None:
    options = ("a dog barks", "The red cat", "Vitamin C", "A man")
    record = Record("1", Path("clip.mp4"), None, "What?", options, right, (), "choice")
    for name in CHOICE:
        official, robust = judge(name, record, answer, "official"), judge(name, record, answer, "robust")
        assert official.score in (0.0, 1.0) and robust.score in (0.0, 1.0)
        assert robust.counted and (robust.parsed or robust.score == 0)
        assert official.counted or (name == "video_mme" and not official.parsed and official.score == 0)


@pytest.mark.parametrize("name", BY_HAND)
def test_the_media_of_a_fixture_can_be_read(name: str, copied: Callable[[str], Path]) -> None:
    files = set()
    for record in load_benchmark(name, copied(name)):
        files |= {record.video, *record.attachments} | ({record.audio} if record.audio else set())
    assert [file.name for file in files if not file.is_file()] == ["0_missing_000010.mp4"] * (name == "avqa")
    for file in filter(Path.is_file, files):
        if file.suffix == ".mp4":
            media = read_media(file)
            assert media.frames is not None and len(media.frames) == 4
            assert (media.audio is None) == (file.name == "01162.mp4")
            assert media.audio is None or float(media.audio.abs().max()) > 0.1
        else:
            with av.open(str(file)) as container:
                assert next(container.decode(container.streams[0])) is not None
