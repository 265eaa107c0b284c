"""Accuracy reports and diagrams."""
