"""`make gpu`: proves the toolkit on a GPU and uses it, with whatever Python has torch; see docs/air-gapped.md."""
