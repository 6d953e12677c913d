"""Debian's PgBouncer, the real transaction pooler; Neon runs the same program."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Self

import psycopg

from support.command import free_port, missing, unprivileged
from support.postgres import Postgres, change_url, make_certificate


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
        sslmode = self.settings["client_tls_sslmode"]
        return change_url(self.postgres.url(database), port=self.port, sslmode=sslmode)

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
