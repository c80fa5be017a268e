"""What a process does: start, signals, progress, cores, and all that is changed of Lightning."""
