"""Authentication service: register, log in, get an access token, use it.

Made to be read from top to bottom. It creates no table; `python init_db.py` does.
"""

import asyncio
import logging
import os
import re
import sys
import time
import unicodedata
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import partial
from typing import Annotated, Any, Literal, NoReturn

import bcrypt
import h11
import jwt
import psycopg
from email_validator import EmailNotValidError, validate_email
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from psycopg.conninfo import conninfo_to_dict
from psycopg.errors import UndefinedColumn, UndefinedTable
from pydantic import AfterValidator, BaseModel, Field
from sqlalchemy import DateTime, bindparam, event, func, make_url, select, true
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import ArgumentError, DBAPIError, InvalidatePoolError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# A child of uvicorn's own logger, so that plain `uvicorn main:app` shows its lines.
log = logging.getLogger("uvicorn.auth")


# --- Settings: four environment variables, read once, here ------------------------
def refuse(message: str) -> NoReturn:
    """Exit with one line on stderr; status 3 stops `uvicorn --workers` as well."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(3)


def whole_number(name: str, default: int, least: int, most: int) -> int:
    """The variable `name` as a number from `least` to `most`, or exit."""
    text = os.environ.get(name, str(default))
    if not re.fullmatch("[0-9]{1,9}", text) or not least <= int(text) <= most:
        refuse(f"{name} is not a whole number from {least} to {most}, like {default}")
    return int(text)


_url = os.environ.get("DATABASE_URL", "")
if not _url:
    refuse(
        "DATABASE_URL is not set: put it into .env, in quotes, then: "
        "set -a; . ./.env; set +a"
    )
try:
    # An @ in the password, unless written %40, would put its end into the host.
    if _url.count("@") > 1 or " " in _url or not _url.isprintable():
        raise ValueError
    conninfo_to_dict(_url)  # libpq, as in psql: refuses mysql://, ?typo=x and %00
    # SQLAlchemy is told to use psycopg 3; some hosts still write postgres://
    DATABASE_URL = make_url(re.sub("^postgres(ql)?:", "postgresql+psycopg:", _url))
    DATABASE_URL.get_dialect()().create_connect_args(DATABASE_URL)  # refuses ?port=x
    (DATABASE_URL.host or "").encode("idna")  # refuses names like a..b
except (ArgumentError, ValueError, psycopg.ProgrammingError):
    # Name the host, if it can be told from the password, and never the password.
    found = re.fullmatch(r"[^?@]*@([\w.-]+)([:/?][^@]*)?", _url)
    host = f" for {found[1]}" if found else ""
    refuse(f"DATABASE_URL{host} is not like postgresql://user:password@host/database")

JWT_SECRET = os.fsencode(os.environ.get("JWT_SECRET", ""))
if len(JWT_SECRET) < 32:  # RFC 7518 §3.2
    refuse("JWT_SECRET is not set to 32 bytes or more, make it: openssl rand -hex 32")
try:  # PyJWT takes no secret that reads like part of a key pair
    jwt.encode({}, JWT_SECRET, "HS256")
except jwt.InvalidKeyError:
    refuse("JWT_SECRET is part of a key pair, make another: openssl rand -hex 32")

ACCESS_TOKEN_SECONDS = 60 * whole_number("ACCESS_TOKEN_MINUTES", 30, 1, 999_999_999)
BCRYPT_ROUNDS = whole_number("BCRYPT_ROUNDS", 12, 4, 31)


# --- Database: engine, model, statements ------------------------------------------
CONNECT_ARGS = {
    "connect_timeout": 10,  # seconds
    "prepare_threshold": None,  # prepare nothing: a pooler may switch connections
    "client_encoding": "utf8",  # whatever the server's is, or PGCLIENTENCODING says
}

# AUTOCOMMIT: each statement commits itself, so no BEGIN or COMMIT costs a round trip.
# What session.add() collects is sent by `await session.commit()`. Several writes that
# belong together need a transaction: that commit() at the end, and this before them:
#   await session.connection(execution_options={"isolation_level": "READ COMMITTED"})
engine = create_async_engine(
    DATABASE_URL,
    isolation_level="AUTOCOMMIT",
    skip_autocommit_rollback=True,
    connect_args=CONNECT_ARGS,
    pool_size=20,
    max_overflow=0,
    pool_recycle=280,  # seconds of age; Neon suspends after 300 idle ones
    pool_use_lifo=True,  # a few busy connections rather than twenty resting ones
    hide_parameters=True,  # keeps hashes out of errors
)


@event.listens_for(engine.sync_engine, "checkout")
def ping_if_doubtful(connection: Any, record: Any, _: Any) -> None:
    """Before a connection is used, look whether the server has closed it.

    If it was last taken 5 seconds ago or more, also ask the server. When that fails, the
    pool replaces all that are open. `pool_pre_ping=True` would do, but asks every time:
    two round trips for each request instead of one.
    """
    now, last_taken = time.monotonic(), record.info.get("last_taken")
    record.info["last_taken"] = now
    if last_taken is None:
        return  # just opened, perhaps in the place of one that failed here
    pgconn = connection.driver_connection.pgconn
    try:
        pgconn.consume_input()  # reads the server's last message, if it sent one,
        pgconn.consume_input()  # and then meets the closed socket
        if now - last_taken >= 5:
            engine.dialect.do_ping(connection)
    except psycopg.Error as error:
        raise InvalidatePoolError from error


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "users"

    # Random, not 1, 2, 3: when the table is made anew, no old token names a new user.
    id: Mapped[uuid.UUID] = mapped_column(
        primary_key=True, server_default=func.gen_random_uuid()
    )
    email: Mapped[str] = mapped_column(unique=True)
    hashed_password: Mapped[str]
    is_active: Mapped[bool] = mapped_column(server_default=true())
    created_at: Mapped[datetime] = mapped_column(
        DateTime(timezone=True), server_default=func.now()
    )


# Built once, rather than anew for each request.
ADD_USER = insert(User).on_conflict_do_nothing().returning(User)
ACTIVE_USER = select(User).where(User.is_active)
ACTIVE_USER_BY_EMAIL = ACTIVE_USER.where(User.email == bindparam("email"))
ACTIVE_USER_BY_ID = ACTIVE_USER.where(User.id == bindparam("id"))


# --- Passwords: bcrypt ------------------------------------------------------------
def to_bytes(password: str) -> bytes:
    """The password as bcrypt gets it: UTF-8, except that a NUL becomes C0 80.

    bcrypt repeats a password and a NUL until it has 72 bytes, so "ab\\0ab" would open what
    "ab" opens. C0 80 stands for no character in UTF-8, so it cannot be mistaken.
    """
    return password.encode().replace(b"\0", b"\xc0\x80")


def normalize_password(password: str) -> str:
    """One spelling for all keyboards: Unicode's composed form (NIST SP 800-63B-4).

    Raises ValueError over 72 bytes of UTF-8, where a NUL counts two.
    """
    password = unicodedata.normalize("NFC", password)
    if len(to_bytes(password)) > 72:  # bcrypt reads no more
        raise ValueError("password is longer than 72 bytes of UTF-8")
    return password


# Hashing has threads of its own, one for each core, and never stops the event loop.
# On Linux each thread has its own niceness: all else on a core goes before hashing.
be_nice = partial(os.nice, 5) if sys.platform == "linux" else None
hashing = ThreadPoolExecutor(os.cpu_count(), initializer=be_nice)


async def hash_password(password: str) -> str:
    """The bcrypt hash of a password, after a quarter of a second or so at 12 rounds."""
    job = (bcrypt.hashpw, to_bytes(password), bcrypt.gensalt(BCRYPT_ROUNDS))
    return (await asyncio.get_running_loop().run_in_executor(hashing, *job)).decode()


async def check_password(password: str, hashed_password: str) -> bool:
    """Whether a hash is of this password; takes as long as making that hash did."""
    job = (bcrypt.checkpw, to_bytes(password), hashed_password.encode())
    return await asyncio.get_running_loop().run_in_executor(hashing, *job)


# What a login checks when no active user has the address, so that it takes as long as
# when one has, and its time does not tell who has an account. No password matches it.
NOBODYS_HASH = bcrypt.gensalt(BCRYPT_ROUNDS).decode() + 31 * "."


# --- Access tokens: JWT -----------------------------------------------------------
def issue_token(user_id: uuid.UUID) -> str:
    """An access token for a user: a JWT, good for ACCESS_TOKEN_SECONDS from now."""
    now = int(time.time())
    claims = {"sub": str(user_id), "iat": now, "exp": now + ACCESS_TOKEN_SECONDS}
    return jwt.encode(claims, JWT_SECRET, "HS256")


def read_token(token: str) -> uuid.UUID:
    """The user id in an access token.

    Raises jwt.InvalidTokenError when it is no JWT, is signed with another secret or
    algorithm, lacks one of three claims, has expired or comes from the future, and
    ValueError when `sub` is no UUID. It does not know whether there is such a user:
    get_current_user also refuses one who is deleted or inactive.
    """
    required = {"require": ["sub", "iat", "exp"]}
    # The algorithm is ours to say, never the token's (RFC 8725 §3.1).
    claims = jwt.decode(token, JWT_SECRET, algorithms=["HS256"], options=required)
    return uuid.UUID(claims["sub"])


# --- Schemas: what comes in, what goes out ----------------------------------------
def normalize_email(email: str) -> str:
    """The one spelling that an address is kept under: lower case, no blanks around.

    Raises ValueError when it is no address.
    """
    try:
        email = email.strip().lower().replace("ς", "σ")  # both are a small Σ
        return validate_email(email, check_deliverability=False).normalized
    except EmailNotValidError:  # whose own text quotes the input
        raise ValueError("not an email address") from None


def check_length(password: str) -> str:
    """The password, unless it has fewer than 8 characters: then ValueError."""
    if len(password) < 8:
        raise ValueError("password is shorter than 8 characters")
    return password


# Any max_length makes pydantic refuse half characters (lone surrogates) as well.
Text = Annotated[str, Field(max_length=1024)]
Email = Annotated[Text, AfterValidator(normalize_email)]
Password = Annotated[Text, AfterValidator(normalize_password)]


class Credentials(BaseModel):
    email: Email = Field(json_schema_extra={"format": "email"})
    password: Password  # no least length: at login a short guess is just wrong


class Registration(Credentials):
    password: Annotated[Password, AfterValidator(check_length)]


class UserOut(BaseModel):
    """What a route shows of a User: FastAPI leaves out the rest, the hash."""

    id: uuid.UUID
    email: str
    is_active: bool
    created_at: datetime


class AccessToken(BaseModel):
    access_token: str
    token_type: Literal["bearer"] = "bearer"
    expires_in: int = Field(ACCESS_TOKEN_SECONDS, description="seconds")


class Problem(BaseModel):
    detail: str


# --- Dependencies: what a route asks for in its signature -------------------------
async def get_session() -> AsyncIterator[AsyncSession]:
    """A session: takes a connection at the first statement, gives it back when closed."""
    async with AsyncSession(engine, expire_on_commit=False) as session:
        yield session


# scope="function": closed when the route returns, before the client is answered.
SessionDep = Annotated[AsyncSession, Depends(get_session, scope="function")]
BearerDep = Annotated[
    HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))
]


def unauthorized(detail: str, error: str = "") -> HTTPException:
    """A 401 with its challenge; `error` only when a token was sent (RFC 6750 §3)."""
    challenge = 'Bearer realm="auth"' + (f', error="{error}"' if error else "")
    return HTTPException(401, detail, headers={"WWW-Authenticate": challenge})


async def get_current_user_id(bearer: BearerDep) -> uuid.UUID:
    """The user id in the access token. Raises 401 when there is no token or a bad one.

    The database is not asked: the user may be deleted or inactive by now.
    """
    if bearer is None:
        raise unauthorized("Not authenticated")
    try:
        return read_token(bearer.credentials)
    except (jwt.InvalidTokenError, ValueError):
        raise unauthorized("Invalid access token", "invalid_token") from None


CurrentUserId = Annotated[uuid.UUID, Depends(get_current_user_id)]


async def get_current_user(user_id: CurrentUserId) -> User:
    """The active user whom the access token names. Raises 401, also if there is none.

    It is a copy, in no session: the connection is given back before the route begins.
    """
    async with engine.connect() as connection:  # a session takes a third longer
        found = await connection.execute(ACTIVE_USER_BY_ID, {"id": user_id})
    row = found.mappings().one_or_none()
    if row is None:
        raise unauthorized("Invalid access token", "invalid_token")
    return User(**row)


CurrentUser = Annotated[User, Depends(get_current_user)]


# --- Application: its limits, and what clients could do to uvicorn ----------------
PROBLEM = {"model": Problem}
# Too large a Content-Length gets Starlette's plain text, a body that grows too large JSON.
TOO_LARGE = PROBLEM | {"content": {"text/plain": {"schema": {"type": "string"}}}}

app = FastAPI(
    title="auth",
    on_shutdown=[engine.dispose],
    responses={413: TOO_LARGE, 503: PROBLEM},
)

DEADLINE_SECONDS = 14  # a hung query can take 10 more, while psycopg cancels it


class TimedRoute(APIRoute):
    """A route with a limit, for reading the body and making the answer together.

    Raises TimeoutError after DEADLINE_SECONDS.
    """

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:
        handle = super().get_route_handler()

        async def handle_in_time(request: Request) -> Response:
            async with asyncio.timeout(DEADLINE_SECONDS):
                return await handle(request)

        return handle_in_time


app.router.route_class = TimedRoute  # for @app.get and its like


def harden(inner: ASGIApp) -> ASGIApp:
    """Middleware against three things that a client could do to uvicorn.

    1. X-Forwarded-For can write anything into the log: it is escaped.
    2. A body in chunks need not end, and uvicorn reads on: the answer ends the connection.
    3. When a client has left, or has sent what is not HTTP and got uvicorn's own answer,
       the route's answer fails: one line, not a traceback, which quotes the refused body.
    """

    async def hardened(scope: Scope, receive: Receive, send: Send) -> None:
        if client := scope.get("client"):
            scope["client"] = (ascii(client[0])[1:-1], client[1])  # without its quotes
        chunked = b"transfer-encoding" in dict(scope.get("headers", ()))

        async def send_safely(message: Message) -> None:
            if chunked and message["type"] == "http.response.start":
                message["headers"].append((b"connection", b"close"))
            try:
                await send(message)
            except (RuntimeError, h11.LocalProtocolError) as error:
                log.info("answer not sent: %s", error)

        await inner(scope, receive, send_safely)

    return hardened


app.add_middleware(RequestBodyLimitMiddleware, max_body_size=16 * 1024)  # bytes
app.add_middleware(harden)  # the last one is the outermost: it sees the limit's 413


def without_traceback(record: logging.LogRecord) -> bool:
    """Log filter: one line is enough for asyncio's errors that any client can cause."""
    if record.getMessage().startswith(("Fatal error", "socket.accept")):
        record.exc_info = None
    return True


