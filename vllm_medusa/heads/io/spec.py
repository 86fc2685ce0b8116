"""What kind of heads a checkpoint holds, from its headers and config.json."""

import functools
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import torch

from vllm_medusa.errors import UserError
from vllm_medusa.heads.checkpoint import HeadsKind, HeadsSpec
from vllm_medusa.heads.io.config_file import ConfigFile
from vllm_medusa.heads.io.formats import Plan
from vllm_medusa.heads.io.headers import Header


def make_spec(
    location: Path,
    config: ConfigFile,
    plan: Plan,
    headers: dict[str, Header],
    target_vocab_size: int | None,
) -> HeadsSpec:
    """Describe heads; config.json must agree with the headers.

    Args:
        location: the checkpoint, for messages.
        config: its config.json.
        plan: which tensors are the heads'.
        headers: their shapes and dtypes.
        target_vocab_size: of the model that the heads are to serve, if known.

    Raises:
        UserError: config.json contradicts the headers, or the lm_heads fit no vocabulary.
    """
    vocab_size, draft_vocab_size = _vocab(location, headers, config, target_vocab_size)
    sizes = _sizes(location, headers, config)
    selector = headers.get("selector.parent")
    if selector is not None and selector.shape[0] != (vocab_size or selector.shape[0]):
        raise UserError(
            f"{location}: the selector's tables have {selector.shape[0]} rows, the vocabulary has "
            f"{vocab_size}; export the heads again"
        )
    config.check_hidden_states()
    config.check_size(sizes.hidden_size, "hidden_size", "medusa_hidden_size", "emb_dim")
    dtypes = [header.dtype for header in headers.values() if header.dtype.is_floating_point]
    return HeadsSpec(
        source_format=plan.source_format,
        num_heads=sizes.num_heads,
        num_layers=sizes.num_layers,
        hidden_size=sizes.hidden_size,
        vocab_size=vocab_size if selector is None else selector.shape[0],
        draft_vocab_size=draft_vocab_size,
        lm_head=plan.lm_head,
        has_bias=sizes.kind != "medusa" or "blocks.bias" in headers,
        logit_scale=config.logit_scale(),
        dtype=functools.reduce(torch.promote_types, dtypes),
        root_size=_embedding_size(location, headers, sizes),
        selector_rank=None if selector is None else selector.shape[1],
        prefix_window=headers["prefix.bias"].shape[1] if "prefix.bias" in headers else None,
        kind=sizes.kind,
        scales_input=sizes.kind == "mlp_speculator" and config.flag("scale_input"),
    )


def compare_config(config: ConfigFile, plan: Plan, spec: HeadsSpec) -> tuple[str, ...]:
    """Check that config.json promises nothing that the tensors lack; note smaller counts."""
    notes = config.check_count(
        "heads",
        spec.num_heads,
        *("medusa_num_heads", "num_medusa_heads", "hydra_num_heads", "num_heads", "n_predict"),
    )
    # In the config of a whole model `num_hidden_layers` counts the backbone's layers.
    layer_names = ["medusa_num_layers", "num_medusa_layers", "hydra_num_layers", "num_layers"]
    if plan.source_format == "vllm":
        layer_names.append("num_hidden_layers")
    notes += config.check_count("layers per head", spec.num_layers, *layer_names)
    has_bias_flag = config.flag("medusa_fc_bias")
    if has_bias_flag and not spec.has_bias:
        raise UserError(
            f"{config.path}: medusa_fc_bias is true, but the checkpoint holds no biases; export "
            "the heads again or set it to false"
        )
    if plan.source_format == "vllm" and spec.has_bias and not has_bias_flag:
        notes += ("config.json does not set medusa_fc_bias: vLLM itself would drop the biases",)
    return notes


class _Sizes(NamedTuple):
    """Attributes of a `HeadsSpec`."""

    kind: HeadsKind
    num_heads: int
    num_layers: int
    hidden_size: int
    root_size: int | None = None


def _sizes(location: Path, headers: dict[str, Header], config: ConfigFile) -> _Sizes:
    """Tell the kind of heads by the names of their tensors, and the sizes by the shapes."""
    if "hydra.0.weight" in headers:
        return _hydra_sizes(location, headers)
    if "speculator.0.weight" in headers:
        num_heads = sum(name.endswith(".embedding") for name in headers)
        if config.flag("tie_weights"):
            given = config.integer("n_predict")
            has_more = "speculator.1.weight" in headers
            if given is None or (given > 1) != has_more:
                raise UserError(
                    f"{config.path}: n_predict is {given} for an MLP speculator with "
                    f"{1 + has_more} tensors 'proj'; set it to the number of its heads"
                )
            num_heads = given
        return _Sizes("mlp_speculator", num_heads, 1, headers["speculator.0.weight"].shape[1])
    if "gated.gate_up" in headers:
        return _recurrent_sizes(location, headers, config)
    num_heads, num_layers, hidden_size = headers["blocks.weight"].shape[:3]
    root_size = headers["root.weight"].shape[2] if "root.weight" in headers else None
    return _Sizes("medusa", num_heads, num_layers, hidden_size, root_size)


