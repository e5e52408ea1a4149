"""One paper, one file: methods that choose what is computed."""
