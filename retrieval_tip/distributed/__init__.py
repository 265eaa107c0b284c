"""Encode and classify on a Ray cluster; ``ray`` is imported only when needed."""
