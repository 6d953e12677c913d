"""A reader of the pages, who types what they say at real terminals and sees what is printed.

bash, pip, psql, curl and uvicorn are the real ones. Two programs are stood in for: `npx`, since
Neon's command line needs an account, and `git`, which clones this folder.
"""

import ast
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from doctest import DONT_ACCEPT_BLANKLINE, ELLIPSIS, OutputChecker
from pathlib import Path
from textwrap import dedent
from typing import NamedTuple

import pexpect
from sybil import Document, Example, Region
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer

from support.command import ROOT
from support.postgres import POSTGRES_BIN

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
PATIENCE = 120  # seconds without a word, before the reader gives up


# --- What differs from run to run

ELIDED = [
    (r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d\.\d+(Z|[+-]\d\d(:\d\d)?)", "<time>"),
    (r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}", "<time>"),
    (r"eyJ[\w-]+\.[\w-]+\.[\w-]+", "<token>"),
    (r"process \[\d+\]", "process [<pid>]"),
    (r"127\.0\.0\.1:\d+ - ", "127.0.0.1:<port> - "),
    (r"=+ \d+ passed in [\d.]+s( \(\d:\d\d:\d\d\))? =+", "= <n> passed in <time> ="),
    (r"passed in [\d.]+s", "passed in <time>"),
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


def docstring_example() -> str:
    """The notes.py in the docstring of main.py."""
    docstring = ast.get_docstring(ast.parse((ROOT / "main.py").read_text()))
    example = docstring.partition("same folder:\n")[2].partition("Then load")[0]
    return dedent(example).lstrip()


# --- The README's blocks


class Block(NamedTuple):
    """A fenced block, and the block of output beneath it, if there is one."""

    info: str
    text: str
    output: str


def blocks(document: Document) -> list[Region]:
    """A parser for Sybil: gives the fenced blocks, each with its output."""
    found, shell = [], None
    for region in RawFencedCodeBlockLexer(re.compile("(?P<info>.*)\n"))(document):
        info, text = region.lexemes["info"], region.lexemes["source"]
        if info == "text" and shell:
            shell.parsed = shell.parsed._replace(output=text)
        else:
            region.parsed = Block(info, text, output="")
            found.append(region)
        shell = region if info.startswith("sh") else None
    return found


# --- Terminals


def plain(printed: str) -> str:
    """What is left without a terminal's colours and carriage returns."""
    return re.sub(r"\x1b\[[0-9;]*m|\r", "", printed)


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
        self.raw = ""  # what the command that goes on has printed

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
        self.raw = ""

    def look(self) -> str:
        """What the command that goes on, or has just ended, has printed by now."""
        with suppress(pexpect.TIMEOUT):
            self.raw += self.shell.read_nonblocking(10_000, timeout=0.1)
        return plain(self.raw)

    def has_ended(self) -> bool:
        """Whether the command that ought to go on has come back to the prompt."""
        return re.search(self.PROMPT, self.raw) is not None

    def ctrl_c(self) -> str:
        """End the command that goes on; gives all that it has printed."""
        self.shell.sendintr()
        self.shell.expect(self.PROMPT)
        return plain(self.raw + self.shell.before)

    def close(self) -> None:
        self.shell.close(force=True)


# --- The reader

QUERY = "sslmode=prefer&channel_binding=prefer"  # a & as in Neon's URL
NPX = """#!/bin/sh
# Stands in for Neon's command line, which needs an account.
echo "$*" >> "$HOME/npx-commands"
case "$*" in
    "-y neon@latest connection-string --pooled") echo '{url}' ;;
    "-y neon@latest claim create --file .env.neon") echo 'DATABASE_URL="{url}"' > .env.neon ;;
esac
"""


GIT = """#!/bin/sh
[ "$1 $2" = "clone ADDRESS" ] && cp -r '{copy}' "$3" && echo "Cloning into '$3'..."
"""


class Reader:
    """Has a copy of the project, an empty home and a database; knows nothing but the pages."""

    def __init__(self, home: Path, database: str, **settings: str) -> None:
        self.home = home
        self.folder = home / "auth"
        files = (".git", ".venv", ".env", "__pycache__", ".*_cache", ".hypothesis")
        shutil.copytree(ROOT, self.folder, ignore=shutil.ignore_patterns(*files))
        self.url = database if "?" in database else f"{database}?{QUERY}"
        npx = home / "bin" / "npx"
        npx.parent.mkdir()
        git = npx.with_name("git")
        npx.write_text(NPX.format(url=self.url))
        git.write_text(GIT.format(copy=self.folder))
        for program in (npx, git):
            program.chmod(0o755)
        environment = os.environ
        kept = {k: environment[k] for k in environment if k[:4] == "PIP_" or k == "CI"}
        here = str(Path(sys.executable).parent)  # whose packages a reader does not have
        path = [f for f in environment["PATH"].split(":") if f != here]
        path = [str(npx.parent), f"{sys.base_prefix}/bin", *path, str(POSTGRES_BIN)]
        self.settings = {
            **kept,
            "HOME": str(home),
            "PATH": ":".join(path),
            "LANG": "C.UTF-8",
            "PIP_NO_COMPILE": "1",  # most of what is installed is never imported
            "VIRTUAL_ENV_DISABLE_PROMPT": "1",
            **settings,
        }
        self.terminals = [self.terminal()]
        self.serving = False  # in the first terminal
        self.here, self.there = Elision(), Elision()
        self.log = ""  # of services that have ended
        self.compared: list[tuple[str, str]] = []

    def terminal(self) -> Terminal:
        return Terminal(self.folder, self.settings)

    def close(self) -> None:
        if self.serving:
            self.end_service()
        for terminal in self.terminals:
            terminal.close()

    def follow(self, markdown: str, page: Path = README) -> None:
        """Do all that a page says, and compare what is printed with what it shows."""
        document = Document(markdown, str(page))
        for region in blocks(document):
            region.evaluator = self.evaluate
            document.add(region)
        for example in document.examples():
            example.evaluate()

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
            case ["python" | "sh" | "json", path]:
                (self.folder / path).write_text(block.text)
            case ["nginx", _] | ["js"] | ["mermaid"]:
                pass  # test_nginx.py and test_browser.py run the first two
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
        *before, command = block.text.strip().splitlines()
        printed = terminal.run("\n".join(before))
        terminal.serve(command)
        self.serving = True
        *_, last = block.output.splitlines()
        patience = time.monotonic() + PATIENCE
        times = block.output.count(last)
        while terminal.look().count(last) < times and time.monotonic() < patience:
            if terminal.has_ended():
                break
        shown = block._replace(output=block.output.rstrip())
        return self.compare(shown, printed + terminal.look().rstrip())

    def end_service(self) -> None:
        self.log += self.terminals[0].ctrl_c()
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
