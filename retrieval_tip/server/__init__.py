"""The HTTP server and web page of ``retrieval-tip serve``.

The required packages are in the extra ``serve``. The module ``run`` starts the server, and
``app`` creates the application. ``routes`` passes requests to ``service``, which works on the open indexes in
``served`` and combines the work of several requests with ``batching``. The folder ``page`` is sent to browsers.
"""
