"""The pages are programs: each command is typed as printed, and prints what stands beneath it."""

import re
from pathlib import Path

import pytest
from support.command import ROOT, run
from support.page import PAGES, README, Reader, docstring_example, reader, same
from support.postgres import change_url, fresh_database
from support.service import Service
from support.try_out import is_taken

TEXT = {page: page.read_text() for page in PAGES}
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
PROSE = {page: FENCE.sub("", text) for page, text in TEXT.items()}


def section(heading: str) -> str:
    """A section of the README, from its heading to the next of the same level."""
    end = r"(?=^## |\Z)"
    return re.search(
        rf"^## {heading}\n.*?{end}", TEXT[README], re.MULTILINE | re.DOTALL
    )[0]


TRY_IT = section("Try it")
WALK = section("On Neon, step by step") + section("Protect a route of your own")
NEON_COMMANDS = [
    "-y neon@latest auth",
    "-y neon@latest projects create --name my-auth --set-context --no-secrets",
    "-y neon@latest connection-string --pooled",
    "-y neon@latest claim create --file .env.neon",
]


@pytest.fixture
def _ports() -> None:
    """The port that the pages name is free."""
    assert not is_taken(8000), "port 8000 is taken: end that program first"


def assert_every_word_counts(someone: Reader, markdown: str) -> None:
    """Each command was compared, and would not have passed with one word of its output changed."""
    assert len(someone.compared) == len(re.findall(r"^```sh( neon| serve)?$", markdown, re.MULTILINE))  # fmt: skip
    for expected, printed in someone.compared:
        for word in re.finditer(r"[^\s<>]+(?![^<>]*>)", expected):  # no placeholder
            if word[0] != "...":
                changed = f"{expected[: word.end()]}x{expected[word.end() :]}"
                assert not same(changed, printed), changed


# --- Typed as printed
@pytest.mark.usefixtures("_ports")
def test_try_it(empty_database: str) -> None:
    with reader(empty_database) as someone:
        someone.terminals[0].run("mkdir ~/elsewhere; cd ~/elsewhere")
        someone.follow(TRY_IT)
        assert_every_word_counts(someone, TRY_IT)


@pytest.mark.usefixtures("_ports")
def test_the_walkthrough_and_the_pages_after_it(
    empty_database: str, server: str
) -> None:
    """Nobody has done anything before; after Alembic, an empty database needs one command."""
    pages = [ROOT / "docs" / name for name in ("run.md", "build.md")]
    with reader(empty_database) as someone:
        someone.follow(WALK)
        type_ = someone.terminals[-1].type
        type_('psql "$DATABASE_URL" -c "CREATE TABLE foreigners (a int)"')
        for page in pages:
            someone.follow(TEXT[page], page)
        assert_every_word_counts(someone, "".join([WALK, *map(TEXT.get, pages)]))
        typed = (someone.home / "npx-commands").read_text().splitlines()
        assert typed == NEON_COMMANDS
        assert "(0 rows)" in type_('psql "$DATABASE_URL" -c "TABLE foreigners"')
        assert "pip install -r tests/requirements.txt" in type_("python -m pytest")
        with fresh_database(server) as new:
            new = change_url(new, drivername="postgresql")
            type_(f"export DATABASE_URL='{new}'; alembic upgrade head")
            assert "No new upgrade operations detected" in type_("alembic check")


def test_an_empty_url_does_not_get_into_env(tables: str) -> None:
    (settings,) = re.findall(r"^\(umask .+?^END\n", WALK, re.MULTILINE | re.DOTALL)
    with reader(tables) as someone:
        terminal = someone.terminals[0]
        printed = terminal.type(f"unset DATABASE_URL\n{settings}")
        assert (
            "DATABASE_URL: is empty, so .env was not written: repeat step 2" in printed
        )
        assert not (someone.folder / ".env").exists()
        terminal.run(f"DATABASE_URL='{tables}'\n{settings}")
        assert (someone.folder / ".env").stat().st_mode & 0o777 == 0o600


