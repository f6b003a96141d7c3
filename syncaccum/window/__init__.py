"""A window's life over ranks: which layers, what message, commit, save, join."""
