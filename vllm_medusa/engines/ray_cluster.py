"""Ray clusters: joined, or started on this machine; and the resources of one engine."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm_medusa.errors import UserError

#: The address that starts a cluster on this machine.
LOCAL = "local"
#: Read by Ray when it is imported. At 0 a cluster that is started listens on the loopback interface
#: alone, whatever the system: ``services.get_node_ip_address``, which overrides
#: ``_node_ip_address="127.0.0.1"``.
_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
_SECONDS_TO_KNOCK = 10
#: CPUs of a cluster started here for the tasks that read and write beside the engines.
_CPUS_BESIDE_ENGINES = 2
_OBJECT_STORE_BYTES = 200 * 2**20


@contextmanager
def ray_cluster(address: str, num_engines: int, *, option: str = "--ray") -> Iterator[Any]:
    """Join a Ray cluster for a while, or start one on this machine.

    Args:
        address: of the cluster, ``HOST:PORT``; ``auto`` is the running one. ``local`` starts one,
            which listens on the loopback interface alone and ends with the context.
        num_engines: that will run at once; a cluster that is started is made large enough.
        option: name of the address's option, for errors.

    Yields:
        The module ``ray``.

    Raises:
        UserError: Ray Data is not installed, or no cluster is there.
    """
    if address == LOCAL:
        os.environ.setdefault(_LOOPBACK, "0")
    try:
        import ray
        import ray.data
    except ImportError as exc:
        raise UserError(
            f'{option} needs Ray Data ({exc}): pip install "vllm-medusa[ray]"'
        ) from None
    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": "ERROR"}
    if address == LOCAL:
        options |= {
            "num_cpus": max(num_engines + _CPUS_BESIDE_ENGINES, os.cpu_count() or 1),
            "object_store_memory": _OBJECT_STORE_BYTES,
            "include_dashboard": False,
        }
    try:
        _check_reachable(address)
        ray.init(**options)
    except (OSError, ValueError, RuntimeError) as exc:
        reason = str(exc).strip().splitlines()[0]
        raise UserError(f"{option} {address}: no Ray cluster found there ({reason})") from None
    try:
        yield ray
    finally:
        ray.shutdown()


def engine_resources(ray: Any, world_size: int) -> dict[str, int]:
    """The resources of one engine: GPUs, or a CPU if the cluster has no GPUs.

    Args:
        ray: from `ray_cluster`.
        world_size: GPUs that the model is split over.
    """
    if not ray.cluster_resources().get("GPU"):
        return {"num_cpus": 1}
    return {"num_gpus": world_size}


def _check_reachable(address: str) -> None:
    """Connect to an address; Ray itself would try for minutes."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon:
        socket.create_connection((host, int(port)), timeout=_SECONDS_TO_KNOCK).close()