def test_httpie_as_the_page_has_it(tables: str) -> None:
    with Service(tables) as service:
        token = service.account("ann@example.com").token
        login, me = re.findall(r"`(http .+?)`", PROSE[README])
        for command, word in ((login, "access_token"), (me, "ann@example.com")):
            typed = command.replace(":8000", f"--ignore-stdin :{service.port}")
            assert word in run("sh", "-c", typed, TOKEN=token).stdout


# --- What the pages say
def test_the_front_page_is_short() -> None:
    assert len(PROSE[README].split()) <= 900
    assert len(TEXT[README].splitlines()) <= 330
    (notes,) = re.findall(
        r"^```python notes\.py\n(.*?)^```", WALK, re.MULTILINE | re.DOTALL
    )
    assert len(notes.splitlines()) <= 30


def anchors(page: Path) -> set[str]:
    headings = re.findall("^#+ (.+)$", FENCE.sub("", TEXT[page]), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", PROSE[page]):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_the_front_page_links_everything_that_is_visible() -> None:
    links = set(re.findall(r"\]\((\w[^)#]+)\)", PROSE[README]))
    assert {"main.py", "init_db.py", "verify.sql", "requirements.txt", "tests"} < links
    assert {f"docs/{page.name}" for page in PAGES[1:]} <= links


def test_only_neon_s_commands_are_stood_in_for() -> None:
    blocks = re.findall(
        r"^```sh neon\n(.*?)^```", "".join(TEXT.values()), re.MULTILINE | re.DOTALL
    )
    assert re.findall(r"npx (-y neon@latest [^\n)]+)", "".join(blocks)) == NEON_COMMANDS


def test_ci_runs_the_page_s_own_test_command() -> None:
    command = re.search(
        "^python3 -m venv .* -m pytest tests$", TEXT[README], re.MULTILINE
    )[0]
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_page_names_the_number_of_tests() -> None:
    listed = run("python", "-m", "pytest", "tests", "--collect-only", "-q", "-n", "0")
    (number,) = re.findall(r"^(\d+) tests collected", listed.stdout, re.MULTILINE)
    assert f"= {number} passed in " in TEXT[README]


def test_the_example_in_main_py_is_like_the_page_s() -> None:
    assert "class Note(Base):" in docstring_example()
    assert "class Note(Base):" in WALK


ALL_PROSE = " ".join(re.sub(r"\s+", " ", prose) for prose in PROSE.values())


@pytest.mark.parametrize(
    ("said", "by"),
    [
        ("The token lasts 30 minutes", "Field(\n        30, ge=1,"),
        ("minutes, from 1 to 525600", "ge=1, le=525_600"),
        ("expected a number from 4 to 16", "Field(12, ge=4, le=16,"),
        ("expected 32 characters or more and no spaces", "min_length=32,"),
        ("| `BCRYPT_ROUNDS` | 12 |", "BCRYPT_ROUNDS: int = Field(12,"),
        ("has ten for your sessions", '"pool_size": 10,'),
        ("waits 5 seconds for one", '"pool_timeout": 5,'),
        ("20 connections", '"pool_size": 10,'),
        (
            "ten for the service's own queries and ten for your sessions",
            '"pool_size": 10,',
        ),
        ("503 after 10 seconds", "asyncio.timeout(10)"),
        ("more than 16 KiB", "max_body_size=16 * 1024"),
        (
            "four passwords are hashed at once",
            "CapacityLimiter(min(os.cpu_count() or 1, 4))",
        ),
        ("waits 3 seconds for its turn", "asyncio.timeout(3)"),
    ],
)
def test_numbers_that_the_pages_repeat(said: str, by: str) -> None:
    assert said in ALL_PROSE
    assert by in (ROOT / "main.py").read_text()


def test_seven_packages() -> None:
    assert "names seven packages" in ALL_PROSE
    assert len((ROOT / "requirements.txt").read_text().splitlines()) == 7


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist_or_are_made_by_it(page: Path) -> None:
    made = "\n".join(TEXT.values())
    for name in set(
        re.findall(r"`([\w./]+\.(?:py|sql|ini|txt|md|conf))`", PROSE[page])
    ):
        made_here = re.search(rf"[ /]{re.escape(Path(name).name)}\n", made)
        assert made_here or (ROOT / name).exists() or name == "alembic.ini", name
