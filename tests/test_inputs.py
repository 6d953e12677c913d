"""For each input one right status, one right body, and no way in."""

import base64
import hashlib
import hmac
import http.client
import json
import re
import socket
import struct
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any
from unicodedata import combining, normalize

import jwt
import psycopg
import pytest
from harness import JWT_SECRET, Service, run
from openapi_spec_validator import validate
from pooler import from_npm, missing

PASSWORD = "correct horse"


def fresh_email() -> str:
    """An address that nobody has registered."""
    return f"{uuid.uuid4().hex}@example.com"


def sql(database: str, statement: str, *values: Any) -> None:
    """Change the database behind the service's back."""
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(statement, values)


def say(
    service: Service, method: str, path: str, body: Any = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of a request whose headers no client library has improved."""
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, names)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, {k.lower(): v for k, v in answer.getheaders()}, body


# --- Registration


def test_a_new_account_is_201_with_these_four_fields(service: Service) -> None:
    answer = service.register("Ann@Example.com")
    assert answer.status_code == 201
    body = answer.json()
    assert body.keys() == {"id", "email", "is_active", "created_at"}
    assert uuid.UUID(body["id"]).version == 4
    assert body["email"] == "ann@example.com"
    assert body["is_active"] is True
    assert re.match(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d.*(Z|[+-]\d\d:\d\d)$", body["created_at"]
    )


@pytest.mark.parametrize(
    "spelling",
    [
        "bob@example.com",
        "BOB@example.com",
        "Bob@EXAMPLE.COM",
        " bob@example.com\t",
        "Bob <bob@example.com>",
        "<BOB@example.com>",
    ],
)
def test_one_address_is_one_account_however_it_is_spelt(
    service: Service, spelling: str
) -> None:
    service.register("bob@example.com")
    refused = service.register(spelling)
    assert (refused.status_code, refused.json()) == (
        409,
        {"detail": "Email already registered"},
    )
    assert service.login(spelling).status_code == 200


def test_an_address_that_is_composed_in_lower_case_only_is_one_account(
    service: Service,
) -> None:
    """Unicode has h with a line below in one character, and H in two."""
    assert service.register("H\u0331@example.com").status_code == 201
    assert service.register("\u1e96@example.com").status_code == 409


def test_a_hundred_registrations_of_one_address_make_one_account(
    service: Service,
) -> None:
    email = fresh_email()

    def registered(_: int) -> int:
        while (status := service.register(email).status_code) == 503:
            time.sleep(0.05)  # no place to hash: a client tries again
        return status

    with ThreadPoolExecutor(100) as crowd:
        answers = list(crowd.map(registered, range(100)))
    assert sorted(answers) == [201] + 99 * [409]


def test_extra_fields_change_nothing(service: Service) -> None:
    extra = {
        "id": str(uuid.UUID(int=1)),
        "is_active": False,
        "created_at": "2000-01-01T00:00:00Z",
        "is_superuser": True,
        "hashed_password": "mine",
    }
    body = service.http.post(
        "/auth/register", json={"email": fresh_email(), "password": PASSWORD} | extra
    ).json()
    assert body.keys() == {"id", "email", "is_active", "created_at"}
    assert body["id"] != extra["id"]
    assert body["is_active"] is True
    assert not body["created_at"].startswith("2000")


@pytest.mark.parametrize(
    "email",
    [
        "", " ", "ann", "@example.com", "ann@", "ann@example", "a@@example.com", "a b@example.com",
        "\nann@example.com", "Ann\r\n<ann@example.com>", "ann@example.com,bob@example.com", "Ann <ann>", "Ann <ann@example.com",
        "ann@example.com\nbob@example.com", "ann\u2028@example.com", "ann\u202e@example.com",
        "ann\x00@example.com", "ann@exa\x00mple.com", "ann@[127.0.0.1]", "ann@localhost",
        "a" * 250 + "@example.com", "ann@" + "a." * 130 + "com", "ann@" + "a" * 9000 + ".com",
        "'; DROP TABLE users; --", None, 1, True, ["ann@example.com"], {"a": 1}, "\ud800@example.com",
    ],
)  # fmt: skip
def test_what_is_no_address_is_422(service: Service, email: Any) -> None:
    for path in ("/auth/register", "/auth/login"):
        body = json.dumps({"email": email, "password": PASSWORD})
        answer = service.http.post(
            path, content=body, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 422
        (problem,) = answer.json()["detail"]
        assert problem.keys() == {"type", "loc", "msg"}
        assert problem["loc"] == ["body", "email"]


@pytest.mark.parametrize(
    "email", ["josé@example.com", "ann+tag@example.com", "ann@bücher.example.com"]
)
def test_unusual_addresses_register_and_log_in(service: Service, email: str) -> None:
    assert service.register(email).status_code == 201
    assert service.login(email.upper()).status_code == 200


# --- Passwords


@pytest.mark.parametrize(
    "password",
    [
        "8 chars!", "a" * 72, "я" * 36, "🐴" * 18, "        ", "  outer  ",
        "in  ner  ", "пароль-пароль", "\t\n\r\x0b\x1f\x7f\x85\u2028", "ﬁﬁﬁﬁﬁﬁﬁﬁ", "\u0958" * 8,
    ],
)  # fmt: skip
def test_a_password_is_kept_to_the_byte(service: Service, password: str) -> None:
    email = fresh_email()
    assert service.register(email, password).status_code == 201
    assert service.login(email, password).status_code == 200
    assert service.login(email, password[:-1]).status_code == 401
    assert service.login(email, password[:-1] + "?").status_code == 401
    assert service.login(email, "?" + password[1:]).status_code == 401
    assert service.login(email, " " + password[1:]).status_code == (
        200 if password[0] == " " else 401
    )


@pytest.mark.parametrize("composed", ["caf\u00e9 \u00fcber", 36 * "\u01d6"])
def test_composed_and_decomposed_spellings_are_one_password(
    service: Service, composed: str
) -> None:
    decomposed = normalize("NFD", composed)
    for kept, typed in ((composed, decomposed), (decomposed, composed)):
        email = fresh_email()
        assert service.register(email, kept).status_code == 201
        assert service.login(email, typed).status_code == 200


@pytest.mark.parametrize(
    ("password", "message"),
    [
        ("", "8 characters"), ("7 chars", "8 characters"), ("🐴" * 7, "8 characters"),
        ("e\u0301" * 7, "8 characters"), ("a" * 73, "72 bytes"), ("я" * 37, "72 bytes"),
        ("🐴" * 19, "72 bytes"), ("a" * 1024, "72 bytes"), ("a" * 15000, "72 bytes"),
        (normalize("NFD", 36 * "\u01d6") + "a", "72 bytes"),
        ("nul\0nul\0nul", "has a NUL"), (8 * "\0", "has a NUL"), ("good but \ud800", "surrogates not allowed"),
        (12345678, "valid string"), (None, "valid string"), (["correct", "horse"], "valid string"),
        ({"password": "correct horse"}, "valid string"), (True, "valid string"),
    ],
)  # fmt: skip
def test_a_password_that_cannot_be_kept_is_422(
    service: Service, password: Any, message: str
) -> None:
    email = fresh_email()
    body = json.dumps({"email": email, "password": password})
    headers = {"Content-Type": "application/json"}
    answer = service.http.post("/auth/register", content=body, headers=headers)
    assert answer.status_code == 422
    (problem,) = answer.json()["detail"]
    assert problem.keys() == {"type", "loc", "msg"}
    assert problem["loc"] == ["body", "password"]
    assert message in problem["msg"]
    # Nothing of it went in, and a login with it is wrong or refused, never an error.
    expected = 401 if message == "8 characters" else 422
    answer = service.http.post("/auth/login", content=body, headers=headers)
    assert answer.status_code == expected


def test_all_72_bytes_count(service: Service) -> None:
    email, password = fresh_email(), "a" * 71 + "b"
    assert service.register(email, password).status_code == 201
    assert service.login(email, "a" * 71 + "c").status_code == 401
    assert service.login(email, password).status_code == 200


# --- Login


def test_a_login_gives_a_token_that_nobody_caches(service: Service) -> None:
    email = fresh_email()
    user_id = service.register(email).json()["id"]
    before = int(time.time())
    answer = service.login(email)
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    body = answer.json()
    assert body.keys() == {"access_token", "token_type", "expires_in"}
    assert body["token_type"] == "bearer"
    assert body["expires_in"] == 1800
    claims = jwt.decode(body["access_token"], JWT_SECRET, algorithms=["HS256"])
    assert claims.keys() == {"sub", "iat", "exp"}
    assert claims["sub"] == user_id
    assert claims["exp"] - claims["iat"] == 1800
    assert before <= claims["iat"] <= time.time()
    assert service.me(body["access_token"]).json()["id"] == user_id


@pytest.fixture(scope="module")
def other_settings(database: str) -> Iterator[Service]:
    """A second service on the same database."""
    with Service(database, BCRYPT_ROUNDS="10", ACCESS_TOKEN_MINUTES="7") as service:
        yield service


def refused_logins(service: Service, database: str) -> dict[str, tuple[str, str]]:
    """The three logins that must not be told apart, as email and password."""
    known, inactive = fresh_email(), fresh_email()
    service.register(known)
    service.register(inactive)
    sql(database, "UPDATE users SET is_active = false WHERE email = %s", inactive)
    return {
        "unknown address": (fresh_email(), PASSWORD),
        "wrong password": (known, "correct hose"),
        "inactive account": (inactive, PASSWORD),
    }


def test_refused_logins_look_alike(service: Service, database: str) -> None:
    seen = set()
    for email, password in refused_logins(service, database).values():
        answer = service.login(email, password)
        assert answer.status_code == 401
        headers = {k: v for k, v in answer.headers.items() if k != "date"}
        seen.add((answer.text, json.dumps(headers, sort_keys=True)))
    assert len(seen) == 1
    assert answer.json() == {"detail": "Wrong email or password"}
    assert answer.headers["www-authenticate"] == 'Bearer realm="auth"'


def test_refused_logins_cost_the_same(other_settings: Service, database: str) -> None:
    """In seconds of processor time, which a busy machine does not stretch as it does the clock."""
    refusals = refused_logins(other_settings, database)
    spent = dict.fromkeys(refusals, 0.0)
    for _ in range(5):
        for name, who in refusals.items():
            before = other_settings.spent
            assert other_settings.login(*who).status_code == 401
            spent[name] += other_settings.spent - before
    assert min(spent.values()) > 0.5 * max(spent.values())


def test_what_takes_long_to_normalize_is_refused_before(service: Service) -> None:
    """Thousands of accents in the wrong order cost no more than as many letters."""
    accents = filter(combining, map(chr, range(0x300, 0x800)))
    disorder = "".join(sorted(accents, key=combining, reverse=True))
    spent = []
    for password in (8000 * "a", (80 * disorder)[:8000]):
        sent = {"email": "ann@example.com", "password": password}
        before = service.spent
        for _ in range(20):
            assert service.http.post("/auth/login", json=sent).status_code == 422
        spent.append(service.spent - before)
    assert spent[1] < 5 * spent[0] + 0.1


def test_a_short_guess_is_just_wrong(service: Service) -> None:
    for guess in ("", "a", "1234567"):
        assert service.login(fresh_email(), guess).status_code == 401


def test_an_account_keeps_the_cost_it_was_registered_at(
    service: Service, other_settings: Service, database: str
) -> None:
    email = fresh_email()
    service.register(email)
    assert other_settings.login(email).status_code == 200
    assert other_settings.login(email, "wrong password").status_code == 401
    with psycopg.connect(database) as connection:
        found = "SELECT hashed_password FROM users WHERE email = %s"
        (kept,) = connection.execute(found, [email]).fetchone()
    assert kept.startswith("$2b$04$")


# --- Tokens


@pytest.fixture(scope="module")
def account(service: Service) -> dict[str, str]:
    """An account whose tokens the tests forge: its `id`, and a true `token`."""
    email = fresh_email()
    user_id = service.register(email).json()["id"]
    return {"id": user_id, "token": service.login(email).json()["access_token"]}


def encoded(part: Any) -> str:
    """A part of a token: base64 of JSON, without padding."""
    raw = part if isinstance(part, bytes) else json.dumps(part).encode()
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def forged(
    account: dict[str, str], header: dict[str, Any] | None = None, **claims: Any
) -> str:
    """A token with a right HS256 signature over these claims; None leaves a claim out."""
    now = int(time.time())
    claims = {"sub": account["id"], "iat": now, "exp": now + 60} | claims
    claims = {name: value for name, value in claims.items() if value is not None}
    signed = f"{encoded(header or {'alg': 'HS256', 'typ': 'JWT'})}.{encoded(claims)}"
    mac = hmac.new(JWT_SECRET.encode(), signed.encode(), hashlib.sha256).digest()
    return f"{signed}.{encoded(mac)}"


def test_the_forger_can_make_a_good_token(
    service: Service, account: dict[str, str]
) -> None:
    assert service.me(forged(account)).status_code == 200


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "bEaReR"])
def test_the_scheme_is_read_in_any_case(
    service: Service, account: dict[str, str], scheme: str
) -> None:
    status, _, _ = say(
        service, "GET", "/auth/me", Authorization=f"{scheme} {account['token']}"
    )
    assert status == 200


@pytest.mark.parametrize(
    "sent", [None, "", "Bearer", "Bearer ", "Basic YW5uOnB3", "Token x", "Bearer\tx"]
)
def test_no_token_is_401_without_an_error(service: Service, sent: str | None) -> None:
    headers = {} if sent is None else {"Authorization": sent}
    status, headers, body = say(service, "GET", "/auth/me", **headers)
    assert status == 401
    assert headers["www-authenticate"] == 'Bearer realm="auth"'
    assert json.loads(body) == {"detail": "Not authenticated"}


def bad_tokens() -> dict[str, Any]:
    """Each bad token's name, and how it is made from an account."""
    now = int(time.time())
    none = {"alg": "none", "typ": "JWT"}
    nested = b"[" * 6000
    return {
        "junk": lambda a: "junk",
        "one dot": lambda a: ".",
        "two dots": lambda a: "..",
        "two parts": lambda a: a["token"].rpartition(".")[0],
        "four parts": lambda a: a["token"] + ".x",
        "a second token": lambda a: f"{a['token']} {a['token']}",
        "a comma and a second token": lambda a: f"{a['token']}, {a['token']}",
        "not ASCII": lambda a: "é" + a["token"],
        "cut signature": lambda a: a["token"][:-4],
        "missing signature": lambda a: a["token"].rpartition(".")[0] + ".",
        "tampered claims": lambda a: ".".join(
            [
                a["token"].split(".")[0],
                encoded({"sub": str(uuid.uuid4()), "iat": now, "exp": now + 60}),
                a["token"].split(".")[2],
            ]
        ),
        "another key": lambda a: jwt.encode(
            {"sub": a["id"], "iat": now, "exp": now + 60}, JWT_SECRET[::-1]
        ),
        "alg none": lambda a: jwt.encode(
            {"sub": a["id"], "iat": now, "exp": now + 60}, None, algorithm="none"
        ),
        "alg none, signed": lambda a: forged(a, none),
        "alg NONE": lambda a: forged(a, none | {"alg": "NONE"}),
        "alg HS512": lambda a: jwt.encode(
            {"sub": a["id"], "iat": now, "exp": now + 60}, JWT_SECRET, algorithm="HS512"
        ),
        "alg RS256": lambda a: forged(a, {"alg": "RS256", "typ": "JWT"}),
        "alg missing": lambda a: forged(a, {"typ": "JWT"}),
        "alg a number": lambda a: forged(a, {"alg": 256}),
        "header a list": lambda a: f"{encoded([])}.{a['token'].split('.', 1)[1]}",
        "header nested deep": lambda a: f"{encoded(nested)}.{a['token'].split('.', 1)[1]}",
        "header a huge number": lambda a: f"{encoded(b'9' * 5000)}.{a['token'].split('.', 1)[1]}",
        "header not UTF-8": lambda a: f"{encoded(bytes([255] * 9))}.{a['token'].split('.', 1)[1]}",
        "expired": lambda a: forged(a, iat=now - 120, exp=now - 60),
        "expired this second": lambda a: forged(a, exp=now),
        "not yet valid": lambda a: forged(a, nbf=now + 3600),
        "issued in the future": lambda a: forged(a, iat=now + 3600, exp=now + 7200),
        "no exp": lambda a: forged(a, exp=None),
        "no iat": lambda a: forged(a, iat=None),
        "no sub": lambda a: forged(a, sub=None),
        "exp a word": lambda a: forged(a, exp="tomorrow"),
        "exp infinite": lambda a: forged(a, exp=float("inf")),
        "iat a list": lambda a: forged(a, iat=[now]),
        "sub no UUID": lambda a: forged(a, sub="ann@example.com"),
        "sub empty": lambda a: forged(a, sub=""),
        "sub a number": lambda a: forged(a, sub=1),
        "sub a list": lambda a: forged(a, sub=[a["id"]]),
        "sub NUL": lambda a: forged(a, sub="\0"),
        "unknown crit": lambda a: forged(a, {"alg": "HS256", "crit": ["exp2"], "exp2": 1}),
        "crit empty": lambda a: forged(a, {"alg": "HS256", "crit": []}),
        "b64 false": lambda a: forged(a, {"alg": "HS256", "crit": ["b64"], "b64": False}),
        "several kilobytes of junk": lambda a: "x" * 8000,
        "several kilobytes, well formed": lambda a: (
            f"{encoded({'alg': 'HS256', 'x': 'y' * 6000})}.{a['token'].split('.', 1)[1]}"
        ),
        "unknown user": lambda a: forged(a, sub=str(uuid.uuid4())),
    }  # fmt: skip


@pytest.mark.parametrize("situation", bad_tokens())
def test_a_bad_token_is_401(
    service: Service, account: dict[str, str], situation: str
) -> None:
    token = bad_tokens()[situation](account)
    status, headers, body = say(
        service, "GET", "/auth/me", Authorization=f"Bearer {token}"
    )
    assert status == 401
    assert headers["www-authenticate"] == 'Bearer realm="auth", error="invalid_token"'
    assert json.loads(body) == {"detail": "Invalid access token"}


@pytest.mark.parametrize(
    "fate",
    [
        "UPDATE users SET is_active = false WHERE email = %s",
        "DELETE FROM users WHERE email = %s",
    ],
)
def test_a_token_dies_with_its_user(service: Service, database: str, fate: str) -> None:
    email = fresh_email()
    service.register(email)
    token = service.login(email).json()["access_token"]
    assert service.me(token).status_code == 200
    sql(database, fate, email)
    refused = service.me(token)
    assert refused.status_code == 401
    assert (
        refused.headers["www-authenticate"]
        == 'Bearer realm="auth", error="invalid_token"'
    )


def test_a_dead_token_stays_dead_when_the_address_registers_again(
    service: Service, database: str
) -> None:
    email = fresh_email()
    service.register(email)
    token = service.login(email).json()["access_token"]
    sql(database, "DELETE FROM users WHERE email = %s", email)
    assert service.register(email).status_code == 201
    assert service.me(token).status_code == 401


def test_a_token_lasts_as_many_minutes_as_the_setting_says(
    other_settings: Service,
) -> None:
    email = fresh_email()
    other_settings.register(email)
    body = other_settings.login(email).json()
    assert body["expires_in"] == 420
    claims = jwt.decode(body["access_token"], JWT_SECRET, algorithms=["HS256"])
    assert claims["exp"] - claims["iat"] == 420


# --- Bodies

MARK = "marked-and-secret"
GOOD = json.dumps({"email": "ann@example.com", "password": MARK}).encode()
JSON = "application/json"


@pytest.mark.parametrize("path", ["/auth/register", "/auth/login"])
@pytest.mark.parametrize(
    ("situation", "kind", "body", "statuses"),
    [
        ("empty", JSON, b"", {422}),
        ("truncated", JSON, GOOD[:-5], {422}),
        ("two documents", JSON, GOOD + GOOD, {422}),
        ("no content type", "", GOOD, {422}),
        ("text", "text/plain", GOOD, {422}),
        ("XML", "application/xml", GOOD, {422}),
        ("content type nonsense", ";;;=/", GOOD, {422}),
        ("form", "application/x-www-form-urlencoded", b"email=a@b.co&password=" + MARK.encode(), {422}),
        ("multipart", "multipart/form-data; boundary=x", b"--x\r\n" + MARK.encode(), {422}),
        ("array", JSON, b"[" + GOOD + b"]", {422}),
        ("string", JSON, json.dumps(MARK).encode(), {422}),
        ("number", JSON, b"1", {422}),
        ("null", JSON, b"null", {422}),
        ("empty object", JSON, b"{}", {422}),
        ("password missing", JSON, b'{"email": "ann@example.com"}', {422}),
        ("other names", JSON, json.dumps({"username": MARK, "pass": MARK}).encode(), {422}),
        ("email twice as a list", JSON, b'{"email": ["a@b.co"], "password": "' + MARK.encode() + b'"}', {422}),
        ("NaN", JSON, b'{"email": NaN, "password": NaN}', {422}),
        ("Infinity", JSON, b'{"email": Infinity, "password": -Infinity}', {422}),
        ("huge integer", JSON, b'{"email": 1, "password": ' + b"9" * 9000 + b"}", {400, 422}),
        ("huge exponent", JSON, b'{"email": 1e999999, "password": 1e999999}', {422}),
        ("deep array", JSON, b"[" * 16000, {400, 422}),
        ("deep object", JSON, b'{"a":' * 3200, {400, 422}),
        ("deep password", JSON, b'{"email": "a@b.co", "password": ' + b"[" * 6000 + b"]" * 6000 + b"}", {400, 422}),
        ("invalid UTF-8", JSON, b'{"email": "\xff\xfe", "password": "' + MARK.encode() + b'"}', {400}),
        ("NUL bytes", JSON, b"\x00" * 100, {400, 422}),
        ("lone surrogate key", JSON, b'{"\\ud800": "' + MARK.encode() + b'"}', {422}),
        ("marked everywhere", JSON, json.dumps({"email": MARK, "password": [MARK], MARK: MARK}).encode(), {422}),
    ],
)  # fmt: skip
def test_a_bad_body_is_4xx_and_never_repeated(
    service: Service,
    path: str,
    situation: str,
    kind: str,
    body: bytes,
    statuses: set[int],
) -> None:
    headers = {"Content_Type": kind} if kind else {}
    status, _, answer = say(service, "POST", path, body, **headers)
    assert status in statuses, situation
    detail = json.loads(answer)["detail"]
    if status == 422:
        assert all(problem.keys() == {"type", "loc", "msg"} for problem in detail)
    else:
        assert detail == "There was an error parsing the body"
    assert MARK.encode() not in answer
    assert MARK not in service.log


@pytest.mark.parametrize("path", ["/auth/register", "/auth/login"])
def test_a_body_over_16_kib_is_413(service: Service, path: str) -> None:
    large = GOOD[:-1] + b" " * (16 * 1024 + 1 - len(GOOD)) + b"}"
    assert len(large) == 16 * 1024 + 1
    status, _, _ = say(service, "POST", path, large, Content_Type=JSON)
    assert status == 413
    chunked = iter(
        [large[:9000], large[9000:]]
    )  # http.client sends it without a Content-Length
    status, _, _ = say(service, "POST", path, chunked, Content_Type=JSON)
    assert status == 413
    fits = GOOD[:-1] + b" " * (16 * 1024 - len(GOOD)) + b"}"
    status, _, _ = say(service, "POST", path, fits, Content_Type=JSON)
    assert status in {200, 201, 401, 409}


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("GET", "/", 404),
        ("GET", "/auth/register", 405),
        ("PUT", "/auth/login", 405),
        ("POST", "/auth/me", 405),
        ("GET", "/auth/me?access_token=x", 401),
        ("GET", "/%ff%00", 404),
    ],
)
def test_other_paths_and_methods(
    service: Service, method: str, path: str, expected: int
) -> None:
    assert say(service, method, path)[0] == expected


