"""Write docs/patches.md from the lists in `vllm_medusa.plugin`.

    python tools/patch_table.py

`tests/unit/test_patches.py` fails if the page is not what this writes.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from vllm_medusa.plugin.overrides import OVERRIDES
from vllm_medusa.plugin.patches import PATCHES

PAGE = Path(__file__).resolve().parents[1] / "docs" / "patches.md"

_INTRODUCTION = """\
# What is patched

`tools/patch_table.py` makes this page from `plugin/patches.py` and `plugin/overrides.py`. To change
the page, change these two files.

vLLM has no extension point for draft trees. So the plugin patches functions and overrides methods
of vLLM. The two tables below list all of them. Each is checked before it is used: if its first
parameters are not those that our code relies on, the plugin ends with one line that names the
function and the supported versions of vLLM. If the configuration does not ask for Medusa, every
patch calls vLLM's own code.

## Patched functions

*Process*: **all** is every process that loads the plugin. The front end is patched when the user
asks for an engine with Medusa, the engine core and the workers when they start. The last column is
the change in vLLM that would make the patch unnecessary.
"""

_OVERRIDES = """\
## Overridden methods

They are overridden by subclasses or, where the table says so, on an object. All of this is in
workers. *V1* and *V2* are vLLM's model runners. The classes are in `vllm_medusa.plugin.worker`.
"""


def page() -> str:
    """Return the page."""
    patches = (
        (
            process,
            _name(entry.owner, entry.name),
            entry.why + (f" (only {', '.join(entry.versions)})" if entry.versions else ""),
            entry.until,
        )
        for process, entries in PATCHES.items()
        for entry in entries
    )
    overrides = (
        (
            "both" if entry.where == "worker" else entry.where,
            _name(entry.owner, entry.name),
            f"`{entry.by}`",
            entry.why,
        )
        for entry in OVERRIDES
    )
    return "\n".join(
        [
            _INTRODUCTION,
            *_table(("process", "upstream", "what and why", "no longer needed with"), patches),
            "",
            _OVERRIDES,
            *_table(("runner", "upstream", "overridden by", "what is added"), overrides),
            "",
        ]
    )


def _name(owner: str, name: str) -> str:
    module, _, kind = owner.partition(":")
    return f"`{kind}.{name}` in `{module}`" if kind else f"`{name}` in `{module}`"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        "|" + "---|" * len(head),
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


if __name__ == "__main__":
    PAGE.write_text(page())
