"""Accuracy reports, and the diagrams in them."""
