"""Neon as its clients meet it. Nobody needs an account, and TEST_DATABASE_URL changes nothing."""

import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import psycopg
import pytest
from support.command import free_port, run
from support.neon import INSECURE, NO_ENDPOINT, UNPOOLED, Compute, Neon, Pooler
from support.postgres import system_postgres
from support.service import Account, Service, statuses, until


@dataclass
class Situation:
    """What the client reads; how the endpoint, and how the URL, differ from the usual."""

    text: str
    endpoint: dict[str, Any] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)
    database: str = "postgres"
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
    Situation("connection timeout expired", {"wakes_in": 3600}),
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
]  # fmt: skip
TEXTS = [situation.text[:60] for situation in SITUATIONS]


def initialise(url: str) -> CompletedProcess[str]:
    return run("python", "init_db.py", database=url)


@pytest.fixture(scope="module")
def door() -> Iterator[Neon]:
    """The front door, and behind it a compute with the tables."""
    with Compute() as compute, Pooler(compute) as pooler, Neon(compute, pooler) as door:
        door.add("ep-cool")
        initialise(door.url("ep-cool-pooler")).check_returncode()
        yield door


@pytest.fixture(scope="module")
def service(door: Neon) -> Iterator[Service]:
    """The service, whose endpoint the tests put into each situation."""
    with Service(door.url("ep-cool-pooler")) as service:
        yield service


@pytest.fixture(scope="module")
def ann(service: Service) -> Account:
    return service.account()


def url_in(door: Neon, number: int) -> str:
    """The URL of an endpoint that is in one of the situations."""
    situation = SITUATIONS[number]
    vars(door.add(f"ep-{number}")).update(situation.endpoint)
    label = f"ep-{number}{situation.suffix}"
    return door.url(label, situation.database, **situation.options)


@pytest.fixture(scope="module")
def commands(door: Neon) -> Iterator[list[Future[Any]]]:
    """`python init_db.py` in every situation, two at a time, while other tests wait."""
    with ThreadPoolExecutor(2) as background:
        urls = [url_in(door, number) for number in range(len(SITUATIONS))]
        yield [background.submit(initialise, url) for url in urls]


def assert_refused(service: Service, ann: Account, text: str) -> None:
    """503 by all three routes, with one line each in the log; the clients read no reason."""
    start = len(service.log)
    new = f"{time.monotonic_ns()}@example.com"
    asked = service.at_once(1, service.register, new)
    asked += service.at_once(1, service.login, ann.email)
    asked += service.at_once(1, service.me, ann.token)
    for answer in [future.result() for future in asked]:
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
        assert answer.json() == {"detail": "Database unavailable, try again later"}
        assert answer.elapsed.total_seconds() < 15
    until(lambda: service.log[start:].count(" 503") == 3)
    lines = service.log[start:].splitlines()
    reasons = [line for line in lines if "database unavailable: connection " in line]
    assert (len(reasons), len(lines)) == (3, 6), lines  # uvicorn adds one for each
    assert all(line.endswith(text) for line in reasons), lines
    assert "pa$" not in service.log  # the beginning of each password


@pytest.mark.usefixtures("commands")  # which run meanwhile
def test_awake_in_twelve_seconds(door: Neon, service: Service, ann: Account) -> None:
    door.suspend(door.endpoints["ep-cool"], wakes_in=12)
    assert_refused(service, ann, "connection timeout expired")
    until(lambda: service.me(ann.token).status_code == 200)


@pytest.mark.parametrize("clients", [1, 15])
def test_awake_in_half_a_second(
    door: Neon, service: Service, ann: Account, clients: int
) -> None:
    door.suspend(door.endpoints["ep-cool"], wakes_in=0.5)
    answers = service.at_once(clients, service.me, ann.token)
    assert statuses(answers) == {200: clients}
    assert min(answer.result().elapsed.total_seconds() for answer in answers) > 0.4


