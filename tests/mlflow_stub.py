"""A small HTTP server that answers as an MLflow server that is not ours would: it asks who we are, or has no proxy."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

USER_LOGIN = "Basic " + base64.b64encode(b"reader:hunter2hunter2").decode()
NOT_AUTHENTICATED = b"You are not authenticated."


@contextmanager
def mlflow_stub(
    *, login: str | None = None, locations: dict[str, str] | None = None, page: bytes | None = None, status: int = 401
) -> Iterator[str]:
    """Serve, and yield the tracking URI.

    Args:
        login: the only `Authorization` that is let in; any, if None.
        locations: experiment → its artifact location, the newest first.
        page: is answered to every request, in place of JSON.
        status: of the answer to who is not let in.
    """
    experiments = [{"name": name, "artifact_location": place} for name, place in (locations or {}).items()]

    class Stub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            address = urlsplit(self.path)
            name = parse_qs(address.query).get("experiment_name", [""])[0]
            found = [experiment for experiment in experiments if experiment["name"] == name]
            if login is not None and self.headers.get("Authorization") != login:
                self._answer(status, NOT_AUTHENTICATED)
            elif page is not None:
                self._answer(200, page)
            elif address.path.endswith("/experiments/search"):
                self._answer(200, json.dumps({"experiments": experiments[:1]} if experiments else {}).encode())
            elif found:
                self._answer(200, json.dumps({"experiment": found[0]}).encode())
            else:
                self._answer(404, b'{"error_code": "RESOURCE_DOES_NOT_EXIST"}')

        def _answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Stub) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
