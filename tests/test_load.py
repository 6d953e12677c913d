"""More clients than the service can serve: the cores do useful work, and all else goes on."""

import json
import socket
import time
from collections import Counter
from statistics import median

import psutil
import pytest
from support.postgres import Postgres
from support.service import Account, Service, statuses, until
from support.wire import Wire
from test_faults import CONNECTED, WAITING, ask, locked_table

BUSY = {"detail": "Too many logins, try again later"}


@pytest.fixture(scope="module")
def server(postgres: Postgres) -> str:
    return postgres.url("postgres")


def test_five_hundred_token_checks_at_once(database: str) -> None:
    """All wait their turn on ten connections and succeed."""
    with Service(database) as service:
        account = service.account()
        with locked_table(database):
            first = service.at_once(10, service.me, account.token)
            until(lambda: ask(database, WAITING) == 10)
            checks = service.at_once(490, service.me, account.token)
        assert statuses(first + checks) == {200: 500}
        assert ask(database, CONNECTED) == 10


def test_no_connection_is_held_while_hashing(postgres: Postgres, database: str) -> None:
    """One connection serves a token check while a password is hashed."""
    with (
        Wire(postgres.port) as wire,
        Service(wire.url(database), BCRYPT_ROUNDS="13") as service,
    ):
        account = service.account()
        for asked, email, status in (
            (service.login, account.email, 200),
            (service.login, "nobody@example.com", 401),
            (service.register, "new@example.com", 201),
        ):
            before = service.spent
            (hashing,) = service.at_once(1, asked, email)
            until(lambda b=before: service.spent > b + 0.1)
            assert service.me(account.token).status_code == 200
            assert not hashing.done()
            assert hashing.result().status_code == status
        assert wire.opened == 1


def flood(service: Service, account: Account, clients: int, seconds: float) -> int:
    """The logins that succeed while so many clients never stop, with a 200 or a 503 each."""
    end = time.monotonic() + seconds
    seen = Counter[int]()

    def client() -> None:
        while time.monotonic() < end:
            answer = service.login(account.email)
            seen[answer.status_code] += 1
            if answer.status_code == 503:
                assert answer.json() == BUSY
                assert answer.headers["retry-after"] == "5"
                assert answer.elapsed.total_seconds() < 30

    logins = [service.crowd.submit(client) for _ in range(clients)]
    checks = []
    while time.monotonic() < end:
        checks.append(service.me(account.token))
        time.sleep(0.1)
    for login in logins:
        login.result()
    assert {check.status_code for check in checks} == {200}
    assert median(check.elapsed.total_seconds() for check in checks) < 1
    assert set(seen) == {200, 503}, seen
    return seen[200]


def test_a_flood_of_logins_on_one_process_and_on_four(database: str) -> None:
    """Most of the capacity serves those who are not refused, also when processes share cores."""
    served = []
    for options in ((), ("--workers", "4")):
        with Service(database, *options, BCRYPT_ROUNDS="12") as service:
            count = int(options[1]) if options else 1
            until(lambda c=count: service.log.count("startup complete") == c)
            account = service.account()
            served.append(flood(service, account, 120, 3))
            until(lambda a=account: service.login(a.email).status_code == 200)
    assert served[1] > 0.4 * served[0], served


def test_clients_that_leave_in_the_midst_of_a_body(database: str) -> None:
    """The service goes on, and its memory does not grow with each of them."""
    body = json.dumps({"email": "ann@example.com", "password": "correct horse"})
    head = "POST /auth/login HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    sent = f"{head}Content-Length: {len(body)}\r\n\r\n{body[:5]}".encode()
    sizes = []
    with Service(database) as service:
        account = service.account()
        for number in range(9_000):
            with socket.create_connection(("127.0.0.1", service.port), 30) as client:
                client.sendall(sent)
            if number % 3_000 == 2_999:
                assert service.me(account.token).status_code == 200
                sizes.append(psutil.Process(service.process.pid).memory_info().rss)
    # 3,000 more would take 40 MB if what a client leaves behind were never freed.
    assert sizes[2] < sizes[0] + 100e6, sizes
