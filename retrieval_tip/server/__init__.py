"""Indexes over HTTP, and a page to look at them: ``retrieval-tip serve``. Needs ``pip install 'retrieval-tip[serve]'``.

``served`` holds what is served, ``service`` does the work, ``batching`` that of requests together, ``uploads`` reads
what is sent and ``limits`` bounds it, ``problems`` and ``metrics`` say how it went, ``routes`` ask and answer, ``run``
is the process; ``page`` is what a browser gets.
"""
