"""`vllm-medusa train`: Medusa heads for a frozen target (Medusa-1)."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("--model", required=True, metavar="M", help="the target model: directory or hub name")
    add("--model-revision", dest="revision", help="of the target model, if a hub name")
    add("--data", required=True, metavar="DIR", help="rows that vllm-medusa distill wrote")
    add("--out", required=True, metavar="HEADS", type=Path, help="directory to write the heads to")
    heads = parser.add_argument_group("heads").add_argument
    heads("--num-heads", type=int, default=4, metavar="K", help="Medusa heads (4)")
    heads("--num-layers", type=int, default=1, metavar="L", help="residual blocks in each (1)")
    heads(
        "--lm-head",
        choices=("shared", "own", "low-rank"),
        default="shared",
        help="the target's (default), a copy per head, or two factors per head",
    )
    heads("--rank", type=int, metavar="R", help="of the two factors")
    _add_loss_arguments(parser)
    run = parser.add_argument_group("run").add_argument
    run("--batch-tokens", type=int, default=4096, help="tokens of a forward pass, at most (4096)")
    run("--grad-accumulation", type=int, default=1, metavar="N", help="passes per step (1)")
    run("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the target")
    run("--held-out", type=float, default=0.05, metavar="SHARE", help="rows to measure on (0.05)")
    run("--eval-every", type=int, metavar="N", help="steps between measurements (a tenth)")
    run("--save-every", type=int, metavar="N", help="steps between checkpoints (as --eval-every)")
    run("--seed", type=int, default=0, help="of the rows' order (0)")
    run("--compile", action="store_true", help="compile the target's forward pass")


def _add_loss_arguments(parser: argparse.ArgumentParser) -> None:
    loss = parser.add_argument_group("loss and optimizer").add_argument
    loss(
        "--loss",
        choices=("kl", "ce"),
        default="kl",
        help="learn the target's distribution (kl, default) or the rows' tokens (ce)",
    )
    loss("--kl-temperature", type=float, default=1.0, metavar="T", help="below 1 sharpens it (1)")
    loss("--decay", type=float, default=0.8, help="head k's loss counts decay^k (0.8)")
    loss(
        "--loss-positions",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="of the answers' tokens, drawn at each step, that the loss looks at (1)",
    )
    loss("--optimizer", choices=("adamw", "muon"), default="adamw", help="adamw, or Muon on blocks")
    loss("--lr", type=float, default=1e-3, help="peak learning rate (1e-3)")
    loss("--weight-decay", type=float, default=0.0, help="of the matrices (0)")
    loss("--warmup", type=float, default=0.03, metavar="SHARE", help="of the steps (0.03)")
    loss("--clip", type=float, default=1.0, help="largest norm of a step's gradient (1)")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int, metavar="N", help="how many steps to train")
    length.add_argument("--epochs", type=float, metavar="N", help="how often to see each row")


def run(arguments: argparse.Namespace) -> str:
    """Train, and say how good the heads are.

    Raises:
        UserError: settings, a model or rows that cannot be used.
    """
    import dataclasses

    from vllm_medusa.training.run import train
    from vllm_medusa.training.settings import TrainSettings

    names = [field.name for field in dataclasses.fields(TrainSettings)]
    settings = TrainSettings(**{name: getattr(arguments, name) for name in names})
    report = train(
        settings,
        arguments.out,
        save_every=arguments.save_every,
        compile_target=arguments.compile,
    )
    return describe(arguments.out, report)


def describe(out: Path, report: dict[str, Any]) -> str:
    """Say in a few lines what the report says."""
    lines = [f"wrote heads to {out}; on held-out answers, tokens per step:"]
    for label, key in (
        ("with looping text", "with_loops"),
        ("without looping text", "without_loops"),
    ):
        lengths = report["held_out"][key]["acceptance_length"].items()
        lines.append(f"  {label}: " + ", ".join(f"{name} {value:.2f}" for name, value in lengths))
    return "\n".join(lines)