@pytest.mark.parametrize("number", range(len(SITUATIONS)), ids=TEXTS)
def test_refused_in_neons_words(
    door: Neon, service: Service, ann: Account, commands: list[Future[Any]], number: int
) -> None:
    """The service and init_db.py repeat the words, and the service recovers by itself."""
    situation, endpoint = SITUATIONS[number], door.endpoints["ep-cool"]
    text = situation.text.format(f"ep-{number}")
    if situation.endpoint:
        door.suspend(endpoint)
        before = {name: vars(endpoint)[name] for name in situation.endpoint}
        vars(endpoint).update(situation.endpoint)
        assert_refused(service, ann, text)
        vars(endpoint).update(before)
        door.suspend(endpoint)
        assert service.me(ann.token).status_code == 200
    else:  # only a change of the URL makes it well again
        with Service(url_in(door, number)) as refused:
            assert_refused(refused, ann, text)
    made = commands[number].result()
    assert (made.returncode, made.stdout) == (1, ""), made.stderr
    line = f"error: no tables created: (con.*)?{re.escape(text)}\n"
    assert re.fullmatch(line, made.stderr)
    assert "pa$" not in made.stderr


def restart(door: Neon, pooler: signal.Signals, compute: signal.Signals) -> None:
    """End the compute and the pooler, which lives in it, by a signal each; start them."""
    door.pooler.halt(pooler)
    door.compute.halt(compute)
    door.compute.start()
    door.pooler.start()


CLOSE: dict[str, Callable[[Neon], None]] = {
    "suspended": lambda door: door.suspend(door.endpoints["ep-cool"]),
    "drained": lambda door: restart(door, signal.SIGTERM, signal.SIGINT),
    "killed": lambda door: restart(door, signal.SIGKILL, signal.SIGQUIT),
}


@pytest.mark.parametrize("suffix", ["", "-pooler"])
def test_the_walkthrough_and_its_connections_closed(door: Neon, suffix: str) -> None:
    """By the direct and by the pooled URL; the first request afterwards succeeds."""
    url = door.url(f"ep-cool{suffix}")
    assert initialise(url).stdout == "users: already there\n"
    agreeing = f"{url}&options=endpoint%3Dep-cool{suffix}"
    verified = run(system_postgres() / "psql", agreeing, "-f", "verify.sql")
    assert verified.returncode == 0, verified.stderr
    with Service(url) as service:
        ann = service.account()
        for what, close in CLOSE.items():
            assert statuses(service.at_once(30, service.me, ann.token)) == {200: 30}
            close(door)
            assert service.me(ann.token).status_code == 200, what


def test_killed_under_load(door: Neon, service: Service, ann: Account) -> None:
    load = service.at_once(600, service.me, ann.token)
    until(lambda: sum(answer.done() for answer in load) > 50)
    CLOSE["killed"](door)
    assert service.me(ann.token).status_code == 200
    seen = statuses(load)
    assert seen[503] > 0
    assert seen[200] + seen[503] == 600


WAIT = """
from main import SessionDep, User, app, select
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
    inside, compute = door.add("ep-crowd").inside, door.compute.url("postgres")
    options: dict[str, str] = {"app": "wait:app", "PYTHONPATH": str(tmp_path)}
    with (
        Service(door.url("ep-crowd-pooler"), "--workers", "4", **options) as service,
        psycopg.connect(compute) as locker,
        psycopg.connect(compute, autocommit=True) as admin,
    ):
        until(lambda: service.log.count("Application startup complete") == 4)
        locker.execute("LOCK TABLE users")
        answers = service.at_once(200, service.me, ann.token)
        answers += service.at_once(200, service.http.get, "/wait")
        until(lambda: len(inside) == 80)
        until(lambda: admin.execute(WAITING).fetchone() == (64,))
        locker.commit()
        assert statuses(answers) == {200: 400}
