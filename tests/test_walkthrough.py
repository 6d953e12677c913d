"""The commands that people type: `python init_db.py`, `uvicorn main:app`, `psql -f verify.sql`."""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from harness import (
    JWT_SECRET,
    POSTGRES_BIN,
    ROOT,
    Service,
    environment,
    free_port,
    fresh_database,
    run,
)


def init_db(database: str | None, **variables: str) -> subprocess.CompletedProcess[str]:
    return run("python", "init_db.py", database=database, **variables)


def verify(database: str) -> subprocess.CompletedProcess[str]:
    path = f"{os.environ['PATH']}{os.pathsep}{POSTGRES_BIN}"
    return run(
        "sh", "-c", 'psql "$DATABASE_URL" -f verify.sql', database=database, PATH=path
    )


def snapshot(database: str) -> list[tuple[object, ...]]:
    """Everything that could change in a database that a command should only read."""
    with psycopg.connect(database) as connection:
        rows = connection.execute(
            "SELECT relname, relfilenode::text FROM pg_class"
        ).fetchall()
        rows += connection.execute(
            "SELECT email, hashed_password FROM users"
        ).fetchall()
    return sorted(rows)


# --- The whole path


def test_the_whole_path(empty_database: str) -> None:
    assert init_db(empty_database).stdout == "users: created\n"
    with Service(empty_database, BCRYPT_ROUNDS="12") as service:
        registered = service.register("ann@example.com")
        assert registered.status_code == 201
        login = service.login("ann@example.com")
        assert login.status_code == 200
        me = service.me(login.json()["access_token"])
        assert me.status_code == 200
        assert me.json() == registered.json()
    verified = verify(empty_database)
    assert verified.returncode == 0, verified.stderr
    assert re.search(r"ann@example\.com \| \$2b\$12\$ \| t ", verified.stdout)


def test_nothing_but_init_db_creates_tables(empty_database: str) -> None:
    with Service(empty_database) as service:
        for _ in range(2):
            refused = service.register("ann@example.com")
            assert refused.status_code == 503
            assert "python init_db.py" in refused.json()["detail"]
            assert refused.headers["retry-after"]
        assert "python init_db.py" in service.log
        assert "Traceback" not in service.log
        with psycopg.connect(empty_database) as connection:
            assert connection.execute("SELECT to_regclass('users')").fetchone() == (
                None,
            )
        init_db(empty_database)
        assert service.register("ann@example.com").status_code == 201


def test_a_missing_column_is_said(tables: str) -> None:
    with psycopg.connect(tables, autocommit=True) as connection:
        connection.execute("ALTER TABLE users DROP COLUMN is_active")
    with Service(tables) as service:
        refused = service.login("ann@example.com")
        assert refused.status_code == 503
        assert "python init_db.py" in refused.json()["detail"]
        assert "column users.is_active does not exist. A table or" in service.log


def test_postgres_scheme_of_older_documentation(empty_database: str) -> None:
    old = empty_database.replace("postgresql://", "postgres://")
    assert init_db(old).stdout == "users: created\n"
    with Service(old) as service:
        assert service.register("ann@example.com").status_code == 201


def test_letters_of_all_scripts_whatever_the_encodings(server: str) -> None:
    plain = "template0 ENCODING 'SQL_ASCII' LOCALE 'C'"
    with fresh_database(server, like=plain) as database:
        assert init_db(database).stdout == "users: created\n"
        with Service(database, PGCLIENTENCODING="LATIN1") as service:
            registered = service.register("жук@example.com")
            assert registered.json()["email"] == "жук@example.com"
            assert service.login("жук@example.com").status_code == 200


# --- init_db.py


def test_init_db_twice(empty_database: str) -> None:
    assert init_db(empty_database).stdout == "users: created\n"
    before = snapshot(empty_database)
    again = init_db(empty_database)
    assert (again.returncode, again.stdout, again.stderr) == (
        0,
        "users: already there\n",
        "",
    )
    assert snapshot(empty_database) == before


def test_init_db_five_at_once(empty_database: str) -> None:
    with ThreadPoolExecutor(5) as crowd:
        runs = list(crowd.map(init_db, 5 * [empty_database]))
    assert [r.returncode for r in runs] == 5 * [0], [r.stderr for r in runs]
    assert sorted(r.stdout for r in runs) == 4 * ["users: already there\n"] + [
        "users: created\n"
    ]


