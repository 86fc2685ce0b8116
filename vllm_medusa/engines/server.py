"""A `vllm serve` on the loopback interface, and its metrics."""

from __future__ import annotations

import contextlib
import functools
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from vllm_medusa.engines.engine import EngineInfo, has_accelerator
from vllm_medusa.engines.memory import peak_memory, private_memory
from vllm_medusa.engines.process import Process

#: The `vllm` command.
VLLM = (sys.executable, "-m", "vllm.entrypoints.cli.main")
_HOST = "127.0.0.1"
_POLL_S = 0.25


class ServerProcess(Process):
    """Starts a server; use as a context manager, or `close` it.

    Args:
        model: the target model.
        speculative: its ``speculative_config``, if any.
        options: arguments of ``vllm.LLM``, given as the flags of the same names.
        environment: environment variables beside the caller's own.
    """

    def __init__(
        self,
        model: str,
        speculative: Mapping[str, Any] | None,
        options: Mapping[str, Any],
        environment: Mapping[str, str],
    ) -> None:
        self.port = free_port()
        command = [*VLLM, "serve", model, "--host", _HOST, "--port", str(self.port)]
        command += as_flags(options)
        if speculative is not None:
            command += ["--speculative-config", json.dumps(speculative)]
        own = {"VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": _HOST}
        super().__init__(command, {**own, **environment})

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://{_HOST}:{self.port}"

    def wait(self) -> EngineInfo:
        """Wait until it answers.

        Raises:
            EngineProcessError: it ends before.
        """
        while True:
            if self._process.poll() is not None:
                raise self.failure()
            with contextlib.suppress(urllib.error.URLError, OSError):
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                break
            time.sleep(_POLL_S)
        return EngineInfo(
            startup_s=time.monotonic() - self.started,
            device="cuda" if has_accelerator() else "cpu",
            device_name=accelerator_name(),
            peak_memory_bytes=self.peak_memory(),
            private_memory_bytes=private_memory(self.pid),
        )

    def peak_memory(self) -> int:
        """Largest resident memory so far of all its processes, in bytes."""
        return peak_memory(self.pid)

    def metrics(self) -> dict[str, float]:
        """Its present counters, as `read_counters` reads them from ``/metrics``.

        Raises:
            EngineProcessError: it does not answer.
        """
        try:
            with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
                return read_counters(answer.read().decode())
        except OSError:
            raise self.failure() from None


def read_counters(text: str) -> dict[str, float]:
    """Read vLLM's counters from a page of ``/metrics``, summed over labels."""
    from prometheus_client.parser import text_string_to_metric_families

    totals: dict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(text):
        if family.type == "counter" and family.name.startswith("vllm:"):
            for sample in family.samples:
                if sample.name.endswith("_total"):
                    totals[family.name] += sample.value
    return totals


def as_flags(options: Mapping[str, Any]) -> list[str]:
    """Arguments of ``vllm.LLM`` as flags of ``vllm serve``."""
    flags = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            flags += [f"--{flag}", text]
    return flags


def free_port() -> int:
    """A free port of the loopback interface."""
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        port: int = probe.getsockname()[1]
        return port


@functools.cache
def accelerator_name() -> str | None:
    """The GPU's name, None without one; read in another process, because CUDA takes GPU memory."""
    if not has_accelerator():
        return None
    program = "import torch; print(torch.cuda.get_device_name())"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"
