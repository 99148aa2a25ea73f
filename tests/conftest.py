"What several tests of pages share: the site, and a browser to read it in"

import functools
import http.server
import shutil
import threading

import pytest

CHROMIUM = (
    shutil.which("chromium")
    or shutil.which("chromium-browser")
    or shutil.which("google-chrome")
)
# Nothing of its own to ask the network
QUIET_BROWSER = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
LIMIT = 60_000  # milliseconds; the machine may be busy
HERE = ("http://127.0.0.1", "data:", "blob:")


@pytest.fixture(scope="session")
def processed(tmp_path_factory):
    "Path of each notebook -> it as Quarto gets it"
    import reader

    return reader.processed(tmp_path_factory.mktemp("processed"))


@pytest.fixture(scope="session")
def serve():
    "Serves folders; the address of one"
    servers = []

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    def start(folder):
        handler = functools.partial(Quiet, directory=folder)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()


@pytest.fixture(scope="session")
def site(processed, serve, tmp_path_factory):
    "Path of each notebook -> the address of its page, scripts beside it"
    import reader

    folder = tmp_path_factory.mktemp("site") / "docs"
    try:
        built = reader.build(processed, folder)
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    (folder / "favicon.ico").touch()  # browsers ask
    root = serve(folder)
    return {
        path: f"{root}/{page.relative_to(folder).as_posix()}"
        for path, page in built.items()
    }


@pytest.fixture(scope="session")
def open_browser(tmp_path_factory):
    "Opens Chromium"
    if not CHROMIUM:
        pytest.skip("no Chromium: apt-get install chromium")
    api = pytest.importorskip(
        "playwright.sync_api", reason="no playwright: pip install playwright"
    )
    with api.sync_playwright() as p:

        def launch(**settings):
            context = p.chromium.launch_persistent_context(
                tmp_path_factory.mktemp("profile"),
                executable_path=CHROMIUM,
                args=QUIET_BROWSER,
                **{"viewport": {"width": 1300, "height": 1000}} | settings,
            )
            context.set_default_timeout(LIMIT)
            return context

        yield launch


@pytest.fixture(scope="session")
def browser(open_browser):
    "Chromium as readers have it"
    context = open_browser()
    yield context
    context.close()


@pytest.fixture
def page(browser):
    """A tab, and in `page.faults` what its scripts complained of and whom it
    asked outside this machine"""
    page = browser.new_page()
    page.faults = []

    def on_console(message):
        if message.type == "error":
            page.faults.append(f"{message.text} {message.location.get('url')}")

    def on_request(request):
        if not request.url.startswith(HERE):
            page.faults.append(request.url)

    page.on("console", on_console)
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("request", on_request)
    yield page
    page.close()