def test_init_db_asks_for_no_setting_but_the_url(empty_database: str) -> None:
    others = {"JWT_SECRET": "short", "ACCESS_TOKEN_MINUTES": "x", "BCRYPT_ROUNDS": "x"}
    assert init_db(empty_database, **others).stdout == "users: created\n"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("DROP COLUMN is_active", ["is_active is missing"]),
        (
            "DROP COLUMN is_active, DROP COLUMN id",
            ["is_active is missing", "id is missing"],
        ),
        ("ALTER COLUMN created_at TYPE date", ["created_at is DATE"]),
        (
            "ALTER COLUMN created_at TYPE timestamp",
            ["created_at is TIMESTAMP WITHOUT TIME ZONE"],
        ),
        ("ALTER COLUMN email TYPE varchar(20)", ["email is VARCHAR(20)"]),
        ("ALTER COLUMN email DROP NOT NULL", ["email is VARCHAR NULL"]),
        (
            "ALTER COLUMN is_active DROP DEFAULT",
            [
                "is_active is BOOLEAN NOT NULL, should be BOOLEAN NOT NULL with a default"
            ],
        ),
        ("DROP CONSTRAINT users_email_key", ["email is not UNIQUE"]),
        (
            "ADD COLUMN age int NOT NULL",
            ["age is INTEGER NOT NULL, should not be there"],
        ),
        (
            "ADD COLUMN spot point NOT NULL, DROP is_active, ADD is_active point[]",
            [
                "spot is of another type NOT NULL, should not be there",
                "is_active is of another type NULL, should be BOOLEAN",
            ],
        ),
    ],
)
def test_init_db_refuses_a_table_that_differs(
    tables: str, change: str, said: list[str]
) -> None:
    with psycopg.connect(tables, autocommit=True) as connection:
        connection.execute(f"ALTER TABLE users {change}")
    refused = init_db(tables)
    assert refused.returncode not in (0, 1)
    assert refused.stdout == ""
    assert refused.stderr.startswith("error: table users differs from the model: ")
    assert refused.stderr.count("\n") == 1
    for words in said:
        assert words in refused.stderr
    columns = {"id", "email", "hashed_password", "is_active", "created_at"}
    for column in columns - {words.split()[0] for words in said}:
        assert f" {column} is" not in refused.stderr


def test_init_db_leaves_columns_that_it_need_not_fill(tables: str) -> None:
    with psycopg.connect(tables, autocommit=True) as connection:
        connection.execute(
            "ALTER TABLE users ADD COLUMN nickname text, ADD n int NOT NULL DEFAULT 1,"
            " ADD spot point"
        )
    done = init_db(tables)
    assert (done.stdout, done.stderr) == ("users: already there\n", "")


SLOW_ROUTE = """
import asyncio, main
from fastapi import APIRouter
from starlette.testclient import TestClient

router = APIRouter(route_class=main.TimedRoute)

@router.get("/slow")
async def slow():
    await asyncio.sleep(60)

main.app.include_router(router)
main.DEADLINE_SECONDS = 0.1
print(TestClient(main.app).get("/slow").status_code)
"""


def test_a_router_of_your_own_keeps_the_limit(database: str) -> None:
    assert "`APIRouter(route_class=TimedRoute)`" in (ROOT / "README.md").read_text()
    done = run("python", "-W", "ignore", "-c", SLOW_ROUTE, database=database)
    assert done.stdout == "503\n", done.stderr


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda url: re.sub(r"@[^/]+", f"@127.0.0.1:{free_port()}", url), ["127.0.0.1", "refused"]),
        (lambda url: re.sub(r"@[^/]+", "@nowhere.invalid", url), ["nowhere.invalid"]),
        (lambda url: re.sub(r":[^:@]+@", ":wrong-one@", url), ["password authentication failed"]),
        (lambda url: re.sub(r"/[^/]+$", "/no_such_database", url), ["does not exist"]),
    ],
)  # fmt: skip
def test_init_db_without_the_database(
    empty_database: str, broken: object, said: list[str]
) -> None:
    database = broken(empty_database)
    refused = init_db(database)
    assert refused.returncode not in (0, 1)
    assert refused.stdout == ""
    settings = psycopg.conninfo.conninfo_to_dict(database)
    host, password = settings["host"], settings["password"]
    for words in [f"error: cannot create tables at {host}: ", *said]:
        assert words in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert password not in refused.stderr


