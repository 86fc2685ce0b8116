"""Where results come from: versions, machine, command, revision, time."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vllm_medusa import __version__
from vllm_medusa.errors import UserError

_PACKAGES = ("vllm", "torch", "transformers", "numpy", "accelerate", "pyarrow", "ray")
#: Instruction sets that decide how fast a CPU multiplies.
_CPU_FLAGS = re.compile(r"\b(amx_\w+|avx512_bf16|avx512f|avx2)\b")


def vllm_version() -> str:
    """The installed vLLM's version, without importing it.

    Raises:
        UserError: none is installed.
    """
    try:
        return version("vllm")
    except PackageNotFoundError:
        raise UserError(
            'vLLM is not installed here; run pip install "vllm-medusa[vllm]" in its environment'
        ) from None


def provenance(device_name: str | None) -> dict[str, Any]:
    """All of it as JSON has it.

    Args:
        device_name: of the accelerator; None on a CPU.
    """
    return {
        "time": now(),
        **software(),
        "machine": {
            "cpu": cpu_name(),
            "cpu_flags": cpu_flags(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
            "device": device_name,
            "platform": platform.platform(),
        },
        "load_average": os.getloadavg()[0],
    }


def software() -> dict[str, Any]:
    """Command, versions and revision; None for a package that is not installed."""
    return {
        "command": shlex.join(["vllm-medusa", *sys.argv[1:]]),
        "versions": {
            "vllm_medusa": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
        },
        "git_revision": git_revision(),
    }


def now() -> str:
    """The time, in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def git_revision() -> str | None:
    """Revision of the checkout that this package runs from, ``-dirty`` if changed; None if none."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(
            command,
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def cpu_name() -> str:
    """The processor's name."""
    found = re.search(r"^model name\s*:\s*(.+)$", _cpuinfo(), re.M)
    return found[1] if found else platform.processor() or platform.machine()


def cpu_flags() -> list[str]:
    """Its instruction sets for matrices and vectors."""
    found = re.search(r"^flags\s*:\s*(.+)$", _cpuinfo(), re.M)
    return sorted(set(_CPU_FLAGS.findall(found[1]))) if found else []


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
