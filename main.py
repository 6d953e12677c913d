"""A minimal authentication service: register, log in, and use an access token.

To protect routes of your own, save this as notes.py in the same folder:

    from uuid import UUID

    from sqlalchemy import ForeignKey
    from sqlalchemy.orm import Mapped, mapped_column

    from main import Base, CurrentUser, SessionDep, User, app

    class Note(Base):
        __tablename__ = "notes"

        id: Mapped[int] = mapped_column(primary_key=True)
        user_id: Mapped[UUID] = mapped_column(ForeignKey(User.id))
        text: Mapped[str]

    @app.post("/notes")
    async def add_note(text: str, user: CurrentUser, session: SessionDep) -> int:
        note = Note(user_id=user.id, text=text)
        session.add(note)
        await session.commit()
        return note.id

Then load the settings (see .env.example), create the table and start the service:

    python init_db.py notes
    uvicorn notes:app
"""

import asyncio
import logging
import os
import secrets
import sys
import unicodedata
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any
from uuid import UUID

import bcrypt
import jwt
from anyio import CapacityLimiter
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from psycopg.errors import UndefinedTable
from pydantic import (
    AfterValidator,
    AnyUrl,
    BaseModel,
    EmailStr,
    Field,
    UrlConstraints,
    ValidationError,
)
from sqlalchemy import DateTime, Executable, bindparam, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.engine import Row, make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
logger = logging.getLogger("auth")
logger.setLevel(logging.INFO)


# --- Settings -------------------------------------------------------------------------
POSTGRES_SCHEMES = ["postgresql", "postgres", "postgresql+psycopg"]
# Pydantic's own PostgresDsn also takes several hosts, which SQLAlchemy cannot read.
PostgresUrl = Annotated[
    AnyUrl, UrlConstraints(allowed_schemes=POSTGRES_SCHEMES, host_required=True)
]


class Settings(BaseModel):
    """The environment variables. A description is printed when its value is wrong."""

    DATABASE_URL: PostgresUrl = Field(
        description="a URL such as postgresql://user:password@host/database"
    )
    # HS256 needs a key of at least 32 bytes (RFC 7518, section 3.2). A PEM or SSH key,
    # which PyJWT would refuse at every login, contains spaces or line breaks.
    JWT_SECRET: str = Field(
        min_length=32,
        pattern=r"^\S+$",
        description="32 characters or more and no spaces, from: openssl rand -hex 32",
    )
    ACCESS_TOKEN_MINUTES: int = Field(
        30, ge=1, le=525_600, description="minutes, from 1 to 525600 (a year)"
    )
    # Each step up doubles the time that one password takes to hash.
    BCRYPT_ROUNDS: int = Field(12, ge=4, le=16, description="a number from 4 to 16")


try:
    settings = Settings.model_validate(dict(os.environ))
except ValidationError as error:
    # Pydantic's messages never contain the value, which may be a secret.
    for problem in error.errors():
        name = str(problem["loc"][0])
        expected = Settings.model_fields[name].description
        print(f"error: {name}: {problem['msg']}; expected {expected}", file=sys.stderr)
    print("To load the settings from .env: set -a; . ./.env; set +a", file=sys.stderr)
    # On status 3 `uvicorn --workers` gives up. On another status it would start the
    # failed worker again and again.
    sys.exit(3)


# --- Database -------------------------------------------------------------------------

# Many hosts print URLs that begin with postgres://, which SQLAlchemy does not know. Its
# name for PostgreSQL with the driver psycopg is postgresql+psycopg.
DATABASE_URL = make_url(str(settings.DATABASE_URL)).set(drivername="postgresql+psycopg")
CONNECT_ARGS: dict[str, Any] = {
    "connect_timeout": 8,  # seconds
    # PostgreSQL can keep a query that runs often, prepared, on a connection. Neon's pooler
    # may use another connection the next time. None: psycopg prepares no query.
    "prepare_threshold": None,
}
ENGINE_OPTIONS: dict[str, Any] = {
    "connect_args": CONNECT_ARGS,
    "pool_size": 10,
    "max_overflow": 0,
    "pool_timeout": 5,  # seconds to wait for a free connection
    "pool_pre_ping": True,  # Neon closes idle connections, so test before each use.
    "hide_parameters": True,  # Error messages must not contain hashes.
}

