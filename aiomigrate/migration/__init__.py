"""Migrations: the values that users write, how scripts are loaded, and their checksums."""
