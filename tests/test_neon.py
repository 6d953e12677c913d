"""Neon as its clients meet it: refused in its words, asleep, hung, restarted, crowded.

`support/neon.py` stands in for its front door, so nobody needs an account, and
TEST_DATABASE_URL changes nothing.
"""

import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any, NamedTuple

import httpx
import psycopg
import pytest
from support.command import free_port, run
from support.neon import INSECURE, NO_ENDPOINT, UNPOOLED, Compute, Neon, Pooler
from support.pgbouncer import PgBouncer
from support.postgres import Postgres, system_postgres
from support.service import Account, Service, statuses, until

DATABASE = "neondb"


class Situation(NamedTuple):
    """What the client reads; how the endpoint, and how the URL, differ from the usual."""

    text: str
    endpoint: dict[str, Any] = {}
    options: dict[str, str] = {}
    database: str = DATABASE
    suffix: str = "-pooler"


BEFORE_THE_PASSWORD = [
    "The requested endpoint could not be found, or you don't have access to it. Please check the provided ID and try again.",
    "Control plane request failed: endpoint cannot be found",
    "Too many connections to this endpoint. Please try again later.",
    "This IP address 127.0.0.1 is not allowed to connect to this endpoint. Please add it to the allowed list in the Neon console. Make sure to check for IPv4 or IPv6 addresses.",
    "This connection is trying to access this endpoint from a blocked network.",
]
INSTEAD_OF_WAKING = [
    "Your account or project has exceeded the compute time quota. Upgrade your plan to increase limits.",
    "Your project has exceeded the data transfer quota. Upgrade your plan to increase limits.",
    "The endpoint has been disabled. Enable it using Neon API and retry.",
    "You have exceeded the limit of concurrently active endpoints. Please suspend some endpoints and try again.",
    "You've exceeded the rate limit. Please wait a moment and try again.",
    "Your project already has running operations. Please wait until they complete, and then try again.",
    "Control plane request failed",
    "Control plane request failed: endpoint is disabled",
    "Control plane request failed: endpoint is temporarily unavailable. Check your quotas and/or contact our support.",
    "Too many connections attempts",
    "Failed to acquire permit to connect to the database. Too many database connection attempts are currently ongoing.",
    "server login has been failing, try again later (server_login_retry)",
]
SITUATIONS = [
    *(Situation(text, {"refusal": text, "refuses_first": True}) for text in BEFORE_THE_PASSWORD),
    *(Situation(text, {"refusal": text}) for text in INSTEAD_OF_WAKING),
    Situation("Couldn't connect to compute node", {"pooler_port": free_port()}),
    Situation("password authentication failed for user 'postgres'", {"password": "another"}),
    Situation(INSECURE, options={"sslmode": "disable"}),
    Situation(NO_ENDPOINT, options={"sslsni": "0", "channel_binding": "prefer"}),
    Situation("channel binding required but not supported by server's authentication request", options={"sslsni": "0"}),
    Situation("Inconsistent project name inferred from SNI ('{}-pooler') and project option ('ep-other').", options={"options": "endpoint%3Dep-other"}),
    Situation(f"unsupported startup parameter: options{UNPOOLED}", options={"options": "-c%20statement_timeout%3D5s"}),
    Situation('database "nowhere" does not exist', database="nowhere", suffix=""),
    Situation("connection timeout expired", database="nowhere"),
    Situation("connection timeout expired", {"wakes_in": 3600}),
]  # fmt: skip
NAMES = [f"ep-{number}" for number in range(len(SITUATIONS))]


@pytest.fixture(scope="module")
def door() -> Iterator[Neon]:
    """The front door, and behind it a compute with the tables."""
    with Compute() as compute, Pooler(compute) as pooler, Neon(compute, pooler) as door:
        with psycopg.connect(compute.url("postgres"), autocommit=True) as admin:
            admin.execute(f"CREATE DATABASE {DATABASE}")
        door.add("ep-cool")
        made = run("python", "init_db.py", database=pooled(door, "ep-cool"))
        assert (made.returncode, made.stdout) == (0, "users: created\n"), made.stderr
        yield door


def pooled(door: Neon, name: str) -> str:
    return door.url(f"{name}-pooler", DATABASE)


