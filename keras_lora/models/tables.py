"""What prints as a table, in a terminal and in a notebook."""

import html
import re


class Table:
    """Mixin for what shows itself as a table."""

    def parts(self):
        """Title, head, rows of cells, and lines below: all of it text."""
        raise NotImplementedError

    def __str__(self):
        title, head, rows, lines = self.parts()
        rows = table(head, rows) if rows else []
        return printable("\n".join([title, *rows, *lines]))

    def _repr_html_(self):
        title, head, rows, lines = self.parts()
        body = "".join(map(row, rows))
        lines = "<br>".join(map(escaped, lines))
        return (
            f"<p>{escaped(title)}</p><table><thead>{row(head, 'th')}</thead>"
            f"<tbody>{body}</tbody></table><p>{lines}</p>"
        )


def row(cells, tag="td"):
    cells = "".join(f"<{tag}>{escaped(cell)}</{tag}>" for cell in cells)
    return f"<tr>{cells}</tr>"


def escaped(text):
    return html.escape(printable(text))


def printable(text):
    """Replaces control characters; names come from files that are not trusted."""
    return "".join(
        x if x.isprintable() or x == "\n" else ascii(x).strip("'") for x in text
    )


def listed(names, most=8):
    """Words such as: a, b and 3 more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def in_bytes(number):
    """12 bytes, 1.23 kB, 45 MB."""
    for unit in ("bytes", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.3g} GB"


def counted(number, noun):
    """1 adapter, 2 adapters."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def in_order(names):
    """As people count: h.9 before h.10."""
    return sorted(
        names,
        key=lambda name: [
            int(part) if part.isdecimal() else part
            for part in re.split(r"([0-9]+)", name)
        ],
    )


def table(head, rows):
    """Lines of text, the first two columns to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    rule = "  ".join("-" * width for width in widths)

    def line(cells):
        pairs = list(zip(cells, widths, strict=True))
        left = [cell.ljust(width) for cell, width in pairs[:2]]
        return "  ".join([*left, *(c.rjust(w) for c, w in pairs[2:])])

    return [line(head), rule, *map(line, rows), rule]
