"""`vllm-medusa train`: Medusa heads for a target, which is frozen or trained with them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vllm_medusa.cli.arguments import add_settings, given_settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    from vllm_medusa.training.settings import TrainSettings

    add_settings(parser, TrainSettings, "model", "revision", "data")
    parser.add_argument(
        "--out",
        required=True,
        metavar="HEADS",
        type=Path,
        help="Directory to write the heads to, with --joint the model with its heads",
    )
    heads = parser.add_argument_group("heads")
    add_settings(heads, TrainSettings, "num_heads", "num_layers", "lm_head", "rank")
    add_settings(heads, TrainSettings, "root_aware", "selector", "selector_only", "heads")
    add_settings(heads, TrainSettings, "selector_rank", "prefix_attention", "prefix_window")
    add_settings(heads, TrainSettings, "hydra", "recurrent", "inner_size")
    loss = parser.add_argument_group("loss and optimizer")
    add_settings(loss, TrainSettings, "loss", "kl_temperature", "decay", "loss_positions")
    add_settings(loss, TrainSettings, "learn_prompts", "feature_weight")
    add_settings(loss, TrainSettings, "optimizer", "lr", "weight_decay", "warmup", "clip")
    add_settings(loss, TrainSettings, "steps", "epochs")
    joint = parser.add_argument_group("training the target too (Medusa-2)")
    add_settings(joint, TrainSettings, "joint", "backbone_lr", "backbone_loss", "heads_weight")
    add_settings(joint, TrainSettings, "heads_weight_ramp", "heads_warmup")
    add_settings(joint, TrainSettings, "lora_rank", "lora_alpha", "lora_dropout")
    run = parser.add_argument_group("run")
    add_settings(run, TrainSettings, "batch_tokens", "grad_accumulation", "dtype", "held_out")
    add_settings(run, TrainSettings, "test_data", "eval_every", "seed")
    run.add_argument(
        "--save-every", type=int, metavar="N", help="Steps between checkpoints (as --eval-every)"
    )
    run.add_argument("--compile", action="store_true", help="Compile the target's forward pass")


def run(arguments: argparse.Namespace) -> str:
    """Train, and say how good the heads are.

    Raises:
        UserError: settings, a model or rows that cannot be used.
    """
    from vllm_medusa.training.run import train
    from vllm_medusa.training.settings import TrainSettings

    report = train(
        TrainSettings(**given_settings(TrainSettings, arguments)),
        arguments.out,
        save_every=arguments.save_every,
        compile_target=arguments.compile,
    )
    return describe(arguments.out, report)


def describe(out: Path, report: dict[str, Any]) -> str:
    """Say in a few lines what the report says."""
    joint = report.get("joint")
    what = "heads" if joint is None else "the model with its heads"
    lines = [f"wrote {what} to {out}; on held-out answers, tokens per step:"]
    lines += _lengths(report["held_out"])
    for test in report.get("tested", []):
        lines.append(f"on {test['data']}, temperature {test['temperature']:g}:")
        lines += _lengths(test)
    if joint is not None:
        before, after = (joint[when]["target"]["perplexity"] for when in ("before", "after"))
        lines.append(f"  perplexity of the target: {before:.4f} before, {after:.4f} after")
    return "\n".join(lines)


def _lengths(figures: dict[str, Any]) -> list[str]:
    """The acceptance lengths of one set of answers, a line with loops and one without."""
    lines = []
    for label, key in (
        ("with looping text", "with_loops"),
        ("without looping text", "without_loops"),
    ):
        lengths = figures[key]["acceptance_length"].items()
        lines.append(f"  {label}: " + ", ".join(f"{name} {value:.2f}" for name, value in lengths))
    return lines
