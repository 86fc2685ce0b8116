"""Who may import whom, and how long files and functions may be.

`LAYERS` lists the layers: a layer may import itself and the layers named for it. Modules that
are named in strings (a worker's entry point, a class that vLLM imports by name) count as imports.
"""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
PACKAGE = "vllm_medusa"
MAX_FILE_LINES = 399
MAX_FUNCTION_LINES = 59

# Layer -> the other layers it may import. Each stands below the line of those that may import it.
LAYERS: dict[str, set[str]] = {
    "errors": set(),
    "files": {"errors"},
    "settings": {"errors"},
    "reporting": {"errors", "files"},
    "tree": {"errors"},
    "draft": {"errors", "tree"},
    "heads": {"errors", "tree"},
    "kernels": set(),
    "config": {"errors", "tree"},
    "data": {"errors", "files"},
    "target": {"errors", "heads", "data", "settings"},
    "acceptance": {"errors", "tree", "heads", "data", "target", "reporting"},
    "plugin": {"errors", "files", "tree", "draft", "heads", "kernels", "config", "reporting"},
    "engines": {"errors", "data", "target", "plugin"},
    "stepcost": {"errors", "files", "tree", "engines", "reporting"},
}
# The tools may use all the layers above but the plugin; none imports another.
TOOLS = {"distill", "training", "calibration", "bench"}
BELOW_TOOLS = set(LAYERS) - {"plugin", "kernels"}
LAYERS |= dict.fromkeys(TOOLS, BELOW_TOOLS)
LAYERS["cli"] = BELOW_TOOLS | TOOLS

IMPORTS_VLLM = {"plugin", "engines"}
# Pure packages import neither vLLM nor anything that brings it; these they may.
PURE = {
    "tree": {"torch", "numpy"},
    "draft": {"numpy", "numba", "llvmlite"},
    "kernels": {"torch", "triton"},
    "heads": {"torch", "numpy", "safetensors", "huggingface_hub"},
}
_MODULE_NAME = re.compile(rf"{PACKAGE}(\.[a-z_0-9]+)+")


def modules() -> Iterator[tuple[str, ast.Module]]:
    """Dotted name and syntax tree of each module of the package."""
    for path in sorted((REPO / PACKAGE).rglob("*.py")):
        parts = path.relative_to(REPO).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        yield name, ast.parse(path.read_text())


