"""Which letter each benchmark's parser finds in an answer.

The values of the official parsers are what the authors' own code returns; where it is found is said beside each table.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acckv.benchmarks.letters import (
    VIDEO_MME_PREFIXES,
    WORLDSENSE_PREFIXES,
    av_odyssey_letter,
    first_capital,
    first_word_matches,
    leading_letter,
    omnibench_letter,
    robust_letter,
)

OPTIONS = ("a dog barks", "The red cat", "Vitamin C", "A man")


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("D", "D"),
        ("d", None),
        ("", None),
        ("(D)", "D"),
        ("The best answer is D", "D"),
        ("Answer: D", "D"),
        ("answer: D", "D"),
        ("ANSWER: D", "A"),  # the phrase is removed in one spelling only
        ("Best answer: D", "B"),  # run together with the next phrase, so never removed
        ("Best option: D", "B"),
        ("The best option is D", "D"),
        ("Because of the music, D", "B"),
        ("Correct: D", "C"),
        ("I do not know", None),
        ("it is the one with the red hat on the left side of the door", None),
        ("it is the one with the red hat on the left side of Dover", "D"),
    ],
)
def test_video_mme_and_worldsense(answer: str, letter: str | None) -> None:
    """`extract_characters_regex` of github.com/thanku-all/parse_answer, eval_your_results.py (23 June 2024), and of
    VLMEvalKit, vlmeval/dataset/utils/worldsense.py, which has two phrases less and gives the same."""
    assert first_capital(answer, VIDEO_MME_PREFIXES) == letter
    assert first_capital(answer, WORLDSENSE_PREFIXES) == letter


def test_phrases_that_lack_a_comma_are_one_phrase() -> None:
    assert first_capital("Best answer:Best option: D", VIDEO_MME_PREFIXES) == "D"
    assert first_capital("Best answer: Best option: D", VIDEO_MME_PREFIXES) == "B"


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        (" b.", "B"),
        ("B. The red cat", "B"),
        ("Dogs bark", "D"),
        ("and so on", "A"),
        ("(B)", None),
        ("The answer is B", None),
        ("", None),
        ("assistant\nC", "C"),
        ("A. Ask an assistant\nD", "D"),
        ("B, my assistant", None),
    ],
)
def test_daily_omni(answer: str, letter: str | None) -> None:
    """`test_all_questions` of github.com/Lliar-liar/Daily-Omni, test_model/Qwen2.5-Omni/testmodel.py."""
    assert leading_letter(answer) == letter


@pytest.mark.parametrize(
    ("answer", "right_for"),
    [
        ("B", "B"),
        ("b.", "B"),
        ("(B) The red cat", "B"),
        ("((B)", "B"),
        ("B) The red cat", "B"),
        ("B\nA", "B"),
        ("B\tor C", ""),
        ("B: The red cat", ""),
        ("Answer: (B)", ""),
        ("The answer is B", ""),
        ("(A)or(B)", "AB"),
        ("", "ABCD"),
        (" . ", "ABCD"),
        ("(", "ABCD"),
    ],
)
def test_mvbench(answer: str, right_for: str) -> None:
    """`check_ans` of github.com/OpenGVLab/Ask-Anything, video_chat2/mvbench.ipynb, on the first line."""
    assert "".join(letter for letter in "ABCD" if first_word_matches(answer, letter)) == right_for


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("(B) or (C)", "C"),
        ("(C), not (B)", "B"),
        ("Answer: D", "D"),
        ("B.", "B"),
        ("B: cat", None),
        ("B, C", "C"),
        ("B. cat C. vitamin", "B"),  # neither stands alone, so the first option
        ("NASA did", "A"),
        ("NASA did D", "D"),
        ("The red cat", None),  # no more than five words
        ("I think that it was the red cat", "B"),
        ("the red cat and then a dog barks", "A"),
        ("b", None),
        ("", None),
    ],
)
def test_omnibench(answer: str, letter: str | None) -> None:
    """`parse_multi_choice_response` of github.com/multimodal-art-projection/OmniBench, inference/answer_parsing.py,
    called with `default_answer="N/A"` (None here)."""
    assert omnibench_letter(answer, OPTIONS) == letter


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("D", "D"),
        ("'D.'", "D"),
        ("Answer: D", "A"),  # the A of "Answer"
        ("The answer is D", "D"),
        ("(D)", "D"),
        ("A or (D)", "D"),
        ("Both, so D", "B"),
        ("Correct", "C"),
        ("I think that it was the red cat", "B"),
        ("the red cat", None),
        ("", None),
    ],
)
def test_av_odyssey(answer: str, letter: str | None) -> None:
    """`parse_multi_choice_response` of github.com/AV-Odyssey/AV-Odyssey, evaluation.py; None here is "A" there."""
    assert av_odyssey_letter(answer, OPTIONS) == letter


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("**(b)**", "B"),
        ("B.", "B"),
        ("B: The red cat", "B"),
        ("(B) The red cat", "B"),
        ("Answer: D", "D"),
        ("Best answer: D", "D"),
        ("The answer is (B).", "B"),
        ("**Answer:** C", "C"),
        ("The correct option is: B", "B"),
        ("I think option B is wrong, the answer is C", "C"),
        ("The answer is A. No: the answer is D.", "D"),
        ("answer: C because A is wrong", "C"),
        ("Because of the noise, D", "D"),
        ("It's not A, it's B", "B"),
        ("A dog barks", "A"),  # a text, not a letter
        ("Answer: A dog barks", "A"),
        ("A man", "D"),
        ("A man and a dog", "D"),
        ("A is right", "A"),
        ("Vitamin C.", "C"),
        ("It shows the red cat on a roof", "B"),
        ("A man and the red cat", None),  # two options
        ("<think>A or B</think> C", "C"),
        ("A <answer>D</answer>", "D"),
        ("<answer>the red cat</answer>", "B"),
        ("Dogs bark", None),
        ("D'accord", None),
        ("E", None),
        ("NASA", None),
        ("I do not know", None),
        ("", None),
    ],
)
def test_robust(answer: str, letter: str | None) -> None:
    assert robust_letter(answer, OPTIONS) == letter


def test_robust_knows_the_number_of_options() -> None:
    assert robust_letter("E", ("1", "2", "3", "4", "5")) == "E"
    assert robust_letter("The answer is C, or else B", ("yes", "no")) == "B"
    assert robust_letter("A", ()) is None


PIECES = [*"ABCDabcd(). :\n'*", "answer is", "<answer>", "</answer>", "</think>", "assistant", "option", *OPTIONS]
TEXTS = st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=12).map(" ".join))
CHOICES = st.one_of(st.just(OPTIONS), st.lists(st.text(max_size=8), max_size=8).map(tuple))


@given(TEXTS, CHOICES)
def test_any_text_is_parsed_to_a_letter_of_an_option_or_none(answer: str, options: tuple[str, ...]) -> None:
    letters = [*"ABCDEFGH"[: len(options)], None]
    assert robust_letter(answer, options) in letters
    assert omnibench_letter(answer, options) in letters
    assert av_odyssey_letter(answer, options) in letters
    assert first_capital(answer, VIDEO_MME_PREFIXES) in [*"ABCD", None]
    assert leading_letter(answer) in [*"ABCD", None]
    assert first_word_matches(answer, "A") in (True, False)
