"""Published techniques, one module each: settings and a function that returns a plan."""
