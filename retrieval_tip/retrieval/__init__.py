"""Retrieval: which keys a query meets, and what they give."""
