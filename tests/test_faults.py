"""The database as it really behaves: pooled, asleep, gone, hung. No row may lose an account.

These tests stop and hang servers, so they run on a server of their own, whatever
TEST_DATABASE_URL says. Every service checks its own log when it ends: see `Crowded`.
"""

import os
import re
import signal
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Self

import bcrypt
import httpx
import psutil
import psycopg
import pytest
from harness import Postgres, Service, fresh_database, run
from pooler import PgBouncer, TlsPostgres, Wire, missing

PASSWORD = "correct horse"
WORST = 25  # seconds: the deadline, and the 10 that psycopg takes to give up
AGAIN = "; try again, or see README.md"
CORES = os.cpu_count() or 1

COUNTED = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"
OTHERS = "datname = current_database() AND pid <> pg_backend_pid()"
CONNECTED = f"{COUNTED} AND {OTHERS}"
WAITING = f"{CONNECTED} AND wait_event_type = 'Lock'"
FROM_OTHERS = f"FROM pg_stat_activity WHERE {OTHERS}"
END = f"SELECT pg_terminate_backend(pid, 5000) {FROM_OTHERS}"


class OwnConnections(httpx.BaseTransport):
    """A connection for each thread: hundreds that share a pool wait for each other."""

    def __init__(self) -> None:
        self.context = ssl.create_default_context()  # slow to make, and never used
        self.threads = threading.local()
        self.all: list[httpx.HTTPTransport] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if not hasattr(self.threads, "own"):
            self.threads.own = httpx.HTTPTransport(verify=self.context)
            self.all.append(self.threads.own)
        return self.threads.own.handle_request(request)

    def close(self) -> None:
        for transport in self.all:
            transport.close()


class Crowded(Service):
    """The service before any number of clients at once; its log is checked at the end."""

    def __init__(self, database: str, *options: str, **variables: str) -> None:
        super().__init__(database, *options, **variables)
        self.http.close()
        connections = OwnConnections()
        self.http = httpx.Client(base_url=self.url, timeout=60, transport=connections)
        self.crowd = ThreadPoolExecutor(600)

    def at_once(
        self, times: int, ask: Callable[..., httpx.Response], *words: Any
    ) -> list[Future[httpx.Response]]:
        """The answers to come of that many clients who all ask the same now."""
        return [self.crowd.submit(ask, *words) for _ in range(times)]

    def account(self, email: str) -> str:
        """An access token of a new account."""
        assert self.register(email).status_code == 201
        return self.login(email).json()["access_token"]

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        try:
            return super().stop(how)
        finally:
            if hasattr(self, "crowd"):
                self.crowd.shutdown(cancel_futures=True)

    def __exit__(self, *error: object) -> None:
        log = self.log
        super().__exit__(*error)
        if error[0] is None:  # else there is already something to say
            for leak in ("Traceback", "$2b$", PASSWORD):
                assert leak not in log, log[-5000:]


def statuses(answers: list[Future[httpx.Response]]) -> Counter[int]:
    return Counter(answer.result().status_code for answer in answers)


def assert_unavailable(answer: httpx.Response, advice: str = "try again") -> None:
    """503 in the service's own words, which name no host and quote no database."""
    assert answer.status_code == 503
    assert answer.json() == {"detail": f"Unavailable, {advice}"}
    assert answer.headers["Retry-After"] == "5"


def reasons(service: Service) -> list[str]:
    """Why the service was unavailable each time, by its log, which begins with the host."""
    line = (
        r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ERROR unavailable: 127\.0\.0\.1: (.+)$"
    )
    return re.findall(line, service.log, re.MULTILINE)


def seconds_to_hash(rounds: int) -> float:
    """What one hash takes of a core's time, whoever else has that core now."""
    started = time.thread_time()
    bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(rounds))
    return time.thread_time() - started


