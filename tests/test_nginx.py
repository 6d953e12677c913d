"""The nginx block of docs/run.md before the service: what it lets through, and what it stops."""

import itertools
import json
import select
import socket
import ssl
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import httpx
import pytest
from support.command import missing
from support.nginx import NAME, Nginx
from support.service import Service, until

JSON = "application/json"
NOBODY = json.dumps({"email": "nobody@example.com", "password": "correct horse"})
CHUNKED = "Transfer-Encoding: chunked"


@pytest.fixture(scope="module")
def nginx(service: Service) -> Iterator[Nginx]:
    """nginx before the running service."""
    with Nginx(service.port) as nginx:
        yield nginx


@pytest.fixture(scope="module")
def addresses() -> Iterator[str]:
    """Addresses of this machine that have not asked for anything yet."""
    try:
        socket.create_server(("127.0.1.1", 0)).close()
    except OSError:
        missing("127.0.1.1 (of Linux, where all of 127.0.0.0/8 is this machine's)")
    return (f"127.0.{n // 250}.{n % 250 + 1}" for n in itertools.count(250))


@pytest.fixture
def address(addresses: Iterator[str]) -> str:
    return next(addresses)


@pytest.fixture
def client(nginx: Nginx, address: str) -> Iterator[httpx.Client]:
    """A client at that address."""
    with nginx.client(address) as client:
        yield client


@pytest.fixture
def other(nginx: Nginx, addresses: Iterator[str]) -> Iterator[httpx.Client]:
    """Somebody else, who is to be served whatever the first one does."""
    with nginx.client(next(addresses)) as client:
        yield client


def post(client: httpx.Client, path: str, body: str | Iterator[bytes] = NOBODY) -> int:
    """The status of a POST, by default with a login of nobody's."""
    headers = {"Content-Type": JSON}
    return client.post(path, content=body, headers=headers).status_code


def head(line: str, *headers: str) -> bytes:
    """The first line and the headers of a request."""
    lines = [f"{line} HTTP/1.1", f"Host: {NAME}", f"Content-Type: {JSON}", *headers]
    return "".join(f"{line}\r\n" for line in [*lines, ""]).encode()


def lines_about(service: Service, address: str) -> list[str]:
    """The lines of the service's log about requests from an address."""
    return [line for line in service.log.splitlines() if f" {address}:0 - " in line]


def test_the_three_routes_and_their_client_in_the_log(
    service: Service, client: httpx.Client, address: str
) -> None:
    ann = NOBODY.replace("nobody", "ann")
    assert post(client, "/auth/register", ann) == 201
    login = client.post("/auth/login", content=ann, headers={"Content-Type": JSON})
    bearer = {"Authorization": f"Bearer {login.json()['access_token']}"}
    assert client.get("/auth/me", headers=bearer).json()["email"] == "ann@example.com"
    assert len(lines_about(service, address)) == 3


@pytest.mark.parametrize(
    ("method", "path", "size", "status"),
    [("GET", "/docs", 0, 200), ("GET", "/auth/me", 0, 401), ("GET", "/%00", 0, 400), ("POST", "/auth/login", 20_000, 413)],
)  # fmt: skip
def test_headers_on_every_answer(
    client: httpx.Client, method: str, path: str, size: int, status: int
) -> None:
    answer = client.request(method, path, content=size * "x")
    assert answer.status_code == status
    for name, value in {
        "Strict-Transport-Security": "max-age=31536000",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-store",
    }.items():
        assert set(answer.headers.get_list(name)) == {value}


# --- Bodies
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("size", [16 * 1024 + 1, 90_000])
def test_a_body_over_16_kib_is_413(
    client: httpx.Client, size: int, chunked: bool
) -> None:
    body = NOBODY.ljust(size)
    pieces = (body[i : i + 5000].encode() for i in range(0, size, 5000))
    assert post(client, "/auth/login", pieces if chunked else body) == 413


def test_endless_chunks_are_refused(
    nginx: Nginx, service: Service, address: str
) -> None:
    with nginx.connection(address) as connection:
        connection.sendall(head("POST /auth/login", CHUNKED))
        for _ in range(100):
            connection.sendall(b"1000\r\n" + 0x1000 * b"x" + b"\r\n")
            if select.select([connection], [], [], 0.01)[0]:
                break
        assert connection.recv(99).startswith(b"HTTP/1.1 413 ")
    assert not lines_about(service, address)


