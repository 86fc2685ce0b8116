"""Tree speculative decoding with Medusa heads for vLLM, lossless, as a plugin.

Importing this package imports neither torch nor vLLM. What to read, in order:

- `vllm_medusa.config`: the keys of a speculative config that are ours;
- `vllm_medusa.tree`: draft trees, their layout and their verification, pure torch;
- `vllm_medusa.heads`: Medusa heads and their checkpoint formats, pure torch;
- `vllm_medusa.engine`: the plugin itself, the only folder that imports vLLM.
"""

__version__ = "0.1.0"
