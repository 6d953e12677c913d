"""docs/errors.md: every message is met in the situation of its row, and its fix works.

The commands are typed in bash, in a copy of the project. Neon's messages are those of
test_neon.py. Two things are stood in for: Python 3.10, by a datetime without UTC, and
`docker run --env-file`, by `env`, which keeps quotes as well.
"""

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from support.command import JWT_SECRET, ROOT, environment, free_port, missing, run
from support.postgres import POSTGRES_BIN, Postgres, change_url
from test_neon import SITUATIONS as OF_NEON

PAGE = (ROOT / "docs" / "errors.md").read_text()
ROWS = re.findall(r"^\| (`+)(.+?)\1 \| .+ \|$", PAGE, re.MULTILINE)
FILES = ("main.py", "init_db.py", "verify.sql", "requirements.txt")
NEEDED = {"fish": "fish", "/usr/bin/python3": "/usr/bin/python3"}

START = """
LOAD='set -a; . ./.env; set +a'
INIT='python init_db.py'
J='Content-Type: application/json'
ANN='{"email": "ann@example.com", "password": "correct horse"}'
serve() {
    uvicorn "${@:-main:app}" --port $PORT &
    until curl -so /dev/null $API/docs; do sleep .1; done
}
post() { curl -sS -H "$J" -d "$2" $API/auth/$1; }
with() { DATABASE_URL=$1 python init_db.py; }
query() { psql -q "$DATABASE_URL" -c "$1"; }
template() { rm -rf t alembic.ini; alembic init t; sed -i "s,^sqlalchemy.url.*,sqlalchemy.url=$1," alembic.ini; alembic current; }
migrate() {
    alembic init migrations; cp env.py migrations; query 'DROP TABLE users'
    alembic revision --autogenerate -m first; python init_db.py
}
end() { set +e; kill $(jobs -p) 2> /dev/null; PATH=$OLD_PATH; wait; }
trap end EXIT
"""
ENV_PY = """
from alembic import context
from sqlalchemy import create_engine
from main import DATABASE_URL, Base
with create_engine(DATABASE_URL).connect() as connection:
    context.configure(connection=connection, target_metadata=Base.metadata)
    with context.begin_transaction():
        context.run_migrations()
"""


def row(*messages: str, mistake: str, fix: str = "") -> tuple[Any, ...]:
    """Messages, the mistake that brings them, and the fix, which must succeed."""
    return messages, mistake, fix


URL = "error: DATABASE_URL: Input should be a valid URL, "
SECRET = "error: JWT_SECRET: "
BUSY = "(query 'BEGIN; LOCK users; SELECT pg_sleep(14)' &); sleep 1; "
FULL = (
    "import os, psycopg; c = [psycopg.connect(os.environ['LOW']) for _ in range(999)]"
)
ROLE = """query "CREATE ROLE $ROLE LOGIN PASSWORD 'low'"; """
DROP_ROLE = 'query "DROP OWNED BY $ROLE"; query "DROP ROLE $ROLE"'
TRUST = """HBA=$(psql -Atc 'SHOW hba_file' $DATABASE_URL); query "COPY (VALUES
    ('host all $ROLE 127.0.0.1/32 trust'), ('host all all 127.0.0.1/32 scram-sha-256'))
    TO '$HBA'"; query 'SELECT pg_reload_conf()'; sleep 1; """
