"""Exports `Kind` under its former path. New code imports it as `aiomigrate.Kind`."""

from aiomigrate.ledger.records import Kind

__all__ = ["Kind"]
