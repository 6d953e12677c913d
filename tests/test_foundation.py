"""What readers build on top, as the documentation of SQLAlchemy and of FastAPI says.

A reader's `notes.py` beside a copy of `main.py`, served as the README says, and a reader's own
tests. A wire before the database tells which statements went over it, and in how many round trips.
"""

import random
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from textwrap import dedent, indent
from typing import Any, NamedTuple
from xml.etree import ElementTree

import httpx
import psycopg
import pytest
from harness import ROOT, Postgres, Service, fresh_database, run
from pooler import Wire

# --- What a reader writes ---------------------------------------------------------
NOTES = """
import asyncio
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, BackgroundTasks, Depends, HTTPException, Request, WebSocket
from fastapi.responses import StreamingResponse
from sqlalchemy import ForeignKey, func, insert, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncAttrs, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Mapped, joinedload, mapped_column, relationship, selectinload

from main import (
    Base, CurrentUser, CurrentUserId, SessionDep, User, app, engine, get_current_user
)


class Note(AsyncAttrs, Base):
    __tablename__ = "notes"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(unique=True)
    made: Mapped[datetime] = mapped_column(server_default=func.now())
    author_id: Mapped[UUID | None] = mapped_column(ForeignKey("users.id"))
    author: Mapped[User | None] = relationship()


in_twos = APIRouter(
    prefix="/in-twos", tags=["notes"], dependencies=[Depends(get_current_user)]
)


@in_twos.get("/count")
async def count(session: SessionDep) -> int:
    return await session.scalar(select(func.count()).select_from(Note))


app.include_router(in_twos)


@app.get("/whoami")
async def whoami(user_id: CurrentUserId) -> UUID:
    return user_id


@app.post("/upload", max_body_size=100_000)
async def upload(request: Request) -> int:
    return len(await request.body())


@app.post("/small")
async def small(request: Request) -> int:
    return len(await request.body())


@app.websocket("/talk")
async def talk(socket: WebSocket, user_id: CurrentUserId) -> None:
    await socket.accept()
    await socket.send_text(str(user_id))
    await socket.close()


async def audited(user: CurrentUser, session: SessionDep) -> AsyncIterator[None]:
    yield
    session.add(Note(text=f"{user.email} at {datetime.now()}"))
    await session.commit()


@app.get("/audited", dependencies=[Depends(audited, scope="function")])
async def with_audit() -> str:
    return "audited"


@app.get("/as-it-is")
async def as_it_is(user: CurrentUser):
    return user


@app.get("/stream")
async def stream(user: CurrentUser, session: SessionDep) -> StreamingResponse:
    first = await session.scalar(text("SELECT 'first'"))

    async def lines() -> AsyncIterator[str]:
        yield f"{first}, {engine.pool.checkedout()} connections taken,"
        async with AsyncSession(engine) as own:
            rows = await own.stream_scalars(text("SELECT generate_series(1, 5000)"))
            async for number in rows:
                yield f" {number}"

    return StreamingResponse(lines())


@app.get("/stream-by-the-session")
async def stream_by_the_session(session: SessionDep, now: str) -> StreamingResponse:
    if now != "unused":
        await session.scalar(text("SELECT 'first'"))
    if now == "committed":
        await session.commit()

    async def lines() -> AsyncIterator[str]:
        yield await session.scalar(text("SELECT 'second'"))

    return StreamingResponse(lines())


@app.post("/later")
async def later(mark: str, user: CurrentUser, tasks: BackgroundTasks) -> None:
    async def write() -> None:
        async with AsyncSession(engine) as own, own.begin():
            own.add(Note(text=mark, author_id=user.id))

    tasks.add_task(write)


@app.get("/slow")
async def slow(user_id: CurrentUserId) -> str:
    await asyncio.sleep(15)
    return "done"
"""
ROUTE = """

@app.post("/{path}")
async def {name}({signature}):
{code}
"""
ALONE = "mark: str, session: SessionDep"
WITH_USER = "mark: str, user: CurrentUser, session: SessionDep"


class Row(NamedTuple):
    """A route's code, what it answers, and the notes that are there afterwards."""

    code: str
    status: int
    left: set[str]


