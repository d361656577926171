"""Media files, generated clips, benchmark loaders, and their way into model inputs."""
