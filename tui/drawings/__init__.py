"""Scenes to rows of styled text: no terminal, no store, no clock. The printed form (`--once`) uses the same."""
