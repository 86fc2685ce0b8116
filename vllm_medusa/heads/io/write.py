"""Writing Medusa heads, in our own format and in those of other programs.

If a format cannot hold the heads, they are refused; nothing is dropped or approximated. The
formats:

============== ========================= ========= ========== ============ ======================
format         lm_heads                  no biases token map  logit_scale  layers per head
============== ========================= ========= ========== ============ ======================
native         any                       yes       yes        yes          any
vllm           own, common               yes       no         yes          any
fasterdecoding own                       as zeros  no         no           1, or all the same
tgi            own, target               as zeros  no         no           any; 1 with the target's
============== ========================= ========= ========== ============ ======================

Only native holds root-aware and Hydra heads, a selector and prefix attention. One lm_head common to
all heads is written as each head's own where the format has no other way.
"""

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from vllm_medusa.errors import UserError
from vllm_medusa.heads.checkpoint import SCHEDULE_FILE, TREE_FILE, HeadsCheckpoint
from vllm_medusa.heads.io.config_file import (
    NATIVE_FORMAT,
    NATIVE_FORMAT_2,
    NATIVE_FORMAT_3,
    NATIVE_FORMAT_4,
    NATIVE_FORMAT_5,
)
from vllm_medusa.heads.io.formats import (
    GATED_LAYERS,
    LM_HEAD_BIAS,
    PREFIX_ATTENTION,
    ROOT,
    SELECTOR,
    NameStyle,
    expected_names,
)
from vllm_medusa.heads.io.hydra_names import native_names
from vllm_medusa.tree.draft_tree import write_tree_file
from vllm_medusa.tree.schedule import write_schedule_file

WriteFormat = Literal["native", "vllm", "fasterdecoding", "tgi"]

_STYLE: dict[WriteFormat, NameStyle] = {
    "native": "native",
    "vllm": "vllm",
    "fasterdecoding": "sequential",
    "tgi": "sequential",
}
_WEIGHTS_FILE: dict[WriteFormat, str] = {
    "native": "medusa_heads.safetensors",
    "vllm": "model.safetensors",
    "fasterdecoding": "medusa_lm_head.pt",
    "tgi": "medusa_lm_head.safetensors",
}
#: Of the heads' tensors in merged Medusa-2 models.
MERGED_PREFIX = "medusa_head."
_OUR_FILES = {*_WEIGHTS_FILE.values(), "config.json", TREE_FILE, SCHEDULE_FILE}


def save_heads(
    checkpoint: HeadsCheckpoint,
    out: Path,
    write_format: WriteFormat = "native",
    *,
    overwrite: bool = False,
) -> None:
    """Write heads into a directory, all of it or nothing.

    Args:
        checkpoint: what to write; `base_model` names the target, which fasterdecoding and tgi need.
        out: the directory to make.
        write_format: see the table above.
        overwrite: replace a directory that was written by this function.

    Raises:
        UserError: the format cannot hold the heads, or the directory cannot be written.
    """
    checkpoint = _fit(checkpoint, write_format)
    _check_out(out, overwrite)
    tensors = _named_tensors(checkpoint, write_format)
    config = _CONFIG[write_format](checkpoint)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as staging:
            staged = Path(staging, "new")
            staged.mkdir()
            _write_weights(tensors, staged / _WEIGHTS_FILE[write_format])
            text = json.dumps(config, indent=2)
            (staged / "config.json").write_text(text + "\n", encoding="utf-8")
            # safetensors files are readable by the owner only, but another user may have to serve
            # them.
            shutil.copymode(staged / "config.json", staged / _WEIGHTS_FILE[write_format])
            if checkpoint.tree_paths is not None:
                write_tree_file(staged / TREE_FILE, checkpoint.tree_paths)
            if checkpoint.tree_schedule is not None:
                write_schedule_file(staged / SCHEDULE_FILE, checkpoint.tree_schedule)
            if out.exists():
                out.rename(Path(staging, "old"))
            staged.rename(out)
    except OSError as exc:
        raise UserError(f"{out}: cannot be written ({exc}); nothing was changed") from None


def merged_tensors(checkpoint: HeadsCheckpoint) -> dict[str, torch.Tensor]:
    """Return the heads as they lie among the tensors of the model that they are for.

    They have the names of merged Medusa-2 models, or, where those have no place for something, the
    names of our own format; either with a prefix. A logit_scale is in no tensor.
    """
    spec = checkpoint.spec
    fits = spec.lm_head in ("own", "target") and not spec.sees_tokens and not spec.draft_vocab_size
    names = _named_tensors(checkpoint, "tgi" if fits else "native")
    return {f"{MERGED_PREFIX}{name}": tensor.clone() for name, tensor in names.items()}


