"""Serve a folder of wheels on this machine's loopback interface, and write the port to a file once the server listens.

    python3 images/serve.py images/wheels /tmp/port

pip accepts the address as --find-links; a Docker build reaches it with --network host.
"""

import functools
import http.server
import sys
from pathlib import Path


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


folder, port = sys.argv[1:]
with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as server:
    Path(port).write_text(str(server.server_port))
    server.serve_forever()
