"""Small checkpoints of Medusa heads in every published format, spelled out name by name.

This is the tests' own knowledge of the formats: it shares nothing with the package's.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vllm_medusa.errors import UserError
from vllm_medusa.heads import HeadsCheckpoint, HeadsSpec, load_heads

Shapes = dict[str, tuple[int, ...]]

BACKBONE = {
    "model.embed_tokens.weight": (20, 8),
    "model.layers.0.mlp.up_proj.weight": (16, 8),
    "model.norm.weight": (8,),
    "lm_head.weight": (20, 8),
}


def make_heads(
    *,
    lm_head: str = "own",
    num_heads: int = 3,
    num_layers: int = 1,
    hidden_size: int = 8,
    vocab_size: int = 20,
    has_bias: bool = True,
    draft_vocab_size: int | None = None,
    rank: int = 2,
    logit_scale: float = 1.0,
    root_size: int | None = None,
    selector_rank: int | None = None,
    prefix_window: int | None = None,
    dtype: torch.dtype = torch.float32,
    source_format: str = "native",
    seed: int = 0,
) -> HeadsCheckpoint:
    """Random canonical heads."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    tensors = {"blocks.weight": random(num_heads, num_layers, hidden_size, hidden_size)}
    if has_bias:
        tensors["blocks.bias"] = random(num_heads, num_layers, hidden_size)
    num_rows = draft_vocab_size or vocab_size
    if lm_head == "own":
        tensors["lm_head.weight"] = random(num_heads, num_rows, hidden_size)
    elif lm_head == "common":
        tensors["lm_head.weight"] = random(num_rows, hidden_size)
    elif lm_head == "low_rank":
        tensors["lm_head.down"] = random(num_heads, rank, hidden_size)
        tensors["lm_head.up"] = random(num_heads, num_rows, rank)
    if draft_vocab_size:
        order = torch.randperm(vocab_size, generator=generator)
        tensors["token_map"] = order[:draft_vocab_size]
    embedding_size = root_size or (5 if prefix_window else None)
    shapes = {"root.weight": (num_heads, hidden_size, root_size)} if root_size else {}
    shapes |= selector_shapes(num_heads, vocab_size, selector_rank)
    shapes |= prefix_shapes(hidden_size, embedding_size, prefix_window)
    tensors |= {name: random(*shape) for name, shape in shapes.items()}
    spec = HeadsSpec(
        source_format=source_format,  # type: ignore[arg-type]
        num_heads=num_heads,
        num_layers=num_layers,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        draft_vocab_size=draft_vocab_size,
        lm_head=lm_head,  # type: ignore[arg-type]
        has_bias=has_bias,
        logit_scale=logit_scale,
        dtype=dtype,
        root_size=embedding_size,
        selector_rank=selector_rank,
        prefix_window=prefix_window,
    )
    return HeadsCheckpoint(spec, tensors)


def make_recurrent(
    *,
    num_heads: int = 3,
    num_layers: int = 1,
    hidden_size: int = 8,
    inner_size: int = 6,
    vocab_size: int = 20,
    embedding_size: int = 5,
    window: int = 7,
    seed: int = 0,
) -> HeadsCheckpoint:
    """Random recurrent heads."""
    made = make_heads(
        lm_head="target",
        num_layers=num_layers,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        root_size=embedding_size,
        prefix_window=window,
        seed=seed,
    )
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "gated.embedded": (hidden_size, embedding_size),
        "gated.gate_up": (num_layers, 2, inner_size, hidden_size),
        "gated.down": (num_layers, hidden_size, inner_size),
    }
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors |= {name: t for name, t in made.tensors.items() if name.startswith("prefix.")}
    spec = dataclasses.replace(made.spec, kind="recurrent", num_heads=num_heads)
    return HeadsCheckpoint(spec, tensors)


