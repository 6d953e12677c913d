"""What every test may ask for: a server, a database with tables in it, the running service."""

import os
from collections.abc import Iterator

import psycopg
import pytest
from harness import Postgres, Service, fresh_database, run


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """The URL of a PostgreSQL server: TEST_DATABASE_URL's, or a throw-away one's."""
    if given := os.environ.get("TEST_DATABASE_URL"):
        yield given
    else:
        with Postgres() as postgres:
            yield postgres.url("postgres")


@pytest.fixture
def empty_database(server: str) -> Iterator[str]:
    """The URL of a database without tables, one for each test."""
    with fresh_database(server) as database:
        yield database


@pytest.fixture(scope="module")
def database(server: str) -> Iterator[str]:
    """The URL of a database with its tables, one for each file of tests."""
    with fresh_database(server) as database:
        made = run("python", "init_db.py", database=database)
        assert made.returncode == 0, made.stderr
        yield database


@pytest.fixture(scope="module")
def service(database: str) -> Iterator[Service]:
    """The running service on that database."""
    with Service(database) as service:
        yield service


@pytest.fixture
def tables(server: str, database: str) -> Iterator[str]:
    """The URL of a database with its tables, one for each test, while nobody uses `database`."""
    with psycopg.connect(database) as connection:
        name = connection.info.dbname
    with fresh_database(server, like=name) as copy:
        yield copy
