"""What all tools print, draw and note: tables, plots, provenance, progress."""
