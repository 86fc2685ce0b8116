"""The vLLM plugin: the only room, beside `engines`, that imports vLLM."""
