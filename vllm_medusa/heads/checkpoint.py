"""Loading Medusa heads of any published format into one canonical form.

Every fault of a checkpoint is an error that names the tensor, file or number and the remedy: heads
that load are complete, finite and of consistent shapes. Formats and names: `formats`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_medusa.errors import UserError
from vllm_medusa.heads.io.assemble import assemble
from vllm_medusa.heads.io.config_file import ConfigFile
from vllm_medusa.heads.io.files import open_store
from vllm_medusa.heads.io.formats import LmHeadKind, Plan, SourceFormat, make_plan, select_heads
from vllm_medusa.heads.io.resolve import resolve
from vllm_medusa.tree.draft_tree import DraftTree, read_tree_file
from vllm_medusa.tree.schedule import TreeSchedule, read_schedule_file

TREE_FILE = "medusa_tree.json"
SCHEDULE_FILE = "medusa_tree_schedule.json"


@dataclass(frozen=True, kw_only=True)
class HeadsSpec:
    """What kind of heads a checkpoint holds.

    Attributes:
        source_format: the format it was read from, see `formats`.
        num_heads, num_layers: Medusa heads, and residual blocks in each.
        hidden_size: of the target's final hidden states, which the heads read.
        vocab_size: of the target; None if neither the tensors nor config.json nor the caller say.
        draft_vocab_size: rows of the lm_heads if `token_map` restricts them to a part of the
            vocabulary, else None.
        lm_head: one matrix per head (`own`), one for all heads (`common`), the target's (`target`),
            or a down and an up factor per head (`low_rank`).
        has_bias: whether the blocks' linear layers have biases.
        logit_scale: factor on the heads' logits.
        dtype: of the floating-point tensors.
    """

    source_format: SourceFormat
    num_heads: int
    num_layers: int
    hidden_size: int
    vocab_size: int | None
    draft_vocab_size: int | None
    lm_head: LmHeadKind
    has_bias: bool
    logit_scale: float
    dtype: torch.dtype


@dataclass(frozen=True)
class HeadsCheckpoint:
    """Medusa heads, stacked over heads so that one batched product serves all of them.

    Attributes:
        spec: what the heads are.
        tensors: by canonical name, with K heads, L layers, hidden size H, V rows of the lm_heads:
            `blocks.weight` [K, L, H, H] (out, in), `blocks.bias` [K, L, H] if `spec.has_bias`;
            `lm_head.weight` [K, V, H] (own) or [V, H] (common); `lm_head.down` [K, rank, H] and
            `lm_head.up` [K, V, rank] (low_rank); `token_map` [V] int64, from draft ids to target
            ids, if `spec.draft_vocab_size` is set.
        tree_paths: the tree that came with the heads, by descending probability, or None.
        tree_schedule: the trees by batch size that came with the heads, or None.
        base_model: the target that the heads' config.json names, or None.
        notes: what is odd about the checkpoint but does not make it unusable.
    """

    spec: HeadsSpec
    tensors: dict[str, torch.Tensor]
    tree_paths: list[list[int]] | None = None
    tree_schedule: TreeSchedule | None = None
    base_model: str | None = None
    notes: tuple[str, ...] = ()


def load_heads(
    path: str | Path,
    *,
    revision: str | None = None,
    target_hidden_size: int | None = None,
    target_vocab_size: int | None = None,
) -> HeadsCheckpoint:
    """Load Medusa heads.

    Args:
        path: directory, single weights file, or hub name (`owner/name`).
        revision: of a hub name.
        target_hidden_size: of the model that the heads are to serve, if known.
        target_vocab_size: likewise.

    Raises:
        UserError: the heads cannot be had, are incomplete, damaged, quantised or not finite, or
            were made for another hidden size or vocabulary.
    """
    location = resolve(path, "heads", select_heads, revision=revision)
    directory = location if location.is_dir() else location.parent
    config = ConfigFile(directory / "config.json")
    store = open_store(location, select_heads)
    plan = make_plan(location, store.keys, original_lm_head=config.flag("original_lm_head"))
    tensors = assemble(store, plan)
    vocab_size, draft_vocab_size = _vocab(location, tensors, config, target_vocab_size)
    num_heads, num_layers, hidden_size = tensors["blocks.weight"].shape[:3]
    config.check_size(hidden_size, "hidden_size", "medusa_hidden_size")
    spec = HeadsSpec(
        source_format=plan.source_format,
        num_heads=num_heads,
        num_layers=num_layers,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        draft_vocab_size=draft_vocab_size,
        lm_head=plan.lm_head,
        has_bias="blocks.bias" in tensors,
        logit_scale=config.logit_scale(),
        dtype=tensors["blocks.weight"].dtype,
    )
    _check_target(location, "hidden size", spec.hidden_size, target_hidden_size)
    _check_target(location, "vocabulary size", spec.vocab_size, target_vocab_size)
    return HeadsCheckpoint(
        spec=spec,
        tensors=tensors,
        tree_paths=_read_tree(directory / TREE_FILE, num_heads),
        tree_schedule=_read_schedule(directory / SCHEDULE_FILE, num_heads),
        base_model=config.base_model(),
        notes=_compare_config(config, plan, spec),
    )


def _check_target(location: Path, what: str, heads: int | None, target: int | None) -> None:
    if target is not None and heads != target:
        raise UserError(
            f"{location}: the heads are for {what} {heads}, the target model has {target}; use "
            "heads that were trained for this model"
        )


def _compare_config(config: ConfigFile, plan: Plan, spec: HeadsSpec) -> tuple[str, ...]:
    """Check that config.json promises nothing that the tensors lack; note where it says less."""
    notes = config.check_count(
        "heads", spec.num_heads, "medusa_num_heads", "num_medusa_heads", "num_heads"
    )
    # In the config of a whole model `num_hidden_layers` counts the backbone's layers.
    layer_names = ["medusa_num_layers", "num_medusa_layers", "num_layers"]
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


def _vocab(
    location: Path,
    tensors: dict[str, torch.Tensor],
    config: ConfigFile,
    target_vocab_size: int | None,
) -> tuple[int | None, int | None]:
    """Find the target's and the draft vocabulary; restrict full lm_heads to the token map.

    Returns:
        vocab_size, draft_vocab_size
    """
    rows_name = "lm_head.up" if "lm_head.up" in tensors else "lm_head.weight"
    token_map = tensors.get("token_map")
    if rows_name not in tensors:
        if token_map is not None:
            raise UserError(
                f"{location}: holds a token_map but no lm_head that it could belong to; remove it"
            )
        return config.vocab_size() or target_vocab_size, None
    num_rows = tensors[rows_name].shape[-2]
    if token_map is None:
        config.check_size(num_rows, "vocab_size", "medusa_vocab_size")
        return num_rows, None
    draft_vocab_size = len(token_map)
    config.check_size(draft_vocab_size, "truncated_vocab_size")
    vocab_size = config.vocab_size() or target_vocab_size
    if num_rows != draft_vocab_size:
        if num_rows != (vocab_size or num_rows):
            raise UserError(
                f"{location}: the lm_heads have {num_rows} rows, neither token_map's "
                f"{draft_vocab_size} nor the vocabulary's {vocab_size}; export the heads again"
            )
        vocab_size = num_rows
    _check_token_map(location, token_map, vocab_size)
    if num_rows != draft_vocab_size:
        tensors[rows_name] = tensors[rows_name].index_select(-2, token_map)
    return vocab_size, draft_vocab_size


def _check_token_map(location: Path, token_map: torch.Tensor, vocab_size: int | None) -> None:
    low, high = int(token_map.min()), int(token_map.max())
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        raise UserError(
            f"{location}: token_map holds token {low if low < 0 else high}, outside the vocabulary "
            f"of {vocab_size} tokens; export the heads again"
        )
    if len(set(token_map.tolist())) != len(token_map):
        raise UserError(f"{location}: token_map holds a token twice; export the heads again")


def _read_tree(path: Path, num_heads: int) -> list[list[int]] | None:
    if not path.is_file():
        return None
    with _naming(path):
        paths = read_tree_file(path)
        DraftTree.from_paths(paths).check_heads(num_heads)
    return paths


def _read_schedule(path: Path, num_heads: int) -> TreeSchedule | None:
    if not path.is_file():
        return None
    with _naming(path):
        schedule = read_schedule_file(path)
        schedule.tree().check_heads(num_heads)
    return schedule


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn the faults of a tree into the heads', naming the file."""
    try:
        yield
    except UserError as exc:
        raise UserError(
            f"{path}: {exc}; write the trees again with `vllm-medusa calibrate` or remove the file"
        ) from None
