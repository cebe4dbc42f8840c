"""Real Airflows as tests use them: starting them, running volumes in them, telling what failed."""