MANY = (
    'seq {} | xargs -P {} -I% curl -sS -o /dev/null -H "$J" -d "$ANN" $API/auth/login; '
)
EMPTY = "python -m venv --without-pip empty; PATH=empty/bin:/usr/bin:/bin; "
SITUATIONS = [
    row("error: DATABASE_URL: Field required", f"{SECRET}Field required", mistake="unset DATABASE_URL JWT_SECRET; . ./.env; $INIT", fix="eval $LOAD; $INIT"),
    row("error: DATABASE_URL: Field required", mistake="unset DATABASE_URL; (printf '\\xef\\xbb\\xbf'; cat .env) > bom; mv bom .env; eval $LOAD; $INIT", fix="tail -c +4 .env > new; mv new .env; eval $LOAD; $INIT"),
    row(f"{SECRET}Field required", mistake="unset JWT_SECRET; $INIT", fix='echo "JWT_SECRET=$(openssl rand -hex 32)" >> .env; eval $LOAD; $INIT'),
    row(f"{SECRET}String should have at least 32 characters", mistake="JWT_SECRET=short $INIT", fix="JWT_SECRET=$(openssl rand -hex 32) $INIT"),
    row(f"{SECRET}String should match pattern '^\\S+$'", mistake="sed -i 's/$/\\r/' .env; eval $LOAD; $INIT", fix="tr -d '\\r' < .env > .env.new && mv .env.new .env; eval $LOAD; $INIT"),
    row(f"{URL}input is empty", mistake='with ""'),
    row(f"{URL}relative URL without a base", mistake='with "psql $DATABASE_URL"; env $(cat .env) $INIT', fix="tr -d \"'\" < .env > docker.env; env $(cat docker.env) $INIT"),
    row(f"{URL}invalid port number", mistake="with 'postgresql://a:b#c@127.0.0.1/d'; with 'postgresql://a:b/c@127.0.0.1/d'", fix="(! with 'postgresql://a:b%23c%2Fd@127.0.0.1:1/d') 2>&1 | grep refused"),
    row(f"{URL}empty host", mistake="with postgresql:///d", fix="(! with 'postgresql://a@localhost/d?host=/nowhere') 2>&1 | grep /nowhere/.s.PGSQL"),
    row(f"{URL}invalid domain character", mistake="with 'postgresql://user:password@<host>/database'"),
    row("error: DATABASE_URL: URL scheme should be", mistake="with mysql://ann@127.0.0.1/d"),
    row("error: BCRYPT_ROUNDS: Input should be", "error: ACCESS_TOKEN_MINUTES: Input should be", mistake="BCRYPT_ROUNDS=17 ACCESS_TOKEN_MINUTES=30m $INIT", fix="BCRYPT_ROUNDS=12 ACCESS_TOKEN_MINUTES=30 $INIT"),
    row("address already in use", mistake="serve; uvicorn main:app --port $PORT", fix="kill %1; wait; serve"),
    row("uvicorn: command not found", "python: command not found", mistake="PATH=$PWD; uvicorn main:app; python init_db.py", fix="PATH=$OLD_PATH; $INIT"),
    row("No module named 'sqlalchemy'", mistake=f"{EMPTY} $INIT", fix="PATH=$OLD_PATH; $INIT"),
    row('Could not import module "main"', mistake="cd /; uvicorn main:app", fix="cd $OLDPWD; serve"),
    row('Import string "main" must be in format', mistake="uvicorn main", fix='serve; test -z "$(python main.py)"'),
    row('Attribute "api" not found in module "main"', mistake="uvicorn main:api", fix="serve"),
    row("No module named 'httpx'", mistake="echo 'import httpx' > notes.py; $ALONE/uvicorn notes:app", fix="$ALONE/pip install -q httpx; $ALONE/python init_db.py notes"),
    row("cannot import name 'UTC' from 'datetime'", mistake="python -c 'import datetime; del datetime.UTC; import main'", fix="python -c 'import main'"),
    row("No module named 'dotenv'", mistake="$ALONE/uvicorn --env-file .env main:app", fix="$ALONE/pip install -q python-dotenv; unset DATABASE_URL; PATH=$ALONE:$PATH; serve main:app --env-file .env; post login \"$ANN\" | grep password"),
    row('To use the fastapi command, please install "fastapi[standard]"', mistake="$ALONE/fastapi dev"),
    row("missing 1 required positional argument: 'send'", mistake="$ALONE/gunicorn main:app -b 127.0.0.1:$PORT & curl -so /dev/null --retry 50 --retry-connrefused --retry-delay 1 $API/docs", fix="kill %1; wait; serve main:app --workers 2"),
    row("Database unavailable, try again later", 'relation "users" does not exist; run: python init_db.py', mistake='query "DROP TABLE users"; serve; post login "$ANN"', fix='$INIT; post register "$ANN" | grep ann@'),
    row("Too many logins, try again later", "too many logins: no slot was free to hash within 3 seconds", mistake=f"export BCRYPT_ROUNDS=14; serve; {MANY.format(16, 16)}".replace("-o /dev/null", ""), fix='kill %1; wait; BCRYPT_ROUNDS=4; serve; post register "$ANN" | grep ann@'),
    row("Wrong email or password", mistake='serve; post register "$ANN"; query "UPDATE users SET is_active = false"; post login "$ANN"', fix='query "UPDATE users SET is_active = true WHERE email = \'ann@example.com\'"; post login "$ANN" | grep access_token'),
    row("Not authenticated", "Invalid access token", mistake="serve; curl -sS $API/auth/me; curl -sS $API/auth/me -H 'Authorization: Bearer old'", fix='post register "$ANN"; T=$(post login "$ANN" | cut -d \'"\' -f 4); curl -sSf $API/auth/me -H "Authorization: Bearer $T"'),
    row("Email already registered", mistake='serve; post register "$ANN"; post register "$(echo "$ANN" | sed s/ann/ANN/)"'),
    row("Input should be a valid dictionary or object to extract fields from", mistake='serve; curl -sS $API/auth/register -d "$ANN"', fix='post register "$ANN" | grep ann@'),
    row("JSON decode error", mistake='serve; post register "{\'email\': 1}"', fix='post register "$ANN" | grep ann@'),
    row("value is not a valid email address", "String should have at least 8 characters", mistake='serve; post register \'{"email": "ann", "password": "short"}\''),
    row("Field required", "Input should be a valid string", mistake='serve; post register "{}"; post register \'{"email": "ann@example.com", "password": 12345678}\'', fix='post register "$ANN" | grep ann@'),
    row("String should have at most 72 characters", mistake='serve; post register "{\\"email\\": \\"ann@example.com\\", \\"password\\": \\"$(printf "a%.0s" {1..73})\\"}"'),
    row("must be 72 bytes of UTF-8 or fewer, without NUL characters", mistake='serve; post register "{\\"email\\": \\"ann@example.com\\", \\"password\\": \\"$(printf "é%.0s" {1..37})\\"}"', fix='post register "{\\"email\\": \\"ann@example.com\\", \\"password\\": \\"$(printf "é%.0s" {1..36})\\"}" | grep ann@'),
    row("There was an error parsing the body", mistake="serve; post register $'\\xff'"),
    row("Internal Server Error", mistake="printf 'from main import app\\n@app.get(\"/bad\")\\nasync def bad() -> int:\\n    return 1 // 0\\n' > notes.py; serve notes:app; curl -sS $API/bad", fix="kill %1; wait; sed -i s,//,+, notes.py; serve notes:app; curl -sSf $API/bad"),
    row("Content Too Large", mistake="serve; post register $(printf 'a%.0s' {1..17000})"),
    row("Not Found", "Method Not Allowed", mistake='serve; post register/ "$ANN"; curl -sS $API/auth/login', fix='post register "$ANN" | grep ann@'),
    row("error: no tables created: table users lacks is_active", mistake='query "ALTER TABLE users DROP is_active"; $INIT', fix='query "DROP TABLE users"; $INIT'),
    row("error: no tables created: No module named '…'", "error: no tables created: … is not in this folder", mistake="$INIT nots; $INIT ../notes.py", fix="touch notes.py; $INIT notes"),
    row("permission denied for schema public", mistake=f"{ROLE} query 'DROP TABLE users'; with $LOW", fix=f'query "GRANT CREATE ON SCHEMA public TO $ROLE"; with $LOW; {DROP_ROLE}'),
    row("Connection refused", mistake="with postgresql://ann@127.0.0.1:1/d"),
    row("failed to resolve host '…'", 'could not translate host name "…" to address', mistake="with postgresql://ann@nowhere.invalid/d; psql postgresql://a:b@c@127.0.0.1/d"),
    row('password authentication failed for user "…"', mistake="with $WRONG", fix="$INIT"),
    row("fe_sendauth: no password supplied", mistake="with ${WRONG/:wrong/}", fix="$INIT"),
    row('FATAL: database "…" does not exist', mistake="with ${DATABASE_URL%/*}/nowhere", fix="$INIT"),
    row('relation "notes" does not exist', mistake="printf 'from main import Base\\nfrom sqlalchemy import Column, Integer, Table\\nTable(\"notes\", Base.metadata, Column(\"id\", Integer))\\n' > notes.py; $INIT; query 'TABLE notes'", fix="$INIT notes; query 'TABLE notes'"),
    row('role "…" does not exist', mistake=f"{TRUST} with $LOW", fix=f"{ROLE} with $LOW; {DROP_ROLE}"),
    row("server does not support SSL, but SSL was required", mistake="with $DATABASE_URL?sslmode=require", fix="$INIT"),
    row('invalid connection option "…"', 'invalid URI query parameter: "…"', mistake="for option in pgbouncer=true schema=x connection_limit=1; do psql $DATABASE_URL?$option; done; with $DATABASE_URL?schema=x", fix="$INIT"),
    row("no answer within 10 seconds", "QueuePool limit of size 10 overflow 0 reached", mistake=f"serve; {BUSY} {MANY.format(11, 11)}", fix='query "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE \'%sleep%\' AND pid <> pg_backend_pid()" > /dev/null; post register "$ANN" | grep ann@'),
    row("hash not renewed, the next login tries again", mistake='BCRYPT_ROUNDS=5 serve; post register "$ANN"; kill %1; wait; query "ALTER TABLE users ADD CHECK (substr(hashed_password, 5, 2) = \'05\')"; serve; post login "$ANN"', fix='query "ALTER TABLE users DROP CONSTRAINT users_hashed_password_check"; post login "$ANN" | grep token'),
    row("remaining connection slots are reserved", mistake=f'{ROLE} python -c "{FULL}"', fix=f"with $LOW; {DROP_ROLE}"),
    row("cannot execute INSERT in a read-only transaction", mistake='DATABASE_URL="$DATABASE_URL?options=-cdefault_transaction_read_only%3Don"; serve; post register "$ANN"', fix='kill %1; wait; DATABASE_URL=${DATABASE_URL%\\?*}; serve; post register "$ANN" | grep ann@'),
    row('connection to server on socket "…" failed', mistake="unset DATABASE_URL; PGHOST=/nowhere psql $DATABASE_URL -f verify.sql", fix='eval $LOAD; psql "$DATABASE_URL" -f verify.sql'),
    row("psql: command not found", mistake="PATH=$PWD; psql", fix="PATH=$OLD_PATH; query 'SELECT 1'"),
    row('invalid integer value "…" for connection option "port"', mistake="psql 'postgresql://a:b/c@127.0.0.1/d'", fix="(! psql 'postgresql://a:b%2Fc%40%23%25@127.0.0.1:1/d') 2>&1 | grep refused"),
    row(".env: No such file or directory", "can't open file '…init_db.py'", mistake="mkdir t; cd t; . ./.env; $INIT", fix="cd ..; eval $LOAD; $INIT"),
    row("DATABASE_URL: command not found", mistake="sed -i 's/=/ = /' .env; . ./.env", fix="sed -i 's/ = /=/' .env; eval $LOAD; $INIT"),
    row('ERROR: relation "users" does not exist', mistake="query 'DROP TABLE users'; psql $DATABASE_URL -f verify.sql", fix="$INIT; psql $DATABASE_URL -f verify.sql"),
    row("unexpected EOF while looking for matching", mistake="echo \"DATABASE_URL='postgresql://a:b'c@h/d'\" > bad; . ./bad", fix="echo \"DATABASE_URL='postgresql://a:b%27c@h/d'\" > good; . ./good"),
    row("Unsupported use of '='. In fish, please use", mistake="unset DATABASE_URL; fish -c '. ./.env'; fish -c '. $ALONE/activate'", fix="fish -c '. $ALONE/activate.fish'; bash -c 'set -a; . ./.env; exec fish -c \"python init_db.py\"'"),
    row("curl: (7) Failed to connect to", mistake='post login "$ANN"', fix="serve; curl -sSfo /dev/null $API/docs"),
    row("curl: (3)", "curl: (35)", mistake="serve; curl -sS $NOTHING/auth/me; curl -sS https://127.0.0.1:$PORT/docs", fix="curl -sSfo /dev/null $API/docs"),
    row("Target database is not up to date.", 'relation "users" already exists', "Can't locate revision identified by '…'", mistake="migrate; alembic revision --autogenerate -m next; alembic upgrade head; alembic stamp head; mv migrations/versions .; alembic upgrade head", fix="mv versions migrations; alembic upgrade head; alembic revision --autogenerate -m next; alembic upgrade head"),
    row("No module named 'psycopg2'", "'%' must be followed by '%' or '('", mistake="template $DATABASE_URL; template postgresql+psycopg2://ann@h/d", fix="U=${DATABASE_URL/sql:/sql+psycopg:}; template ${U/\\%/%%}"),
    row("error: externally-managed-environment", mistake="/usr/bin/python3 -m pip install bcrypt", fix=". $ALONE/activate; pip install -q bcrypt"),
]  # fmt: skip


