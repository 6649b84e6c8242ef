"""Figures, tables and pages of results: what a run shows, and one page of all that lies there."""
