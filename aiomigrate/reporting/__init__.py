"""Reports about a database: status, health, validation, and the timings of past runs. Pure."""
