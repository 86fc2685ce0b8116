"""Prompts, and the rows of token ids that the heads are trained and calibrated on."""