@pytest.mark.parametrize(("size", "status"), [(0, 401), (5_000_000, 413)])
def test_a_body_of_known_length_keeps_its_connection(
    service: Service, size: int, status: int
) -> None:
    """Closed at once, a large one would lose its 413 with clients that send all of it first."""
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=10)
    who = {"email": fresh_email(), "password": PASSWORD}
    body = json.dumps(who) + size * " "
    for _ in range(2):
        connection.request("POST", "/auth/login", body, {"Content-Type": JSON})
        answer = connection.getresponse()
        answer.read()
        assert (answer.status, answer.getheader("connection")) == (status, None)
    connection.close()


@pytest.mark.parametrize("path", ["/auth/me/", "/auth/login/", "/auth/register/"])
@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("host", ["127.0.0.1", "elsewhere.example", "a/b?c", ""])
def test_a_slash_too_many_leads_nowhere(
    service: Service, method: str, path: str, host: str
) -> None:
    status, headers, body = say(service, method, path, Host=host)
    assert (status, json.loads(body)) == (404, {"detail": "Not Found"})
    assert "location" not in headers


def test_headers_have_a_limit(service: Service) -> None:
    status, _, _ = say(service, "GET", "/auth/me", X=60_000 * "x")
    assert status == 401
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as client:
        client.sendall(b"GET /auth/me HTTP/1.1\r\nX: " + 300_000 * b"x")
        try:
            assert client.recv(99).split()[1] == b"400"
        except ConnectionResetError:
            pass  # the same, to a client that had not finished


