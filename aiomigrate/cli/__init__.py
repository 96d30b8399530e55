"""The `aiomigrate` command. `app` has its verbs and `run`; importing this package is light."""
