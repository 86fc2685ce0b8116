"""Tables for the terminal and for Markdown, of one description."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import rich.table

#: Columns of a terminal that cannot say how wide it is.
_WIDTH = 140


@dataclass
class Table:
    """A titled table of texts.

    Attributes:
        title: above it.
        columns: their headings.
        rows: of as many texts each.
    """

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)

    def markdown(self) -> str:
        """The table in Markdown, without its title."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
        return "\n".join(f"| {' | '.join(line)} |" for line in escaped)

    def rich(self) -> rich.table.Table:
        """The table for a terminal."""
        import rich.box
        import rich.table

        table = rich.table.Table(
            title=self.title, title_justify="left", box=rich.box.SIMPLE_HEAD, pad_edge=False
        )
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="right" if index else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        return table


def as_text(tables: Sequence[Table]) -> str:
    """The tables as plain text."""
    import rich.console

    console = rich.console.Console(file=io.StringIO(), width=_WIDTH, color_system=None)
    for table in tables:
        console.print(table.rich(), markup=False)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())
