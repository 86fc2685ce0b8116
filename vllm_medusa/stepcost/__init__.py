"""Step costs of the engine: measuring, table, stages."""
