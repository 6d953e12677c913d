"""The commands that people type: `python init_db.py`, `uvicorn main:app`, `psql -f verify.sql`."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest
from harness import (
    JWT_SECRET,
    POSTGRES_BIN,
    ROOT,
    Service,
    environment,
    free_port,
    run,
)


def init_db(
    database: str | None, *modules: str, folder: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    command = ("python", "init_db.py", *modules)
    return run(*command, database=database, folder=folder, **variables)


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


NO_TABLES = "error: no tables created at 127.0.0.1: "
FLAG = "boolean NOT NULL DEFAULT true"
TIME = "timestamp with time zone NOT NULL DEFAULT now()"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("DROP is_active", [f"users.is_active is absent, not {FLAG}"]),
        ("ALTER is_active DROP DEFAULT", [f"users.is_active is boolean NOT NULL, not {FLAG}"]),
        ("ALTER is_active SET DEFAULT false", [f"users.is_active is boolean NOT NULL DEFAULT false, not {FLAG}"]),
        ("ALTER email DROP NOT NULL", ["users.email is character varying, not character varying NOT NULL"]),
        ("DROP CONSTRAINT users_email_key", ["users UNIQUE (email) is absent, not there"]),
        ("DROP CONSTRAINT users_pkey", ["users UNIQUE (id) is absent, not there"]),
        (
            ("DROP is_active, DROP email, ALTER id DROP DEFAULT, ADD spot point NOT NULL,"
            " ALTER created_at TYPE timestamp, ALTER hashed_password TYPE varchar(20)"),
            [
                f"users.is_active is absent, not {FLAG}",
                "users.email is absent, not character varying NOT NULL",
                "users UNIQUE (email) is absent, not there",
                "users.id is uuid NOT NULL, not uuid NOT NULL DEFAULT gen_random_uuid()",
                "users.spot is point NOT NULL, not absent",
                f"users.created_at is timestamp without time zone NOT NULL DEFAULT now(), not {TIME}",
                "users.hashed_password is character varying(20) NOT NULL, not character varying NOT NULL",
            ],
        ),
    ],
)  # fmt: skip
def test_init_db_refuses_a_table_that_differs(
    tables: str, change: str, said: list[str]
) -> None:
    with psycopg.connect(tables, autocommit=True) as connection:
        connection.execute(f"ALTER TABLE users {change}")
    refused = init_db(tables)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.count("\n") == 1
    begin = f"{NO_TABLES}not as the model has it: "
    assert refused.stderr.startswith(begin)
    assert sorted(refused.stderr.strip().removeprefix(begin).split("; ")) == sorted(
        said
    )


def test_init_db_leaves_columns_that_it_need_not_fill(tables: str) -> None:
    with psycopg.connect(tables, autocommit=True) as connection:
        connection.execute(
            "ALTER TABLE users ADD COLUMN nickname text, ADD n int NOT NULL DEFAULT 1,"
            " ADD spot point"
        )
    done = init_db(tables)
    assert (done.stdout, done.stderr) == ("users: already there\n", "")


# --- init_db.py with models of one's own


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with main.py, init_db.py, and kinds.py beside them."""
    for file in ("main.py", "init_db.py", "tests/kinds.py"):
        shutil.copy(ROOT / file, tmp_path)
    return tmp_path


