"""Methods that choose which keys a query looks at."""
