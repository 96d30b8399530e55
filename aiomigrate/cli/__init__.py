"""The `aiomigrate` command: `app` defines its verbs and `run`. Importing this package is cheap."""
