"""Speed measurements and paper claims; run from the root of the repository, never installed."""
