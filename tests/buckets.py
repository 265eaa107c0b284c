"""An object store on loopback (moto's S3), and the environment to reach it."""

import atexit
import functools
import io
import itertools
import os
import threading
import urllib.request

KEY, SECRET, REGION = "testing-key", "testing-secret", "us-east-1"

_numbers = itertools.count()


def _one_at_a_time(app):
    """Check and write an object in one step, as a real service does; moto uses two."""
    lock = threading.Lock()

    def call(environ, start_response):
        if length := environ.get(
            "CONTENT_LENGTH"
        ):  # read first, so that a stopped client blocks no other
            environ["wsgi.input"] = io.BytesIO(environ["wsgi.input"].read(int(length)))
        with lock:
            return list(app(environ, start_response))

    return call


@functools.cache
def endpoint():
    """Return the address of this process's server, and start it on first use. It ends with the process."""
    from moto.moto_server.werkzeug_app import (
        DomainDispatcherApplication,
        MotoRequestHandler,
        create_backend_app,
    )
    from werkzeug.serving import make_server

    class Quiet(MotoRequestHandler):
        def log(self, *_):
            pass

    app = _one_at_a_time(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
    )
    thread.start()

    def stop():
        server.shutdown()
        thread.join(5)
        server.server_close()

    atexit.register(stop)
    return f"http://127.0.0.1:{server.server_port}"


def use(monkeypatch, address, **more):
    """Set the environment to find a server; child processes inherit it."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_"))]:
        monkeypatch.delenv(name)
    settings = {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": REGION,
        "AWS_ENDPOINT_URL": address,
        "AWS_ALLOW_HTTP": "true",
        "AWS_METADATA_ENDPOINT": "http://127.0.0.1:9",  # no request leaves this machine
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    for name, value in (settings | more).items():
        monkeypatch.setenv(name, value)


def fresh_bucket():
    """Create a bucket and return its name."""
    name = f"bucket-{os.getpid()}-{next(_numbers)}"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(f"{endpoint()}/{name}", method="PUT")) as answer:
        assert answer.status == 200
    return name
