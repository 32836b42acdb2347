"""Subcommands of ``cl-peft`` about many runs: what each asks for, and what it calls."""
