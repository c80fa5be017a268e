"""Where images are, and how they become pixels and batches: ``--data.*``."""
