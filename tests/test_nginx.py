"""The README's nginx block, before the real service: what it lets through, and what it stops."""

import itertools
import json
import os
import re
import select
import shutil
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Self

import httpx
import pytest
from harness import ROOT, Service, free_port, unprivileged
from pooler import make_certificate, missing

NAME = "auth.example.com"
JSON = "application/json"
NOBODY = json.dumps({"email": "nobody@example.com", "password": "correct horse"})
PATIENCE = 30  # seconds for what takes two

TRUSTING = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # of a certificate made just now
TRUSTING.check_hostname = False
TRUSTING.verify_mode = ssl.CERT_NONE


def section() -> str:
    """What the README says about nginx."""
    return re.search(
        r"^### Behind nginx\n.*?(?=^##+ |\Z)",
        (ROOT / "README.md").read_text(),
        re.MULTILINE | re.DOTALL,
    )[0]


def block() -> str:
    """What a reader saves as auth.conf."""
    (found,) = re.findall(
        r"^```nginx auth\.conf\n(.*?)^```$", section(), re.MULTILINE | re.DOTALL
    )
    return found


class Nginx:
    """Debian's nginx with the block of the README, in a folder of its own, gone after `stop`."""

    def __init__(self, upstream: int) -> None:
        program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
        if program is None or shutil.which("openssl") is None:
            missing("nginx (Debian: apt-get install nginx-light openssl)")
        self.home = Path(tempfile.mkdtemp(prefix="auth-nginx-"))
        user = unprivileged()
        if user:
            os.chown(self.home, user["user"], user["group"])
        certificate, key = make_certificate(self.home, user)
        self.port, self.http_port = free_port(), free_port()
        live = f"/etc/letsencrypt/live/{NAME}"
        text = block()
        for said, here in {
            "listen 443 ssl;": f"listen 127.0.0.1:{self.port} ssl;",
            "listen 80;": f"listen 127.0.0.1:{self.http_port};",
            f"{live}/fullchain.pem": certificate,
            f"{live}/privkey.pem": key,
            "http://127.0.0.1:8000;": f"http://127.0.0.1:{upstream};",
            # So that a test can wait for it, and reach it at any speed of the machine.
            "client_header_timeout 10s;": "client_header_timeout 2s;",
            "client_body_timeout 10s;": "client_body_timeout 2s;",
            "rate=50r/s;": "rate=1r/s;",
        }.items():
            assert text.count(said) == 1, said
            text = text.replace(said, str(here))
        (self.home / "auth.conf").write_text(text)
        # Debian's default folders are not for whoever runs the tests.
        folders = "".join(
            f"{kind}_temp_path {self.home / kind};\n"
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        configuration = self.home / "nginx.conf"
        configuration.write_text(
            f"daemon off; worker_processes 2; pid {self.home / 'pid'};\n"
            f"events {{}}\nhttp {{ access_log off;\n{folders}include auth.conf; }}\n"
        )
        errors = self.home / "errors"
        self.process = subprocess.Popen(
            [program, "-c", configuration, "-p", self.home, "-e", errors],
            cwd=self.home,
            stderr=subprocess.DEVNULL,  # it repeats what it writes into the file
            **user,
        )
        patience = time.monotonic() + PATIENCE
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 5).close()
                return
            except OSError as error:
                if self.process.poll() is not None or time.monotonic() > patience:
                    log = errors.read_text() if errors.exists() else "no log"
                    self.stop()
                    raise RuntimeError(log) from error
                time.sleep(0.02)

    def client(self, address: str) -> httpx.Client:
        """A client with that address, as nginx sees it."""
        return httpx.Client(
            base_url=f"https://127.0.0.1:{self.port}",
            headers={"Host": NAME},
            timeout=PATIENCE,
            transport=httpx.HTTPTransport(verify=TRUSTING, local_address=address),
        )

    def connection(self, address: str) -> ssl.SSLSocket:
        """A connection from that address, for bytes that no client library would send."""
        return TRUSTING.wrap_socket(
            socket.create_connection(
                ("127.0.0.1", self.port), PATIENCE, source_address=(address, 0)
            )
        )

    def stop(self) -> None:
        """End nginx and remove all that it left on disk."""
        self.process.terminate()
        self.process.wait(PATIENCE)
        shutil.rmtree(self.home, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


@pytest.fixture(scope="module")
def service(database: str) -> Iterator[Service]:
    """The service, started by the command that the section names."""
    options = re.search(r"`uvicorn main:app([^`]*)`", section())[1].split()
    with Service(database, *options) as service:
        yield service


@pytest.fixture(scope="module")
def nginx(service: Service) -> Iterator[Nginx]:
    """The nginx before that service."""
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


# --- Bodies -----------------------------------------------------------------------
@pytest.mark.parametrize("length", ["of known length", "in chunks"])
def test_a_body_over_16_kib_is_always_413(
    nginx: Nginx, addresses: Iterator[str], length: str
) -> None:
    for turn in range(40):
        body = NOBODY.ljust(16 * 1024 + 1 + 2000 * turn)
        pieces = (body[i : i + 5000].encode() for i in range(0, len(body), 5000))
        with nginx.client(next(addresses)) as client:
            answer = post(client, body=body if length == "of known length" else pieces)
        assert answer.status_code == 413


@pytest.mark.parametrize(
    "chunk", [b"1\r\nx\r\n", b"1000\r\n" + 0x1000 * b"x" + b"\r\n"]
)
@pytest.mark.parametrize("line", ["POST /auth/login", "GET /auth/me", "PUT /nope"])
def test_endless_chunks_are_refused(
    nginx: Nginx, service: Service, address: str, line: str, chunk: bytes
) -> None:
    with nginx.connection(address) as connection:
        connection.sendall(head(line, "Transfer-Encoding: chunked"))
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
        ["X-Forwarded-For: 127.0.0.1", "X-Forwarded-For: 203.0.113.9\x1b[2J"],
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
        (head("GET /auth/me", "X: \0"), 400),
        (head("GET /auth/me\x1b[2J"), 400),
        (head("GET /" + 15_000 * "x"), 414),
        (head("GET /auth/me", "X: " + 60_000 * "x"), 400),
        (head("POST /auth/login", CHUNKED) + b"no chunk\r\n", 400),
        (head("POST /auth/login", CHUNKED) + b"2\r\n{}no", 400),
        (head("GET /auth/me", CHUNKED, "Content-Length: 9"), 400),
        (head("GET /auth/me", "Transfer-Encoding: gzip"), 501),
    ],
)
def test_what_is_no_request_ends_at_nginx(
    nginx: Nginx, service: Service, address: str, sent: bytes, status: int
) -> None:
    with nginx.connection(address) as connection:
        connection.sendall(sent + b"\r\n")
        assert connection.recv(99).startswith(b"HTTP/1.1 %d " % status)
    assert not said_to(service, address)


