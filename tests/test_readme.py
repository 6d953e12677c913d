"""The README is a program: each of its commands is run, and prints what stands beneath it."""

import re
import subprocess
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
from harness import ROOT, Service, environment, free_port, fresh_database, run
from pooler import from_npm
from reader import README, Reader, reader, same
from test_messages import ENV, MISTAKES
from try_it import is_taken

TEXT = README.read_text()


def blank(text: str) -> str:
    """As many lines without a word, so that what follows keeps its line's number."""
    return "\n" * text.count("\n")


def section(heading: str) -> str:
    """A section of the README, from its heading to the next of the same level."""
    return re.search(rf"^## {heading}\n.*?(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)[
        0
    ]


def only(part: str) -> str:
    """The README up to the end of a part, blank before it."""
    return blank(TEXT[: TEXT.index(part)]) + part


TRY_IT, TESTS = section("Try it"), section("The tests")
ALL_ELSE = TEXT.replace(TRY_IT, blank(TRY_IT)).replace(TESTS, blank(TESTS))


@pytest.fixture
def ports() -> None:
    """The ports that the README's commands name are free."""
    for port in sorted(set(re.findall(r"127\.0\.0\.1:(\d{4})\b", TEXT))):
        assert not is_taken(int(port)), f"port {port} is taken: end that program first"


@pytest.mark.usefixtures("ports")
def test_try_it(empty_database: str) -> None:
    with reader(empty_database) as someone:
        someone.follow(only(TRY_IT))
    assert_every_word_counts(someone, only(TRY_IT))


@pytest.mark.usefixtures("ports")
def test_from_neon_to_alembic(empty_database: str, server: str) -> None:
    """With nothing done before: whoever only wants Neon starts there."""
    with reader(empty_database) as someone, fresh_database(server) as new:
        someone.follow(ALL_ELSE)
        from_then_on = f"export DATABASE_URL='{new}'\n{NEW_DATABASE}\nalembic check"
        printed = someone.terminals[-1].run(from_then_on)
        assert printed.endswith("No new upgrade operations detected.\n")
        typed = (someone.home / "npx-commands").read_text().splitlines()
        missing = [path for path in FILES if not (someone.folder / path).exists()]
    assert typed == NEON_COMMANDS
    assert missing == []
    assert_every_word_counts(someone, ALL_ELSE)


def assert_every_word_counts(someone: Reader, markdown: str) -> None:
    """Each command was compared, and would not have passed with one word changed in its output."""
    assert len(someone.compared) == len(re.findall("^```sh", markdown, re.MULTILINE))
    for expected, printed in someone.compared:
        for word in re.finditer(r"[^\s<>]+(?![^<>]*>)", expected):  # no placeholder
            if word[0] != "...":
                changed = f"{expected[: word.end()]}x{expected[word.end() :]}"
                assert not same(changed, printed), changed


NEON_COMMANDS = [
    "-y neon@latest auth",
    "-y neon@latest projects create --name my-auth --set-context --no-secrets",
    "-y neon@latest connection-string --pooled",
    "-y neon@latest claim create --file .env.neon",
]
NEW_DATABASE = "python init_db.py notes\nalembic stamp head"


def test_only_neon_s_commands_are_stood_in_for() -> None:
    marked = re.findall(r"^```sh neon\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    words = r"npx (-y neon@latest [^\n)]+)"
    assert re.findall(words, "".join(marked)) == NEON_COMMANDS
    in_prose = [name for name in OF_OTHERS if name.startswith("npx")]
    assert TEXT.count("npx") == len(NEON_COMMANDS) + len(in_prose)


def test_ci_runs_the_readme_s_own_test_command() -> None:
    (command,) = re.findall("^python3 -m venv .* -m pytest tests$", TEXT, re.MULTILINE)
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_number_of_tests() -> None:
    listed = run("python", "-m", "pytest", "tests", "--collect-only", "-q", "-n", "0")
    (number,) = re.findall(r"^(\d+) tests collected", listed.stdout, re.MULTILINE)
    assert f"= {number} passed in " in TESTS


