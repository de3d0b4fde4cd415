"""Speed only: nothing in here changes a result."""
