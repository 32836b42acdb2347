"""Streams: ordered tasks, the protocol that cuts them, and the sources they come from."""
