"""Samples, micro-world, chain, teacher, selection, classifier, evaluation."""