def selector_shapes(num_heads: int, vocab_size: int, rank: int | None) -> Shapes:
    """Of a selector's tensors, if it has a rank."""
    if rank is None:
        return {}
    return {
        "selector.parent": (vocab_size, rank),
        "selector.child": (vocab_size, rank),
        "selector.depth": (num_heads, rank),
    }


def prefix_shapes(hidden_size: int, embedding_size: int | None, window: int | None) -> Shapes:
    """Of a prefix attention with 2 attention heads of size 3, if it has a window."""
    if embedding_size is None or window is None:
        return {}
    return {
        "prefix.query": (6, hidden_size + embedding_size),
        "prefix.key_value": (2, 6, hidden_size + embedding_size),
        "prefix.output": (hidden_size, 6),
        "prefix.bias": (2, window),
    }


def assert_same_heads(actual: HeadsCheckpoint, expected: HeadsCheckpoint, **changes: Any) -> None:
    """Equal in every tensor and, but for `changes`, in the spec."""
    assert actual.spec == dataclasses.replace(expected.spec, **changes)
    assert actual.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert actual.tensors[name].dtype == tensor.dtype, name
        assert torch.equal(actual.tensors[name], tensor), name


def sequential_tensors(heads: HeadsCheckpoint, prefix: str = "") -> dict[str, torch.Tensor]:
    """F1, or F2 if the heads use the target's lm_head."""
    spec, tensors = heads.spec, heads.tensors
    state = {}
    for h in range(spec.num_heads):
        for l in range(spec.num_layers):  # noqa: E741
            state[f"{prefix}{h}.{l}.linear.weight"] = tensors["blocks.weight"][h, l].clone()
            if spec.has_bias:
                state[f"{prefix}{h}.{l}.linear.bias"] = tensors["blocks.bias"][h, l].clone()
        if spec.lm_head == "own":
            state[f"{prefix}{h}.{spec.num_layers}.weight"] = tensors["lm_head.weight"][h].clone()
    return state


def vllm_tensors(heads: HeadsCheckpoint, prefix: str = "") -> dict[str, torch.Tensor]:
    """F4."""
    spec, tensors = heads.spec, heads.tensors
    state = {}
    for h in range(spec.num_heads):
        for l in range(spec.num_layers):  # noqa: E741
            state[f"{prefix}blocks.{h}.layers.{l}.weight"] = tensors["blocks.weight"][h, l].clone()
            if spec.has_bias:
                state[f"{prefix}blocks.{h}.layers.{l}.bias"] = tensors["blocks.bias"][h, l].clone()
        if spec.lm_head == "own":
            state[f"{prefix}lm_heads.{h}.weight"] = tensors["lm_head.weight"][h].clone()
    if spec.lm_head == "common":
        state[f"{prefix}lm_head.weight"] = tensors["lm_head.weight"].clone()
    if spec.draft_vocab_size:
        state[f"{prefix}token_map"] = tensors["token_map"].clone()
    return state


def backbone_tensors() -> dict[str, torch.Tensor]:
    """A stand-in for the model that F3 and F5 are merged into; hidden size 8, vocabulary 20."""
    return {name: torch.ones(shape) for name, shape in BACKBONE.items()}


