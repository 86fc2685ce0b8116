"""A tiny random Llama that does not loop, and random heads for it; and an oracle for its drafts."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

VOCAB_SIZE = 384
HIDDEN_SIZE = 128


SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": VOCAB_SIZE - 1,
}


def make_model(path: Path, seed: int = 3) -> Path:
    """Write a random model whose greedy text is chaotic, so that a wrong K/V shows at once."""
    return _save(LlamaForCausalLM(LlamaConfig(**SIZES)), path, seed)


def make_windowed_model(path: Path, seed: int = 3) -> Path:
    """Write such a model whose first layer attends to a window only, with capped scores."""
    sizes = {**SIZES, "tie_word_embeddings": True, "pad_token_id": None}
    config = Gemma2Config(
        **sizes,
        sliding_window=40,
        layer_types=["sliding_attention", "full_attention"],
        query_pre_attn_scalar=32,
    )
    return _save(Gemma2ForCausalLM(config), path, seed)


def _save(model: Any, path: Path, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                scale = 1.0 if "embed" in name else 0.2 if "q_proj" in name else 0.15
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
    model.save_pretrained(path)
    (path / "generation_config.json").unlink(missing_ok=True)
    return path


def make_heads(path: Path, num_heads: int = 4, seed: int = 5) -> Path:
    """Write random heads (fasterdecoding v1 layout) for `make_model`."""
    path.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for head in range(num_heads):
        block = torch.randn(HIDDEN_SIZE, HIDDEN_SIZE, generator=generator) * 0.1
        tensors[f"{head}.0.linear.weight"] = block
        tensors[f"{head}.0.linear.bias"] = torch.zeros(HIDDEN_SIZE)
        tensors[f"{head}.1.weight"] = torch.randn(VOCAB_SIZE, HIDDEN_SIZE, generator=generator)
    save_file(tensors, path / "medusa_lm_head.safetensors")
    config = {"medusa_num_heads": num_heads, "medusa_num_layers": 1}
    (path / "config.json").write_text(json.dumps(config))
    return path


class Oracle:
    """Drafts that are right up to a node of the test's choice, and wrong everywhere else.

    It stands in for a runner's drafts (``MedusaRunnerMixin._draft``), so that every node and leaf
    path of any tree is accepted and committed sooner or later, on any model.

    Args:
        futures: for each prompt, the tokens that the target continues it with.
        seed: of the choice of nodes.
        choose: picks the node to be right up to, of ``num_nodes``; at random by default.

    """

    def __init__(self, futures: dict[tuple[int, ...], list[int]], seed: int = 0) -> None:
        self.futures = futures
        self.rng = random.Random(seed)
        self.fixed_node: int | None = None
        self.chosen: dict[int, int] = {}
        self.num_accepted_as_planned = 0

    def draft(self, runner: Any, sampled_token_ids: list[list[int]], drafts: Any) -> Any:
        """Return [B, N] drafts in place of the heads'."""
        tree = runner.drafter.config.tree
        rows = drafts.tolist()
        for index, sampled in enumerate(sampled_token_ids):
            if sampled:
                rows[index] = self._row(runner, index, tree) or rows[index]
        return torch.tensor(rows)

    def _row(self, runner: Any, index: int, tree: Any) -> list[int] | None:
        request = runner.requests[runner.input_batch.req_ids[index]]
        prompt, output = tuple(request.prompt_token_ids), request.output_token_ids
        future = self.futures.get(prompt, [])[len(output) :]
        paths = [(), *tree.paths]
        node = self.rng.randrange(len(paths)) if self.fixed_node is None else self.fixed_node
        target = paths[node]
        if len(target) > len(future):
            return None
        row = []
        for path in tree.paths:
            right = future[len(path) - 1] if len(path) <= len(future) else None
            if path == target[: len(path)]:
                row.append(right)
            else:
                row.append(self._wrong(right))
        self.chosen[node] = self.chosen.get(node, 0) + 1
        return row

    def _wrong(self, right: int | None) -> int:
        while True:
            token = self.rng.randrange(VOCAB_SIZE - 1)
            if token != right:
                return token


class OracleOfMany(Oracle):
    """An oracle for prompts that several requests share."""

    def __init__(self, seed: int) -> None:
        super().__init__({}, seed)
        self.continuations: dict[tuple[int, ...], list[list[int]]] = {}

    def add(self, prompt: list[int], tokens: list[int]) -> None:
        self.continuations.setdefault(tuple(prompt), []).append(tokens)

    def _row(self, runner: Any, index: int, tree: Any) -> list[int] | None:
        request = runner.requests[runner.input_batch.req_ids[index]]
        prompt, output = tuple(request.prompt_token_ids), list(request.output_token_ids)
        for tokens in self.continuations.get(prompt, []):
            if tokens[: len(output)] == output:
                self.futures[prompt] = tokens
                return super()._row(runner, index, tree)
        return None
