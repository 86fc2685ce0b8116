"""What runs in vLLM's workers, for both model runners."""