# --- Slow clients
SLOW = {  # what is sent at once, and what then comes a byte at a time
    "nothing": (b"", b""),
    "half of the headers": (head("POST /auth/login")[:-9], b""),
    "headers byte by byte": (b"GET /auth/me HTTP/1.1\r\nX: ", 1000 * b"x"),
    "half of the body": (head("POST /auth/login", "Content-Length: 99") + b"{", b""),
    "half of a chunk": (head("POST /auth/login", CHUNKED) + b"9\r\n{", b""),
}


def is_closed(connection: ssl.SSLSocket) -> bool:
    """Whether nginx has ended a connection, whose answers are skipped."""
    try:
        while connection.pending() or select.select([connection], [], [], 0.02)[0]:
            if not connection.recv(65536):
                return True
    except (ConnectionError, ssl.SSLEOFError):
        return True
    return False


@pytest.mark.parametrize("situation", SLOW)
def test_a_slow_client_is_cut_off(
    nginx: Nginx, service: Service, address: str, other: httpx.Client, situation: str
) -> None:
    at_once, later = SLOW[situation]
    drops = iter(later)
    with nginx.connection(address) as connection:
        connection.sendall(at_once)

        def drip() -> bool:
            with suppress(OSError):  # closed in between: seen in the next turn
                connection.sendall(bytes([next(drops)]) if later else b"")
            return is_closed(connection)

        until(drip)
    assert other.get("/docs").status_code == 200
    assert not lines_about(service, address)


def test_bodies_that_never_end_are_few(
    nginx: Nginx, client: httpx.Client, address: str, other: httpx.Client
) -> None:
    with ExitStack() as stack:
        slow = [stack.enter_context(nginx.connection(address)) for _ in range(50)]
        for connection in slow:
            connection.sendall(head("GET /auth/me", "Content-Length: 9999"))

        def refused() -> bool:
            for connection in slow:
                connection.sendall(b" ")
            return client.get("/auth/me").status_code == 429

        until(refused)
        assert other.get("/auth/me").status_code == 401
    until(lambda: client.get("/auth/me").status_code == 401)


# --- Floods
@pytest.mark.parametrize(
    ("path", "status"), [("/auth/login", 401), ("/auth%2flogin", 401), ("//x", 404)]
)
def test_a_flood_of_posts_is_429(
    client: httpx.Client, other: httpx.Client, path: str, status: int
) -> None:
    statuses = [post(client, path) for _ in range(60)]
    assert statuses[:11] == 11 * [status]
    assert set(statuses) == {status, 429}
    assert client.get("/auth/me").status_code == 401  # which costs no hash
    assert post(other, path) == status


def test_a_flood_of_anything_is_429(client: httpx.Client, other: httpx.Client) -> None:
    statuses = [client.get("/auth/me").status_code for _ in range(150)]
    assert statuses[:101] == 101 * [401]
    assert 429 in statuses
    assert other.get("/auth/me").status_code == 401


# --- Lies
@pytest.mark.parametrize(
    "headers",
    [
        ["X-Forwarded-For: 203.0.113.9"],
        ["X-Forwarded-For: 203.0.113.9, 127.0.0.1"],
        ["X_Forwarded_For: 203.0.113.9"],
        ["X-Forwarded-For: 203.0.113.9", "Connection: X-Forwarded-For"],
    ],
)
def test_a_forged_address_is_not_believed(
    nginx: Nginx, service: Service, address: str, headers: list[str]
) -> None:
    with nginx.connection(address) as connection:
        connection.sendall(head("GET /auth/me", *headers))
        assert connection.recv(99).startswith(b"HTTP/1.1 401 ")
    assert lines_about(service, address)
    assert "203.0.113.9" not in service.log


def test_http_is_redirected(nginx: Nginx) -> None:
    """A POST that follows becomes a GET and fails, so nobody gets used to it."""
    with httpx.Client(base_url=f"http://127.0.0.1:{nginx.http_port}") as client:
        for method in ("GET", "POST"):
            answer = client.request(method, "/docs?a=b", headers={"Host": NAME})
            assert answer.status_code == 301
            assert answer.headers["Location"] == f"https://{NAME}/docs?a=b"
            assert answer.next_request.method == "GET"
