"""Interfaces: each module speaks one protocol and knows nothing of the others."""
