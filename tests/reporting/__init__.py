"""Tests of `aiomigrate.reporting`."""