logging.getLogger("asyncio").addFilter(without_traceback)


# --- Errors -----------------------------------------------------------------------
@app.exception_handler(RequestValidationError)
async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
    """422, without the `input` of FastAPI's own, which sends the password back."""
    plain = {"model_attributes_type": "Send JSON, as Content-Type: application/json"}
    detail = [
        {"type": e["type"], "loc": e["loc"], "msg": plain.get(e["type"], e["msg"])}
        for e in error.errors()
    ]
    return JSONResponse({"detail": detail}, 422)


def database_message(error: DBAPIError) -> str:
    """What the database said, on one line; not its DETAIL, which can quote a row."""
    return " ".join((error.orig.diag.message_primary or str(error.orig)).split())


@app.exception_handler(TimeoutError)
@app.exception_handler(DBAPIError)
async def unavailable(_: Request, error: TimeoutError | DBAPIError) -> JSONResponse:
    """503 for any error of the database, and for no answer in time; the log says why."""
    detail = "Temporarily unavailable, try again"
    if isinstance(error, TimeoutError):
        why = f"no answer within {DEADLINE_SECONDS} seconds"
    else:
        why = database_message(error)
        if isinstance(error.orig, (UndefinedTable, UndefinedColumn)):
            detail = "A table or a column is missing, run: python init_db.py"
            why = f"{why}. {detail}"
    log.error("unavailable: %s", why)
    return JSONResponse({"detail": detail}, 503, headers={"Retry-After": "5"})