WRITES = {
    "add and commit": Row(
        """
        session.add(Note(text=mark))
        await session.commit()
        """,
        200,
        {""},
    ),
    "read after the commit": Row(
        """
        note = Note(text=mark)
        session.add(note)
        await session.commit()
        return note.id, note.text, note.made
        """,
        200,
        {""},
    ),
    "begin": Row(
        """
        async with session.begin():
            session.add(Note(text=mark))
            session.add(Note(text=mark + " too"))
        """,
        200,
        {"", " too"},
    ),
    "begin and an exception": Row(
        """
        async with session.begin():
            session.add(Note(text=mark))
            await session.flush()
            raise LookupError
        """,
        500,
        set(),
    ),
    "flush and a refusal": Row(
        """
        session.add(Note(text=mark))
        await session.flush()
        raise HTTPException(409)
        """,
        409,
        set(),
    ),
    "flush and rollback": Row(
        """
        session.add(Note(text=mark))
        await session.flush()
        await session.rollback()
        """,
        200,
        set(),
    ),
    "flush and nothing more": Row(
        """
        session.add(Note(text=mark))
        await session.flush()
        """,
        200,
        set(),
    ),
    "rollback and then a commit": Row(
        """
        session.add(Note(text=mark))
        await session.flush()
        await session.rollback()
        session.add(Note(text=mark + " too"))
        await session.commit()
        """,
        200,
        {" too"},
    ),
    "two writes, the second fails": Row(
        """
        session.add(Note(text=mark))
        await session.flush()
        session.add(Note(text=mark))
        await session.commit()
        """,
        500,
        set(),
    ),
    "two statements, the second fails": Row(
        """
        async with session.begin():
            await session.execute(insert(Note).values(text=mark))
            await session.execute(insert(Note).values(text=mark))
        """,
        500,
        set(),
    ),
    "execute and commit": Row(
        """
        await session.execute(insert(Note).values(text=mark))
        await session.commit()
        """,
        200,
        {""},
    ),
    "execute and no commit": Row(
        """
        await session.execute(insert(Note).values(text=mark))
        """,
        200,
        set(),
    ),
    "a savepoint given up": Row(
        """
        session.add(Note(text=mark))
        try:
            async with session.begin_nested():
                session.add(Note(text=mark))
        except IntegrityError:
            session.add(Note(text=mark + " too"))
        await session.commit()
        """,
        200,
        {"", " too"},
    ),
    "a savepoint kept, and the whole given up": Row(
        """
        async with session.begin_nested():
            session.add(Note(text=mark))
        await session.rollback()
        """,
        200,
        set(),
    ),
    "not seen by another session before the commit": Row(
        """
        session.add(Note(text=mark))
        await session.flush()
        async with AsyncSession(engine) as other:
            seen = select(Note).where(Note.text == mark)
            assert await other.scalar(seen) is None
            await session.commit()
            assert await other.scalar(seen)
        """,
        200,
        {""},
    ),
    "rows by and by, which takes a transaction": Row(
        """
        session.add_all(Note(text=mark + end) for end in "abc")
        await session.flush()
        mine = select(Note).where(Note.text.startswith(mark)).order_by(Note.id)
        texts = [note.text async for note in await session.stream_scalars(mine)]
        assert texts == [mark + end for end in "abc"]
        """,
        200,
        set(),
    ),
    "another isolation, which the next one does not get": Row(
        """
        level = text("SHOW transaction_isolation")
        wish = {"isolation_level": "SERIALIZABLE"}
        await session.connection(execution_options=wish)
        assert await session.scalar(level) == "serializable"
        session.add(Note(text=mark))
        await session.commit()
        assert await session.scalar(level) == "read committed"
        """,
        200,
        {""},
    ),
    "a connection of the engine": Row(
        """
        async with engine.begin() as connection:
            await connection.execute(insert(Note).values(text=mark))
        async with engine.connect() as connection:
            await connection.execute(insert(Note).values(text=mark + " too"))
        """,
        200,
        {""},
    ),
    "a session maker of one's own": Row(
        """
        make_session = async_sessionmaker(engine)
        async with make_session.begin() as own:
            own.add(Note(text=mark))
        async with make_session() as own:
            own.add(Note(text=mark + " too"))
            await own.flush()
        """,
        200,
        {""},
    ),
}


class Mistake(NamedTuple):
    """A route's code, what it answers, and what the log says."""

    code: str
    status: int
    said: str


