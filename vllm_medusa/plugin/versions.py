"""The versions of vLLM that the plugin was verified with: the one place that says so.

`compat`, the tests and the docs take them from here (`tests/unit/test_versions.py`).
"""

#: Minor version: the exact version that the tests ran with. Any patch release of it is accepted.
VERIFIED = {"0.32": "0.32.0", "0.33": "0.33.0"}