def test_columns_of_every_kind_are_created_and_found_again(
    empty_database: str, project: Path
) -> None:
    with psycopg.connect(empty_database, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA elsewhere")
    tables = {"users", "types", "Notes of mine", "places", "visits", "stays"}
    for module, state in (("kinds", "created"), ("kinds.py", "already there")):
        done = init_db(empty_database, module, folder=project)
        assert (done.returncode, done.stderr) == (0, "")
        assert set(done.stdout.splitlines()) == {f"{t}: {state}" for t in tables}


def test_differences_in_a_model_of_ones_own(empty_database: str, project: Path) -> None:
    with psycopg.connect(empty_database, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA elsewhere")
        assert init_db(empty_database, "kinds", folder=project).returncode == 0
        for change in (
            """ALTER TABLE "Notes of mine" DROP CONSTRAINT "Notes of mine_number_check",
               ADD CHECK (number > 1), DROP CONSTRAINT "Notes of mine_owner_id_fkey",
               ADD FOREIGN KEY (owner_id) REFERENCES users (id), ALTER price TYPE numeric(9, 2),
               ALTER number DROP IDENTITY, DROP COLUMN double, ADD double bigint NOT NULL""",
            "DROP INDEX early",
            "ALTER TABLE places DROP CONSTRAINT places_pkey CASCADE, ADD PRIMARY KEY (row)",
        ):
            connection.execute(change)
    refused = init_db(empty_database, "kinds", folder=project)
    begin = f"{NO_TABLES}not as the model has it: "
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith(begin)
    said = refused.stderr.strip().removeprefix(begin).split("; ")
    assert sorted(said) == [
        "Notes of mine CHECK ((number > 0)) is absent, not there",
        "Notes of mine FOREIGN KEY (owner_id) REFERENCES users(id) ON DELETE CASCADE is absent, not there",
        "Notes of mine UNIQUE (day) WHERE (number < 9) is absent, not there",
        "Notes of mine.double is bigint NOT NULL, not integer NOT NULL DEFAULT (number * 2) STORED",
        "Notes of mine.number is bigint NOT NULL, not bigint NOT NULL IDENTITY",
        "Notes of mine.price is numeric(9,2) NOT NULL DEFAULT '0'::numeric, not numeric NOT NULL DEFAULT '0'::numeric",
        'places UNIQUE ("row", seat) is absent, not there',
        'visits FOREIGN KEY ("row", seat) REFERENCES places("row", seat) is absent, not there',
    ]


def test_a_model_that_init_db_does_not_see_is_named(
    empty_database: str, project: Path
) -> None:
    (project / "routes.py").write_text("from main import app\n")
    done = init_db(empty_database, folder=project)
    assert (done.returncode, done.stdout, done.stderr) == (
        0,
        "users: created\nkinds.py has a model too: python init_db.py kinds\n",
        "",
    )
    refused = init_db(empty_database, "kind", folder=project)
    assert (refused.returncode, refused.stdout, refused.stderr) == (
        1,
        "",
        f"{NO_TABLES}No module named 'kind'\n",
    )


# --- init_db.py without its database


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda url: re.sub(r"@[^/]+", f"@127.0.0.1:{free_port()}", url), ["127.0.0.1", "refused"]),
        (lambda url: re.sub(r"@[^/]+", "@nowhere.invalid", url), ["nowhere.invalid"]),
        (lambda url: re.sub(r":[^:@]+@", ":wrong-one@", url), ["password authentication failed"]),
        (lambda url: re.sub(r"/[^/]+$", "/no_such_database", url), ["does not exist"]),
        (lambda url: re.sub(r"(\?.*)?$", "?sslmod=require", url, count=1), ['invalid connection option "sslmod"']),
    ],
)  # fmt: skip
def test_init_db_without_the_database(
    empty_database: str, broken: object, said: list[str]
) -> None:
    database = broken(empty_database)
    refused = init_db(database)
    assert refused.returncode == 1
    assert refused.stdout == ""
    url = urlsplit(database)
    for words in [f"error: no tables created at {url.hostname}: ", *said]:
        assert words in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert url.password not in refused.stderr


# --- Settings


NO_URL = (
    "error: DATABASE_URL is no postgresql:// URL, load .env: set -a; . ./.env; set +a"
)
NO_SECRET = "error: JWT_SECRET needs 32 bytes, load .env, or: openssl rand -hex 32"
NO_MINUTES = "error: ACCESS_TOKEN_MINUTES is not 1 or more"
NO_ROUNDS = "error: BCRYPT_ROUNDS is not from 4 to 31"
URL = "postgresql://ann:sesame@127.0.0.1/auth"
WRONG = [
    *((NO_URL, {"DATABASE_URL": url}) for url in [
        "", " ", "mysql://ann:sesame@db/auth", "sqlite:///auth.db", "https://ann:sesame@db",
        "ann:sesame@db/auth", "postgres://ann:sesame@db/auth", "postgresql:ann:sesame@db/auth",
        "postgresql+asyncpg://ann:sesame@db/auth", "postgresql+psycopg://ann:sesame@db/auth",
        "postgresql://ann:sesame@db:port/auth", "postgresql://ann:se@sesame@db/auth",
        "postgresql://ann:sesame@db..example/auth", "postgresql://ann:se@sesame?s@db:port/auth",
        "postgresql://ann:sesame@db\n/auth", "postgresql://ann:sesame@db/auth\n",
        "postgresql://ann:sesame@db/auth?connect_timeout=9 ", " postgresql://ann:sesame@db/auth",
        "postgresql://ann:ses/ame@db/auth", "'postgresql://ann:sesame@db/auth'",
        "psql 'postgresql://ann:sesame@db/auth'", "DATABASE_URL=postgresql://ann:sesame@db/auth",
    ]),
    *((NO_SECRET, {"JWT_SECRET": secret}) for secret in ["", 31 * "x"]),
    *((NO_MINUTES, {"ACCESS_TOKEN_MINUTES": n}) for n in ["", "0", "1.5", "9" * 5000]),
    *((NO_ROUNDS, {"BCRYPT_ROUNDS": n}) for n in ["3", "32", "twelve"]),
]  # fmt: skip
# One Python imports main.py again and again: a process for each would take a second of each.
IMPORT = """
import contextlib, io, json, os, sys
for settings in json.loads(sys.argv[1]):
    os.environ.update(json.loads(sys.argv[2]) | settings)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            import main
        except SystemExit as end:
            print(json.dumps([end.code, said.getvalue()]))
"""


