"""The README's table of messages: the mistake is typed, and the message is the one printed."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest
from harness import POSTGRES_BIN, environment, free_port
from reader import README, reader

TEXT = README.read_text()
SECTION = TEXT.partition("## When something is wrong")[2].partition("\n## ")[0]
ROWS = dict(re.findall(r"^\| `(.+?)` \| (.+) \|$", SECTION, re.MULTILINE))
(ENV,) = re.findall(r"^\(umask .+?^set -a[^\n]+\n", TEXT, re.MULTILINE | re.DOTALL)

LOAD = "set -a; . ./.env; set +a"
SERVE = (
    "uvicorn main:app --port $PORT & "
    "until curl -so /dev/null $API/docs; do sleep .1; done"
)
POST = "curl -s -H 'Content-Type: application/json' -d"
ANN = """'{"email": "ann@example.com", "password": "correct horse"}'"""
SET_ACTIVE = "psql $DATABASE_URL -c 'UPDATE users SET is_active"


class Mistake(NamedTuple):
    """Commands that make it, commands that then follow the advice and succeed, more output."""

    made: str
    mended: str = ""
    also: tuple[str, ...] = ()


MISTAKES = {
    "error: DATABASE_URL": Mistake(
        f"unset DATABASE_URL; sed -i.old s/\\'//g .env; {LOAD}; python init_db.py\n"
        "export DATABASE_URL=\"psql 'postgresql://ann:sesame@127.0.0.1/auth'\"\n"
        "python init_db.py; DATABASE_URL='postgresql://a:se/same@h/d' python init_db.py",
        f"mv .env.old .env; {LOAD}; python init_db.py",
    ),
    "error: JWT_SECRET": Mistake(
        f"sed -i.old s/^JWT.*// .env; unset JWT_SECRET; {LOAD}; uvicorn main:app",
        f'echo "JWT_SECRET=$(openssl rand -hex 32)" >> .env; {LOAD}; {SERVE}; kill %1',
    ),
    "connection to server on socket": Mistake(
        'unset DATABASE_URL; PGHOST=$PWD psql "$DATABASE_URL" -f verify.sql',
        f'{LOAD}; psql "$DATABASE_URL" -f verify.sql',
    ),
    "ModuleNotFoundError": Mistake(
        "python3 -m venv --without-pip empty; BEFORE=$PATH\n"
        "PATH=$PWD/nowhere; python init_db.py; uvicorn main:app\n"
        "PATH=$PWD/empty/bin; python init_db.py",
        "PATH=$BEFORE; python init_db.py",
        ("python: command not found", "uvicorn: command not found"),
    ),
    "address already in use": Mistake(
        f"{SERVE}; uvicorn main:app --port $PORT",
        "kill %1; wait %1; PORT=$OTHER_PORT; API=http://127.0.0.1:$PORT\n"
        f"{SERVE}; kill %1",
    ),
    'relation "users" does not exist': Mistake(
        "psql $DATABASE_URL -c 'DROP TABLE users'; psql $DATABASE_URL -f verify.sql",
        "python init_db.py; psql $DATABASE_URL -f verify.sql",
    ),
    "not as the model has it": Mistake(
        "psql $DATABASE_URL -c 'ALTER TABLE users DROP is_active'; python init_db.py",
        "psql $DATABASE_URL -c 'DROP TABLE users'; python init_db.py",
    ),
    "Connection refused": Mistake(
        "DATABASE_URL=postgresql://ann@127.0.0.1:1/auth python init_db.py"
    ),
    "password authentication failed": Mistake(
        'DATABASE_URL="$(echo $DATABASE_URL | sed s,//[^@]*@,//postgres:wrong@,)" '
        "python init_db.py"
    ),
    "Unavailable, try again": Mistake(
        f"DATABASE_URL=postgresql://ann@127.0.0.1:1/auth {SERVE}\n"
        f"{POST} {ANN} $API/auth/login; kill %1",
        "",
        ("Connection refused; try again, or see README.md",),
    ),
    "Input should be a valid dictionary": Mistake(
        f"{SERVE}; curl -s -d {ANN} $API/auth/register",
        f"""JSON='Content-Type: application/json'
        curl -sf -d {ANN} -H "$JSON" $API/auth/register; kill %1""",
    ),
    "Wrong email or password": Mistake(
        f"{SERVE}; {POST} {ANN} $API/auth/register; {SET_ACTIVE}=false'\n"
        f"{POST} {ANN} $API/auth/login",
        f"{SET_ACTIVE}=true'; {POST} {ANN} -f $API/auth/login; kill %1",
    ),
    "Invalid access token": Mistake(
        f"{SERVE}; curl -s -H 'Authorization: Bearer old' $API/auth/me; kill %1"
    ),
}
OF_NEON = [  # met in test_neon.py, where a stand-in says them
    "Control plane request failed: endpoint cannot be found",
    "endpoint is temporarily unavailable",
    "Endpoint ID is not specified",
    "unsupported startup parameter in options",
    "connection timeout expired",
]


def test_every_message_has_its_mistake() -> None:
    assert len(ROWS) == len(MISTAKES) + len(OF_NEON)
    assert set(OF_NEON) <= set(ROWS)
    met = (Path(__file__).parent / "test_neon.py").read_text()
    assert [
        words
        for words in OF_NEON
        if words.removeprefix("Control plane request failed: ") not in met
    ] == []


@pytest.mark.parametrize("beginning", MISTAKES)
def test_the_mistake_gives_the_message(beginning: str, tables: str) -> None:
    (message,) = [m for m in ROWS if m.startswith(beginning)]
    mistake = MISTAKES[beginning]
    port = free_port()
    settings = {
        "PATH": f"{environment(None)['PATH']}:{POSTGRES_BIN}",
        "PORT": str(port),
        "OTHER_PORT": str(free_port()),
        "API": f"http://127.0.0.1:{port}",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    with reader(tables, **settings) as someone:
        (terminal,) = someone.terminals
        terminal.run(f"DATABASE_URL='{someone.url}'\n{ENV}")
        printed = terminal.type(mistake.made)
        assert message in printed
        assert all(words in printed for words in mistake.also)
        terminal.run(mistake.mended)
