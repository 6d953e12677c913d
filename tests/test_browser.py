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
from playwright.sync_api import (
    Browser,
    Error,
    Locator,
    Page,
    Route,
    expect,
    sync_playwright,
)
from support.command import ROOT, from_npm, missing
from support.service import Service

PATIENCE = 20_000  # milliseconds, for a busy machine
SWAGGER_UI = "swagger-ui-dist@5"  # as FastAPI's page names it
CDN = f"https://cdn.jsdelivr.net/npm/{SWAGGER_UI}/"
BUILD = (ROOT / "docs" / "build.md").read_text()
(CORS,) = re.findall(r"^```python cors\.py\n(.*?)^```", BUILD, re.MULTILINE | re.DOTALL)
(FETCH,) = re.findall(r"^```js\n(.*?)^```", BUILD, re.MULTILINE | re.DOTALL)


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


# --- /docs
@pytest.fixture(scope="module")
def swagger_ui(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with Swagger UI's files, the same that the CDN gives to a reader."""
    return from_npm(SWAGGER_UI, tmp_path_factory.mktemp("swagger")) / "swagger-ui-dist"


@pytest.fixture
def docs(page: Page, swagger_ui: Path, service: Service) -> Page:
    """The page /docs, opened."""

    def instead_of_the_cdn(route: Route) -> None:
        route.fulfill(path=swagger_ui / route.request.url.removeprefix(CDN))

    page.route(f"{CDN}*", instead_of_the_cdn)
    page.goto(f"{service.url}/docs")
    return page


def click(place: Page | Locator, button: str) -> None:
    place.get_by_role("button", name=button, exact=True).click()


def opened(docs: Page, path: str) -> Locator:
    """A route on the page, ready to be tried out."""
    route = docs.locator(".opblock", has=docs.locator(f'[data-path="{path}"]'))
    route.locator(".opblock-summary-control").click()
    click(route, "Try it out")
    return route


def execute(route: Locator, status: int) -> Any:
    """The body of the answer that the page shows after a click on Execute."""
    click(route, "Execute")
    answer = route.locator(".live-responses-table .response")
    # The page adds "Undocumented" where OpenAPI does not list the status.
    expect(answer.locator(".response-col_status")).to_have_text(str(status))
    return json.loads(answer.locator("code").first.inner_text())


def test_a_person_registers_logs_in_and_uses_the_token(docs: Page) -> None:
    register, login = opened(docs, "/auth/register"), opened(docs, "/auth/login")
    user = execute(register, 201)
    assert execute(register, 409) == {"detail": "Email already registered"}
    token = execute(login, 200)["access_token"]
    me = opened(docs, "/auth/me")
    assert execute(me, 401) == {"detail": "Not authenticated"}
    click(docs, "Authorize")
    dialog = docs.locator(".modal-ux")
    dialog.get_by_role("textbox").fill(token)
    click(dialog, "Apply credentials")  # the button that shows "Authorize"
    click(dialog, "Close")
    assert execute(me, 200) == user


# --- Another origin
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
    with ThreadingHTTPServer(("127.0.0.1", 0), FrontEnd) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


BROKEN = """
from main import app

@app.get("/broken")
async def broken() -> None:
    raise LookupError
"""


def test_a_page_of_another_origin_logs_in(
    page: Page, origin: str, database: str, tmp_path: Path
) -> None:
    cors = CORS.replace("https://app.example.com", origin)
    (tmp_path / "cors.py").write_text(cors)
    (tmp_path / "notes.py").write_text(BROKEN)
    here = "--app-dir", str(tmp_path)  # comes before a notes.py of the reader's own
    with Service(database, *here, app="cors:app", PYTHONPATH=str(ROOT)) as service:
        service.tracebacks = True
        eve = service.account("eve@example.com", "battery staple")
        script = FETCH.replace("http://127.0.0.1:8000", service.url)
        script = script.replace("ann@example.com", eve.email)
        page.goto(origin)
        found = page.evaluate(f"async () => {{ {script}; return me }}")
        assert (found["id"], found["email"]) == (eve.id, eve.email)
        with pytest.raises(Error, match="Failed to fetch"):
            page.evaluate(f"fetch('{service.url}/broken')")


def test_without_cors_it_fails_to_fetch(
    page: Page, origin: str, service: Service
) -> None:
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.goto(origin)
    with pytest.raises(Error, match="Failed to fetch"):
        page.evaluate(f"fetch('{service.url}/auth/me')")
    why = "No 'Access-Control-Allow-Origin' header is present"
    assert any(why in line for line in said), said
