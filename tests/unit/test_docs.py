# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the documentation says of the code is so: keys, defaults, commands, options, message ids, links, examples."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
from enum import StrEnum
from pathlib import Path
from typing import Any, get_type_hints

import msgspec
import pytest

from virtd import child, errors, messages
from virtd.api import introspection
from virtd.api.kinds import KINDS
from virtd.cli import exits, main, options
from virtd.model import container, document, domain, network, pool, settings
from virtd.model.state import Cause, State

ROOT = Path(__file__).resolve().parents[2]
MAN = ROOT / "packaging" / "man"

# A page's section for each table of its file, and the struct that the table becomes.
TABLES: list[tuple[str, str, type[msgspec.Struct]]] = [
    ("virtd-domain.5", "Keys of the domain", domain.Domain),
    ("virtd-domain.5", "[boot]", domain.Boot),
    ("virtd-domain.5", "[[disk]]", domain.Disk),
    ("virtd-domain.5", "[[cdrom]]", domain.Cdrom),
    ("virtd-domain.5", "[[nic]]", domain.Nic),
    ("virtd-domain.5", "[vnc]", domain.Vnc),
    ("virtd-network.5", "Keys of the network", network.Network),
    ("virtd-network.5", "[ipv4]", network.Ipv4),
    ("virtd-network.5", "[ipv6]", network.Ipv6),
    ("virtd-network.5", "[[host]]", network.Lease),
    ("virtd-network.5", "[[record]]", network.Name),
    ("virtd-network.5", "[[forward]]", network.Forward),
    ("virtd-pool.5", "Keys of the pool", pool.Pool),
    ("virtd.toml.5", "[log]", settings.Log),
    ("virtd.toml.5", "[qemu]", settings.Qemu),
    ("virtd.toml.5", "[dnsmasq]", settings.Dnsmasq),
    ("virtd.toml.5", "[lxc]", settings.Lxc),
    ("virtd-container.5", "Keys of the container", container.Container),
    ("virtd-container.5", "[rootfs]", container.Root),
    ("virtd-container.5", "[idmap]", container.IdMap),
    ("virtd-container.5", "[limits]", container.Limits),
    ("virtd-container.5", "[[mount]]", container.Mount),
    ("virtd-container.5", "[[device]]", container.Device),
    ("virtd-container.5", "[[nic]]", container.Nic),
]


def page(name: str) -> str:
    return (MAN / f"{name}.rst").read_text()


def pages() -> list[str]:
    return sorted(path.name.removesuffix(".rst") for path in MAN.glob("*.rst"))


def section(text: str, title: str) -> str:
    """What is between a title and the next one, of whatever level."""
    found = re.search(rf"^{re.escape(title)}\n([=-])\1+\n(.*?)(?=^[^\n]+\n([=-])\3{{2,}}\n|\Z)", text, re.M | re.S)
    assert found, f"there is no section {title}"
    return found[2]


def terms(text: str) -> dict[str, tuple[str, str]]:
    """A definition list: each key with what stands beside it in parentheses, and what is said about it."""
    found = re.findall(r"^\*\*(\w+)\*\* \((.*)\)\n((?:(?: {4}.*)?\n)+)", text, re.M)
    return {key: (about, body) for key, about, body in found}


def scalar_keys(kind: type[msgspec.Struct]) -> list[msgspec.structs.FieldInfo]:
    """The fields that aren't tables of their own, or need not be."""
    hints = get_type_hints(kind)
    return [
        field
        for field in msgspec.structs.fields(kind)
        if not is_table(hints[field.name]) or str in getattr(hints[field.name], "__args__", ())
    ]


def is_table(hint: Any) -> bool:
    candidates = (hint, *getattr(hint, "__args__", ()))
    return any(isinstance(kind, type) and issubclass(kind, msgspec.Struct) for kind in candidates)


def in_toml(value: object) -> str:
    if isinstance(value, tuple | dict):
        return json.dumps(value)
    return str(value).lower() if isinstance(value, bool | int | float) else f'"{value}"'


@pytest.mark.parametrize(("name", "title", "kind"), TABLES, ids=lambda value: str(value))
def test_each_key_is_documented_with_its_default(name: str, title: str, kind: type[msgspec.Struct]) -> None:
    documented = terms(section(page(name), title))
    fields = scalar_keys(kind)
    assert sorted(documented) == sorted(field.encode_name for field in fields)
    for field in fields:
        about, body = documented[field.encode_name]
        if field.required:
            assert about.endswith(", required"), field.name
        elif field.default_factory is not msgspec.NODEFAULT:
            assert about.endswith(f", default {in_toml(field.default_factory())}"), (field.name, about)
        elif field.default is None:
            assert "," not in about, field.name
        else:
            assert about.endswith(f", default {in_toml(field.default)}"), (field.name, about)
        hint = get_type_hints(kind)[field.name]
        if isinstance(hint, type) and issubclass(hint, StrEnum):
            missing = [word.value for word in hint if f'**"{word.value}"**' not in body]
            assert not missing, (field.name, missing)


def test_each_table_has_its_section() -> None:
    kinds = (domain.Domain, network.Network, container.Container, settings.Settings)
    structs = {hint_struct(hint) for kind in kinds for hint in tables(kind)}
    assert structs <= {kind for _name, _title, kind in TABLES}


def tables(kind: type[msgspec.Struct]) -> list[Any]:
    return [hint for hint in get_type_hints(kind).values() if is_table(hint)]


