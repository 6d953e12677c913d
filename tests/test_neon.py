"""Neon as its clients meet it: what it refuses and in which words, asleep, silent, restarted.

Nobody needs an account: see `neon.py`. Whatever TEST_DATABASE_URL says, the database is
a throw-away one.
"""

import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import httpx
import psycopg
import pytest
from harness import run
from neon import DOMAIN, Compute, Neon, Pooler
from pooler import Wire, system_postgres
from test_faults import (
    AGAIN,
    WAITING,
    Crowded,
    Load,
    all_can_log_in,
    ask,
    locked_table,
    statuses,
    until,
)

DATABASE = "neondb"
NAME = "ep-cool-name-123456"
ANN = "ann@example.com"
LOST = "SSL connection has been closed unexpectedly"


@dataclass(frozen=True)
class Situation:
    """What is said, how it comes about, what to do, and a change to the URL that mends it."""

    text: str
    endpoint: dict[str, Any] = field(default_factory=dict)
    url: dict[str, str] = field(default_factory=dict)
    remedy: str = ""
    mended: dict[str, str] = field(default_factory=dict)


def after(text: str, remedy: str = "") -> Situation:
    """Said in the place of the words that would let the client in."""
    return Situation(text, {"refusal": text}, remedy=remedy)


def before(text: str, remedy: str = "") -> Situation:
    """Said before anybody asks for the password."""
    return Situation(text, {"refusal": text, "refuses_first": True}, remedy=remedy)


FAILED = "Control plane request failed"
SEE_NEON = "see the endpoint and its quotas in Neon's console"
SITUATIONS = {
    "wake-up-failed": after(FAILED),
    "no-such-endpoint": after(f"{FAILED}: endpoint cannot be found", SEE_NEON),
    "disabled": after(f"{FAILED}: endpoint is disabled", SEE_NEON),
    "quota": after(
        f"{FAILED}: endpoint is temporarily unavailable."
        " Check your quotas and/or contact our support.",
        SEE_NEON,
    ),
    "compute-unreachable": after("Couldn't connect to compute node"),
    "too-many-wake-ups": after("Too many connections attempts"),
    "too-many-connections": before(
        "Too many connections to this endpoint. Please try again later."
    ),
    "no-permit": after("Failed to acquire permit to connect to the database"),
    "address": before(
        "This IP address 127.0.0.1 is not allowed to connect",
        "allow it in Neon's console",
    ),
    "password": Situation(
        "password authentication failed for user 'postgres'",
        endpoint={"password": "another, since somebody has claimed the database"},
        remedy="correct it in DATABASE_URL",
    ),
    "silence": Situation(LOST, endpoint={"hangs_up": True}),
    "no-server-name": Situation("Endpoint ID is not specified", url={"sslsni": "0"}),
    "options": Situation(
        "unsupported startup parameter in options: statement_timeout",
        url={"options": "-c%20statement_timeout%3D5s"},
    ),
    "channel-binding": Situation(
        LOST,
        endpoint={"ignores_bound": True},
        mended={"channel_binding": "disable"},
    ),
}


@pytest.fixture(scope="module")
def door() -> Iterator[Neon]:
    """The front door, and behind it a compute with the tables and one account."""
    with Compute() as compute, Pooler(compute) as pooler, Neon(compute, pooler) as door:
        with psycopg.connect(compute.url("postgres"), autocommit=True) as admin:
            admin.execute(f"CREATE DATABASE {DATABASE}")
        door.add("ep-first-steps")
        url = pooled(door, "ep-first-steps")
        made = run("python", "init_db.py", database=url)
        assert (made.returncode, made.stdout) == (0, "users: created\n"), made.stderr
        yield door


def pooled(door: Neon, name: str, **options: str) -> str:
    return door.url(f"{name}-pooler", DATABASE, **options)


@pytest.fixture(scope="module")
def wire(door: Neon) -> Iterator[Wire]:
    """Between the front door and the pooler, for the endpoint of `service` alone."""
    with Wire(door.pooler.port) as wire:
        yield wire


@pytest.fixture(scope="module")
def service(door: Neon, wire: Wire) -> Iterator[Crowded]:
    """The running service, before an endpoint that the tests put into each situation."""
    door.add(NAME).pooler_port = wire.listener.getsockname()[1]
    with Crowded(pooled(door, NAME)) as service:
        yield service


@pytest.fixture(scope="module")
def token(service: Crowded) -> str:
    """An access token of the account; it is as good in every other service."""
    return service.account(ANN)


@pytest.fixture(scope="module")
def background() -> Iterator[ThreadPoolExecutor]:
    """Where programs that are slow to start do so while other tests wait for something."""
    with ThreadPoolExecutor(2) as background:
        yield background


@pytest.fixture(scope="module")
def four_processes(
    door: Neon, background: ThreadPoolExecutor
) -> Iterator[Future[Crowded]]:
    """The service as four processes, before the endpoint `ep-whole-path`."""
    door.add("ep-whole-path")
    url = pooled(door, "ep-whole-path")
    starting = background.submit(Crowded, url, "--workers", "4")
    yield starting
    with starting.result():
        pass  # now it ends, and its log is checked


