"""Output of all tools: tables, plots, provenance, progress."""
