"""How fast the service is: each figure beside its own limit, taken in the same run.

    .venv/bin/python tests/benchmark.py            # under three and a half minutes
    .venv/bin/python tests/benchmark.py --uvloop   # also with uvloop and httptools
    .venv/bin/python tests/benchmark.py --quick    # one round, no figures to quote

Progress goes to stderr, the closing table, in Markdown, to stdout. How fast it was does
not change the exit status; a wrong answer, or none, is an error.
"""

import asyncio
import os
import platform
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import cycle, islice, repeat, takewhile
from pathlib import Path
from statistics import median, quantiles

import bcrypt
import psutil
from support.command import run
from support.postgres import Postgres, fresh_database
from support.service import Service

CORES = os.cpu_count() or 1
QUICK = "--quick" in sys.argv  # only to see that all of it works
UVLOOP = "--uvloop" in sys.argv  # install both into a temporary folder
ROUNDS = 1 if QUICK else 5  # of each measurement and of what stands beside it, by turns
REQUESTS = 4_000 if QUICK else 100_000
COST = 8 if QUICK else 12  # of bcrypt
STARTED = time.monotonic()
EMAIL, PASSWORD = "ann@example.com", "correct horse"

BARE = """
from fastapi import FastAPI
app = FastAPI()

@app.get("/auth/me")
async def me():
    return """


def note(text: str) -> None:
    """One line of progress, after the seconds since the start."""
    seconds = time.monotonic() - STARTED
    print(f"{seconds:4.0f} s  {text}", file=sys.stderr, flush=True)


# --- The load: it shares the cores with the service, so it must cost little -------
Job = tuple[bytes, int]  # a request, and the status that it must be answered with


def job(line: str, status: int, token: str = "", body: str = "") -> Job:
    """A request, encoded once for all the times it is sent."""
    head = f"{line} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    if token:
        head += f"Authorization: Bearer {token}\r\n"
    if body:
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return f"{head}\r\n{body}".encode(), status


class Client(asyncio.Protocol):
    """One keep-alive connection, on which answers come in the order of requests."""

    HEAD = re.compile(rb"(?is)HTTP/1.1 (\d+).*?\r\ncontent-length: (\d+)\r\n")

    def __init__(self) -> None:
        self.received = b""
        self.waiting: list[asyncio.Future[int]] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        while (end := self.received.find(b"\r\n\r\n")) > 0:
            head = self.HEAD.match(self.received, 0, end + 2)
            length = end + 4 + int(head[2])
            if len(self.received) < length:
                return
            self.received = self.received[length:]
            self.waiting.pop(0).set_result(int(head[1]))

    def connection_lost(self, error: Exception | None) -> None:
        for answer in self.waiting:
            if not answer.done():
                answer.set_exception(ConnectionError("the service hung up"))

    async def status(self, request: bytes) -> int:
        """The status of the answer."""
        self.waiting.append(asyncio.get_running_loop().create_future())
        self.transport.write(request)
        return await self.waiting[-1]

    async def ask(self, job: Job) -> float:
        """The seconds that the answer took; its status is checked."""
        request, expected = job
        start = time.perf_counter()
        if (status := await self.status(request)) != expected:
            raise RuntimeError(f"{status}, not {expected}, for {request[:99]!r}")
        return time.perf_counter() - start

    async def ask_all(self, jobs: Iterable[Job]) -> Counter[Job]:
        """How often each job was done, one after the other."""
        done = Counter[Job]()
        for job in jobs:
            await self.ask(job)
            done[job] += 1
        return done


