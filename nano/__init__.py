"""nano: the built-in tiny model; its world, its training, its evaluation, its weights."""
