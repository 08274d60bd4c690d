# SPDX-License-Identifier: LGPL-2.1-or-later
"""The code of all modules that a start imports, in one file: finding each by itself takes a tenth of a restart.

    bundle.make()      writes it, next to virtd's other byte code; the package's %post runs this file
    bundle.use()       makes imports take code from it

A module's code is used while its source is still the same file: device, inode, change time and size. An upgrade, a
rollback, an edit or a copy of the whole system invalidates it. Another version of Python invalidates the whole
bundle, as does a change in a directory that precedes the modules' own in sys.path. Then, or if the bundle is missing
or can't be read, modules are imported as usual.

In a Python that was started with -S it also stands in for `site`, which takes a third of Python's own start: while
nothing that `site` goes by has changed, sys.path is what it made of it last time.
"""

from __future__ import annotations

import marshal
import os
import sys
from importlib.machinery import ModuleSpec, SourceFileLoader

TYPE_CHECKING = False  # importing typing takes 2 ms, which is left to asyncio
if TYPE_CHECKING:
    from types import CodeType, ModuleType

    Identity = tuple[int, int, int, int]
    Entry = tuple[str, Identity, bool, bytes]  # path, the file's identity, whether it is a package, code
    # sys.path, how many directories of it precede the modules' own, what else `site` goes by, when each directory and
    # file of both was changed last, the modules
    Content = tuple[list[str], int, list[str], list[int], dict[str, Entry]]

HERE = os.path.dirname(os.path.abspath(__file__))
PATH = f"{HERE}/__pycache__/start.{sys.implementation.cache_tag}.bundle"
# Other modules that a start imports: the drivers that have objects, and what the first guest needs.
BESIDES = ("encodings.ascii", "virtd.drivers.qemu.driver", "virtd.guests.driver", "virtd.objects.recovery")


class _Loader(SourceFileLoader):
    """Like the loader of any module with a source, but with its code at hand."""

    def __init__(self, name: str, path: str, code: bytes) -> None:
        super().__init__(name, path)
        self._code = code

    def get_code(self, fullname: str) -> CodeType:
        code: CodeType = marshal.loads(self._code)
        return code


class _Finder:
    def __init__(self, entries: dict[str, Entry]) -> None:
        self._entries = entries

    def find_spec(self, name: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if (entry := self._entries.get(name)) is None:
            return None
        origin, identity, package, code = entry
        if _identity(origin) != identity:
            return None
        spec = ModuleSpec(name, _Loader(name, origin, code), origin=origin, is_package=package)
        spec.has_location = True
        if spec.submodule_search_locations is not None:
            spec.submodule_search_locations.append(os.path.dirname(origin))
        return spec


def use(path: str = PATH) -> None:
    """Take code from the bundle, and complete sys.path if Python was started with -S."""
    content = _read(path)
    if content is None:
        _complete()
        return
    known, preceding, beside, times, entries = content
    now = _times([*known, *beside])
    if now != times or "site" in sys.modules:
        _complete()
    else:
        sys.path[:] = known
    if sys.path[:preceding] == known[:preceding] and now[:preceding] == times[:preceding]:
        # After the finders for built-in and frozen modules, and before the one that searches sys.path.
        sys.meta_path.insert(2, _Finder(entries))


def _read(path: str) -> Content | None:
    """None if it is damaged, or for another Python."""
    try:
        with open(path, "rb") as file:
            version, *content = marshal.load(file)
            known, preceding, beside, times, entries = content
    except (OSError, ValueError, EOFError, TypeError):
        return None
    return (known, preceding, beside, times, entries) if version == sys.version else None


def _complete() -> None:
    if "site" not in sys.modules:
        import site

        site.main()


def make(path: str = PATH) -> None:
    """Write the bundle of what a start imports. Raises OSError."""
    from importlib import import_module

    for name in ("virtd.daemon", *BESIDES):
        import_module(name)
    entries: dict[str, Entry] = {}
    for name, module in list(sys.modules.items()):
        spec = getattr(module, "__spec__", None)
        if spec is None or name == "__main__" or type(spec.loader) is not SourceFileLoader:
            continue
        origin = spec.origin
        if (identity := _identity(origin)) is not None and (code := spec.loader.get_code(name)) is not None:
            package = spec.submodule_search_locations is not None
            entries[name] = (origin, identity, package, marshal.dumps(code))
    beside = _beside()
    times = _times([*sys.path, *beside])
    content = marshal.dumps((sys.version, sys.path, _preceding(entries), beside, times, entries))
    new = f"{path}.new"
    with open(new, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def _preceding(entries: dict[str, Entry]) -> int:
    """In how many directories of sys.path a module would be found before one of these."""
    used = {os.path.dirname(os.path.dirname(entry[0]) if entry[2] else entry[0]) for entry in entries.values()}
    return max((number for number, directory in enumerate(sys.path) if directory in used), default=0)


def _beside() -> list[str]:
    """What `site` goes by besides the directories in sys.path: those that would be there if they existed, and files
    that may be changed in place.
    """
    import site

    found = [place for place in site.getsitepackages() if place not in sys.path]
    for place in site.getsitepackages():
        if os.path.isdir(place):
            found += [f"{place}/{name}" for name in sorted(os.listdir(place)) if name.endswith(".pth")]
    custom = getattr(sys.modules.get("sitecustomize"), "__file__", None)
    return [*found, custom] if custom else found


def _times(paths: list[str]) -> list[int]:
    """When each file was changed last, or an entry added to or removed from a directory; 0 if it doesn't exist."""
    found = []
    for path in paths:
        try:
            found.append(os.stat(path).st_mtime_ns)
        except OSError:
            found.append(0)
    return found


def _identity(path: str) -> Identity | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_ctime_ns, status.st_size


if __name__ == "__main__":
    make()
