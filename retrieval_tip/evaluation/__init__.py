"""Evaluation: accuracy, calibration, sweeps over methods and shots, and audits of labels."""
