"""The nginx block of docs/run.md before the real service: what it lets through, and what it stops."""

import itertools
import json
import select
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import httpx
import pytest
from support.command import missing
from support.nginx import NAME, PATIENCE, Nginx
from support.service import Service

JSON = "application/json"
NOBODY = json.dumps({"email": "nobody@example.com", "password": "correct horse"})


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
    """The address of one client."""
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


def post(
    client: httpx.Client,
    path: str = "/auth/login",
    body: str | Iterator[bytes] = NOBODY,
) -> httpx.Response:
    """The answer to a POST, by default a login of nobody's."""
    return client.post(path, content=body, headers={"Content-Type": JSON})


def head(line: str, *headers: str) -> bytes:
    """The first line and the headers of a request."""
    lines = [f"{line} HTTP/1.1", f"Host: {NAME}", f"Content-Type: {JSON}", *headers]
    return "".join(f"{line}\r\n" for line in [*lines, ""]).encode()


def said_to(service: Service, address: str) -> list[str]:
    """The lines of the service's log about requests from an address."""
    lines = service.log.splitlines()
    return [line for line in lines if line.startswith(f"INFO:     {address}:0 - ")]


def is_closed(connection: ssl.SSLSocket, wait: float = 0) -> bool:
    """Whether nginx has ended a connection, whose answers are skipped."""
    try:
        while connection.pending() or select.select([connection], [], [], wait)[0]:
            if not connection.recv(65536):
                return True
    except (ConnectionError, ssl.SSLEOFError):
        return True
    return False


def test_the_three_routes(service: Service, client: httpx.Client, address: str) -> None:
    ann = NOBODY.replace("nobody", "ann")
    assert post(client, "/auth/register", ann).status_code == 201
    token = post(client, body=ann).json()["access_token"]
    me = client.get("/auth/me", headers={"Authorization": f"Bearer {token}"})
    assert me.json()["email"] == "ann@example.com"
    for line in ("POST /auth/register", "POST /auth/login", "GET /auth/me"):
        assert f'INFO:     {address}:0 - "{line} ' in service.log


@pytest.mark.parametrize(
    ("method", "path", "size", "status"),
    [
        ("GET", "/docs", 0, 200),
        ("GET", "/auth/me", 0, 401),
        ("GET", "/nope", 0, 404),
        ("GET", "/%00", 0, 400),
        ("POST", "/auth/login", 9, 422),
        ("POST", "/auth/login", 16 * 1024 + 1, 413),
        ("POST", "/auth/login", 16 * 1024, 401),
    ],
)
def test_headers_on_every_answer(
    client: httpx.Client, method: str, path: str, size: int, status: int
) -> None:
    body = NOBODY.ljust(size)[:size]
    answer = client.request(method, path, content=body, headers={"Content-Type": JSON})
    assert answer.status_code == status
    assert_headers(answer)


def assert_headers(answer: httpx.Response) -> None:
    """Each of the three is there; nginx and the service may both have sent it."""
    for name, value in {
        "Strict-Transport-Security": "max-age=31536000",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-store",
    }.items():
        assert set(answer.headers.get_list(name)) == {value}


# --- Bodies
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_16_kib_is_413(
    nginx: Nginx, addresses: Iterator[str], chunked: bool
) -> None:
    for turn in range(10):
        body = NOBODY.ljust(16 * 1024 + 1 + 8000 * turn)
        pieces = (body[i : i + 5000].encode() for i in range(0, len(body), 5000))
        with nginx.client(next(addresses)) as client:
            assert post(client, body=pieces if chunked else body).status_code == 413


@pytest.mark.parametrize(
    "chunk", [b"1\r\nx\r\n", b"1000\r\n" + 0x1000 * b"x" + b"\r\n"]
)
def test_endless_chunks_are_refused(
    nginx: Nginx, service: Service, address: str, chunk: bytes
) -> None:
    with nginx.connection(address) as connection:
        connection.sendall(head("POST /auth/login", "Transfer-Encoding: chunked"))
        for _ in range(100):
            connection.sendall(400 * chunk if len(chunk) < 10 else chunk)
            if select.select([connection], [], [], 0.01)[0]:
                break
        assert connection.recv(99).startswith(b"HTTP/1.1 413 ")
    assert not said_to(service, address)


# --- Slow clients -----------------------------------------------------------------
SLOW = {  # what is sent at once, and what then comes a byte at a time
    "nothing": (b"", b""),
    "half of the headers": (head("POST /auth/login")[:-9], b""),
    "headers byte by byte": (b"GET /auth/me HTTP/1.1\r\nX: ", 1000 * b"x"),
    "half of the body": (head("POST /auth/login", "Content-Length: 99") + b"{", b""),
    "half of a chunk": (
        head("POST /auth/login", "Transfer-Encoding: chunked") + b"9\r\n{",
        b"",
    ),
}


