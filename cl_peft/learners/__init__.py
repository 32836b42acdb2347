"""Learners: what is trained on a task, with which loss. ``base``, then one file per algorithm."""
