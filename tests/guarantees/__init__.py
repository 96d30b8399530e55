"""The guarantees that a database in the field relies on: they hold for every later release."""
