"""Graphs and how they are run: bundle, specs, engines."""
