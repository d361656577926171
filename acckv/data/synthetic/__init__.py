"""Generated clips: their events, what they look and sound like, and the questions about them."""