def test_slow_clients_are_cut_off(
    nginx: Nginx, service: Service, address: str, other: httpx.Client
) -> None:
    """All but one: each byte of a body gives it more time."""
    body = head("GET /auth/me", "Content-Length: 9999")
    with nginx.connection(address) as dripping, ExitStack() as stack:
        dripping.sendall(body)
        slow = {}
        for situation, (at_once, later) in SLOW.items():
            connection = stack.enter_context(nginx.connection(address))
            connection.sendall(at_once)
            slow[situation] = (connection, iter(later))
        patience = time.monotonic() + PATIENCE
        while slow:
            assert time.monotonic() < patience, f"still connected: {slow.keys()}"
            assert other.get("/docs").status_code == 200
            dripping.sendall(b" ")
            for situation, (connection, later) in list(slow.items()):
                if is_closed(connection, 0.02):
                    del slow[situation]
                elif byte := next(later, None):
                    with suppress(OSError):  # closed in between: seen in the next turn
                        connection.sendall(bytes([byte]))
        assert not is_closed(dripping)
    assert not said_to(service, address)


def test_bodies_that_never_end_are_few(
    nginx: Nginx,
    service: Service,
    client: httpx.Client,
    address: str,
    other: httpx.Client,
) -> None:
    with ExitStack() as stack:
        slow = []
        for _ in range(50):
            connection = stack.enter_context(nginx.connection(address))
            connection.sendall(head("GET /auth/me", "Content-Length: 9999"))
            slow.append(connection)
        for served in range(60):  # the last of them may come to nginx a little later
            for connection in slow:
                connection.sendall(b" ")
            refused = client.get("/auth/me")
            if refused.status_code == 429:
                break
            time.sleep(0.1)
        assert refused.status_code == 429
        assert_headers(refused)
        assert other.get("/auth/me").status_code == 401
        assert not any(map(is_closed, slow))
    assert len(said_to(service, address)) == served  # none of them the slow ones'
    patience = time.monotonic() + PATIENCE
    while client.get("/auth/me").status_code == 429:
        assert time.monotonic() < patience
        time.sleep(0.1)


# --- Floods -----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("path", "status"), [("/auth/login", 401), ("/auth%2flogin", 401), ("//x", 404)]
)
def test_a_flood_of_posts_is_429(
    client: httpx.Client, other: httpx.Client, path: str, status: int
) -> None:
    answers = [post(client, path) for _ in range(60)]
    statuses = [answer.status_code for answer in answers]
    assert statuses[:11] == 11 * [status]
    assert set(statuses) == {status, 429}
    assert_headers(answers[statuses.index(429)])
    assert client.get("/auth/me").status_code == 401  # which costs no hash
    assert post(other, path).status_code == status


def test_a_flood_of_anything_is_429(client: httpx.Client, other: httpx.Client) -> None:
    statuses = [client.get("/auth/me").status_code for _ in range(150)]
    assert statuses[:101] == 101 * [401]
    assert 429 in statuses
    assert other.get("/auth/me").status_code == 401


# --- Lies, and what is no request -------------------------------------------------
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
    assert f'{address}:0 - "GET /auth/me ' in service.log
    assert "203.0.113.9" not in service.log


CHUNKED = "Transfer-Encoding: chunked"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"no request\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\xff\xff", 400),
        (head("GET /auth/me", "no header"), 400),
        (head("GET /auth/me", "X: " + 60_000 * "x"), 400),
        (head("POST /auth/login", CHUNKED) + b"no chunk\r\n", 400),
        (head("GET /auth/me", CHUNKED, "Content-Length: 9"), 400),
    ],
)
def test_what_is_no_request_ends_at_nginx(
    nginx: Nginx, service: Service, address: str, sent: bytes, status: int
) -> None:
    with nginx.connection(address) as connection:
        connection.sendall(sent + b"\r\n")
        assert connection.recv(99).startswith(b"HTTP/1.1 %d " % status)
    assert not said_to(service, address)


def test_http_is_redirected(nginx: Nginx) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{nginx.http_port}") as client:
        answer = client.get("/docs?a=b", headers={"Host": NAME})
        assert answer.status_code == 301
        assert answer.headers["Location"] == f"https://{NAME}/docs?a=b"
        # A POST that follows becomes a GET: it fails, so nobody gets used to it.
        sent = post(client)
        assert sent.status_code == 301
        assert sent.next_request.method == "GET"


def test_nothing_of_this_troubled_the_service(service: Service) -> None:
    """After all of the above."""
    assert "Invalid HTTP request" not in service.log
    assert "Traceback" not in service.log