# For the sessions of your own routes.
engine = create_async_engine(DATABASE_URL, **ENGINE_OPTIONS)
# For the routes of this file. A session sends four messages to the database and waits for
# each: the test of the connection, BEGIN, the query, COMMIT. A single query needs only the
# test and the query. These connections are separate, so that slow routes of yours never
# make a login wait for one. A process opens up to 20 connections in all.
autocommit_engine = create_async_engine(
    DATABASE_URL, isolation_level="AUTOCOMMIT", **ENGINE_OPTIONS
)


class Base(DeclarativeBase):
    """The base class of all tables."""


class User(Base):
    __tablename__ = "users"

    id: Mapped[UUID] = mapped_column(
        primary_key=True, server_default=func.gen_random_uuid()
    )
    email: Mapped[str] = mapped_column(unique=True)
    hashed_password: Mapped[str]
    is_active: Mapped[bool] = mapped_column(server_default="true")
    created_at: Mapped[datetime] = mapped_column(
        DateTime(timezone=True), server_default=func.now()
    )


def unavailable(detail: str) -> HTTPException:
    """A 503, which asks the client to try again after five seconds."""
    return HTTPException(503, detail, {"Retry-After": "5"})


def describe_database_error(error: Exception) -> str:
    """One line for the log that says what went wrong, without the values of any row."""
    if isinstance(error, TimeoutError):
        return "no answer within 10 seconds"
    # SQLAlchemy keeps an error of the driver in .orig. An error of its own has no .orig.
    cause = getattr(error, "orig", error)
    # PostgreSQL may quote the row in the lines after the first.
    first_line = str(cause).partition("\n")[0]
    if isinstance(cause, UndefinedTable):
        return f"{first_line}; run: python init_db.py"
    return first_line


async def fetch_one(
    query: Executable, parameters: dict[str, Any] | None = None
) -> Row[Any] | None:
    """Run one query, whose changes are saved at once, and return its row or None.

    The row has the columns as attributes. It is not an object of a session, so a change
    to it would not be saved. Raises a 503 whenever the database does not answer.
    """
    try:
        # 10 seconds in all: to get a connection, to test it and to run the query.
        async with asyncio.timeout(10), autocommit_engine.connect() as connection:
            result = await connection.execute(query, parameters)
            return result.one_or_none()
    except (SQLAlchemyError, TimeoutError) as error:
        logger.error("database unavailable: %s", describe_database_error(error))
        raise unavailable("Database unavailable, try again later") from error


async def get_session() -> AsyncIterator[AsyncSession]:
    """Yield a SQLAlchemy session. One commit saves all changes before it, or none.

    It takes a connection at the first query and gives it back at a commit, at a
    rollback, or after the response. If none is free within 5 seconds, SQLAlchemy raises
    an error, which is a 500. It waits without limit for the result of a query.
    """
    # With the default, True, reading an object after a commit would load it again without
    # an await, which fails in async code.
    async with AsyncSession(engine, expire_on_commit=False) as session:
        yield session


# --- Passwords ------------------------------------------------------------------------

# A hash keeps one core busy for a quarter of a second, so hashing more passwords at once
# than there are cores would not be faster. A container may see more cores than it can
# use: hence at most 4. asyncio.Semaphore would do the same for one event loop only, and
# tests start several. anyio comes with FastAPI.
hashing_slots = CapacityLimiter(min(os.cpu_count() or 1, 4))

# A login with an unknown email is checked against this hash, which no password matches.
# It then takes as long as one with a known email, and does not tell which is which.
DUMMY_HASH = bcrypt.hashpw(
    secrets.token_bytes(32), bcrypt.gensalt(settings.BCRYPT_ROUNDS)
).decode()

# The first 7 characters of a hash are the version of bcrypt and the cost: $2b$12$.
HASH_PREFIX = DUMMY_HASH[:7]


def normalize_password(password: str) -> str:
    """Return the password in Unicode's composed form (NIST SP 800-63B-4).

    "é" may come as one character, or as "e" and an accent. Raises ValueError for a
    password that bcrypt could not tell from others: it reads no more than 72 bytes, and
    a NUL character ends a password.
    """
    password = unicodedata.normalize("NFC", password)
    if len(password.encode()) > 72 or "\0" in password:
        raise ValueError("must be 72 bytes of UTF-8 or fewer, without NUL characters")
    return password