@pytest.fixture(scope="module")
def service(door: Neon) -> Iterator[Service]:
    """The service, whose endpoint the tests put into each situation."""
    with Service(pooled(door, "ep-cool")) as service:
        yield service


@pytest.fixture(scope="module")
def ann(service: Service) -> Account:
    return service.account()


@pytest.fixture(scope="module")
def commands(door: Neon) -> Iterator[list[Future[CompletedProcess[str]]]]:
    """`python init_db.py` in every situation, two at a time, while other tests wait."""
    with ThreadPoolExecutor(2) as background:
        made = []
        for name, situation in zip(NAMES, SITUATIONS, strict=True):
            vars(door.add(name)).update(situation.endpoint)
            host = name + situation.suffix
            url = door.url(host, situation.database, **situation.options)
            made.append(background.submit(run, "python", "init_db.py", database=url))
        yield made


def ask_all(service: Service, ann: Account) -> list[httpx.Response]:
    """The answers of all three routes, asked at once."""
    asked = [
        *service.at_once(1, service.register, f"{time.monotonic_ns()}@example.com"),
        *service.at_once(1, service.login, ann.email),
        *service.at_once(1, service.me, ann.token),
    ]
    return [answer.result() for answer in asked]


def assert_refused(service: Service, ann: Account, text: str) -> None:
    """503 by all three routes, with one line each in the log; the clients read no reason."""
    start = len(service.log)
    for answer in ask_all(service, ann):
        assert answer.status_code == 503
        assert answer.headers["Retry-After"] == "5"
        assert answer.json() == {"detail": "Database unavailable, try again later"}
    until(lambda: service.log[start:].count(" 503") == 3)
    lines = service.log[start:].splitlines()
    reasons = [line for line in lines if " ERROR database unavailable: " in line]
    assert len(lines) == 6, lines  # uvicorn adds one for each
    assert len(reasons) == 3, lines
    assert all(line.endswith(text) for line in reasons), lines


# --- Asleep, hung -----------------------------------------------------------------
@pytest.mark.usefixtures("commands")  # which run meanwhile
def test_a_compute_that_wakes_slowly_or_never(
    door: Neon, service: Service, ann: Account
) -> None:
    door.add("ep-slow").wakes_in, door.add("ep-hung").wakes_in = 12, 3600
    urls = pooled(door, "ep-slow"), pooled(door, "ep-hung")
    with (
        Service(urls[0]) as slow,
        Service(urls[1]) as hung,
        ThreadPoolExecutor() as crowd,
    ):
        for answers in crowd.map(ask_all, (slow, hung), (ann, ann)):
            for answer in answers:
                assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
                assert answer.elapsed.total_seconds() < 15
        until(lambda: slow.me(ann.token).status_code == 200)
        assert hung.me(ann.token).status_code == 503
        door.suspend(door.endpoints["ep-hung"])
        assert hung.me(ann.token).status_code == 200


@pytest.mark.parametrize("clients", [1, 15])
def test_a_compute_that_wakes_in_half_a_second(
    door: Neon, service: Service, ann: Account, clients: int
) -> None:
    door.suspend(door.endpoints["ep-cool"], wakes_in=0.5)
    answers = service.at_once(clients, service.me, ann.token)
    assert statuses(answers) == {200: clients}
    assert min(answer.result().elapsed.total_seconds() for answer in answers) > 0.4


# --- Refused ----------------------------------------------------------------------
@contextmanager
def refused(door: Neon, name: str, situation: Situation, usual: Service) -> Iterator[Service]:  # fmt: skip
    """A service in a situation of the endpoint, or with a URL of its own; then all is well."""
    if not situation.endpoint:
        host = name + situation.suffix
        url = door.url(host, situation.database, **situation.options)
        with Service(url) as service:
            yield service
        return
    endpoint = door.endpoints["ep-cool"]
    before = {name: vars(endpoint)[name] for name in situation.endpoint}
    door.suspend(endpoint)
    vars(endpoint).update(situation.endpoint)
    try:
        yield usual
    finally:
        vars(endpoint).update(before)
        door.suspend(endpoint)


