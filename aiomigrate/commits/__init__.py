"""One table under change: every commit announced, counted, attributed, and undone by savepoint."""