def typical(answers: Iterable[httpx.Response]) -> float:
    """The seconds that the one in the middle took."""
    return median(answer.elapsed.total_seconds() for answer in answers)


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Wait for a condition that must come true."""
    patience = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < patience, "waited in vain"
        time.sleep(0.02)


def ask(database: str, sql: str) -> Any:
    """The one value that a statement gives, on a connection of its own."""
    with psycopg.connect(database, autocommit=True) as connection:
        return connection.execute(sql).fetchone()[0]


@contextmanager
def locked_table(database: str) -> Iterator[None]:
    """The users table out of everybody's reach: a statement that needs it waits."""
    with psycopg.connect(database) as connection:
        connection.execute("LOCK TABLE users IN ACCESS EXCLUSIVE MODE")
        yield


@contextmanager
def frozen(postgres: Postgres) -> Iterator[None]:
    """The server with all its processes stopped: it accepts connections, and is silent."""
    postmaster = psutil.Process(postgres.process.pid)
    postmaster.suspend()
    processes = [postmaster, *postmaster.children()]
    try:
        for process in processes:
            process.suspend()
        yield
    finally:
        for process in processes:
            process.resume()


@contextmanager
def without(postgres: Postgres, how: signal.Signals) -> Iterator[None]:
    """The time from the end of a server to its new start."""
    postgres.halt(how)
    try:
        yield
    finally:
        postgres.start()


def open_all_connections(service: Crowded, database: str, token: str) -> None:
    """Make the service open as many connections as it ever will."""
    with locked_table(database):
        checks = service.at_once(30, service.me, token)
        until(lambda: ask(database, WAITING) == 20)
    assert statuses(checks) == {200: 30}


class Load:
    """Eight clients who register, log in and check the token, over and over."""

    def __init__(self, service: Service, name: str) -> None:
        self.service = service
        self.name = name
        self.seen: list[int | str] = []
        self.acknowledged: list[str] = []
        self.over = threading.Event()

    def _client(self, number: int) -> None:
        turn = 0
        while not self.over.is_set():
            turn += 1
            email = f"{self.name}-{number}-{turn}@example.com"
            try:
                registered = self.service.register(email)
                self.seen.append(registered.status_code)
                if registered.status_code == 201:
                    self.acknowledged.append(email)
                    login = self.service.login(email)
                    self.seen.append(login.status_code)
                    if login.status_code == 200:
                        me = self.service.me(login.json()["access_token"])
                        self.seen.append(me.status_code)
            except httpx.TransportError as error:
                self.seen.append(type(error).__name__)

    def goes_on(self) -> None:
        """Wait for forty more accounts."""
        enough = len(self.acknowledged) + 40
        until(lambda: len(self.acknowledged) >= enough)

    def __enter__(self) -> Self:
        self.crowd = ThreadPoolExecutor(8)
        for number in range(8):
            self.crowd.submit(self._client, number)
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.crowd.shutdown()


def all_can_log_in(service: Service, emails: list[str]) -> bool:
    with ThreadPoolExecutor(8) as crowd:
        return all(a.status_code == 200 for a in crowd.map(service.login, emails))


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    """A server that these tests may stop; each leaves it running."""
    with Postgres() as postgres:
        yield postgres


@pytest.fixture(scope="module")
def server(postgres: Postgres) -> str:
    """The URL of that server, for the databases that the other fixtures make."""
    return postgres.url("postgres")


@pytest.fixture
def tables(empty_database: str) -> str:
    """The URL of a database with its tables, for one test alone."""
    assert run("python", "init_db.py", database=empty_database).returncode == 0
    return empty_database


# --- Round trips ------------------------------------------------------------------
def test_one_statement_and_one_round_trip_per_request(
    postgres: Postgres, database: str
) -> None:
    """On a warm connection a request is one round trip, also after a rest."""
    with Wire(postgres.port) as wire, Crowded(wire.url(database)) as service:
        token = service.account("first@example.com")  # it also opens the connection

        for turn, rest in enumerate((0, 0, 0, 6)):
            time.sleep(rest)
            email = f"trip-{turn}@example.com"
            assert wire.heard(service.me, token) == ["SELECT"]
            assert wire.heard(service.register, email) == ["INSERT"]
            assert wire.heard(service.login, email) == ["SELECT"]
        assert wire.opened == 1


