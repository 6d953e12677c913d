"""Through TLS and a transaction pooler, and the suite itself at another server than its own."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.command import ROOT, run
from support.pgbouncer import PgBouncer
from support.postgres import TlsPostgres, change_url, fresh_database
from support.service import Service, until
from test_faults import CONNECTED, ask

ENCRYPTED = "pid IN (SELECT pid FROM pg_stat_ssl WHERE ssl)"
LIKE_NEON = {"host": "localhost", "sslmode": "require", "channel_binding": "require"}


@pytest.fixture(scope="module")
def postgres() -> Iterator[TlsPostgres]:
    with TlsPostgres() as postgres:
        yield postgres


def test_a_mix_of_requests_of_three_processes_on_four_pooled_connections(
    postgres: TlsPostgres,
) -> None:
    with (
        PgBouncer(postgres, pool=4) as pooler,
        fresh_database(postgres.url("postgres")) as direct,
    ):
        pooled = pooler.url(direct.rpartition("/")[2])
        for state in ("created", "already there"):
            made = run("python", "init_db.py", database=pooled)
            assert (made.returncode, made.stdout) == (0, f"users: {state}\n")
        with Service(pooled, "--workers", "3") as service:
            until(lambda: service.log.count("Application startup complete") == 3)

            def live(number: int) -> list[int]:
                email = f"mix-{number}@example.com"
                registered, login = service.register(email), service.login(email)
                token = login.json().get("access_token", "none")
                answers = registered, login, service.me(token), service.me(token)
                return [answer.status_code for answer in answers]

            with ThreadPoolExecutor(16) as crowd:
                lives = list(crowd.map(live, range(150)))
            assert lives == 150 * [[201, 200, 200, 200]]
            assert ask(direct, f"{CONNECTED} AND {ENCRYPTED}") in range(1, 5)
            assert ask(direct, f"{CONNECTED} AND NOT {ENCRYPTED}") == 0


def test_a_url_like_neon_s_serves_init_db_psql_and_the_service(
    postgres: TlsPostgres,
) -> None:
    with fresh_database(postgres.url("postgres")) as database:
        url = change_url(database, **LIKE_NEON)
        assert run("python", "init_db.py", database=url).stdout == "users: created\n"
        verified = run(postgres.bin / "psql", url, "-f", "verify.sql")
        assert verified.returncode == 0, verified.stderr
        with Service(url) as service:
            assert service.me(service.account().token).status_code == 200
            assert ask(database, f"{CONNECTED} AND {ENCRYPTED}") == 1


def test_the_suite_passes_at_another_server(postgres: TlsPostgres) -> None:
    """By a host name, over TLS and a pooler; these tests stand for all others."""
    chosen = "twice or another_schema or newest or spelling"
    files = ["test_init_db.py", "test_verify_sql.py", "test_registration.py"]
    with PgBouncer(postgres, pool=20) as pooler:
        url = change_url(pooler.url("postgres"), host="localhost")
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-n", "0", "-k", chosen, *files],
            cwd=ROOT / "tests",
            env=os.environ | {"TEST_DATABASE_URL": url},
            capture_output=True,
            check=False,
            text=True,
        )
    assert done.returncode == 0, done.stdout
