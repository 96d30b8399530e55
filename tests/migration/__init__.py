"""Tests of `aiomigrate.migration`."""
