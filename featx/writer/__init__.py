"""Activations become files that survive: ``--writer.*``."""
