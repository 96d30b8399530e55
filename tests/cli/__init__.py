"""Tests of `aiomigrate.cli`."""
