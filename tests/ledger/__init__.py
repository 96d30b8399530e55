"""Tests of `aiomigrate.ledger`."""
