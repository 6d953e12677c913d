"""A reader of the README, who types what it says at real terminals and sees what they print."""

import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from doctest import DONT_ACCEPT_BLANKLINE, ELLIPSIS, OutputChecker
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pexpect
from harness import POSTGRES_BIN, ROOT
from sybil import Document, Example, Region
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer

README = ROOT / "README.md"
PATIENCE = 120  # seconds without a word, before the reader gives up


# --- What differs from run to run

ELIDED = [
    (r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d\.\d+(Z|[+-]\d\d(:\d\d)?)", "<time>"),
    (r"eyJ[\w-]+\.[\w-]+\.[\w-]+", "<token>"),
    (r"process \[\d+\]", "process [<pid>]"),
    (r"127\.0\.0\.1:\d+ - ", "127.0.0.1:<port> - "),
    (r"/\S+/alembic\.ini", "<folder>/alembic.ini"),
    (r"=+ \d+ passed in [\d.]+s( \(\d:\d\d:\d\d\))? =+", "= <n> passed in <time> ="),
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


def same(expected: str, printed: str) -> bool:
    """Whether a text is as expected, where `...` stands for anything, as in a doctest."""
    return OutputChecker().check_output(
        expected, printed, ELLIPSIS | DONT_ACCEPT_BLANKLINE
    )


# --- The README's blocks


class Block(NamedTuple):
    """A fenced block, and the block of output beneath it, if there is one."""

    info: str
    text: str
    output: str


def blocks(document: Document) -> Iterator[Region]:
    """A parser for Sybil: gives the fenced blocks, each with its output."""
    lexer = RawFencedCodeBlockLexer(re.compile("(?P<info>.*)\n"))
    fences = [(*region.lexemes.values(), region) for region in lexer(document)]
    for (info, text, region), (next_info, output, _) in pairwise(
        [*fences, ("", "", None)]
    ):
        if info == "text":
            continue
        region.parsed = Block(info, text, output if next_info == "text" else "")
        yield region


# --- Terminals


class Terminal:
    """A shell at a terminal of 80 columns, with colours and Ctrl-C."""

    PROMPT = "\1([0-9]*)\2"  # holds the status of the command before it

    def __init__(self, folder: Path, settings: dict[str, str]) -> None:
        prompts = {"PS1": r"\001$?\002", "PS2": r"\001\002"}
        self.shell = pexpect.spawn(
            "bash",
            ["--noprofile", "--norc", "--noediting"],
            cwd=folder,
            env=settings | prompts | {"TERM": "xterm"},
            echo=False,
            encoding="utf-8",
            timeout=PATIENCE,
        )
        self.shell.expect(self.PROMPT)
        self.printed = ""  # by the command that goes on, or by the last one that did

    def type(self, commands: str, *, successful: bool = False) -> str:
        """What commands print."""
        printed = ""
        for line in commands.splitlines():
            self.shell.sendline(line)
            self.shell.expect(self.PROMPT)
            printed += plain(self.shell.before)
            if successful:
                status = self.shell.match[1]  # empty in the midst of a command
                assert status in ("", "0"), f"$ {line}\n{printed}status {status}"
        return printed

    def run(self, commands: str) -> str:
        """What commands print that all succeed."""
        return self.type(commands, successful=True)

    def serve(self, command: str) -> None:
        """Start a command that goes on."""
        self.shell.sendline(command)
        self.printed = ""

    def look(self, patience: float = 0.1) -> str:
        """What the command that goes on has printed by now."""
        with suppress(pexpect.TIMEOUT):
            self.printed += plain(self.shell.read_nonblocking(10_000, patience))
        return self.printed

    def ctrl_c(self) -> None:
        """End the command that goes on."""
        self.shell.sendintr()
        self.shell.expect(self.PROMPT)
        self.printed += plain(self.shell.before)

    def close(self) -> None:
        self.shell.close(force=True)


def plain(printed: str) -> str:
    """What is left without a terminal's colours and carriage returns."""
    return re.sub(r"\x1b\[[0-9;]*m|\r", "", printed)


# --- The reader

NPX = """#!/bin/sh
# Stands in for Neon's command line, which needs an account.
echo "$*" >> "$HOME/npx-commands"
case "$*" in
    "neon@latest connection-string --pooled") echo '{url}' ;;
    "neon@latest claim create --file .env.neon") echo 'DATABASE_URL="{url}"' > .env.neon ;;
esac
"""


class Reader:
    """Has a copy of the project, an empty home and a database; knows nothing but the README."""

    def __init__(self, home: Path, database: str, **settings: str) -> None:
        self.home = home
        self.folder = home / "auth"
        files = (".git", ".venv", ".env", "__pycache__", ".*_cache", ".hypothesis")
        shutil.copytree(ROOT, self.folder, ignore=shutil.ignore_patterns(*files))
        # A URL as Neon's: an & makes a difference in a shell. Nobody's packages are there.
        self.url = (
            database
            + "&?"["?" not in database]
            + "sslmode=prefer&channel_binding=prefer"
        )
        npx = home / "bin" / "npx"
        npx.parent.mkdir()
        npx.write_text(NPX.format(url=self.url))
        npx.chmod(0o755)
        path = [
            f
            for f in os.environ["PATH"].split(":")
            if Path(f) != Path(sys.executable).parent
        ]
        path = [npx.parent, f"{sys.base_prefix}/bin", *path, POSTGRES_BIN]
        kept = {
            k: v for k, v in os.environ.items() if k.startswith("PIP_") or k == "CI"
        }
        self.settings = (
            kept
            | {
                "HOME": str(home),
                "PATH": ":".join(map(str, path)),
                "LANG": "C.UTF-8",
                "PIP_NO_COMPILE": "1",  # most of what is installed is never imported
                "VIRTUAL_ENV_DISABLE_PROMPT": "1",
            }
            | settings
        )
        self.terminals = [self.terminal()]
        self.serving = False  # in the first terminal
        self.here, self.there = Elision(), Elision()
        self.log = ""
        self.compared: list[tuple[str, str]] = []

    def terminal(self) -> Terminal:
        return Terminal(self.folder, self.settings)

    def close(self) -> None:
        if self.serving:
            self.end_service()
        for terminal in self.terminals:
            terminal.close()

    def follow(self, markdown: str) -> None:
        """Do all that a text says, and compare what is printed with what it shows."""
        document = Document(markdown, str(README))
        for region in blocks(document):
            region.evaluator = self.evaluate
            document.add(region)
        for example in document.examples():
            example.evaluate()

    def begin_again(self) -> None:
        """Close the terminals and open a new one."""
        self.close()
        self.terminals = [self.terminal()]

    def evaluate(self, example: Example) -> str | None:
        """What is wrong with a block, if anything is. In Sybil's words, an evaluator."""
        block: Block = example.parsed
        match block.info.split():
            case ["sh"] | ["sh", "neon"]:
                return self.run(block)
            case ["sh", "serve"]:
                return self.serve(block)
            case ["text", "log"]:
                return self.find_in_log(block.text)
            case ["python", path]:
                (self.folder / path).write_text(block.text)
            case ["diff", path]:
                return self.patch(self.folder / path, block.text)
            case _:
                return f"a block that nobody checks: {block.info}"
        return None

    def compare(self, block: Block, printed: str) -> str | None:
        expected, printed = self.here(block.output), self.there(printed)
        self.compared.append((expected, printed))
        if same(expected, printed):
            return None
        return f"$ {block.text}--- expected:\n{expected}--- printed:\n{printed}"

    def run(self, block: Block) -> str | None:
        """In the first terminal; while that is busy, in the second."""
        if self.serving and len(self.terminals) == 1:
            self.terminals.append(self.terminal())
        return self.compare(block, self.terminals[-1].run(block.text))

    def serve(self, block: Block) -> str | None:
        if self.serving:
            self.end_service()
        terminal = self.terminals[0]
        terminal.serve(block.text.rstrip())
        self.serving = True
        *_, last = block.output.splitlines()
        patience = time.monotonic() + PATIENCE
        while last not in terminal.look() and time.monotonic() < patience:
            time.sleep(0.1)
        shown = block._replace(output=block.output.rstrip())
        return self.compare(shown, terminal.printed.rstrip())

    def end_service(self) -> None:
        self.terminals[0].ctrl_c()
        self.log += self.terminals[0].printed
        self.serving = False

    def find_in_log(self, expected: str) -> str | None:
        """Each line stands in the service's log, in this order, others between them."""
        printed = self.there(self.log + self.terminals[0].look())
        log = iter(printed.splitlines())
        for line in self.here(expected).splitlines():
            if line not in log:
                return f"--- not there, or not in this place:\n{line}\n--- printed:\n{printed}"
        return None

    def patch(self, path: Path, diff: str) -> str | None:
        lines = diff.splitlines()
        before = "\n".join(line[1:] for line in lines if line[0] != "+")
        after = "\n".join(line[1:] for line in lines if line[0] != "-")
        text = path.read_text()
        if text.count(before) != 1:
            return f"{path.name} does not have these lines once:\n{before}"
        path.write_text(text.replace(before, after))
        return None


@contextmanager
def reader(database: str, **settings: str) -> Iterator[Reader]:
    """A reader who leaves nothing behind."""
    with tempfile.TemporaryDirectory() as home:
        someone = Reader(Path(home), database, **settings)
        try:
            yield someone
        finally:
            someone.close()
