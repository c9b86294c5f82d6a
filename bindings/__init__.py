"""What touches the outside world: adapter files, thin modules, other frameworks, the command line."""
