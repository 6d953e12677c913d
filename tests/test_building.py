"""What readers build on top behaves as the documentation of SQLAlchemy and FastAPI says."""

import re
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent, indent

import psycopg
import pytest
from support.command import ROOT, run
from support.service import Account, Service, statuses, until

NOTES = """
import asyncio
from collections.abc import AsyncIterator
from uuid import UUID

from fastapi import BackgroundTasks, HTTPException, Request
from fastapi.responses import StreamingResponse
from sqlalchemy import ForeignKey, select, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column, relationship, selectinload

from main import Base, CurrentUser, SessionDep, User, app, autocommit_engine, engine


class Note(Base):
    __tablename__ = "notes"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(unique=True)
    author_id: Mapped[UUID | None] = mapped_column(ForeignKey(User.id))
    author: Mapped[User | None] = relationship()


started: list[str] = []


@app.on_event("startup")
async def start() -> None:
    started.append("yes")


@app.get("/started")
async def show_started() -> list[str]:
    return started


@app.post("/upload", max_body_size=100_000)
async def upload(request: Request) -> int:
    return len(await request.body())


@app.get("/minute")
async def minute(user: CurrentUser) -> int:
    await asyncio.sleep(16)
    return autocommit_engine.pool.checkedout() + engine.pool.checkedout()


@app.get("/slow")
async def slow(session: SessionDep) -> None:
    await session.execute(text("SELECT pg_sleep(8)"))


@app.get("/stream")
async def stream(session: SessionDep) -> StreamingResponse:
    async def lines() -> AsyncIterator[str]:
        rows = await session.stream_scalars(text("SELECT generate_series(1, 3000)"))
        async for number in rows:
            yield f" {number}"

    return StreamingResponse(lines())


@app.post("/later")
async def later(
    mark: str, user: CurrentUser, session: SessionDep, tasks: BackgroundTasks
) -> None:
    async def write(own: AsyncSession, text: str) -> None:
        own.add(Note(text=text, author_id=user.id))
        await own.commit()

    async def write_alone() -> None:
        async with AsyncSession(engine) as own:
            await write(own, mark + " too")

    tasks.add_task(write, session, mark)
    tasks.add_task(write_alone)
"""
ROUTE = """

@app.post("/{name}")
async def {name}(mark: str, user: CurrentUser, session: SessionDep):
{code}
"""
# A route's code, its status, the notes that are there afterwards, and what the log says.
ROUTES: dict[str, tuple[str, int, set[str], str]] = {
    "add and commit, then read": (
        """
        note = Note(text=mark)
        session.add(note)
        await session.commit()
        return note.id, note.text
        """,
        200, {""}, "",
    ),
    "two writes in a transaction": (
        """
        async with session.begin():
            session.add(Note(text=mark))
            session.add(Note(text=mark + " too"))
        """,
        200, {"", " too"}, "",
    ),
    "an exception in a transaction": (
        """
        async with session.begin():
            session.add(Note(text=mark))
            await session.flush()
            raise LookupError
        """,
        500, set(), "LookupError",
    ),
    "a refusal after a flush": (
        """
        session.add(Note(text=mark))
        await session.flush()
        raise HTTPException(409)
        """,
        409, set(), "",
    ),
    "a relationship loaded by the query": (
        """
        session.add(Note(text=mark, author_id=user.id))
        await session.commit()
        session.expunge_all()
        mine = select(Note).where(Note.text == mark).options(selectinload(Note.author))
        assert (await session.scalar(mine)).author.email == user.email
        """,
        200, {""}, "",
    ),
    "a relationship that was not loaded": (
        """
        session.add(Note(text=mark, author_id=user.id))
        await session.flush()
        session.expunge_all()
        (await session.scalar(select(Note).where(Note.text == mark))).author.email
        """,
        500, set(), "MissingGreenlet",
    ),
    "a unique violation": (
        """
        session.add_all([Note(text=mark), Note(text=mark)])
        await session.commit()
        """,
        500, set(), "UniqueViolation",
    ),
    "a table that was not created": (
        'await session.execute(text("SELECT * FROM tags"))', 500, set(), "UndefinedTable"
    ),
    "a TimeoutError of the reader's": ("raise TimeoutError('mine')", 500, set(), "mine"),
    "a change to the copy": ("user.email = mark", 500, set(), "Instance is frozen"),
    "a change to the account": (
        """
        account = await session.get_one(User, user.id)
        account.email = f"new-{account.email}"
        await session.commit()
        """,
        200, set(), "",
    ),
}  # fmt: skip


def name_of(title: str) -> str:
    return re.sub(r"\W+", "_", title)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with a reader's notes.py in it."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("main.py", "init_db.py"):
        shutil.copy(ROOT / name, folder)
    routes = [
        ROUTE.format(name=name_of(title), code=indent(dedent(code).strip(), "    "))
        for title, (code, *_) in ROUTES.items()
    ]
    (folder / "notes.py").write_text(NOTES + "".join(routes))
    return folder


@pytest.fixture(scope="module")
def service(database: str, folder: Path) -> Iterator[Service]:
    """The reader's service."""
    made = run("python", "init_db.py", "notes", database=database, folder=folder)
    assert made.stdout == "users: already there\nnotes: created\n", made.stderr
    with Service(database, "--app-dir", str(folder), app="notes:app") as service:
        service.tracebacks = True
        yield service


@pytest.fixture(scope="module")
def ann(service: Service) -> Account:
    return service.account()


