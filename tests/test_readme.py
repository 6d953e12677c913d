"""The README is a program: each of its commands is run, and prints what stands beneath it."""

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness import (
    POSTGRES_BIN,
    ROOT,
    fresh_database,
)
from markdown_it import MarkdownIt
from markdown_it.token import Token

README = (ROOT / "README.md").read_text()
FRESH = "<!-- fresh terminals -->"


def tokens(markdown: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(markdown)


# --- What differs from run to run


ELIDED = [
    (r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d\.\d+(Z|[+-]\d\d(:\d\d)?)", "<time>"),
    (r"eyJ[\w-]+\.[\w-]+\.[\w-]+", "<token>"),
    (r"process \[\d+\]", "process [<pid>]"),
    (r"127\.0\.0\.1:\d+ - ", "127.0.0.1:<port> - "),
    (r"port \d+ failed", "port <port> failed"),
    (r"=+ \d+ passed(, \d+ deselected)? in [^=]*=+", "= <n> passed ="),
]
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"


class Elision:
    """Takes out what differs from run to run; UUIDs are numbered, so that the same stays the same."""

    def __init__(self) -> None:
        self.seen: dict[str, str] = {}

    def __call__(self, text: str) -> str:
        for pattern, placeholder in ELIDED:
            text = re.sub(pattern, placeholder, text)
        return re.sub(UUID, self.number, text)

    def number(self, found: re.Match[str]) -> str:
        return self.seen.setdefault(found[0], f"<uuid {len(self.seen) + 1}>")


def matches(expected: list[str], actual: list[str]) -> bool:
    """Whether lines are as expected, where the line `...` stands for any lines, ` ...` for an end."""
    if not expected:
        return not actual
    if expected[0] == "...":
        return any(
            matches(expected[1:], actual[skip:]) for skip in range(len(actual) + 1)
        )
    if not actual:
        return False
    same = actual[0] == expected[0]
    if expected[0].endswith(" ..."):
        same = actual[0].startswith(expected[0].removesuffix("..."))
    return same and matches(expected[1:], actual[1:])


# --- A reader at two terminals


class Terminal:
    """A shell with an empty home, in which one command may go on until Ctrl-C."""

    def __init__(self, folder: Path, settings: dict[str, str]) -> None:
        self.output_file = folder.parent / f"terminal-{secrets.token_hex(4)}"
        self.output_file.touch()
        with self.output_file.open("wb") as output:
            self.shell = subprocess.Popen(
                ["bash", "--noprofile", "--norc"],
                cwd=folder,
                env=settings,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                text=True,
                start_new_session=True,
            )
        self.position = 0
        self.type("trap : INT")

    def type(self, text: str) -> None:
        self.shell.stdin.write(text + "\n")
        self.shell.stdin.flush()

    def output(self) -> str:
        """All that was printed since the last command was typed."""
        return self.output_file.read_text()[self.position :]

    def run(self, commands: str, patience: float = 300) -> str:
        """What commands print; they all succeed."""
        self.position = len(self.output_file.read_text())
        end = f"end-{secrets.token_hex(8)}"
        self.type(f"{commands}\necho {end} $?")
        deadline = time.monotonic() + patience
        while f"{end} " not in (printed := self.output()) or not printed.endswith("\n"):
            assert time.monotonic() < deadline, printed
            assert self.shell.poll() is None, printed
            time.sleep(0.02)
        printed, _, status = printed.rpartition(f"{end} ")
        assert int(status) == 0, f"{commands}{printed}"
        return printed

    def serve(self, command: str) -> None:
        """Start a command that goes on."""
        self.position = len(self.output_file.read_text())
        self.type(command)

    def ctrl_c(self) -> None:
        """End what goes on, and wait for the prompt."""
        os.killpg(self.shell.pid, signal.SIGINT)
        self.run("true")

    def close(self) -> None:
        self.shell.stdin.close()
        self.shell.wait(60)


class Reader:
    """Does what the README says: in one terminal, and while that is busy, in a second one."""

    def __init__(self, folder: Path, database: str, settings: dict[str, str]) -> None:
        self.folder = folder
        self.database = database
        self.settings = settings
        self.terminals: list[Terminal] = []
        self.busy = False
        self.here, self.there = Elision(), Elision()
        self.log = ""
        self.fresh_terminals()

    def fresh_terminals(self) -> None:
        self.close()
        self.terminals = [Terminal(self.folder, self.settings)]

    def close(self) -> None:
        if self.busy:
            self.end_service()
        for terminal in self.terminals:
            terminal.close()
        self.terminals = []

    def end_service(self) -> None:
        self.log += self.terminals[0].output()
        self.terminals[0].ctrl_c()
        self.busy = False

    def compare(self, command: str, expected: str, actual: str) -> None:
        wanted, got = self.here(expected), self.there(actual)
        assert matches(wanted.splitlines(), got.splitlines()), (
            f"$ {command}\n--- the README says:\n{wanted}\n--- it printed:\n{got}"
        )

    def run(self, command: str, expected: str) -> None:
        if len(self.terminals) == 1 and self.busy:
            self.terminals.append(Terminal(self.folder, self.settings))
        self.compare(command, expected, self.terminals[-1].run(command))

    def serve(self, command: str, expected: str) -> None:
        if self.busy:
            self.end_service()
        terminal = self.terminals[0]
        terminal.serve(command)
        self.busy = True
        lines = Elision()(expected).splitlines()
        deadline = time.monotonic() + 300
        while not matches(lines, Elision()(terminal.output()).rstrip().splitlines()):
            if time.monotonic() > deadline or terminal.shell.poll() is not None:
                break
            time.sleep(0.1)
        self.compare(command, expected.rstrip(), terminal.output().rstrip())

    def follow(self, markdown: str) -> None:
        """Do all that a text in Markdown says, and compare what is printed."""
        blocks = [t for t in tokens(markdown) if t.type in ("fence", "html_block")]
        while blocks:
            block = blocks.pop(0)
            if block.type == "html_block":
                assert block.content.strip() == FRESH
                self.fresh_terminals()
                continue
            kind, _, name = block.info.partition(" ")
            expected = ""
            if kind == "sh" and blocks and blocks[0].info == "text":
                expected = blocks.pop(0).content
            match kind, name:
                case "sh", "":
                    self.run(block.content, expected)
                case "sh", "serve":
                    self.serve(block.content, expected)
                case "sh", "neon":
                    self.terminals[-1].run(f"DATABASE_URL='{self.database}'")
                case "text", "log":
                    self.compare_log(block.content)
                case "python", path:
                    (self.folder / path).write_text(block.content)
                case "diff", path:
                    self.patch(self.folder / path, block.content)
                case _:
                    pytest.fail(
                        f"a block that nobody checks: {block.info}\n{block.content}"
                    )

    def patch(self, path: Path, diff: str) -> None:
        lines = diff.splitlines()
        before = "\n".join(line[1:] for line in lines if line[0] != "+")
        after = "\n".join(line[1:] for line in lines if line[0] != "-")
        text = path.read_text()
        assert text.count(before) == 1
        path.write_text(text.replace(before, after))

    def compare_log(self, expected: str) -> None:
        """Each line stands in the service's log, in this order, others between them."""
        log = iter(self.there(self.log + self.terminals[0].output()).splitlines())
        for line in self.here(expected).splitlines():
            assert line in log, line


@contextmanager
def reader(server: str) -> Iterator[Reader]:
    """A reader with an empty home, a fresh copy of the project, and a database to be had."""
    with tempfile.TemporaryDirectory() as name, fresh_database(server) as database:
        home, folder = Path(name) / "home", Path(name) / "auth"
        home.mkdir()
        folder.mkdir()
        for path in ROOT.iterdir():
            if path.is_file() and path.name != ".env":
                shutil.copy(path, folder)
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "tests", folder / "tests", ignore=ignored)
        # The Python that runs the tests, without their packages; psql, should there be none.
        folders = [f"{sys.base_prefix}/bin", *os.environ["PATH"].split(os.pathsep)]
        folders = [f for f in folders if Path(f) != Path(sys.executable).parent]
        kept = {
            k: v for k, v in os.environ.items() if k.startswith("PIP_") or k == "CI"
        }
        settings = kept | {
            "HOME": str(home),
            "PATH": os.pathsep.join([*folders, str(POSTGRES_BIN)]),
            "LANG": "C.UTF-8",
            "PYTEST_ADDOPTS": "-k test_the_whole_path",  # not this test again
            "PIP_NO_COMPILE": "1",  # most of what is installed is never imported
        }
        someone = Reader(folder, database, settings)
        try:
            yield someone
        finally:
            someone.close()


def test_every_command_prints_what_the_readme_says(server: str) -> None:
    with reader(server) as someone:
        someone.follow(README)


def test_only_commands_of_neon_are_not_run() -> None:
    exempt = [
        t.content for t in tokens(README) if t.type == "fence" and t.info == "sh neon"
    ]
    assert len(exempt) == 2
    for line in "".join(exempt).splitlines():
        assert re.match(
            r'npx neon@latest |DATABASE_URL="\$\((npx neon@latest|sed .* \.env\.neon\))',
            line,
        )


def test_ci_runs_the_readme_s_own_test_command() -> None:
    (command,) = re.findall(
        r"^python3 -m venv .* -m pytest tests$", README, re.MULTILINE
    )
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_files_that_the_readme_names_exist() -> None:
    named = set(re.findall(r"\]\(([^)#:]+)\)", README))
    assert named >= {
        "main.py",
        "init_db.py",
        "verify.sql",
        "requirements.txt",
        ".env.example",
    }
    for name in named:
        assert (ROOT / name).exists(), name
    visible = {p.name for p in ROOT.iterdir() if not p.name.startswith((".", "__"))}
    assert visible == {n for n in named if n != ".env.example"} | {"README.md"}


def test_numbers_that_the_prose_repeats() -> None:
    main = (ROOT / "main.py").read_text()
    for said, code in [
        ("Up to 20 a process", "pool_size=20,\n    max_overflow=0,"),
        ("not answered after 14 seconds", "DEADLINE_SECONDS = 14 "),
    ]:
        assert said in README
        assert code in main
