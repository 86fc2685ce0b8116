"""Training of Medusa heads on a frozen target (Medusa-1). No vLLM here."""
