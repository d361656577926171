"""The compressed KV cache and its layers."""