def imported_names(
    module: str, tree: ast.Module, with_strings: bool = True
) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of all that is imported or named, wherever in the file."""
    package = module.split(".")[:-1]
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
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
        elif with_strings and isinstance(node, ast.Constant) and isinstance(node.value, str):
            is_name = _MODULE_NAME.match(node.value) and id(node) not in docstrings
            if is_name and not node.value.endswith("."):
                yield node.lineno, node.value


def layering_offences(module: str, tree: ast.Module) -> list[str]:
    layer = [*module.split("."), ""][1]
    offences = []
    for line, name in imported_names(module, tree):
        top, _, rest = name.partition(".")
        if top == "vllm" and layer not in IMPORTS_VLLM:
            offences.append(f"{module}:{line} imports {name}: only plugin and engines may")
        elif top == PACKAGE:
            target = rest.partition(".")[0]
            if target in LAYERS and layer and target not in {layer, *LAYERS.get(layer, set())}:
                offences.append(f"{module}:{line} imports {name}: {layer} may not")
        elif layer in PURE and top not in PURE[layer] and not _is_standard(top):
            offences.append(f"{module}:{line} imports {name}: {layer} is pure")
    return offences


def _is_standard(top: str) -> bool:
    import sys

    return top in sys.stdlib_module_names


def import_graph(sources: list[tuple[str, ast.Module]]) -> dict[str, set[str]]:
    """Each module and the modules of ours that it imports, wherever in the file."""
    names = {name for name, _ in sources}
    graph: dict[str, set[str]] = {name: set() for name in names}
    for name, tree in sources:
        for _, imported in imported_names(name, tree, with_strings=False):
            # `from package.module import name` names the module or something in it.
            target = imported if imported in names else imported.rpartition(".")[0]
            if target in names - {name} and not name.startswith(f"{target}."):
                graph[name].add(target)
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one import circle, or none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


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


def test_every_module_has_a_layer() -> None:
    layers = {[*name.split("."), ""][1] for name, _ in modules()} - {""}
    assert layers == set(LAYERS)


def test_layers_have_no_circle() -> None:
    assert not circle(LAYERS)


def test_modules_have_no_circle() -> None:
    assert not circle(import_graph(list(modules())))


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
        ("vllm_medusa.cli.main", "import importlib\nimportlib.import_module('vllm.engine')"),
        ("vllm_medusa.training.loop", "from vllm_medusa.plugin import register"),
        ("vllm_medusa.training.loop", "from vllm_medusa import plugin"),
        ("vllm_medusa.training.loop", "from ..plugin.register import register"),
        ("vllm_medusa.training.loop", "from .. import plugin"),
        ("vllm_medusa.training.loop", "WORKER = 'vllm_medusa.plugin.worker'"),
        ("vllm_medusa.training.loop", "from vllm_medusa.calibration import run"),
        ("vllm_medusa.calibration.run", "from vllm_medusa.training.target import load_target"),
        ("vllm_medusa.calibration.run", "RUN = 'vllm_medusa.bench.run'"),
        ("vllm_medusa.cli.main", "from vllm_medusa.plugin import register"),
        ("vllm_medusa.plugin.timers", "from vllm_medusa.bench import run"),
        ("vllm_medusa.engines.engine", "TOOL = 'vllm_medusa.bench.memory'"),
        ("vllm_medusa.target.text", "from vllm_medusa.acceptance import ranks"),
        ("vllm_medusa.tree.verify", "from vllm_medusa.heads import module"),
        ("vllm_medusa.tree.verify", "from vllm_medusa import config"),
        ("vllm_medusa.tree.verify", "from ..config import MedusaConfig"),
        ("vllm_medusa.tree.verify", "import transformers"),
        ("vllm_medusa.heads.module", "import vllm_medusa.config"),
        ("vllm_medusa.draft.merge", "from vllm_medusa.heads import module"),
        ("vllm_medusa.draft.merge", "import torch"),
    ],
)
def test_offence_is_found(module: str, source: str) -> None:
    assert len(layering_offences(module, ast.parse(source))) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("vllm_medusa.plugin.register", "import vllm\nfrom vllm_medusa.tree import DraftTree"),
        ("vllm_medusa.engines.worker", "from vllm_medusa.plugin.identity import WORKER_CLASS"),
        ("vllm_medusa.cli.main", "from vllm_medusa.bench import run"),
        ("vllm_medusa.tree.verify", "from .layout import TreeLayout\nimport torch"),
        ("vllm_medusa.heads.module", "from vllm_medusa.tree import DraftTree"),
        ("vllm_medusa.config", "from vllm_medusa.tree import DraftTree\nimport vllm_medusa_x"),
        ("vllm_medusa.tree.verify", "'''vllm_medusa.plugin stands above.'''"),
    ],
)
def test_lawful_import_is_not(module: str, source: str) -> None:
    assert layering_offences(module, ast.parse(source)) == []


@pytest.mark.parametrize(
    "back", ["from vllm_medusa.bench import a", "def f():\n    from vllm_medusa.bench.a import x"]
)
def test_circle_is_found(back: str) -> None:
    sources = [
        ("vllm_medusa.bench.a", ast.parse("from vllm_medusa.bench.b import y")),
        ("vllm_medusa.bench.b", ast.parse(back)),
    ]
    assert set(circle(import_graph(sources))) == {"vllm_medusa.bench.a", "vllm_medusa.bench.b"}
    assert not circle(import_graph([*sources[:1], ("vllm_medusa.bench.b", ast.parse("x = 1"))]))


def test_long_file_and_long_function_are_found() -> None:
    body = "    pass\n" * MAX_FUNCTION_LINES
    assert length_offences("x", f"def f():\n{body}") == [
        f"x:1 f has {MAX_FUNCTION_LINES + 1} lines"
    ]
    assert length_offences("x", "pass\n" * (MAX_FILE_LINES + 1)) == ["x has 400 lines"]
    assert length_offences("x", "def f():\n" + "    pass\n" * (MAX_FUNCTION_LINES - 1)) == []
