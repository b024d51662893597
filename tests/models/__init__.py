"""Tiny, seeded models of the real classes; each builder checks that what it built is not degenerate."""
