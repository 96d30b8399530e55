"""The version of aiomigrate, recorded in every journal event."""

__version__ = "0.1.0"
