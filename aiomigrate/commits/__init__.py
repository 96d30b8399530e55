"""Announces, counts and attributes the commits of a migration, and returns to savepoints."""