LOCK = 'await {}.execute(text("SELECT pg_advisory_xact_lock({})"))'
MISTAKES = {
    "unique violation": Mistake(
        """
        session.add_all([Note(text=mark), Note(text=mark)])
        await session.commit()
        """,
        500,
        "UniqueViolation",
    ),
    "foreign key violation": Mistake(
        """
        session.add(Note(text=mark, author_id=UUID(int=0)))
        await session.commit()
        """,
        500,
        "ForeignKeyViolation",
    ),
    "misspelt column": Mistake(
        'await session.execute(text("SELECT txet FROM notes"))',
        500,
        "UndefinedColumn",
    ),
    "division by zero": Mistake(
        'await session.execute(text("SELECT 1 / 0"))', 500, "DivisionByZero"
    ),
    "misspelt function": Mistake(
        'await session.execute(text("SELECT nwo()"))', 500, "UndefinedFunction"
    ),
    "misspelt SQL": Mistake(
        'await session.execute(text("SELEKT 1"))', 500, "SyntaxError"
    ),
    "lazy load": Mistake(
        """
        session.add(Note(text=mark, author_id=await session.scalar(select(User.id))))
        await session.flush()
        session.expunge_all()
        note = await session.scalar(select(Note).where(Note.text == mark))
        return note.author.email
        """,
        500,
        "MissingGreenlet",
    ),
    "no row where one must be": Mistake(
        "(await session.execute(select(Note).where(Note.id == -1))).one()",
        500,
        "NoResultFound",
    ),
    "table not created": Mistake(
        'await session.execute(text("SELECT * FROM tags"))',
        503,
        'relation "tags" does not exist; run: python init_db.py',
    ),
    "statement timeout": Mistake(
        """
        await session.execute(text("SET LOCAL statement_timeout = 10"))
        await session.execute(text("SELECT pg_sleep(10)"))
        """,
        503,
        "canceling statement due to statement timeout; try again",
    ),
    "lock timeout": Mistake(
        f"""
        {LOCK.format("session", 1)}
        async with AsyncSession(engine) as other:
            await other.execute(text("SET LOCAL lock_timeout = 10"))
            {LOCK.format("other", 1)}
        """,
        503,
        "canceling statement due to lock timeout; try again",
    ),
    "serialization failure": Mistake(
        """
        wish = {"isolation_level": "REPEATABLE READ"}
        await session.connection(execution_options=wish)
        change = update(User).values(is_active=User.is_active)
        await session.scalar(select(User.id))
        async with AsyncSession(engine) as other, other.begin():
            await other.execute(change)
        await session.execute(change)
        """,
        503,
        "could not serialize access due to concurrent update; try again",
    ),
    "deadlock": Mistake(
        f"""
        async with AsyncSession(engine) as other:
            {LOCK.format("session", 1)}
            {LOCK.format("other", 2)}
            await asyncio.gather(
                {LOCK.format("session", 2)[6:]},
                {LOCK.format("other", 1)[6:]},
            )
        """,
        503,
        "deadlock detected; try again",
    ),
}

USERS = {
    "change the copy": Mistake(
        "user.is_active = False", 500, "session.get(User, user.id)"
    ),
    "a new attribute on the copy": Mistake(
        'user.nickname = "Ann"', 500, "session.get(User, user.id)"
    ),
    "change the account": Mistake(
        """
        account = await session.get(User, user.id)
        account.email = f"new-{account.email}"
        await session.commit()
        await session.refresh(account)
        return account.email
        """,
        200,
        "",
    ),
    "change the account in a transaction": Mistake(
        """
        async with session.begin():
            account = await session.get(User, user.id, with_for_update=True)
            account.email = f"new-{account.email}"
        return account.email
        """,
        200,
        "",
    ),
    "change the account by a statement": Mistake(
        """
        change = update(User).where(User.id == user.id).returning(User.email)
        email = await session.scalar(change.values(email="new-" + User.email))
        await session.commit()
        return email
        """,
        200,
        "",
    ),
}

WRITE_ONE = """
    session.add(Note(text=mark, author_id=user.id))
    await session.commit()
    session.expunge_all()
    mine = select(Note).where(Note.text == mark)
"""
RELATED = {
    "selectinload": "note = await session.scalar(mine.options(selectinload(Note.author)))",
    "joinedload": "note = await session.scalar(mine.options(joinedload(Note.author)))",
    "refresh": """
        note = await session.scalar(mine)
        await session.refresh(note, attribute_names=["author"])
    """,
    "awaitable attributes": """
        note = await session.scalar(mine)
        await note.awaitable_attrs.author
    """,
    "the account as the author": """
        account = await session.get(User, user.id)
        note = Note(text=mark + " too", author=account)
        session.add(note)
        await session.commit()
    """,
}


def name_of(row: str) -> str:
    return re.sub(r"\W+", "_", row)


