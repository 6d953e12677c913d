"""The database as it really behaves: gone, hung, refusing. Nobody loses an account by it.

These tests stop and hang servers, so they run on servers of their own, whatever
TEST_DATABASE_URL says. Each service checks its own log when it ends.
"""

import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Self

import httpx
import psutil
import psycopg
import pytest
from support.command import run
from support.postgres import Postgres, change_url, fresh_database
from support.service import Account, Service, statuses, until
from support.wire import Wire

UNAVAILABLE = {"detail": "Database unavailable, try again later"}
WORST = 35  # seconds until a request that hangs is answered
OTHERS = "datname = current_database() AND pid <> pg_backend_pid()"
CONNECTED = f"SELECT count(*) FROM pg_stat_activity WHERE {OTHERS}"
WAITING = f"{CONNECTED} AND wait_event_type = 'Lock'"
END = f"SELECT count(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity WHERE {OTHERS}"  # fmt: skip


@pytest.fixture(scope="module")
def server(postgres: Postgres) -> str:
    return postgres.url("postgres")


def ask(database: str, statement: str) -> Any:
    """The one value that a statement gives, on a connection of its own."""
    with psycopg.connect(database, autocommit=True) as connection:
        return connection.execute(statement).fetchone()[0]


def assert_unavailable(answer: httpx.Response) -> None:
    assert (answer.status_code, answer.json()) == (503, UNAVAILABLE)
    assert answer.headers["retry-after"] == "5"


def reasons(service: Service) -> list[str]:
    """Why the database was unavailable each time, by the log."""
    line = r"^[\d -:,]+ ERROR database unavailable: (.+)$"
    return re.findall(line, service.log, re.MULTILINE)


@contextmanager
def locked_table(database: str) -> Iterator[None]:
    """The users table out of everybody's reach: a query that needs it waits."""
    with psycopg.connect(database) as connection:
        connection.execute("LOCK TABLE users IN ACCESS EXCLUSIVE MODE")
        yield


@contextmanager
def stopped(postgres: Postgres) -> Iterator[None]:
    """The server with all its processes stopped by SIGSTOP: it accepts, and is silent."""
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
def silent(wire: Wire) -> Iterator[None]:
    """A network that swallows everything, with its connections open."""
    wire.speaking.clear()
    yield
    wire.speaking.set()


def restart(postgres: Postgres, how: signal.Signals, pause: float = 0) -> None:
    postgres.halt(how)
    time.sleep(pause)
    postgres.start()


def open_all_connections(service: Service, database: str, account: Account) -> None:
    """Make the service open as many connections for its own queries as it ever will."""
    with locked_table(database):
        checks = service.at_once(15, service.me, account.token)
        until(lambda: ask(database, WAITING) == 10)
    assert statuses(checks) == {200: 15}


class Load:
    """Eight clients who register, log in and check the token, over and over."""

    def __init__(self, service: Service, name: str) -> None:
        self.service, self.name = service, name
        self.seen: list[int | str] = []
        self.acknowledged: list[str] = []
        self.over = threading.Event()

    def _client(self, number: int) -> None:
        turn = 0
        while not self.over.is_set():
            turn += 1
            email = f"{self.name}-{number}-{turn}@example.com"
            try:
                answer = self.service.register(email)
                self.seen.append(answer.status_code)
                if answer.status_code == 201:
                    self.acknowledged.append(email)
                    answer = self.service.login(email)
                    self.seen.append(answer.status_code)
                    if answer.status_code == 200:
                        token = answer.json()["access_token"]
                        self.seen.append(self.service.me(token).status_code)
            except httpx.TransportError as error:
                self.seen.append(type(error).__name__)

    def goes_on(self) -> None:
        """Wait for thirty more accounts."""
        enough = len(self.acknowledged) + 30
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


# --- Round trips
@pytest.mark.parametrize("rest", [0, 4])
def test_one_query_and_two_round_trips_a_request(
    postgres: Postgres, tables: str, rest: float
) -> None:
    """The pool's test, for which psycopg says `;`, and the query. No BEGIN, no COMMIT."""
    with Wire(postgres.port) as wire, Service(wire.url(tables)) as service:
        account = service.account("first@example.com")
        time.sleep(rest)
        for ask, word, verb in (
            (service.me, account.token, "SELECT"),
            (service.login, account.email, "SELECT"),
            (service.register, "second@example.com", "INSERT"),
        ):
            assert wire.heard(ask, word) == [";", verb]
        assert wire.opened == 1


# --- Gone
def test_the_database_is_down_when_the_service_starts(
    postgres: Postgres, tables: str
) -> None:
    postgres.halt()
    try:
        service = Service(tables)
        assert_unavailable(service.register("early@example.com"))
        (reason,) = reasons(service)
        assert reason.endswith("Connection refused")
        assert service.http.get("/docs").status_code == 200  # for health checks
    finally:
        postgres.start()
    with service:
        assert service.me(service.account("early@example.com").token).is_success


def test_the_tables_are_not_created(empty_database: str) -> None:
    with Service(empty_database) as service:
        assert_unavailable(service.login("a@example.com"))
        why = 'relation "users" does not exist; run: python init_db.py'
        assert reasons(service) == [why]
        run("python", "init_db.py", database=empty_database).check_returncode()
        assert service.me(service.account().token).status_code == 200


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT], ids=["stop", "crash"])
def test_the_database_restarts_under_load(
    postgres: Postgres, tables: str, how: signal.Signals
) -> None:
    with Service(tables) as service:
        with Load(service, "restart") as load:
            load.goes_on()
            for pause in (0, 0.5):
                restart(postgres, how, pause)
                load.goes_on()
        assert set(load.seen) <= {200, 201, 503}
        assert all_can_log_in(service, load.acknowledged)


