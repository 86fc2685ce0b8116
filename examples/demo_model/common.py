"""What the demo model's scripts share: the corpus, its split, progress lines and provenance."""

from __future__ import annotations

import ctypes
import json
import math
import platform
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"

# Folders of the standard library that are tests, generated tables or other people's code.
EXCLUDED_FOLDERS = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "pydoc_data", "site-packages", "encodings"}
    | {"ensurepip", "turtledemo", "__pycache__"}
)

# Never trained on: the source of the held-out prompts and of every number reported.
HELD_OUT_FILES = (
    "asyncio/queues.py",
    "concurrent/futures/thread.py",
    "configparser.py",
    "csv.py",
    "email/message.py",
    "heapq.py",
    "http/cookies.py",
    "json/decoder.py",
    "logging/handlers.py",
    "sched.py",
    "shelve.py",
    "statistics.py",
    "textwrap.py",
    "unittest/suite.py",
    "zipapp.py",
)


class DemoError(Exception):
    """A mistake of the caller, reported in one line."""


def require(path: Path, script: str) -> None:
    """Refuse a missing input by name, with the script that makes it."""
    if not path.exists():
        raise DemoError(f"{path} does not exist: run {script} first")


def read_corpus() -> tuple[list[str], list[str]]:
    """Source texts of the running interpreter's standard library: (training, held out)."""
    root = Path(sysconfig.get_paths()["stdlib"])
    train: list[str] = []
    held_out: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if EXCLUDED_FOLDERS.intersection(relative.parts):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if relative.as_posix() in HELD_OUT_FILES:
            held_out[relative.as_posix()] = text
        elif text.strip():
            train.append(text)
    missing = [name for name in HELD_OUT_FILES if name not in held_out]
    if missing:
        raise DemoError(f"{root} lacks the held-out file {missing[0]}: use a full CPython 3.11")
    return train, [held_out[name] for name in HELD_OUT_FILES]


def encode_stream(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> torch.Tensor:
    """All texts as one int64 stream [num_tokens], each text closed by the end-of-text token."""
    eos = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    parts = [np.asarray([*ids, eos]) for ids in tokenizer(texts, verbose=False)["input_ids"]]
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def keep_freed_memory() -> None:
    """Stop glibc from returning freed memory: the page faults cost a third of a CPU step."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # not glibc: only slower
        return
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)
    mallopt(m_top_pad, 256 * 2**20)


class Progress:
    """Prints a line every `every` steps: step, message, rate and time left."""

    def __init__(self, total: int, unit: str, per_step: int, every: int) -> None:
        self.total, self.unit, self.per_step, self.every = total, unit, per_step, every
        self.start = time.perf_counter()

    def update(self, step: int, message: str) -> None:
        """Print a line when step (from 1) is due, and at the last one."""
        if step % self.every and step != self.total:
            return
        elapsed = time.perf_counter() - self.start
        left = elapsed / step * (self.total - step)
        rate = step * self.per_step / elapsed
        line = f"{step}/{self.total}  {message}  {rate:.0f} {self.unit}/s"
        print(f"{line}  elapsed {elapsed:.0f} s  left {left:.0f} s", flush=True)


def learning_rate_factor(step: int, total: int, warmup: int) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def build_optimizers(
    module: torch.nn.Module, muon_lr: float, adamw_lr: float, adamw_names: tuple[str, ...]
) -> list[torch.optim.Optimizer]:
    """Muon on the hidden matrices; AdamW on vectors and names containing `adamw_names`."""
    matrices: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    for name, parameter in module.named_parameters():
        is_matrix = parameter.ndim == 2 and not any(part in name for part in adamw_names)
        (matrices if is_matrix else rest).append(parameter)
    muon = torch.optim.Muon(
        matrices, lr=muon_lr, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(rest, lr=adamw_lr, betas=(0.9, 0.95), weight_decay=0.0)
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return [muon, adamw]


def provenance(**facts: Any) -> dict[str, Any]:
    """How a file came to be: versions, command, git revision and the given facts."""
    git = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    script = Path(sys.argv[0]).name
    return {
        "command": " ".join(["python", f"examples/demo_model/{script}", *sys.argv[1:]]),
        "git_revision": git.stdout.strip() or None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        **facts,
    }


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def run_script(run: Callable[[], None]) -> int:
    """Run a script, with errors in one line; returns its exit status."""
    try:
        run()
    except (DemoError, OSError) as error:
        print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        return 1
    return 0
