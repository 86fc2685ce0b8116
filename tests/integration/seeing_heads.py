"""Heads that see tokens or have a selector, made of the demo's: a little worse than they.

What they see changes many drafts, and most are still right.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.integration.command_line import DEMO_MODEL, MEDUSA_HEADS
from tests.oracles import heads as oracle
from vllm_medusa.heads import HeadsCheckpoint, load_heads
from vllm_medusa.heads.io.write import save_heads

RANK, WINDOW = 8, 24


def seeing_tensors(checkpoint: HeadsCheckpoint, vocab_size: int) -> dict[str, torch.Tensor]:
    """Random tensors, by canonical name.

    They are those of root-aware heads, a selector of rank `RANK`, and prefix attention over
    `WINDOW` positions.
    """
    generator = torch.Generator().manual_seed(7)
    spec = checkpoint.spec

    def random(*shape: int, scale: float) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    return {
        "root.weight": random(spec.num_heads, spec.hidden_size, spec.hidden_size, scale=0.05),
        "selector.parent": random(vocab_size, RANK, scale=1.0),
        "selector.child": random(vocab_size, RANK, scale=0.15),
        "selector.depth": 1 + random(spec.num_heads, RANK, scale=0.2),
        "prefix.query": random(spec.hidden_size, 2 * spec.hidden_size, scale=0.1),
        "prefix.key_value": random(2, spec.hidden_size, 2 * spec.hidden_size, scale=0.1),
        "prefix.output": random(spec.hidden_size, spec.hidden_size, scale=0.03),
        "prefix.bias": random(spec.hidden_size // 64, WINDOW, scale=1.0),
    }


def write_seeing_heads(
    out: Path,
    *,
    has_root: bool = True,
    has_selector: bool = True,
    has_prefix: bool = False,
    with_trees: bool = True,
) -> Path:
    """Write the demo's heads with some of the three."""
    demo = load_heads(MEDUSA_HEADS, target_vocab_size=4096)
    kinds = {"root": has_root, "selector": has_selector, "prefix": has_prefix}
    tensors = {
        name: tensor.to(demo.spec.dtype)
        for name, tensor in seeing_tensors(demo, 4096).items()
        if kinds[name.partition(".")[0]]
    }
    spec = dataclasses.replace(
        demo.spec,
        root_size=demo.spec.hidden_size if has_root or has_prefix else None,
        selector_rank=RANK if has_selector else None,
        prefix_window=WINDOW if has_prefix else None,
    )
    heads = dataclasses.replace(demo, spec=spec, tensors=demo.tensors | tensors)
    if not with_trees:
        heads = dataclasses.replace(heads, tree_paths=None, tree_schedule=None)
    save_heads(heads, out)
    return out


class SlowHeads:
    """Heads of the demo's model, by the oracle in float32.

    Args:
        path: where they are.

    Attributes:
        checkpoint: the heads.

    """

    def __init__(self, path: Path) -> None:
        heads = load_heads(path, target_vocab_size=4096)
        tensors = {name: tensor.float() for name, tensor in heads.tensors.items()}
        self.checkpoint = dataclasses.replace(heads, tensors=tensors)
        model = load_file(DEMO_MODEL / "model.safetensors")
        self._embedding = model["model.embed_tokens.weight"].float()

    def logits(self, hidden: Tensor, root: int) -> Tensor:
        """[K, V] of one request, from its hidden state [H] and root."""
        is_aware = "root.weight" in self.checkpoint.tensors
        seen = self._embedding[root][None] if is_aware else None
        # A copy that is no inference tensor.
        features = oracle.features(self.checkpoint, torch.tensor([hidden.tolist()]), seen)
        return oracle.logits(self.checkpoint, features, self._embedding)[:, 0]
