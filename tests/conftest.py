"""Settings of every test run. Environment variables are set here, before vLLM is imported."""

import os

from hypothesis import HealthCheck, settings

# The engine in this process, quiet, off the network, small, and alone on one thread: OpenMP's
# spinning threads make a step many times slower as soon as a second process is busy.
for name, value in {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
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
