"""The attention backends with trees, and their entries in vLLM's registry."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from vllm_medusa.errors import UserError
from vllm_medusa.plugin.compat import plugin_logger
from vllm_medusa.plugin.worker.v2.attention import TreeBuilderMixin, TreeImplMixin

_PACKAGE = "vllm_medusa.plugin.worker.v2"
_BACKENDS = {
    AttentionBackendEnum.TRITON_ATTN: f"{_PACKAGE}.triton_backend.TreeTritonBackend",
    AttentionBackendEnum.FLASH_ATTN: f"{_PACKAGE}.flash_backend.TreeFlashBackend",
}
_FLASHINFER = AttentionBackendEnum.FLASHINFER

logger = plugin_logger(__name__)


class NoFlashInfer:
    """Stands for ``FLASHINFER``: the platform goes on to the next backend of its list."""

    @staticmethod
    def validate_configuration(**_: Any) -> list[str]:
        """Return why it is not chosen, as ``AttentionBackend.validate_configuration`` does."""
        logger.info_once(
            "FLASHINFER attends to draft trees only if attention_backend names it; another "
            "backend is chosen."
        )
        return ["it attends to draft trees only if attention_backend names it"]


@contextmanager
def tree_backends(wanted: AttentionBackendEnum | None) -> Iterator[None]:
    """Replace backends in vLLM's registry by ours with trees, while a model is built.

    The platform still chooses the backend of a layer. Another engine of this process must not get
    our backends, so the registry is restored afterwards.

    Args:
        wanted: the backend that the user has set; None: the platform chooses.

    """
    # No GPU has run it yet, so no one gets it without asking.
    flashinfer = "flashinfer_backend.TreeFlashInferBackend"
    name = flashinfer if wanted is _FLASHINFER else "backends.NoFlashInfer"
    paths = {**_BACKENDS, _FLASHINFER: f"{_PACKAGE}.{name}"}
    before = {backend: backend.get_path() for backend in paths}
    for backend, path in paths.items():
        register_backend(backend, path)
    selector._cached_get_attn_backend.cache_clear()
    try:
        yield
    finally:
        for backend, path in before.items():
            register_backend(backend, path)
        selector._cached_get_attn_backend.cache_clear()


def check_layers(attn_groups: Sequence[Sequence[Any]]) -> None:
    """Refuse layers with another attention backend.

    Args:
        attn_groups: vLLM's attention groups, by KV-cache group.

    Raises:
        UserError: naming the backend, and the remedy.

    """
    for groups in attn_groups:
        for group in groups:
            name = group.backend.get_name()
            builders = group.metadata_builders
            is_ours = issubclass(group.backend.get_impl_cls(), TreeImplMixin)
            if not is_ours or not all(isinstance(each, TreeBuilderMixin) for each in builders):
                raise UserError(
                    f"attention_backend={name!r} has no attention to trees on Model Runner V2; use "
                    "attention_backend='TRITON_ATTN' or 'FLASH_ATTN', or tree='chain'"
                )
