"""Versions of vLLM, and patches that are checked."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from vllm_medusa.errors import UserError
from vllm_medusa.plugin.versions import VERIFIED

_PATCHED = "_vllm_medusa_patched"


def vllm_version() -> str:
    """Return the version of the vLLM in use."""
    import vllm

    return vllm.__version__


def minor_version() -> str:
    """Return the minor version of the vLLM in use, a key of `VERIFIED` if it is supported."""
    return ".".join(vllm_version().split(".")[:2])


def is_supported_version() -> bool:
    """Whether this vLLM is one the plugin was tested with."""
    return minor_version() in VERIFIED


def plugin_logger(name: str) -> Any:
    """Return a logger of vLLM's for a module of ours.

    vLLM configures only the logger ``vllm``: other names show nothing below a warning.
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
            f"vllm_medusa supports vLLM {' and '.join(VERIFIED)}, not {vllm_version()}; "
            "install one of these, or leave the plugin out with VLLM_PLUGINS=''"
        )


def check_signature(owner: Any, name: str, parameters: Sequence[str]) -> Any:
    """Check a function that will be patched or overridden.

    Args:
        owner: class or module.
        name: name of the function.
        parameters: required names of its first parameters, which our code relies on.

    Returns:
        The attribute itself: a function, or a static method around one.

    Raises:
        UserError: if this vLLM has no such function or its parameters differ.

    """
    attribute = inspect.getattr_static(owner, name, None)
    function = attribute.__func__ if isinstance(attribute, staticmethod) else attribute
    found = list(inspect.signature(function).parameters) if callable(function) else None
    if found is None or found[: len(parameters)] != list(parameters):
        raise UserError(
            f"vllm_medusa does not fit vLLM {vllm_version()}: {owner.__name__}.{name} takes "
            f"{found}, expected {list(parameters)}; use vLLM {' or '.join(VERIFIED.values())}"
        )
    return attribute


def patch(owner: Any, name: str, parameters: Sequence[str], wrap: Callable[[Any], Any]) -> None:
    """Replace ``owner.name`` by ``wrap(original)``, once.

    Args:
        owner: class or module.
        name: name of the function.
        parameters: as in `check_signature`.
        wrap: makes the replacement.

    Raises:
        UserError: if this vLLM has no such function or its parameters differ.

    """
    attribute = inspect.getattr_static(owner, name, None)
    if getattr(getattr(attribute, "__func__", attribute), _PATCHED, False):
        return
    attribute = check_signature(owner, name, parameters)
    is_static = isinstance(attribute, staticmethod)
    function = attribute.__func__ if is_static else attribute
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