def routes() -> str:
    """notes.py: what stands above, and for each row of the tables a route."""
    made = NOTES
    for table in (WRITES, MISTAKES, USERS):
        for title, row in table.items():
            name = name_of(title)
            code = indent(dedent(row.code).strip(), "    ")
            for path, signature in ((name, ALONE), (f"with_user/{name}", WITH_USER)):
                if table is not USERS or signature is WITH_USER:
                    made += ROUTE.format(
                        path=path,
                        name=path.replace("/", "_"),
                        signature=signature,
                        code=code,
                    )
    for title, load in RELATED.items():
        name = name_of(title)
        code = dedent(WRITE_ONE) + dedent(load) + "\nreturn note.author.email"
        made += ROUTE.format(
            path=f"with_user/{name}",
            name=f"with_user_{name}",
            signature=WITH_USER,
            code=indent(code, "    "),
        )
    return made


# --- The reader's service ---------------------------------------------------------
@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    """A server that one can listen to, and that sees a deadlock at once."""
    with Postgres(deadlock_timeout="20ms") as postgres:
        yield postgres


@pytest.fixture(scope="module")
def server(postgres: Postgres) -> str:
    return postgres.url("postgres")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with a reader's notes.py in it."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("main.py", "init_db.py"):
        shutil.copy(ROOT / name, folder)
    (folder / "notes.py").write_text(routes())
    return folder


@pytest.fixture(scope="module")
def database(server: str, folder: Path) -> Iterator[str]:
    """The URL of a database with the reader's tables."""
    with fresh_database(server) as database:
        made = run("python", "init_db.py", "notes", database=database, folder=folder)
        assert (made.returncode, made.stderr) == (0, "")
        assert made.stdout == "users: created\nnotes: created\n"
        yield database


@pytest.fixture(scope="module")
def theirs(server: str, database: str) -> Iterator[str]:
    """The URL of a second one like it, made before anybody uses the first."""
    with psycopg.connect(database) as connection:
        name = connection.info.dbname
    with fresh_database(server, like=name) as copy:
        yield copy


@pytest.fixture(scope="module")
def wire(postgres: Postgres) -> Iterator[Wire]:
    with Wire(postgres.port) as wire:
        yield wire


@pytest.fixture(scope="module")
def service(database: str, theirs: str, folder: Path, wire: Wire) -> Iterator[Service]:
    """The reader's service, behind the wire."""
    url = wire.url(database)
    with Service(url, "--app-dir", str(folder), app="notes:app") as service:
        service.http.close()
        once = httpx.Limits(max_keepalive_connections=0)  # uvicorn hangs up after a 500
        service.http = httpx.Client(base_url=service.url, timeout=60, limits=once)
        yield service


class Account(NamedTuple):
    email: str
    headers: dict[str, str]


def account(service: Service) -> Account:
    """A new user, who is logged in."""
    email = f"{secrets.token_hex(4)}@example.com"
    assert service.register(email).status_code == 201
    token = service.login(email).json()["access_token"]
    return Account(email, {"Authorization": f"Bearer {token}"})


@pytest.fixture(scope="module")
def ann(service: Service) -> Account:
    return account(service)


@pytest.fixture(scope="module", autouse=True)
def slow(service: Service, ann: Account) -> Iterator[Future[httpx.Response]]:
    """A request that takes longer than a session may; the other tests go on meanwhile."""
    with ThreadPoolExecutor(1) as waits:
        yield waits.submit(
            httpx.get, f"{service.url}/slow", headers=ann.headers, timeout=30
        )


def rows(database: str, sql: str, *values: str) -> list[tuple[Any, ...]]:
    """What a query gives on a connection of its own."""
    with psycopg.connect(database) as connection:
        return connection.execute(sql, values).fetchall()


def left(database: str, mark: str) -> set[str]:
    """The ends of the notes that are there and begin with the mark."""
    found = rows(database, "SELECT text FROM notes WHERE text LIKE %s || '%%'", mark)
    return {text.removeprefix(mark) for (text,) in found}


def logged(service: Service, since: int, word: str) -> str:
    """The log from there on, once the word is in it: a traceback comes after its answer."""
    patience = time.monotonic() + 5
    while word not in service.log[since:] and time.monotonic() < patience:
        time.sleep(0.01)
    return service.log[since:]


def own_routes_are_one_round_trip_each(service: Service, wire: Wire) -> None:
    """Registering, logging in and a token check: one statement, without BEGIN or COMMIT."""
    email = f"{secrets.token_hex(4)}@example.com"
    for ask, verb in ((service.register, "INSERT"), (service.login, "SELECT")):
        before, trips = len(wire.statements), wire.round_trips
        answer = ask(email)
        assert answer.is_success
        said = [statement.split(" ")[0] for statement in wire.statements[before:]]
        assert (said, wire.round_trips - trips) == ([verb], 1)
    before, trips = len(wire.statements), wire.round_trips
    assert service.me(answer.json()["access_token"]).json()["email"] == email
    said = [statement.split(" ")[0] for statement in wire.statements[before:]]
    assert (said, wire.round_trips - trips) == (["SELECT"], 1)