# --- Gone -------------------------------------------------------------------------
def test_tables_not_created(empty_database: str) -> None:
    """A missing table is a 503 that names the command, until somebody gives it."""
    command = "run: python init_db.py"
    with Crowded(empty_database) as service:
        for answer in (service.register("a@example.com"), service.login("a@b.org")):
            assert_unavailable(answer, command)
        why = 'relation "users" does not exist'
        assert reasons(service) == 2 * [f"{why}; {command}, or see README.md"]
        assert run("python", "init_db.py", database=empty_database).returncode == 0
        assert service.me(service.account("a@example.com")).status_code == 200


@pytest.mark.parametrize(
    ("change", "statuses", "why"),
    [
        ("DROP CONSTRAINT users_email_key", [500], "no unique or exclusion"),
        ("ADD nick text UNIQUE DEFAULT 'none'", [201, 500], "users_nick_key"),
    ],
    ids=["gone", "a second one"],
)
def test_the_unique_constraint_of_addresses_alone_decides(
    empty_database: str, change: str, statuses: list[int], why: str
) -> None:
    """Without it nobody gets in twice, and another one is not taken for it."""
    assert run("python", "init_db.py", database=empty_database).returncode == 0
    with psycopg.connect(empty_database) as connection:
        connection.execute(f"ALTER TABLE users {change}")
    with Service(empty_database) as service:
        for name, status in enumerate(statuses):
            assert service.register(f"{name}@example.com").status_code == status
        until(lambda: why in service.log)  # the traceback comes after the answer


def test_database_down_when_the_service_starts(
    postgres: Postgres, database: str
) -> None:
    """The service starts without its database and serves as soon as that is up."""
    with ExitStack() as stack:
        with without(postgres, signal.SIGINT):
            service = stack.enter_context(Crowded(database))
            for answer in (
                service.register("early@example.com"),
                service.login("a@b.org"),
            ):
                assert_unavailable(answer)
            first, second = reasons(service)
            assert first.startswith("connection failed: ") and first == second
            assert first.endswith(f"Connection refused{AGAIN}")
        assert service.me(service.account("early@example.com")).status_code == 200


@pytest.mark.parametrize(
    "how",
    [signal.SIGINT, signal.SIGQUIT],
    ids=["stopped", "crashed"],
)
def test_database_restarted_under_load(
    postgres: Postgres, database: str, how: signal.Signals
) -> None:
    """Only 2xx and 503, and no acknowledged account is lost."""
    with Crowded(database) as service:
        with Load(service, f"restart-{how.name.lower()}") as load:
            load.goes_on()
            for pause in (0, 0.5):
                with without(postgres, how):
                    time.sleep(pause)
                load.goes_on()
        assert set(load.seen) <= {200, 201, 503}
        assert all_can_log_in(service, load.acknowledged)


def test_every_connection_closed_while_idle(postgres: Postgres, database: str) -> None:
    """Neon suspends, a network forgets: the requests after that succeed."""
    with Wire(postgres.port) as wire, Crowded(wire.url(database)) as service:
        token = service.account("idle@example.com")

        def suspend() -> None:
            with without(postgres, signal.SIGINT):
                pass

        for close in (lambda: ask(database, END), suspend, wire.cut):
            open_all_connections(service, database, token)
            opened = wire.opened
            close()
            until(lambda: ask(database, CONNECTED) == 0)
            assert statuses(service.at_once(30, service.me, token)) == {200: 30}
            assert wire.opened > opened
        assert "503 Service Unavailable" not in service.log


def test_every_connection_closed_while_busy(database: str) -> None:
    """Requests in flight get 503; those that queue for a connection get theirs."""
    with Crowded(database) as service:
        token = service.account("busy@example.com")
        with locked_table(database):
            checks = service.at_once(20, service.me, token)
            until(lambda: ask(database, WAITING) == 20)
            later = service.at_once(10, service.me, token)
            ask(database, f"{END} AND wait_event_type = 'Lock'")
            for check in checks:
                assert_unavailable(check.result())
        assert statuses(later) == {200: 10}
        assert statuses(service.at_once(30, service.me, token)) == {200: 30}


