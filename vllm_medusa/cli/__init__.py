"""The sub-commands of `vllm-medusa`, one module each."""
