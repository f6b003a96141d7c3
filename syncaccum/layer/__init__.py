"""A forward and its backward."""