def test_connections_closed_again_and_again(database: str) -> None:
    """Each request gets its answer or a 503, also when the new connection is closed too."""
    with Crowded(database) as service:
        token = service.account("again@example.com")
        checks = []
        for _ in range(40):
            checks += service.at_once(10, service.me, token)
            ask(database, f"SELECT count(pg_terminate_backend(pid)) {FROM_OTHERS}")
        assert statuses(checks).keys() <= {200, 503}
        assert statuses(service.at_once(30, service.me, token)) == {200: 30}


def test_service_killed_under_load(database: str) -> None:
    """After kill -9 every account that got its 201 is there."""
    with Crowded(database) as service, Load(service, "killed") as load:
        load.goes_on()
        service.process.kill()
        service.process.wait()
    assert set(load.seen) & {500, 503} == set()
    with Crowded(database) as service:
        assert all_can_log_in(service, load.acknowledged)


# --- Hung, crowded ----------------------------------------------------------------
ROUTER = """
from fastapi import APIRouter
from sqlalchemy import func, select
from main import CurrentUser, SessionDep, User, app

router = APIRouter(prefix="/mine")

@router.get("/count")
async def count(session: SessionDep) -> int:
    return await session.scalar(select(func.count()).select_from(User))

@router.get("/hello")
async def hello(user: CurrentUser, session: SessionDep) -> str:
    return (await session.get(User, user.id)).email

app.include_router(router)
"""


