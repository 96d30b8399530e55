"""The tests: of values, of real databases, and of real processes that are killed."""
