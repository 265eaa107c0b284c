"""Fitting of the metric, the values, the settings and fine-tuned keys to the shots."""