def test_no_answer_from_the_database(
    postgres: Postgres, database: str, tables: str, tmp_path: Path
) -> None:
    """A stopped server, a silent network, a locked table, each with more requests than
    connections: 503 in time on every route, a reader's own too, and all is well afterwards."""
    (tmp_path / "notes.py").write_text(ROUTER)
    with (
        Postgres() as stopped,
        Wire(postgres.port) as wire,
        fresh_database(stopped.url("postgres")) as stopping,
        ExitStack() as stack,
    ):
        assert run("python", "init_db.py", database=stopping).returncode == 0
        places = stopping, database, tables
        services = [
            stack.enter_context(Crowded(url, app="notes:app", PYTHONPATH=str(tmp_path)))
            for url in (stopping, wire.url(database), tables)
        ]
        tokens = [service.account("hung@example.com") for service in services]
        for service, place, token in zip(services, places, tokens, strict=True):
            open_all_connections(service, place, token)
        with frozen(stopped), locked_table(tables):
            wire.speaking.clear()
            hung = []
            for service, token in zip(services, tokens, strict=True):
                bearer = {"Authorization": f"Bearer {token}"}
                for _ in range(8):  # 40 requests, by turns, on 20 connections
                    for path in ("/auth/me", "/mine/count", "/mine/hello"):
                        hung += service.at_once(
                            1, partial(service.http.get, headers=bearer), path
                        )
                    hung += service.at_once(1, service.login, "hung@example.com")
                    hung += service.at_once(1, service.register, "new@example.com")
            probes = []
            while wait(hung, timeout=0.2).not_done:
                for service in services:
                    probes += [service.http.get("/openapi.json")]
                    probes += [service.http.get("/auth/me")]
                    probes += [service.login("no address")]
        wire.speaking.set()
        for answer in hung:
            assert_unavailable(answer.result())
            assert answer.result().elapsed.total_seconds() < WORST
        for service in services:
            assert reasons(service) == 40 * [f"no answer in time{AGAIN}"]
        seen = [probe.status_code for probe in probes]
        assert len(seen) > 20 and seen == [200, 401, 422] * (len(seen) // 3)
        assert max(probe.elapsed.total_seconds() for probe in probes) < 5
        for service, token in zip(services, tokens, strict=True):
            until(lambda s=service, t=token: s.me(t).status_code == 200)
            checks = service.at_once(30, service.me, token)
            assert statuses(checks) == {200: 30}
            assert service.register("after@example.com").status_code == 201


def test_pool_exhausted(database: str) -> None:
    """Five hundred token checks on twenty connections: all wait their turn and succeed."""
    with Crowded(database) as service:
        token = service.account("five-hundred@example.com")
        with locked_table(database):
            checks = service.at_once(500, service.me, token)
            until(lambda: ask(database, WAITING) == 20)
        assert statuses(checks) == {200: 500}
        assert ask(database, CONNECTED) == 20


def test_no_connection_is_held_while_hashing(postgres: Postgres, database: str) -> None:
    """One connection serves a token check while one who registers or logs in is hashed for."""
    with (
        Wire(postgres.port) as wire,
        Crowded(wire.url(database), BCRYPT_ROUNDS="13") as service,
    ):
        token = service.account("holding@example.com")
        for asked, email, status in (
            (service.login, "holding@example.com", 200),
            (service.login, "nobody@example.com", 401),
            (service.register, "held@example.com", 201),
        ):
            before = service.spent
            (hashing,) = service.at_once(1, asked, email)
            until(lambda b=before: service.spent > b + 0.1)
            assert service.me(token).status_code == 200
            assert not hashing.done()
            assert hashing.result().status_code == status
        assert wire.opened == 1


def test_logins_at_twice_the_capacity(database: str) -> None:
    """The cores hash for those who wait; the others are told at once, and all else is fast."""
    one_hash = min(seconds_to_hash(11) for _ in range(3))
    each = one_hash / CORES / 2  # seconds between logins, at twice the capacity
    email = "twice@example.com"
    with Crowded(database, BCRYPT_ROUNDS="11") as service:
        token = service.account(email)
        credentials = {"email": email, "password": PASSWORD}
        before = service.spent

        def log_in() -> httpx.Response | None:
            try:
                return service.http.post("/auth/login", json=credentials, timeout=10)
            except httpx.TimeoutException:
                return None  # this client gave up

        logins, checks = [], []
        start = time.monotonic()
        for number in range(round(6 / each)):
            time.sleep(max(0, start + number * each - time.monotonic()))
            logins += service.at_once(1, log_in)
            if number % 4 == 0:
                checks += service.at_once(1, service.me, token)
        wait(logins)
        after = service.spent
        again = service.login(email)
        after_again = service.spent

        answers = [login.result() for login in logins]
        assert None not in answers, "somebody waited for nothing"
        assert {answer.status_code for answer in answers} == {200, 503}
        refused = [answer for answer in answers if answer.status_code == 503]
        for answer in refused:
            assert answer.json() == {"detail": "Too many logins, try again"}
            assert answer.headers["Retry-After"] == "5"
        assert len(answers) - len(refused) > 0.6 * (after - before) / one_hash, (
            "hashed in vain"
        )
        assert typical(refused) < one_hash, "refused late"
        assert statuses(checks) == {200: len(checks)}
        assert typical(check.result() for check in checks) < one_hash, "behind logins"
        assert again.status_code == 200
        assert after_again - after < 5 * one_hash, "still hashing for others"
        assert service.register("after-logins@example.com").status_code == 201


# --- Refusing ---------------------------------------------------------------------
def read_only(postgres: Postgres, database: str) -> None:
    name = database.rpartition("/")[2]
    with psycopg.connect(postgres.url("postgres"), autocommit=True) as admin:
        admin.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")


def disk_full(postgres: Postgres, database: str) -> None:
    """The table's file becomes /dev/full, which is empty and has no space left."""
    if not Path("/dev/full").exists():
        missing("/dev/full (a device of Linux)")
    file = postgres.data / ask(database, "SELECT pg_relation_filepath('users')")
    file.unlink()
    file.symlink_to("/dev/full")


def out_of_connections(postgres: Postgres, database: str) -> None:
    name = database.rpartition("/")[2]
    with psycopg.connect(postgres.url("postgres"), autocommit=True) as admin:
        admin.execute(f"ALTER DATABASE {name} CONNECTION LIMIT 0")
        admin.execute("CREATE ROLE visitor LOGIN PASSWORD 'visitor'")


@pytest.mark.parametrize(
    "trouble, cause",
    [
        (read_only, "cannot execute INSERT in a read-only transaction"),
        (disk_full, "No space left on device"),
        (out_of_connections, "too many connections for database"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_database_refuses(
    postgres: Postgres,
    tables: str,
    trouble: Callable[[Postgres, str], None],
    cause: str,
) -> None:
    """A database that cannot take the write is a 503, and the log says why."""
    trouble(postgres, tables)
    as_visitor = tables.replace(f"postgres:{postgres.password}@", "visitor:visitor@")
    url = as_visitor if trouble is out_of_connections else tables
    with Crowded(url) as service:
        assert_unavailable(service.register("refused@example.com"))
        (reason,) = reasons(service)
        assert cause in reason and reason.endswith(AGAIN)


# --- Pooled, encrypted ------------------------------------------------------------
MIX = 1000


def test_pgbouncer_with_tls_before_several_service_processes() -> None:
    """A thousand mixed requests through four pooled connections, not one error."""
    with (
        TlsPostgres() as postgres,
        PgBouncer(postgres, pool=4) as pooler,
        fresh_database(postgres.url("postgres")) as direct,
    ):
        pooled = pooler.url(direct.rpartition("/")[2])
        for said in ("users: created\n", "users: already there\n"):
            made = run("python", "init_db.py", database=pooled)
            assert (made.returncode, made.stdout) == (0, said), made.stderr
        with Crowded(pooled, "--workers", "3") as service:
            until(lambda: service.log.count("Application startup complete") == 3)
            emails = [f"mix-{number}@example.com" for number in range(MIX // 4)]

            def live(email: str) -> list[int]:
                registered, login = service.register(email), service.login(email)
                token = login.json().get("access_token", "none")
                answers = registered, login, service.me(token), service.me(token)
                return [answer.status_code for answer in answers]

            # as many as may hash in one process, since all may have met the same one
            with ThreadPoolExecutor(9 * CORES) as crowd:
                lives = list(crowd.map(live, emails))
            assert lives == [[201, 200, 200, 200]] * (MIX // 4)
            encrypted = "pid IN (SELECT pid FROM pg_stat_ssl WHERE ssl)"
            assert ask(direct, f"{CONNECTED} AND {encrypted}") in range(1, 5)
            assert ask(direct, f"{CONNECTED} AND NOT {encrypted}") == 0
            workers = [
                child
                for child in psutil.Process(service.process.pid).children()
                if "resource_tracker" not in " ".join(child.cmdline())
            ]
            assert len(workers) == 3
        assert service.process.returncode == 0
        assert psutil.wait_procs(workers, timeout=0)[1] == []


def test_tls_with_channel_binding_as_neon_prints_it() -> None:
    """`?sslmode=require&channel_binding=require` serves init_db, psql and the service."""
    with (
        TlsPostgres() as postgres,
        fresh_database(postgres.url("postgres")) as database,
    ):
        url = f"{database}?sslmode=require&channel_binding=require"
        made = run("python", "init_db.py", database=url)
        assert made.returncode == 0, made.stderr
        verified = run(postgres.bin / "psql", url, "-f", "verify.sql", database=url)
        assert verified.returncode == 0, verified.stderr
        with Crowded(url) as service:
            assert service.me(service.account("tls@example.com")).status_code == 200
            encrypted = "pid IN (SELECT pid FROM pg_stat_ssl WHERE ssl)"
            assert ask(database, f"{CONNECTED} AND {encrypted}") == 1


# --- Asked to leave ---------------------------------------------------------------
@pytest.mark.parametrize(
    "how, status",
    [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 0)],
    ids=["SIGTERM", "SIGINT"],
)
def test_asked_to_end(
    postgres: Postgres, database: str, how: signal.Signals, status: int
) -> None:
    """Requests in flight finish, each connection is closed with a goodbye."""
    with Wire(postgres.port) as wire, Crowded(wire.url(database)) as service:
        email = f"{how.name.lower()}@example.com"
        token = service.account(email)
        with locked_table(database):
            checks = service.at_once(5, service.me, token)
            logins = service.at_once(5, service.login, email)
            joins = service.at_once(1, service.register, f"new-{email}")
            until(lambda: ask(database, WAITING) == 11)
            service.process.send_signal(how)
            until(lambda: "Waiting for connections to close" in service.log)
        assert statuses(checks + logins) == {200: 10}
        assert statuses(joins) == {201: 1}
        # uvicorn ends in order, then raises the signal again for its parent to see
        assert service.process.wait(WORST) == status
        assert "Application shutdown complete" in service.log
        until(lambda: not wire.talks)
        assert wire.goodbyes == wire.opened
        assert ask(database, CONNECTED) == 0
