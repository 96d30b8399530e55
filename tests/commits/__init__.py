"""Tests of `aiomigrate.commits`."""
