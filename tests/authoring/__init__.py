"""Tests of `aiomigrate.authoring`."""