# --- What is said outside the blocks

PROSE = re.sub(r"^```.*?^```$", "", TEXT, flags=re.MULTILINE | re.DOTALL)
NAMES = set(
    re.findall(r"`([^`\n]+)`", re.sub(r"^\| `.+?` \|", "", PROSE, flags=re.MULTILINE))
)
FILES = {
    name
    for name in NAMES
    if re.fullmatch(r"[\w./]+\.(py|sql|ini|txt)|\.env[\w.]*", name)
}


def test_links_lead_somewhere() -> None:
    links = set(re.findall(r"\]\(([^)]+)\)", PROSE))
    local = {link for link in links if not link.startswith(("#", "https://"))}
    assert all((ROOT / link).exists() for link in local), local
    visible = {p.name for p in ROOT.iterdir() if not p.name.startswith((".", "__"))}
    assert visible == local - {".env.example"} | {"README.md"}
    headings = re.findall("^##+ (.+)$", TEXT, re.MULTILINE)
    anchors = {
        "#" + re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings
    }
    assert {link for link in links if link.startswith("#")} <= anchors


DOCS = "/docs"
BEHIND_A_PROXY = ["--host", "0.0.0.0", "--forwarded-allow-ips", "127.0.0.1"]
ON_WINDOWS = ["--loop", "asyncio:SelectorEventLoop"]


def test_behind_a_proxy_the_log_shows_the_client(database: str) -> None:
    with Service(database, *BEHIND_A_PROXY) as service:
        service.http.get("/auth/me", headers={"X-Forwarded-For": "203.0.113.9"})
        assert '203.0.113.9:0 - "GET /auth/me' in service.log


def test_the_loop_for_windows_serves_here_too(database: str) -> None:
    with Service(database, *ON_WINDOWS) as service:
        assert service.register("windows@example.com").status_code == 201


def test_docs_has_an_authorize_button(database: str) -> None:
    with Service(database) as service:
        assert "swagger-ui" in service.http.get(DOCS).text
        described = service.http.get("/openapi.json").json()
        assert described["components"]["securitySchemes"]


