"""In a real browser: a page of another origin calls the service, as docs/build.md says."""

import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Error, Page, sync_playwright
from support.command import ROOT, missing
from support.service import Service

PATIENCE = 20_000  # milliseconds, for a busy machine
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
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """An empty page, without what another one was told."""
    context = browser.new_context()
    context.set_default_timeout(PATIENCE)
    yield context.new_page()
    context.close()


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
