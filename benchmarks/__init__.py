"""Timings, run by hand and never asserted: every figure is a ratio measured inside one run."""
