"""Whole models over one pool."""
