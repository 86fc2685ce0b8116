"""`vllm-medusa distill`: a model's own answers as training data."""
