"""All that touches a running model: its attention, its hooks, and the session that compresses its cache."""
