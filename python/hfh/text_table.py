"""Tables for terminals and logs, as plain text."""

from __future__ import annotations

from collections.abc import Collection, Sequence

_PREFIXES = "kMGTPE"


def text_table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[int] = (0,)
) -> str:
    """Columns two spaces apart, flush left those whose index is in ``left``, others right."""
    lines = [headings, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def short(number: int) -> str:
    """Below 10,000 as it is, above it three digits and a decimal prefix: 12.3k, 4.56M."""
    if number < 10_000:
        return f"{number:,}"
    digits, exponent = f"{number:.2e}".split("e")
    thousands, tens = divmod(int(exponent), 3)
    return f"{float(digits) * 10**tens:g}{_PREFIXES[thousands - 1]}"