# --- The contract


@pytest.fixture(scope="module")
def document(service: Service) -> dict[str, Any]:
    """The OpenAPI document."""
    return service.http.get("/openapi.json").json()


def operations(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the document says about each path's one method."""
    return {path: next(iter(r.values())) for path, r in document["paths"].items()}


def test_the_openapi_document_is_valid(
    document: dict[str, Any], tmp_path: Path
) -> None:
    """Redocly's recommended rules too, but for the one that wants the service's address."""
    validate(document)
    redocly = from_npm("@redocly/cli@2.77", tmp_path) / ".bin" / "redocly"
    (tmp_path / "openapi.json").write_text(json.dumps(document))
    options = "--skip-rule=no-empty-servers", "--format=json"
    quiet = {"REDOCLY_TELEMETRY": "off", "REDOCLY_SUPPRESS_UPDATE_NOTICE": "true"}
    found = run(redocly, "lint", "openapi.json", *options, folder=tmp_path, **quiet)
    problems = [problem["ruleId"] for problem in json.loads(found.stdout)["problems"]]
    assert problems == ["info-license"]  # a warning: whose it is, readers say


def test_openapi_names_every_status_and_the_bearer_scheme(
    service: Service, document: dict[str, Any]
) -> None:
    routes = operations(document)
    assert {path: set(route["responses"]) for path, route in routes.items()} == {
        "/auth/register": {"201", "400", "409", "413", "422", "503"},
        "/auth/login": {"200", "400", "401", "413", "422", "503"},
        "/auth/me": {"200", "401", "413", "503"},
    }
    scheme = document["components"]["securitySchemes"]["BearerToken"]
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    assert document["components"]["securitySchemes"].keys() == {"BearerToken"}
    assert routes["/auth/me"]["security"] == [{"BearerToken": []}]
    assert service.http.get("/docs").status_code == 200


def test_openapi_is_fit_for_generated_clients(document: dict[str, Any]) -> None:
    routes, schemas = operations(document), document["components"]["schemas"]
    for path, route in routes.items():
        assert route["operationId"] == path.removeprefix("/auth/")
        assert route["tags"] == ["auth"]
        assert "content" not in route["responses"]["413"]  # it is plain text
    answer = routes["/auth/login"]["responses"]["200"]["content"]["application/json"]
    token = schemas[answer["schema"]["$ref"].rpartition("/")[2]]
    assert set(token["required"]) == {"access_token", "token_type", "expires_in"}


def test_the_examples_are_accepted(
    service: Service, database: str, document: dict[str, Any]
) -> None:
    examples = {}
    for path, route in operations(document).items():
        if body := route.get("requestBody"):
            model = body["content"]["application/json"]["schema"]["$ref"]
            fields = document["components"]["schemas"][model.rpartition("/")[2]]
            examples[path] = {
                name: field["examples"][0]
                for name, field in fields["properties"].items()
            }
    new, known = examples["/auth/register"], examples["/auth/login"]
    sql(database, "DELETE FROM users WHERE email = %s", new["email"])
    assert service.http.post("/auth/register", json=new).status_code == 201
    assert service.http.post("/auth/login", json=known).status_code == 200


def test_a_422_is_as_documented(service: Service, document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    for path in ("/auth/register", "/auth/login"):
        shown = operations(document)[path]["responses"]["422"]["content"]
        model = shown["application/json"]["schema"]["$ref"].rpartition("/")[2]
        refused = service.http.post(path, json={}).json()
        assert refused.keys() == schemas[model]["properties"].keys()
        field = schemas[model]["properties"]["detail"]["items"]["$ref"].rpartition("/")[
            2
        ]
        for problem in refused["detail"]:
            assert problem.keys() == schemas[field]["properties"].keys()


def test_schemathesis_finds_nothing(
    service: Service, account: dict[str, str], tmp_path: Path
) -> None:
    checks = "not_a_server_error,status_code_conformance,content_type_conformance"
    found = run(
        "schemathesis", "run", f"{service.url}/openapi.json", "--no-color", "--max-examples=60",
        "--seed=1", f"--checks={checks},response_schema_conformance",
        f"--header=Authorization: Bearer {account['token']}", "--generation-database=none",
        folder=tmp_path,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr


# --- Logs


def lines_about(service: Service, text: str) -> Iterator[str]:
    return (line for line in service.log.splitlines() if text in line)


def test_each_registration_and_login_is_one_line_in_the_log(
    service: Service, database: str
) -> None:
    email = fresh_email()
    user_id = service.register(email).json()["id"]
    service.register(email)
    service.login(email, "wrong password")
    service.login(email)
    said = list(lines_about(service, email))
    assert all(datetime.fromisoformat(line[:23]) for line in said)
    assert [line[24:] for line in said] == [
        f"INFO registered: '{email}' as {user_id}",
        f"INFO registration refused, taken: '{email}'",
        f"INFO login refused: '{email}'",
    ]
    (said,) = lines_about(service, f"logged in: {user_id}")
    assert said[24:] == f"INFO logged in: {user_id}"


def test_no_line_of_the_log_can_be_forged(service: Service) -> None:
    for forger in (
        "a\n2026-11-24 17:30:53,308 INFO logged in: forged@example.com",
        "a\r\u2028\x85\x1b[2Jforged@example.com",
    ):
        assert service.register(forger).status_code == 422
        assert service.login(forger).status_code == 422
    say(service, "GET", "/auth/me%0aINFO:%20forged%0d?x=%0aforged")
    say(service, "GET", "/auth/me", Authorization="Bearer forged", User_Agent="forged")
    (said,) = lines_about(service, "forged")
    assert '"GET /auth/me%0AINFO' in said
    assert all(line.isprintable() for line in service.log.split("\n"))


def test_the_log_holds_no_secret_and_no_traceback(
    service: Service, account: dict[str, str]
) -> None:
    """After all of the above."""
    log = service.log
    assert "Traceback" not in log
    assert "Error" not in log
    for secret in (PASSWORD, MARK, JWT_SECRET, account["token"], "eyJ", "$2b$"):
        assert secret not in log


# What FastAPI's error quotes, and pydantic's, which is in a traceback when an answer fails.
QUOTED = [
    {"email": "no address", "password": [MARK]},
    {"email": MARK, "password": f"{MARK}\0"},
    {"password": MARK},
    [MARK],
]


def post(body: Any) -> bytes:
    """A login, to be sent over a socket as it is."""
    raw = json.dumps(body).encode()
    head = b"POST /auth/login HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return head + b"Content-Length: %d\r\n\r\n%s" % (len(raw), raw)


NO_ANSWER = """
import asyncio, sys, traceback, main

async def send(message):
    raise RuntimeError("the client has gone")

async def answer(body):
    async def receive():
        return {"type": "http.request", "body": body.encode()}
    kind = (b"content-type", b"application/json")
    what = {"type": "http", "method": "POST", "path": "/auth/login", "query_string": b""}
    try:
        await main.app(what | {"headers": [kind]}, receive, send)
    except RuntimeError:
        traceback.print_exc()

for body in sys.argv[1:]:
    asyncio.run(answer(body))
"""


def test_a_traceback_quotes_nothing_that_was_sent(database: str) -> None:
    bodies = [json.dumps(body) for body in QUOTED]
    failed = run("python", "-c", NO_ANSWER, *bodies, database=database)
    assert failed.stderr.count("RequestValidationError: ") >= len(bodies)
    assert failed.stderr.count("RuntimeError: the client has gone") >= len(bodies)
    assert MARK not in failed.stderr


def h11(_: Path) -> dict[str, str]:
    """No variables: what requirements.txt has."""
    return {}


def uvloop_and_httptools(folder: Path) -> dict[str, str]:
    """The variables of a service that finds these two, which uvicorn then prefers."""
    pip = ("python", "-m", "pip", "install", "-q", "--target")
    if run(*pip, folder, "uvloop", "httptools").returncode != 0:
        missing("uvloop and httptools (pip install)")
    return {"PYTHONPATH": str(folder)}


def send_and_go(service: Service, sent: bytes, rude: bool) -> None:
    """Send this, read nothing, and close the connection or, when rude, reset it."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", rude, 0)
        )
        client.settimeout(5)
        client.connect(("127.0.0.1", service.port))
        client.sendall(sent)
        size = -1
        while len(sent) > 99_999 and size != (size := len(service.log)):
            time.sleep(0.2)  # until the answers wait for their reader


@pytest.mark.parametrize("installed", [h11, uvloop_and_httptools])
def test_no_broken_client_brings_a_secret_into_the_log(
    database: str,
    installed: Callable[[Path], dict[str, str]],
    tmp_path: Path,
) -> None:
    """A traceback in there is nothing to be afraid of."""
    slow = post({"email": "ann@example.com", "password": MARK})
    bad = [post(body) for body in QUOTED]
    page = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
    upgrade = (
        b"GET /auth/me HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    with Service(database, **installed(tmp_path)) as service:
        for body in bad:
            for behind in (b"", b"no request\r\n\r\n", upgrade, slow, body[:-1]):
                for sent in (body + behind, slow + body + behind, slow + behind):
                    for rude in (True, False):
                        send_and_go(service, sent, rude)
        # Of these, some 400 answers fit: the next is one to a bad body, and waits.
        for rude in (True, False):
            send_and_go(service, 1500 * (page + bad[0]), rude)
        assert service.login(fresh_email()).status_code == 401
        assert service.log.count(" 422 ") > 100
        assert MARK not in service.log
