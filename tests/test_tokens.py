"""GET /auth/me: which access tokens are good, and which are refused."""

import base64
import hashlib
import hmac
import json
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
import psycopg
import pytest
from support.command import JWT_SECRET, missing
from support.service import Account, Service


@pytest.fixture(scope="module")
def ann(service: Service) -> Account:
    return service.account()


def encoded(part: Any) -> str:
    """A part of a token: base64 of JSON, without padding."""
    raw = part if isinstance(part, bytes) else json.dumps(part).encode()
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def signed(user: Account, header: Any = None, **claims: Any) -> str:
    """A token with a right HS256 signature over any claims; None leaves a claim out."""
    claims = {"sub": user.id, "exp": time.time() + 60} | claims
    claims = {name: value for name, value in claims.items() if value is not None}
    text = f"{encoded(header or {'alg': 'HS256', 'typ': 'JWT'})}.{encoded(claims)}"
    mac = hmac.digest(JWT_SECRET.encode(), text.encode(), hashlib.sha256)
    return f"{text}.{encoded(mac)}"


def claims(user: Account) -> dict[str, Any]:
    return {"sub": user.id, "exp": int(time.time()) + 60}


def test_a_token_has_two_claims_and_lasts_30_minutes(ann: Account) -> None:
    found = jwt.decode(ann.token, JWT_SECRET, algorithms=["HS256"])
    assert found.keys() == {"sub", "exp"}
    assert found["sub"] == ann.id
    assert 1700 < found["exp"] - time.time() <= 1800


# --- Good tokens
@pytest.mark.parametrize(
    "token",
    [
        lambda a: a.token,
        lambda a: signed(a),
        lambda a: signed(a, exp=time.time() + 1804, iat=time.time() - 1),
    ],
    ids=["from a login", "signed elsewhere", "with another claim"],
)
@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "bEaReR"])
def test_a_good_token(
    service: Service, ann: Account, scheme: str, token: Callable[[Account], str]
) -> None:
    headers = {"Authorization": f"{scheme} {token(ann)}"}
    assert service.http.get("/auth/me", headers=headers).json()["email"] == ann.email


AHEAD = """
import time
now = time.time
time.time = lambda: now() + 4
import datetime
class Ahead(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return super().now(tz) + datetime.timedelta(seconds=4)
datetime.datetime = Ahead
"""


