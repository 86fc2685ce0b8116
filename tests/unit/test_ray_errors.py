"""What a worker on Ray finds wrong, or lacks, is one line where the engine was asked for."""

from __future__ import annotations

import pytest

from vllm_medusa.errors import UserError
from vllm_medusa.plugin.one_line_errors import errors_of_ray_workers


def as_ray_raises(cause: Exception) -> Exception:
    """What `ray.get` raises of a worker's error."""
    exceptions = pytest.importorskip("ray.exceptions")
    error = exceptions.RayTaskError(
        "RayWorkerProc.initialize_worker",
        "ray::RayWorkerProc.initialize_worker() (pid=7, ip=10.0.0.2, actor_id=0a)\n"
        f"  a traceback\n{type(cause).__name__}: {cause}",
        cause,
        proctitle="ray::RayWorkerProc",
        pid=7,
        ip="10.0.0.2",
    )
    raised: Exception = error.as_instanceof_cause()
    return raised


def missing(module: str) -> Exception:
    return ModuleNotFoundError(f"No module named {module!r}", name=module)


def test_worker_without_the_plugin_is_named() -> None:
    with pytest.raises(UserError) as caught, errors_of_ray_workers():
        raise as_ray_raises(missing("vllm_medusa"))
    assert str(caught.value) == (
        "vllm_medusa is not installed on the Ray node 10.0.0.2, in the environment of its vLLM; "
        "install this version of vllm-medusa there too"
    )


def test_mistake_that_a_worker_finds_keeps_its_words() -> None:
    with pytest.raises(UserError, match=r"^heads hold NaN$") as caught, errors_of_ray_workers():
        raise as_ray_raises(UserError("heads hold NaN"))
    assert type(caught.value) is UserError


@pytest.mark.parametrize("cause", [missing("flash_attn"), ValueError("vLLM's own")])
def test_other_errors_are_left_alone(cause: Exception) -> None:
    error = as_ray_raises(cause)
    with pytest.raises(type(cause)) as caught, errors_of_ray_workers():
        raise error
    assert caught.value is error
    with pytest.raises(type(cause)) as caught, errors_of_ray_workers():
        raise cause
    assert caught.value is cause
