"""The report of an index, and its plots."""
