"""How fast the service is, each figure beside one of the same run: the table of README.md.

    .venv/bin/python tests/benchmark.py

Takes under four minutes. With --quick it only shows that everything works.
"""

import asyncio
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from statistics import median
from typing import Self

import bcrypt
import psutil
from support.command import run
from support.postgres import Postgres, fresh_database
from support.service import PASSWORD, Account, Service

QUICK = "--quick" in sys.argv
CORES = os.cpu_count() or 1
COST = 8 if QUICK else 12  # of bcrypt
ROUNDS = 1 if QUICK else 5  # of each measurement and of what stands beside it, by turns
CHECKS = 200 if QUICK else 2_000  # token checks in a round
LOGINS = 4 * CORES if QUICK else 12 * CORES  # logins in a round
STARTED = time.monotonic()

BARE = """
from fastapi import FastAPI
app = FastAPI()

@app.get("/auth/me")
async def me():
    return {"id": "a", "email": "ann@example.com", "is_active": True, "created_at": ""}
"""
Row = tuple[str, str, str, str]  # what, the service, compared with, ratio


def progress(text: str) -> None:
    """One line on stderr, after the seconds since the start."""
    seconds = time.monotonic() - STARTED
    print(f"{seconds:4.0f} s  {text}", file=sys.stderr, flush=True)


def row(what: str, ours: float, their_name: str, theirs: float, unit: str) -> Row:
    figures = f"{ours:.4g} {unit}", f"{their_name} {theirs:.4g} {unit}"
    return what, *figures, f"{ours / theirs:.2f}"


# --- The load. It shares the cores with the service, so it must cost little -----------
class Client:
    """One connection, on which one request follows the other."""

    def __init__(self, port: int) -> None:
        self.port = port

    async def __aenter__(self) -> Self:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()

    async def ask(self, request: bytes) -> tuple[int, float]:
        """The status of the answer, and the seconds that it took."""
        start = time.perf_counter()
        self.writer.write(request)
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r")[0]
        await self.reader.readexactly(int(length))
        return int(head[9:12]), time.perf_counter() - start


def check_request(account: Account) -> bytes:
    token = account.token
    return f"GET /auth/me HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\r\n".encode()


def login_request(account: Account) -> bytes:
    body = f'{{"email": "{account.email}", "password": "{PASSWORD}"}}'
    head = "POST /auth/login HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()


async def rate(service: Service, request: bytes, clients: int, total: int) -> float:
    """The requests answered with 200 per second, while so many clients share the work."""
    work = iter(range(total))

    async def client() -> None:
        async with Client(service.port) as connection:
            for _ in work:
                status, _ = await connection.ask(request)
                if status != 200:
                    raise RuntimeError(f"status {status}\n{service.log[-2000:]}")

    start = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(clients):
            tasks.create_task(client())
    return total / (time.perf_counter() - start)


async def flood(
    service: Service, login: bytes, check: bytes, clients: int, seconds: float
) -> tuple[float, list[float]]:
    """Logins per second of clients who never stop, and how long token checks take then."""
    end = time.perf_counter() + seconds
    served = 0

    async def client() -> None:
        nonlocal served
        async with Client(service.port) as connection:
            while time.perf_counter() < end:
                status, _ = await connection.ask(login)
                served += status == 200 and time.perf_counter() < end
                if status not in (200, 503):
                    raise RuntimeError(f"status {status}\n{service.log[-2000:]}")

    async with asyncio.TaskGroup() as tasks:
        for _ in range(clients):
            tasks.create_task(client())
        times = await probe(service, check, seconds - 0.5)
    return served / seconds, times


async def probe(service: Service, check: bytes, seconds: float) -> list[float]:
    """The seconds that a token check takes, 20 of them in a second."""
    times = []
    async with Client(service.port) as connection:
        for _ in range(round(20 * seconds)):
            await asyncio.sleep(0.05)
            times.append((await connection.ask(check))[1])
    return times


# --- The measurements -----------------------------------------------------------------
def bcrypt_alone() -> float:
    """The passwords checked per second on all cores, with nothing else to do."""
    hashed = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(COST))
    with ThreadPoolExecutor(CORES) as threads:
        start = time.perf_counter()
        arguments = repeat(PASSWORD.encode(), LOGINS), repeat(hashed, LOGINS)
        list(threads.map(bcrypt.checkpw, *arguments))
        return LOGINS / (time.perf_counter() - start)


def logins(service: Service, login: bytes) -> Row:
    ours, theirs = [], []
    for _ in range(ROUNDS):
        theirs.append(bcrypt_alone())
        ours.append(asyncio.run(rate(service, login, 2 * CORES, LOGINS)))
        progress(f"logins {ours[-1]:.2f}/s, bcrypt alone {theirs[-1]:.2f}/s")
    return row("Logins", median(ours), "bcrypt alone", median(theirs), "/s")


def login_flood(service: Service, login: bytes, check: bytes) -> Iterator[Row]:
    """Many more clients than can be served: most are told so with a 503."""
    idle = asyncio.run(probe(service, check, 1 if QUICK else 5))
    theirs = [bcrypt_alone()]
    seconds = 2 if QUICK else 20
    served, times = asyncio.run(flood(service, login, check, 60, seconds))
    theirs.append(bcrypt_alone())
    progress(f"of 60 clients at once {served:.2f}/s logged in")
    yield row(
        "Logins, 60 clients at once", served, "bcrypt alone", median(theirs), "/s"
    )
    what, ours = "A token check meanwhile, median", 1000 * median(times)
    yield row(what, ours, "idle", 1000 * median(idle), "ms")


def token_checks(service: Service, bare: Service, check: bytes) -> Row:
    ours, theirs = [], []
    for _ in range(ROUNDS):
        ours.append(asyncio.run(rate(service, check, 16, CHECKS)))
        theirs.append(asyncio.run(rate(bare, check, 16, CHECKS)))
        progress(f"token checks {ours[-1]:.0f}/s, bare FastAPI {theirs[-1]:.0f}/s")
    what = "Token checks, 16 clients"
    return row(what, median(ours), "bare FastAPI", median(theirs), "/s")


def memory(service: Service, bare: Service) -> Row:
    """After all of the above."""
    sizes = [
        psutil.Process(each.process.pid).memory_info().rss / 2**20
        for each in (service, bare)
    ]
    return row("Memory of one process", sizes[0], "bare FastAPI", sizes[1], "MiB")


def main() -> None:
    """Measure everything on a PostgreSQL of its own, then print the table."""
    with (
        Postgres() as postgres,
        fresh_database(postgres.url("postgres")) as database,
        tempfile.TemporaryDirectory() as folder,
    ):
        run("python", "init_db.py", database=database).check_returncode()
        Path(folder, "main.py").write_text(BARE)
        with (
            Service(database, BCRYPT_ROUNDS=str(COST)) as service,
            Service(database, "--app-dir", folder) as bare,
        ):
            account = service.account()
            login, check = login_request(account), check_request(account)
            rows = [token_checks(service, bare, check), logins(service, login)]
            rows.append(memory(service, bare))
            rows.extend(login_flood(service, login, check))
    python = platform.python_version()
    print(f"{CORES} cores, Python {python}, one process, bcrypt cost {COST}:\n")
    print("| | the service | compared with | ratio |\n|---|---|---|---|")
    for each in rows:
        print(f"| {' | '.join(each)} |")


if __name__ == "__main__":
    main()
