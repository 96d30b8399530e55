"""Tests of `aiomigrate.planning`."""
