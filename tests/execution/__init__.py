"""Tests of `aiomigrate.execution`."""
