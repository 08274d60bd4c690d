# SPDX-License-Identifier: LGPL-2.1-or-later
"""The shape of the tree: imports point inwards only, modules stay small, every file says whose it is."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAX_LINES = 600

INNER = ("virtd.records", "virtd.logs", "virtd.systemd", "virtd.children")
# What drivers have in common, from the inside outwards.
COMMON = ("virtd.objects", "virtd.guests")
FRONT = ("virtd.api", "virtd.cli", "virtd.connections", "virtd.daemon")

# Package or module -> what it must not import. "virtd" stands for all of virtd that isn't the importer's own.
FORBIDDEN: dict[str, tuple[str, ...]] = {
    "virtd.messages": ("virtd",),
    "virtd.fdstore": ("virtd",),
    **dict.fromkeys(INNER, (*COMMON, "virtd.drivers", "virtd.host", *FRONT)),
    "virtd.objects": ("virtd.guests", "virtd.drivers", "virtd.host", "virtd.wording", *FRONT),
    "virtd.guests": ("virtd.drivers", "virtd.host", "virtd.wording", *FRONT),
    "virtd.drivers": ("virtd.host", "virtd.wording", *FRONT),
    "virtd.host": FRONT,
    "virtd.api": ("virtd.cli", "virtd.daemon"),
    "virtd.cli": ("virtd.api", "virtd.daemon", "virtd.host", "virtd.drivers"),
}
# The innermost layers: the model knows how to complain, and replies know nothing.
ALLOWED: dict[str, tuple[str, ...]] = {
    "virtd.model": ("virtd.errors", "virtd.hints"),
    "virtd.replies": (),
    "virtd.errors": ("virtd.hints",),
    "virtd.hints": ("virtd.wording",),
    "virtd.wording": ("virtd.text",),
}

# virtdctl is over before these would have been imported.
SLOW = ("gi", "pydbus", "msgspec", "asyncio", "systemd", "qemu")

# Where a process may be started otherwise than as a unit: virtdctl may run a pager or an editor.
SPAWNERS = ("virtd.cli",)


class Import(NamedTuple):
    importer: str
    imported: str
    line: int


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted((ROOT / "virtd").rglob("*.py")):
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def imports(name: str, path: Path) -> list[Import]:
    """Every import in a module, those inside functions included, with relative ones resolved.

    `from virtd import host` counts as an import of virtd.host.
    """
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [Import(name, alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                anchor = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*anchor, base] if base else anchor)
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                found.append(Import(name, whole if whole in MODULES else base, node.lineno))
    return found


IMPORTS = [found for name, path in MODULES.items() for found in imports(name, path)]


def described(wrong: list[Import]) -> str:
    return "\n".join(f"{found.importer}:{found.line} imports {found.imported}" for found in wrong)


def is_forbidden(found: Import) -> bool:
    for layer, targets in FORBIDDEN.items():
        if inside(found.importer, layer) and not inside(found.imported, layer):
            return any(inside(found.imported, target) for target in targets)
    for layer, targets in ALLOWED.items():
        if inside(found.importer, layer) and inside(found.imported, "virtd") and not inside(found.imported, layer):
            return not any(inside(found.imported, target) for target in targets)
    return False


def test_imports_point_inwards() -> None:
    wrong = [found for found in IMPORTS if is_forbidden(found)]
    assert not wrong, described(wrong)


@pytest.mark.parametrize(
    "found",
    [
        Import("virtd.fdstore.store", "virtd.errors", 1),
        Import("virtd.model.domain", "virtd.records", 1),
        Import("virtd.logs.pump", "virtd.drivers.qemu", 1),
        Import("virtd.drivers.qemu.driver", "virtd.host", 1),
        Import("virtd.api.varlink", "virtd.cli.client", 1),
        Import("virtd.cli.main", "virtd.api", 1),
    ],
)
def test_the_rule_itself_catches(found: Import) -> None:
    assert is_forbidden(found)


def test_relative_imports_are_resolved(tmp_path: Path) -> None:
    source = tmp_path / "driver.py"
    source.write_text("from ...errors import NotFound\nfrom . import qmp\nfrom ...host import Host\n")
    assert [found.imported for found in imports("virtd.drivers.qemu.driver", source)] == [
        "virtd.errors",
        "virtd.drivers.qemu.qmp" if "virtd.drivers.qemu.qmp" in MODULES else "virtd.drivers.qemu",
        "virtd.host",
    ]


def test_processes_are_started_in_one_place() -> None:
    wrong = [
        found
        for found in IMPORTS
        if inside(found.imported, "subprocess") and not any(inside(found.importer, place) for place in SPAWNERS)
    ]
    assert not wrong, described(wrong)


def test_virtdctl_imports_nothing_slow() -> None:
    # __main__ would run.
    names = [name for name in MODULES if inside(name, "virtd.cli") and not name.endswith(".__main__")]
    program = f"import sys\nfor name in {names!r}: __import__(name)\nprint(*sys.modules, sep='\\n')"
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=60
    )
    wrong = sorted({name.partition(".")[0] for name in ran.stdout.split()} & set(SLOW))
    assert not wrong, f"virtdctl imports {', '.join(wrong)}"


@pytest.mark.parametrize("name", MODULES)
def test_modules_stay_small(name: str) -> None:
    lines = len(MODULES[name].read_text().splitlines())
    assert lines <= MAX_LINES, f"{name} has {lines} lines; {MAX_LINES} is the most"


def sources() -> list[Path]:
    """What the repository holds and a person wrote, Python or shell, tests included."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = []
    for name in listed.stdout.split("\0"):
        path = ROOT / name
        if name and path.is_file() and (path.suffix in {".py", ".sh"} or path.read_bytes()[:2] == b"#!"):
            found.append(path)
    return found


def test_every_source_names_its_licence() -> None:
    wrong = [
        str(path.relative_to(ROOT))
        for path in sources()
        if "SPDX-License-Identifier: LGPL-2.1-or-later" not in "".join(path.read_text().splitlines(True)[:2])
    ]
    assert not wrong, wrong
