"""The HTTP server and web page of ``retrieval-tip serve``. Needs ``pip install 'retrieval-tip[serve]'``.

``run`` starts the process and ``app`` the application. ``routes`` pass requests to ``service``, which works on the open
indexes of ``served`` and shares work by ``batching``. ``page`` holds the files for browsers.
"""
