"""The walkthrough on a throw-away PostgreSQL: no account, no installation, nothing left behind."""

import argparse
import secrets
import signal
import socket
import subprocess
import sys
import time
from types import FrameType
from typing import NoReturn

import psutil

from support.command import ROOT, environment
from support.postgres import POSTGRES_BIN, Postgres, fresh_database

HINTS = """
The service is running. Paste this into a second terminal:

API=http://127.0.0.1:{port}
JSON='Content-Type: application/json'
ANN='{{"email": "ann@example.com", "password": "correct horse"}}'
curl -w '\\n' $API/auth/register -H "$JSON" -d "$ANN"
TOKEN=$(curl -s $API/auth/login -H "$JSON" -d "$ANN" | sed 's/.*"access_token":"\\([^"]*\\)".*/\\1/')
echo $TOKEN
curl -w '\\n' $API/auth/me -H "Authorization: Bearer $TOKEN"

# psql, to look into the database:

export PATH="$PATH:{bin}"
psql '{database}' -c 'SELECT email, is_active FROM users'

Ctrl-C stops everything and leaves nothing behind but .venv.
"""


def interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
    """End as Ctrl-C does."""
    raise KeyboardInterrupt


def is_taken(port: int) -> bool:
    """Whether something listens on a port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError):
            return True
    return False


def listens(process: subprocess.Popen[bytes], port: int) -> bool:
    """Whether this very process, and no other program, listens on a port."""
    try:
        sockets = psutil.Process(process.pid).net_connections("inet")
    except psutil.Error:
        return False
    return any(s.status == psutil.CONN_LISTEN and s.laddr.port == port for s in sockets)


def serve(database: str, port: int) -> None:
    """Run the walkthrough's own commands, then wait for the service to end."""
    settings = environment(
        database,
        JWT_SECRET=secrets.token_hex(32),
        ACCESS_TOKEN_MINUTES="30",
        BCRYPT_ROUNDS="12",
    )
    settings["PATH"] += f":{POSTGRES_BIN}"

    def start(command: str) -> subprocess.Popen[bytes]:
        print(f"\n$ {command}", flush=True)
        return subprocess.Popen(["sh", "-c", f"exec {command}"], cwd=ROOT, env=settings)

    if start("python init_db.py").wait() != 0:
        sys.exit(1)
    uvicorn = start("uvicorn main:app" + (f" --port {port}" if port != 8000 else ""))
    try:
        while uvicorn.poll() is None and not listens(uvicorn, port):
            time.sleep(0.05)
        if (
            uvicorn.poll() is None
            and start('psql "$DATABASE_URL" -f verify.sql').wait() == 0
        ):
            print(
                HINTS.format(port=port, database=database, bin=POSTGRES_BIN), flush=True
            )
            uvicorn.wait()
    finally:
        # A second Ctrl-C must leave nothing either.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if uvicorn.poll() is None:
            uvicorn.send_signal(signal.SIGINT)
            uvicorn.wait()
    sys.exit(uvicorn.returncode)


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests/try_it.py", description=__doc__)
    parser.add_argument("--port", type=int, default=8000, help="default: 8000")
    port = parser.parse_args().port
    if is_taken(port):
        sys.exit(
            f"error: port {port} is taken. Choose another: python3 tests/try_it.py --port {port + 1}"
        )
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), interrupt)
    try:
        print("Starting a throw-away PostgreSQL ...", flush=True)
        with (
            Postgres() as postgres,
            fresh_database(postgres.url("postgres")) as database,
        ):
            serve(database, port)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        print("Stopped. Nothing is left behind but .venv.", flush=True)
