"""`make gpu`: the toolkit proved and used on a GPU, with any Python that has torch (docs/air-gapped.md)."""
