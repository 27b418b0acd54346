"""Pools that approximate trained weights."""