# --- Writes -----------------------------------------------------------------------
@pytest.mark.parametrize("path", ["", "with_user/"], ids=["alone", "with a user"])
@pytest.mark.parametrize("title", WRITES)
def test_a_transaction_is_a_transaction(
    service: Service, database: str, wire: Wire, ann: Account, title: str, path: str
) -> None:
    """What SQLAlchemy's documentation says is saved is saved, and nothing else."""
    _, status, expected = WRITES[title]
    mark = secrets.token_hex(4)
    before = len(wire.statements)
    answer = service.http.post(
        f"/{path}{name_of(title)}", params={"mark": mark}, headers=ann.headers
    )
    assert answer.status_code == status, service.log
    assert left(database, mark) == expected
    said = [statement.split(" ")[0] for statement in wire.statements[before:]]
    assert said[: said.index("BEGIN")] == (["SELECT"] if path else [])
    assert said[-1] in ("COMMIT", "ROLLBACK")
    own_routes_are_one_round_trip_each(service, wire)


def test_all_at_once(service: Service, database: str, ann: Account) -> None:
    """Interleaved on shared connections, each still gets what it was promised."""

    def right(path: str, title: str) -> bool:
        if title == "the service's own":
            own = account(service)
            me = service.http.get("/auth/me", headers=own.headers)
            return me.json()["email"] == own.email
        _, status, expected = WRITES[title]
        mark = secrets.token_hex(4)
        asked = {"params": {"mark": mark}, "headers": ann.headers}
        answer = service.http.post(f"/{path}{name_of(title)}", **asked)
        return (answer.status_code, left(database, mark)) == (status, expected)

    titles = [*WRITES, *10 * ["the service's own"]]
    turns = 2 * [(path, title) for path in ("", "with_user/") for title in titles]
    random.Random(1).shuffle(turns)
    with ThreadPoolExecutor(6) as crowd:
        done = crowd.map(lambda turn: right(*turn), turns)
    assert [turn for turn, well in zip(turns, done, strict=True) if not well] == []
    open_ones = "SELECT query FROM pg_stat_activity WHERE state LIKE 'idle in %%'"
    assert rows(database, open_ones) == []


# --- Mistakes ---------------------------------------------------------------------
@pytest.mark.parametrize("path", ["", "with_user/"], ids=["alone", "with a user"])
@pytest.mark.parametrize("title", MISTAKES)
def test_a_mistake_is_named_and_what_passes_is_503(
    service: Service, ann: Account, wire: Wire, title: str, path: str
) -> None:
    """A mistake in one's own SQL is a 500 with its traceback; what passes is a 503."""
    _, status, said = MISTAKES[title]
    since = len(service.log)
    answer = service.http.post(
        f"/{path}{name_of(title)}",
        params={"mark": secrets.token_hex(4)},
        headers=ann.headers,
    )
    log = logged(service, since, said)
    assert answer.status_code == status, log
    assert said in log
    if status == 500:
        assert "Traceback" in log
        assert '/notes.py", line' in log
        for wrong in ("try again", "init_db.py", "ERROR unavailable"):
            assert wrong not in log + answer.text
    else:
        assert "Traceback" not in log
        assert answer.headers["retry-after"]
        advice = said.partition("; ")[2]
        assert answer.json() == {"detail": f"Unavailable, {advice}"}
    own_routes_are_one_round_trip_each(service, wire)


# --- The current user -------------------------------------------------------------
@pytest.mark.parametrize("title", [t for t in USERS if USERS[t].status == 500])
def test_a_change_to_the_copy_says_what_to_do(
    service: Service, ann: Account, title: str
) -> None:
    """It fails loudly, instead of being lost."""
    since = len(service.log)
    answer = service.http.post(
        f"/with_user/{name_of(title)}", params={"mark": ""}, headers=ann.headers
    )
    said = f"change `await {USERS[title].said}` instead"
    assert answer.status_code == 500
    assert said in logged(service, since, said)


@pytest.mark.parametrize("title", [t for t in USERS if USERS[t].status == 200])
def test_a_change_to_the_account_is_saved(service: Service, title: str) -> None:
    """Changed by the reader's route, and seen by the service's own at once."""
    bob = account(service)
    changed = service.http.post(
        f"/with_user/{name_of(title)}",
        params={"mark": secrets.token_hex(4)},
        headers=bob.headers,
    )
    assert changed.is_success, service.log
    seen = service.http.get("/auth/me", headers=bob.headers).json()["email"]
    assert (changed.json(), seen) == 2 * (f"new-{bob.email}",)