# --- Settings


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (None, "is not set"), ("", "is not set"), (" ", "is not like"),
        ("mysql://ann:sesame@db/auth", "for db is not like"), ("sqlite:///auth.db", "is not like"),
        ("https://ann:sesame@db", "for db is not like"), ("ann:sesame@db/auth", "for db is not like"),
        ("postgresql://ann:sesame@db:port/auth", "for db is not like"),
        ("postgresql://ann:se@sesame@db/auth", "is not like"),
        ("postgresql://ann:se@sesame?s@db:port/auth", "is not like"),
        ("postgresql://ann:sesame@db..example/auth", "for db..example is not like"),
        ("postgresql://ann:sesame@db/auth?port=x", "for db is not like"),
        ("postgresql://ann:sesame@db/auth?sslmod=require", "for db is not like"),
        ("postgresql://ann:sesame@db/auth?self=x", "for db is not like"),
        ("postgresql://ann:sesame%00@db/auth", "for db is not like"),
        ("postgresql://ann:sesame@db\n/auth", "is not like"),
        ("postgresql://ann:sesame@db/auth?connect_timeout=9 ", "for db is not like"),
        ("postgresql://ann:sesame@db/\udcff", "for db is not like"),
        ("postgresql+asyncpg://ann:sesame@db/auth", "for db is not like"),
        ("'postgresql://ann:sesame@db/auth'", "for db is not like"),
        ("psql 'postgresql://ann:sesame@db/auth'", "for db is not like"),
    ],
)  # fmt: skip
def test_a_bad_database_url_is_refused_by_name(url: str | None, said: str) -> None:
    settings = environment(url)
    if url is None:
        settings.pop("DATABASE_URL", None)
    commands = ["python init_db.py", "uvicorn main:app --port 0"]
    for command in commands if not url else commands[:1]:
        refused = run(*command.split(), settings=settings)
        assert refused.returncode == 3
        assert refused.stdout == ""
        assert refused.stderr.startswith(f"error: DATABASE_URL {said}")
        assert refused.stderr.count("\n") == 1
        assert "sesame" not in refused.stderr
    if url and "sslmod" in url:
        assert '"sslmod"' in verify(url).stderr  # psql knows what is wrong with it


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("JWT_SECRET", ["", 31 * "x", "ssh-ed25519 " + 31 * "x"], "openssl rand -hex 32"),
        ("ACCESS_TOKEN_MINUTES", ["", "0", "1.5", "9" * 5000], "whole number"),
        ("BCRYPT_ROUNDS", ["3", "32", "twelve"], "from 4 to 31"),
    ],
)  # fmt: skip
def test_another_bad_setting_is_refused_by_name(
    name: str, values: list[str], said: str
) -> None:
    for value in values:
        url = "postgresql://ann:sesame@127.0.0.1/auth"
        refused = run(
            "uvicorn", "main:app", "--port", "0", database=url, **{name: value}
        )
        assert refused.returncode == 3, value
        assert refused.stdout == ""
        assert refused.stderr.startswith(f"error: {name} ")
        assert said in refused.stderr
        assert refused.stderr.count("\n") == 1
        assert "sesame" not in refused.stderr
        if len(value) > 4:
            assert value not in refused.stderr


def test_a_secret_may_be_32_bytes_in_fewer_characters(database: str) -> None:
    with Service(database, JWT_SECRET=16 * "é") as service:
        service.register("short@example.com")
        assert service.me(
            service.login("short@example.com").json()["access_token"]
        ).is_success


def test_workers_give_up_on_a_bad_setting_too() -> None:
    refused = run(
        "uvicorn", "main:app", "--port", "0", "--workers", "2", database="mysql://db"
    )
    assert "error: DATABASE_URL is not like" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_env_example_has_every_setting_and_no_working_secret() -> None:
    lines = (ROOT / ".env.example").read_text().splitlines()
    given = dict(
        line.split("=", 1) for line in lines if line and not line.startswith("#")
    )
    used = set(
        re.findall(
            r'environ\.get\("(\w+)"|whole_number\("(\w+)"',
            (ROOT / "main.py").read_text(),
        )
    )
    assert given.keys() == {first or second for first, second in used}
    for number, line in enumerate(lines):
        if re.match(r"\w+=", line):
            assert lines[number - 1].startswith("# ")
    filled = f"set -a; . ./.env.example; set +a; JWT_SECRET={JWT_SECRET!r}"
    shown = run("sh", "-c", f'{filled}; echo "$DATABASE_URL"').stdout.strip()
    assert shown == given["DATABASE_URL"].strip('"')
    assert shown.endswith(
        "-pooler.REGION.aws.neon.tech/neondb?sslmode=require&channel_binding=require"
    )
    refused = run(
        "sh", "-c", "set -a; . ./.env.example; set +a; exec uvicorn main:app --port 0"
    )
    assert refused.stderr.startswith("error: JWT_SECRET ")


# --- verify.sql


def test_verify_without_a_table(empty_database: str) -> None:
    refused = verify(empty_database)
    assert refused.returncode == 3
    assert "Create it with: python init_db.py" in refused.stderr
    assert 'relation "users" does not exist' in refused.stderr


