"""The engine: options, the table of attacks, the bracket search, and its result."""