def needs_lm_head(checkpoint: HeadsCheckpoint, write_format: WriteFormat) -> bool:
    """Whether the format cannot say that these heads use the target's lm_head."""
    spec = checkpoint.spec
    if spec.lm_head != "target":
        return False
    if write_format == "tgi":  # it reads one layer per head where they share the target's
        return spec.num_layers > 1
    return write_format in ("vllm", "fasterdecoding")


def with_target_lm_head(checkpoint: HeadsCheckpoint, weight: torch.Tensor) -> HeadsCheckpoint:
    """Return heads that use the target's lm_head with a copy of it as their own tensor.

    Args:
        checkpoint: heads of kind `target`.
        weight: [V, H], the target's lm_head.

    Raises:
        UserError: the lm_head has another shape than the heads.
    """
    spec = checkpoint.spec
    vocab_size, hidden_size = weight.shape
    if hidden_size != spec.hidden_size or spec.vocab_size not in (None, vocab_size):
        raise UserError(
            f"the target's lm_head has shape {list(weight.shape)}, the heads are for vocabulary "
            f"size {spec.vocab_size} and hidden size {spec.hidden_size}; name their own target"
        )
    return dataclasses.replace(
        checkpoint,
        spec=dataclasses.replace(spec, lm_head="common", vocab_size=vocab_size),
        tensors=checkpoint.tensors | {"lm_head.weight": weight},
    )


def _fit(checkpoint: HeadsCheckpoint, write_format: WriteFormat) -> HeadsCheckpoint:
    """Bring heads into a form that the format has, or refuse, naming what would be lost."""
    if write_format == "native" and checkpoint.spec.kind != "mlp_speculator":
        return checkpoint
    for lost in _losses(checkpoint, write_format):
        raise UserError(f"heads cannot be written as {write_format}: {lost}")
    spec, tensors = checkpoint.spec, dict(checkpoint.tensors)
    if spec.lm_head == "common" and write_format != "vllm":
        spec = dataclasses.replace(spec, lm_head="own")
        tensors["lm_head.weight"] = tensors["lm_head.weight"].expand(spec.num_heads, -1, -1)
    if _STYLE[write_format] == "sequential" and not spec.has_bias:
        # These programs always use biases; zeros do not change the heads.
        spec = dataclasses.replace(spec, has_bias=True)
        tensors["blocks.bias"] = torch.zeros_like(tensors["blocks.weight"][..., 0])
    return dataclasses.replace(checkpoint, spec=spec, tensors=tensors)


def _losses(checkpoint: HeadsCheckpoint, write_format: WriteFormat) -> list[str]:
    """Everything that the format cannot hold, each with a remedy."""
    spec = checkpoint.spec
    sequential = _STYLE[write_format] == "sequential"
    losses: list[str] = []
    if spec.is_sequential:
        losses.append(
            f"the layers with which {spec.kind} heads read the tokens of a path would be lost; "
            "keep the heads as they are"
        )
    for is_there, what in (
        (
            "root.weight" in checkpoint.tensors,
            "the matrices with which these heads read the last token",
        ),
        (spec.selector_rank, "the selector, which re-ranks these heads' guesses by their parent,"),
        (spec.prefix_window, "the layer with which these heads read the text before,"),
    ):
        if is_there:
            losses.append(
                f"{what} would be lost, only the format of vllm_medusa holds them; keep the heads "
                "as they are"
            )
    if spec.lm_head == "low_rank":
        losses.append(
            "the low-rank factors of the lm_heads would be lost, it holds full matrices only; keep "
            "the heads as they are"
        )
    if needs_lm_head(checkpoint, write_format):
        losses.append(
            "it needs lm_heads and these heads use the target's; name the target with --model"
        )
    if spec.draft_vocab_size:
        losses.append(
            "the token map would be lost, "
            + ("it has none" if sequential else "vLLM 0.32 fails to load one")
            + "; keep the heads as they are"
        )
    if spec.logit_scale != 1.0 and write_format != "vllm":
        losses.append(f"logit_scale {spec.logit_scale} would be lost; use --to vllm")
    if write_format == "fasterdecoding" and not _has_tied_layers(checkpoint):
        losses.append(
            f"its reader uses one block for all layers, the {spec.num_layers} different layers of "
            "each head would be lost; use --to vllm or --to tgi"
        )
    if sequential and not checkpoint.base_model:
        losses.append("its config.json must name the target; give --model")
    return losses


