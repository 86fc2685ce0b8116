"""Make vLLM keep Triton on a CPU, where Triton's interpreter runs it. See setup_v2.py.

A ``.pth`` file imports this when Python starts.
"""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "1")


def pretend() -> None:
    """Give Triton a backend for CPUs that says it is there; the interpreter never asks it more."""
    from triton.backends import Backend, backends

    class Driver:
        @staticmethod
        def is_active() -> bool:
            return True

    backends["cpu"] = Backend(compiler=None, driver=Driver)


if os.environ["TRITON_INTERPRET"] == "1":
    pretend()