@pytest.fixture(scope="module")
def commands(
    door: Neon, background: ThreadPoolExecutor
) -> dict[str, Future[CompletedProcess[str]]]:
    """`python init_db.py` in every situation."""
    made = {}
    for name, situation in SITUATIONS.items():
        endpoint = door.add(f"ep-{name}")
        for attribute, value in situation.endpoint.items():
            setattr(endpoint, attribute, value)
        url = pooled(door, f"ep-{name}", **situation.url)
        command = "nice", "python", "init_db.py"
        made[name] = background.submit(run, *command, database=url)
    return made


def everything(service: Crowded, token: str, new: str) -> list[httpx.Response]:
    """The answers of all three routes, asked at once."""
    asked = [
        *service.at_once(1, service.register, new),
        *service.at_once(1, service.login, ANN),
        *service.at_once(1, service.me, token),
    ]
    return [answer.result() for answer in asked]


def check_words(said: str, host: str, text: str, end: str) -> None:
    """A line of the log, or of the command, has the host, then the text, once each, and ends."""
    assert said.count(host) == 1
    assert said.count(text) == 1
    assert said.index(host) < said.index(text)
    assert said.endswith(text + end)


def check_command(made: CompletedProcess[str], host: str, situation: Situation) -> None:
    """The command printed one line that says where it failed and why, and failed."""
    assert (made.returncode, made.stdout) == (1, ""), made.stderr
    (line,) = made.stderr.splitlines()
    assert line.startswith(f"error: no tables created at {host}: ")
    remedy = situation.remedy and f"; {situation.remedy}"
    check_words(line, host, situation.text, remedy)


def check_unavailable(
    service: Crowded, token: str, host: str, situation: Situation, secret: str
) -> None:
    """All three routes answer 503, each with one line in the log that says why."""
    start = len(service.log)
    for answer in everything(service, token, "new@example.com"):
        assert answer.status_code == 503
        assert int(answer.headers["Retry-After"]) > 0
        assert not any(
            word in answer.text
            for word in (situation.text, host, secret, situation.remedy or secret)
        )
    until(lambda: service.log[start:].count(" 503") == 3)
    lines = service.log[start:].splitlines()
    assert len(lines) == 6, lines  # uvicorn adds one for each
    reasons = [line for line in lines if f" ERROR unavailable: {host}: " in line]
    assert len(reasons) == 3, lines
    for reason in reasons:
        advice = AGAIN.replace("try again", situation.remedy or "try again")
        check_words(reason, host, situation.text, advice)
    assert secret not in service.log


@contextmanager
def served(
    door: Neon, situation: Situation, service: Crowded
) -> Iterator[tuple[str, Crowded]]:
    """A service in this situation, and its endpoint, which is well again at the end."""
    with ExitStack() as stack:
        name = NAME
        if situation.url:
            name = f"{NAME}-variant"
            door.add(name)
            service = Crowded(pooled(door, name, **situation.url))
            stack.enter_context(service)
        endpoint = door.endpoints[name]
        change = stack.enter_context(pytest.MonkeyPatch.context())
        for attribute, value in situation.endpoint.items():
            change.setattr(endpoint, attribute, value)
        door.suspend(endpoint)
        yield name, service


# --- Asleep -----------------------------------------------------------------------
@pytest.mark.usefixtures("four_processes", "commands")  # which start meanwhile
def test_wake_ups(door: Neon, service: Crowded, token: str) -> None:
    """A wake-up of up to nine seconds is waited for; one of twelve is a 503 that says so."""
    seconds = (0.5, 4, 9, 12)
    names = [NAME, "ep-sleeper-1", "ep-sleeper-2", "ep-sleeper-3"]
    with ExitStack() as stack, ThreadPoolExecutor() as crowd:
        endpoints = [door.endpoints[NAME], *(door.add(name) for name in names[1:])]
        urls = [pooled(door, name) for name in names[1:]]
        started = [stack.enter_context(s) for s in crowd.map(Crowded, urls)]
        services = [service, *started]
        for endpoint, wakes_in in zip(endpoints, seconds, strict=True):
            door.suspend(endpoint, wakes_in)
        new = [f"{name}@example.com" for name in names]
        answers = list(crowd.map(everything, services, 4 * [token], new))
        for answer, wakes_in in zip(answers[:3], seconds[:3], strict=True):
            assert [a.status_code for a in answer] == [201, 200, 200]
            assert max(a.elapsed.total_seconds() for a in answer) >= wakes_in
        assert [a.status_code for a in answers[3]] == [503, 503, 503]
        assert all("Retry-After" in a.headers for a in answers[3])
        (late,) = services[3:]
        reasons = [line for line in late.log.splitlines() if "unavailable: " in line]
        assert len(reasons) == 3
        for reason in reasons:
            host = f"{names[3]}-pooler.{DOMAIN}"
            check_words(reason, host, "connection timeout expired", AGAIN)
        assert late.me(token).status_code == 200
        assert late.register(new[3]).status_code == 201


