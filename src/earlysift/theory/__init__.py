"""The statements behind selection as functions that run: problems, runs, bounds, and what was measured against them."""
