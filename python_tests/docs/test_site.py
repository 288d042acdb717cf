"""The site builds without a warning, needs nothing from elsewhere, and has every public name."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import subprocess
import sys
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest

from tfops_testing.paths import ROOT

pytestmark = [
    pytest.mark.source_tree,
    pytest.mark.skipif(not importlib.util.find_spec("mkdocs"), reason="needs MkDocs"),
]

MODULES = ("tfops", "tfops.keras", "tfops.reference", "tfops.gradcheck", "tfops.info", "tfops_kernels")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return folder


class _Parser(HTMLParser):
    """What a page refers to, and what it loads."""

    def __init__(self, page: str):
        super().__init__()
        self.refers: list[str] = []
        self.loads: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        is_loaded = tag in ("img", "script") or attributes.get("rel") in ("icon", "stylesheet")
        if address := attributes.get("src") or attributes.get("href"):
            (self.loads if is_loaded else self.refers).append(address)


def test_links_lead_somewhere(site):
    """In the theme and in raw HTML too, which MkDocs does not look at; and nothing is loaded from elsewhere."""
    pages = set(site.rglob("*.html")) - {site / "404.html"}  # has absolute links, for it is shown anywhere
    for page in pages:
        parser = _Parser(page.read_text())
        assert not [address for address in parser.loads if urlsplit(address).netloc], f"{page} loads from elsewhere"
        for address in parser.refers + parser.loads:
            parts = urlsplit(urljoin(f"/{page.relative_to(site)}", address))
            if parts.scheme or parts.netloc:
                continue
            target = site / unquote(parts.path).lstrip("/")
            assert (target / "index.html" if target.is_dir() else target).is_file(), f"{page} links to {address}"


def _public(module: str) -> Iterator[tuple[str, object]]:
    """The public functions and classes of a module, and the latter's own methods and properties, by name."""
    members = vars(importlib.import_module(module))
    own = [name for name, value in members.items() if getattr(value, "__module__", None) == module and name[0] != "_"]
    for name in members.get("__all__", own):
        value = members[name]
        if not callable(value):
            continue
        yield f"{module}.{name}", value
        for member, method in vars(value).items() if inspect.isclass(value) else ():
            is_inherited = any(hasattr(base, member) for base in value.__bases__)
            if member[0] != "_" and not is_inherited and (callable(method) or isinstance(method, property)):
                yield f"{module}.{name}.{member}", method


def test_every_public_name_is_documented(site):
    """With a docstring of its own, and on a page."""
    inventory = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    on_pages = {line.split()[0] for line in zlib.decompress(inventory).decode().splitlines()}
    names = dict(item for module in MODULES for item in _public(module))
    assert {"tfops.fused_batch_norm", "tfops.keras.convert", "tfops_kernels.Plan"} <= names.keys()
    assert [name for name, value in names.items() if not (value.__doc__ or "").strip()] == []
    assert sorted(names.keys() - on_pages) == []
