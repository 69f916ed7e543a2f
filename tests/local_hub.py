"""A Hugging Face hub on loopback, for tests that download."""

import itertools
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants, utils

COMMIT = "0123456789abcdef" * 2 + "01234567"


class Handler(BaseHTTPRequestHandler):
    """What huggingface_hub asks of the hub for a snapshot."""

    def do_GET(self):
        self.server.asked.append(self.path)
        _, *parts = self.path.partition("?")[0].split("/")
        commit = next((part for part in parts if len(part) == 40), COMMIT)
        is_api = parts[0] == "api"  # /api/models/owner/name/revision/main
        owner, name, *rest = [p for p in parts if p not in ("api", "models", "datasets")]
        files = self.server.repositories.get(f"{owner}/{name}")
        body = (files or {}).get("/".join(rest[2:]))  # /owner/name/resolve/main/config.json
        if is_api and files is not None:
            rows = [{"type": "file", "path": n, "size": len(b)} for n, b in files.items()]
            rows = [row | {"oid": "0" * 40} for row in rows]
            siblings = [{"rfilename": row["path"]} for row in rows]
            info = {"id": f"{owner}/{name}", "sha": commit, "siblings": siblings}
            body = json.dumps(rows if "tree" in rest else info).encode()
        status, headers = 200, {"ETag": f'"{hash(body)}"', "X-Repo-Commit": commit}
        if body is None:
            status, code = (403, "GatedRepo") if self.server.gated else (404, "RepoNotFound")
            headers, body = {"X-Error-Code": code}, b""
        self.send_response(status)
        for header in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(*header)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub of `repositories`, and an empty cache; `asked` is what it was asked for.

    `offline(True)` cuts the line to it.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    server.repositories, server.asked, server.gated = {}, [], False
    address = f"http://127.0.0.1:{server.server_port}"
    values = {"ENDPOINT": address, "HF_HUB_CACHE": str(tmp_path / "cache")}
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    values["HUGGINGFACE_CO_URL_TEMPLATE"] = template
    library = [m for name, m in sys.modules.items() if name.startswith("huggingface_hub")]
    for module, name in itertools.product(library, values):  # versions below 1 import the names
        if name in vars(module):
            monkeypatch.setattr(module, name, values[name])

    def offline(value: bool) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", value)
        getattr(utils, "reset_sessions", lambda: None)()  # which know it, before version 1

    server.offline = offline
    offline(False)
    yield server
    server.shutdown()
    server.server_close()
