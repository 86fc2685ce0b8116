"""Where candidates come from: one file for each source."""
