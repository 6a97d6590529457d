"""The evaluation commands of `dlm`."""
