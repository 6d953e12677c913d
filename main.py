"""Authentication: register, log in, use the access token. Tables: see init_db.py."""

import asyncio
import gc
import logging
import os
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from hmac import compare_digest
from typing import Annotated, Any
from unicodedata import normalize
from uuid import UUID

import bcrypt
import jwt
import pydantic
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.requests import HTTPConnection
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from psycopg.errors import ReadOnlySqlTransaction, UndefinedTable
from pydantic import AfterValidator, BaseModel, BeforeValidator, EmailStr, Field
from sqlalchemy import DateTime, bindparam, exc, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from starlette.middleware.body_limit import RequestBodyLimitMiddleware

logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
log = logging.getLogger("auth")
gc.set_threshold(10_000)  # collect after so many objects: token checks take 7 % less


# --- Settings: environment variables ----------------------------------------------
class Settings(BaseModel):  # a description says what is wrong, and what to do
    DATABASE_URL: str = Field(
        pattern=r"^postgresql://([^\s@/]+@)?([\w-]+\.?)*(:\d+)?([/?][^\s@]*)?$",
        description="is no postgresql:// URL, load .env: set -a; . ./.env; set +a",
    )
    JWT_SECRET: bytes = Field(  # RFC 7518 §3.2
        min_length=32, description="needs 32 bytes, load .env, or: openssl rand -hex 32"
    )
    ACCESS_TOKEN_MINUTES: int = Field(30, ge=1, description="is not 1 or more")
    BCRYPT_ROUNDS: int = Field(12, ge=4, le=31, description="is not from 4 to 31")


try:
    settings = Settings.model_validate(dict(os.environ))
except pydantic.ValidationError as error:
    for name in [str(problem["loc"][0]) for problem in error.errors()]:
        print("error:", name, Settings.model_fields[name].description, file=sys.stderr)
    sys.exit(3)  # uvicorn's own for a failed start: --workers gives up, too


# --- Database ---------------------------------------------------------------------
def look_at_socket(connection: Any) -> bool:
    """True if a connection is open, without a round trip; if not, psycopg raises."""
    for _ in range(2):  # the server's goodbye, if any, then the end of the stream
        connection.driver_connection.pgconn.consume_input()
    return True


# Seconds; and no prepared statements, for a pooler may switch connections.
CONNECT_ARGS = {"connect_timeout": 10, "prepare_threshold": None}
autocommit_engine = create_async_engine(  # the service's own: each statement commits
    settings.DATABASE_URL,
    isolation_level="AUTOCOMMIT",
    skip_autocommit_rollback=True,
    connect_args=CONNECT_ARGS,
    pool_size=20,
    max_overflow=0,
    pool_recycle=280,  # seconds of age; Neon suspends after 300 idle ones
    pool_pre_ping=True,  # by look_at_socket
    hide_parameters=True,  # or SQLAlchemy's errors would quote hashes
)
setattr(autocommit_engine.dialect, "do_ping", look_at_socket)  # noqa: B010
# Yours, from the same pool: its sessions and connections begin and commit as usual.
engine = autocommit_engine.execution_options(isolation_level="READ COMMITTED")


class Base(DeclarativeBase):
    type_annotation_map = {datetime: DateTime(timezone=True)}  # noqa: RUF012


class User(Base):
    __tablename__ = "users"
    id: Mapped[UUID] = mapped_column(
        primary_key=True, server_default=func.gen_random_uuid()
    )
    email: Mapped[str] = mapped_column(unique=True)
    hashed_password: Mapped[str]
    is_active: Mapped[bool] = mapped_column(server_default="true")
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


ADD_USER = insert(User).on_conflict_do_nothing(index_elements=["email"]).returning(User)
USER_BY_EMAIL = select(User).where(User.is_active, User.email == bindparam("email"))
USER_BY_ID = select(User).where(User.is_active, User.id == bindparam("id"))


async def get_session() -> AsyncIterator[AsyncSession]:
    """Your session: commit it yourself. After 14 seconds TimeoutError, a 503."""
    session = AsyncSession(engine, expire_on_commit=False, close_resets_only=False)
    async with asyncio.timeout(14), session:  # and up to 10 more to end a hung query
        yield session


def fetch_user(session: Session, /, statement: Any, **values: Any) -> Any:
    """For run_sync: a statement's user, or None. Joins a transaction; ADD_USER ends it."""
    begun = session.in_transaction()
    # Spares BEGIN and COMMIT, unless a test gave a session of another engine.
    if session.bind is engine.sync_engine and not begun:
        with autocommit_engine.sync_engine.connect() as one:
            return one.execute(statement, values).one_or_none()
    row = session.connection().execute(statement, values).one_or_none()
    if not begun or statement is ADD_USER:
        session.commit()
    return row


