"""Tests of `aiomigrate.operations`."""
