"""Suite runner: expands suites into cells, runs a server for each, compares with standard TP, draws the matrix."""
