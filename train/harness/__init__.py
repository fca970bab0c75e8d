"""lmms-eval beside us: what it runs, in an environment of its own, against our server."""
