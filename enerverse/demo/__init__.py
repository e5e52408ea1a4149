"""What the imagine and demo verbs share: episodes in memory, imagining them, the page that shows the results."""
