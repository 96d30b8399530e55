"""Tests of `aiomigrate.runs`."""