def hint_struct(hint: Any) -> type[msgspec.Struct]:
    return next(
        kind
        for kind in (hint, *getattr(hint, "__args__", ()))
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct)
    )


# virtctl(1)


def all_commands() -> list[tuple[str, str]]:
    """Each noun, "" for domains, with each of its commands."""
    return [(noun, command) for noun in ("", *main.NOUNS) for command in main.commands_of(noun)]


@pytest.mark.parametrize(("noun", "command"), all_commands())
def test_each_command_is_documented_with_its_options(noun: str, command: str) -> None:
    whole = f"{noun} {command}".strip()
    found = re.search(rf"^``{whole}(?: .*)?``\n((?:(?: {{4}}.*)?\n)+)", page("virtctl.1"), re.M)
    assert found, f"virtctl(1) has no entry for {whole}"
    module = importlib.import_module(f"virtd.cli.{main.commands_of(noun)[command][0]}")
    parser = options.Parser(command, "")
    module.OPTIONS[command](parser)
    common = section(page("virtctl.1"), "OPTIONS")
    missing = [option for option in long_options(parser) if option not in found[0] and f"**{option}**" not in common]
    assert not missing, missing


def long_options(parser: argparse.ArgumentParser) -> list[str]:
    return [option for action in parser._actions for option in action.option_strings if option.startswith("--")]


def test_each_exit_status_is_documented() -> None:
    statuses = [value for name, value in vars(exits).items() if name.isupper() and isinstance(value, int)]
    text = section(page("virtctl.1"), "EXIT STATUS")
    assert statuses
    assert not [value for value in statuses if not re.search(rf"\b{value}\b", text)]


# virtd(8)


@pytest.mark.parametrize("message", messages.Message)
def test_each_message_is_documented(message: messages.Message) -> None:
    assert f"*{message.value}*\n" in section(page("virtd.8"), "JOURNAL")


@pytest.mark.parametrize("field", sorted({name for names in messages.FIELDS.values() for name in names}))
def test_each_journal_field_is_documented(field: str) -> None:
    assert f"*{field}=*" in section(page("virtd.8"), "JOURNAL")


@pytest.mark.parametrize("word", [*State, *network.State, *Cause])
def test_each_state_and_cause_is_documented(word: str) -> None:
    assert re.search(rf"\*{word}\*", section(page("virtd.8"), "STATES AND CAUSES"))


@pytest.mark.parametrize("slot", child.SLOTS)
def test_each_slot_is_documented(slot: str) -> None:
    assert f"*qemu/NAME/{slot}*" in section(page("virtd.8"), "SLOTS")


def test_the_bus_is_documented() -> None:
    text = section(page("virtd.8"), "INTERFACES")
    assert all(f"*{name}*" in text for name in (introspection.MANAGER, *(kind.interface for kind in KINDS)))


# Links and examples


def markdown() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return sorted(filter(None, listed.stdout.split("\0")))


@pytest.mark.parametrize("name", markdown())
def test_links_lead_somewhere(name: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / name).read_text(), flags=re.S)
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    broken = [target for target in targets if not ((ROOT / name).parent / target.partition("#")[0]).exists()]
    assert not broken, broken


def test_pages_refer_to_pages_that_there_are() -> None:
    ours = {tuple(name.rpartition(".")[::2]) for name in pages()}
    for name in pages():
        referred = set(re.findall(r"\*\*(virt[\w.-]+)\*\*\\\((\d)\)", page(name)))
        assert referred <= ours, (name, referred - ours)


def examples() -> list[tuple[str, str]]:
    """Every piece of TOML in the documentation, with where it is."""
    found = []
    for name in markdown():
        found += [(name, text) for text in re.findall(r"^```toml\n(.*?)^```", (ROOT / name).read_text(), re.M | re.S)]
    for name in pages():
        for block in re.findall(r"::\n\n((?:(?: {4}.*)?\n)+)", page(name)):
            text = re.sub(r"^ {4}", "", block, flags=re.M)
            if re.match(r"\s*(?:\w+ = |\[)", text):
                found.append((name, text))
    return found


def parse(text: str) -> None:
    """As a definition, or, if it has tables of virtd.toml, as settings."""
    if re.search(r"^\[(?:log|qemu|dnsmasq|lxc)\]", text, re.M):
        settings.parse(text, "example")
    elif re.search(r"^mode = \"(?:nat|routed|isolated|bridge)\"", text, re.M):
        network.parse(text, "example")
    elif re.search(r"^rootfs = ", text, re.M):
        container.parse(text, "example")
    elif re.search(r"^path = ", text.partition("[")[0], re.M):
        pool.parse(text, "example")
    elif re.search(r"^name = ", text, re.M):
        domain.parse(text, "example")
    else:
        document.decode(f'name = "example"\nmemory = "1G"\n{text}', "example", domain.Domain)


def test_there_are_examples() -> None:
    assert {"README.md", "virtd-domain.5", "virtd.toml.5"} <= {name for name, _text in examples()}


@pytest.mark.parametrize(("name", "text"), examples(), ids=lambda value: value if "\n" not in value else "")
def test_examples_are_valid(name: str, text: str) -> None:
    parse(text)


def test_an_example_that_is_wrong_would_be_noticed() -> None:
    for text in ('name = "x"\nmemory = "1G"\nvcpu = 1\n', "[log]\nsize = 1\n", '[[disk]]\nfile = "/x"\n'):
        with pytest.raises(errors.InvalidDefinition):
            parse(text)
