"""The client's side of a server under load: requests with their times, traffic, what was measured, a soak."""
