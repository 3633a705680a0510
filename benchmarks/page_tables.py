"""Tables of documentation pages, written from committed results."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import click


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table."""
    cells = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def written(page: str, tables: Mapping[str, Callable[[], str]]) -> str:
    """The page with its tables as the results have them.

    Only what stands between ``<!-- NAME -->`` and ``<!-- end -->`` is written again.
    """
    for name, make in tables.items():
        table = make()
        block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if len(block.findall(page)) != 1:
            raise click.ClickException(f"the page needs one place for the table {name}.")
        page = block.sub(lambda place, table=table: f"{place[1]}\n{table}\n\n{place[2]}", page)
    return page
