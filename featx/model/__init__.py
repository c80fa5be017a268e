"""A name or a file becomes a network, and images its activations: ``--model.*``."""