# --- Passwords: bcrypt ------------------------------------------------------------
# One thread for each core, at nice 5, so that the event loop goes on, and goes first.
be_nice = (lambda: os.nice(5)) if sys.platform == "linux" else None
cores = ThreadPoolExecutor(os.cpu_count(), initializer=be_nice)
places = asyncio.Semaphore(9 * (os.cpu_count() or 1))  # 3 seconds of work at cost 12
# For an address nobody has: equal time hides that, and no password gives this hash.
NOBODYS_HASH = bcrypt.gensalt(settings.BCRYPT_ROUNDS).decode() + 31 * "."


def normalize_password(password: Any) -> Any:
    """One spelling for all keyboards: Unicode's composed form (NIST SP 800-63B-4)."""
    if isinstance(password, str):
        password = normalize("NFC", password[:109])  # 108 may shrink to 72 bytes
        if len(password.encode()) > 72 or "\0" in password:  # surrogates raise too
            raise ValueError("password is longer than 72 bytes of UTF-8, or has a NUL")
    return password  # fits the 72 bytes that bcrypt reads


async def hash_password(password: str, salt: str = "") -> str:
    """The bcrypt hash, with the salt in another hash if given. 503 if queue is full."""
    if places.locked():
        raise HTTPException(503, "Too many logins, try again", {"Retry-After": "5"})
    work = password.encode(), salt.encode() or bcrypt.gensalt(settings.BCRYPT_ROUNDS)
    async with places:
        return (await asyncio.wrap_future(cores.submit(bcrypt.hashpw, *work))).decode()


# --- Schemas: what comes in, what goes out ----------------------------------------
Email = Annotated[EmailStr, AfterValidator(lambda it: normalize("NFC", it.lower()))]
Password = Annotated[str, BeforeValidator(normalize_password), Field(max_length=72)]


class Credentials(BaseModel):
    email: Email = Field(max_length=254, examples=["ann@example.com"])
    password: Password = Field(examples=["correct horse"])


class Registration(Credentials):
    password: Password = Field(min_length=8, examples=["correct horse"])


class UserOut(BaseModel, from_attributes=True):
    id: UUID
    email: str
    is_active: bool
    created_at: datetime

    def __setattr__(self, name: str, value: object) -> None:
        raise TypeError("a copy: change `await session.get(User, user.id)` instead")


class Token(BaseModel):
    access_token: str
    token_type: str
    expires_in: int = Field(description="seconds")


# --- Tokens and dependencies: what a route asks for in its signature --------------
# scope="function": closed when the route returns, before the client is answered.
SessionDep = Annotated[AsyncSession, Depends(get_session, scope="function")]


def issue_token(user_id: UUID) -> Token:
    """An access token for a user, good for ACCESS_TOKEN_MINUTES from now."""
    now, seconds = int(datetime.now().timestamp()), 60 * settings.ACCESS_TOKEN_MINUTES
    claims = {"sub": str(user_id), "iat": now, "exp": now + seconds}
    token = jwt.encode(claims, settings.JWT_SECRET, "HS256")
    return Token(access_token=token, token_type="bearer", expires_in=seconds)


def unauthorized(detail: str, error: str = "") -> HTTPException:
    """A 401 with its challenge; `error` only when a token was sent (RFC 6750 §3)."""
    challenge = 'Bearer realm="auth"' + (f', error="{error}"' if error else "")
    return HTTPException(401, detail, {"WWW-Authenticate": challenge})


class BearerToken(HTTPBearer):
    async def __call__(self, request: HTTPConnection) -> UUID:  # type: ignore[override]
        """The token's user id, not looked up; WebSockets' too. 401 if none or bad."""
        if not (sent := await super().__call__(request)):
            raise unauthorized("Not authenticated")
        token, key, need = sent.credentials, settings.JWT_SECRET, ["sub", "iat", "exp"]
        try:  # the algorithm is ours to say, never the token's (RFC 8725 §3.1)
            return UUID(jwt.decode(token, key, ["HS256"], {"require": need})["sub"])
        except (jwt.InvalidTokenError, ValueError):
            raise unauthorized("Invalid access token", "invalid_token") from None


get_current_user_id = BearerToken(auto_error=False, description="Paste an access_token")
CurrentUserId = Annotated[UUID, Depends(get_current_user_id)]


