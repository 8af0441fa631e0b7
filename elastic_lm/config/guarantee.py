"""What a guarantee promises where a caller says nothing; the command line can show it without NumPy."""

DEFAULT_EPSILON = 0.05  # probability that a guarantee fails
