"""What is public is documented: every name, argument, result and error."""

from __future__ import annotations

import importlib
import inspect
import re

import pytest

MODULES = ["tfops", "tfops.keras", "tfops.reference", "tfops.gradcheck", "tfops.info", "tfops_kernels"]


def _public():
    for name in MODULES:
        module = importlib.import_module(name)
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == name]
        for key in getattr(module, "__all__", own):
            value = getattr(module, key)
            if not key.startswith("_") and not inspect.ismodule(value):
                yield pytest.param(value, id=f"{name}.{key}")


def _sections(value):
    """The docstring's sections, by their titles: the entries of each."""
    found = re.split(r"^(\w+):\n", inspect.cleandoc(value.__doc__), flags=re.MULTILINE)
    return {
        title: re.findall(r"^    \*{0,2}([\w.]+)(?=:)", text, re.MULTILINE)
        for title, text in zip(found[1::2], found[2::2], strict=True)
    }


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_documented(name):
    assert importlib.import_module(name).__doc__


@pytest.mark.parametrize("value", list(_public()))
def test_public_names_are_documented(value):
    sections = _sections(value)
    if isinstance(value, type):
        for name, member in vars(value).items():
            if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, (property, classmethod))):
                assert member.__doc__, f"{name} is not documented"
        if fields := getattr(value, "_fields", None) or getattr(value, "__dataclass_fields__", None):
            assert sections["Attributes"] == list(fields)
            return
    else:
        assert "Returns" in sections
    names = [
        name
        for name in inspect.signature(value.__init__ if isinstance(value, type) else value).parameters
        if name != "self"
    ]
    assert sections.get("Args", []) == names
    assert "Examples" in sections
