"""Training from settings to a directory of heads: what `vllm-medusa train` calls."""

from __future__ import annotations

import json
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_medusa.errors import UserError
from vllm_medusa.reporting.plots import check_matplotlib
from vllm_medusa.training.settings import TrainSettings

if TYPE_CHECKING:
    from vllm_medusa.training.loop import Training
    from vllm_medusa.training.run_directory import RunDirectory


def train(
    settings: TrainSettings,
    out: Path,
    *,
    save_every: int | None = None,
    compile_target: bool = False,
) -> dict[str, Any]:
    """Train Medusa heads, or continue an interrupted training into `out`.

    Under ``accelerate launch`` every process calls this.

    Args:
        settings: settings of the run, which decide the result.
        out: directory to make; until it is complete, the state is in `<out>.partial`.
        save_every: steps between checkpoints, beside those at each measurement.
        compile_target: whether to compile the target's forward pass.

    Returns:
        the report (`report.json`).

    Raises:
        UserError: settings, a model or rows that cannot be used, or a directory that cannot be
            written.
    """
    if save_every is not None and save_every < 1:
        raise UserError(f"--save-every {save_every}: must be 1 or more")
    if find_spec("accelerate") is None:
        raise UserError('training needs accelerate: pip install "vllm-medusa[train]"')
    if settings.joint == "lora" and find_spec("peft") is None:
        raise UserError('--joint lora needs peft: pip install "vllm-medusa[train]"')
    check_matplotlib("train")
    from vllm_medusa.training.loop import Training
    from vllm_medusa.training.run_directory import RunDirectory

    training = Training(settings, save_every=save_every, compile_target=compile_target)
    directory = RunDirectory(out)
    if directory.is_finished(training.identity):
        if training.is_main:
            directory.discard()
    else:
        with directory.taken() if training.is_main else nullcontext():
            _train_and_write(training, directory)
        training.wait()
    report: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return report


def _train_and_write(training: Training, directory: RunDirectory) -> None:
    from vllm_medusa.training.report import write_heads

    outcome = training.run(directory)
    if not training.is_main:
        return
    try:
        write_heads(training, outcome, directory.staging(), directory.out)
        directory.finish()
    except OSError as exc:
        raise UserError(
            f"{directory.out}: cannot be written ({exc.strerror or exc}); the state stays in "
            f"{directory.path}, so make room and give the same command again"
        ) from None
