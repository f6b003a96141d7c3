"""Who takes part, and every collective of the package."""
