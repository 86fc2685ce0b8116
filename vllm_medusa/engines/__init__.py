"""Processes that run vLLM for our tools: one supervisor, one protocol."""
