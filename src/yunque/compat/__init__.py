"""Old interfaces over today's engine."""
