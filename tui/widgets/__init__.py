"""Drawings on a terminal: Textual widgets that hold a subject and repaint only when it changed."""
