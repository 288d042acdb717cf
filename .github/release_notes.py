"""Prints the notes of a release: its section of CHANGELOG.md.

python .github/release_notes.py v1.2.3

It refuses a tag whose version is not that of pyproject.toml, CITATION.cff and the topmost section of CHANGELOG.md.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def notes(tag: str, root: Path = ROOT) -> str:
    """The section's text, without its heading."""

    def first(name: str, pattern: str) -> re.Match[str]:
        if match := re.search(pattern, (root / name).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            return match
        raise ValueError(f"{name} has no match for {pattern!r}")

    section = first("CHANGELOG.md", r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?\n(.*?)(?=^## |^\[[^\]\n]+\]: |\Z)")
    versions = {
        "pyproject.toml": first("pyproject.toml", r'^version = "(.+?)"')[1],
        "CITATION.cff": first("CITATION.cff", r"^version: (\S+)")[1],
        "CHANGELOG.md": section[1],
    }
    for name, version in versions.items():
        if tag != f"v{version}":
            raise ValueError(f"the tag is {tag!r}, but the version in {name} is {version!r}")
    if not section[2]:
        raise ValueError(f"CHANGELOG.md has no date for {section[1]}: write '## [{section[1]}] - YYYY-MM-DD'")
    return section[3].strip()


if __name__ == "__main__":
    try:
        print(notes(*sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"release_notes.py: {error}")
