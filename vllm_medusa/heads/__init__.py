"""Medusa heads: reading and writing checkpoints, and computing with them. No vLLM here."""

from vllm_medusa.heads.checkpoint import HeadsCheckpoint, HeadsSpec
from vllm_medusa.heads.module import MedusaHeads, head_logits
from vllm_medusa.heads.reader import HeadsReader, load_heads

__all__ = [
    "HeadsCheckpoint",
    "HeadsReader",
    "HeadsSpec",
    "MedusaHeads",
    "head_logits",
    "load_heads",
]
