"""Speed against the real alternative, in one process, the candidates taking turns."""