def _embedding_size(location: Path, headers: dict[str, Header], sizes: _Sizes) -> int | None:
    """Return the size of the embeddings that the heads read; check that of a prefix attention."""
    if "prefix.query" not in headers:
        return sizes.root_size
    attention_size, input_size = headers["prefix.query"].shape
    num_attention_heads = headers["prefix.bias"].shape[0]
    size = input_size - sizes.hidden_size
    if size != (sizes.root_size or size) or size < 1 or attention_size % num_attention_heads:
        raise UserError(
            f"{location}: 'prefix.query' has shape {[attention_size, input_size]}; expected a "
            f"multiple of {num_attention_heads} attention heads, and hidden size "
            f"{sizes.hidden_size} + the target's embedding size; export the heads again"
        )
    return size


def _recurrent_sizes(location: Path, headers: dict[str, Header], config: ConfigFile) -> _Sizes:
    """Check which tensors there are; config.json tells how many tokens the heads draft."""
    if "prefix.query" not in headers or "blocks.weight" in headers or rows_name(headers):
        raise UserError(
            f"{location}: tensors 'gated' are those of recurrent heads, which have a prefix "
            "attention and no blocks or lm_heads; export the heads again"
        )
    num_heads = config.integer("num_heads")
    if num_heads is None:
        raise UserError(
            f"{config.path}: says not how many tokens the recurrent heads draft; set num_heads"
        )
    num_layers, _, _, hidden_size = headers["gated.gate_up"].shape
    embedding_size = headers["gated.embedded"].shape[1]
    return _Sizes("recurrent", num_heads, num_layers, hidden_size, embedding_size)


def _hydra_sizes(location: Path, headers: dict[str, Header]) -> _Sizes:
    """Check the sizes of Hydra heads' layers against each other."""
    num_heads = sum(name.startswith("hydra.") and name.endswith(".bias") for name in headers)
    num_parts, hidden_size, first = headers["hydra.0.weight"].shape
    embedding_size = first - hidden_size
    for head in range(num_heads):
        size = headers[f"hydra.{head}.weight"].shape[2]
        if num_parts != 2 or size != hidden_size + (head + 1) * embedding_size or size <= 0:
            raise UserError(
                f"{location}: the first layer of Hydra head {head} has shape "
                f"{list(headers[f'hydra.{head}.weight'].shape)}; expected [2, {hidden_size}, "
                f"{hidden_size} + {head + 1} x {embedding_size}]; export the heads again"
            )
    blocks = headers.get("blocks.weight")
    if blocks is not None and blocks.shape[0] != num_heads:
        raise UserError(
            f"{location}: 'blocks.weight' is for {blocks.shape[0]} heads, 'hydra' for {num_heads}; "
            "export the heads again"
        )
    num_layers = 1 if blocks is None else 1 + blocks.shape[1]
    return _Sizes("hydra", num_heads, num_layers, hidden_size, embedding_size)


def rows_name(names: Collection[str]) -> str | None:
    """Name the canonical tensor with a row for each draft token; None if the target's is used."""
    return next((name for name in ("lm_head.up", "lm_head.weight") if name in names), None)


def _vocab(
    location: Path,
    headers: dict[str, Header],
    config: ConfigFile,
    target_vocab_size: int | None,
) -> tuple[int | None, int | None]:
    """Find the target's and the draft vocabulary.

    Returns:
        vocab_size, draft_vocab_size
    """
    rows = rows_name(headers)
    token_map = headers.get("token_map", headers.get("d2t"))
    if rows is None:
        if token_map is not None:
            raise UserError(
                f"{location}: holds a token_map but no lm_head that it could belong to; remove it"
            )
        return config.vocab_size() or target_vocab_size, None
    num_rows = headers[rows].shape[-2]
    if token_map is None:
        config.check_size(num_rows, "vocab_size", "medusa_vocab_size")
        return num_rows, None
    if "lm_head.bias" in headers:
        raise UserError(
            f"{location}: holds a token_map and lm_heads with biases, which are not supported "
            "together; export the heads without biases of their lm_heads"
        )
    draft_vocab_size = token_map.shape[0]
    config.check_size(draft_vocab_size, "truncated_vocab_size")
    vocab_size = config.vocab_size() or target_vocab_size
    if num_rows != draft_vocab_size:
        if num_rows != (vocab_size or num_rows):
            raise UserError(
                f"{location}: the lm_heads have {num_rows} rows, neither token_map's "
                f"{draft_vocab_size} nor the vocabulary's {vocab_size}; export the heads again"
            )
        vocab_size = num_rows
    return vocab_size, draft_vocab_size
