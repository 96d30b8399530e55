"""Writing migration scripts: the scaffold of a new one."""
