"""The README's table of messages: the mistake is made, and the message is the one printed."""

import re
import secrets
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from harness import ROOT, Service, environment, run
from test_readme import README, Elision


def messages() -> list[str]:
    """The first column of the troubleshooting table, without its backticks."""
    table = README.partition("## When something is wrong")[2].partition("\n## ")[0]
    return re.findall(r"^\| `(.+?)` \|", table, re.MULTILINE)


def refusal(*command: str, **settings: str) -> Callable[[str], str]:
    """What a command prints that ought to fail."""
    return lambda database: (
        run(*command, settings=environment(database, **settings)).stderr
    )


def altered_table(database: str) -> str:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("ALTER TABLE users DROP COLUMN is_active")
    return run("python", "init_db.py", database=database).stderr


def no_tables(database: str) -> str:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("DROP TABLE users")
    with Service(database) as service:
        answer = service.login("ann@example.com").text
        return answer if "python init_db.py" in service.log else "nothing in the log"


def unreachable(_: str) -> str:
    with Service("postgresql://ann@127.0.0.1:1/auth") as service:
        answer = service.login("ann@example.com").text
        return answer if "Connection refused" in service.log else "nothing in the log"


def taken_port(database: str) -> str:
    with Service(database) as service:
        command = ["uvicorn", "main:app", "--port", str(service.port)]
        return refusal(*command)(database)


def answer(path: str, body: dict[str, str] | None) -> Callable[[str], str]:
    def ask(database: str) -> str:
        with Service(database) as service:
            if body is not None:
                return service.http.post(path, json=body).text
            return service.me("old-token").text

    return ask


def unquoted_url(database: str) -> str:
    """The shell's own `&` does it: the URL's rest is another command, and it is never set."""
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / ".env").write_text(
            f"DATABASE_URL={database}?sslmode=require&channel_binding=require\n"
            f"JWT_SECRET={secrets.token_hex(32)}\n"
        )
        settings = environment(None)
        settings.pop("DATABASE_URL", None)
        load = f"cd '{name}'; set -a; . ./.env; set +a; cd '{ROOT}'; exec python init_db.py"
        return run("sh", "-c", load, settings=settings).stderr


def init_db_with(change: Callable[[str], str]) -> Callable[[str], str]:
    return lambda database: (
        run("python", "init_db.py", database=change(database)).stderr
    )


MISTAKES: dict[str, Callable[[str], str]] = {
    "error: DATABASE_URL is not set": unquoted_url,
    "ModuleNotFoundError": refusal(sys.executable, "-S", "init_db.py"),
    "error: DATABASE_URL for 127.0.0.1 is not like": init_db_with(
        lambda url: f"psql '{url}'"
    ),
    "error: JWT_SECRET": refusal("uvicorn", "main:app", JWT_SECRET="secret"),
    "error: BCRYPT_ROUNDS": refusal("uvicorn", "main:app", BCRYPT_ROUNDS="99"),
    "There are no tables yet": no_tables,
    "error: table users differs": altered_table,
    "error: cannot create tables": init_db_with(
        lambda _: "postgresql://ann@127.0.0.1:1/auth"
    ),
    "password authentication failed": init_db_with(
        lambda url: re.sub("//[^@]+@", "//postgres:wrong@", url)
    ),
    "Temporarily unavailable": unreachable,
    "address already in use": taken_port,
    "Value error, password is longer": answer(
        "/auth/register", {"email": "ann@example.com", "password": 37 * "é"}
    ),
    "Invalid access token": answer("/auth/me", None),
}


def test_every_message_has_its_mistake() -> None:
    assert len(messages()) == len(MISTAKES)


@pytest.mark.parametrize("beginning", MISTAKES)
def test_the_mistake_gives_the_message(beginning: str, tables: str) -> None:
    (message,) = [m for m in messages() if m.startswith(beginning)]
    printed = MISTAKES[beginning](tables)
    assert Elision()(message) in Elision()(printed)


def test_the_loop_for_windows_serves_here_too(database: str) -> None:
    (option,) = re.findall(r"`uvicorn main:app (--loop \S+)`", README)
    with Service(database, *option.split()) as service:
        assert service.register("windows@example.com").status_code == 201
