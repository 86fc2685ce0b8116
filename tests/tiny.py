"""A tiny random Llama that does not loop, and random heads for it; and an oracle for its drafts."""

from __future__ import annotations

import json
import random
from dataclasses import replace
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

    So every node and leaf path of any tree is accepted and committed sooner or later, on any
    model. `OracleDrafter` drafts with it in an engine.

    Args:
        futures: for each prompt, the tokens that the target continues it with.
        seed: of the choice of nodes.

    """

    def __init__(self, futures: dict[tuple[int, ...], list[int]], seed: int = 0) -> None:
        self.futures = futures
        self.rng = random.Random(seed)
        self.fixed_node: int | None = None
        self.chosen: dict[int, int] = {}

    def future_of(self, prompt: tuple[int, ...], output: list[int]) -> list[int]:
        """The tokens that follow a request's output."""
        return self.futures.get(prompt, [])[len(output) :]

    def tokens(self, future: list[int], parents: tuple[int, ...]) -> list[int] | None:
        """A token for each node of a tree; None if the future ends before the chosen node."""
        node = self.rng.randrange(len(parents) + 1)
        node = node if self.fixed_node is None else self.fixed_node
        depths = [0]
        for parent in parents:
            depths.append(depths[parent] + 1)
        if depths[node] > len(future):
            return None
        self.chosen[node] = self.chosen.get(node, 0) + 1
        on_way = set()
        while node:
            on_way.add(node)
            node = parents[node - 1]
        rights = [future[depth - 1] if 0 < depth <= len(future) else None for depth in depths]
        return [
            rights[node] if node in on_way else self._wrong(rights[node])
            for node in range(1, len(depths))
        ]

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

    def future_of(self, prompt: tuple[int, ...], output: list[int]) -> list[int]:
        for tokens in self.continuations.get(prompt, []):
            if tokens[: len(output)] == output:
                return tokens[len(output) :]
        return []


class OracleDrafter:
    """Drafts the trees of a runner's own drafter with an oracle's tokens.

    With dynamic trees it drafts another random tree for every request and step.

    Args:
        oracle: knows the tokens.
        runner: the model runner whose ``tree_drafter`` this replaces.

    """

    def __init__(self, oracle: Oracle, runner: Any) -> None:
        self._oracle = oracle
        self._runner = runner
        self._drafter = runner.tree_drafter
        self._parents = runner.drafter.config.tree.parents[1:]

    def num_paths(self, batch_size: int) -> int:
        return self._drafter.num_paths(batch_size)

    def finish(self, req_ids: Any) -> None:
        self._drafter.finish(req_ids)

    def draft(self, batch: Any) -> list[Any]:
        if self._runner.drafter.config.dynamic is not None:
            # It runs as well, but is not to look for what the oracle drafted among its own.
            sampled = [tokens[-1:] for tokens in batch.sampled]
            self._drafter.draft(replace(batch, sampled=sampled))
            bounds = zip(batch.req_ids, batch.max_nodes, batch.max_paths, strict=True)
            return [self._random(*bound) for bound in bounds]
        drafts = self._drafter.draft(batch)
        return [self._replaced(*pair) for pair in zip(batch.req_ids, drafts, strict=True)]

    def _replaced(self, req_id: str, draft: Any) -> Any:
        if not draft.tokens:
            return draft
        tokens = self._oracle.tokens(self._future(req_id), self._parents)
        return draft if tokens is None else draft._replace(tokens=tokens[: len(draft.tokens)])

    def _random(self, req_id: str, max_nodes: int, max_paths: int) -> Any:
        """A tree of random shape and size in depth-first order, none now and then."""
        from vllm_medusa.plugin.worker.v1.drafting import NO_DRAFT, Draft

        rng, limits = self._oracle.rng, self._runner.drafter.config.limits
        parents: list[int] = []
        way, num_paths = [0], 1
        for node in range(1, rng.randint(0, max_nodes) + 1):
            goes_on = len(way) <= limits.max_depth and (
                num_paths >= max_paths or rng.random() < 0.6
            )
            if not goes_on and (num_paths >= max_paths or len(way) == 1):
                break
            if not goes_on:
                del way[rng.randint(1, len(way) - 1) :]
                num_paths += 1
            parents.append(way[-1])
            way.append(node)
        tokens = self._oracle.tokens(self._future(req_id), tuple(parents)) if parents else None
        return NO_DRAFT if tokens is None else Draft(tokens, tuple(parents))

    def _future(self, req_id: str) -> list[int]:
        request = self._runner.requests[req_id]
        return self._oracle.future_of(
            tuple(request.prompt_token_ids), list(request.output_token_ids)
        )
