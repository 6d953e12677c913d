"""python init_db.py: the tables that it creates, and what it refuses."""

import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import psycopg
import pytest
from support.command import ROOT, free_port, run
from support.page import docstring_example
from support.postgres import change_url
from support.service import Service, until

LOCK = 1635087464  # init_db.py's
MODEL = """
from sqlalchemy import ForeignKey
from sqlalchemy.orm import Mapped, mapped_column
from main import Base, User

class {name}(Base):
    __tablename__ = "{table}"
    __table_args__ = {{"schema": {schema!r}}}
    id: Mapped[int] = mapped_column(primary_key=True)
    Text: Mapped[str] = mapped_column("words")
"""


def init_db(
    database: str, *modules: str, folder: Path | None = None, **variables: str
) -> CompletedProcess[str]:
    command = ("python", "init_db.py", *modules)
    return run(*command, database=database, folder=folder, **variables)


def said(done: CompletedProcess[str]) -> tuple[int, str, str]:
    return done.returncode, done.stdout, done.stderr


def execute(database: str, statement: str) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(statement)


def fetch(database: str, query: str) -> tuple[Any, ...] | None:
    with psycopg.connect(database) as connection:
        return connection.execute(query).fetchone()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A reader's folder, with models in several places."""
    for name in ("main.py", "init_db.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "notes.py").write_text(docstring_example())
    (tmp_path / "app").mkdir()
    model = MODEL.format(name="Tag", table="tags", schema=None)
    (tmp_path / "app" / "models.py").write_text(model)
    model = MODEL.format(name="Visit", table="visits", schema="elsewhere")
    (tmp_path / "visits.py").write_text(model)
    return tmp_path


def test_twice(empty_database: str) -> None:
    assert said(init_db(empty_database)) == (0, "users: created\n", "")
    assert said(init_db(empty_database)) == (0, "users: already there\n", "")


def test_four_at_once_three_times_over(empty_database: str) -> None:
    """Each waits for the lock, which this test holds until all four do."""
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'advisory'"
    for _ in range(3):
        with ThreadPoolExecutor(4) as crowd, psycopg.connect(empty_database) as holder:
            holder.execute("SELECT pg_advisory_xact_lock(%s)", [LOCK])
            runs = [crowd.submit(init_db, empty_database) for _ in range(4)]
            until(lambda: fetch(empty_database, waiting) == (4,))
            holder.commit()
        states = sorted(run.result().stdout for run in runs)
        assert states == 3 * ["users: already there\n"] + ["users: created\n"]
        execute(empty_database, "DROP TABLE users")


def test_the_service_creates_nothing(empty_database: str) -> None:
    with Service(empty_database) as service:
        for answer in (service.register("a@example.com"), service.login("a@b.org")):
            assert answer.status_code == 503
        assert "python init_db.py" in service.log
    assert fetch(empty_database, "SELECT to_regclass('users')") == (None,)


# --- Models of one's own
@pytest.mark.parametrize(
    ("modules", "tables"),
    [
        (["notes"], {"users", "notes"}),
        (["notes.py"], {"users", "notes"}),
        (["app.models"], {"users", "tags"}),
        (["./notes.py"], {"users", "notes"}),
        (["app/models.py", "notes"], {"users", "tags", "notes"}),
    ],
)
def test_tables_of_ones_own(
    empty_database: str, project: Path, modules: list[str], tables: set[str]
) -> None:
    for state in ("created", "already there"):
        done = init_db(empty_database, *modules, folder=project)
        assert (done.returncode, done.stderr) == (0, "")
        assert set(done.stdout.splitlines()) == {f"{name}: {state}" for name in tables}


def test_a_table_in_another_schema(empty_database: str, project: Path) -> None:
    execute(empty_database, "CREATE SCHEMA elsewhere")
    for state in ("created", "already there"):
        done = init_db(empty_database, "visits", folder=project)
        lines = {f"users: {state}", f"elsewhere.visits: {state}"}
        assert set(done.stdout.splitlines()) == lines
    execute(empty_database, "ALTER TABLE elsewhere.visits DROP words; DROP TABLE users")
    refused = init_db(empty_database, "visits", folder=project)
    reason = "table elsewhere.visits lacks words"
    assert said(refused) == (1, "", f"error: no tables created: {reason}\n")


def test_the_example_in_main_py_runs_as_it_stands(
    empty_database: str, project: Path
) -> None:
    assert init_db(empty_database, "notes", folder=project).returncode == 0
    folder = ("--app-dir", str(project))
    with Service(empty_database, *folder, app="notes:app") as service:
        ann = service.account()
        ask = {"params": {"text": "milk"}, "headers": ann.headers}
        assert service.http.post("/notes", **ask).json() == 1
        assert service.http.post("/notes", params={"text": "milk"}).status_code == 401
    query = "SELECT user_id::text, text FROM notes"
    assert fetch(empty_database, query) == (ann.id, "milk")


def test_what_lies_beside_it_troubles_nobody(
    empty_database: str, project: Path
) -> None:
    (project / ".#notes.py").symlink_to("nobody@nowhere:1")
    (project / "stuff.py").mkdir()
    (project / "latin.py").write_bytes(b"# \xe9 (Base)\n")
    assert said(init_db(empty_database, folder=project)) == (0, "users: created\n", "")


# --- Refusals
@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("nowhere", "No module named 'nowhere'"),
        ("/nowhere.py", "No module named '/'"),
        ("app.nowhere", "No module named 'app.nowhere'"),
        ("../notes.py", "../notes.py is not in this folder"),
    ],
)
def test_a_module_that_is_not_there(
    empty_database: str, project: Path, module: str, reason: str
) -> None:
    refused = init_db(empty_database, module, folder=project)
    assert said(refused) == (1, "", f"error: no tables created: {reason}\n")


def test_an_older_table_that_lacks_a_column(tables: str, project: Path) -> None:
    execute(tables, "ALTER TABLE users DROP is_active")
    refused = init_db(tables, "notes", folder=project)
    reason = "table users lacks is_active"
    assert said(refused) == (1, "", f"error: no tables created: {reason}\n")
    assert fetch(tables, "SELECT to_regclass('notes')") == (None,)


def test_columns_that_it_does_not_know_are_left_alone(tables: str) -> None:
    execute(tables, "ALTER TABLE users ADD nickname text, ADD spot point")
    done = init_db(tables)
    assert (done.returncode, done.stdout) == (0, "users: already there\n")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda: {"host": "127.0.0.1", "port": free_port(), "sslmode": "disable"}, "Connection refused"),
        (lambda: {"host": "nowhere.invalid"}, "nowhere.invalid"),
        (lambda: {"password": "wrong-sesame"}, "authentication failed"),
        (lambda: {"database": "no_such_database"}, "does not exist"),
        (lambda: {"sslmod": "require"}, 'invalid connection option "sslmod"'),
    ],
    ids=["port", "host", "password", "database", "option"],
)  # fmt: skip
def test_without_the_database(
    empty_database: str, change: Callable[[], dict[str, Any]], reason: str
) -> None:
    url = change_url(empty_database, **change())
    refused = init_db(url)
    assert (refused.returncode, refused.stdout) == (1, "")
    (line,) = refused.stderr.splitlines()
    assert line.startswith("error: no tables created: ")
    assert reason in line
    assert re.search(":([^:@]+)@", url)[1] not in line