async def run_in_thread(function: Callable[..., Any], *arguments: bytes) -> Any:
    """Run a function of bcrypt's in a thread, so that other requests go on meanwhile.

    Returns what the function does. Raises a 503 if no slot is free within 3 seconds.
    """
    try:
        async with asyncio.timeout(3):
            await hashing_slots.acquire()
    except TimeoutError as error:
        logger.error("too many logins: no slot was free to hash within 3 seconds")
        raise unavailable("Too many logins, try again later") from error
    try:
        return await asyncio.to_thread(function, *arguments)
    finally:
        hashing_slots.release()


async def hash_password(password: str) -> str:
    """Return the bcrypt hash of a password. Raises a 503 if too many are waiting."""
    salt = bcrypt.gensalt(settings.BCRYPT_ROUNDS)
    hashed: bytes = await run_in_thread(bcrypt.hashpw, password.encode(), salt)
    return hashed.decode()


async def verify_password(password: str, hashed_password: str) -> bool:
    """Return whether a hash is a password's. Raises a 503 if too many are waiting."""
    arguments = password.encode(), hashed_password.encode()
    try:
        is_right: bool = await run_in_thread(bcrypt.checkpw, *arguments)
    except ValueError:
        # The stored text is not a bcrypt hash. Hashing the password makes this refusal
        # take as long as any other.
        await hash_password(password)
        return False
    return is_right


async def renew_hash(user_id: UUID, password: str, old_hash: str) -> None:
    """Store a new hash, unless the password was changed meanwhile. Only log a failure."""
    try:
        update_hash = (
            update(User)
            .where(User.id == user_id, User.hashed_password == old_hash)
            .values(hashed_password=await hash_password(password))
            .returning(User.id)
        )
        await fetch_one(update_hash)
    except HTTPException:
        logger.warning("hash not renewed, the next login tries again: %s", user_id)


# --- What comes in and what goes out --------------------------------------------------
Email = Annotated[EmailStr, AfterValidator(str.lower)]
# The length is limited first, since normalizing a very long text takes long.
Password = Annotated[str, Field(max_length=72), AfterValidator(normalize_password)]


class Credentials(BaseModel):
    email: Email = Field(examples=["ann@example.com"])
    password: Password = Field(examples=["correct horse"])


class Registration(Credentials):
    # The minimum is added to the rules of Password. A login has no minimum: a password
    # that is too short is simply wrong.
    password: Password = Field(min_length=8, examples=["correct horse"])


class UserOut(BaseModel, frozen=True, from_attributes=True):
    """A read-only copy of a user without the hash."""

    id: UUID
    email: str
    is_active: bool
    created_at: datetime


class Token(BaseModel):
    access_token: str
    token_type: str
    expires_in: int = Field(description="seconds")


class ErrorOut(BaseModel):
    detail: str


# --- Access tokens --------------------------------------------------------------------
def create_access_token(user_id: UUID) -> str:
    """Return a signed token with the id of a user, valid for ACCESS_TOKEN_MINUTES."""
    expires = datetime.now(UTC) + timedelta(minutes=settings.ACCESS_TOKEN_MINUTES)
    claims = {"sub": str(user_id), "exp": expires}
    return jwt.encode(claims, settings.JWT_SECRET, algorithm="HS256")


def invalid_token() -> HTTPException:
    """The 401 for a token that is not accepted. The header says so to client libraries.

    Its words come from RFC 6750, section 3.
    """
    headers = {"WWW-Authenticate": 'Bearer error="invalid_token"'}
    return HTTPException(401, "Invalid access token", headers)


def read_access_token(token: str) -> UUID:
    """Return the id of the user in a token. Raises a 401 if the token is not valid."""
    try:
        claims = jwt.decode(
            token,
            settings.JWT_SECRET,
            # Never trust the algorithm that the token itself names (RFC 8725, 3.1).
            algorithms=["HS256"],
            options={"require": ["sub", "exp"]},
        )
        return UUID(claims["sub"])
    except (jwt.InvalidTokenError, ValueError) as error:
        raise invalid_token() from error


# --- Dependencies for routes ----------------------------------------------------------
SessionDep = Annotated[AsyncSession, Depends(get_session)]

# Every request with a token runs this query. Building it anew each time would make such a
# request 13 % slower, so it has a parameter, whose value fetch_one sends with it.
SELECT_USER_BY_ID = select(User).where(User.id == bindparam("user_id"))


