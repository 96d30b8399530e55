"""Tests of `aiomigrate.backfill`."""
