"""Fitting: metric, values, settings and fine-tuned keys from the shots."""
