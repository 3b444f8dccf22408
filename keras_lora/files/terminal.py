"""What the command writes to a terminal: tables and lines, and errors."""

import sys

import rich.console
import rich.table
from rich.text import Text

from keras_lora.models.tables import printable


def say(text):
    print(in_one_line(text), file=sys.stderr)


def in_one_line(text):
    return printable(" ".join(text.split()))[:2000]


def console():
    found = rich.console.Console(highlight=False)
    if not found.is_terminal:
        found.width = 10_000  # in a file or a pipe nothing is folded
    return found


def write(title, head, rows, lines=()):
    table = rich.table.Table(title=Text(printable(title)), title_justify="left")
    for place, name in enumerate(head):
        justify = "left" if place < 2 else "right"
        table.add_column(Text(printable(name)), justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console().print(table)
    write_lines(lines)


def write_lines(lines):
    for line in lines:
        console().print(Text(printable(line)), soft_wrap=True)
