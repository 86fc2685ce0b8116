"""Small checkpoints of heads that run in turn, in their published formats.

This is the tests' own knowledge of the formats: it shares nothing with the package's.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from tests.checkpoints import make_heads, write
from vllm_medusa.heads import HeadsCheckpoint, HeadsSpec


def make_hydra(
    *, num_layers: int = 1, root_size: int = 8, has_lm_head_bias: bool = False, **options: Any
) -> HeadsCheckpoint:
    """Random canonical Hydra heads; `options` are those of `make_heads`."""
    blocks = make_heads(num_layers=max(1, num_layers - 1), **options)
    spec, tensors = blocks.spec, dict(blocks.tensors)
    if num_layers == 1:
        del tensors["blocks.weight"], tensors["blocks.bias"]
    generator = torch.Generator().manual_seed(11)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(spec.dtype)

    for h in range(spec.num_heads):
        size = spec.hidden_size + (h + 1) * root_size
        tensors[f"hydra.{h}.weight"] = random(2, spec.hidden_size, size)
        tensors[f"hydra.{h}.bias"] = random(2, spec.hidden_size)
    if has_lm_head_bias:
        tensors["lm_head.bias"] = random(spec.num_heads, spec.draft_vocab_size or spec.vocab_size)
    changes = {"kind": "hydra", "num_layers": num_layers, "root_size": root_size}
    return HeadsCheckpoint(dataclasses.replace(spec, **changes), tensors)


def make_mlp_speculator(
    *,
    is_tied: bool = False,
    scales_input: bool = False,
    num_heads: int = 3,
    hidden_size: int = 8,
    inner_size: int = 6,
    vocab_size: int = 20,
    dtype: torch.dtype = torch.float32,
) -> HeadsCheckpoint:
    """A random MLP speculator; the heads of a tied one share all but the first `weight`."""
    generator = torch.Generator().manual_seed(13)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    tensors = {}
    for h in range(num_heads):
        if not is_tied or h < 2:
            tensors[f"speculator.{h}.weight"] = random(inner_size, inner_size if h else hidden_size)
        if not is_tied or h == 0:
            tensors[f"speculator.{h}.embedding"] = random(vocab_size, inner_size)
            tensors[f"speculator.{h}.scale"] = 1 + random(inner_size) / 4
            tensors[f"speculator.{h}.bias"] = random(inner_size)
    lead = () if is_tied else (num_heads,)
    tensors["lm_head.weight"] = random(*lead, vocab_size, inner_size)
    spec = HeadsSpec(
        source_format="mlp_speculator",
        num_heads=num_heads,
        num_layers=1,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        draft_vocab_size=None,
        lm_head="common" if is_tied else "own",
        has_bias=True,
        logit_scale=1.0,
        dtype=dtype,
        kind="mlp_speculator",
        scales_input=scales_input,
    )
    return HeadsCheckpoint(spec, tensors)


def hydra_tensors(heads: HeadsCheckpoint) -> dict[str, torch.Tensor]:
    """The state of the `HydraMLP` of zankner/Hydra, with its copy of the target's embedding."""
    spec, tensors = heads.spec, heads.tensors
    state = {"input_embed_fn.weight": torch.ones(20, spec.hidden_size)}
    for h in range(spec.num_heads):
        for kind in ("weight", "bias"):
            first = tensors[f"hydra.{h}.{kind}"]
            state[f"hydra_mlp.{h}.0.linear.{kind}"] = first[0].clone()
            state[f"hydra_mlp.{h}.0.res_connection.{kind}"] = first[1].clone()
            for l in range(1, spec.num_layers):  # noqa: E741
                block = tensors[f"blocks.{kind}"][h, l - 1]
                state[f"hydra_mlp.{h}.{l}.linear.{kind}"] = block.clone()
            state[f"hydra_lm_head.{h}.{kind}"] = tensors[f"lm_head.{kind}"][h].clone()
    return state


def write_hydra(
    directory: Path, heads: HeadsCheckpoint, file: str = "hydra_lm_head.pt", **changes: Any
) -> Path:
    """Hydra heads of the MLP form, as published."""
    config = {
        "base_model_name_or_path": "lmsys/vicuna-7b-v1.3",
        "grounded_heads": True,
        "hidden_state_offset": 0,
        "hydra_head_arch": "mlp",
        "hydra_num_heads": heads.spec.num_heads,
        "hydra_num_layers": heads.spec.num_layers,
        "transformers_version": "4.37.2",
    }
    return write(directory, hydra_tensors(heads), config | changes, file)


def write_mlp_speculator(
    directory: Path, heads: HeadsCheckpoint, *, repeats: bool = False, **changes: Any
) -> Path:
    """As IBM publishes them; `repeats` stores the tensors of tied heads once for each head."""
    spec, tensors = heads.spec, heads.tensors
    is_tied = spec.lm_head == "common"
    names = {
        "emb.{}.weight": "embedding",
        "proj.{}.weight": "weight",
        "ln.{}.weight": "scale",
        "ln.{}.bias": "bias",
    }
    state = {}
    for h in range(spec.num_heads):
        for name, part in names.items():
            known = [k for k in range(h + 1) if f"speculator.{k}.{part}" in tensors]
            if repeats or known[-1] == h:
                tensor = tensors[f"speculator.{known[-1]}.{part}"]
                state["speculator." + name.format(h)] = tensor.clone()
        if repeats or not is_tied or h == 0:
            lm_head = tensors["lm_head.weight"]
            state[f"speculator.head.{h}.weight"] = (lm_head if is_tied else lm_head[h]).clone()
    config = {
        "architectures": ["MLPSpeculatorPreTrainedModel"],
        "model_type": "mlp_speculator",
        "emb_dim": spec.hidden_size,
        "inner_dim": tensors["speculator.0.scale"].shape[0],
        "n_predict": spec.num_heads,
        "vocab_size": spec.vocab_size,
        "tie_weights": is_tied,
        "scale_input": spec.scales_input,
    }
    return write(directory, state, config | changes, "model.safetensors")
