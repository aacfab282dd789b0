"""A WSGI application: /slow?ms=3000 takes that long."""

import time


def app(environ, start_response):
    if environ["PATH_INFO"] == "/slow":
        time.sleep(int(environ["QUERY_STRING"].removeprefix("ms=")) / 1000)
    start_response("200 OK", [("Content-Length", "5")])
    return [b"done\n"]


application = app
