"""Where networks come from: a file for each library, with its names, weights and preprocessing."""
