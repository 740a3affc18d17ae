"""The seven screens: each says which panes it has, what they show, and what its own keys do."""
