"""Versions of vLLM, and checked patching of what has no official seam."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from vllm_medusa.errors import UserError

SUPPORTED_VERSIONS = ("0.32", "0.33")
_PATCHED = "_vllm_medusa_patched"


def vllm_version() -> str:
    """Return the version of the vLLM in use."""
    import vllm

    return vllm.__version__


def is_supported_version() -> bool:
    """Whether this vLLM is one the plugin was tested with."""
    return ".".join(vllm_version().split(".")[:2]) in SUPPORTED_VERSIONS


def plugin_logger(name: str) -> Any:
    """Return a logger of vLLM's for a module of ours.

    vLLM sets up the logger ``vllm`` alone: under any other name nothing below a warning is shown.
    """
    from vllm.logger import init_logger

    return init_logger(f"vllm.{name}")


def check_version() -> None:
    """Refuse to run on a vLLM that the plugin was not tested with.

    Raises:
        UserError: naming the supported versions.

    """
    if not is_supported_version():
        raise UserError(
            f"vllm_medusa supports vLLM {' and '.join(SUPPORTED_VERSIONS)}, not {vllm_version()}; "
            "install one of these, or leave the plugin out with VLLM_PLUGINS=''"
        )


def patch(owner: Any, name: str, parameters: list[str], wrap: Callable[[Any], Any]) -> None:
    """Replace ``owner.name`` by ``wrap(original)``, once.

    Args:
        owner: class or module.
        name: function of it.
        parameters: the names that its first parameters must have: what the wrapper relies on.
        wrap: makes the replacement.

    Raises:
        UserError: if this vLLM has no such function or its parameters differ.

    """
    original = inspect.getattr_static(owner, name, None)
    is_static = isinstance(original, staticmethod)
    function = original.__func__ if is_static else original
    if getattr(function, _PATCHED, False):
        return
    found = list(inspect.signature(function).parameters) if callable(function) else None
    if found is None or found[: len(parameters)] != parameters:
        raise UserError(
            f"vllm_medusa does not fit vLLM {vllm_version()}: {owner.__name__}.{name} takes "
            f"{found}, expected {parameters}; use vLLM {' or '.join(SUPPORTED_VERSIONS)}"
        )
    replacement = functools.wraps(function)(wrap(function))
    setattr(replacement, _PATCHED, True)
    setattr(owner, name, staticmethod(replacement) if is_static else replacement)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute while the context lasts."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)
