"""A whole comparison: settings in, results and report out."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from vllm_medusa.bench.plan import make_plan
from vllm_medusa.bench.profile import profile_steps
from vllm_medusa.bench.run_offline import compare_offline
from vllm_medusa.bench.run_online import compare_online
from vllm_medusa.bench.settings import Settings
from vllm_medusa.engines.engine import EngineProcessError
from vllm_medusa.errors import UserError


def run(settings: Settings) -> str:
    """Compare, write the results, return what to print.

    Raises:
        UserError: something that the user has to mend; with ``strict``, also differing outputs.
    """
    with tempfile.TemporaryDirectory(prefix="vllm-medusa-bench-") as folder, ends_on_sigterm():
        plan = make_plan(settings, Path(folder))
        try:
            if settings.profile_steps:
                return profile_steps(plan)
            if settings.online:
                return compare_online(plan, Path(folder))
            return compare_offline(plan)
        except EngineProcessError as exc:
            raise UserError(f"the baseline does not run: {exc.reason}") from None


@contextmanager
def ends_on_sigterm() -> Iterator[None]:
    """Within it SIGTERM ends the program as an exception does, so that engines are stopped."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
