"""Brings files from outside docs/ onto the site, and makes links between files of the repository work there.

Links are written as they work in the repository, relative to the file that holds them. On the site, a link to a file
that has a place there leads to that place, and a link to any other file of the repository leads to the repository.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

import nbformat
from latex2mathml.converter import convert as mathml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "csrc/README.md": "architecture.md",
    "models/README.md": "lessons/index.md",
}
PATTERNS = {
    "models/*.ipynb": "lessons/{}.md",
    "models/answers/*.md": "lessons/answers/{}.md",
    "models/pictures/*.png": "lessons/pictures/{}.png",
    "benchmarks/results/*.svg": "results/{}.svg",
}
FOUND = {
    path.relative_to(ROOT).as_posix(): place.format(path.stem)
    for pattern, place in PATTERNS.items()
    for path in sorted(ROOT.glob(pattern))
}
PLACES = PAGES | FOUND  # from the path in the repository to that on the site
SOURCES = {place: source for source, place in PLACES.items()}


def on_config(config: MkDocsConfig) -> None:
    """Lists the notebooks in the navigation, in the order in which the lessons' index names them."""
    index = (ROOT / "models/README.md").read_text()
    notebooks = sorted(ROOT.glob("models/*.ipynb"), key=lambda path: index.find(path.stem))
    section = next(entry for entry in config.nav if "Lessons" in entry)
    section["Lessons"] = ["lessons/index.md", *(f"lessons/{path.stem}.md" for path in notebooks)]


def on_files(files: Files, config: MkDocsConfig) -> None:
    for source, place in PLACES.items():
        if not source.endswith(".ipynb"):
            files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
            continue
        text, extracted = MarkdownExporter().from_notebook_node(_notebook(source), {"unique_key": Path(source).stem})
        pictures = {posixpath.join("lessons", name): data for name, data in extracted["outputs"].items()}
        for name, content in {place: text, **pictures}.items():
            files.append(File.generated(config, name, content=content))


def _notebook(source: str) -> nbformat.NotebookNode:
    """The notebook, with its formulas as MathML, which browsers show without a script."""
    notebook = nbformat.read(ROOT / source, as_version=4)
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(
                r"\$\$(.+?)\$\$", lambda m: mathml(m[1], display="block"), cell.source, flags=re.DOTALL
            )
            cell.source = re.sub(r"\$(\S[^$]*)\$", lambda m: f"<span>{mathml(m[1])}</span>", cell.source)
    return notebook


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    source = SOURCES.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def link(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        place = PLACES.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        if path.startswith("../") or not (ROOT / path).exists():
            return match[0]  # an address, or a broken link, of which MkDocs tells
        if place is None:
            return f"{match[1]}{config.repo_url}/blob/main/{path}"
        return match[1] + posixpath.relpath(place, posixpath.dirname(page.file.src_uri) or ".")

    return re.sub(r'(\]\(|\]: |src=")([^\s)#"]+)', link, markdown)