# --- Refused ----------------------------------------------------------------------
@pytest.mark.parametrize("name", SITUATIONS)
def test_service_is_refused(
    door: Neon, service: Crowded, token: str, name: str
) -> None:
    """503 with the reason in the log, and all is well as soon as the reason is gone."""
    situation = SITUATIONS[name]
    with served(door, situation, service) as (endpoint, refused):
        host = f"{endpoint}-pooler.{DOMAIN}"
        check_unavailable(refused, token, host, situation, door.compute.password)
        if situation.mended:
            psycopg.connect(pooled(door, endpoint, **situation.mended)).close()
    assert service.me(token).status_code == 200


@pytest.mark.parametrize("name", SITUATIONS)
def test_command_is_refused(
    door: Neon, commands: dict[str, Future[CompletedProcess[str]]], name: str
) -> None:
    """One line with the reason, and status 3."""
    made = commands[name].result()
    assert door.compute.password not in made.stderr
    check_command(made, f"ep-{name}-pooler.{DOMAIN}", SITUATIONS[name])


def test_direct_url_takes_options(door: Neon) -> None:
    """What the pooled URL refuses: the way out that the README names."""
    door.add("ep-direct")
    options = SITUATIONS["options"].url
    url = door.url("ep-direct", DATABASE, **options)
    assert ask(url, "SHOW statement_timeout") == "5s"
    made = run("python", "init_db.py", database=url)
    assert (made.returncode, made.stdout) == (0, "users: already there\n"), made.stderr


TWO_ADDRESSES = """
import socket
resolve = socket.getaddrinfo
def twice(host, *others, **options):
    if host.endswith(".neon.tech"):
        return 2 * resolve("127.0.0.1", *others, **options)
    return resolve(host, *others, **options)
socket.getaddrinfo = twice
"""


def test_host_with_several_addresses(door: Neon, token: str, tmp_path: Path) -> None:
    """Neon's hosts have some, and here each drops whoever comes: that is said once, on one line."""
    (tmp_path / "sitecustomize.py").write_text(TWO_ADDRESSES)
    with Wire(1) as nowhere:  # nobody listens on port 1
        port = nowhere.listener.getsockname()[1]
        url = pooled(door, NAME).replace("hostaddr=127.0.0.1&", "")
        url = url.replace(f":{door.port}/", f":{port}/")
        situation = Situation("server closed the connection unexpectedly")
        host, secret = f"{NAME}-pooler.{DOMAIN}", door.compute.password
        with Crowded(url, PYTHONPATH=str(tmp_path)) as service:
            check_unavailable(service, token, host, situation, secret)
        assert nowhere.opened == 3 * 2
        made = run("python", "init_db.py", database=url, PYTHONPATH=str(tmp_path))
        assert nowhere.opened == 4 * 2
    check_command(made, host, situation)


# --- All is well ------------------------------------------------------------------
def test_one_statement_and_one_round_trip_per_request(
    door: Neon, wire: Wire, service: Crowded, token: str
) -> None:
    """Once a connection is open, no request says more to Neon than it must."""
    for _ in range(20):  # the pool's size: each of its connections may be closed by now
        assert service.me(token).is_success
    opened = door.endpoints[NAME].opened
    for turn in range(5):
        email = f"trip-{turn}@example.com"
        assert wire.heard(service.register, email) == ["INSERT"]
        assert wire.heard(service.login, email) == ["SELECT"]
        assert wire.heard(service.me, token) == ["SELECT"]
    assert door.endpoints[NAME].opened == opened


def test_whole_path(door: Neon, token: str, four_processes: Future[Crowded]) -> None:
    """psql, a thousand mixed requests to four processes, and a pooler that crashes meanwhile."""
    endpoint, url = door.endpoints["ep-whole-path"], pooled(door, "ep-whole-path")
    verified = run(system_postgres() / "psql", url, "-f", "verify.sql")
    assert verified.returncode == 0, verified.stderr
    assert "users_email_key" in verified.stdout
    service = four_processes.result()
    with Pooler(door.compute) as pooler:
        endpoint.pooler_port = pooler.port
        until(lambda: service.log.count("Application startup complete") == 4)

        first = service.at_once(100, service.me, token)
        assert statuses(first) == {200: 100}  # so each process knows its database
        database = door.compute.url(DATABASE)
        with locked_table(database):
            checks = service.at_once(400, service.me, token)
            until(lambda: len(endpoint.inside) == 4 * 20)
            until(lambda: ask(database, WAITING) >= 64)
            time.sleep(0.5)  # time for more, if there were more
            assert ask(database, WAITING) == 64
        assert statuses(checks) == {200: 400}
        assert len(endpoint.inside) == 4 * 20

        with Load(service, "path") as load:
            for pause in (0, 1):
                load.goes_on()
                pooler.halt(signal.SIGKILL)
                time.sleep(pause)
                pooler.start()
            until(lambda: len(load.seen) >= 1000)
        seen = Counter(load.seen)
        assert seen.keys() <= {200, 201, 503}
        assert seen[503] < 3 * 8, "more than those in flight"
        assert all_can_log_in(service, load.acknowledged)
