"""Medusa heads: reading and writing checkpoints, and computing with them. No vLLM here."""

from vllm_medusa.heads.checkpoint import HeadsCheckpoint, HeadsSpec, load_heads
from vllm_medusa.heads.module import MedusaHeads, head_logits

__all__ = [
    "HeadsCheckpoint",
    "HeadsSpec",
    "MedusaHeads",
    "head_logits",
    "load_heads",
]
