"""Indexes over HTTP, and a page to look at them: ``retrieval-tip serve``. Needs ``pip install 'retrieval-tip[serve]'``.

``served`` holds what is served, ``batching`` answers requests together, ``requests`` reads what is sent and ``limits``
bounds it, ``problems`` and ``metrics`` say how it went, ``app`` is the routes, ``run`` the process; ``page`` is what a
browser gets.
"""
