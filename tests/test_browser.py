"""In a real browser: the page /docs as a person uses it, and a page of another origin."""

import json
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT, Service
from playwright.sync_api import (
    Browser,
    Error,
    Locator,
    Page,
    Route,
    expect,
    sync_playwright,
)
from pooler import from_npm, missing

PATIENCE = 20_000  # milliseconds, for a busy machine


# --- The browser, and what it may load

SWAGGER_UI = "swagger-ui-dist@5"  # as FastAPI's page names it
CDN = f"https://cdn.jsdelivr.net/npm/{SWAGGER_UI}/"


@pytest.fixture(scope="module")
def swagger_ui(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with Swagger UI's files, the same that the CDN gives to a reader."""
    modules = from_npm(SWAGGER_UI, tmp_path_factory.mktemp("swagger-ui"))
    return modules / "swagger-ui-dist"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium without a window."""
    found = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    program = next(filter(None, found), None)
    if program is None:
        missing("Chromium (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        # Neither a page nor Chromium itself reaches a host but this one.
        alone = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
        browser = playwright.chromium.launch(executable_path=program, args=[alone])
        expect.set_options(timeout=PATIENCE)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """An empty page, without what another one was told."""
    context = browser.new_context()
    context.set_default_timeout(PATIENCE)
    yield context.new_page()
    context.close()


@pytest.fixture
def docs(page: Page, swagger_ui: Path, service: Service) -> Page:
    """The page /docs, opened."""

    def instead_of_the_cdn(route: Route) -> None:
        route.fulfill(path=swagger_ui / route.request.url.removeprefix(CDN))

    page.route(f"{CDN}*", instead_of_the_cdn)
    page.goto(f"{service.url}/docs")
    return page


# --- /docs


def opened(docs: Page, path: str) -> Locator:
    """A route on the page, after a click on it."""
    route = docs.locator(".opblock", has=docs.locator(f'[data-path="{path}"]'))
    route.locator(".opblock-summary-control").click()
    return route


def click(place: Page | Locator, button: str) -> None:
    place.get_by_role("button", name=button, exact=True).click()


def expect_answer(route: Locator, status: int) -> Any:
    """The body of the answer that the page shows, once it shows one of this status."""
    answer = route.locator(".live-responses-table .response")
    # The page adds "Undocumented" where OpenAPI does not list the status.
    expect(answer.locator(".response-col_status")).to_have_text(str(status))
    return json.loads(answer.locator("code").first.inner_text())


def test_a_person_registers_logs_in_and_uses_the_token(docs: Page) -> None:
    register = opened(docs, "/auth/register")
    click(register, "Try it out")
    click(register, "Execute")
    user = expect_answer(register, 201)
    click(register, "Execute")
    assert expect_answer(register, 409) == {"detail": "Email already registered"}

    login = opened(docs, "/auth/login")
    click(login, "Try it out")
    click(login, "Execute")
    token = expect_answer(login, 200)["access_token"]

    me = opened(docs, "/auth/me")
    click(me, "Try it out")
    click(me, "Execute")
    assert expect_answer(me, 401) == {"detail": "Not authenticated"}
    click(docs, "Authorize")
    dialog = docs.locator(".modal-ux")
    expect(dialog).to_contain_text("access_token")
    dialog.get_by_role("textbox").fill(token)
    click(dialog, "Apply credentials")  # the button that shows "Authorize"
    click(dialog, "Close")
    click(me, "Execute")
    assert expect_answer(me, 200) == user


def test_the_page_says_what_the_service_is(docs: Page) -> None:
    said = docs.locator(".info .title")
    for words in ("register", "log in", "access token"):
        expect(said).to_contain_text(words, ignore_case=True)
    # One group: a route without a tag would stand under "default".
    expect(docs.locator(".opblock-tag")).to_have_text(["auth"])
    expect(docs.locator(".opblock-tag-section .opblock")).to_have_count(3)


def test_the_page_says_which_passwords_are_refused_and_how(
    docs: Page, service: Service
) -> None:
    register = opened(docs, "/auth/register")
    example = register.locator('.response[data-code="422"] code').first.inner_text()
    (shown,) = json.loads(example)["detail"]
    (sent,) = service.register("bob@example.com", "horse").json()["detail"]
    assert shown.keys() == sent.keys()
    register.get_by_role("tab", name="Schema").first.click()
    click(register, "password*")
    limits = register.get_by_text(re.compile("8 characters.* 72 bytes"))
    expect(limits).to_be_visible()


# --- Another origin

CORS = re.search(
    r"(?ms)^```python cors\.py\n(.*?)^```$", (ROOT / "README.md").read_text()
)[1]
(ORIGIN,) = re.findall(r"""https?://[^"']+""", CORS)

# Gives status and body, as a page's own script would get them.
FETCH = """
    async ([url, body, token]) => {
        const headers = {}
        if (body) headers["Content-Type"] = "application/json"
        if (token) headers["Authorization"] = `Bearer ${token}`
        const method = body ? "POST" : "GET"
        const answer = await fetch(url, {method, headers, body: body && JSON.stringify(body)})
        return [answer.status, await answer.json()]
    }
"""


class FrontEnd(BaseHTTPRequestHandler):
    """A server of one page, the same for every path."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<title>a front end</title>")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def origin() -> Iterator[str]:
    """The origin of a front end that is served from a port of its own."""
    # Not by page.route: Chromium lets no page reach 127.0.0.1 whose own address it cannot see.
    with ThreadingHTTPServer(("127.0.0.1", 0), FrontEnd) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def fetch(
    page: Page, url: str, body: dict[str, str] | None = None, token: str | None = None
) -> tuple[int, Any]:
    """Status and body of what a script in the page fetches. Raises Playwright's Error."""
    status, answer = page.evaluate(FETCH, [url, body, token])
    return status, answer


EVE = {"email": "eve@example.com", "password": "correct horse"}


def test_a_page_of_another_origin_logs_in(
    page: Page, origin: str, database: str, tmp_path: Path
) -> None:
    (tmp_path / "cors.py").write_text(CORS.replace(ORIGIN, origin))
    folder = ("--app-dir", str(tmp_path))
    with Service(database, *folder, app="cors:app", PYTHONPATH=str(ROOT)) as service:
        register, login, me = (
            f"{service.url}/auth/{route}" for route in ("register", "login", "me")
        )
        page.goto(origin)
        status, user = fetch(page, register, EVE)
        assert status == 201
        refusal = fetch(page, login, EVE | {"password": "a guess"})
        assert refusal == (401, {"detail": "Wrong email or password"})
        status, answer = fetch(page, login, EVE)
        assert status == 200
        assert fetch(page, me, token=answer["access_token"]) == (200, user)


def test_without_cors_it_cannot(page: Page, origin: str, service: Service) -> None:
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.goto(origin)
    with pytest.raises(Error, match="Failed to fetch"):
        fetch(page, f"{service.url}/auth/login", EVE)
    why = "No 'Access-Control-Allow-Origin' header is present"
    assert any(why in line for line in said), said
