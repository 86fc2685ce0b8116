"""The vLLM plugin: beside `engines`, the only folder that imports vLLM."""
