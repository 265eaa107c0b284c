"""Retrieval: find keys for queries, and compute logits from them."""
