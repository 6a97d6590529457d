"""The commands that this package adds to `dlm`; light to import, the work is imported when it runs."""
