"""Answers to the questions of the fixtures, scored by hand from the official rules."""

from __future__ import annotations

from typing import NamedTuple


class Scored(NamedTuple):
    """The right answer to a question, what a model says, and its score by both parsers."""

    id: str
    right: str
    said: str
    official: float
    robust: float


_CHOICE: dict[str, list[tuple[str, str, str, float, float]]] = {
    "mvbench": [
        ("action_sequence/0", "B", "(B) The green square.", 1, 1),
        ("action_prediction/0", "B", "Answer: (B)", 0, 1),
        ("unexpected_action/0", "A", "", 1, 0),
        ("object_interaction/0", "B", "B.", 1, 1),
        ("object_shuffle/0", "B", "Left.", 0, 0),
        ("action_localization/0", "B", "At the end.", 0, 1),
        ("scene_transition/0", "B", "A", 0, 0),
        ("action_count/0", "B", "1", 0, 1),
        ("state_change/0", "C", "The answer is C.", 0, 1),
        ("character_order/0", "A", "A\nbecause", 1, 1),
    ],
    "worldsense": [
        ("aJxSquRe/task0", "A", "Because it is red.", 0, 1),
        ("aJxSquRe/task1", "C", "The best answer is C.", 1, 1),
        ("aJxSquRe/task2", "B", "Best answer: D", 1, 0),
        ("kQb2Wz9T/task0", "A", "red", 0, 1),
        ("kQb2Wz9T/task1", "D", "D", 1, 1),
    ],
    "daily_omni": [
        ("0", "A", "A", 1, 1),
        ("1", "B", "The answer is B", 0, 1),
        ("2", "C", "(C)", 0, 1),
        ("3", "D", "Dogs", 1, 0),
        ("4", "A", "<think>B or C</think><answer>A</answer>", 0, 1),
    ],
    "omnibench": [
        ("0", "A", "Answer: A", 1, 1),
        ("1", "B", "B: A green square", 0, 1),
        ("2", "B", "Humming.", 0, 1),
        ("3", "D", "I am quite sure that it is vitamin a. in fact", 1, 1),
        ("4", "C", "NASA is in silence.", 0, 1),
    ],
    "av_odyssey": [
        ("1_0", "A", "Answer: D", 1, 0),
        ("1_1", "B", "(B)", 1, 1),
        ("9_0", "A", "", 1, 0),
        ("26_4", "D", "it cannot be said at all from it", 0, 1),  # the "no" of "cannot"
        ("3_7", "A", "No, B", 0, 0),
    ],
    "video_mme": [
        ("001-1", "A", "A. Red.", 1, 1),
        ("001-2", "B", "Answer: B", 1, 1),
        ("301-1", "C", "Correct: A", 1, 0),
        ("301-2", "A", "unknown", 0, 0),
        ("601-1", "B", "Because of green", 1, 1),
        ("601-2", "C", "The best option is D", 0, 0),
    ],
}
_OPEN: dict[str, list[tuple[str, str, str, float, float]]] = {
    "music_avqa": [
        ("50", "left", "Left. ", 1, 1),
        ("51", "two", "There are two.", 0, 1),
        ("51-2", "four", "two", 0, 0),
        ("52", "yes", "I cannot tell", 0, 0),
        ("54", "more than ten", "More than ten", 1, 1),
        ("55", "acoustic_guitar", "acoustic guitar", 0, 1),
    ],
    "avqa": [
        ("183", "B", "B", 1, 1),
        ("184", "A", "The answer is (A), the engine.", 0, 1),
        ("185", "D", "room", 1, 1),
        ("190", "C", "A dog that plays wants to play.", 0, 1),
        ("191", "B", "Hard to say", 0, 0),
    ],
    "avhbench": [
        ("00191-0", "yes", "Yes, he snores.", 1, 1),
        ("00191-1", "no", "The answer is no.", 0, 1),
        ("00191-2", "yes", "no", 0, 0),
        ("00191-3", "no", "Nobody walks there", 0, 0),
        ("00191-4", "yes", "YES", 1, 1),
        ("01162-5", "no", "yes", 0, 0),
        # 3 common words in order, of 5 given and 10 right: 2.44 P R / (R + 1.44 P) with P = 3/5 and R = 3/10
        ("01162-6", "A man is laying in bed, with a person snoring.", "a man sleeps in there", 0.3773196, 0.3773196),
    ],
    "avsd": [
        # all 4 words of the third reference, of 5 given: P = 4/5, R = 1
        ("CGRUM_2", "i hear no audio", "no , he is surely silent", 0.9070632, 0.9070632),
        ("7UPGT_1", "on the sofa .", "On the sofa!", 1, 1),
    ],
    "custom": [
        ("0", "B", "It is a dog", 0, 1),
        ("matching", "yes", "Yes", 1, 1),
        ("2", "left", "to the left", 0, 1),
        ("3", "a dog runs", "the dog is running", 1, 1),
        ("4", "red green blue", "red blue blue", 2 / 3, 2 / 3),
        ("5", "A", "(B)", 0, 0),
    ],
}
CHOICE, OPEN = ({name: [Scored(*line) for line in lines] for name, lines in each.items()} for each in (_CHOICE, _OPEN))
"""Of multiple choice and of free answers: the questions of each benchmark, in file order."""
BY_HAND = CHOICE | OPEN
