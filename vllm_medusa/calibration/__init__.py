"""Choosing draft trees from measurements: joint path statistics, tree search, cost model."""
