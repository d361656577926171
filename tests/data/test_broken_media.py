"""A hundred broken and odd files: a right clip or an error that names the file, in little time and memory."""

from __future__ import annotations

import pytest

from tests.data.broken_media import SECONDS_PER_FILE, Case, Outcome, make, read_all
from tests.data.media_files import EARLIER_FFMPEG, GREYS


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Case, Outcome]]:
    folder = tmp_path_factory.mktemp("broken")
    cases = make(folder)
    return list(zip(cases, read_all(folder, [case.name for case in cases]), strict=True))


@pytest.mark.skipif(EARLIER_FFMPEG, reason="PyAV before 18 ends the process at a whole FLV file")
def test_each_is_read_or_refused(results: list[tuple[Case, Outcome]]) -> None:
    assert len(results) >= 50
    assert [case.name for case, _ in results] == [outcome.name for _, outcome in results]
    for case, outcome in results:
        assert outcome.died is None, f"{case.name}: {outcome.died}"
        assert outcome.seconds < SECONDS_PER_FILE and outcome.megabytes < 200, outcome
        if outcome.error is not None:
            assert case.must != "clip", outcome.error
            assert f"/{case.name}: " in outcome.error and len(outcome.error.splitlines()) == 1
        else:
            assert case.must != "error", f"{case.name} was read: {outcome.text}"


def test_clips_are_whole_and_right(results: list[tuple[Case, Outcome]]) -> None:
    for case, outcome in results:
        clip = outcome.clip
        if clip is None:
            continue
        frames, samples = clip["frames"], clip["samples"]
        assert clip["finite"], case.name
        if case.must == "clip" or case.shows:
            assert clip["kind"] == case.kind, case.name
        assert len(frames) % 2 == 0, case.name
        if case.must == "clip" or len(frames) > 2:  # the sound of a single picture is as long as it is
            assert not frames or samples in (None, len(frames) * 8_000), case.name
        if case.seconds is not None:
            assert len(frames) == 2 * case.seconds, case.name
        if case.must == "clip" and samples is not None:
            assert clip["onset"] == pytest.approx(1.5, abs=0.1), case.name
        if case.shows:
            count = len(frames) if case.must == "clip" else len(frames) - 2
            middles = frames[1:count:2]  # half a second into each grey: FFmpeg reads pictures of an AVI one too late
            assert middles == pytest.approx(GREYS[: len(middles)], abs=6), case.name


def test_what_is_refused_has_a_reason(results: list[tuple[Case, Outcome]]) -> None:
    errors = {case.name: outcome.error or "" for case, outcome in results}
    assert "it is empty" in errors["empty.mp4"]
    assert "not a readable media file" in errors["text.mp4"]
    assert "no picture could be decoded" in errors["wide.png"]
    assert "max_seconds=600" in errors["jump.mkv"]
