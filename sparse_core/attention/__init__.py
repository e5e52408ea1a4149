"""Masks, selectors and the key-value cache that every attention method is made of."""
