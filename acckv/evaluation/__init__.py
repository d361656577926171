"""An evaluation without Lightning: its set-up, its journal, its results and their scores."""
