"""Accuracy, calibration, label audits, and comparisons of methods and numbers of shots."""