def test_a_token_of_a_machine_whose_clock_is_four_seconds_ahead(
    database: str, service: Service, ann: Account, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(AHEAD)
    with Service(database, PYTHONPATH=str(tmp_path)) as ahead:
        token = ahead.login(ann.email).json()["access_token"]
    expires = jwt.decode(token, JWT_SECRET, algorithms=["HS256"])["exp"]
    assert expires > time.time() + 1800, "its clock is not ahead"
    assert service.me(token).status_code == 200


def test_a_token_of_a_machine_that_counts_leap_seconds(
    database: str, ann: Account
) -> None:
    if not Path("/usr/share/zoneinfo/right/UTC").exists():
        missing("the time zone right/UTC (Debian: apt-get install tzdata-legacy)")
    with Service(database, TZ="right/UTC") as service:
        token = service.login(ann.email).json()["access_token"]
        assert service.me(token).status_code == 200


def test_a_token_lasts_as_many_minutes_as_the_setting_says(
    database: str, ann: Account
) -> None:
    with Service(database, ACCESS_TOKEN_MINUTES="7") as service:
        body = service.login(ann.email).json()
    assert body["expires_in"] == 420
    found = jwt.decode(body["access_token"], JWT_SECRET, algorithms=["HS256"])
    assert 400 < found["exp"] - time.time() <= 420


# --- Missing tokens
@pytest.mark.parametrize(
    "sent", [None, "", "Bearer", "Basic YW5uOnB3", "Token x", "Bearer\tx"]
)
def test_a_missing_token_is_401(service: Service, sent: str | None) -> None:
    headers = {} if sent is None else {"Authorization": sent}
    answer = service.http.get("/auth/me", headers=headers)
    assert answer.status_code == 401
    assert answer.json() == {"detail": "Not authenticated"}
    assert answer.headers["www-authenticate"] == "Bearer"


# --- Bad tokens
def with_header(user: Account, header: bytes) -> str:
    return f"{encoded(header)}.{user.token.partition('.')[2]}"


def with_claims(user: Account) -> str:
    header, _, signature = user.token.split(".")
    return f"{header}.{encoded(claims(user) | {'sub': str(uuid.uuid4())})}.{signature}"


BAD: dict[str, Callable[[Account], str]] = {
    "junk": lambda a: "junk",
    "one dot": lambda a: ".",
    "two dots": lambda a: "..",
    "two parts": lambda a: a.token.rpartition(".")[0],
    "four parts": lambda a: a.token + ".x",
    "a second token": lambda a: f"{a.token} {a.token}",
    "a comma and a second token": lambda a: f"{a.token}, {a.token}",
    "not ASCII": lambda a: "é" + a.token,
    "a cut signature": lambda a: a.token[:-4],
    "no signature": lambda a: a.token.rpartition(".")[0] + ".",
    "other claims": with_claims,
    "another key": lambda a: jwt.encode(claims(a), JWT_SECRET[::-1]),
    "alg none": lambda a: jwt.encode(claims(a), None, algorithm="none"),
    "alg none, signed": lambda a: signed(a, {"alg": "none"}),
    "alg NONE": lambda a: signed(a, {"alg": "NONE"}),
    "alg HS512": lambda a: jwt.encode(claims(a), JWT_SECRET, algorithm="HS512"),
    "alg RS256": lambda a: signed(a, {"alg": "RS256"}),
    "no alg": lambda a: signed(a, {"typ": "JWT"}),
    "alg is a number": lambda a: signed(a, {"alg": 256}),
    "header is a list": lambda a: with_header(a, b"[]"),
    "header is nested deep": lambda a: with_header(a, b"[" * 6000),
    "header is a huge number": lambda a: with_header(a, b"9" * 5000),
    "header is not UTF-8": lambda a: with_header(a, b"\xff" * 9),
    "expired": lambda a: signed(a, exp=time.time() - 60),
    "expires this second": lambda a: signed(a, exp=int(time.time())),
    "not yet valid": lambda a: signed(a, nbf=time.time() + 3600),
    "no exp": lambda a: signed(a, exp=None),
    "no sub": lambda a: signed(a, sub=None),
    "exp is a word": lambda a: signed(a, exp="tomorrow"),
    "exp is infinite": lambda a: signed(a, exp=float("inf")),
    "sub is not a UUID": lambda a: signed(a, sub="ann@example.com"),
    "sub is empty": lambda a: signed(a, sub=""),
    "sub is a number": lambda a: signed(a, sub=1),
    "sub is a list": lambda a: signed(a, sub=[a.id]),
    "sub is NUL": lambda a: signed(a, sub="\0"),
    "unknown crit": lambda a: signed(a, {"alg": "HS256", "crit": ["x"], "x": 1}),
    "kilobytes of junk": lambda a: "x" * 8000,
    "unknown user": lambda a: signed(a, sub=str(uuid.uuid4())),
}


def assert_refused(service: Service, token: str) -> None:
    headers = {"Authorization": f"Bearer {token}".encode()}
    answer = service.http.get("/auth/me", headers=headers)
    assert answer.status_code == 401
    assert answer.json() == {"detail": "Invalid access token"}
    assert answer.headers["www-authenticate"] == 'Bearer error="invalid_token"'


@pytest.mark.parametrize("situation", BAD)
def test_a_bad_token_is_401(service: Service, ann: Account, situation: str) -> None:
    assert_refused(service, BAD[situation](ann))


@pytest.mark.parametrize(
    "fate",
    [
        "UPDATE users SET is_active = false WHERE email = %s",
        "DELETE FROM users WHERE email = %s",
    ],
)
def test_a_token_dies_with_its_user(service: Service, database: str, fate: str) -> None:
    bob = service.account()
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(fate, [bob.email])
    assert_refused(service, bob.token)
    service.register(bob.email)  # the same email does not bring it back
    assert_refused(service, bob.token)