def write(
    directory: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None, file: str
) -> Path:
    """Write one weights file and, unless it is None, config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    if file.endswith(".safetensors"):
        save_file(tensors, directory / file, metadata={"format": "pt"})
    else:
        torch.save(tensors, directory / file)
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    return directory


def write_fasterdecoding(
    directory: Path, heads: HeadsCheckpoint, file: str = "medusa_lm_head.pt"
) -> Path:
    """F1 with the config as published: the count of heads in it is wrong."""
    config = {
        "base_model_name_or_path": "lmsys/vicuna-7b-v1.3",
        "medusa_num_heads": min(2, heads.spec.num_heads),
        "medusa_num_layers": heads.spec.num_layers,
        "transformers_version": "4.31.0",
    }
    return write(directory, sequential_tensors(heads), config, file)


def write_tgi(directory: Path, heads: HeadsCheckpoint) -> Path:
    """F2."""
    config = {
        "base_model_name_or_path": "owner/model",
        "medusa_num_heads": heads.spec.num_heads,
        "medusa_num_layers": heads.spec.num_layers,
        "version": "2",
    }
    return write(directory, sequential_tensors(heads), config, "medusa_lm_head.safetensors")


def write_merged(directory: Path, heads: HeadsCheckpoint, file: str = "model.safetensors") -> Path:
    """F3."""
    config = {
        "architectures": ["MedusaLlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": heads.spec.hidden_size,
        "num_hidden_layers": 32,
        "vocab_size": heads.spec.vocab_size,
        "medusa_num_heads": heads.spec.num_heads,
        "medusa_num_layers": heads.spec.num_layers,
    }
    tensors = backbone_tensors() | sequential_tensors(heads, "medusa_head.")
    return write(directory, tensors, config, file)


def write_vllm(directory: Path, heads: HeadsCheckpoint, prefix: str = "") -> Path:
    """F4."""
    spec = heads.spec
    config = {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": spec.hidden_size,
        "vocab_size": spec.vocab_size,
        "truncated_vocab_size": spec.draft_vocab_size,
        "num_heads": spec.num_heads,
        "num_hidden_layers": spec.num_layers,
        "medusa_fc_bias": spec.has_bias,
        "original_lm_head": spec.lm_head != "own",
        "logit_scale": spec.logit_scale,
    }
    return write(directory, vllm_tensors(heads, prefix), config, "model.safetensors")


def write_modelopt(directory: Path, heads: HeadsCheckpoint, num_shards: int = 2) -> Path:
    """F5, in shards with an index."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": heads.spec.hidden_size,
        "num_hidden_layers": 32,
        "vocab_size": heads.spec.vocab_size,
        "medusa": {
            "num_medusa_heads": heads.spec.num_heads,
            "num_medusa_layers": heads.spec.num_layers,
        },
    }
    tensors = backbone_tensors() | sequential_tensors(heads, "medusa_heads.")
    return write_shards(directory, tensors, config, num_shards)


def write_shards(
    directory: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], num_shards: int
) -> Path:
    """Safetensors shards and their index; the tensors are dealt out in order."""
    names = list(tensors)
    per_shard = -(-len(names) // num_shards)
    weight_map = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        part = {name: tensors[name] for name in names[shard * per_shard : (shard + 1) * per_shard]}
        write(directory, part, config, file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def write_native(directory: Path, heads: HeadsCheckpoint, prefix: str = "") -> Path:
    """Our own format: the stacked tensors, lm_heads of several heads in the plural."""
    plural = {} if heads.spec.lm_head == "common" else {"lm_head.": "lm_heads."}
    tensors = {}
    for name, tensor in heads.tensors.items():
        for singular, replacement in plural.items():
            name = name.replace(singular, replacement)
        tensors[prefix + name] = tensor.clone()
    is_second = heads.spec.root_size is not None or heads.spec.selector_rank is not None
    version = 3 if heads.spec.kind == "hydra" else 2 if is_second else 1
    version = version if heads.spec.prefix_window is None else 4
    config = {
        "format": f"vllm_medusa.heads/{version}",
        "model_type": "medusa",
        "num_heads": heads.spec.num_heads,
        "num_layers": heads.spec.num_layers,
        "hidden_size": heads.spec.hidden_size,
        "vocab_size": heads.spec.vocab_size,
        "truncated_vocab_size": heads.spec.draft_vocab_size,
        "logit_scale": heads.spec.logit_scale,
    }
    return write(directory, tensors, config, "medusa_heads.safetensors")


REMEDY = re.compile(
    r"\b(export|use|give|name|remove|repair|set|save|copy|correct|keep|update|train|check|add|write)\b"
)


def error(path: Path | str, **options: Any) -> str:
    """The message with which `load_heads` refuses, checked for its form: one line, a remedy."""
    with pytest.raises(UserError) as caught:
        load_heads(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    assert REMEDY.search(message), message
    return message


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(config | changes))
