"""What other software needs to work with syncaccum, one file each, imported only on demand."""