async def get_current_user(
    credentials: Annotated[HTTPAuthorizationCredentials, Depends(HTTPBearer())],
) -> UserOut:
    """Return the active user whose id is in the access token.

    Raises a 401 if the token is missing (by HTTPBearer), if it is not valid, or if its
    user is gone or inactive, and a 503 if the database does not answer.
    """
    user_id = read_access_token(credentials.credentials)
    row = await fetch_one(SELECT_USER_BY_ID, {"user_id": user_id})
    if row is None or not row.is_active:
        raise invalid_token()
    return UserOut.model_validate(row)


# To change the account, a route also asks for a session:
# account = await session.get_one(User, user.id)
CurrentUser = Annotated[UserOut, Depends(get_current_user)]


# --- Routes ---------------------------------------------------------------------------
app = FastAPI(
    title="Authentication: register, log in, use the access token",
    max_body_size=16 * 1024,  # bytes; a larger body is answered with a 413
    # By default, POST /auth/login/ would be redirected to the host that the request
    # names, and some clients would send the password there.
    redirect_slashes=False,
    # Client code that is generated from the OpenAPI document then has register(), not
    # register_auth_register_post().
    generate_unique_id_function=lambda route: route.name,
    # Close all connections at the end. Tests start the application several times, each
    # time with another event loop, in which older connections would not work. This is not
    # lifespan=, with which startup events of yours would not run.
    on_shutdown=[engine.dispose, autocommit_engine.dispose],
    responses={
        400: {"model": ErrorOut, "description": "The body is not UTF-8"},
        413: {"description": "The body has more than 16 KiB"},
        503: {"model": ErrorOut},
    },
)


@app.post("/auth/register", status_code=201, responses={409: {"model": ErrorOut}})
async def register(registration: Registration) -> UserOut:
    """Create an account. The password has 8 characters or more, and at most 72 bytes.

    The 409 tells whether an email is taken. Only email verification could hide that.
    """
    hashed_password = await hash_password(registration.password)
    # Looking for the email first would not be safe: two requests could both find it free.
    insert_user = (
        insert(User)
        .values(email=registration.email, hashed_password=hashed_password)
        .on_conflict_do_nothing(index_elements=[User.email])
        .returning(User)
    )
    row = await fetch_one(insert_user)
    if row is None:
        logger.info("registration refused, email is taken: %s", registration.email)
        raise HTTPException(409, "Email already registered")
    logger.info("registered: %s as %s", row.email, row.id)
    return UserOut.model_validate(row)


@app.post("/auth/login", responses={401: {"model": ErrorOut}})
async def login(credentials: Credentials, response: Response) -> Token:
    """Exchange an email and a password for an access token."""
    row = await fetch_one(select(User).where(User.email == credentials.email))
    hashed_password = row.hashed_password if row else DUMMY_HASH
    is_right = await verify_password(credentials.password, hashed_password)
    if row is None or not row.is_active or not is_right:
        logger.info("login refused: %s", credentials.email)
        # The same answer for an unknown email, an inactive account and a wrong password.
        headers = {"WWW-Authenticate": "Bearer"}
        raise HTTPException(401, "Wrong email or password", headers)
    # The hash was made before BCRYPT_ROUNDS was changed, or by another program.
    if not row.hashed_password.startswith(HASH_PREFIX):
        await renew_hash(row.id, credentials.password, row.hashed_password)
    logger.info("logged in: %s", row.id)
    response.headers["Cache-Control"] = "no-store"  # RFC 6749, section 5.1
    return Token(
        access_token=create_access_token(row.id),
        token_type="bearer",
        expires_in=60 * settings.ACCESS_TOKEN_MINUTES,
    )


@app.get("/auth/me", responses={401: {"model": ErrorOut}})
async def me(user: CurrentUser) -> UserOut:
    """Return the user of the access token: the example of a protected route."""
    return user


# --- Errors ---------------------------------------------------------------------------
@app.exception_handler(RequestValidationError)
async def invalid_request(
    request: Request, error: RequestValidationError
) -> JSONResponse:
    """A 422 that names each wrong field, without what was sent for it.

    What was sent may be a password. It is in "input", and "ctx", the details of the
    message, may quote it. Both are removed from the error itself, which keeps this list,
    so that a traceback does not show them either.
    """
    problems = error.errors()
    for problem in problems:
        problem.pop("input", None)
        problem.pop("ctx", None)
    return JSONResponse({"detail": problems}, 422)
