"""The exact mode: micro-batches side by side."""
