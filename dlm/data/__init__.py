"""Data: rows in, batches of windows out."""