def _has_tied_layers(checkpoint: HeadsCheckpoint) -> bool:
    blocks = [tensor for name, tensor in checkpoint.tensors.items() if name.startswith("blocks.")]
    return all(torch.equal(block, block[:, :1].expand_as(block)) for block in blocks)


def _check_out(out: Path, overwrite: bool) -> None:
    if out.is_file():
        raise UserError(f"{out}: is a file; name a directory to write to")
    found = sorted(path.name for path in out.iterdir()) if out.exists() else []
    if found and not overwrite:
        raise UserError(f"{out}: is not empty; name another directory or give --force")
    foreign = [name for name in found if name not in _OUR_FILES]
    if foreign:
        raise UserError(
            f"{out}: holds {foreign[0]!r}, which is no file of converted heads, so --force does "
            "not replace the directory; name another one"
        )


def _named_tensors(
    checkpoint: HeadsCheckpoint, write_format: WriteFormat
) -> dict[str, torch.Tensor]:
    spec, tensors = checkpoint.spec, checkpoint.tensors
    others = [
        name
        for name in ("token_map", *ROOT, *SELECTOR, *PREFIX_ATTENTION, *GATED_LAYERS)
        if name in tensors
    ]
    others += [name for name in native_names(spec.num_heads) if name in tensors]
    names = expected_names(
        _STYLE[write_format],
        num_heads=spec.num_heads,
        num_layers=spec.num_layers,
        lm_head=spec.lm_head,
        has_bias=spec.has_bias,
        has_blocks="blocks.weight" in tensors,
        others=[*others, *(LM_HEAD_BIAS if "lm_head.bias" in tensors else ())],
    )
    return {name: tensors[canonical][index] for name, (canonical, index) in names.items()}


def _write_weights(tensors: dict[str, torch.Tensor], path: Path) -> None:
    # Views of stacked tensors become tensors of their own: both formats store whole storages.
    owned = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    if path.suffix == ".pt":
        torch.save(owned, path)
    else:
        save_file(owned, path, metadata={"format": "pt"})


def _native_config(checkpoint: HeadsCheckpoint) -> dict[str, Any]:
    spec = checkpoint.spec
    if spec.prefix_window is not None:
        version = NATIVE_FORMAT_5 if spec.kind == "recurrent" else NATIVE_FORMAT_4
    elif spec.is_sequential:
        version = NATIVE_FORMAT_3
    else:
        version = NATIVE_FORMAT_2 if spec.sees_tokens else NATIVE_FORMAT
    return {
        "format": version,
        "model_type": "medusa",
        "num_heads": spec.num_heads,
        "num_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "vocab_size": spec.vocab_size,
        "truncated_vocab_size": spec.draft_vocab_size,
        "logit_scale": spec.logit_scale,
        "base_model_name_or_path": checkpoint.base_model,
    }


def _vllm_config(checkpoint: HeadsCheckpoint) -> dict[str, Any]:
    # vLLM renames every key with "num" and "heads" or "layers" in it: no others of that kind here.
    spec = checkpoint.spec
    return {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "num_heads": spec.num_heads,
        "num_hidden_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "vocab_size": spec.vocab_size,
        "truncated_vocab_size": spec.draft_vocab_size,
        "medusa_fc_bias": spec.has_bias,
        "original_lm_head": spec.lm_head == "common",
        "logit_scale": spec.logit_scale,
        "base_model_name_or_path": checkpoint.base_model,
    }


def _sequential_config(checkpoint: HeadsCheckpoint) -> dict[str, Any]:
    spec = checkpoint.spec
    return {
        "base_model_name_or_path": checkpoint.base_model,
        "medusa_num_heads": spec.num_heads,
        "medusa_num_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        # The reference calls heads without lm_heads of their own its second version.
        **({"version": "2"} if spec.lm_head == "target" else {}),
        **({"vocab_size": spec.vocab_size} if spec.vocab_size is not None else {}),
    }


_CONFIG: dict[WriteFormat, Callable[[HeadsCheckpoint], dict[str, Any]]] = {
    "native": _native_config,
    "vllm": _vllm_config,
    "fasterdecoding": _sequential_config,
    "tgi": _sequential_config,
}