def as_printed(message: str) -> str:
    """A pattern in which … is anything, and a blank is one or more."""
    return re.escape(message).replace("…", ".+").replace("\\ ", "\\s+")


def test_every_row_has_its_situation() -> None:
    rows = {message for _, message in ROWS}
    assert len(rows) == len(ROWS) == PAGE.count("\n| `")
    met = {message for messages, _, _ in SITUATIONS for message in messages}
    assert met - rows == set()
    neon, said = rows - met, [situation.text for situation in OF_NEON]
    patterns = {row: re.compile(as_printed(row)) for row in neon}
    for row, pattern in patterns.items():
        assert any(pattern.fullmatch(text) for text in said), row
    for text in said:
        assert any(pattern.fullmatch(text) for pattern in patterns.values()), text


@pytest.fixture(scope="module")
def server(postgres: Postgres) -> str:
    """A server without TLS, whatever TEST_DATABASE_URL says: some messages need it."""
    return postgres.url("postgres")


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the service's requirements and gunicorn only."""
    folder = tmp_path_factory.mktemp("alone")
    run("uv", "venv", "--seed", "--python", sys.executable, folder).check_returncode()
    python = "--python", folder / "bin" / "python"
    install = "uv", "pip", "install", "--compile-bytecode", *python, "gunicorn", "-r"
    run(*install, ROOT / "requirements.txt").check_returncode()
    return folder / "bin"


