# SPDX-License-Identifier: LGPL-2.1-or-later
"""`python -m tests.proof.fuzz [--only NAME]... [--seconds 600] [--keep]`: look for inputs that a target can't take.

With atheris (`pip install atheris`) it is guided by which code an input reaches, else inputs are changed blindly.
What is found goes to build/fuzz/NAME/findings, one input for each place in the code; exit status 1 if there is any.
What atheris learns stays in build/fuzz/NAME/corpus for the next run; --keep adds a few small ones of these to
tests/proof/fuzz/corpus/NAME, which `make test` runs.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
import time

from tests.proof.fuzz import _engine as engine
from tests.proof.fuzz import _mutate as mutate

BUILD = engine.ROOT / "build/fuzz"
KEPT, LARGEST = 24, 2048  # files of a target's corpus in the tree, and bytes of each


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.proof.fuzz", description=__doc__)
    parser.add_argument("--only", action="append", choices=engine.names(), metavar="NAME", help="these targets only")
    parser.add_argument("--seconds", type=int, default=600, help="for each target [%(default)s]")
    parser.add_argument("--keep", action="store_true", help="add to the corpus in the tree")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    chosen = arguments.only or engine.names()
    if arguments.here:
        return fuzz_here(chosen[0], arguments.seconds)
    guided = importlib.util.find_spec("atheris") is not None
    print(
        f"{len(chosen)} targets, {arguments.seconds} s each, {'atheris' if guided else 'blind (no atheris)'}",
        flush=True,
    )
    found = 0
    for name in chosen:
        shutil.rmtree(BUILD / name / "findings", ignore_errors=True)
        run(name, arguments.seconds)
        if guided and arguments.keep:
            keep(name)
        files = [path for path in (BUILD / name / "findings").glob("*") if path.suffix != ".txt"]
        print(f"{name}: {len(files)} findings", flush=True)
        found += len(files)
    return 1 if found else 0


def run(name: str, seconds: int) -> None:
    """A process of its own: atheris leaves it by _exit, and an input may take it down."""
    until = time.monotonic() + seconds
    while (left := int(until - time.monotonic())) > 0:
        command = [sys.executable, "-m", "tests.proof.fuzz", "--here", "--only", name, "--seconds", str(left)]
        if subprocess.run(command, cwd=engine.ROOT, check=False).returncode == 0:
            return
        # It died of an input, which libFuzzer has written down. There may be others.
        time.sleep(1)


def fuzz_here(name: str, seconds: int) -> int:
    directory = BUILD / name
    findings = engine.Findings(directory / "findings")
    try:
        import atheris
    except ImportError:
        target = engine.load(name)
        until = time.monotonic() + seconds
        changed = mutate.inputs(target.inputs(), words=target.words, limit=target.limit, seed=time.time_ns())
        for count, data in enumerate(changed, 1):
            if (exc := engine.attempt(target, data)) is not None:
                findings.take(data, exc)
            if time.monotonic() > until:
                print(f"{name}: {count} inputs", flush=True)
                return 0
    with atheris.instrument_imports(include=["virtd", "qemu"]):
        target = engine.load(name)

    def one(data: bytes) -> None:
        if (exc := engine.attempt(target, data)) is not None:
            findings.take(data, exc)

    corpus, seeds = directory / "corpus", directory / "seeds"
    shutil.rmtree(seeds, ignore_errors=True)
    for path in (corpus, seeds, directory / "findings"):
        path.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(target.inputs()):
        (seeds / str(number)).write_bytes(data)
    words = directory / "words"
    escaped = ("".join(rf"\x{byte:02x}" for byte in word) for word in target.words if word)
    words.write_text("".join(f'"{word}"\n' for word in escaped))
    options = [
        f"-max_total_time={seconds}", f"-max_len={target.limit}", f"-timeout={2 * engine.PATIENCE}",
        "-rss_limit_mb=1024", f"-artifact_prefix={directory}/findings/", f"-dict={words}", "-verbosity=0",
        "-print_final_stats=1",
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *options, str(corpus), str(seeds)], one)
    atheris.Fuzz()
    return 0


def keep(name: str) -> None:
    """Add to the tree's corpus the smallest inputs that reach more than those that are there."""
    target = engine.load(name)
    ours = engine.CORPUS / name
    ours.mkdir(parents=True, exist_ok=True)
    room = KEPT - len(list(ours.iterdir()))
    learnt = sorted((BUILD / name / "corpus").glob("*"), key=lambda path: (path.stat().st_size, path.name))
    seen = reached(target, target.inputs())
    known = len(seen)
    for path in learnt:
        if room <= 0 or path.stat().st_size > LARGEST:
            break
        if new := reached(target, [path.read_bytes()]) - seen:
            seen |= new
            shutil.copyfile(path, ours / path.name[:16])
            room -= 1
    print(f"{name}: {known} lines reached before, {len(seen)} now", flush=True)
    if not any(ours.iterdir()):
        ours.rmdir()


def reached(target: engine.Target, inputs: list[bytes]) -> set[tuple[str, int]]:
    """The lines of virtd's that the inputs reach."""
    lines: set[tuple[str, int]] = set()

    def trace(frame: object, event: str, _argument: object) -> object:
        code, number = frame.f_code, frame.f_lineno  # type: ignore[attr-defined]
        if "/virtd/" not in code.co_filename:
            return None
        if event == "line":
            lines.add((code.co_filename, number))
        return trace

    sys.settrace(trace)  # type: ignore[arg-type]
    try:
        for data in inputs:
            engine.attempt(target, data)
    finally:
        sys.settrace(None)
    return lines


if __name__ == "__main__":
    sys.exit(main())
