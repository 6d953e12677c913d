"""POST /auth/register: which emails and passwords make an account, and which are refused."""

import json
import re
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unicodedata import normalize
from uuid import UUID

import httpx
import pytest
from support.service import PASSWORD, Service

JSON = {"Content-Type": "application/json"}
MARK = "marked-and-secret"
PATHS = ["/auth/register", "/auth/login"]


def new_email() -> str:
    return f"{secrets.token_hex(6)}@example.com"


def send(service: Service, path: str, body: Any) -> httpx.Response:
    """What a body is answered that no client library has improved."""
    return service.http.post(path, content=json.dumps(body), headers=JSON)


def test_a_new_account_is_201_with_four_fields(service: Service) -> None:
    answer = service.register("Ann@Example.com")
    assert answer.status_code == 201
    user = answer.json()
    assert user.keys() == {"id", "email", "is_active", "created_at"}
    assert UUID(user["id"]).version == 4
    assert (user["email"], user["is_active"]) == ("ann@example.com", True)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+(Z|[+-]\d\d:\d\d)", user["created_at"])


# --- Emails
@pytest.mark.parametrize(
    "spelling",
    ["bob@example.com", "BOB@example.com", "Bob@EXAMPLE.COM", " bob@example.com\t", "Bob <bob@example.com>"],
)  # fmt: skip
def test_an_email_is_taken_in_each_spelling(service: Service, spelling: str) -> None:
    service.register("bob@example.com")
    refused = service.register(spelling)
    assert refused.status_code == 409
    assert refused.json() == {"detail": "Email already registered"}
    assert service.login(spelling).status_code == 200


def test_a_hundred_registrations_of_one_email_make_one_account(
    service: Service,
) -> None:
    email = new_email()

    def register(_: int) -> int:
        while (status := service.register(email).status_code) == 503:
            time.sleep(0.1)  # too many at once: a client tries again
        return status

    with ThreadPoolExecutor(100) as crowd:
        assert sorted(crowd.map(register, range(100))) == [201] + 99 * [409]


@pytest.mark.parametrize(
    "email", ["josé@example.com", "ann+tag@example.com", "ann@bücher.example.com"]
)
def test_an_unusual_email_registers_and_logs_in(service: Service, email: str) -> None:
    assert service.register(email).status_code == 201
    assert service.login(email.upper()).status_code == 200


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "email",
    [
        "", " ", "ann", "@example.com", "ann@", "ann@example", "a@@example.com", "a b@example.com",
        "\nann@example.com", "Ann\r\n<ann@example.com>", "ann@example.com,bob@example.com", "Ann <ann>",
        "ann@example.com\nbob@example.com", "ann\u2028@example.com", "ann\u202e@example.com",
        "ann\x00@example.com", "ann@exa\x00mple.com", "ann@[127.0.0.1]", "ann@localhost",
        "a" * 250 + "@example.com", "ann@" + "a." * 130 + "com", "ann@" + "a" * 9000 + ".com",
        "'; DROP TABLE users; --", None, 1, True, ["ann@example.com"], {"a": 1}, "\ud800@example.com",
    ],
)  # fmt: skip
def test_what_is_not_an_email_is_422(service: Service, path: str, email: Any) -> None:
    answer = send(service, path, {"email": email, "password": PASSWORD})
    assert answer.status_code == 422
    (problem,) = answer.json()["detail"]
    assert problem.keys() == {"type", "loc", "msg"}
    assert problem["loc"] == ["body", "email"]


# --- Passwords
@pytest.mark.parametrize(
    "password",
    [
        "8 chars!", "a" * 72, "я" * 36, "🐴" * 18, "        ", "  outer  ", "in  ner  ",
        "\t\n\r\x0b\x1f\x7f\x85\u2028", "ﬁﬁﬁﬁﬁﬁﬁﬁ", "\u0958" * 8,
    ],
)  # fmt: skip
def test_each_character_of_a_password_counts(service: Service, password: str) -> None:
    email = new_email()
    assert service.register(email, password).status_code == 201
    assert service.login(email, password).status_code == 200
    for wrong in (password[:-1], password[:-1] + "?", "?" + password[1:]):
        assert service.login(email, wrong).status_code == 401


@pytest.mark.parametrize("composed", ["caf\u00e9 \u00fcber", 24 * "\u01d6"])
def test_composed_and_decomposed_characters_are_one_password(
    service: Service, composed: str
) -> None:
    decomposed = normalize("NFD", composed)
    for stored, typed in ((composed, decomposed), (decomposed, composed)):
        email = new_email()
        assert service.register(email, stored).status_code == 201
        assert service.login(email, typed).status_code == 200


TOO_SHORT, TOO_LONG = "at least 8 characters", "at most 72 characters"
NOT_KEPT, NOT_TEXT = "72 bytes of UTF-8 or fewer", "should be a valid string"


