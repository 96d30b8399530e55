"""The path under which `aiomigrate.events` names the kinds of journal events."""

from aiomigrate.ledger.records import Kind

__all__ = ["Kind"]
