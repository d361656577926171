"""The commands: train, evaluate, ask."""