@pytest.mark.parametrize("title", RELATED)
def test_a_relationship(service: Service, ann: Account, title: str) -> None:
    """Each way that SQLAlchemy's documentation names to load it."""
    answer = service.http.post(
        f"/with_user/{name_of(title)}",
        params={"mark": secrets.token_hex(4)},
        headers=ann.headers,
    )
    assert (answer.status_code, answer.json()) == (200, ann.email), service.log


def test_the_user_as_an_answer_has_no_hash(service: Service, ann: Account) -> None:
    """Also from a route that names no model of its answer."""
    answer = service.http.get("/as-it-is", headers=ann.headers)
    assert answer.json().keys() == {"id", "email", "is_active", "created_at"}


# --- What FastAPI's documentation shows -------------------------------------------
GUARDED = ["/whoami", "/in-twos/count", "/audited", "/stream"]


@pytest.mark.parametrize("path", GUARDED)
@pytest.mark.parametrize("token", ["", "Bearer x"], ids=["no token", "a bad token"])
def test_a_guarded_route_refuses(service: Service, path: str, token: str) -> None:
    refused = service.http.get(path, headers={"Authorization": token})
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"].startswith("Bearer realm=")


@pytest.mark.parametrize("path", GUARDED)
def test_a_guarded_route_serves(service: Service, ann: Account, path: str) -> None:
    answer = service.http.get(path, headers=ann.headers)
    assert answer.status_code == 200, service.log


def test_a_user_who_left(service: Service, database: str) -> None:
    """A router's dependency asks the database, the id alone does not."""
    bob = account(service)
    with psycopg.connect(database) as connection:
        leave = "UPDATE users SET is_active = false WHERE email = %s"
        connection.execute(leave, [bob.email])
    statuses = [service.http.get(p, headers=bob.headers).status_code for p in GUARDED]
    assert statuses == [200, 401, 401, 401]


def test_a_dependency_that_writes_afterwards(
    service: Service, database: str, ann: Account
) -> None:
    """What stands behind its `yield` uses the session still."""
    before = left(database, ann.email)
    assert service.http.get("/audited", headers=ann.headers).status_code == 200
    assert len(left(database, ann.email) - before) == 1


def test_a_stream_goes_on_without_the_session(service: Service, ann: Account) -> None:
    """It reads by a session of its own, when the request's is closed."""
    begun = "first, 0 connections taken,"
    answer = service.http.get("/stream", headers=ann.headers)
    assert answer.text == " ".join([begun, *map(str, range(1, 5001))])


@pytest.mark.parametrize("now", ["unused", "in a transaction", "committed"])
def test_a_stream_by_the_closed_session(service: Service, now: str) -> None:
    """It fails loudly, instead of keeping a connection that nobody gives back."""
    since = len(service.log)
    with pytest.raises(httpx.RemoteProtocolError):
        service.http.get("/stream-by-the-session", params={"now": now})
    said = "This Session has been permanently closed"
    assert said in logged(service, since, said)


def test_a_background_task(service: Service, database: str, ann: Account) -> None:
    """It runs after the answer, with a session of its own."""
    mark = secrets.token_hex(4)
    asked = service.http.post("/later", params={"mark": mark}, headers=ann.headers)
    assert asked.status_code == 200
    patience = time.monotonic() + 5
    while not left(database, mark) and time.monotonic() < patience:
        time.sleep(0.01)
    assert left(database, mark) == {""}


def test_a_route_without_a_session_may_take_over_14_seconds(
    slow: Future[httpx.Response],
) -> None:
    assert (slow.result().status_code, slow.result().json()) == (200, "done")


def chunks(size: int) -> Iterator[bytes]:
    yield from size // 1000 * [1000 * b"x"]


@pytest.mark.parametrize("how", [bytes, chunks], ids=["announced", "in chunks"])
@pytest.mark.parametrize(
    ("path", "size", "status"),
    [
        ("/upload", 99_000, 200),
        ("/upload", 101_000, 413),
        ("/small", 16_000, 200),
        ("/small", 17_000, 413),
    ],
)
def test_a_limit_of_its_own_for_an_upload(
    service: Service, path: str, size: int, status: int, how: Any
) -> None:
    """`max_body_size=` raises the limit of one route and of no other."""
    answer = service.http.post(path, content=how(size))
    assert answer.status_code == status
    if status == 200:
        assert answer.json() == size