class Target(Service):
    """A running service, under load, that knows what it was asked."""

    def __init__(self, database: str, *options: str, **variables: str) -> None:
        super().__init__(database, *options, BCRYPT_ROUNDS=str(COST), **variables)
        self.asked = Counter[Job]()

    async def clients(self, number: int) -> list[Client]:
        """So many connections; they end with the event loop."""
        connect = asyncio.get_running_loop().create_connection
        made = [await connect(Client, "127.0.0.1", self.port) for _ in range(number)]
        return [client for _, client in made]

    async def rate(self, clients: int, jobs: Iterator[Job]) -> float:
        """The jobs done per second by so many clients, each taking the next one."""
        async with asyncio.timeout(300):
            people = await self.clients(clients)
            start = time.perf_counter()
            done = await asyncio.gather(*(person.ask_all(jobs) for person in people))
            seconds = time.perf_counter() - start
        self.asked += (total := sum(done, Counter[Job]()))
        return total.total() / seconds

    async def probe(self, check: Job, clients: int, login: Job) -> list[float]:
        """The milliseconds of 150 checks, one every 20, while so many clients log in."""
        start = time.perf_counter() + 0.5
        end = start + 150 * 0.02
        jobs = takewhile(lambda _: time.perf_counter() < end, repeat(login))
        async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
            people = await self.clients(clients)
            logins = [tasks.create_task(person.ask_all(jobs)) for person in people]
            lines = await self.clients(8)  # so that a late answer delays no other check
            checks = []
            for number in range(150):
                await asyncio.sleep(start + number * 0.02 - time.perf_counter())
                checks.append(tasks.create_task(lines[number % 8].ask(check)))
        self.asked += sum((task.result() for task in logins), Counter({check: 150}))
        return [1000 * task.result() for task in checks]

    async def overload(self, login: Job, each: float, seconds: float) -> float:
        """The logins per second that succeed, of a stream in which one comes each so often.

        Every client is a new one, and leaves after 10 seconds without an answer. The
        second before is not counted, nor is what the last ones are answered later.
        """
        request, success = login
        start = time.perf_counter() + 1
        end = start + seconds
        in_time = 0

        async def client(comes: float) -> None:
            nonlocal in_time
            await asyncio.sleep(comes - time.perf_counter())
            (connection,) = await self.clients(1)
            try:
                async with asyncio.timeout(10):
                    status = await connection.status(request)
            except TimeoutError:
                return
            finally:
                connection.transport.close()
            self.asked[request, status] += 1
            in_time += status == success and start < time.perf_counter() < end
            if status not in (success, 503):
                raise RuntimeError(f"{status} for {request[:99]!r}")

        async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
            for number in range(int((seconds + 1) / each)):
                tasks.create_task(client(start - 1 + number * each))
        return in_time / seconds

    @property
    def resident(self) -> float:
        """Megabytes of memory."""
        return psutil.Process(self.process.pid).memory_info().rss / 1e6


# --- The measurements: each makes rows of the table -------------------------------
Row = tuple[str, str, str, str, str]  # what, the service, compared with, ratio, goal


def ratio(our: float, their: float) -> str:
    """One figure over another of the same run."""
    return f"{our / their:.2f}"


def start_up(database: str) -> Row:
    """From the launch of `uvicorn main:app` to its first answer."""
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        with Service(database) as service:
            if service.http.get("/auth/me").status_code != 401:
                raise RuntimeError(service.log)
            seconds.append(time.perf_counter() - start)
        note(f"start-up {seconds[-1]:.2f} s")
    return "Start-up, to the first answer", f"{median(seconds):.2f} s", "", "", "< 2 s"


def bcrypt_alone(jobs: int) -> float:
    """The passwords checked per second on all cores, with nothing else to do."""
    hashed = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(COST))
    with ThreadPoolExecutor(CORES) as threads:
        start = time.perf_counter()
        check = repeat(PASSWORD.encode(), jobs), repeat(hashed, jobs)
        if not all(threads.map(bcrypt.checkpw, *check)):
            raise RuntimeError("bcrypt refuses its own hash")
        return jobs / (time.perf_counter() - start)


def logins(service: Target, login: Job) -> Row:
    """Checking as many passwords as logging in: both end on all cores at once."""
    jobs = 8 * CORES
    ours, theirs = [], []
    for _ in range(ROUNDS):
        theirs.append(bcrypt_alone(jobs))
        ours.append(asyncio.run(service.rate(4 * CORES, repeat(login, jobs))))
        note(f"logins {ours[-1]:.2f}/s, bcrypt alone {theirs[-1]:.2f}/s")
    figures = f"{median(ours):.2f}/s", f"bcrypt alone {median(theirs):.2f}/s"
    return "Logins", *figures, ratio(median(ours), median(theirs)), "≥ 0.95"


def logins_at_twice_the_capacity(service: Target, login: Job) -> Row:
    """Those that succeed while twice as many come as the cores can hash."""
    ours, theirs = [], []
    for _ in range(1 if QUICK else 2):
        theirs.append(bcrypt_alone(8 * CORES))
        stream = service.overload(login, 1 / theirs[-1] / 2, 2 if QUICK else 10)
        ours.append(asyncio.run(stream))
        note(f"of twice as many {ours[-1]:.2f}/s, bcrypt alone {theirs[-1]:.2f}/s")
    figures = f"{median(ours):.2f}/s", f"bcrypt alone {median(theirs):.2f}/s"
    return (
        "Logins at twice the capacity",
        *figures,
        ratio(median(ours), median(theirs)),
        "≥ 0.9",
    )


