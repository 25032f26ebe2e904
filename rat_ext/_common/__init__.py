"""What every floor stands on: running a user's model undisturbed, their loaders, files on disk."""
