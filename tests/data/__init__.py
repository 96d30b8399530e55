"""Data of the tests: never changed by a later release."""
