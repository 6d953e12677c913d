"""POST /auth/login: the access token, refusals that look alike, and the renewal of a hash."""

import secrets
from collections.abc import Iterator

import bcrypt
import psycopg
import pytest
from support.postgres import Postgres
from support.service import PASSWORD, Service, until
from support.wire import Wire

COST = "$2b$09$"  # what the service of these tests hashes with


@pytest.fixture(scope="module")
def server(postgres: Postgres) -> str:
    return postgres.url("postgres")


@pytest.fixture(scope="module")
def wire(postgres: Postgres) -> Iterator[Wire]:
    with Wire(postgres.port) as wire:
        yield wire


@pytest.fixture(scope="module")
def service(database: str, wire: Wire) -> Iterator[Service]:
    with Service(wire.url(database), BCRYPT_ROUNDS="9") as service:
        yield service


def execute(database: str, statement: str, *values: object) -> list[tuple[object, ...]]:
    """Change the database behind the service's back, or look into it."""
    with psycopg.connect(database, autocommit=True) as connection:
        cursor = connection.execute(statement, values)
        return cursor.fetchall() if cursor.description else []


def store(database: str, email: str, hashed: str) -> None:
    execute(
        database,
        "UPDATE users SET hashed_password = %s WHERE email = %s",
        hashed,
        email,
    )


def stored(database: str, email: str) -> str:
    query = "SELECT hashed_password FROM users WHERE email = %s"
    return str(execute(database, query, email)[0][0])


def statements(wire: Wire, service: Service, email: str, password: str) -> list[str]:
    """The first words of the statements of one login, without the pool's test."""
    before = len(wire.statements)
    service.login(email, password)
    said = [statement.split()[0] for statement in wire.statements[before:]]
    return [word for word in said if word != ";"]


def test_a_login_gives_a_token_that_nobody_caches(service: Service) -> None:
    account = service.account()
    answer = service.login(account.email)
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    body = answer.json()
    assert body.keys() == {"access_token", "token_type", "expires_in"}
    assert (body["token_type"], body["expires_in"]) == ("bearer", 1800)
    assert service.me(body["access_token"]).json()["id"] == account.id


# --- Refusals
NOT_BCRYPT = [
    "!", "", "$argon2id$v=19$m=65536,t=3,p=4$c2FsdHNhbHQ$aGFzaA", "pbkdf2_sha256$600000$salt$aGFzaA=",
    "$2b$09$cut", f"$2b$99${53 * 'a'}", f"$2b$09${53 * 'é'}",
]  # fmt: skip
REFUSED = ["unknown email", "wrong password", "inactive account", *NOT_BCRYPT]


@pytest.fixture(scope="module")
def refused(service: Service, database: str) -> dict[str, tuple[str, str]]:
    """The logins that must not be told apart, as email and password."""
    logins = {}
    for situation in REFUSED:
        email = f"{secrets.token_hex(6)}@example.com"
        logins[situation] = (email, PASSWORD)
        if situation != "unknown email":
            service.register(email)
        if situation == "wrong password":
            logins[situation] = (email, "correct hose")
        if situation == "inactive account":
            statement = "UPDATE users SET is_active = false WHERE email = %s"
            execute(database, statement, email)
        if situation in NOT_BCRYPT:
            store(database, email, situation)
    return logins


@pytest.mark.parametrize("situation", REFUSED)
def test_every_refused_login_has_the_same_answer(
    service: Service, refused: dict[str, tuple[str, str]], situation: str
) -> None:
    answer = service.login(*refused[situation])
    assert answer.status_code == 401
    assert answer.json() == {"detail": "Wrong email or password"}
    headers = {name: value for name, value in answer.headers.items() if name != "date"}
    assert headers == {
        "server": "uvicorn",
        "www-authenticate": "Bearer",
        "content-length": "36",
        "content-type": "application/json",
    }


def test_every_refused_login_costs_the_same(
    service: Service, refused: dict[str, tuple[str, str]]
) -> None:
    """In seconds of processor time, which a busy machine does not stretch as it does the clock."""
    spent = dict.fromkeys(refused, 0.0)
    for _ in range(6):
        for situation, login in refused.items():
            before = service.spent
            service.login(*login)
            spent[situation] += service.spent - before
    assert min(spent.values()) > 0.4 * max(spent.values()), spent


@pytest.mark.parametrize("guess", ["", "a", "1234567"])
def test_a_short_guess_is_just_wrong(service: Service, guess: str) -> None:
    assert service.login(service.account().email, guess).status_code == 401


# --- Renewal of a hash
@pytest.mark.parametrize("prefix", ["$2b$04$", "$2b$10$", "$2a$09$", "$2y$09$"])
def test_a_hash_of_another_cost_or_version_is_renewed_by_the_next_login(
    service: Service, database: str, wire: Wire, prefix: str
) -> None:
    email = service.account().email
    salt = bcrypt.gensalt(int(prefix[4:6]))
    hashed = bcrypt.hashpw(PASSWORD.encode(), salt).decode()
    store(database, email, prefix + hashed[7:])
    assert statements(wire, service, email, "a wrong one") == ["SELECT"]
    assert stored(database, email).startswith(prefix)
    assert statements(wire, service, email, PASSWORD) == ["SELECT", "UPDATE"]
    assert stored(database, email).startswith(COST)
    assert statements(wire, service, email, PASSWORD) == ["SELECT"]
    assert service.login(email).status_code == 200


def test_a_renewal_does_not_overwrite_a_password_that_was_changed_meanwhile(
    service: Service, database: str
) -> None:
    """The old hash costs so much that the change comes while it is checked."""
    email = service.account().email
    slow = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(13)).decode()
    new = bcrypt.hashpw(b"battery staple", bcrypt.gensalt(9)).decode()
    store(database, email, slow)
    spent = service.spent
    (login,) = service.at_once(1, service.login, email)
    until(lambda: service.spent > spent + 0.1)  # it is checking the old hash now
    store(database, email, new)
    assert login.result().status_code == 200
    assert stored(database, email) == new


def test_a_failed_renewal_does_not_fail_the_login(
    service: Service, database: str
) -> None:
    account = service.account()
    hashed = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(4)).decode()
    store(database, account.email, hashed)
    execute(
        database,
        """CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
           $$ BEGIN RAISE 'no updates today'; END $$;
           CREATE TRIGGER refuse BEFORE UPDATE ON users EXECUTE FUNCTION refuse()""",
    )
    try:
        assert service.login(account.email).status_code == 200
    finally:
        execute(database, "DROP FUNCTION refuse CASCADE")
    assert stored(database, account.email) == hashed
    assert f"hash not renewed, the next login tries again: {account.id}" in service.log
    assert service.login(account.email).status_code == 200
    assert stored(database, account.email).startswith(COST)
