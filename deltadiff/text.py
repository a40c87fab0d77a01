"""Tables as text: aligned columns for a terminal, and Markdown."""

from collections.abc import Collection, Iterable, Sequence


def align_columns(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> str:
    """Lay out rows of text as lines, with two spaces between columns and none at the end.

    Args:
        rows: the cells; all rows have equally many, and the first row is usually the header.
        right: the indices of the columns that are aligned right; the others are aligned left.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def markdown_table(header: Sequence[str], *rows: Sequence[str]) -> str:
    """Write a header and rows as a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def grouped(records: Iterable[dict], *names: str) -> dict[tuple, list[dict]]:
    """The records by their values of these entries, in the order in which those appear."""
    groups: dict[tuple, list[dict]] = {}
    for r in records:
        groups.setdefault(tuple(r.get(name) for name in names), []).append(r)
    return groups
