"""`vllm-medusa inspect`: what a checkpoint of Medusa heads holds."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from vllm_medusa.cli.arguments import add_heads_and_model, load_heads_and_model

if TYPE_CHECKING:
    from vllm_medusa.heads.checkpoint import HeadsCheckpoint
    from vllm_medusa.tree.schedule import TreeSchedule

_FORMATS = {
    "fasterdecoding": "FasterDecoding, lm_heads of their own (F1)",
    "tgi": "TGI, the target's lm_head (F2)",
    "merged": "merged into the model (F3)",
    "vllm": "vLLM or speculators (F4)",
    "modelopt": "ModelOpt, merged into the model (F5)",
    "native": "vllm_medusa",
    "hydra": "Hydra, MLP form",
    "mlp_speculator": "IBM's MLP speculator",
}
_KINDS = {
    "medusa": "",
    "hydra": ", which run in turn and read all tokens of a path (Hydra)",
    "mlp_speculator": ", which run in turn, each from the state of the one before",
    "recurrent": ", one that runs again for each drafted token (recurrent)",
}
_LM_HEADS = {
    "own": "one matrix per head",
    "common": "one matrix common to all heads",
    "target": "the target's own",
    "low_rank": "two low-rank factors per head",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_heads_and_model(parser, "HEADS", "the heads are checked against it")


def run(arguments: argparse.Namespace) -> str:
    """Describe the heads.

    Raises:
        UserError: unusable heads, or ones that do not fit the model: the message says why.
    """
    heads, target = load_heads_and_model(arguments)
    rows = describe(heads)
    if target is not None:
        sizes = f"hidden size {target.hidden_size}, vocabulary {target.vocab_size}"
        rows.append(("fits", f"{target.name} ({sizes})"))
    return "\n".join(f"{label + ':':18}{text}" for label, text in rows)


def describe(heads: HeadsCheckpoint) -> list[tuple[str, str]]:
    """Return the labelled lines of the description."""
    from vllm_medusa.heads.selector import NUM_CANDIDATES

    spec = heads.spec
    num_bytes = sum(tensor.nbytes for tensor in heads.tensors.values())
    rows = [
        ("format", _FORMATS[spec.source_format]),
        ("made for", heads.base_model or "not said"),
        ("heads", f"{spec.num_heads}{_KINDS[spec.kind]}"),
        ("layers per head", f"{spec.num_layers}, {'with' if spec.has_bias else 'without'} biases"),
        ("hidden size", str(spec.hidden_size)),
        ("vocabulary", str(spec.vocab_size or "the target's")),
    ]
    lm_head = _LM_HEADS[spec.lm_head]
    if spec.lm_head == "low_rank":
        lm_head += f" of rank {heads.tensors['lm_head.down'].shape[1]}"
    if spec.draft_vocab_size is not None:
        lm_head += f", for {spec.draft_vocab_size} tokens of the vocabulary"
    if "lm_head.bias" in heads.tensors:
        lm_head += ", with biases"
    rows.append(("lm_head", lm_head))
    if "root.weight" in heads.tensors:
        rows.append(("root-aware", f"yes, by embeddings of size {spec.root_size}"))
    if spec.selector_rank is not None:
        rows.append(("selector", f"of rank {spec.selector_rank}, among {NUM_CANDIDATES} guesses"))
    if spec.prefix_window is not None:
        rows.append(("prefix attention", f"over {spec.prefix_window} positions"))
    if spec.logit_scale != 1.0:
        rows.append(("logit scale", f"{spec.logit_scale:g}"))
    rows.append(("dtype", str(spec.dtype).removeprefix("torch.")))
    rows.append(("size", f"{num_bytes / 2**20:.1f} MiB"))
    if heads.tree_paths is None:
        rows.append(("tree", "none"))
    else:
        depth = max(map(len, heads.tree_paths))
        rows.append(("tree", f"{len(heads.tree_paths)} nodes, {depth} deep"))
    if heads.tree_schedule is not None:
        rows.append(("tree schedule", _describe_schedule(heads.tree_schedule)))
    rows += [("note", note) for note in heads.notes]
    return rows


def _describe_schedule(schedule: TreeSchedule) -> str:
    sizes = schedule.sizes()
    parts = []
    for index, (first, last, nodes) in enumerate(sizes):
        batch = f"{first}-{last}" if first < last else str(first)
        if index == len(sizes) - 1:
            batch = f"{first} and more"
        tree = f"{nodes} node{'s' * (nodes > 1)}" if nodes else "none"
        parts.append(f"{tree} at batch {batch}")
    return ", ".join(parts)