def token_checks(
    service: Target, bare: Target, faster: Target | None, check: Job
) -> Iterator[Row]:
    """Those of 16 clients, the same on a route that returns a constant, and with uvloop."""
    targets = {"service": service, "bare FastAPI": bare, "with uvloop": faster}
    rates: dict[str, list[float]] = {name: [] for name in targets}
    for _ in range(ROUNDS):
        for name, target in targets.items():
            if target:
                jobs = repeat(check, 150 if QUICK else 1500)
                rates[name].append(asyncio.run(target.rate(16, jobs)))
                note(f"token checks {rates[name][-1]:.0f}/s, {name}")
    ours, theirs = median(rates["service"]), median(rates["bare FastAPI"])
    figures = f"{ours:.0f}/s", f"bare FastAPI {theirs:.0f}/s", ratio(ours, theirs), ""
    yield "Token checks, 16 clients", *figures
    if faster:
        fast = median(rates["with uvloop"])
        figures = f"{fast:.0f}/s", f"without {ours:.0f}/s", ratio(fast, ours), ""
        yield "Token checks with uvloop and httptools", *figures


def with_uvloop(database: str, folder: Path) -> Target:
    """The service with uvloop and httptools beside it: uvicorn takes what it finds."""
    pip = "python", "-m", "pip", "install", "-q", "--target", folder
    run(*pip, "uvloop", "httptools").check_returncode()
    note("installed uvloop and httptools")
    return Target(database, PYTHONPATH=str(folder))


def checks_during_logins(service: Target, check: Job, login: Job) -> Iterator[Row]:
    """A check every 20 ms, idle and while 8 clients log in without pause."""
    idle, busy = [], []  # of each round: its median, 99th percentile and slowest
    for _ in range(ROUNDS):
        for rounds, clients in ((idle, 0), (busy, 8)):
            ms = asyncio.run(service.probe(check, clients, login))
            rounds.append((median(ms), quantiles(ms, n=100)[98], max(ms)))
        ours, theirs = (" / ".join(f"{ms:.1f}" for ms in r[-1]) for r in (busy, idle))
        note(f"a check during logins {ours} ms, idle {theirs} ms")
    names = (
        ("median", median, "< 3"),
        ("99 %", median, ""),
        ("slowest", max, "< 100 ms"),
    )
    for (name, over, goal), ours, theirs in zip(names, zip(*busy), zip(*idle)):
        figures = f"{over(ours):.1f} ms", f"idle {over(theirs):.1f} ms"
        yield (
            f"A check during logins, {name}",
            *figures,
            ratio(over(ours), over(theirs)),
            goal,
        )


def memory(service: Target, check: Job) -> Row:
    """After many requests, those of the measurements before included."""
    anonymous, forged = job("GET /auth/me", 401), job("GET /auth/me", 401, "a.b.c")
    malformed = job("POST /auth/login", 422, body='{"email": "x"}')
    mix = cycle((check, forged, malformed, *repeat(anonymous, 7)))
    sizes = []
    for quarter in (1, 2, 3, 4):
        asked = quarter * REQUESTS // 4
        jobs = islice(mix, max(0, asked - service.asked.total()))
        asyncio.run(service.rate(16, jobs))
        sizes.append(service.resident)
        note(f"{sizes[-1]:.1f} MB resident after {service.asked.total():,} requests")
    figures = f"{sizes[-1]:.1f} MB", f"after half of them {sizes[1]:.1f} MB"
    return (
        f"Memory after {REQUESTS:,} requests",
        *figures,
        ratio(sizes[3], sizes[1]),
        "< 90 MB",
    )


def main() -> None:
    """Measure everything on a PostgreSQL of its own, then print the table."""
    with (
        Postgres() as postgres,
        fresh_database(postgres.url("postgres")) as database,
        tempfile.TemporaryDirectory() as folder,
    ):
        run("python", "init_db.py", database=database).check_returncode()
        rows = [start_up(database)]
        with Target(database) as service:
            user = service.register(EMAIL, PASSWORD).raise_for_status().json()
            answer = service.login(EMAIL, PASSWORD).raise_for_status()
            check = job("GET /auth/me", 200, answer.json()["access_token"])
            login = job("POST /auth/login", 200, body=answer.request.content.decode())
            rows.append(logins(service, login))
            rows.append(logins_at_twice_the_capacity(service, login))
            Path(folder, "main.py").write_text(f"{BARE}{user!r}\n")
            with ExitStack() as stack:
                bare = stack.enter_context(Target(database, "--app-dir", folder))
                faster = None
                if UVLOOP:
                    faster = with_uvloop(database, Path(folder, "packages"))
                    stack.enter_context(faster)
                rows += token_checks(service, bare, faster, check)
            rows += checks_during_logins(service, check, login)
            rows.append(memory(service, check))
    python = platform.python_version()
    print(f"{CORES} cores, Python {python}, one process, bcrypt cost {COST}:\n")
    print("| | the service | compared with | ratio | goal |\n|---|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print(f"\nThe {service.asked.total():,} requests behind the memory figure:\n")
    for (request, status), number in service.asked.most_common():
        token = ", with a token" if b"\r\nAuthorization:" in request else ""
        print(
            f"- {number:,} times {request.split(b' HTTP')[0].decode()}{token}: {status}"
        )


if __name__ == "__main__":
    main()
