"""What every floor stands on: running a user's model, their loaders, and state on disk."""