@pytest.fixture(scope="module")
def refusals() -> list[tuple[int, str]]:
    """The exit status and the words of main.py for each wrong setting."""
    right = {
        "DATABASE_URL": URL,
        "JWT_SECRET": JWT_SECRET,
        "ACCESS_TOKEN_MINUTES": "30",
        "BCRYPT_ROUNDS": "12",
    }
    wrong = json.dumps([settings for _, settings in WRONG])
    done = run("python", "-c", IMPORT, wrong, json.dumps(right))
    assert done.stderr == ""
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_a_wrong_setting_is_refused_by_name(
    refusals: list[tuple[int, str]], number: int
) -> None:
    """In one line that never quotes it."""
    assert len(refusals) == len(WRONG)
    assert refusals[number] == [3, f"{WRONG[number][0]}\n"]


@pytest.mark.parametrize("command", ["python init_db.py", "uvicorn main:app --port 0"])
def test_a_missing_database_url_is_refused(command: str) -> None:
    settings = environment(None)
    settings.pop("DATABASE_URL", None)
    refused = run(*command.split(), settings=settings)
    assert (refused.returncode, refused.stdout) == (3, "")
    assert refused.stderr == f"{NO_URL}\n"


@pytest.mark.parametrize("workers", [(), ("--workers", "2")])
def test_all_wrong_settings_are_named_at_once(workers: tuple[str, ...]) -> None:
    wrong = {"JWT_SECRET": "sesame", "ACCESS_TOKEN_MINUTES": "0", "BCRYPT_ROUNDS": "x"}
    command = ("uvicorn", "main:app", "--port", "0", *workers)
    refused = run(*command, database="mysql://ann:sesame@db/auth", **wrong)
    said = f"{NO_URL}\n{NO_SECRET}\n{NO_MINUTES}\n{NO_ROUNDS}\n"
    if not workers:
        assert (refused.returncode, refused.stdout, refused.stderr) == (3, "", said)
    else:  # each of them says it, and the status is of the process above them
        assert set(said.splitlines()) <= set(refused.stderr.splitlines())
        assert "Traceback" not in refused.stderr
        assert "sesame" not in refused.stderr


def test_a_secret_may_be_32_bytes_in_fewer_characters(database: str) -> None:
    with Service(database, JWT_SECRET=16 * "é") as service:
        service.register("short@example.com")
        assert service.me(
            service.login("short@example.com").json()["access_token"]
        ).is_success


def test_env_example_has_every_setting_and_no_working_secret() -> None:
    lines = (ROOT / ".env.example").read_text().splitlines()
    given = dict(
        line.split("=", 1) for line in lines if line and not line.startswith("#")
    )
    code = "import main; print(*main.Settings.model_fields)"
    used = run("python", "-c", code, database="postgresql://ann@db").stdout.split()
    assert list(given) == used
    for number, line in enumerate(lines):
        if re.match(r"\w+=", line):
            assert lines[number - 1].startswith("# ")
    filled = f"set -a; . ./.env.example; set +a; JWT_SECRET={JWT_SECRET!r}"
    shown = run("sh", "-c", f'{filled}; echo "$DATABASE_URL"').stdout.strip()
    assert shown == given["DATABASE_URL"].strip("'")
    assert shown.endswith(
        "-pooler.REGION.aws.neon.tech/neondb?sslmode=require&channel_binding=require"
    )
    refused = run(
        "sh", "-c", "set -a; . ./.env.example; set +a; exec uvicorn main:app --port 0"
    )
    assert refused.stderr == f"{NO_SECRET}\n"


# --- verify.sql


def test_verify_without_a_table(empty_database: str) -> None:
    refused = verify(empty_database)
    assert refused.returncode == 3
    assert 'ERROR:  relation "users" does not exist\n' in refused.stderr


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
