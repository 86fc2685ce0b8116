"""Who may import whom, and how long files and functions may be.

The layers: `tree` stands on nothing of ours, `heads` on `tree` at most, only `engine` imports
vLLM, and only `cli` imports `engine`.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
PACKAGE = "vllm_medusa"
MAX_FILE_LINES = 399
MAX_FUNCTION_LINES = 59

# Layer -> the layers of ours it may import besides itself; a layer not named here may import all
# but `engine`.
ALLOWED = {
    "tree": set[str](),
    "heads": {"tree"},
}
MAY_IMPORT_ENGINE = {"cli", "engine"}


def modules() -> Iterator[tuple[str, ast.Module]]:
    """Dotted name and syntax tree of each module of the package."""
    for path in sorted((REPO / PACKAGE).rglob("*.py")):
        parts = path.relative_to(REPO).with_suffix("").parts
        yield ".".join(parts), ast.parse(path.read_text())


def imported_names(module: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of all that is imported, wherever in the file."""
    package = module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            for argument in node.args:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield node.lineno, argument.value


def layering_offences(module: str, tree: ast.Module) -> list[str]:
    layer = [*module.split("."), ""][1]
    offences = []
    for line, name in imported_names(module, tree):
        top, _, rest = name.partition(".")
        if top == "vllm" and layer != "engine":
            offences.append(f"{module}:{line} imports {name}: only engine may import vllm")
        if top != PACKAGE:
            continue
        target = rest.partition(".")[0]
        if target == "engine" and layer not in MAY_IMPORT_ENGINE:
            offences.append(f"{module}:{line} imports {name}: only cli may import engine")
        elif layer in ALLOWED and target not in {layer, *ALLOWED[layer]}:
            offences.append(f"{module}:{line} imports {name}: {layer} may not")
    return offences


def length_offences(name: str, source: str) -> list[str]:
    num_lines = source.count("\n")
    offences = []
    if num_lines > MAX_FILE_LINES:
        offences.append(f"{name} has {num_lines} lines")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                offences.append(f"{name}:{node.lineno} {node.name} has {length} lines")
    return offences


def test_layers() -> None:
    offences = [text for name, tree in modules() for text in layering_offences(name, tree)]
    assert not offences, "\n".join(offences)


def test_lengths() -> None:
    offences = [
        text
        for folder in (PACKAGE, "tests", "examples", "tools")
        for path in sorted((REPO / folder).rglob("*.py"))
        for text in length_offences(str(path.relative_to(REPO)), path.read_text())
    ]
    assert not offences, "\n".join(offences)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("vllm_medusa.config", "import vllm"),
        ("vllm_medusa.config", "import vllm.config as c"),
        ("vllm_medusa.bench.run", "def f():\n    from vllm import LLM"),
        ("vllm_medusa.cli", "import importlib\nimportlib.import_module('vllm.engine')"),
        ("vllm_medusa.training.loop", "from vllm_medusa.engine import plugin"),
        ("vllm_medusa.training.loop", "from vllm_medusa import engine"),
        ("vllm_medusa.training.loop", "from ..engine.plugin import register"),
        ("vllm_medusa.training.loop", "from .. import engine"),
        ("vllm_medusa.tree.verify", "from vllm_medusa.heads import module"),
        ("vllm_medusa.tree.verify", "from vllm_medusa import config"),
        ("vllm_medusa.tree.verify", "from ..config import MedusaConfig"),
        ("vllm_medusa.heads.module", "import vllm_medusa.config"),
    ],
)
def test_offence_is_found(module: str, source: str) -> None:
    assert len(layering_offences(module, ast.parse(source))) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("vllm_medusa.engine.plugin", "import vllm\nfrom vllm_medusa.tree import DraftTree"),
        ("vllm_medusa.cli", "from vllm_medusa.engine import plugin"),
        ("vllm_medusa.tree.verify", "from .layout import TreeLayout\nimport torch"),
        ("vllm_medusa.heads.module", "from vllm_medusa.tree import DraftTree"),
        ("vllm_medusa.config", "from vllm_medusa.tree import DraftTree\nimport vllm_medusa_x"),
    ],
)
def test_lawful_import_is_not(module: str, source: str) -> None:
    assert layering_offences(module, ast.parse(source)) == []


def test_long_file_and_long_function_are_found() -> None:
    body = "    pass\n" * MAX_FUNCTION_LINES
    assert length_offences("x", f"def f():\n{body}") == [
        f"x:1 f has {MAX_FUNCTION_LINES + 1} lines"
    ]
    assert length_offences("x", "pass\n" * (MAX_FILE_LINES + 1)) == ["x has 400 lines"]
    assert length_offences("x", "def f():\n" + "    pass\n" * (MAX_FUNCTION_LINES - 1)) == []
