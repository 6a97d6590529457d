"""Conversations apart from the terminal: what is said, and who answers."""
