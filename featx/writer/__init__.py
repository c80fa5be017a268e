"""Activations -> files that survive: ``--writer.*``."""
