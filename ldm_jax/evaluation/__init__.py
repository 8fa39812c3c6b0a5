"""Measurements and pictures of a run."""
