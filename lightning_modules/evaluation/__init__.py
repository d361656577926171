"""Evaluation: the module, its data, and the run from options to report."""
