"""The embedded AV-LLM: how it is built and trained."""
