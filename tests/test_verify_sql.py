"""psql "$DATABASE_URL" -f verify.sql: what it shows, and that it only reads."""

import os
import re
from subprocess import CompletedProcess

import psycopg
import pytest
from support.command import run
from support.postgres import POSTGRES_BIN, system_postgres
from support.service import Service


def verify(database: str) -> CompletedProcess[str]:
    """By this wheel's psql, or by Debian's where the URL asks for TLS."""
    programs = system_postgres() if "sslmode=" in database else POSTGRES_BIN
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    command = ("sh", "-c", 'psql "$DATABASE_URL" -f verify.sql')
    return run(*command, database=database, PATH=path)


def test_it_shows_the_table_and_the_newest_five_users(tables: str) -> None:
    with Service(tables) as service:
        for number in range(7):
            service.register(f"user{number}@example.com")
    with psycopg.connect(tables) as connection:
        state = "SELECT * FROM users ORDER BY id"
        before = connection.execute(state).fetchall()
        connection.commit()
        shown = verify(tables)
        assert connection.execute(state).fetchall() == before
    assert (shown.returncode, shown.stderr) == (0, "")
    for line in [
        r"id +\| uuid +\| NO +\| gen_random_uuid\(\)",
        r"email +\| character varying +\| NO +\|",
        r"hashed_password +\| character varying +\| NO +\|",
        r"is_active +\| boolean +\| NO +\| true",
        r"created_at +\| timestamp with time zone +\| NO +\| now\(\)",
        r"users_email_key +\| UNIQUE +\| email",
        r"users_pkey +\| PRIMARY KEY +\| id",
    ]:
        assert re.search(f"^ {line}", shown.stdout, re.MULTILINE), line
    newest = re.findall(r"(user\d)@example\.com \| (\S+) +\|", shown.stdout)
    assert newest == [(f"user{number}", "$2b$04$") for number in (6, 5, 4, 3, 2)]


def test_a_table_of_the_same_name_in_another_schema(tables: str) -> None:
    with psycopg.connect(tables, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA auth; CREATE TABLE auth.users (nick text UNIQUE)")  # fmt: skip
    assert "nick" not in verify(tables).stdout


@pytest.mark.parametrize("made", [False, True])
def test_the_status_tells_whether_the_table_is_there(
    empty_database: str, made: bool
) -> None:
    if made:
        run("python", "init_db.py", database=empty_database).check_returncode()
    shown = verify(empty_database)
    assert shown.returncode == (0 if made else 3)
    assert ('relation "users" does not exist' in shown.stderr) == (not made)
