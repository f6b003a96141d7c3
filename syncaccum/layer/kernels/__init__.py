"""The passes over data in CPU memory, compiled: their source, and how to build it."""
