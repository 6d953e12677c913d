"""Running the project's commands as a reader does: in a folder, with an environment."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[2]
JWT_SECRET = 2 * "a-secret-that-only-the-tests-know"


def free_port() -> int:
    """A TCP port on 127.0.0.1 that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def unprivileged() -> dict[str, Any]:
    """Arguments for subprocess that leave root behind, since PostgreSQL refuses to run as root."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return {}
    import pwd

    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def environment(database: str | None, **variables: str) -> dict[str, str]:
    """The environment of a command: this Python's programs first, and the service's settings."""
    settings = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "JWT_SECRET": JWT_SECRET,
        "BCRYPT_ROUNDS": "4",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    if database is not None:
        settings["DATABASE_URL"] = database
    return os.environ | settings | variables


def run(
    *command: str | Path,
    database: str | None = None,
    settings: dict[str, str] | None = None,
    folder: Path | None = None,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """A finished command, run at the top of the project or in a folder, and what it printed."""
    return subprocess.run(
        command,
        cwd=folder or ROOT,
        env=settings or environment(database, **variables),
        capture_output=True,
        check=False,
        text=True,
        timeout=120,
    )


def missing(what: str) -> NoReturn:
    """Skip the test for want of a program, or fail it where CI promises the program."""
    import pytest  # which tests/try_it.py does without

    if os.environ.get("CI"):
        pytest.fail(f"{what} is not installed, and CI is set")
    pytest.skip(f"{what} is not installed")
