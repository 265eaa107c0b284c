"""Find the keys that a query needs, and compute logits from them."""
