"""Tables for the terminal and for Markdown, from one description."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import rich.table

#: Width of a terminal of unknown width.
_WIDTH = 200


@dataclass
class Table:
    """A titled table of texts.

    Attributes:
        title: above it.
        columns: their headings.
        rows: of as many texts each.
        texts: columns with words; they are aligned to the left and may wrap.
    """

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    texts: Sequence[str] = ("variant",)

    def add(self, *cells: object) -> None:
        """Add a row; None is an empty cell."""
        self.rows.append(tuple("" if cell is None else str(cell) for cell in cells))

    def markdown(self) -> str:
        """The table in Markdown, without its title."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
        return "\n".join(f"| {' | '.join(line)} |" for line in escaped)

    def rich(self) -> rich.table.Table:
        """The table for a terminal, without its title."""
        import rich.box
        import rich.table
        import rich.text

        table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
        for column in self.columns:
            is_number = column not in self.texts
            table.add_column(
                column, justify="right" if is_number else "left", no_wrap=is_number, overflow="fold"
            )
        for row in self.rows:
            table.add_row(*map(rich.text.Text, row))  # names from users are not markup
        return table


def as_text(tables: Sequence[Table]) -> str:
    """The tables as plain text."""
    import rich.console

    console = rich.console.Console(file=io.StringIO(), width=_WIDTH, color_system=None)
    for table in tables:
        console.print(table.title, markup=False, highlight=False, soft_wrap=True)
        console.print(table.rich())
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())
