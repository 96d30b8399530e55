"""Executes one migration: applies operations, records them, recovers from crashes, undoes."""
