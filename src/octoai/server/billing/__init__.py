"""Money: what things cost from when on, and what came to it."""