def test_verify_shows_the_table_and_changes_nothing(empty_database: str) -> None:
    init_db(empty_database)
    with Service(empty_database) as service:
        for number in range(7):
            service.register(f"user{number}@example.com")
    before = snapshot(empty_database)
    shown = verify(empty_database)
    assert (shown.returncode, shown.stderr) == (0, "")
    for line in [
        r"id +\| uuid +\| NOT NULL \| gen_random_uuid\(\)",
        r"email +\| character varying +\| NOT NULL \|",
        r"hashed_password +\| character varying +\| NOT NULL \|",
        r"is_active +\| boolean +\| NOT NULL \| true",
        r"created_at +\| timestamp with time zone +\| NOT NULL \| now\(\)",
        r"users_email_key +\| UNIQUE \(email\)",
        r"users_pkey +\| PRIMARY KEY \(id\)",
        r" +7$",
    ]:
        assert re.search(f"^ {line}", shown.stdout, re.MULTILINE), line
    newest = re.findall(r"(user\d)@example\.com \| (\S+) +\|", shown.stdout)
    assert newest == [(f"user{number}", "$2b$04$") for number in (6, 5, 4, 3, 2)]
    assert snapshot(empty_database) == before


# --- The command that tries it all


def start_try_it(folder: Path, *options: str) -> subprocess.Popen[str]:
    """`tests/try_it.py` with its temporary files in a folder of its own."""
    return subprocess.Popen(
        [sys.executable, "tests/try_it.py", *options],
        cwd=ROOT,
        env=os.environ
        | {"TMPDIR": str(folder), "DATABASE_URL": "unused", "BCRYPT_ROUNDS": "x"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize(
    ("ending", "to"),
    [(signal.SIGINT, os.killpg), (signal.SIGTERM, os.kill)],
)  # fmt: skip
def test_try_it_shows_all_and_leaves_nothing(
    ending: signal.Signals, to: object
) -> None:
    """Ctrl-C reaches the whole group of processes, `kill` one alone."""
    port = free_port()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        tried = start_try_it(folder, "--port", str(port))
        shown = ""
        while "Ctrl-C here stops" not in shown:
            line = tried.stdout.readline()
            assert line, shown
            shown += line
        for words in [
            "$ python init_db.py\nusers: created\n",
            f"$ uvicorn main:app --port {port}\n",
            f"Uvicorn running on http://127.0.0.1:{port}",
            '$ psql "$DATABASE_URL" -f verify.sql\nColumns\n',
        ]:
            assert words in shown
        pasted = shown.partition("In a second terminal, in this folder, paste:\n")[
            2
        ].partition("Ctrl-C here")[0]
        pasted = pasted.replace("To look into the database from there:", "")
        second = subprocess.run(
            ["sh", "-c", pasted],
            cwd=ROOT,
            capture_output=True,
            check=False,
            text=True,
            timeout=60,
        )
        assert second.stdout.count('"email":"ann@example.com","is_active":true') == 2
        assert re.search(r"ann@example\.com \| \$2b\$12\$ \| t ", second.stdout)
        to(tried.pid, ending)
        rest, _ = tried.communicate(timeout=30)
        assert "Application shutdown complete." in rest
        assert rest.endswith("Stopped, nothing is left behind.\n")
        assert "Traceback" not in shown + rest
        assert list(folder.iterdir()) == []
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0
    server = int(re.search(r"@127\.0\.0\.1:(\d+)/", shown)[1])
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", server)) != 0


def test_try_it_on_a_taken_port() -> None:
    with socket.socket() as holder, tempfile.TemporaryDirectory() as name:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        shown, _ = start_try_it(Path(name), "--port", str(port)).communicate(timeout=30)
        assert (
            shown
            == f"error: port {port} is taken, choose another: .venv/bin/python tests/try_it.py --port {port + 1}\n"
        )


# --- The benchmark


def test_the_benchmark_prints_every_figure() -> None:
    """Whether they are good is for a quiet machine to say."""
    measured = run("python", "tests/benchmark.py", "--quick", "--uvloop")
    assert measured.returncode == 0, measured.stderr
    rows = re.findall(
        r"^\| (.+?) \| (\d[\d.]*) ?(?:s|/s|ms|MB) \|", measured.stdout, re.MULTILINE
    )
    assert [name for name, _ in rows] == [
        "Start-up, to the first answer",
        "Logins",
        "Logins at twice the capacity",
        "Token checks, 16 clients",
        "Token checks with uvloop and httptools",
        "A check during logins, median",
        "A check during logins, 99 %",
        "A check during logins, slowest",
        "Memory after 4,000 requests",
    ]
    assert all(float(figure) > 0 for _, figure in rows)
