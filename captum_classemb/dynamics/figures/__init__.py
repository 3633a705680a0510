"""Figures of the measurements: plain arrays drawn on one axis."""
