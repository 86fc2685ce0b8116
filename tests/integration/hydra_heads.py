"""Hydra heads made of the demo's Medusa heads: a little worse than they.

What they see of the path changes many drafts, and most are still right.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.checkpoints import write_hydra
from tests.integration.command_line import DEMO_MODEL, MEDUSA_HEADS
from tests.oracles import heads as oracle
from vllm_medusa.heads import HeadsCheckpoint, load_heads
from vllm_medusa.heads.io.write import save_heads

VOCAB_SIZE = 4096


def _embedding() -> Tensor:
    return load_file(DEMO_MODEL / "model.safetensors")["model.embed_tokens.weight"].float()


def hydra_of_demo() -> HeadsCheckpoint:
    """The demo's Medusa heads, with random matrices for the tokens of the path."""
    demo = load_heads(MEDUSA_HEADS, target_vocab_size=VOCAB_SIZE)
    spec, generator = demo.spec, torch.Generator().manual_seed(7)
    size = spec.hidden_size
    tensors = {}
    for head in range(spec.num_heads):
        weight = torch.randn(2, size, size * (head + 2), generator=generator) * 0.03
        weight[0, :, :size] = demo.tensors["blocks.weight"][head, 0]
        weight[1, :, :size] = torch.eye(size)
        bias = torch.zeros(2, size)
        bias[0] = demo.tensors["blocks.bias"][head, 0]
        tensors[f"hydra.{head}.weight"], tensors[f"hydra.{head}.bias"] = weight, bias
    if spec.num_layers > 1:
        for kind in ("weight", "bias"):
            tensors[f"blocks.{kind}"] = demo.tensors[f"blocks.{kind}"][:, 1:].contiguous()
    tensors = {name: tensor.to(spec.dtype) for name, tensor in tensors.items()}
    spec = dataclasses.replace(spec, kind="hydra", root_size=size, source_format="native")
    return HeadsCheckpoint(spec, tensors, tree_paths=demo.tree_paths)


def write_native_hydra(out: Path) -> Path:
    """In our own format, with the target's lm_head."""
    save_heads(hydra_of_demo(), out)
    return out


def write_published_hydra(out: Path) -> Path:
    """As the authors publish them: with lm_heads of their own, and biases of these."""
    heads = hydra_of_demo()
    lm_heads = _embedding().expand(heads.spec.num_heads, -1, -1)
    biases = torch.randn(lm_heads.shape[:2], generator=torch.Generator().manual_seed(3)) * 0.3
    own = {"lm_head.weight": lm_heads, "lm_head.bias": biases}
    own = {name: tensor.to(heads.spec.dtype) for name, tensor in own.items()}
    return write_hydra(out, dataclasses.replace(heads, tensors=heads.tensors | own))


class SlowHydra:
    """Hydra heads of the demo's model, by the oracle in float32.

    Args:
        path: where they are.

    """

    def __init__(self, path: Path) -> None:
        heads = load_heads(path, target_vocab_size=VOCAB_SIZE)
        tensors = {name: tensor.float() for name, tensor in heads.tensors.items()}
        self._heads = dataclasses.replace(heads, tensors=tensors)
        self._embedding = _embedding()

    def logits(self, hidden: Tensor, tokens: list[int]) -> Tensor:
        """[V] of what follows a path, whose tokens begin with the root."""
        head = len(tokens) - 1
        seen = self._embedding[torch.tensor(tokens)]
        # A copy that is no inference tensor.
        state = torch.tensor(hidden.tolist())
        feature = oracle.hydra_features(self._heads, head, state, seen)
        rows = feature[None, None].expand(self._heads.spec.num_heads, 1, -1)
        return oracle.logits(self._heads, rows, self._embedding)[head, 0]
