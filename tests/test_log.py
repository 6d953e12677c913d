"""What the service logs, and what never gets into its log."""

import json
import secrets
import socket
import struct
from datetime import datetime
from pathlib import Path

import pytest
from support.command import run
from support.service import Service, until

MARK = "marked-and-secret"


def lines_about(service: Service, text: str) -> list[str]:
    """The lines with a text in them, without their time."""
    lines = [line for line in service.log.splitlines() if text in line]
    assert all(datetime.fromisoformat(line[:23]) for line in lines)
    return [line[24:] for line in lines]


def test_each_registration_and_login_is_one_line(service: Service) -> None:
    email = f"{secrets.token_hex(6)}@example.com"
    user_id = service.register(email).json()["id"]
    service.register(email)
    service.login(email, "a wrong one")
    service.login(email)
    assert lines_about(service, email) == [
        f"INFO registered: {email} as {user_id}",
        f"INFO registration refused, email is taken: {email}",
        f"INFO login refused: {email}",
    ]
    assert lines_about(service, f"logged in: {user_id}") == [
        f"INFO logged in: {user_id}"
    ]


HOST = """
import logging, httpx
{setup}
import main
from main import app

@app.get("/fetch")
async def fetch() -> int:
    async with httpx.AsyncClient() as client:
        answer = await client.get("http://127.0.0.1:1/?key=sesame")
    return answer.status_code

httpx_logger = logging.getLogger("httpx")
httpx_logger.info('HTTP Request: GET http://127.0.0.1/?key=sesame "HTTP/1.1 200 OK"')
"""


@pytest.mark.parametrize(
    "setup",
    [
        "",
        "logging.basicConfig(level=logging.WARNING, format='%(message)s')",
        "logging.getLogger().addHandler(logging.StreamHandler())",
    ],
    ids=["nobody", "another format", "a handler"],
)
def test_the_lines_appear_whoever_has_set_up_logging(
    database: str, tmp_path: Path, setup: str
) -> None:
    (tmp_path / "hosted.py").write_text(HOST.format(setup=setup))
    with Service(database, app="hosted:app", PYTHONPATH=str(tmp_path)) as service:
        account = service.account()
        assert f"registered: {account.email} as {account.id}" in service.log
        assert f"logged in: {account.id}" in service.log
        assert "sesame" not in service.log


def test_no_line_can_be_forged(service: Service) -> None:
    for forger in ("a\nINFO logged in: forged@example.com", "a\r\u2028forged@b.org"):
        assert service.register(forger).status_code == 422
        assert service.login(forger).status_code == 422
    service.http.get("/auth/me%0aINFO:%20forged%0d?x=%0aforged")
    service.http.get("/auth/me", headers={"Authorization": "Bearer forged"})
    (line,) = [line for line in service.log.splitlines() if "forged" in line]
    assert '"GET /auth/me%0AINFO' in line
    assert all(line.isprintable() for line in service.log.split("\n"))


# --- Broken clients
BAD_BODIES = [
    {"email": "not an email", "password": [MARK]},
    {"email": MARK, "password": f"{MARK}\0"},
    {"password": MARK},
    [MARK],
]


def post(body: object) -> bytes:
    """A login, to be sent over a socket as it is."""
    raw = json.dumps(body).encode()
    head = b"POST /auth/login HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return head + b"Content-Length: %d\r\n\r\n%s" % (len(raw), raw)


def send_and_leave(service: Service, sent: bytes, reset: bool) -> None:
    """Send this, read nothing, and close the connection or reset it."""
    with socket.create_connection(("127.0.0.1", service.port), 5) as client:
        linger = struct.pack("ii", reset, 0)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        client.sendall(sent)


def test_a_client_that_leaves_brings_no_password_into_the_log(database: str) -> None:
    slow = post({"email": "ann@example.com", "password": MARK})
    with Service(database) as service:
        service.tracebacks = True
        for body in map(post, BAD_BODIES):
            for behind in (b"", b"no request\r\n\r\n", slow, body[:-1]):
                for sent in (body + behind, slow + body + behind, slow + behind):
                    for reset in (True, False):
                        send_and_leave(service, sent, reset)
        until(lambda: service.log.count(" 422 ") > 20)
        assert service.login("nobody@example.com").status_code == 401
        assert MARK not in service.log


NO_ANSWER = """
import asyncio, sys, traceback, main

async def send(message):
    raise RuntimeError("the client has gone")

async def answer(body):
    async def receive():
        return {"type": "http.request", "body": body.encode()}
    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/auth/login", "query_string": b""}
    try:
        await main.app(scope | {"headers": headers}, receive, send)
    except RuntimeError:
        traceback.print_exc()

for body in sys.argv[1:]:
    asyncio.run(answer(body))
"""


def test_a_traceback_quotes_nothing_that_was_sent(database: str) -> None:
    bodies = [json.dumps(body) for body in BAD_BODIES]
    failed = run("python", "-c", NO_ANSWER, *bodies, database=database)
    assert failed.stderr.count("RequestValidationError: ") >= len(bodies)
    assert failed.stderr.count("RuntimeError: the client has gone") >= len(bodies)
    assert MARK not in failed.stderr
