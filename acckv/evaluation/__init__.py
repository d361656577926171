"""An evaluation without Lightning: answering, the run's configuration, its journal, its scores and its results."""
