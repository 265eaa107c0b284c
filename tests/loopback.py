"""An HTTP server on this machine for a handler of a test. Benchmarks use it too, so it needs only Python itself."""

import threading
from contextlib import contextmanager
from http.server import ThreadingHTTPServer


@contextmanager
def answering(handler, **attributes):
    """Run a server for a handler, and yield its address. The handler finds the ``attributes`` on its server."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        vars(server).update(attributes)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
