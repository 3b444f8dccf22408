"""Parts of docs/compatibility.md, which several scripts write."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"


def sections(text) -> dict:
    """Title -> text, from the title on; what comes before the first is under ""."""
    parts = re.split(r"(?m)^(?=## )", text)
    return {part.partition("\n")[0] if n else "": part for n, part in enumerate(parts)}


def write_section(title, body):
    """Puts a section in the place of the one with its title, or at the end."""
    parts = {
        **sections(PAGE.read_text()),
        title: f"{title}\n\n{body}" if title else body,
    }
    PAGE.write_text("\n\n".join(part.strip() for part in parts.values()) + "\n")