# --- A reader's own tests ---------------------------------------------------------
TESTS = """
import asyncio
import os
from datetime import datetime, timezone
from uuid import uuid4

import psycopg
import pytest
from fastapi import WebSocketDisconnect
from fastapi.testclient import TestClient
from httpx import ASGITransport, AsyncClient
from sqlalchemy import text
from sqlalchemy.ext.asyncio import (
    AsyncSession, async_sessionmaker, create_async_engine
)
from sqlalchemy.pool import NullPool

from main import (
    User, UserOut, engine, get_current_user, get_current_user_id, get_session,
    issue_token,
)
from notes import app

THEIRS = os.environ["THEIR_DATABASE_URL"]
their_engine = create_async_engine(THEIRS, poolclass=NullPool)
PASSWORD = "correct horse"
pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture
def email():
    return f"{uuid4().hex[:8]}@example.com"


@pytest.fixture(autouse=True)
def overrides():
    yield app.dependency_overrides
    app.dependency_overrides.clear()


def over_http():
    return AsyncClient(transport=ASGITransport(app=app), base_url="http://test")


def saved(database, email):
    query = "SELECT count(*) FROM users WHERE email = %s"
    with psycopg.connect(database) as connection:
        return connection.execute(query, [email]).fetchone()[0]


def header(user_id):
    return {"Authorization": f"Bearer {issue_token(user_id).access_token}"}


async def all_three(client, email):
    who = {"email": email, "password": PASSWORD}
    registered = await client.post("/auth/register", json=who)
    assert registered.status_code == 201
    assert (await client.post("/auth/register", json=who)).status_code == 409
    login = await client.post("/auth/login", json=who)
    assert login.status_code == 200
    token = {"Authorization": "Bearer " + login.json()["access_token"]}
    me = await client.get("/auth/me", headers=token)
    assert (me.status_code, me.json()) == (200, registered.json())
    ask = dict(params={"mark": email}, headers=token)
    assert (await client.post("/with_user/begin", **ask)).is_success
    return token


def all_three_in_turn(client, email):
    who = {"email": email, "password": PASSWORD}
    registered = client.post("/auth/register", json=who)
    assert registered.status_code == 201
    login = client.post("/auth/login", json=who)
    token = {"Authorization": "Bearer " + login.json()["access_token"]}
    assert client.get("/auth/me", headers=token).json() == registered.json()


# An ordinary session of another engine, on another database.
@pytest.mark.parametrize("expire", [True, False])
async def test_session_of_another_engine(overrides, email, expire):
    async def their_session():
        async with AsyncSession(their_engine, expire_on_commit=expire) as session:
            yield session

    overrides[get_session] = their_session
    async with over_http() as client:
        token = await all_three(client, email)
        # The check has left the session as the service's own is left: without a transaction.
        ask = dict(params={"mark": email[:8]}, headers=token)
        assert (await client.post("/with_user/begin", **ask)).status_code == 200
    assert (saved(THEIRS, email), saved(os.environ["DATABASE_URL"], email)) == (1, 0)


async def test_session_maker_on_the_engine_of_the_service(overrides, email):
    make_session = async_sessionmaker(engine)

    async def their_session():
        async with make_session() as session:
            yield session

    overrides[get_session] = their_session
    async with over_http() as client:
        await all_three(client, email)
    assert saved(os.environ["DATABASE_URL"], email) == 1
    await engine.dispose()


# A transaction that is there before the route: for row level security, say.
@pytest.mark.parametrize("given", [their_engine, engine], ids=["theirs", "ours"])
@pytest.mark.parametrize("how", ["a statement", "begin"])
async def test_session_with_a_transaction(overrides, email, given, how):
    async def their_session():
        async with AsyncSession(given) as session:
            if how == "a statement":
                await session.execute(text("SELECT set_config('app.id', '1', false)"))
                yield session
            else:
                async with session.begin():
                    yield session

    overrides[get_session] = their_session
    async with over_http() as client:
        who = {"email": email, "password": PASSWORD}
        registered = await client.post("/auth/register", json=who)
        assert registered.status_code == 201
        login = await client.post("/auth/login", json=who)
        token = {"Authorization": "Bearer " + login.json()["access_token"]}
        me = await client.get("/auth/me", headers=token)
        assert me.json() == registered.json()
    place = THEIRS if given is their_engine else os.environ["DATABASE_URL"]
    assert saved(place, email) == 1
    await given.dispose()


# "Joining a Session into an External Transaction", as SQLAlchemy has it.
@pytest.mark.parametrize("given", [their_engine, engine], ids=["theirs", "ours"])
async def test_session_in_an_external_transaction(overrides, email, given):
    async with given.connect() as connection:
        transaction = await connection.begin()
        async with AsyncSession(
            bind=connection, join_transaction_mode="create_savepoint"
        ) as session:
            overrides[get_session] = lambda: session
            async with over_http() as client:
                token = await all_three(client, email)
                mark = email[:8]
                ask = dict(params={"mark": mark}, headers=token)
                assert (await client.post("/add_and_commit", **ask)).is_success
                assert (await client.get("/in-twos/count", headers=token)).json() >= 1
        await transaction.rollback()
    for database in (THEIRS, os.environ["DATABASE_URL"]):
        assert saved(database, email) == 0
        with psycopg.connect(database) as connection:
            query = "SELECT count(*) FROM notes WHERE text = %s"
            assert connection.execute(query, [mark]).fetchone() == (0,)
    await given.dispose()


# One session for the test and for the app, in which a user was only added.
@pytest.mark.parametrize("given", [their_engine, engine], ids=["theirs", "ours"])
async def test_user_who_was_only_flushed(overrides, email, given):
    async with AsyncSession(given) as session:
        user = User(email=email, hashed_password="none")
        session.add(user)
        await session.flush()
        overrides[get_session] = lambda: session
        async with over_http() as client:
            me = await client.get("/auth/me", headers=header(user.id))
        assert (me.status_code, me.json()["email"]) == (200, email)
        await session.rollback()
    assert saved(THEIRS, email) == saved(os.environ["DATABASE_URL"], email) == 0
    await given.dispose()


def test_current_user(overrides, email):
    now = datetime.now(timezone.utc)
    words = dict(id=uuid4(), email=email, is_active=True, created_at=now)
    for user in (UserOut(**words), User(**words, hashed_password="a hash")):
        overrides[get_current_user] = lambda user=user: user
        with TestClient(app) as client:
            me = client.get("/auth/me")
        assert (me.status_code, me.json()["email"]) == (200, email)
        assert "hash" not in me.text


def test_current_user_id(overrides, email):
    with TestClient(app) as client:
        who = {"email": email, "password": PASSWORD}
        registered = client.post("/auth/register", json=who).json()
        overrides[get_current_user_id] = lambda: registered["id"]
        assert client.get("/whoami").json() == registered["id"]
        assert client.get("/auth/me").json() == registered
        assert client.get("/in-twos/count").is_success


# Event loops, one after the other.
def test_two_clients_one_after_the_other(email):
    for turn in "12":
        with TestClient(app) as client:
            all_three_in_turn(client, turn + email)
        assert engine.pool.checkedin() == 0  # no connection is left for the next loop


def test_client_with_a_loop_for_each_request(email):
    client = TestClient(app)
    for turn in "12":
        all_three_in_turn(client, turn + email)


@pytest.mark.parametrize("turn", ["1", "2"])
async def test_async_client_in_a_loop_of_its_own(email, turn):
    async with over_http() as client:
        token = await all_three(client, email)
        many = [client.get("/auth/me", headers=token) for _ in range(30)]
        assert all(answer.is_success for answer in await asyncio.gather(*many))
    await engine.dispose()  # else the waiting line stays bound to this loop


# What uvicorn serves with a library more.
def test_websocket(email):
    with TestClient(app) as client:
        user_id = uuid4()
        with client.websocket_connect("/talk", headers=header(user_id)) as socket:
            assert socket.receive_text() == str(user_id)
        with pytest.raises(WebSocketDisconnect):
            with client.websocket_connect("/talk"):
                pass
"""


@pytest.fixture(scope="module")
def outcomes(database: str, theirs: str, folder: Path) -> dict[str, str]:
    """What became of each of the reader's own tests, all run by one command."""
    (folder / "test_notes.py").write_text(TESTS)
    done = run(
        *("python", "-m", "pytest", "-q", "--tb=short", "--junitxml=said.xml"),
        *("-p", "no:cacheprovider", "-p", "anyio", "test_notes.py"),
        database=database,
        folder=folder,
        THEIR_DATABASE_URL=theirs,
        PYTEST_DISABLE_PLUGIN_AUTOLOAD="1",  # they take seconds to load
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    told: dict[str, str] = {}
    for case in ElementTree.parse(folder / "said.xml").iter("testcase"):
        name = case.attrib["name"].partition("[")[0]
        told[name] = told.get(name, "") + "".join(part.text or "" for part in case)
    return told


@pytest.mark.parametrize("name", re.findall(r"def (test_\w+)", TESTS))
def test_what_readers_test_with(outcomes: dict[str, str], name: str) -> None:
    """Overrides, recipes and clients of the documentation, in a reader's own tests."""
    assert outcomes[name] == ""