# --- Routes -----------------------------------------------------------------------
# Yours go below, or into a file of their own that says `from main import CurrentUser,
# SessionDep, app` and is run by `uvicorn notes:app`. A model goes beside User, for
# init_db.py to see. `user: CurrentUser` in the signature protects a route.
# `user_id: CurrentUserId` protects it without a query, so a deleted or inactive user
# still passes. `session: SessionDep` gives the database; catch the IntegrityError of a
# constraint that your statement may break, or it is a 503. An APIRouter of yours keeps
# the limit with route_class=TimedRoute.


# 400 is FastAPI's own, for a body that cannot be decoded.
@app.post("/auth/register", status_code=201, responses={400: PROBLEM, 409: PROBLEM})
async def register(new: Registration, session: SessionDep) -> UserOut:
    """Create an account. The unique constraint decides who came first."""
    hashed_password = await hash_password(new.password)  # holds no connection yet
    row = {"email": new.email, "hashed_password": hashed_password}
    user = await session.scalar(ADD_USER, row)  # takes one; the return gives it back
    if user is None:
        log.info("registration refused, taken: %a", new.email)
        raise HTTPException(409, "Email already registered")
    log.info("registered: %a as %s", new.email, user.id)
    return user


@app.post("/auth/login", responses={400: PROBLEM, 401: PROBLEM})
async def login(
    credentials: Credentials, session: SessionDep, response: Response
) -> AccessToken:
    """Exchange an email and a password for an access token."""
    user = await session.scalar(ACTIVE_USER_BY_EMAIL, {"email": credentials.email})
    await session.close()  # gives the connection back before the slow part
    hashed_password = user.hashed_password if user else NOBODYS_HASH
    if not await check_password(credentials.password, hashed_password) or not user:
        log.info("login refused: %a", credentials.email)
        raise unauthorized("Wrong email or password")
    log.info("logged in: %s", user.id)
    response.headers["Cache-Control"] = "no-store"  # RFC 6749 §5.1
    return AccessToken(access_token=issue_token(user.id))


@app.get("/auth/me", responses={401: PROBLEM})
async def me(user: CurrentUser) -> UserOut:
    """The user whom the access token names: the pattern for a protected route."""
    return user