@pytest.mark.parametrize("row", SITUATIONS, ids=[" ".join(r[0]) for r in SITUATIONS])
def test_mistake_and_fix(
    tmp_path: Path, request: pytest.FixtureRequest, row: tuple[Any, ...]
) -> None:
    messages, mistake, fix = row
    changes = re.search("serve|query|migrate", mistake)
    tables = request.getfixturevalue("tables" if changes else "database")
    for word, program in NEEDED.items():
        if word in mistake and shutil.which(program) is None:
            missing(program)
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "env.py").write_text(ENV_PY)
    env = f"DATABASE_URL='{tables}'\nJWT_SECRET='{JWT_SECRET}'\n"
    (tmp_path / ".env").write_text(env)
    port, path = free_port(), f"{environment(None)['PATH']}:{POSTGRES_BIN}"
    settings = environment(tables, PATH=path, OLD_PATH=path, HOME=str(tmp_path)) | {
        "PORT": str(port),
        "API": f"http://127.0.0.1:{port}",
        "ROLE": f"low_{port}",
        "LOW": change_url(tables, username=f"low_{port}", password="low"),
        "WRONG": change_url(tables, password="wrong"),
    }
    if "$ALONE" in mistake + fix:
        settings["ALONE"] = str(request.getfixturevalue("alone"))
    script = f"{START}\n{mistake}\necho MENDED\nset -e -o pipefail\n{fix}\n"
    done = run("bash", "-c", f"exec 2>&1; {script}", folder=tmp_path, settings=settings)
    printed, _, afterwards = done.stdout.partition("\nMENDED\n")
    for message in messages:
        assert re.search(as_printed(message), printed), done.stdout
        assert not re.search(as_printed(message), afterwards), done.stdout
    assert done.returncode == 0, done.stdout
