"""What every test may ask for: a server, a database with tables in it, the running service."""

import os
from collections.abc import Iterator

import pytest

try:
    import psycopg
    from support.command import run
    from support.postgres import Postgres, fresh_database
    from support.service import Service
except ModuleNotFoundError as error:
    needed = "pip install -r tests/requirements.txt"
    pytest.exit(f"{error}. The tests in tests/ need more: {needed}", 2)

SLOWEST = ["test_errors.py", "test_pages.py", "test_faults.py"]  # they start first
SHOW_STATEMENT = """
from sqlalchemy.schema import CreateTable
from main import User, engine
print(CreateTable(User.__table__).compile(engine.sync_engine))
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run a file in one process, the longest one in two, and the slowest files first."""
    items.sort(key=lambda item: item.path.name not in SLOWEST)
    for number, item in enumerate(items):
        part = number % 2 if item.path.name == "test_errors.py" else ""
        item.add_marker(pytest.mark.xdist_group(f"{item.path.name}{part}"))


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """The URL of a PostgreSQL server: TEST_DATABASE_URL's, or a throw-away one's."""
    if given := os.environ.get("TEST_DATABASE_URL"):
        yield given
    else:
        with Postgres() as postgres:
            yield postgres.url("postgres")


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    """A server of one file's own, to which it can listen, and which it may stop."""
    with Postgres() as postgres:
        yield postgres


@pytest.fixture
def empty_database(server: str) -> Iterator[str]:
    """The URL of a database without tables, one for each test."""
    with fresh_database(server) as database:
        yield database


@pytest.fixture(scope="session")
def create_users() -> str:
    """The statement by which init_db.py creates the table, since each run takes a second."""
    made = run("python", "-c", SHOW_STATEMENT, database="postgresql://nowhere")
    made.check_returncode()
    return made.stdout


@pytest.fixture
def tables(empty_database: str, create_users: str) -> str:
    """The URL of a database with its tables, one for each test."""
    with psycopg.connect(empty_database) as connection:
        connection.execute(create_users)
    return empty_database


@pytest.fixture(scope="module")
def database(server: str) -> Iterator[str]:
    """The URL of a database with its tables, one for each file of tests."""
    with fresh_database(server) as database:
        run("python", "init_db.py", database=database).check_returncode()
        yield database


@pytest.fixture(scope="module")
def service(database: str) -> Iterator[Service]:
    """The running service on that database."""
    with Service(database) as service:
        yield service
