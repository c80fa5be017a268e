"""``featx show``: a finished file as one HTML page."""
