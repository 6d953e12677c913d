"""What docs/run.md says about hosts, processes and the database, where no terminal shows it."""

import json
import re
import socket
import subprocess
from pathlib import Path

import psycopg
import pytest
from support.command import ROOT, free_port, run
from support.postgres import Postgres, TlsPostgres, change_url, fresh_database
from support.service import Service, statuses, until

PAGE = (ROOT / "docs" / "run.md").read_text()


def test_behind_a_proxy_the_log_shows_the_client(database: str) -> None:
    with Service(database, "--host", "0.0.0.0", "--forwarded-allow-ips", "*") as service:  # fmt: skip
        service.http.get("/auth/me", headers={"X-Forwarded-For": "203.0.113.9"})
        assert '203.0.113.9:0 - "GET /auth/me' in service.log


@pytest.mark.parametrize("seconds", [None, "1"])
def test_a_client_in_the_midst_of_a_body(database: str, seconds: str | None) -> None:
    """A stopping process waits for it forever, unless told how long."""
    options = ["--timeout-graceful-shutdown", seconds] if seconds else []
    head = b"POST /auth/login HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n"
    with Service(database, *options) as service:
        with socket.create_connection(("127.0.0.1", service.port)) as client:
            client.sendall(head + b"Content-Type: application/json\r\n\r\n{")
            service.http.get("/auth/me")
            service.process.terminate()
            if seconds:
                service.process.wait(30)
            else:
                until(lambda: "Waiting for connections to close" in service.log)
                with pytest.raises(subprocess.TimeoutExpired):
                    service.process.wait(4)
        service.tracebacks = True  # of the request that was ended


def test_limit_concurrency(database: str) -> None:
    with Service(database, "--limit-concurrency", "3", BCRYPT_ROUNDS="10") as service:
        answers = service.at_once(20, service.login, "ann@example.com")
        assert statuses(answers).keys() == {401, 503}


def test_web_concurrency_starts_processes(database: str) -> None:
    with Service(database, WEB_CONCURRENCY="3") as service:
        until(lambda: service.log.count("Application startup complete") == 3)


QUIET = """
uvicorn main:app --port $PORT --log-level critical &
until curl -so log $URL/docs; do sleep .1; done
curl -s $URL/auth/login -H 'Content-Type: application/json' \\
    -d '{"email": "nobody@example.com", "password": "a guess"}'
kill $!; wait
"""


def test_the_log_level_is_uvicorn_s_alone(database: str, tmp_path: Path) -> None:
    port = str(free_port())
    here = {"PORT": port, "URL": f"http://127.0.0.1:{port}", "PYTHONPATH": str(ROOT)}
    done = run("bash", "-c", QUIET, database=database, folder=tmp_path, **here)
    (line,) = done.stderr.splitlines()
    assert line.endswith(" INFO login refused: nobody@example.com")


def test_the_loop_for_windows_serves_here_too(database: str) -> None:
    (loop,) = set(json.loads(f'["{PAGE.split("--loop ")[1].split("`")[0]}"]'))
    with Service(database, "--loop", loop) as service:
        assert service.me(service.account().token).status_code == 200


def test_uv_keeps_and_installs_the_versions(tmp_path: Path) -> None:
    (compiled, synced) = re.findall("`(uv pip [^`]+)`", re.sub(r"\s+", " ", PAGE))
    lock = str(tmp_path / "requirements.lock")
    run("uv", "venv", tmp_path / ".venv").check_returncode()
    for command in (compiled, f"{synced} --python {tmp_path}/.venv/bin/python"):
        typed = command.replace("requirements.lock", lock)
        done = run(*typed.split())
        assert done.returncode == 0, done.stderr
    assert "fastapi==" in Path(lock).read_text()


LAMBDA = """
import json, sys
from mangum import Mangum
from main import app, autocommit_engine
event = json.loads(sys.argv[1])
handler = Mangum(app, lifespan="off")
for _ in range(3):
    print(handler(event, {})["statusCode"], autocommit_engine.pool.checkedin())
"""


def test_on_lambda_a_connection_is_kept(database: str) -> None:
    body = json.dumps({"email": "nobody@example.com", "password": "correct horse"})
    event = {
        "version": "2.0",
        "routeKey": "$default",
        "rawPath": "/auth/login",
        "rawQueryString": "",
        "headers": {"content-type": "application/json"},
        "requestContext": {
            "http": {"method": "POST", "path": "/auth/login", "sourceIp": "127.0.0.1"}
        },
        "body": body,
        "isBase64Encoded": False,
    }
    done = run(
        *("python", "-c", LAMBDA, json.dumps(event)),
        database=database,
        PYTHONPATH=str(ROOT),
    )
    assert done.stdout == 3 * "401 1\n", done.stderr


def test_a_certificate_that_the_system_trusts() -> None:
    """`sslrootcert=system` finds it by SSL_CERT_FILE."""
    with (
        TlsPostgres() as postgres,
        fresh_database(postgres.url("postgres")) as database,
    ):
        options = {"host": "localhost", "sslmode": "verify-full"}
        url = change_url(database, sslrootcert="system", **options)
        refused = run("python", "init_db.py", database=url)
        assert "certificate verify failed" in refused.stderr
        trusted = str(postgres.home / "server.crt")
        made = run("python", "init_db.py", database=url, SSL_CERT_FILE=trusted)
        assert made.stdout == "users: created\n", made.stderr


SLOW = """
from sqlalchemy import text
from main import SessionDep, app

@app.get("/slow")
async def slow(session: SessionDep) -> None:
    await session.execute(text("SELECT pg_sleep(60)"))
"""


def test_a_statement_timeout_of_the_role(tmp_path: Path) -> None:
    """It ends a slow query of a reader's route."""
    (tmp_path / "slow.py").write_text(SLOW)
    with Postgres() as postgres:
        url = postgres.url("postgres")
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("ALTER ROLE CURRENT_USER SET statement_timeout = '1s'")
        with Service(url, app="slow:app", PYTHONPATH=str(tmp_path)) as service:
            service.tracebacks = True
            assert service.http.get("/slow").status_code == 500
            until(lambda: "statement timeout" in service.log)
