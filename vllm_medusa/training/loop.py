"""The training loop: heads on a frozen target (Medusa-1), or both of them (Medusa-2)."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from vllm_medusa.acceptance.ranks import Continuation, RankMeter
from vllm_medusa.acceptance.texts import Text
from vllm_medusa.acceptance.trees import best_paths
from vllm_medusa.data.rows import Row, temperature_of
from vllm_medusa.errors import UserError
from vllm_medusa.reporting.progress import Bar
from vllm_medusa.target.config import read_target
from vllm_medusa.target.frozen import load_target
from vllm_medusa.training.backbone import Backbone
from vllm_medusa.training.dataset import Dataset, learnt_whole, load_dataset
from vllm_medusa.training.evaluate import (
    TREE_SIZES,
    expected_acceptance,
    measurable_texts,
    summary,
)
from vllm_medusa.training.joint_loss import accumulate_joint_gradients
from vllm_medusa.training.loss import accumulate_gradients, draw_learnt
from vllm_medusa.training.merged_model import files_beside
from vllm_medusa.training.model import TrainableHeads, TrainedHeads, make_heads
from vllm_medusa.training.optimizer import HeadsOptimizer, rate_factor
from vllm_medusa.training.packing import Batch, Batches
from vllm_medusa.training.perplexity import measure_target
from vllm_medusa.training.run_directory import RunDirectory
from vllm_medusa.training.settings import TrainSettings
from vllm_medusa.training.test_sets import TestSet, load_test_sets

_LOGGER = logging.getLogger(__name__)

# Names that may differ in the same run, because fingerprints identify their contents.
_NAMES = ("model", "revision", "data", "heads", "test_data")


@dataclass
class History:
    """The history of a training.

    Attributes:
        losses: [steps][heads], each head's loss.
        evaluations: [(steps done, expected acceptance length)].
        best_step: steps done when the best heads were measured.
        seconds: of training, in all runs together.
        backbone_losses: the backbone's, of the steps that trained it.
        before: what `Training.measured` said before the first of these steps.
    """

    losses: list[list[float]] = field(default_factory=list)
    backbone_losses: list[float] = field(default_factory=list)
    before: dict[str, Any] | None = None
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    best_step: int = 0
    seconds: float = 0.0

    @property
    def best(self) -> float:
        """The best heads' expected acceptance length; 0 if none was measured."""
        return max((length for _, length in self.evaluations), default=0.0)


@dataclass(frozen=True)
class Outcome:
    """A finished training, on the main process.

    Attributes:
        heads: the best ones, rounded to the dtype that they are written in.
        continuations: their ranks on the held-out answers.
        tested: and on the answers of each test set.
        after: of joint training, what it says of target and heads at the end, as `History.before`.
    """

    heads: TrainedHeads
    continuations: list[Continuation]
    tested: list[tuple[TestSet, list[Continuation]]]
    history: History
    after: dict[str, Any] | None = None


