"""The environment variables: which are refused at start, in which words, and which work."""

import json
import os

import pytest
from support.command import JWT_SECRET, ROOT, environment, run
from support.postgres import change_url
from support.service import Service

LOAD = "To load the settings from .env: set -a; . ./.env; set +a\n"
URL = "postgresql://ann:sesame@127.0.0.1/auth"
EXPECTED = {
    "DATABASE_URL": "expected a URL such as postgresql://user:password@host/database",
    "JWT_SECRET": "expected 32 characters or more and no spaces, from: openssl rand -hex 32",
    "ACCESS_TOKEN_MINUTES": "expected minutes, from 1 to 525600 (a year)",
    "BCRYPT_ROUNDS": "expected a number from 4 to 16",
}
PEM = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIA-sesame\n-----END PRIVATE KEY-----"
WRONG = {
    "DATABASE_URL": [
        None, "", " ", f"psql '{URL}'", f"'{URL}'", f"DATABASE_URL={URL}", "mysql://ann:sesame@db/auth",
        "sqlite:///sesame.db", "ann:sesame@db/auth", "postgresql://ann:sesame@db:sesame/auth",
        "postgresql://ann:se/same@db/auth", "postgresql://ann:se#same@db/auth", "postgresql:///sesame",
        "postgresql://ann:sesame@h1:5432,h2:5433/auth",
    ],
    "JWT_SECRET": [
        None, "", 31 * "x", f"{PEM}\n", "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAsesame ann@host",
        "a sesame that is long enough but has blanks", 40 * "x" + "\n",
    ],
    "ACCESS_TOKEN_MINUTES": ["", "0", "-1", "1.5", "525601", "99999999999", "9" * 5000, "sesame"],
    "BCRYPT_ROUNDS": ["", "3", "17", "31", "twelve sesames"],
}  # fmt: skip
CASES = [(name, value) for name, values in WRONG.items() for value in values]
# One Python imports main.py again and again: a process for each would take a second of each.
IMPORT = """
import contextlib, io, json, os, sys
for settings in json.loads(sys.argv[1]):
    os.environ.update(settings)
    for name in [name for name in os.environ if os.environ[name] == "unset"]:
        del os.environ[name]
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            import main
        except SystemExit as end:
            print(json.dumps([end.code, said.getvalue()]))
"""
RIGHT = {
    "DATABASE_URL": URL,
    "JWT_SECRET": JWT_SECRET,
    "ACCESS_TOKEN_MINUTES": "30",
    "BCRYPT_ROUNDS": "12",
}


@pytest.fixture(scope="module")
def refusals() -> list[tuple[int, str]]:
    """The exit status and the words of main.py for each wrong setting."""
    wrong = [
        RIGHT | {name: value or "unset" * (value is None)} for name, value in CASES
    ]
    done = run("python", "-c", IMPORT, json.dumps(wrong))
    assert done.stderr == ""
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_a_wrong_setting_is_refused_by_its_name(
    refusals: list[tuple[int, str]], number: int
) -> None:
    assert len(refusals) == len(CASES)
    name, value = CASES[number]
    status, said = refusals[number]
    first, rest = said.split("\n", 1)
    assert (status, rest) == (3, LOAD)
    assert first.startswith(f"error: {name}: ")
    assert first.endswith(f"; {EXPECTED[name]}")
    assert ("Field required" in first) == (value is None)
    assert "sesame" not in said


@pytest.mark.parametrize(
    "command",
    [
        "python init_db.py",
        "uvicorn main:app --port 0",
        "uvicorn main:app --port 0 --workers 2",
    ],
)
def test_all_wrong_settings_are_named_at_once(command: str) -> None:
    wrong = {"JWT_SECRET": "sesame", "ACCESS_TOKEN_MINUTES": "0", "BCRYPT_ROUNDS": "x"}
    refused = run(*command.split(), database="mysql://ann:sesame@db/auth", **wrong)
    for name, expected in EXPECTED.items():
        lines = [line for line in refused.stderr.splitlines() if name in line]
        assert lines and all(line.endswith(expected) for line in lines)
    assert LOAD in refused.stderr
    assert "Traceback" not in refused.stderr
    assert "sesame" not in refused.stderr
    if "workers" not in command:  # whose status is that of the process above them
        assert refused.returncode == 3


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("postgres://ann:sesame@db/auth", ["ann", "sesame", "db", None, "auth"]),
        ("postgresql+psycopg://ann@db:5433/auth", ["ann", None, "db", 5433, "auth"]),
        ("postgresql://ann:se@same@db/auth", ["ann", "se@same", "db", None, "auth"]),
        ("postgresql://ann:se%27%23$@db/auth", ["ann", "se'#$", "db", None, "auth"]),
        ("postgresql://[::1]:5433/auth", [None, None, "::1", 5433, "auth"]),
        ("postgresql://db", [None, None, "db", None, None]),
        (f" {URL}\n", ["ann", "sesame", "127.0.0.1", None, "auth"]),
    ],
)
def test_each_form_of_the_url_is_understood(url: str, parts: list[object]) -> None:
    show = "import main; u = main.DATABASE_URL; print([u.drivername, u.username, "
    show += "u.password, u.host, u.port, u.database])"
    shown = run("python", "-c", show, database=url)
    assert shown.stdout == f"{['postgresql+psycopg', *parts]}\n", shown.stderr


@pytest.mark.parametrize("scheme", ["postgres", "postgresql+psycopg"])
def test_a_url_with_another_scheme_serves(database: str, scheme: str) -> None:
    with Service(change_url(database, drivername=scheme)) as service:
        assert service.me(service.account().token).status_code == 200


def test_the_example_has_every_setting_and_its_default() -> None:
    lines = (ROOT / ".env.example").read_text().splitlines()
    settings = dict(line.split("=", 1) for line in lines if line and line[0] != "#")
    assert settings.keys() == RIGHT.keys()
    defaults = (
        "import main; s = main.settings; print(s.ACCESS_TOKEN_MINUTES, s.BCRYPT_ROUNDS)"
    )
    bare = environment(URL)
    for name in ("ACCESS_TOKEN_MINUTES", "BCRYPT_ROUNDS"):
        bare.pop(name, os.environ.get(name))
    shown = run("python", "-c", defaults, settings=bare)
    minutes, rounds = settings["ACCESS_TOKEN_MINUTES"], settings["BCRYPT_ROUNDS"]
    assert shown.stdout == f"{minutes} {rounds}\n"


FORGE = """
import jwt, main
from init_db import init_db
assert main.settings.BCRYPT_ROUNDS == 5, main.settings.BCRYPT_ROUNDS
assert main.settings.JWT_SECRET == "{secret}"
assert "JWT_SECRET" in __import__("os").environ and main.settings.ACCESS_TOKEN_MINUTES == 30
init_db()
"""


def test_importing_init_db_leaves_the_settings_alone(empty_database: str) -> None:
    script = FORGE.format(secret=JWT_SECRET)
    for order in (script, script.replace("import jwt, main\n", "").replace("init_db\n", "init_db\nimport main\n", 1)):  # fmt: skip
        done = run("python", "-c", order, database=empty_database, BCRYPT_ROUNDS="5")
        assert done.returncode == 0, done.stderr