@pytest.mark.parametrize(
    ("password", "message"),
    [
        ("", TOO_SHORT), ("7 chars", TOO_SHORT), ("🐴" * 7, TOO_SHORT),
        ("a" * 73, TOO_LONG), ("a" * 15_000, TOO_LONG), ("я" * 37, NOT_KEPT), ("🐴" * 19, NOT_KEPT),
        ("nul\0nul\0nul", NOT_KEPT), (8 * "\0", NOT_KEPT), ("good but \ud800", NOT_TEXT),
        (12345678, NOT_TEXT), (None, NOT_TEXT), (["correct"], NOT_TEXT), ({"a": "b"}, NOT_TEXT), (True, NOT_TEXT),
    ],
)  # fmt: skip
def test_a_password_that_cannot_be_kept_is_422(
    service: Service, password: Any, message: str
) -> None:
    body = {"email": new_email(), "password": password}
    answer = send(service, "/auth/register", body)
    assert answer.status_code == 422
    (problem,) = answer.json()["detail"]
    assert problem["loc"] == ["body", "password"]
    assert message in problem["msg"]
    # A login has no minimum: a password that is too short is simply wrong.
    expected = 401 if message == TOO_SHORT else 422
    assert send(service, "/auth/login", body).status_code == expected


def test_extra_fields_change_nothing(service: Service) -> None:
    extra = {"id": str(UUID(int=1)), "is_active": False, "hashed_password": "mine"}
    body = {"email": new_email(), "password": PASSWORD} | extra
    user = send(service, "/auth/register", body).json()
    assert user.keys() == {"id", "email", "is_active", "created_at"}
    assert (user["id"] == extra["id"], user["is_active"]) == (False, True)


# --- Bodies
GOOD = json.dumps({"email": "ann@example.com", "password": MARK}).encode()
FORM = b"email=a@b.co&password=" + MARK.encode()
APPLICATION_JSON = "application/json"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (APPLICATION_JSON, b""), (APPLICATION_JSON, GOOD[:-5]), (APPLICATION_JSON, GOOD + GOOD),
        ("", GOOD), ("text/plain", GOOD), ("application/xml", GOOD), (";;;=/", GOOD),
        ("application/x-www-form-urlencoded", FORM), ("multipart/form-data; boundary=x", b"--x\r\n" + FORM),
        (APPLICATION_JSON, b"[" + GOOD + b"]"), (APPLICATION_JSON, json.dumps(MARK).encode()),
        (APPLICATION_JSON, b"1"), (APPLICATION_JSON, b"null"), (APPLICATION_JSON, b"{}"),
        (APPLICATION_JSON, json.dumps({"username": MARK, "pass": MARK}).encode()),
        (APPLICATION_JSON, json.dumps({"email": MARK, "password": [MARK], MARK: MARK}).encode()),
        (APPLICATION_JSON, b'{"email": NaN, "password": -Infinity}'),
        (APPLICATION_JSON, b'{"email": 1, "password": ' + b"9" * 9000 + b"}"),
        (APPLICATION_JSON, b"[" * 16_000), (APPLICATION_JSON, b'{"a":' * 3200),
        (APPLICATION_JSON, b'{"email": "\xff\xfe", "password": "' + MARK.encode() + b'"}'),
        (APPLICATION_JSON, b"\x00" * 100),
    ],
)  # fmt: skip
def test_a_bad_body_is_4xx_and_never_repeated(
    service: Service, path: str, kind: str, body: bytes
) -> None:
    headers = {"Content-Type": kind} if kind else {}
    answer = service.http.post(path, content=body, headers=headers)
    assert answer.status_code in (400, 422)
    if answer.status_code == 422:
        for problem in answer.json()["detail"]:
            assert problem.keys() == {"type", "loc", "msg"}
    assert MARK not in answer.text
    assert MARK not in service.log


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_16_kib_is_413(service: Service, path: str, chunked: bool) -> None:
    for size, expected in ((16 * 1024 + 1, {413}), (16 * 1024, {200, 201, 401, 409})):
        body = GOOD.ljust(size)
        sent = iter([body[:9000], body[9000:]]) if chunked else body
        answer = service.http.post(path, content=sent, headers=JSON)
        assert answer.status_code in expected


@pytest.mark.parametrize("path", ["/auth/me/", "/auth/login/", "/auth/register/"])
@pytest.mark.parametrize("host", ["127.0.0.1", "elsewhere.example", "a/b?c"])
def test_a_slash_too_many_is_not_redirected(
    service: Service, path: str, host: str
) -> None:
    answer = service.http.post(path, content=GOOD, headers=JSON | {"Host": host})
    assert (answer.status_code, answer.json()) == (404, {"detail": "Not Found"})
    assert "location" not in answer.headers


@pytest.mark.parametrize(
    ("method", "path", "status"),
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
    service: Service, method: str, path: str, status: int
) -> None:
    assert service.http.request(method, path).status_code == status