def test_what_is_no_request_behind_a_client_that_does_not_read(
    nginx: Nginx, service: Service, address: str
) -> None:
    """Sent while the login before it is being hashed, on the same connection."""
    with nginx.connection(address) as connection:
        connection.sendall(50 * head("GET /docs"))
        connection.sendall(
            head("POST /auth/login", f"Content-Length: {len(NOBODY)}") + NOBODY.encode()
        )
        connection.sendall(b"no request\r\n\r\n")
        patience = time.monotonic() + PATIENCE
        while f'{address}:0 - "POST /auth/login ' not in service.log:
            assert time.monotonic() < patience
            time.sleep(0.05)
        *_, last = connection.makefile("rb").read().split(b"HTTP/1.1 ")[1:]
        assert last.startswith(b"400 ")


def test_a_client_that_leaves(nginx: Nginx, service: Service, address: str) -> None:
    """While its login is being hashed."""
    for _ in range(10):
        with nginx.connection(address) as connection:
            connection.sendall(
                head("POST /auth/login", f"Content-Length: {len(NOBODY)}")
                + NOBODY.encode()
            )


def test_http_is_redirected(nginx: Nginx) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{nginx.http_port}") as client:
        answer = client.get("/docs?a=b", headers={"Host": NAME})
        assert answer.status_code == 301
        assert answer.headers["Location"] == f"https://{NAME}/docs?a=b"
        # A POST that follows becomes a GET: it fails, so nobody gets used to it.
        sent = post(client)
        assert sent.status_code == 301
        assert sent.next_request.method == "GET"


def test_nginx_waits_longer_than_the_service_needs() -> None:
    """24 seconds at the worst, says the README; nginx waits 60 unless told."""
    told = re.findall(r"proxy_(?:read|send)_timeout (\S+)s;", block())
    assert all(int(seconds) > 24 for seconds in told)


def test_nothing_of_this_troubled_the_service(service: Service) -> None:
    """After all of the above."""
    assert "Invalid HTTP request" not in service.log
    assert "Traceback" not in service.log
