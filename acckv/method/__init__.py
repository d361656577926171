"""The paper's steps as functions of tensors; no model, cache or configuration."""