class Training:
    """One training run, from its settings to its best heads.

    Args:
        settings: settings of the run.
        save_every: steps between checkpoints, beside those at each measurement.
        compile_target: whether to compile the target's body (torch.compile).

    Attributes:
        target: that the heads are for.
        backbone: trains the target together with them; None if it is frozen.
        beside: files that belong to the target and are written with it, if it is trained.
        identity: settings and fingerprints that a resumed run must share.

    Raises:
        UserError: a model or rows that cannot be used.
    """

    def __init__(
        self,
        settings: TrainSettings,
        *,
        save_every: int | None = None,
        compile_target: bool = False,
    ) -> None:
        self.settings = settings
        self._accelerator = Accelerator()
        if settings.joint is not None:
            _check_joint(self._accelerator.num_processes, compile_target)
        device = self._accelerator.device
        self.target = load_target(
            settings.model,
            revision=settings.revision,
            dtype=getattr(torch, settings.dtype),
            device=device,
            weights=torch.float32 if settings.joint == "full" else None,
        )
        self.target.check(needs_distribution=settings.loss != "ce" or settings.joint is not None)
        self.dataset: Dataset = load_dataset(
            Path(settings.data),
            vocab_size=self.target.vocab_size,
            max_tokens=self.target.max_tokens,
            held_out=settings.held_out,
        )
        if self.dataset.num_cut and self.is_main:
            _LOGGER.warning(
                "%d rows are longer than the target's %d positions and were cut",
                self.dataset.num_cut,
                self.target.max_tokens,
            )
        self._heads, heads_fingerprint = make_heads(settings, self.target)
        self._held_out, self._test_sets = self._rows_to_measure()
        self._batches = Batches(self._rows_to_learn(), settings.batch_tokens, settings.seed)
        if compile_target:
            self.target.compile((self._batches.num_sequences, self._batches.sequence_length))
        self._batches_per_step: int = settings.grad_accumulation * self._accelerator.num_processes
        self.num_steps = self._count_steps()
        self.backbone: Backbone | None = None
        self.beside: list[Path] = []
        if settings.joint is not None:
            self.beside = files_beside(settings.model, settings.revision)
            self.backbone = Backbone(self.target, settings, self.num_steps)
        self._eval_every = settings.eval_every or max(1, math.ceil(self.num_steps / 10))
        self._save_every = save_every or self._eval_every
        tested = [test.fingerprint for test in self._test_sets]
        self.identity = {
            **{name: value for name, value in asdict(settings).items() if name not in _NAMES},
            "target_fingerprint": self.target.fingerprint(),
            "data_fingerprint": self.dataset.fingerprint,
            "heads_fingerprint": heads_fingerprint,
            **({"test_data_fingerprints": tested} if tested else {}),
            "num_processes": self._accelerator.num_processes,
            "compile": compile_target,
        }
        self._optimizer = HeadsOptimizer(self._heads, settings)
        self._history = History()

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return bool(self._accelerator.is_main_process)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step, padding included."""
        per_batch = self._batches.num_sequences * self._batches.sequence_length
        return per_batch * self._batches_per_step

    def wait(self) -> None:
        """Wait for the other processes."""
        self._accelerator.wait_for_everyone()

    def run(self, directory: RunDirectory) -> Outcome:
        """Train to the end, from the directory's last checkpoint if there is one.

        Raises:
            UserError: the directory belongs to another run, or a checkpoint cannot be written.
        """
        with self._accelerator.main_process_first():
            state = directory.open(self.identity)
        if state is not None:
            self._restore(state)
        first = len(self._history.losses)
        if first == 0 and self._starts_joint(0):
            self._after(0, directory)
        batches = self._batches.from_batch(first * self._batches_per_step)
        started = time.perf_counter() - self._history.seconds
        total, done = (self.tokens_per_step * steps for steps in (self.num_steps, first))
        with Bar("training", "tokens", total, done, is_shown=self.is_main) as bar:
            for step in range(first, self.num_steps):
                losses = self._step(step, list(itertools.islice(batches, self._batches_per_step)))
                self._history.losses.append(losses[: self._heads.num_heads])
                self._history.backbone_losses += losses[self._heads.num_heads :]
                self._history.seconds = time.perf_counter() - started
                bar.advance(self.tokens_per_step, f"step {step + 1}, loss {sum(losses):.3f}")
                self._after(step + 1, directory)
        return self._finish(directory)

    def _rows_to_measure(self) -> tuple[list[Text], list[TestSet]]:
        """The held-out rows, and the test sets."""
        settings, num_heads = self.settings, self._heads.num_heads
        end_tokens = read_target(settings.model, revision=settings.revision).end_tokens
        held_out = measurable_texts(
            self.dataset.held_out,
            end_tokens,
            num_heads,
            temperature=temperature_of(settings.data),
            setting=f"--held-out {settings.held_out:g} of {settings.data}",
        )
        paths = settings.test_data
        return held_out, load_test_sets(paths, self.dataset, self.target, end_tokens, num_heads)

    def _rows_to_learn(self) -> list[Row]:
        rows = self.dataset.train
        return [learnt_whole(row) for row in rows] if self.settings.learn_prompts else rows

    def _count_steps(self) -> int:
        if self.settings.steps is not None:
            return self.settings.steps
        assert self.settings.epochs is not None
        per_step = self._batches.num_sequences * self._batches_per_step
        sequences = sum(len(self._batches.epoch(n)) for n in range(math.ceil(self.settings.epochs)))
        share = self.settings.epochs / math.ceil(self.settings.epochs)
        return max(1, math.ceil(sequences * share / per_step))

    def _step(self, step: int, all_sequences: list[list[list[int]]]) -> list[float]:
        """Learn from one step's batches, of which this process takes its share.

        Returns:
            each head's loss, and the backbone's behind them if it is trained
        """
        settings, accelerator = self.settings, self._accelerator
        rank, num_processes = accelerator.process_index, accelerator.num_processes
        learnt = [
            max(1, round(settings.loss_positions * self._batches.num_learnt(sequences)))
            for sequences in all_sequences
        ]
        scale = 1 / sum(learnt)
        found = []
        for index in range(rank, len(all_sequences), num_processes):
            batch = self._batches.build(all_sequences[index])
            if settings.loss_positions < 1:
                batch = draw_learnt(batch, learnt[index], [settings.seed, step, index])
            batch = batch.to(accelerator.device)
            found.append(self._learn(batch, scale, step, index))
        losses = torch.stack(found).sum(dim=0)
        if num_processes > 1:
            losses = accelerator.reduce(losses, "sum")
            for gradient in self._optimizer.gradients:
                gradient.copy_(accelerator.reduce(gradient, "sum"))
        self._optimizer.step(rate_factor(step, self.num_steps, settings.warmup))
        if self.backbone is not None and self.backbone.is_trained_at(step):
            self.backbone.step(step)
        values: list[float] = losses.tolist()
        return values

    def _learn(self, batch: Batch, scale: float, step: int, index: int) -> Tensor:
        """Add the gradient of a step's batch `index`; return the losses as `_step` does."""
        settings, backbone = self.settings, self.backbone
        if backbone is None or not backbone.is_trained_at(step):
            return accumulate_gradients(self._heads, self.target, batch, settings, scale)
        of_heads, of_backbone = accumulate_joint_gradients(
            self._heads,
            backbone,
            batch,
            settings,
            scale,
            heads_weight=backbone.heads_weight(step),
            noise=int(np.random.SeedSequence([settings.seed, step, index]).generate_state(1)[0]),
        )
        return torch.cat((of_heads, of_backbone[None]))

    def _starts_joint(self, done: int) -> bool:
        """Whether the step after so many is the first that trains the backbone."""
        return self.backbone is not None and done == self.backbone.first_step

    def _after(self, done: int, directory: RunDirectory) -> None:
        """Measure and save in the steps that do so."""
        history = self._history
        starts_joint = self._starts_joint(done)
        is_eval = done % self._eval_every == 0 or done == self.num_steps or starts_joint
        if is_eval:
            found = self._measure(self._held_out)
            if starts_joint:
                history.before = self.measured(found)
            length = expected_acceptance(found)
            if length > history.best:
                history.best_step = done
                if self.is_main:
                    directory.save_best(done, self._weights())
            history.evaluations.append((done, length))
        if self.is_main and (is_eval or done % self._save_every == 0):
            directory.save(self._state())

    def _measure(self, texts: Sequence[Text]) -> list[Continuation]:
        """Measure the heads on texts, each process on its share."""
        rank, num_processes = self._accelerator.process_index, self._accelerator.num_processes
        meter = RankMeter(self.target, self._heads, self.settings.batch_tokens)
        found = meter.measure(texts[rank::num_processes], lambda _: None)
        return gather_object(found) if num_processes > 1 else found

    def measured(self, continuations: list[Continuation]) -> dict[str, Any]:
        """Return what held-out rows say of heads and target: `summary`, and `measure_target`."""
        paths = best_paths([item.ranks for item in continuations], max(TREE_SIZES))
        rows, batch_tokens = self.dataset.held_out, self.settings.batch_tokens
        return {
            "held_out": summary(continuations, paths),
            "target": measure_target(self.target, rows, batch_tokens),
        }

    def _weights(self) -> dict[str, Any]:
        backbone = {} if self.backbone is None else {"backbone": self.backbone.weights()}
        return {"heads": self._heads.state_dict(), **backbone}

    def _state(self) -> dict[str, Any]:
        history = self._history
        backbone = {} if self.backbone is None else {"backbone": self.backbone.state()}
        return {
            **backbone,
            "heads": self._heads.state_dict(),
            "optimizer": self._optimizer.state(),
            "best_step": history.best_step,
            "history": vars(history),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self._heads.load_state_dict(state["heads"])
        self._optimizer.load_state(state["optimizer"])
        if self.backbone is not None:
            self.backbone.load_state(state["backbone"])
        self._history = History(**state["history"])

    def _finish(self, directory: RunDirectory) -> Outcome:
        """Round the best heads as they will be written, and measure them."""
        self.wait()  # for the main process to write them
        best = directory.load_best(self._history.best_step)
        self._heads.load_state_dict(best["heads"])
        with torch.no_grad():
            for parameter in self._heads.parameters():
                parameter.copy_(parameter.to(getattr(torch, self.settings.dtype)))
        if self.backbone is not None:
            self.backbone.load_weights(best["backbone"])
            self.target = self.backbone.merged()
            assert isinstance(self._heads, TrainableHeads)
            self._heads.use(self.target)
        continuations = self._measure(self._held_out)
        return Outcome(
            heads=self._heads,
            continuations=continuations,
            tested=[(test, self._measure(test.texts)) for test in self._test_sets],
            history=self._history,
            after=None if self.backbone is None else self.measured(continuations),
        )


def _check_joint(num_processes: int, compile_target: bool) -> None:
    if num_processes > 1:
        raise UserError(
            f"--joint: {num_processes} processes were started, and one alone can train the target; "
            "start it without accelerate launch"
        )
    if compile_target:
        raise UserError("--compile: is for a target that is not trained; leave it or --joint out")


def curve(
    losses: Sequence[Sequence[float]], num_points: int = 200
) -> Iterator[tuple[int, list[float]]]:
    """Yield (steps done, each loss averaged since the point before), evenly spaced."""
    width = max(1, math.ceil(len(losses) / num_points))
    for start in range(0, len(losses), width):
        part = losses[start : start + width]
        yield start + len(part), [sum(head) / len(part) for head in zip(*part, strict=True)]
