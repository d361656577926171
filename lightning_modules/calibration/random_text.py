"""Questions of random words, which need no label: what they read of a clip stands for what any question may read."""

from __future__ import annotations

from typing import Any

import numpy as np

from acckv.data.batching import Question
from acckv.data.encoding import question_suffix
from acckv.errors import InputError

#: Questions about each clip, and words of each.
QUESTIONS, WORDS = 16, 6
#: By which tokenizers mark the start of a word.
MARKS = "\u0120\u2581"


class RandomText:
    """Draws questions out of a vocabulary's words, in the chat template of real ones.

    Args:
        processor: of the model; seed: of the draws.

    Raises:
        InputError: the vocabulary has no word.
    """

    def __init__(self, processor: Any, seed: int) -> None:
        self.processor, self.seed = processor, seed
        tokens = (token.lstrip(MARKS) for token in processor.tokenizer.get_vocab())
        self.words = sorted({token for token in tokens if token.isalpha()})
        if not self.words:
            raise InputError("is 'random_text', and the vocabulary has no word", field="model.general_by")

    def questions(self, clip: int) -> list[Question]:
        """The questions about a clip: all their tokens count, and nothing follows."""
        generator = np.random.default_rng((self.seed, clip, QUESTIONS))
        texts = (" ".join(generator.choice(self.words, WORDS)) + "?" for _ in range(QUESTIONS))
        # The last token predicts how an answer begins: one more behind it, which is never read, lets it count.
        return [Question((*question_suffix(self.processor, text).tolist(), 0), 0) for text in texts]
