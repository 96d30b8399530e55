"""Tests of `aiomigrate.store`."""