def test_the_service_is_killed_under_load(tables: str) -> None:
    with Service(tables) as service, Load(service, "killed") as load:
        load.goes_on()
        service.process.kill()
        service.process.wait()
    assert set(load.seen) & {500, 503} == set()
    with Service(tables) as service:
        assert all_can_log_in(service, load.acknowledged)


def test_every_connection_is_closed_while_idle(postgres: Postgres, tables: str) -> None:
    """By the database, by its restart, by the network: the next requests succeed."""
    with Wire(postgres.port) as wire, Service(wire.url(tables)) as service:
        account = service.account()
        for close in (
            lambda: ask(tables, END),
            lambda: restart(postgres, signal.SIGINT),
            wire.cut,
        ):
            open_all_connections(service, tables, account)
            opened = wire.opened
            close()
            until(lambda: ask(tables, CONNECTED) == 0)
            assert statuses(service.at_once(30, service.me, account.token)) == {200: 30}
            assert wire.opened > opened
        assert " 503 " not in service.log


def test_every_connection_is_closed_while_busy(tables: str) -> None:
    with Service(tables) as service:
        account = service.account()
        with locked_table(tables):
            checks = service.at_once(10, service.me, account.token)
            until(lambda: ask(tables, WAITING) == 10)
            ask(tables, f"{END} AND wait_event_type = 'Lock'")
            for check in checks:
                assert_unavailable(check.result())
        assert statuses(service.at_once(30, service.me, account.token)) == {200: 30}


# --- Hung
@pytest.mark.parametrize("how", ["a silent network", "SIGSTOP", "a locked table"])
def test_no_answer_from_the_database(how: str) -> None:
    """503 in time on every route, and 200 again afterwards without a restart."""
    with (
        Postgres() as postgres,
        Wire(postgres.port) as wire,
        fresh_database(postgres.url("postgres")) as database,
    ):
        run("python", "init_db.py", database=database).check_returncode()
        hang: dict[str, Callable[[], Any]] = {
            "a silent network": lambda: silent(wire),
            "SIGSTOP": lambda: stopped(postgres),
            "a locked table": lambda: locked_table(database),
        }
        with Service(wire.url(database)) as service:
            account = service.account("hung@example.com")
            open_all_connections(service, database, account)
            with hang[how]():
                hung = service.at_once(12, service.me, account.token)
                hung += service.at_once(8, service.login, account.email)
                hung += service.at_once(8, service.register, "new@example.com")
                while not all(answer.done() for answer in hung):
                    assert service.http.get("/openapi.json").status_code == 200
                    assert service.http.get("/auth/me").status_code == 401
                    time.sleep(0.2)
                for answer in hung:
                    assert_unavailable(answer.result())
                    assert answer.result().elapsed.total_seconds() < WORST
            assert len(reasons(service)) == 28
            known = "no answer within 10 seconds", "connection timeout expired", "QueuePool limit"  # fmt: skip
            assert all(any(why in line for why in known) for line in reasons(service))
            until(lambda: service.me(account.token).status_code == 200)
            assert statuses(service.at_once(30, service.me, account.token)) == {200: 30}
            assert service.register("after@example.com").status_code == 201
            assert ask(database, CONNECTED) <= 25


# --- Refusing
def read_only(database: str) -> None:
    name = database.rpartition("/")[2]
    with psycopg.connect(database, autocommit=True) as connection:
        change = f"ALTER DATABASE {name} SET default_transaction_read_only = on"
        connection.execute(change)


def constraint(database: str) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("ALTER TABLE users ADD nick text UNIQUE DEFAULT 'x', ADD CHECK (email < 'a')")  # fmt: skip


def no_unique_constraint(database: str) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("ALTER TABLE users DROP CONSTRAINT users_email_key")


def out_of_connections(database: str) -> None:
    name = database.rpartition("/")[2]
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("DROP ROLE IF EXISTS visitor")
        connection.execute("CREATE ROLE visitor LOGIN PASSWORD 'visitor'")
        connection.execute(f"ALTER DATABASE {name} CONNECTION LIMIT 0")


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        (read_only, "cannot execute INSERT in a read-only transaction"),
        (constraint, 'new row for relation "users" violates check constraint'),
        (no_unique_constraint, "there is no unique or exclusion constraint"),
        (out_of_connections, "too many connections for database"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_database_refuses(
    tables: str, trouble: Callable[[str], None], reason: str
) -> None:
    """The log says why in the database's words, without the row that it refused."""
    trouble(tables)
    if trouble is out_of_connections:
        tables = change_url(tables, username="visitor", password="visitor")
    with Service(tables) as service:
        assert_unavailable(service.register("refused@example.com"))
        (why,) = reasons(service)
        assert reason in why
        assert "refused@example.com" not in service.log


# --- Asked to end
@pytest.mark.parametrize(
    ("how", "status"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 0)]
)
def test_asked_to_end(
    postgres: Postgres, tables: str, how: signal.Signals, status: int
) -> None:
    """Requests in flight finish, and each connection is closed with a goodbye."""
    with Wire(postgres.port) as wire, Service(wire.url(tables)) as service:
        account = service.account()
        with locked_table(tables):
            checks = service.at_once(5, service.me, account.token)
            checks += service.at_once(5, service.login, account.email)
            until(lambda: ask(tables, WAITING) == 10)
            service.process.send_signal(how)
            until(lambda: "Waiting for connections to close" in service.log)
        assert statuses(checks) == {200: 10}
        # uvicorn ends in order, then raises the signal again for its parent to see
        assert service.process.wait(WORST) == status
        until(lambda: not wire.talks)
        assert wire.goodbyes == wire.opened
        assert ask(tables, CONNECTED) == 0
