"""Attention over the key blocks that a mask keeps: checked once, then handed to the implementation that suits the device."""
