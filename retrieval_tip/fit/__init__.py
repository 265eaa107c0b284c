"""Fit the metric, the values and the settings of an index to its shots, and fine-tune its keys."""
