"""Reading and writing checkpoints of heads."""
