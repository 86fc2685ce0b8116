"""What a training run is asked to do; all of it decides the result, to the bit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vllm_medusa.errors import UserError

LmHead = Literal["shared", "own", "low-rank"]
Loss = Literal["kl", "ce"]
OptimizerName = Literal["adamw", "muon"]
Dtype = Literal["bfloat16", "float32"]

_POSITIVE = (
    *("num_heads", "num_layers", "steps", "epochs", "batch_tokens", "grad_accumulation"),
    *("lr", "clip", "kl_temperature", "decay", "eval_every", "rank"),
)


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The settings of one training run.

    Attributes:
        model, revision: the target, a directory or a hub name.
        data: directory of dataset rows (what `vllm-medusa distill` writes).
        num_heads, num_layers: Medusa heads, and residual blocks in each.
        lm_head: the target's (`shared`), one matrix per head (`own`), or two factors per head
            (`low-rank`).
        rank: of the factors; given for `low-rank` only.
        loss: cross entropy to the data (`ce`), or to the target's own distribution (`kl`).
        kl_temperature: of the target's distribution; below 1 sharpens it towards its argmax.
        decay: head k's loss counts decay^k (paper, section 2.2.1: 0.8).
        loss_positions: share of the answers' tokens, drawn at each step, that the loss looks at.
        optimizer: AdamW for all, or Muon for the matrices of the blocks and AdamW for the rest.
        lr: peak learning rate.
        weight_decay: of the matrices.
        warmup: share of the steps in which the rate rises; then it falls by half a cosine to zero.
        steps, epochs: how long; exactly one is given.
        batch_tokens: tokens of one forward pass of one process, at most.
        grad_accumulation: forward passes per step.
        clip: largest norm of a step's gradient.
        dtype: of the target and of the products; the heads' weights are float32 while they train.
        held_out: share of the rows that is measured, not learnt.
        eval_every: steps between measurements; None is a tenth of the steps.
        seed: of the rows' order.
    """

    model: str
    revision: str | None = None
    data: str
    num_heads: int = 4
    num_layers: int = 1
    lm_head: LmHead = "shared"
    rank: int | None = None
    loss: Loss = "kl"
    kl_temperature: float = 1.0
    decay: float = 0.8
    loss_positions: float = 1.0
    optimizer: OptimizerName = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.0
    warmup: float = 0.03
    steps: int | None = None
    epochs: float | None = None
    batch_tokens: int = 4096
    grad_accumulation: int = 1
    clip: float = 1.0
    dtype: Dtype = "bfloat16"
    held_out: float = 0.05
    eval_every: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{_option(name)} {value}: must be above 0")
        for name in ("held_out", "loss_positions", "warmup", "decay"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise UserError(f"{_option(name)} {value}: must be between 0 and 1")
        if not self.loss_positions:
            raise UserError("--loss-positions 0: leaves nothing to learn from; raise it")
        if not 0 < self.held_out < 1:
            raise UserError(
                f"--held-out {self.held_out}: heads are chosen by rows that they did not learn "
                "from; give a share above 0 and below 1"
            )
        if self.weight_decay < 0 or self.seed < 0:
            raise UserError("--weight-decay and --seed must not be negative; give 0 or more")
        if (self.steps is None) == (self.epochs is None):
            raise UserError("give either --steps or --epochs")
        if (self.rank is None) == (self.lm_head == "low-rank"):
            raise UserError(
                f"--lm-head {self.lm_head} with --rank {self.rank}: give --rank with --lm-head "
                "low-rank and with that only"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return dataclasses.asdict(self)


def check_same(ours: Mapping[str, Any], theirs: Mapping[str, Any], where: str) -> None:
    """Check that an earlier run into the same directory was asked for the same.

    Args:
        ours, theirs: settings and fingerprints of this run and of the earlier one.
        where: the earlier run's directory.

    Raises:
        UserError: something differs; the message names it.
    """
    for name in sorted({*ours, *theirs}):
        now, then = ours.get(name), theirs.get(name)
        if json.loads(json.dumps(now)) != then:
            raise UserError(
                f"{where}: holds a training with {name.replace('_', ' ')} {then}, this one has "
                f"{now}; give the same settings to go on with it, or name another directory or "
                "remove it"
            )


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