def left(database: str, mark: str) -> set[str]:
    """The ends of the notes that are there and begin with the mark."""
    query = "SELECT text FROM notes WHERE text LIKE %s || '%%'"
    with psycopg.connect(database) as connection:
        found = connection.execute(query, [mark]).fetchall()
    return {text.removeprefix(mark) for (text,) in found}


@pytest.mark.parametrize("title", ROUTES)
def test_a_route(service: Service, database: str, title: str) -> None:
    """What is saved and answered; a mistake is a 500 whose traceback names notes.py."""
    _, status, notes, said = ROUTES[title]
    mark, since = secrets.token_hex(6), len(service.log)
    user = service.account()
    ask = {"params": {"mark": mark}, "headers": user.headers}
    assert service.http.post(f"/{name_of(title)}", **ask).status_code == status
    assert left(database, mark) == notes
    until(lambda: said in service.log[since:])
    assert ('/notes.py", line' in service.log[since:]) == (status == 500)
    assert "database unavailable" not in service.log[since:]
    new = "new-" if title == "a change to the account" else ""
    assert service.me(user.token).json()["email"] == new + user.email


def test_a_route_of_a_minute_is_not_ended_and_holds_no_connection(
    service: Service, ann: Account
) -> None:
    (waiting,) = service.at_once(1, lambda: service.http.get("/minute", headers=ann.headers))  # fmt: skip
    assert (waiting.result().status_code, waiting.result().json()) == (200, 0)


def test_sixty_routes_that_wait_in_the_database_stop_nobody_else(
    service: Service, ann: Account
) -> None:
    slow = service.at_once(60, service.http.get, "/slow")
    time.sleep(1)
    own = service.at_once(20, service.me, ann.token)
    own += service.at_once(5, service.login, ann.email)
    assert statuses(own) == {200: 25}
    assert not any(answer.done() and answer.result().is_success for answer in slow)
    assert statuses(slow)[200] >= 10


def test_a_startup_event_of_the_reader_s_runs(service: Service) -> None:
    assert service.http.get("/started").json() == ["yes"]


def test_a_stream_by_the_session(service: Service) -> None:
    text = service.http.get("/stream").text
    assert text == " " + " ".join(map(str, range(1, 3001)))


def test_background_tasks(service: Service, database: str, ann: Account) -> None:
    mark = secrets.token_hex(6)
    ask = {"params": {"mark": mark}, "headers": ann.headers}
    assert service.http.post("/later", **ask).status_code == 200
    until(lambda: left(database, mark) == {"", " too"})


@pytest.mark.parametrize(("size", "status"), [(99_000, 200), (101_000, 413)])
def test_a_body_limit_of_its_own(service: Service, size: int, status: int) -> None:
    answer = service.http.post("/upload", content=size * b"x")
    assert answer.status_code == status


APPLICATION = """
from fastapi import FastAPI
from main import CurrentUser

app = FastAPI()

@app.get("/hello")
async def hello(user: CurrentUser) -> str:
    return user.email
"""


def test_an_application_of_the_reader_s_own_without_the_database(
    service: Service, ann: Account, tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text(APPLICATION)
    nowhere = "postgresql://ann@127.0.0.1:1/nowhere"
    with Service(nowhere, app="own:app", PYTHONPATH=str(tmp_path)) as own:
        answer = own.http.get("/hello", headers=ann.headers)
        assert answer.status_code == 503
        assert answer.json() == {"detail": "Database unavailable, try again later"}
        assert answer.headers["retry-after"] == "5"


# --- A reader's own tests
TESTS = """
import asyncio
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import httpx2
import pytest
from fastapi.testclient import TestClient

import main
from notes import app

PASSWORD = "correct horse"


def log_in(client):
    who = {"email": f"{uuid4().hex}@example.com", "password": PASSWORD}
    assert client.post("/auth/register", json=who).status_code == 201
    token = client.post("/auth/login", json=who).json()["access_token"]
    return who, {"Authorization": f"Bearer {token}"}


@pytest.mark.parametrize("turn", [1, 2, 3])
def test_forty_requests_at_once_in_a_client(turn):
    with TestClient(app) as client, ThreadPoolExecutor(40) as crowd:
        who, headers = log_in(client)
        me = lambda _: client.get("/auth/me", headers=headers).status_code
        assert set(crowd.map(me, range(40))) == {200}
        login = lambda _: client.post("/auth/login", json=who).status_code
        assert set(crowd.map(login, range(40))) == {200}
    assert main.autocommit_engine.pool.checkedin() == 0


def test_a_client_with_a_loop_for_each_request():
    client = TestClient(app)
    for _ in range(2):
        log_in(client)


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.mark.anyio
@pytest.mark.parametrize("turn", [1, 2])
async def test_an_async_client(turn):
    transport = httpx2.ASGITransport(app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
        who = {"email": f"{uuid4().hex}@example.com", "password": PASSWORD}
        assert (await client.post("/auth/register", json=who)).status_code == 201
        many = [client.post("/auth/login", json=who) for _ in range(30)]
        assert {answer.status_code for answer in await asyncio.gather(*many)} == {200}
    await main.engine.dispose()
    await main.autocommit_engine.dispose()
"""


def test_what_readers_test_with(database: str, service: Service, folder: Path) -> None:
    """docs/build.md has more of them, which test_pages.py runs."""
    (folder / "test_notes.py").write_text(TESTS)
    done = run(
        *("python", "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"),
        *("-p", "anyio", "test_notes.py"),
        database=database,
        folder=folder,
        PYTEST_DISABLE_PLUGIN_AUTOLOAD="1",  # they take seconds to load
    )
    assert done.returncode == 0, done.stdout + done.stderr
