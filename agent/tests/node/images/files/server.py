"""A server without a framework: /slow?ms=3000 takes that long. With "drain", SIGTERM lets it finish its requests."""

import http.server
import signal
import sys
import threading
import time


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path.startswith("/slow"):
            time.sleep(int(self.path.removeprefix("/slow?ms=")) / 1000)
        self.send_response(200)
        self.send_header("Content-Length", "5")
        self.end_headers()
        self.wfile.write(b"done\n")


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = False


server = Server(("", int(sys.argv[1])), Handler)
if "drain" in sys.argv:
    stop = threading.Thread(target=server.shutdown)
    signal.signal(signal.SIGTERM, lambda *_: stop.start())
server.serve_forever()
server.server_close()
