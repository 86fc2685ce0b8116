"""Heads that run in turn for the demo's model.

Hydra heads are made of the demo's Medusa heads: what they see of the path changes many drafts, and
most are still right. An MLP speculator is made of the pairs of tokens in given texts.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.integration.command_line import DEMO_MODEL, MEDUSA_HEADS
from tests.oracles import heads as oracle
from tests.sequential_checkpoints import make_mlp_speculator, write_hydra, write_mlp_speculator
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
        weight = torch.randn(2, size, size * (head + 2), generator=generator) * 0.05
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


def write_speculator_of(texts: list[list[int]], out: Path) -> Path:
    """An MLP speculator that guesses what follows a token in the texts, the most frequent first.

    A token's row is a random code, and a token's lm_head sums the codes of those before it. A large
    bias keeps GELU in its linear part; the lm_heads do not see it, because their rows sum to zero.
    """
    size, num_heads = 1024, 3
    made = make_mlp_speculator(
        is_tied=True,
        scales_input=True,
        num_heads=num_heads,
        hidden_size=256,
        inner_size=size,
        vocab_size=VOCAB_SIZE,
    )
    codes = torch.randn(VOCAB_SIZE, size, generator=torch.Generator().manual_seed(1))
    counts = torch.zeros(VOCAB_SIZE, VOCAB_SIZE)
    for text in texts:
        counts.index_put_((torch.tensor(text[1:]), torch.tensor(text[:-1])), torch.ones(()), True)
    # Logits that are far apart give probabilities with which dynamic trees fork.
    lm_head = 20 * counts / counts.sum(dim=0).clamp(min=1) @ codes / size
    tensors = dict(made.tensors)
    for k in range(2):
        tensors[f"speculator.{k}.weight"] = tensors[f"speculator.{k}.weight"] * 1e-3
    tensors["speculator.0.embedding"] = codes
    tensors["speculator.0.scale"] = torch.ones(size)
    tensors["speculator.0.bias"] = torch.full((size,), 6.0)
    tensors["lm_head.weight"] = lm_head - lm_head.mean(dim=1, keepdim=True)
    return write_mlp_speculator(out, dataclasses.replace(made, tensors=tensors))


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
