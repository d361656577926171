"""Calibration: the module, its data, and what a run keeps."""
