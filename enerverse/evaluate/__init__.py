"""Measuring what the models do: imagination against the truth, policies in the simulator."""
