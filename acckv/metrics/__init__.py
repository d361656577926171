"""Numbers from answers: accuracy, words, captions, yes/no questions, and intervals."""
