"""The settings of a training run, which decide the result bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import field, fields
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from vllm_medusa.errors import UserError
from vllm_medusa.settings import PathText, Share, flag_of, settings
from vllm_medusa.target.precision import fast_dtype

_KIND = (
    *("num_heads", "num_layers", "lm_head", "root_aware", "selector", "hydra"),
    *("prefix_attention", "prefix_window", "recurrent", "inner_size"),
)
_JOINT = (
    "backbone_lr",
    "backbone_loss",
    "heads_weight",
    "heads_weight_ramp",
    "heads_warmup",
)
_LORA = ("lora_rank", "lora_alpha", "lora_dropout")


@settings
class TrainSettings:
    """The settings of one training run."""

    FLAGS: ClassVar[Mapping[str, str]] = {"revision": "--model-revision"}

    model: str
    """The target model: directory or hub name."""
    revision: str | None = None
    """Revision of the target model, if it is a hub name."""
    data: str
    """Rows that vllm-medusa distill wrote."""
    num_heads: PositiveInt = 4
    """Number of Medusa heads."""
    num_layers: PositiveInt = 1
    """Number of layers in each head."""
    lm_head: Literal["shared", "own", "low-rank"] = "shared"
    """lm_head of the heads: the target's, a copy for each head, or two low-rank factors each."""
    rank: PositiveInt | None = None
    """Rank of the two factors; only for --lm-head low-rank."""
    root_aware: bool = False
    """Let the heads read the root, the token that the target sampled last."""
    selector: bool = False
    """Also train a selector, which ranks a head's best guesses again by their parent token."""
    prefix_attention: bool = False
    """Put an attention layer before the heads, which reads the last tokens of the text."""
    prefix_window: PositiveInt = 64
    """How many tokens that layer reads."""
    hydra: bool = False
    """Train Hydra heads, which read all tokens of the path that they continue."""
    recurrent: bool = False
    """Train one head with prefix attention, which runs again for each drafted token."""
    inner_size: PositiveInt | None = None
    """Inner size of a recurrent head's layers (three times the hidden size)."""
    feature_weight: NonNegativeFloat | None = None
    """Weight of the distance between a recurrent head's features and the hidden states that they
    stand for, beside its loss (10)."""
    selector_only: bool = False
    """Train only a selector, for the heads of --heads."""
    selector_rank: PositiveInt = 64
    """Rank of the selector's tables."""
    heads: str | None = None
    """Heads that were trained before: they stay as they are with --selector-only, and are trained
    on with --joint."""
    joint: Literal["lora", "full"] | None = None
    """Train the target too: adapters that are merged into it (lora), or all its weights (full)."""
    backbone_lr: PositiveFloat | None = None
    """Peak learning rate of the target (a quarter of --lr)."""
    backbone_loss: Literal["kl", "ce"] = "kl"
    """What the target learns: its own distribution of before (kl), or the rows' tokens (ce)."""
    heads_weight: PositiveFloat | None = None
    """Of the heads' loss beside the target's own (0.01 with --backbone-loss kl, 0.2 with ce)."""
    heads_weight_ramp: bool = False
    """Let that weight rise from zero, by a quarter of a sine, while both are trained."""
    heads_warmup: Share | None = None
    """Share of the steps, the first ones, that train the heads alone (0.5; 0 with --heads)."""
    lora_rank: PositiveInt = 32
    """Of the adapters."""
    lora_alpha: PositiveFloat = 16.0
    """The adapters' product counts alpha / rank."""
    lora_dropout: Annotated[Share, Field(lt=1)] = 0.05
    """Share of the adapters' inputs that is left out at random while they are trained."""
    loss: Literal["kl", "lk", "ce"] = "kl"
    """What to learn: the target's distribution (kl), the acceptance of samples (lk), or the rows'
    tokens (ce)."""
    kl_temperature: PositiveFloat = 1.0
    """Temperature of the target's distribution; a value below 1 sharpens it."""
    decay: Annotated[Share, Field(gt=0)] = 0.8
    """Weight of head k's loss is decay^k (paper, section 2.2.1)."""
    learn_prompts: bool = False
    """Learn the tokens of prompts too, not those of answers alone."""
    loss_positions: Share = 1.0
    """Share of the tokens to learn that the loss uses, drawn again at each step."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW for all, or Muon for the matrices of the blocks and AdamW for the rest."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay of the matrices."""
    warmup: Share = 0.03
    """Share of the steps in which the rate rises; then it falls to zero by half a cosine."""
    steps: PositiveInt | None = None
    """Number of steps; give this or --epochs."""
    epochs: PositiveFloat | None = None
    """How often each row is used; give this or --steps."""
    batch_tokens: PositiveInt = 4096
    """Largest number of tokens of one forward pass of one process."""
    grad_accumulation: PositiveInt = 1
    """Number of forward passes of a step."""
    clip: PositiveFloat = 1.0
    """Largest norm of a step's gradient."""
    dtype: Literal["bfloat16", "float32"] = field(default_factory=fast_dtype)
    """Data type of the target and of the products (bfloat16 if the hardware has instructions for
    it, else float32); the heads' weights are float32 in training."""
    held_out: Share = 0.05
    """Share of the rows that is used to measure, not to learn."""
    test_data: Annotated[tuple[PathText, ...], Field(strict=False)] = ()
    """Rows of other prompts that vllm-medusa distill wrote; the finished heads are measured on
    them."""
    eval_every: PositiveInt | None = None
    """Steps between measurements (a tenth of all steps)."""
    seed: NonNegativeInt = 0
    """Seed of the order of the rows, and of what starts at random."""

    def __post_init__(self) -> None:
        if not self.loss_positions:
            raise UserError("--loss-positions 0: leaves nothing to learn from; raise it")
        if not 0 < self.held_out < 1:
            raise UserError(
                f"--held-out {self.held_out}: heads are chosen by rows that they did not learn "
                "from; give a share above 0 and below 1"
            )
        if (self.steps is None) == (self.epochs is None):
            raise UserError("give either --steps or --epochs")
        if (self.rank is None) == (self.lm_head == "low-rank"):
            raise UserError(
                f"--lm-head {self.lm_head} with --rank {self.rank}: give --rank with --lm-head "
                "low-rank and with that only"
            )
        if self.selector_only and self.heads is None:
            raise UserError("--selector-only: trains a selector for given heads; give --heads too")
        if self.heads is not None and not (self.selector_only or self.joint):
            raise UserError("--heads: is for --selector-only and --joint; give one of them too")
        if self.selector_only:
            self._refuse("--selector-only trains no heads", *_KIND, "joint")
        elif self.heads is not None:
            self._refuse("--heads decides what heads there are", *_KIND, "rank", "selector_rank")
        if self.hydra:
            self._refuse("Hydra heads see the tokens before them", "root_aware", "selector")
            self._refuse("the target is not trained together with Hydra heads", "joint")
        if self.recurrent:
            of_kind = "root_aware", "selector", "prefix_attention", "hydra", "lm_head"
            self._refuse("recurrent heads have a form of their own", *of_kind)
            self._refuse("the target is not trained together with recurrent heads", "joint")
        else:
            self._refuse("only --recurrent has features that stand for states", "feature_weight")
            self._refuse("only --recurrent has layers with an inner size", "inner_size")
        self._check_joint()

    @property
    def weight_of_features(self) -> float:
        """The feature weight; 0 for heads of other kinds."""
        if self.feature_weight is None:
            return 10.0 if self.recurrent else 0.0
        return self.feature_weight

    @property
    def warmup_share(self) -> float:
        """Share of the steps that train the heads alone, if the target is trained too."""
        if self.heads_warmup is None:
            return 0.5 if self.heads is None else 0.0
        return self.heads_warmup

    @property
    def peak_of_backbone(self) -> float:
        """Peak learning rate of the target (paper, "Shared Settings": a quarter of the heads')."""
        return self.lr / 4 if self.backbone_lr is None else self.backbone_lr

    @property
    def weight_of_heads(self) -> float:
        """Lambda_0 (paper, "Experiment Settings": with self-distillation, and without)."""
        if self.heads_weight is None:
            return 0.01 if self.backbone_loss == "kl" else 0.2
        return self.heads_weight

    def _check_joint(self) -> None:
        if self.joint is None:
            self._refuse("the target is trained with --joint only", *_JOINT, *_LORA)
        elif self.joint == "full":
            self._refuse("--joint full has no adapters", *_LORA)
        if self.heads_warmup == 1:
            raise UserError(
                "--heads-warmup 1: leaves no step that trains the target; lower it, or leave out "
                "--joint"
            )

    def _refuse(self, reason: str, *names: str) -> None:
        """Refuse settings that have no meaning beside another one."""
        defaults = {setting.name: setting.default for setting in fields(self)}
        for name in names:
            if getattr(self, name) != defaults[name]:
                raise UserError(f"{flag_of(type(self), name)}: {reason}; leave it out")


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
