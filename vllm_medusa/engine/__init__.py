"""Everything that touches vLLM; the only folder that imports it."""
