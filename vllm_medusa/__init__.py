"""Tree speculative decoding with Medusa heads for vLLM, lossless, as a plugin.

Importing this package imports neither torch nor vLLM. What to read, in order:

- `vllm_medusa.config`: our keys of `speculative_config`; - `vllm_medusa.tree`: draft trees, their
layout and their verification, without vLLM; - `vllm_medusa.heads`: Medusa heads and their
checkpoint formats, without vLLM; - `vllm_medusa.draft`: dynamic trees, without vLLM; -
`vllm_medusa.plugin`: the vLLM plugin; beside `vllm_medusa.engines`, which runs vLLM for the tools,
  it is the only folder that imports vLLM.
"""

__version__ = "0.1.0"