CHECK = re.search("^```python check.py\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)[1]
JOSE = """
import { jwtVerify } from "jose";
const key = new TextEncoder().encode(process.env.JWT_SECRET);
const needed = { algorithms: ["HS256"], requiredClaims: ["sub", "iat", "exp"] };
const { payload } = await jwtVerify(process.argv[2], key, needed);
console.log("user", payload.sub);
"""


def test_another_service_checks_a_token_in_either_language(
    database: str, tmp_path: Path
) -> None:
    from_npm("jose@6", tmp_path)
    (tmp_path / "check.mjs").write_text(JOSE)
    (tmp_path / "check.py").write_text(CHECK)
    with Service(database) as service:
        user_id = service.register("elsewhere@example.com").json()["id"]
        token = service.login("elsewhere@example.com").json()["access_token"]
    for command in ("node", "check.mjs"), ("python", "check.py"):
        good = run(*command, token, folder=tmp_path)
        assert (good.returncode, good.stdout) == (0, f"user {user_id}\n"), good.stderr
        assert run(*command, token[:-4] + "AAAA", folder=tmp_path).returncode == 1
        assert run(*command, token, folder=tmp_path, JWT_SECRET=64 * "x").returncode


def test_the_log_appears_under_another_server(database: str, tmp_path: Path) -> None:
    port = free_port()
    assert run("pip", "install", "-q", "--target", tmp_path, "hypercorn").stdout == ""
    command = ["python", "-m", "hypercorn", "main:app", "--bind", f"127.0.0.1:{port}"]
    settings = environment(database, PYTHONPATH=str(tmp_path))
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(command, cwd=ROOT, env=settings, stderr=log)
    ask = httpx.Client(transport=httpx.HTTPTransport(retries=10))  # while it starts
    try:
        who = {"email": "hyper@example.com", "password": "correct horse"}
        registered = ask.post(f"http://127.0.0.1:{port}/auth/register", json=who)
        assert registered.status_code == 201
        line = r"\d{4}-\d\d-\d\d [\d:,]+ INFO registered: 'hyper@example.com'"
        assert re.search(f"^{line}", (tmp_path / "log").read_text(), re.MULTILINE)
    finally:
        server.terminate()
        server.wait(30)


CODE = [
    ".ci/run", "main.py", "init_db.py", ".env.example",
    "tests/conftest.py", "tests/test_walkthrough.py",
]  # fmt: skip
OF_OTHERS = {  # names in the prose that are neither the project's nor uvicorn's
    "apt-get install postgresql-client", "brew install libpq",
    "brew link --force libpq", "npx -y neon@latest psql --", ".venv/Scripts/activate",
    "/etc/nginx/conf.d/auth.conf", "nginx -t && nginx -s reload", "npx -y neon@latest claim accept",
    "rm -f .neon .env.neon", "channel_binding=disable", "sslsni=0", "?options=-c...",
    "ALTER ROLE ... SET", "python -m pip freeze > requirements.lock", "Failed to fetch",
    "pip install uvloop httptools", "DATABASE_URL='postgresql://user:password@host:5432/database'",
    "dependency_overrides[get_session]", "uvicorn cors:app", "MissingGreenlet",
    "selectinload", "postgres://",
    "apt-get install chromium nginx-light npm openssl pgbouncer postgresql", "&", "?", "@", quote("@"), "/", quote("/", safe=""), "%", quote("%"), "-pooler",
}  # fmt: skip


def test_every_name_in_the_prose_is_one() -> None:
    known = "\n".join(
        [
            *((ROOT / file).read_text() for file in CODE),
            *re.findall(r"^```.*?^```$", TEXT, re.MULTILINE | re.DOTALL),
            *(words for mistake in MISTAKES.values() for words in mistake.also),
            *(mistake.made + mistake.mended for mistake in MISTAKES.values()),
            *(NEW_DATABASE, DOCS, *BEHIND_A_PROXY, *ON_WINDOWS),
            run("uvicorn", "--help").stdout,
        ]
    )
    unknown = [
        word
        for name in NAMES - OF_OTHERS - FILES
        for word in re.findall(r"""[^\s='"]+""", name)
        if not (ROOT / word).exists()
        and not re.search(rf"(?<!\w){re.escape(word)}(?!\w)", known)
    ]
    assert unknown == []


@pytest.mark.parametrize(
    ("said", "by"),
    [
        ("takes more than 14 seconds gets 503", "asyncio.timeout(14), "),
        ("seconds, when a connection", "and up to 10 more to end a hung query"),
        ("gets 503 with `Retry-After`", '503, {"Retry-After": "5"}'),
        ("after 5 idle minutes", "Neon suspends after 300 idle ones"),
        ("Each opens up to 20 connections", "pool_size=20,\n    max_overflow=0,"),
        ("--workers 4` opens up to 80", "pool_size=20,"),
        ("tokens last 30 minutes", "ACCESS_TOKEN_MINUTES: int = Field(30,"),
        ("bcrypt at cost 12", "BCRYPT_ROUNDS: int = Field(12,"),
        ("8 characters meet OWASP", "min_length=8,"),
        ("the service: 300 lines", ""),
    ],
)  # fmt: skip
def test_numbers_that_the_prose_repeats(said: str, by: str) -> None:
    assert said in PROSE
    main = (ROOT / "main.py").read_text()
    assert by in main
    assert main.count("\n") <= 300


def test_seven_packages_and_four_settings() -> None:
    assert "| seven packages |" in PROSE
    assert len((ROOT / "requirements.txt").read_text().splitlines()) == 7
    assert "has the two settings that are left at their defaults here" in PROSE
    settings = re.findall(
        "^[A-Z_]+=", (ROOT / ".env.example").read_text(), re.MULTILINE
    )
    assert len(settings) - ENV.count("=") == 2