@pytest.mark.parametrize("name", NAMES)
def test_refused_in_neons_words(
    door: Neon,
    service: Service,
    ann: Account,
    commands: list[Future[CompletedProcess[str]]],
    name: str,
) -> None:
    """The service and init_db.py repeat the words, and the service recovers by itself."""
    number = NAMES.index(name)
    situation, text = SITUATIONS[number], SITUATIONS[number].text.format(name)
    with refused(door, name, situation, service) as in_it:
        assert_refused(in_it, ann, text)
        assert door.compute.password not in in_it.log
    assert service.me(ann.token).status_code == 200
    made = commands[number].result()
    assert (made.returncode, made.stdout) == (1, ""), made.stderr
    assert made.stderr.startswith("error: no tables created: ")
    assert made.stderr.endswith(f"{text}\n")
    assert made.stderr.count("\n") == 1
    assert door.compute.password not in made.stderr


# --- Closed, crowded --------------------------------------------------------------
def restart(server: Postgres | PgBouncer, how: signal.Signals) -> None:
    server.halt(how)
    server.start()


CLOSE: dict[str, Callable[[Neon], None]] = {
    "the compute is suspended": lambda door: door.suspend(door.endpoints["ep-cool"]),
    "the compute restarts": lambda door: restart(door.compute, signal.SIGINT),
    "the compute crashes": lambda door: restart(door.compute, signal.SIGQUIT),
    "the pooler is drained": lambda door: restart(door.pooler, signal.SIGTERM),
    "the pooler is killed": lambda door: restart(door.pooler, signal.SIGKILL),
}


@pytest.mark.parametrize("suffix", ["", "-pooler"])
def test_the_walkthrough_and_its_connections_closed(door: Neon, suffix: str) -> None:
    """By the direct and by the pooled URL; the first request afterwards succeeds."""
    url = door.url(f"ep-cool{suffix}", DATABASE)
    made = run("python", "init_db.py", database=url)
    assert (made.returncode, made.stdout) == (0, "users: already there\n"), made.stderr
    verified = run(system_postgres() / "psql", url, "-f", "verify.sql")
    assert verified.returncode == 0, verified.stderr
    assert "users_email_key" in verified.stdout
    with Service(url) as service:
        ann = service.account()
        for what, close in CLOSE.items():
            assert statuses(service.at_once(30, service.me, ann.token)) == {200: 30}
            close(door)
            assert service.me(ann.token).status_code == 200, what


def test_the_pooler_is_killed_under_load(
    door: Neon, service: Service, ann: Account
) -> None:
    load = service.at_once(600, service.me, ann.token)
    until(lambda: sum(answer.done() for answer in load) > 50)
    restart(door.pooler, signal.SIGKILL)
    assert service.me(ann.token).status_code == 200
    seen = statuses(load)
    assert 0 < seen[503] <= 100, "more than ten times those in flight"
    assert seen[200] == 600 - seen[503]


WAIT = """
from sqlalchemy import select

from main import SessionDep, User, app

@app.get("/wait")
async def wait(session: SessionDep) -> None:
    await session.execute(select(User.id))
"""
WAITING = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"


def test_eighty_connections_share_the_poolers_sixty_four(
    door: Neon, ann: Account, tmp_path: Path
) -> None:
    """Four processes with two pools of ten each, all of whose queries wait for a lock."""
    (tmp_path / "wait.py").write_text(WAIT)
    inside, compute = door.add("ep-crowd").inside, door.compute.url(DATABASE)
    options: dict[str, str] = {"app": "wait:app", "PYTHONPATH": str(tmp_path)}
    with (
        Service(pooled(door, "ep-crowd"), "--workers", "4", **options) as service,
        psycopg.connect(compute) as locker,
        psycopg.connect(compute, autocommit=True) as admin,
    ):
        until(lambda: service.log.count("Application startup complete") == 4)
        locker.execute("LOCK TABLE users")
        answers = service.at_once(250, service.me, ann.token)
        answers += service.at_once(250, service.http.get, "/wait")
        until(lambda: len(inside) == 80)
        until(lambda: admin.execute(WAITING).fetchone() == (64,))
        locker.commit()
        assert statuses(answers) == {200: 500}
