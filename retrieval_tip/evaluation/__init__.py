"""Evaluation: figures, calibration, sweeps over methods and shots, and suspicious shots."""
