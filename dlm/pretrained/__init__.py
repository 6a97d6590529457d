"""Models by name: those that come with the package, and the base that they adapt."""