async def get_current_user(user_id: CurrentUserId, session: SessionDep) -> UserOut:
    """The active user whom the access token names. Raises 401 if there is none."""
    if user := await session.run_sync(fetch_user, USER_BY_ID, id=user_id):
        return UserOut.model_validate(user)
    raise unauthorized("Invalid access token", "invalid_token")


CurrentUser = Annotated[UserOut, Depends(get_current_user)]


# --- Application and its errors ---------------------------------------------------
TEXT: dict[str, Any] = {"model": pydantic.create_model("Error", detail=str)}
FIELD = pydantic.create_model("Field", type=str, loc=list[str | int], msg=str)
INVALID = {"model": pydantic.create_model("Invalid", detail=list[FIELD])}  # type: ignore
BAD: dict[int | str, dict[str, Any]] = {400: TEXT, 422: INVALID}
NO_TOKEN: dict[str, Any] = {"tags": ["auth"], "openapi_extra": {"security": []}}
REMEDIES = {  # for what does not pass by itself, by the words of PostgreSQL and Neon
    "password authentication failed": "correct it in DATABASE_URL",
    "failed: endpoint": "see the endpoint and its quotas in Neon's console",
    "is not allowed to connect": "allow it in Neon's console",
}
TRANSIENT = exc.OperationalError, exc.InterfaceError, exc.TimeoutError, TimeoutError
app = FastAPI(
    title="Authentication: register, log in, get an access token, use it",
    on_shutdown=[autocommit_engine.dispose],
    redirect_slashes=False,  # to whatever the Host header says
    generate_unique_id_function=lambda route: route.name,  # for generated clients
    responses={413: {"description": "Over 16 KiB"}, 503: TEXT},
)
app.add_middleware(RequestBodyLimitMiddleware, max_body_size=16 * 1024)  # bytes


@app.exception_handler(RequestValidationError)
async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
    """422, without what was sent: no password comes back, or into a traceback."""
    problems: Any = error.errors()  # changed in place: the error keeps this list
    problems[:] = [{key: it[key] for key in FIELD.model_fields} for it in problems]
    return JSONResponse({"detail": problems}, 422)


@app.exception_handler(exc.SQLAlchemyError)
@app.exception_handler(TimeoutError)
async def unavailable(_: Request, error: Exception) -> JSONResponse:
    """503 for transient errors, and the log says why. Other errors of SQL are a 500."""
    cause, advice = getattr(error, "orig", error), "try again"
    if isinstance(cause, UndefinedTable):
        advice = "run: python init_db.py"
    elif not isinstance(error, TRANSIENT) and type(cause) is not ReadOnlySqlTransaction:
        raise error
    why = str(cause).partition("\n")[0] or "no answer in time"  # without row values
    remedy = next((REMEDIES[words] for words in REMEDIES if words in why), advice)
    log.error(f"unavailable: {engine.url.host}: {why}; {remedy}, or see README.md")
    return JSONResponse({"detail": f"Unavailable, {advice}"}, 503, {"Retry-After": "5"})


# --- Routes: yours go into notes.py: `from main import app`; run: uvicorn notes:app
@app.post("/auth/register", status_code=201, responses=BAD | {409: TEXT}, **NO_TOKEN)
async def register(new: Registration, session: SessionDep) -> UserOut:
    """Create an account. A password has 8 characters to 72 bytes."""
    values = {"email": new.email, "hashed_password": await hash_password(new.password)}
    user = await session.run_sync(fetch_user, ADD_USER, **values)  # connects only now
    if user is None:
        log.info("registration refused, taken: %a", new.email)
        raise HTTPException(409, "Email already registered")
    log.info("registered: %a as %s", user.email, user.id)
    return UserOut.model_validate(user)


@app.post("/auth/login", responses=BAD | {401: TEXT}, **NO_TOKEN)
async def login(who: Credentials, session: SessionDep, response: Response) -> Token:
    """Exchange an email and a password for an access token."""
    user = await session.run_sync(fetch_user, USER_BY_EMAIL, email=who.email)
    known = user.hashed_password if user else NOBODYS_HASH
    if not compare_digest(await hash_password(who.password, known), known) or not user:
        log.info("login refused: %a", who.email)
        raise unauthorized("Wrong email or password")
    log.info("logged in: %s", user.id)
    response.headers["Cache-Control"] = "no-store"  # RFC 6749 §5.1
    return issue_token(user.id)


@app.get("/auth/me", tags=["auth"], responses={401: TEXT})
async def me(user: CurrentUser) -> UserOut:
    """The user whom the access token names."""
    return user
