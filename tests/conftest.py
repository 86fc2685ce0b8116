"""Settings of every test run. Environment variables are set here, before vLLM is imported."""

import os
import signal
from types import FrameType

import pytest
from hypothesis import HealthCheck, settings

#: They begin first of those with engines, so that no worker ends with one of them alone.
LONGEST_FILES = ["test_readme.py", "test_readme_tools.py", "test_bench.py", "test_serve.py"]

# The engine in this process, quiet, off the network, small, and alone on one thread: OpenMP's
# spinning threads make a step many times slower as soon as a second process is busy.
for name, value in {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray listens on the loopback interface
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}.items():
    os.environ.setdefault(name, value)

# The same examples on every run, so that a failure is a change's; `--hypothesis-profile=explore`
# draws new ones. No deadline: the first call of a torch function may take a second.
settings.register_profile(
    "repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile("repeatable")


def take_cores() -> None:
    """Leave the other workers of pytest-xdist cores of their own; what a test starts inherits it.

    vLLM binds its threads to the first cores it may use, so all workers' engines would share them.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
    count = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[int(worker) % count :: count] or cores)


def heed_signals() -> None:
    """Let SIGINT and SIGTERM end the run with its engines and fixtures closed.

    A shell has a job in the background ignore SIGINT, some have it ignore SIGTERM too, and whatever
    they start inherits that. Unheeded, SIGTERM ends Python without closing anything.
    """
    process = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # forked by a test, which may rely on what SIGTERM does
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, stop)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Quick tests first, then the longest files, then the others in their order."""

    def place(item: pytest.Item) -> int:
        if item.path.parent.name != "integration":
            return -1
        names = [*LONGEST_FILES, item.path.name]
        return names.index(item.path.name)

    items.sort(key=place)


take_cores()
heed_signals()
