# SPDX-License-Identifier: LGPL-2.1-or-later
"""Scripts that tests run in a lab are text to mypy: what they import from virtd has to be there."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

from tests.harness import TOP

IMPORT = re.compile(r"^ *from (virtd[\w.]*) import (\w+(?:, \w+)*)$", re.MULTILINE)


def imports(file: Path) -> set[tuple[str, str]]:
    """Modules and what is imported of them, in the strings of a file."""
    strings = [node.value for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant)]
    found = [match for text in strings if isinstance(text, str) for match in IMPORT.findall(text)]
    return {(module, name) for module, names in found for name in names.split(", ")}


SCRIPTS = {str(file.relative_to(TOP)): found for file in TOP.glob("tests/**/*.py") if (found := imports(file))}


def test_a_script_is_found() -> None:
    assert "tests/live/test_hard_days_paths.py" in SCRIPTS


@pytest.mark.parametrize("file", SCRIPTS)
def test_what_a_script_imports_is_there(file: str) -> None:
    for module, name in SCRIPTS[file]:
        if not hasattr(importlib.import_module(module), name):
            importlib.import_module(f"{module}.{name}")
