"""Neon as its clients meet it: refused in its words, asleep, hung, restarted, crowded.

`support/neon.py` stands in for its front door, so nobody needs an account, and
TEST_DATABASE_URL changes nothing.
"""

import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any, NamedTuple

import httpx
import psycopg
import pytest
from support.command import free_port, run
from support.neon import (
    INSECURE,
    NO_ENDPOINT,
    UNPOOLED,
    Compute,
    Endpoint,
    Neon,
    Pooler,
)
from support.postgres import system_postgres
from support.service import Account, Service, statuses, until

DATABASE = "neondb"


class Situation(NamedTuple):
    """What the client reads; how the endpoint, and how the URL, differ from the usual."""

    text: str
    endpoint: dict[str, Any] = {}  # noqa: RUF012
    options: dict[str, str] = {}  # noqa: RUF012
    database: str = DATABASE
    suffix: str = "-pooler"


def says(text: str) -> Situation:
    """The control plane says it when the compute is to be woken."""
    return Situation(text, {"refusal": text})


def says_first(text: str) -> Situation:
    """The front door says it before it asks for the password."""
    return Situation(text, {"refusal": text, "refuses_first": True})


FAILED = "Control plane request failed"
SITUATIONS = [
    says("Your account or project has exceeded the compute time quota. Upgrade your plan to increase limits."),
    says("Your project has exceeded the data transfer quota. Upgrade your plan to increase limits."),
    says_first("The requested endpoint could not be found, or you don't have access to it. Please check the provided ID and try again."),
    says("The endpoint has been disabled. Enable it using Neon API and retry."),
    says("You have exceeded the limit of concurrently active endpoints. Please suspend some endpoints and try again."),
    says("You've exceeded the rate limit. Please wait a moment and try again."),
    says("Your project already has running operations. Please wait until they complete, and then try again."),
    says(FAILED),
    says_first(f"{FAILED}: endpoint cannot be found"),
    says(f"{FAILED}: endpoint is disabled"),
    says(f"{FAILED}: endpoint is temporarily unavailable. Check your quotas and/or contact our support."),
    says("Too many connections attempts"),
    says_first("Too many connections to this endpoint. Please try again later."),
    says("Failed to acquire permit to connect to the database. Too many database connection attempts are currently ongoing."),
    says("server login has been failing, try again later (server_login_retry)"),
    says_first("This IP address 127.0.0.1 is not allowed to connect to this endpoint. Please add it to the allowed list in the Neon console. Make sure to check for IPv4 or IPv6 addresses."),
    says_first("This connection is trying to access this endpoint from a blocked network."),
    Situation("Couldn't connect to compute node", {"pooler_port": free_port()}),
    Situation("password authentication failed for user 'postgres'", {"password": "another"}),
    Situation(INSECURE, options={"sslmode": "disable"}),
    Situation(NO_ENDPOINT, options={"sslsni": "0", "channel_binding": "prefer"}),
    Situation("channel binding required but not supported by server's authentication request", options={"sslsni": "0"}),
    Situation("Inconsistent project name inferred from SNI ('{}-pooler') and project option ('ep-other').", options={"options": "endpoint%3Dep-other"}),
    Situation(f"unsupported startup parameter: options{UNPOOLED}", options={"options": "-c%20statement_timeout%3D5s"}),
    Situation('database "nowhere" does not exist', database="nowhere", suffix=""),
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


def pooled(door: Neon, name: str, **options: str) -> str:
    return door.url(f"{name}-pooler", DATABASE, **options)


@pytest.fixture(scope="module")
def endpoint(door: Neon) -> Endpoint:
    """The endpoint of `service`, which the tests put into each situation."""
    return door.endpoints["ep-cool"]


@pytest.fixture(scope="module")
def service(door: Neon) -> Iterator[Service]:
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
    slow, hung = door.add("ep-slow"), door.add("ep-hung")
    with (
        Service(pooled(door, "ep-slow")) as of_slow,
        Service(pooled(door, "ep-hung")) as of_hung,
        ThreadPoolExecutor() as crowd,
    ):
        door.suspend(slow, wakes_in=12)
        door.suspend(hung, wakes_in=3600)
        asked = [crowd.submit(ask_all, each, ann) for each in (of_slow, of_hung)]
        for answer in asked[0].result() + asked[1].result():
            assert answer.status_code == 503
            assert answer.headers["Retry-After"] == "5"
            assert answer.elapsed.total_seconds() < 20
        until(lambda: of_slow.me(ann.token).status_code == 200)
        assert slow.awake_at - 12 + 60 > time.monotonic()
        assert "connection timeout expired" in of_hung.log
        door.suspend(hung)
        assert of_hung.me(ann.token).status_code == 200


@pytest.mark.parametrize("clients", [1, 15])
def test_a_compute_that_wakes_in_half_a_second(
    door: Neon, endpoint: Endpoint, service: Service, ann: Account, clients: int
) -> None:
    door.suspend(endpoint, wakes_in=0.5)
    answers = service.at_once(clients, service.me, ann.token)
    assert statuses(answers) == {200: clients}
    assert min(answer.result().elapsed.total_seconds() for answer in answers) >= 0.4


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
