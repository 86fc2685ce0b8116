"""How much memory processes took, and how much there is left."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path


def peak_memory(pid: int) -> int:
    """Largest resident memory so far of a process and what it started, in bytes.

    It is the sum of each process's own peak, mapped files included, without processes that have
    ended.
    """
    return _sum_over_tree(pid, ("VmHWM",))


def private_memory(pid: int) -> int:
    """Memory now of a process and what it started that is not files, in bytes.

    One more such process takes this much: mapped files, mainly libraries, are in memory only once.
    """
    return _sum_over_tree(pid, ("RssAnon", "RssShmem"))


def _sum_over_tree(pid: int, fields: Sequence[str]) -> int:
    import psutil

    try:
        process = psutil.Process(pid)
        processes = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    total = 0
    for process in processes:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
        except OSError:
            continue  # it has ended
        found = re.findall(rf"^(?:{'|'.join(fields)}):\s+(\d+) kB", status, re.M)
        total += 1024 * sum(map(int, found))
    return total
