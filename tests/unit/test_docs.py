# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the documentation says of the code is so: keys, defaults, commands, options, message ids, links, examples.

The README is held to its length, too.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shlex
import subprocess
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Any, get_type_hints

import msgspec
import pytest

from tests.examples import calls, mentions
from virtd import errors, messages
from virtd.api import introspection, kinds
from virtd.children.slots import SLOTS
from virtd.cli import exits, main, options
from virtd.model import container, document, domain, drives, network, networkchecks, pool, provisioning, settings
from virtd.model.state import Activity, Cause, State

ROOT = Path(__file__).resolve().parents[2]
MAN = ROOT / "packaging" / "man"

# A page's section for each table of its file, and the struct that the table becomes.
TABLES: list[tuple[str, str, type[msgspec.Struct]]] = [
    ("virtd-domain.5", "Keys of the domain", domain.Domain),
    ("virtd-domain.5", "[boot]", domain.Boot),
    ("virtd-domain.5", "[[disk]]", drives.Disk),
    ("virtd-domain.5", "[[cdrom]]", drives.Cdrom),
    ("virtd-domain.5", "[[nic]]", domain.Nic),
    ("virtd-domain.5", "[vnc]", domain.Vnc),
    ("virtd-domain.5", "[guest]", provisioning.Provisioning),
    ("virtd-domain.5", "[tpm]", domain.Tpm),
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


# virtdctl(1)


def all_commands() -> list[tuple[str, str]]:
    """Each noun, "" for domains, with each of its commands."""
    return [(noun, command) for noun in ("", *main.NOUNS) for command in main.commands_of(noun)]


@pytest.mark.parametrize(("noun", "command"), all_commands())
def test_each_command_is_documented_with_its_options(noun: str, command: str) -> None:
    whole = f"{noun} {command}".strip()
    found = re.search(rf"^``{whole}(?: .*)?``\n((?:(?: {{4}}.*)?\n)+)", page("virtdctl.1"), re.M)
    assert found, f"virtdctl(1) has no entry for {whole}"
    parser = options.Parser(command, "")
    module_of(noun, command).OPTIONS[command](parser)
    common = section(page("virtdctl.1"), "OPTIONS")
    missing = [option for option in long_options(parser) if option not in found[0] and f"**{option}**" not in common]
    assert not missing, missing


def module_of(noun: str, command: str) -> Any:
    return importlib.import_module(f"virtd.cli.{main.commands_of(noun)[command][0]}")


def long_options(parser: argparse.ArgumentParser) -> list[str]:
    return [option for action in parser._actions for option in action.option_strings if option.startswith("--")]


def test_each_exit_status_is_documented() -> None:
    statuses = [value for name, value in vars(exits).items() if name.isupper() and isinstance(value, int)]
    text = section(page("virtdctl.1"), "EXIT STATUS")
    assert statuses
    assert not [value for value in statuses if not re.search(rf"\b{value}\b", text)]


# virtd(8)


@pytest.mark.parametrize("message", messages.Message)
def test_each_message_is_documented(message: messages.Message) -> None:
    assert f"*{message.value}*\n" in section(page("virtd.8"), "JOURNAL")


@pytest.mark.parametrize("field", sorted({name for names in messages.FIELDS.values() for name in names}))
def test_each_journal_field_is_documented(field: str) -> None:
    assert f"*{field}=*" in section(page("virtd.8"), "JOURNAL")


@pytest.mark.parametrize("word", [*State, *Activity, *Cause])
def test_each_state_and_cause_is_documented(word: str) -> None:
    assert re.search(rf"\*{word}\*", section(page("virtd.8"), "STATES AND CAUSES"))


@pytest.mark.parametrize("slot", SLOTS)
def test_each_slot_is_documented(slot: str) -> None:
    assert f"*qemu/NAME/{slot}*" in section(page("virtd.8"), "SLOTS")


def test_the_bus_is_documented() -> None:
    text = section(page("virtd.8"), "INTERFACES")
    names = (introspection.MANAGER, *(kind.interface for kind in kinds.load().values()))
    assert all(f"*{name}*" in text for name in names)


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
    broken = [target for target in targets if not leads_somewhere(ROOT / name, target)]
    assert not broken, broken


def leads_somewhere(page: Path, target: str) -> bool:
    path, _, anchor = target.partition("#")
    found = page.parent / path if path else page
    return found.exists() and (not anchor or anchor in anchors(found.read_text()))


def anchors(text: str) -> list[str]:
    """What GitHub makes of headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_the_readme_is_read_in_five_minutes_and_leads_to_all_else() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200, "details belong in docs/ or in a man page"
    linked = set(re.findall(r"\]\(([^)\s#]+)", text))
    there = {name for name in markdown() if re.fullmatch(r"(docs/)?[^/]*", name)} - {"README.md"}
    assert not (there | {f"packaging/man/{name}.rst" for name in pages()}) - linked


def test_architecture_is_read_in_twenty_minutes_and_leads_to_the_details() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    assert len(text.split()) <= 4500, "details belong in docs/internals"
    linked = set(re.findall(r"\]\(([^)\s#]+)", text))
    assert {name for name in markdown() if name.startswith("docs/internals/")} <= linked


@pytest.mark.parametrize("name", pages())
def test_each_page_has_headings_that_rst2man_takes(name: str) -> None:
    title = name.rpartition(".")[0]
    assert re.search(rf"^(=+)\n{re.escape(title)}\n\1\n\n-", page(name), re.M)
    underlined = re.findall(r"^(\w.*)\n(=+|-+)$", page(name), re.M)
    assert not [heading for heading, line in underlined if len(line) < len(heading)]


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
        networkchecks.parse(text, "example")
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


# Commands in examples and in sentences


def sources() -> list[tuple[str, str]]:
    return [(name, (ROOT / name).read_text()) for name in markdown()] + [(name, page(name)) for name in pages()]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """virtdctl's complaint about arguments, if any. None of its commands does anything meanwhile."""
    for noun, command in all_commands():
        module = module_of(noun, command)
        monkeypatch.setattr(module, "RUN", dict.fromkeys(module.OPTIONS, lambda _args, _session: exits.OK))

    def refused(arguments: str) -> str:
        status = main.main(shlex.split(arguments, comments=True))
        said = capsys.readouterr().err
        assert (status == exits.OK) is not bool(said), said
        return said

    return refused


@pytest.mark.parametrize(("name", "text"), sources(), ids=lambda value: value if "\n" not in value else "")
def test_commands_are_ones_that_there_are(name: str, text: str, refused: Callable[[str], str]) -> None:
    assert not [said for arguments in calls(text) if (said := refused(arguments))], "in examples"
    assert not [words for words in mentions(text) if unknown(words)], "in sentences"


def unknown(mention: str) -> list[str]:
    """The words of a call that virtdctl doesn't know: its noun, command or options. Names may be left out."""
    words = re.findall(r"[^\s\[\]|]+", mention.partition(" -- ")[0])
    noun = words.pop(0) if words and words[0] in main.NOUNS else ""
    command = words.pop(0) if words and not words[0].startswith("-") else "list"
    if command not in main.commands_of(noun):
        return [command]
    parser = options.Parser(command, "")
    module_of(noun, command).OPTIONS[command](parser)
    parser.common()
    known = {option for action in parser._actions for option in action.option_strings}
    return [word for word in words if word.startswith("-") and word.partition("=")[0] not in {*known, "-"}]


def test_there_are_commands() -> None:
    pages_with = {name for name, text in sources() if calls(text)}
    assert {"README.md", "docs/containers.md", "docs/networks.md", "docs/storage.md", "virtdctl.1"} <= pages_with
    assert {"README.md", "ARCHITECTURE.md", "NEWS.md", "virtd.8"} <= {n for n, text in sources() if mentions(text)}


def test_a_command_that_is_wrong_would_be_noticed(refused: Callable[[str], str]) -> None:
    text = """Text of `virtdctl info web1`, **virtdctl network
    list --activ**:

    # virtdctl pool define - <<'.'
    virtdctl nonsense
    .
    # yes | virtdctl volume delete default web1 >log; sudo virtdctl container strat deb 2>/dev/null
    virtdctl said something

Or:

    for name in $(virtdctl list --jason); do virtdctl start $name; done
"""
    typed = ["pool define -", "volume delete default web1", "container strat deb", "list --jason", "start $name"]
    assert calls(text) == typed
    assert mentions(text) == ["info web1", "network list --activ"]
    assert not refused("pool define -")
    for wrong in ("container strat deb", "list --jason", "nonsense", "volume resize default web1", "log -n x web1"):
        assert refused(wrong)
    assert [unknown(words) for words in ("info web1", "network list --activ", "pool strat")] == [
        [],
        ["--activ"],
        ["strat"],
    ]
