"""python3 tests/try_it.py: the whole walkthrough on a throw-away PostgreSQL."""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.command import ROOT, free_port, run


def start(temporary: Path, *options: str) -> subprocess.Popen[str]:
    """The command, with its temporary files in a folder of their own."""
    confusing = {"DATABASE_URL": "unused", "BCRYPT_ROUNDS": "x"}
    return subprocess.Popen(
        [sys.executable, "tests/try_it.py", *options],
        cwd=ROOT,
        env=os.environ | confusing | {"TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize(
    ("how", "to"),
    [(signal.SIGINT, os.killpg), (signal.SIGTERM, os.kill)],
    ids=["Ctrl-C", "kill"],
)
def test_it_shows_everything_and_leaves_nothing(
    how: signal.Signals, to: Callable[..., Any]
) -> None:
    """Ctrl-C reaches the whole group of processes, `kill` one alone."""
    port = free_port()
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        tried = start(Path(name), "--port", str(port))
        shown = ""
        while "Ctrl-C stops" not in shown:
            line = tried.stdout.readline()
            assert line, shown
            shown += line
        for words in [
            "$ python init_db.py\nusers: created\n",
            f"$ uvicorn main:app --port {port}\n",
            '$ psql "$DATABASE_URL" -f verify.sql\nThe columns\n',
        ]:
            assert words in shown
        pasted = shown.partition("second terminal:\n")[2].partition("Ctrl-C")[0]
        second = subprocess.run(
            ["sh", "-c", pasted], capture_output=True, check=False, text=True, timeout=60
        )  # fmt: skip
        assert second.stdout.count('"email":"ann@example.com","is_active":true') == 2
        assert re.search(r"ann@example\.com \| t", second.stdout), second.stderr
        to(tried.pid, how)
        rest, _ = tried.communicate(timeout=60)
        assert "Application shutdown complete." in rest
        assert rest.endswith("Stopped. Nothing is left behind but .venv.\n")
        assert "Traceback" not in shown + rest
        assert list(Path(name).iterdir()) == []
    server = int(re.search(r"@127\.0\.0\.1:(\d+)/", shown)[1])
    for ended in (port, server):
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", ended)) != 0


def test_a_taken_port(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        shown, _ = start(tmp_path, "--port", str(port)).communicate(timeout=60)
    assert shown.endswith(
        f"error: port {port} is taken. Choose another: python3 tests/try_it.py --port {port + 1}\n"
    )


OLDER = """
import runpy, sys
sys.version_info = (3, 10, 13)
runpy.run_path("tests/try_it.py", run_name="__main__")
"""


def test_an_older_python_is_told_in_a_sentence() -> None:
    done = run("python", "-c", OLDER)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"error: this needs Python 3\.11 or newer, .*\n", done.stderr)
