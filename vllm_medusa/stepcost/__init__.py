"""What a step of the engine costs: measuring, table, curve."""
